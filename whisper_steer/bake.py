"""Baking: a Shift becomes part of a model's weights, so that any runtime is steered without a plugin.

    bake("mini.en", alpha=1.0, format="ct2", steering="my-shift.safetensors")   # -> mini.en-ct2-baked/
    unbake("mini.en-ct2-baked")                                                 # the original bytes

Only what is constant over frames can be baked: Shifts. Gates and latent edits depend on the audio;
calibration.shift_fit approximates them by a Shift. Beside what was baked lies a record (JSON): what was
added, and the bytes that restore the original.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bake_files import fitting, format_of, splices_of
from .bake_record import (
    RECORD_FILE,
    RECORD_SUFFIX,
    packed,
    read_records,
    record_path,
    renamed,
    unpacked,
    write_record,
)
from .convert import FORMATS, check_dtype, convert, default_path, refuse_existing, write_new
from .errors import FormatError, UsageError
from .splices import inverse, patch_file
from .zoo import DEFAULT_MODEL

if TYPE_CHECKING:
    import numpy as np
    from whisper.model import Whisper

    from .profiles import FrontierPoint
    from .steering import Steering

logger = logging.getLogger("whisper_steer")


@dataclass(frozen=True)
class Baked:
    """What `bake` wrote. path: file or folder; record: its metadata file; layers: encoder blocks changed
    (0-based); patched: names of the files whose bytes changed; verified: the steering was found to be for
    exactly this encoder (False: only width and depth could be compared); profile: the name that alpha was
    asked for by; measured: the steering's rates at that alpha, where its file has them."""

    path: Path
    record: Path
    format: str
    alpha: float
    steering: str
    layers: tuple[int, ...]
    patched: tuple[str, ...]
    verified: bool
    profile: str | None = None
    measured: FrontierPoint | None = None


def constant_shifts(steering: Steering, alpha: float) -> dict[int, np.ndarray]:
    """What a steering adds to each layer's output, (d_model,) float32 by layer, if that is the same for every
    frame. Raises UsageError if it is not: there is a gate, or an edit other than a Shift."""
    import torch

    from .steering import LatentEdit, MeanAblation

    name = steering.metadata.get("name") or "this steering"
    found = ["a gate"] if steering.gate is not None else []
    kinds = {LatentEdit: "a latent edit", MeanAblation: "a mean ablation"}
    found += [what for kind, what in kinds.items() if any(isinstance(edit, kind) for edit in steering.edits)]
    if found:
        raise UsageError(
            f"{name} has {' and '.join(found)}, which depends on the audio and cannot be baked: attach it "
            "with whisper_steer.steer, or bake the best Shift in its place (bake --approximate FOLDER)"
        )
    total: dict[int, torch.Tensor] = {}
    for edit in steering.edits:
        delta = edit.delta(torch.zeros(1), alpha)  # a Shift's, which needs no activation
        total[edit.layer] = total.get(edit.layer, 0) + delta
    return {layer: vector.numpy() for layer, vector in total.items()}


def bake(
    model: str | Path | Whisper = DEFAULT_MODEL,
    *,
    alpha: float | None = None,
    profile: str | None = None,
    format: str | None = None,
    out: str | Path | None = None,
    steering: Steering | str | Path | None = None,
    dtype: str | None = None,
    again: bool = False,
    download_root: str | Path | None = None,
) -> Baked:
    """Write a model with `alpha` (1 by default) times a Shift in its weights; profile: the steering's alpha
    of that name in its place.

    model: a file or folder of one of the four formats (.pt; transformers folder; CTranslate2 folder; ggml
    file), which is patched: read as a stream, the other files of a folder hard-linked or copied. Else
    anything that load_model takes, converted to `format` first. format None: that of the file. dtype: for the
    conversion, see convert.DTYPES. steering None: the one kept for the model. again: bake more into what is
    baked already. out: must not exist yet; None: named after the model, in the current folder.

    Raises UsageError (nothing that can be baked, baked already, `out` exists, ...), MismatchError (steering
    of another model), ModelError, FormatError.
    """
    from .attach import check_strength

    alpha = check_strength(alpha, profile)
    if format is not None:
        check_dtype(format, dtype)
    source = Path(model).expanduser() if isinstance(model, (str, Path)) else None
    own = format_of(source) if source is not None and source.exists() else None
    if source is None or own is None or format not in (None, own):
        return _bake_converted(model, alpha, profile, format, out, steering, dtype, download_root)
    if dtype is not None:
        raise UsageError(f"{source} is patched as it is and keeps its types: leave --dtype out")
    records = read_records(source)
    if records and not again:
        raise UsageError(
            f"{source} is baked already (alpha {records[-1]['alpha']:g} of {records[-1]['steering']}): "
            "unbake it first, or pass --again to add more"
        )
    resolved = _resolve(steering, _readable(source, own) if steering is None else source)
    alpha = alpha if profile is None else resolved.alpha_of(profile)
    additions = constant_shifts(resolved, alpha)
    verified = _checked(resolved, source, own, records)
    target = Path(out) if out is not None else Path(f"{source.resolve().stem}-baked{source.suffix}")
    done = _write(source, target, own, additions, resolved, alpha, verified, records)
    return _named(done, resolved, profile)


def unbake(path: str | Path, out: str | Path | None = None) -> Path:
    """Restore the original bytes of what `bake` wrote; returns where.

    out None: in place, and the record goes; else a new file or folder. Raises UsageError (there is no record,
    or `out` exists), FormatError (the files are not those that were baked).
    """
    source = Path(path).expanduser()
    records = read_records(source)
    if not records:
        raise UsageError(
            f"{source} has no record of baking ({record_path(source).name}): it cannot be restored"
        )
    target = source if out is None else Path(out)
    if out is not None:
        refuse_existing(target)
    restored: dict[str, bool] = {}
    with tempfile.TemporaryDirectory(dir=source.parent, prefix=".unbake.") as work:
        for record in reversed(records):
            for name, change in record["files"].items():
                current = Path(work) / name if name in restored else _inside(source, name)
                applied = patch_file(current, Path(work) / name, unpacked(change["restore"]))
                if applied.sha256_before != change["sha256_after"]:
                    raise FormatError(f"{current} was changed after it was baked: it cannot be restored")
                if applied.sha256_after != change["sha256_before"]:
                    raise FormatError(f"{record_path(source)} is damaged: the original would not come back")
                restored[name] = True
        _put_back(source, target, Path(work), list(restored))
    return target


def _put_back(source: Path, target: Path, work: Path, names: Sequence[str]) -> None:
    """Move the restored files from `work` to where they belong."""
    if target == source:
        for name in names:
            os.replace(work / name, _inside(source, name))
        record_path(source).unlink()
    elif source.is_dir():
        write_new(target, lambda folder: _copy_folder(source, folder, {name: work / name for name in names}))
    else:
        write_new(target, lambda file: os.replace(work / names[0], file))


def _bake_converted(
    model: str | Path | Whisper,
    alpha: float,
    profile: str | None,
    format: str | None,
    out: str | Path | None,
    steering: Steering | str | Path | None,
    dtype: str | None,
    download_root: str | Path | None,
) -> Baked:
    """Load, check, convert to a temporary place, and patch that."""
    from .zoo import load_model

    if format is None:
        raise UsageError(
            f"format is missing: expected one of {', '.join(FORMATS)}, as {model} has none of them"
        )
    loaded = model
    if isinstance(model, (str, Path)):
        loaded = load_model(model, device="cpu", download_root=download_root)
    resolved = _resolve(steering, loaded)
    alpha = alpha if profile is None else resolved.alpha_of(profile)
    additions = constant_shifts(resolved, alpha)
    resolved.check(loaded)
    name = str(model) if isinstance(model, (str, Path)) else str(getattr(model, "name", None) or "model")
    plain = default_path(name, format)
    suffix = plain.suffix if format in ("openai", "ggml") else ""
    target = Path(out) if out is not None else Path(f"{plain.name.removesuffix(suffix)}-baked{suffix}")
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".bake.") as work:
        converted = convert(loaded, format, Path(work) / target.name, dtype=dtype)  # type: ignore[arg-type]
        done = _write(converted, target, format, additions, resolved, alpha, True, [])
    return _named(done, resolved, profile)


def _named(done: Baked, steering: Steering, profile: str | None) -> Baked:
    return done if profile is None else replace(done, profile=profile, measured=steering.measured(done.alpha))


def _write(
    source: Path,
    target: Path,
    format: str,
    additions: Mapping[int, np.ndarray],
    steering: Steering,
    alpha: float,
    verified: bool,
    records: Sequence[dict[str, Any]],
) -> Baked:
    name = str(steering.metadata.get("name") or "shift")
    fitting(source, format, steering.d_model, tuple(additions), name)
    refuse_existing(target)
    changes = splices_of(source, format, additions)
    patched = tuple(sorted(changes))
    record: dict[str, Any] = {
        "alpha": alpha,
        "steering": name,
        "base_model": steering.metadata.get("base_model"),
        "encoder_sha256": steering.metadata.get("encoder_sha256"),
        "format": format,
        "layers": sorted(additions),
        "norms": {str(layer): float((vector**2).sum() ** 0.5) for layer, vector in additions.items()},
        "verified": verified,
        "files": {},
    }

    def patch(file: str, into: Path) -> None:
        applied = patch_file(_inside(source, file), into, changes[file])
        if records:
            before = records[-1]["files"].get(file, {}).get("sha256_after", applied.sha256_before)
            if before != applied.sha256_before:
                raise FormatError(
                    f"{source} was changed after it was baked: its record does not hold any more"
                )
        record["files"][file if source.is_dir() else target.name] = {
            "sha256_before": applied.sha256_before,
            "sha256_after": applied.sha256_after,
            "restore": [packed(splice) for splice in inverse(changes[file])],
        }

    def write_folder(folder: Path) -> None:
        folder.mkdir()
        for file in patched:
            patch(file, folder / file)
        _copy_folder(source, folder, {}, skip=patched)
        write_record(folder / RECORD_FILE, [*records, record])

    def write_file(file: Path) -> None:
        patch(patched[0], file)
        # first the record: a record without its file harms nobody, a baked file without one looks plain
        write_record(target.with_name(target.name + RECORD_SUFFIX), [*renamed(records, target.name), record])

    write_new(target, write_folder if source.is_dir() else write_file)
    where = record_path(target)
    return Baked(target, where, format, alpha, name, tuple(sorted(additions)), patched, verified)


def _copy_folder(source: Path, folder: Path, replaced: Mapping[str, Path], skip: Sequence[str] = ()) -> None:
    """Hard links (copies where that is not possible) of all files; `replaced` are moved in; no record."""
    folder.mkdir(exist_ok=True)
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if not file.is_file() or str(name) in (*skip, RECORD_FILE):
            continue
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if str(name) in replaced:
            os.replace(replaced[str(name)], place)
            continue
        try:
            os.link(file.resolve(), place)
        except OSError:
            shutil.copy2(file, place)


def _inside(source: Path, name: str) -> Path:
    """A file of a folder; the file itself otherwise."""
    if Path(name).name != name:
        raise FormatError(f"{name!r} in the record of {source} is not a plain file name")
    return source / name if source.is_dir() else source


# ---------- whose steering it is


def _resolve(steering: Steering | str | Path | None, model: Any) -> Steering:
    from . import zoo
    from .steering import Steering

    if isinstance(steering, Steering):
        return steering
    if steering is not None:
        return zoo.load_steering(steering, getattr(model, "name", None))
    return zoo.steering_for(model)


def _readable(source: Path, format: str) -> Whisper:
    """The model in a file whose weights tell which one it is."""
    from .loading import load_path

    if format not in ("openai", "transformers"):
        raise UsageError(
            f"steering is missing: {source} does not tell which model it is, pass --steering FILE"
        )
    return load_path(source)[0]


def _checked(steering: Steering, source: Path, format: str, records: Sequence[dict[str, Any]]) -> bool:
    """True if the encoder in `source` is the steering's; False where it was rounded and cannot be told.

    Raises MismatchError if it is another one.
    """
    own = steering.metadata.get("encoder_sha256")
    if own is None:
        return False
    if records:  # the weights have moved; what was recorded before still tells
        return bool(records[0].get("encoder_sha256") == own and records[0].get("verified"))
    if format in ("openai", "transformers"):
        steering.check(_readable(source, format))
        return True
    logger.warning(
        "%s is rounded for its runtime: that it is the model of the steering is not checked", source
    )
    return False

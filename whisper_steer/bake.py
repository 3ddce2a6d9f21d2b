"""Baking: a Shift becomes part of a model's weights, so that any runtime is steered without a plugin.

    bake("mini.en", alpha=1.0, format="ct2", steering="my-shift.safetensors")   # -> mini.en-ct2-baked/
    unbake("mini.en-ct2-baked")                                                 # the original bytes

Only what is constant over frames can be baked: Shifts. Gates and latent edits depend on the audio;
calibration.shift_fit approximates them by a Shift. Beside what was baked lies a record (JSON): what was
added, and the bytes that restore the original.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bake_files import fitting, format_of, left_out, splices_of
from .bake_record import (
    RECORD_FILE,
    RECORD_SUFFIX,
    carried,
    described,
    packed,
    read_records,
    record_path,
    renamed,
    write_record,
)
from .bake_undo import copy_folder, inside, unbake
from .convert import (
    FORMATS,
    check_dtype,
    convert,
    default_path,
    folder_name,
    name_of,
    plain_model,
    refuse_existing,
    refuse_inside,
    workplace,
    write_new,
)
from .errors import FormatError, UsageError
from .splices import inverse, patch_file
from .zoo import DEFAULT_MODEL

if TYPE_CHECKING:
    import numpy as np
    from whisper.model import Whisper

    from calibration.shift_fit import ShiftFit

    from .bake_check import View
    from .profiles import FrontierPoint
    from .steering import Steering

__all__ = ["RECORD_FILE", "Baked", "bake", "constant_shifts", "unbake"]

logger = logging.getLogger("whisper_steer")


@dataclass(frozen=True)
class Baked:
    """What `bake` wrote. path: file or folder; record: its metadata file; layers: encoder blocks changed
    (0-based); patched: names of the files whose bytes changed; verified: the steering was found to be for
    exactly this encoder (False: only width and depth could be compared); profile: the name that alpha was
    asked for by; measured: the steering's rates at that alpha, where its file has them; left_out: weights in
    the folder that could not be patched, and are not in the result; fit: what `approximate` measured."""

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
    left_out: tuple[str, ...] = ()
    fit: ShiftFit | None = None


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
    if not all(bool(vector.isfinite().all()) for vector in total.values()):
        raise UsageError(f"alpha {alpha:g} of {name} is beyond the range of float32: choose a smaller alpha")
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
    approximate: str | Path | None = None,
    anyway: bool = False,
    download_root: str | Path | None = None,
) -> Baked:
    """Write a model with `alpha` (1 by default) times a Shift in its weights; profile: the steering's alpha
    of that name in its place.

    model: a file or folder of one of the four formats (.pt; transformers folder; CTranslate2 folder; ggml
    file), which is patched: read as a stream, the other files of a folder hard-linked or copied. Else
    anything that load_model takes, converted to `format` first. format None: that of the file. dtype: for the
    conversion, see convert.DTYPES. steering None: the one kept for the model. again: bake more into what is
    baked already. out: must not exist yet; None: named after the model, in the current folder.
    approximate: a folder of recordings (speech, nonspeech): the best Shift in the place of `steering` at
    `alpha` is fitted and measured on them, and baked (calibration.shift_fit); anyway: even if none is good.

    Raises UsageError (nothing that can be baked, baked already, `out` exists, ...), MismatchError (steering
    of another model), ModelError, FormatError, ShiftRefused (no Shift is good: see `approximate`).
    """
    from .attach import check_strength

    alpha = check_strength(alpha, profile)
    if anyway and approximate is None:
        raise UsageError("anyway is for approximate, which is not given: leave it out")
    job = _Job.of(model, format, out, dtype, again)
    resolved, verified = job.steering_for(steering, download_root)
    alpha = alpha if profile is None else resolved.alpha_of(profile)
    measured = None if profile is None else resolved.measured(alpha)
    fit = None
    if approximate is not None:
        from calibration import shift_fit  # the only way up: what it fits is baked in the same breath

        from .bake_check import unhashed

        heard = str(model) if job.loaded is None else job.loaded
        fit = shift_fit.fit_from_folder(
            heard,
            unhashed(resolved),  # it was checked above, by how the weights are stored
            approximate,
            alpha=alpha,
            anyway=anyway,
            download_root=download_root,
        )
        resolved, alpha, measured = fit.steering, 1.0, None  # the fit is of the steering at alpha
    additions = constant_shifts(resolved, alpha)
    done = job.run(additions, resolved, alpha, verified)
    return replace(done, profile=profile, measured=measured, fit=fit)


@dataclass
class _Job:
    """What is baked into what. source: the file or folder given, if it is one of the four formats; own: its
    format; records: what is baked into it already; target: what is written, in `format`; dtype: of the
    conversion; loaded: the model, if it is to be converted."""

    model: str | Path | Whisper
    source: Path | None
    own: str | None
    format: str
    target: Path
    dtype: str | None
    records: list[dict[str, Any]]
    loaded: Whisper | None = field(default=None, init=False)

    @classmethod
    def of(
        cls,
        model: str | Path | Whisper,
        format: str | None,
        out: str | Path | None,
        dtype: str | None,
        again: bool,
    ) -> _Job:
        """Refuses, with a UsageError, what can be refused before anything is read or fitted."""
        if format is not None:
            check_dtype(format, dtype)
        source = Path(model).expanduser() if isinstance(model, (str, Path)) else None
        own = format_of(source) if source is not None and source.exists() else None
        if source is None or own is None:
            source = None
        if format is None and own is None:
            raise UsageError(
                f"format is missing: expected one of {', '.join(FORMATS)}, as {model} has none of them"
            )
        wanted = format or str(own)
        if wanted == own and dtype is not None:
            raise UsageError(f"{source} is patched as it is and keeps its types: leave --dtype out")
        records = [] if source is None else read_records(source)
        if records and not again:
            raise UsageError(
                f"{source} is baked already ({described(records)}): unbake it first, or pass --again to add "
                "more"
            )
        target = Path(out).expanduser() if out is not None else _default_target(model, source, own, wanted)
        refuse_existing(target)
        if source is not None and wanted == own:
            refuse_inside(target, source)
        return cls(model, source, own, wanted, target, dtype, records)

    @property
    def is_converted(self) -> bool:
        return self.own != self.format

    def steering_for(
        self, steering: Steering | str | Path | None, download_root: str | Path | None
    ) -> tuple[Steering, bool]:
        """The steering, and whether it was found to be for exactly this encoder. Raises MismatchError."""
        from .bake_check import checked, checked_by_record, kept_for, view_of
        from .zoo import steering_for

        view: View | None = None
        if self.source is not None:
            view = view_of(self.source, str(self.own), name_of(self.source))
        if self.is_converted:
            self.loaded = plain_model(self.model, download_root)
        if view is None or self.source is None:
            loaded: Any = self.loaded
            found = steering_for(loaded) if steering is None else _resolve(steering, loaded)
            found.check(loaded)
            return found, True
        found = kept_for(view, self.source) if steering is None else _resolve(steering, view)
        if self.records:
            return found, checked_by_record(found, self.records, self.source)
        return found, checked(found, view, self.source)

    def run(
        self, additions: Mapping[int, np.ndarray], steering: Steering, alpha: float, verified: bool
    ) -> Baked:
        """Patch the source, or its conversion in a temporary place."""
        if not self.is_converted:
            source, records = Path(str(self.source)), self.records
            return _write(source, self.target, self.format, additions, steering, alpha, verified, records)
        with workplace(self.target, f".{self.target.name}.{secrets.token_hex(4)}.bake") as work:
            try:
                work.mkdir()
            except OSError as error:
                raise FormatError(f"cannot write {self.target}: {error.strerror or error}") from error
            place = work / self.target.name
            source = convert(self.loaded, self.format, place, dtype=self.dtype)  # type: ignore[arg-type]
            records = carried(self.records)
            return _write(source, self.target, self.format, additions, steering, alpha, verified, records)


def _default_target(model: str | Path | Whisper, source: Path | None, own: str | None, format: str) -> Path:
    """mini.en-ct2-baked, mini.en-baked.pt, ggml-mini.en-baked.bin, in the current folder."""
    if source is not None and own == format:
        suffix = "" if source.is_dir() else source.suffix
        return Path(f"{folder_name(source).removesuffix(suffix)}-baked{suffix}")
    plain = default_path(name_of(model), format)
    suffix = plain.suffix if format in ("openai", "ggml") else ""
    return Path(f"{plain.name.removesuffix(suffix)}-baked{suffix}")


def _resolve(steering: Steering | str | Path, model: Any) -> Steering:
    from .steering import Steering
    from .zoo import load_steering

    if isinstance(steering, Steering):
        return steering
    return load_steering(steering, getattr(model, "name", None))


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
    changes = splices_of(source, format, additions)
    patched = tuple(sorted(changes))
    without = tuple(left_out(source, format, patched) if source.is_dir() else ())
    record: dict[str, Any] = {
        "alpha": alpha,
        "steering": name,
        "base_model": steering.metadata.get("base_model"),
        "encoder_sha256": steering.metadata.get("encoder_sha256"),
        "format": format,
        "layers": sorted(additions),
        "norms": {
            str(layer): float((vector.astype("f8") ** 2).sum() ** 0.5) for layer, vector in additions.items()
        },
        "verified": verified,
        "left_out": list(without),
        **_measured(steering),
        "files": {},
    }

    def patch(file: str, into: Path) -> None:
        applied = patch_file(inside(source, file), into, changes[file])
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
        copy_folder(source, folder, {}, skip=(*patched, *without))
        write_record(folder / RECORD_FILE, [*records, record])

    def write_file(file: Path) -> None:
        patch(patched[0], file)
        # first the record: a record without its file harms nobody, a baked file without one looks plain
        write_record(target.with_name(target.name + RECORD_SUFFIX), [*renamed(records, target.name), record])

    write_new(target, write_folder if source.is_dir() else write_file)
    if without:
        logger.warning("%s: left out, as it is not baked: %s", target, ", ".join(without))
    layers = tuple(sorted(additions))
    where = record_path(target)
    return Baked(target, where, format, alpha, name, layers, patched, verified, left_out=without)


def _measured(steering: Steering) -> dict[str, Any]:
    """What was measured of a Shift that stands for another steering."""
    recipe = steering.metadata.get("recipe") or {}
    if "approximates" not in recipe:
        return {}
    return {"recipe": recipe, "rates": steering.metadata.get("rates")}

"""Trained SAEs -> calibrated, measured files: thresholds and measures from audio that was never trained on.

Half of the held-out clips set the thresholds, the others measure. Weights are rounded to the file's dtype
before either, so the figures are those of the file.

Written: <out>/<name>/layer_XX.safetensors, and <out>/report.json. An SAE whose file is already there with the
same weights, settings and clips is not measured again, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from whisper.model import Whisper

from calibration.evaluate import evenly
from calibration.held_out import (
    SPEECH,
    HeldOut,
    HeldOutClip,
    HeldOutSettings,
    balanced,
    collect_halves,
    layer_groups,
)
from calibration.sae_quality import calibrate_threshold, domain_quality, measure_sae
from calibration.splicing import Listener, SpeechClip, condition_of
from whisper_steer.errors import FormatError, UsageError
from whisper_steer.fileformat import load_metadata
from whisper_steer.sae import KIND, SparseAutoencoder

if TYPE_CHECKING:
    from calibration.adapters import AudioEncoder

REPORT = "report.json"
VERSION = 1  # raise when the measures below change: files measured before are then measured again


class Trained(Protocol):
    """One trained SAE.

    Attributes:
        name: folder below the output folder ("" for none); tells apart the SAEs of one layer.
        k: the L0 that batchtopk's threshold is set to; None for activations without one.
        recipe: how it was trained, JSON-able; stored in its file and in the report.
    """

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> int: ...
    @property
    def k(self) -> int | None: ...
    @property
    def activation(self) -> str: ...
    @property
    def recipe(self) -> Mapping[str, Any]: ...

    def export(self) -> SparseAutoencoder: ...


def export_saes(
    encoder: AudioEncoder,
    trained: Sequence[Trained],
    held_out: Mapping[str, Sequence[HeldOutClip]],
    out: Path,
    *,
    dtype: torch.dtype = torch.float16,
    max_frames: int = 40_000,
    wer_clips: int = 60,
    max_clips: int = 120,
    language: str = "en",
    memory: int = 2 * 2**30,
    progress: bool = True,
) -> dict[str, Any]:
    """Set thresholds, measure, write the files and report.json; returns the report.

    held_out: clips by domain ("speech" and others), none of them trained on. A batchtopk SAE's threshold is
    set so that its k latents are active per frame on as many frames of speech as of non-speech (whose
    domains share their half equally). memory: bytes for held-out frames. For the other arguments see
    `held_out.HeldOutSettings`. Cross-entropy, WER and text-FPR are measured if the encoder has a `model` that
    is an openai-whisper Whisper.

    Report: the encoder's metadata, `settings`, `held_out` (clips per domain), `skipped` (clips that could not
    be read, with the reason), `saes`: per SAE name, file, layer, activation, d_model, n_latents, expansion,
    k, theta, theta_calibration, recipe, what `sae_quality.measure_sae` gives, and `recognition` as
    `splicing.Listener.record` gives it. A number that could not be measured is null.

    Raises:
        UsageError: two SAEs for one file, no SAE, or no held-out audio that can be read.
        FormatError: a file cannot be written.
    """
    settings = HeldOutSettings(dtype, max_frames, max_clips, wer_clips=wer_clips, language=language)
    _check(trained, held_out)
    clips = HeldOut(held_out, settings)
    identity = {"version": VERSION, "settings": settings.record(), "clips": clips.identity()}
    metadata = encoder.metadata()
    records: dict[tuple[str, int], dict[str, Any]] = {}
    missing: list[Trained] = []
    for one in trained:
        found = _measured_before(_path(out, one), _fingerprint(one, dtype, metadata, identity))
        if found is None:
            missing.append(one)
        else:
            records[one.name, one.layer] = found
    if records and progress:
        print(f"{len(records)} of {len(trained)} SAEs were measured before", file=sys.stderr)
    with tqdm(total=len(trained), initial=len(records), unit="SAE", disable=not progress) as bar:
        bar.set_description("hearing clips without SAEs")
        listener = _listener(encoder, clips) if missing else None
        for layers in layer_groups(
            sorted({one.layer for one in missing}), encoder.d_model, clips, memory, progress=progress
        ):
            bar.set_description(f"encoding held-out clips, {len(layers)} layers")
            frames = collect_halves(encoder, clips, layers)
            for position, layer in enumerate(layers):
                halves = [{name: x[position] for name, x in half.items()} for half in frames]
                for one in missing:
                    if one.layer != layer:
                        continue
                    bar.set_description(f"measuring {_path(out, one).relative_to(out)}")
                    sae = _rounded(one.export(), dtype).to(encoder.device)
                    record = _measured(one, sae, _path(out, one).relative_to(out), halves, clips, listener)
                    sae.metadata = {
                        **sae.metadata,
                        **metadata,
                        "calibrated_on": {name: len(chosen) for name, chosen in held_out.items()},
                        "theta_calibration": record["theta_calibration"],
                        "recipe": record["recipe"],
                        "rates": record,
                        "measured_as": _fingerprint(one, dtype, metadata, identity),
                    }
                    sae.save(_path(out, one), dtype=dtype)
                    records[one.name, one.layer] = record
                    bar.update()
            del frames, halves
    report = {
        **metadata,
        "settings": settings.record(),
        "held_out": {name: len(chosen) for name, chosen in held_out.items()},
        "skipped": {name: why for row in records.values() for name, why in row["skipped"].items()},
        "saes": [records[one.name, one.layer] for one in trained],
    }
    write_json(out / REPORT, report)
    return finite(report)


def _check(trained: Sequence[Trained], held_out: Mapping[str, Sequence[Any]]) -> None:
    if not trained:
        raise UsageError("no SAE to export: train at least one layer")
    names = [(one.name, one.layer) for one in trained]
    for name, layer in names:
        if names.count((name, layer)) > 1:
            raise UsageError(f"two SAEs are called {name!r} at layer {layer}: give each its own name")
    if not any(len(clips) >= 2 for clips in held_out.values()):
        raise UsageError(
            "no held-out audio: thresholds and measures need at least 2 clips of a domain; "
            "raise the mixture's held-out share"
        )


def _path(out: Path, one: Trained) -> Path:
    return out / one.name / f"layer_{one.layer:02d}.safetensors"


def _rounded(sae: SparseAutoencoder, dtype: torch.dtype) -> SparseAutoencoder:
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight.copy_(weight.to(dtype).float())
    return sae


def _fingerprint(
    one: Trained, dtype: torch.dtype, metadata: Mapping[str, Any], identity: Mapping[str, Any]
) -> str:
    """SHA-256 (hex) of all that decides an SAE's file: weights as written, model, settings, clips, recipe."""
    sae = _rounded(one.export(), dtype)
    digest = hashlib.sha256()
    for name, value in sorted(sae.state_dict().items()):
        digest.update(name.encode() + b"\0")
        digest.update(memoryview(value.detach().to("cpu", torch.float32).contiguous().numpy()).cast("B"))
    settled = {"model": metadata, "recipe": dict(one.recipe), "k": one.k, "activation": one.activation}
    digest.update(json.dumps(finite({**identity, **settled}), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _measured_before(path: Path, fingerprint: str) -> dict[str, Any] | None:
    try:
        metadata = load_metadata(path, KIND)
    except FormatError:  # not there, or of something else: it is written again
        return None
    return metadata["rates"] if metadata.get("measured_as") == fingerprint else None


def _calibrated(
    sae: SparseAutoencoder, k: int | None, frames: Mapping[str, Tensor], clips: HeldOut
) -> dict[str, Any] | None:
    """Set the threshold of a batchtopk SAE; the record that its file keeps. None for other activations."""
    if sae.activation != "batchtopk" or k is None:
        return None
    running = float(sae.theta.double().mean())
    parts = balanced(frames)
    x = torch.cat(list(parts.values()))
    theta = calibrate_threshold(sae, x, k)
    return {
        "target_l0": k,
        "reached_l0": domain_quality(sae, x).l0,
        "theta": theta,
        "running_estimate": running,
        "frames": len(x),
        "clips": {name: len(clips.half(name, 0)) for name in parts},
        "domains": {name: len(part) for name, part in parts.items()},
    }


def _measured(
    one: Trained,
    sae: SparseAutoencoder,
    file: Path,
    halves: Sequence[Mapping[str, Tensor]],
    clips: HeldOut,
    listener: Listener | None,
) -> dict[str, Any]:
    """Sets the threshold of `sae` on one half's frames by domain, measures on the other; its record."""
    calibration = _calibrated(sae, one.k, halves[0], clips)
    record = {
        "name": one.name,
        "file": file.as_posix(),
        "layer": one.layer,
        "activation": one.activation,
        "d_model": sae.d_model,
        "n_latents": sae.n_latents,
        "expansion": sae.n_latents / sae.d_model,
        "k": one.k,
        "theta": float(sae.theta.double().mean()),
        "theta_calibration": calibration,
        "recipe": dict(one.recipe),
        **measure_sae(sae, halves[1]),
        "skipped": dict(sorted(clips.skipped.items())),
    }
    if listener is not None:
        record["recognition"] = listener.record(sae)
    return finite(record)


def _listener(encoder: AudioEncoder, clips: HeldOut) -> Listener | None:
    """Clips of the measuring half, heard plain; None where there is nothing to hear with or to hear."""
    model, count = getattr(encoder, "model", None), clips.settings.wer_clips
    if not isinstance(model, Whisper) or count == 0:
        return None
    second = {name: clips.all_of(name, 1) for name in clips.domains}
    texts = [clip for clip in second.get(SPEECH, []) if getattr(clip, "text", None)]
    silent = [clip for name, chosen in second.items() if name != SPEECH for clip in evenly(chosen, count)]
    speech = [
        SpeechClip(audio, clip.text, condition_of(clip))
        for clip in evenly(texts, count)
        if (audio := clips.load(clip)) is not None
    ]
    nonspeech = [audio for clip in evenly(silent, count) if (audio := clips.load(clip)) is not None]
    if not speech and not nonspeech:
        return None
    return Listener(model, speech, nonspeech, language=clips.settings.language)


def finite(value: Any) -> Any:
    """`value` with every number that is not finite replaced by None, tuples by lists: ready for JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Atomic. Raises FormatError if `path` cannot be written."""
    write_whole(path, (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Put `data` at `path`, all of it or nothing, making its folder. Raises FormatError if that fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise FormatError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def print_report(report: Mapping[str, Any]) -> None:
    """One line per SAE and domain on stdout."""
    names = max([4, *(len(row["name"]) for row in report["saes"])])
    print(
        f"{'name':<{names}} {'layer':>5} {'latents':>7} {'k':>4} {'alive':>6} {'twins':>5} | "
        f"{'domain':>9} {'L0':>6} {'FVU':>6} {'L2':>6} {'alive':>6} | recognition"
    )
    for row in report["saes"]:
        start = (
            f"{row['name']:<{names}} {row['layer']:>5} {row['n_latents']:>7} {row['k'] or '-':>4} "
            f"{row['alive']:>6.3f} {row['duplicates']:>5}"
        )
        heard = _recognition_text(row.get("recognition", {}))
        for domain, cells in row["domains"].items():
            print(
                f"{start} | {domain:>9} {cells['l0']:>6.1f} {cells['fvu']:>6.3f} {cells['l2']:>6.3f} "
                f"{cells['alive']:>6.3f} | {heard}".rstrip(" |")
            )
            start, heard = " " * len(start), ""


def _recognition_text(record: Mapping[str, Any]) -> str:
    parts = []
    if "speech" in record:
        row = record["speech"]["all"]
        parts.append(f"WER {row['wer_plain']['value']:.3f} -> {row['wer_spliced']['value']:.3f}")
        if row["ce_delta"] is not None:
            parts.append(f"CE {row['ce_delta']:+.3f}")
    if "nonspeech" in record:
        row = record["nonspeech"]
        parts.append(
            f"text-FPR {row['text_fpr_plain']['value']:.2f} -> {row['text_fpr_spliced']['value']:.2f}"
        )
    return ", ".join(parts)

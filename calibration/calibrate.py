"""From recordings to a steering file, for any model: what `whisper-steer calibrate` runs.

Recordings are split three ways. The training split gives gates; the validation split gives edits, teaches
the gate's window probes too (each recording is judged by probes that were fitted without it), and chooses
within the budget (`calibration.winners`); the test split says what the choice is worth. Labels and the fit
are kept in a working folder, so that a run that was stopped goes on where it left off.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.calibration_page import write_report
from calibration.decoding import ClipTranscript
from calibration.evaluate import nonspeech_metrics, normalise, speech_metrics
from calibration.export import write_whole
from calibration.fit import fit_parts
from calibration.fit_files import RECORD, Fit, read_fit, write_fit
from calibration.hallucinations import label_clips
from calibration.hearing import Calibration, Effort, Heard, compare
from calibration.selection import Budget, CalibrationClip, GateChoice
from calibration.winners import find_gate, find_winner, finish
from whisper_steer.errors import FormatError, UsageError
from whisper_steer.fileformat import encoder_sha256, model_name
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.steering import Steering

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip
    from calibration.user_data import Splits

logger = logging.getLogger("whisper_steer")

WITHOUT_SAES = (
    "no SAEs: the gate reads raw activations, and edits are directions and silence; there are no latents to "
    "choose, to weigh one by one or to look into"
)


@dataclass(frozen=True)
class Settings:
    """How to calibrate.

    Attributes:
        budget: what speech may lose. effort: how much is computed.
        seed: of everything drawn. causal: choose latents by what ablating them does, too.
        gate_kind: which gates may win; None: on latents where there are SAEs, else on raw activations.
    """

    budget: Budget = field(default_factory=Budget)
    effort: Effort = field(default_factory=Effort)
    seed: int = 0
    causal: bool = True
    gate_kind: str | None = None


@dataclass(frozen=True)
class Calibrated:
    """What `calibrate` made: the steering, its rates on the test split, and the files written."""

    steering: Steering
    test: Mapping[str, Any]
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def calibrate(
    model: Whisper,
    splits: Splits,
    saes: Mapping[int, SparseAutoencoder | None],
    out: Path,
    *,
    work: Path | None = None,
    settings: Settings | None = None,
    progress: bool = True,
) -> Calibrated:
    """Fit, choose, test, and write `out` with a frontier picture (.png) and a report (.html) beside it.

    saes: the layers to use, each with its SAE or None. work: folder for labels and fit (default: out's name
        with .work).
    Raises UsageError (too few recordings, a name that is not a steering file's), FormatError (cannot be
    written; a fit of other recordings).
    """
    settings = settings or Settings()
    if out.suffix != ".safetensors":
        raise UsageError(f"{out} is not the name of a steering file: expected one that ends in .safetensors")
    work = work or out.with_suffix(".work")
    _prepare(work, model, splits, saes, settings)
    cache = work / "labels.jsonl"
    clips = [clip for chosen in splits.validation.values() for clip in chosen]
    labels = label_clips(model, clips, cache=cache, progress=progress)
    fit = _fit(model, splits, saes, labels, work, settings, progress)
    calibration = Calibration.of(
        model,
        splits.validation,
        fit,
        settings.budget,
        settings.effort,
        cache=cache,
        seed=settings.seed,
        progress=progress,
    )
    with_latents = any(gate.kind == "latents" for gate in fit.gates.values())
    kind = settings.gate_kind or ("latents" if with_latents else "raw")
    choice, logits = find_gate(
        calibration, kind, training=splits.training, cache=work / "windows.npz", progress=progress
    )
    chosen = find_winner(calibration, choice, logits, progress=progress)
    steering = finish(calibration, chosen, out.stem, progress=progress)
    test = measure_test(model, splits.test, steering, cache, progress=progress)
    notes = _notes(choice, with_latents)
    metadata = dict(steering.metadata)
    metadata["rates"] = {**metadata["rates"], "test": test}
    metadata["recipe"] = {**metadata["recipe"], "splits": splits.counts, "notes": list(notes)}
    steering = replace(steering, metadata=metadata)
    out.parent.mkdir(parents=True, exist_ok=True)
    steering.save(out)
    html, png = write_report(
        out.with_suffix(".html"),
        out.with_suffix(".png"),
        title=f"{out.stem}: calibrated for {model_name(model)}",
        model_line=f"{model_name(model)}, encoder {encoder_sha256(model)[:12]}",
        frontier=metadata["frontier"],
        profiles=metadata["profiles"],
        test=test.get("pooled", {}),
        splits=splits.counts,
        record={"notes": list(notes), **metadata["recipe"]},
        budget=settings.budget.wer_rise,
    )
    return Calibrated(steering, test, (out, html, png), notes)


def _prepare(
    work: Path,
    model: Whisper,
    splits: Splits,
    saes: Mapping[int, SparseAutoencoder | None],
    settings: Settings,
) -> None:
    """Make the working folder, and refuse one that was begun with something else."""
    ids = [clip.id for part in (splits.validation, splits.test) for c in part.values() for clip in c]
    ids += [clip.id for clip in splits.training]
    begun = {
        "encoder_sha256": encoder_sha256(model),
        "recordings": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        "layers": {str(layer): sae is not None for layer, sae in saes.items()},
        "seed": settings.seed,
        "causal": settings.causal,
    }
    path = work / "begun.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != begun:
        raise FormatError(
            f"{work} was begun with another model, other recordings or another seed: "
            "remove it or pass another --work"
        )
    work.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(begun).encode())


def _fit(
    model: Whisper,
    splits: Splits,
    saes: Mapping[int, SparseAutoencoder | None],
    labels: Mapping[str, Any],
    work: Path,
    settings: Settings,
    progress: bool,
) -> Fit:
    folder = work / "fit"
    if (folder / RECORD).is_file():
        logger.info("taking the finished fit in %s", folder)
        return read_fit(folder, model, splits.validation, labels)
    fitted = fit_parts(
        model,
        saes,
        splits.training,
        splits.validation,
        labels,
        seed=settings.seed,
        causal=settings.causal,
        progress=progress,
    )
    fitted.record["calibrated_on"] = {
        name: {"clips": len(clips)} for name, clips in splits.validation.items()
    }
    write_fit(folder, model, fitted)
    # what is read back is rounded to half precision: a run that was stopped comes to the same
    return read_fit(folder, model, splits.validation, labels)


def _notes(choice: GateChoice, with_latents: bool) -> tuple[str, ...]:
    """What the record says about latents against raw activations."""
    if not with_latents:
        return (WITHOUT_SAES,)
    best: dict[str, Mapping[str, Any]] = {}
    for row in choice.table:
        if row.get("refitted") or "window_share" in row:
            continue
        key = str(row["kind"])
        if key not in best or float(row["text_fpr"]) < float(best[key]["text_fpr"]):
            best[key] = row
    return tuple(
        f"best gate on {kind} at this budget, before the refit: {row['gate']}, "
        f"text-FPR {float(row['text_fpr']):.4f} on the validation split"
        for kind, row in sorted(best.items())
    )


def measure_test(
    model: Whisper,
    sets: Mapping[str, Sequence[Clip]],
    steering: Steering,
    cache: Path,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """The steering at alpha 1 on clips that nothing was fitted or chosen on, beside plain Whisper.

    Returns {"pooled": rates of all sets with _lo, _hi and _plain, "sets": {name: rates}}.
    """
    clips = [clip for chosen in sets.values() for clip in chosen]
    labels = label_clips(model, clips, cache=cache, progress=progress)
    known = [
        CalibrationClip.of(clip, name, labels[clip.id].transcript)
        for name, chosen in sets.items()
        for clip in chosen
    ]
    heard = _hear(model, clips, known, steering, progress)
    pooled: dict[str, Any] = {"wer_rise": heard.rise, "wer_rise_hi": heard.rise_hi}
    speech = [clip for clip in known if clip.is_speech]
    others = [clip for clip in known if not clip.is_speech]
    if others:
        after = [heard.transcripts[clip.set, clip.id].outcome() for clip in others]
        plain = [clip.transcript.outcome() for clip in others]
        pooled |= _beside(nonspeech_metrics(after).row(), nonspeech_metrics(plain).row())
    if speech:
        references = [clip.reference or "" for clip in speech]
        texts = [heard.transcripts[clip.set, clip.id].text for clip in speech]
        row = speech_metrics(references, texts).row()
        before = speech_metrics(references, [clip.transcript.text for clip in speech]).row()
        pooled |= _beside(row, before)
        pooled["wrongly_emptied"] = sum(
            bool(normalise(clip.transcript.text)) and not normalise(text)
            for clip, text in zip(speech, texts, strict=True)
        ) / len(speech)
    by_set = {}
    for name in sets:
        mine = [clip for clip in known if clip.set == name]
        after_texts = [heard.transcripts[clip.set, clip.id] for clip in mine]
        if mine and mine[0].is_speech:
            row = speech_metrics([c.reference or "" for c in mine], [t.text for t in after_texts]).row()
        elif mine:
            row = nonspeech_metrics([t.outcome() for t in after_texts]).row()
        else:
            continue
        by_set[name] = row
    return {"pooled": pooled, "sets": by_set}


def _beside(row: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    extra = {f"{key}_plain": plain[key] for key in row if not key.endswith(("_lo", "_hi")) and key in plain}
    return {**row, **extra}


def _hear(
    model: Whisper,
    clips: Sequence[Clip],
    known: Sequence[CalibrationClip],
    steering: Steering,
    progress: bool,
) -> Heard:
    from tqdm import tqdm

    from calibration.decoding import iterate_transcripts
    from whisper_steer.attach import steer

    with steer(model, alpha=1.0, steering=steering, decode_withheld=False):
        running = iterate_transcripts(model, (clip.load() for clip in clips))
        transcripts: list[ClipTranscript] = list(
            tqdm(running, total=len(clips), desc="test split", unit="clip", disable=not progress)
        )
    return compare(known, transcripts)


def default_layers(model: Whisper, most: int = 8) -> list[int]:
    """The layers to calibrate on where nothing is said: all, or `most` of them evenly, the last included."""
    count = model.dims.n_audio_layer
    if count <= most:
        return list(range(count))
    return sorted({round(count - 1 - step * (count - 1) / (most - 1)) for step in range(most)})


def summary(done: Calibrated, settings: Settings) -> dict[str, Any]:
    """JSON-able: what a script wants to know."""
    metadata = done.steering.metadata
    return {
        "files": [str(path) for path in done.files],
        "budget": asdict(settings.budget),
        "validation": {key: metadata["rates"][key] for key in ("wer_rise", "wer_rise_hi")},
        "test": done.test.get("pooled", {}),
        "profiles": metadata.get("profiles", {}),
        "frontier": metadata.get("frontier", []),
        "notes": list(done.notes),
    }

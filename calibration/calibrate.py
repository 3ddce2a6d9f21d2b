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

import numpy as np

from calibration.calibration_page import write_report
from calibration.decoding import ClipTranscript
from calibration.evaluate import bootstrap_share, nonspeech_metrics, speech_metrics
from calibration.export import write_whole
from calibration.fit import fit_parts
from calibration.fit_files import RECORD, Fit, read_fit, write_fit
from calibration.hallucinations import label_clips
from calibration.hearing import Calibration, Effort, Heard, compare
from calibration.selection import Budget, CalibrationClip, GateChoice
from calibration.speech_costs import SpeechCosts
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

GATE_KINDS = ("latents", "raw", "any")
WITHOUT_SAES = (
    "Made without SAEs: the gate reads activations, and edits are directions and silence. There are no "
    "latents to choose or to weigh one by one, and what the gate goes by cannot be looked up latent by latent"
)
# what a working folder was begun with -> what to say where it differs
_DIFFERENCES = {
    "encoder_sha256": "another model",
    "recordings": "other recordings",
    "audio": "other audio under the same names",
    "saes": "other layers or other SAEs",
    "seed": "another seed",
    "causal": "another way to choose latents",
    "language": "another language",
}


@dataclass(frozen=True)
class Settings:
    """How to calibrate.

    Attributes:
        budget: what speech may lose. effort: how much is computed.
        seed: of everything drawn. causal: choose latents by what ablating them does, too.
        gate_kind: which gates may win, one of GATE_KINDS: the one that leaves fewest words over non-speech
            does. language: code of what is spoken.
    """

    budget: Budget = field(default_factory=Budget)
    effort: Effort = field(default_factory=Effort)
    seed: int = 0
    causal: bool = True
    gate_kind: str = "any"
    language: str = "en"

    def __post_init__(self) -> None:
        if self.gate_kind not in GATE_KINDS:
            raise UsageError(f"gate_kind is {self.gate_kind!r}: expected {', '.join(GATE_KINDS)}")


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
    if settings.gate_kind == "latents" and not any(sae is not None for sae in saes.values()):
        raise UsageError("gates on latents need SAEs: pass --saes, or --gate-kind any")
    language = settings.language
    work = work or out.with_suffix(".work")
    begun = _prepare(work, model, splits, saes, settings)
    cache = work / "labels.jsonl"
    clips = [clip for chosen in splits.validation.values() for clip in chosen]
    labels = label_clips(model, clips, cache=cache, language=language, progress=progress)
    fit = _fit(model, splits, saes, labels, work, settings, progress)
    calibration = Calibration.of(
        model,
        splits.validation,
        fit,
        settings.budget,
        settings.effort,
        cache=cache,
        seed=settings.seed,
        language=language,
        progress=progress,
    )
    choice, logits = find_gate(
        calibration,
        settings.gate_kind,
        training=splits.training,
        cache=work / f"windows-{begun}.npz",
        progress=progress,
    )
    chosen = find_winner(calibration, choice, logits, progress=progress)
    steering = finish(calibration, chosen, out.stem, progress=progress)
    test = measure_test(model, splits.test, steering, cache, language=language, progress=progress)
    notes = _notes(choice)
    metadata = dict(steering.metadata)
    metadata["rates"] = {**metadata["rates"], "test": test}
    metadata["recipe"] = {
        **metadata["recipe"],
        "splits": splits.counts,
        "notes": list(notes),
        "language": language,
    }
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
        notes=notes,
        record=metadata["recipe"],
        budget=settings.budget.wer_rise,
    )
    return Calibrated(steering, test, (out, html, png), notes)


def _prepare(
    work: Path,
    model: Whisper,
    splits: Splits,
    saes: Mapping[int, SparseAutoencoder | None],
    settings: Settings,
) -> str:
    """Make the working folder, and refuse one that was begun with something else. Returns a hash of what it
    was begun with."""
    ids = [clip.id for part in (splits.validation, splits.test) for c in part.values() for clip in c]
    ids += [clip.id for clip in splits.training]
    begun = {
        "encoder_sha256": encoder_sha256(model),
        "recordings": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        "audio": splits.fingerprint or _audio_digest(splits),
        "saes": {str(layer): None if sae is None else _sae_digest(sae) for layer, sae in saes.items()},
        "seed": settings.seed,
        "causal": settings.causal,
        "language": settings.language,
    }
    path = work / "begun.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if set(found) != set(begun):
            raise FormatError(f"{work} was begun by another version: remove it or pass another --work")
        if other := [what for name, what in _DIFFERENCES.items() if found[name] != begun[name]]:
            raise FormatError(
                f"{work} was begun with {' and '.join(other)}: remove it or pass another --work"
            )
    work.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(begun).encode())
    return hashlib.sha256(json.dumps(begun, sort_keys=True).encode()).hexdigest()[:12]


def _audio_digest(splits: Splits) -> str:
    """SHA-256 (hex) of the samples of validation and test, for splits that do not come from files."""
    digest = hashlib.sha256()
    for part in (splits.validation, splits.test):
        for clip in (clip for clips in part.values() for clip in clips):
            digest.update(clip.load().tobytes())
    return digest.hexdigest()


def _sae_digest(sae: SparseAutoencoder) -> str:
    """SHA-256 (hex) of the tensors and of how they are used."""
    digest = hashlib.sha256(f"{sae.layer} {sae.activation} {sae.k}".encode())
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


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
        return read_fit(folder, model, splits.validation, labels, language=settings.language)
    fitted = fit_parts(
        model,
        saes,
        splits.training,
        splits.validation,
        labels,
        seed=settings.seed,
        causal=settings.causal,
        language=settings.language,
        progress=progress,
    )
    fitted.record["calibrated_on"] = {
        name: {"clips": len(clips)} for name, clips in splits.validation.items()
    }
    write_fit(folder, model, fitted)
    # what is read back is rounded to half precision: a run that was stopped comes to the same
    return read_fit(folder, model, splits.validation, labels, language=settings.language)


def _notes(choice: GateChoice) -> tuple[str, ...]:
    """Sentences for the reader: what latents and activations are worth here, or that there are no SAEs."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in choice.table:
        if row.get("refitted") or "window_share" in row:
            continue
        key = str(row["kind"])
        if key not in best or float(row["text_fpr"]) < float(best[key]["text_fpr"]):
            best[key] = row
    rates = [
        f"the best on {'activations' if kind == 'raw' else kind}, {row['gate']}, leaves words over "
        f"{float(row['text_fpr']):.1%} of non-speech"
        for kind, row in sorted(best.items())
    ]
    measured = (
        f"Gates at this budget on the validation split, before the chosen one was fitted again: "
        f"{'; '.join(rates)}. Chosen: {choice.name}"
    )
    return (measured,) if "latents" in best else (WITHOUT_SAES, measured)


def measure_test(
    model: Whisper,
    sets: Mapping[str, Sequence[Clip]],
    steering: Steering,
    cache: Path,
    *,
    language: str = "en",
    progress: bool = True,
) -> dict[str, Any]:
    """The steering at alpha 1 on clips that nothing was fitted or chosen on, beside plain Whisper.

    Returns {"pooled": rates of all sets with _lo, _hi and _plain, "sets": {name: rates}}. The rise of the WER
    is over the "counted_words" of the "counted_sets" (`calibration.speech_costs`). Intervals draw groups.
    """
    clips = [clip for chosen in sets.values() for clip in chosen]
    labels = label_clips(model, clips, cache=cache, language=language, progress=progress)
    known = [
        CalibrationClip.of(clip, name, labels[clip.id].transcript, language=language)
        for name, chosen in sets.items()
        for clip in chosen
    ]
    heard = _hear(model, clips, known, steering, language, progress)
    speech = [clip for clip in known if clip.is_speech]
    others = [clip for clip in known if not clip.is_speech]
    pooled: dict[str, Any] = {}
    if others:
        pooled |= _beside(_rates(others, heard), _rates(others))
    if speech:
        pooled |= _beside(_rates(speech, heard), _rates(speech))
        pooled |= _against_budget(speech, heard)
    by_set = {}
    for name in sets:
        if mine := [clip for clip in known if clip.set == name]:
            by_set[name] = _rates(mine, heard)
    return {"pooled": pooled, "sets": by_set}


def _rates(clips: Sequence[CalibrationClip], heard: Heard | None = None) -> dict[str, float]:
    """Of clips of one kind, as heard; None: as plain Whisper hears them."""
    after = [clip.transcript if heard is None else heard.transcripts[clip.set, clip.id] for clip in clips]
    groups = [clip.group for clip in clips]
    if not clips[0].is_speech:
        outcomes = [clip.outcome(t) for clip, t in zip(clips, after, strict=True)]
        return nonspeech_metrics(outcomes, groups=groups).row()
    references, texts = [clip.reference or "" for clip in clips], [t.text for t in after]
    return speech_metrics(references, texts, groups=groups, language=clips[0].language).row()


def _against_budget(clips: Sequence[CalibrationClip], heard: Heard) -> dict[str, Any]:
    """What the budget limits, with intervals, on clips of speech."""
    costs = SpeechCosts(clips)
    after = [heard.transcripts[clip.set, clip.id] for clip in costs.clips]
    change = costs.errors([t.text for t in after]) - costs.plain
    emptied = [clip.is_emptied(t) for clip, t in zip(costs.clips, after, strict=True)]
    rate = bootstrap_share(emptied, groups=[clip.group for clip in costs.clips])
    rise, rise_hi = costs.rise(change)
    counted = [clip.set for clip, known in zip(costs.clips, costs.understood, strict=True) if known]
    return {
        "wer_rise": rise,
        "wer_rise_lo": -costs.rise(-change)[1],
        "wer_rise_hi": rise_hi,
        "wrongly_emptied": rate.value,
        "wrongly_emptied_lo": rate.lo,
        "wrongly_emptied_hi": max(rate.hi, costs.share_hi(np.array(emptied))),
        "counted_words": int(costs.words[costs.understood].sum()),
        "counted_sets": list(dict.fromkeys(counted)),
    }


def _beside(row: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    extra = {f"{key}_plain": plain[key] for key in row if not key.endswith(("_lo", "_hi")) and key in plain}
    return {**row, **extra}


def _hear(
    model: Whisper,
    clips: Sequence[Clip],
    known: Sequence[CalibrationClip],
    steering: Steering,
    language: str,
    progress: bool,
) -> Heard:
    from tqdm import tqdm

    from calibration.decoding import iterate_transcripts
    from whisper_steer.attach import steer

    with steer(model, alpha=1.0, steering=steering, decode_withheld=False):
        running = iterate_transcripts(model, (clip.load() for clip in clips), language=language)
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

"""Fits the parts of steerings: gates on training clips, edits on the hallucination labels of calibration
clips.

    python -m calibration.fit --model mini.en --saes out/saes --labels out/labels.jsonl \\
        --corpus out/corpus --data ../shared/data --out out/fit

For every layer: gates on 16 to 128 SAE latents and one on raw activations; edits from a logistic regression
    on pooled
latents (both published forms, several k) and from mean differences. Every part is a steering file of its
own in --out; windows.npz holds what each gate says about every window of the calibration clips, fit.json
the record. `python -m calibration.sweep` chooses among them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibration import edit_fit, gate_fit
from calibration.activations import (
    FRAMES_PER_SECOND,
    MAX_FRAMES,
    check_layers,
    cut_window,
    encode_windows,
    padded_log_mel,
    true_frames,
)
from calibration.command import run
from calibration.gate_fit import NOBODY, SPEECH, UNCLEAR
from calibration.hallucinations import Labels, label_clips
from calibration.selection import CalibrationClip
from calibration.training_clips import REAL_SPEECH_DB, frame_levels
from whisper_steer.errors import FormatError, MismatchError, UsageError
from whisper_steer.fileformat import encoder_sha256, model_metadata
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.steering import Edit, Gate, Steering

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip

TOP_K = (10, 50)
AUDIOSAE_K = (10, 100)
WINDOWS, RECORD = "windows.npz", "fit.json"


@dataclass(frozen=True)
class WindowTable:
    """What gates say about the windows of the calibration clips.

    Attributes:
        clips: the clips; their `rows` point into the arrays.
        logits: by gate name, unsmoothed frame logits (rows, 1500) float32.
        targets: (rows, 1500) int8, SPEECH, NOBODY or UNCLEAR.
    """

    clips: tuple[CalibrationClip, ...]
    logits: Mapping[str, np.ndarray]
    targets: np.ndarray


def load_saes(folder: Path, model: Whisper, layers: Sequence[int] | None = None) -> list[SparseAutoencoder]:
    """The SAEs layer_XX.safetensors of a folder, checked against the model.

    Raises:
        FormatError: one is missing. MismatchError: one was trained on another encoder.
    """
    sha = encoder_sha256(model)
    saes = []
    for layer in check_layers(model, layers):
        path = folder / f"layer_{layer:02d}.safetensors"
        if not path.is_file():
            raise FormatError(f"{path} does not exist: train the SAEs first, python -m calibration.train")
        sae = SparseAutoencoder.load(path)
        if sae.metadata.get("encoder_sha256") != sha:
            raise MismatchError(
                f"{path} is for {sae.metadata.get('base_model')} with another encoder: train it again"
            )
        saes.append(sae)
    return saes


def clip_targets(clip: Clip, audio: np.ndarray) -> np.ndarray:
    """(1500,) targets of a calibration clip's first window, sure frames only.

    Speech: loud frames inside its known intervals (real speech: loud frames). Non-speech clips: every frame
        of audio.
    """
    n_true = true_frames(len(audio))
    targets = np.full(MAX_FRAMES, UNCLEAR, dtype=np.int8)
    if clip.kind == "nonspeech":
        targets[:n_true] = NOBODY
        return targets
    loud = frame_levels(audio)[:n_true] > -REAL_SPEECH_DB
    inside = np.zeros(len(loud), dtype=bool)
    if clip.speech_intervals is None:
        inside[:] = True
    for start, end in clip.speech_intervals or ():
        inside[int(start * FRAMES_PER_SECOND) : int(end * FRAMES_PER_SECOND)] = True
    targets[: len(loud)][loud & inside] = SPEECH
    return targets


def measure_windows(
    model: Whisper,
    saes: Sequence[SparseAutoencoder],
    gates: Mapping[str, Gate],
    sets: Mapping[str, Sequence[Clip]],
    labels: Mapping[str, Labels],
    *,
    batch: int = 8,
    progress: bool = True,
) -> tuple[WindowTable, list[edit_fit.PooledClips]]:
    """One encoder pass over every window that plain `whisper.transcribe` looked at: all gates' frame
    logits, and per layer the clips' pooled latents and mean activations (first window, padding left out).
    """
    logits: dict[str, list[np.ndarray]] = {name: [] for name in gates}
    targets: list[np.ndarray] = []
    clips: list[CalibrationClip] = []
    pooled: list[list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]] = [[] for _ in saes]

    def flush(group: list[tuple[Tensor, int | None]]) -> None:
        encoded = encode_windows(model, torch.stack([mel for mel, _ in group]))
        for name, gate in gates.items():
            with torch.no_grad():
                logits[name] += list(gate.frame_logits(dict(enumerate(encoded))).numpy())
        for index, (_, n_true) in enumerate(group):
            if n_true is not None:
                for parts, sae in zip(pooled, saes, strict=True):
                    parts.append(edit_fit.pool_frames(sae, encoded[sae.layer, index, :n_true]))

    group: list[tuple[Tensor, int | None]] = []
    total = sum(len(chosen) for chosen in sets.values())
    for name, clip in tqdm(_named(sets), total=total, desc="calibration windows", disable=not progress):
        audio = clip.load()
        mel, content = padded_log_mel(audio, model.dims.n_mels)
        transcript = labels[clip.id].transcript
        rows = []
        for number, window in enumerate(transcript.windows):
            rows.append(len(targets))
            first = number == 0
            targets.append(
                clip_targets(clip, audio) if first else np.full(MAX_FRAMES, UNCLEAR, dtype=np.int8)
            )
            group.append((cut_window(mel, content, window.seek), true_frames(len(audio)) if first else None))
            if len(group) == batch:
                flush(group)
                group = []
        reference = None if clip.kind == "nonspeech" else clip.text or ""
        if rows:  # too short for a single mel frame: nothing was decoded
            clips.append(CalibrationClip(clip.id, name, reference, transcript, tuple(rows)))
    if group:
        flush(group)
    table = WindowTable(
        tuple(clips), {name: np.stack(values) for name, values in logits.items()}, np.stack(targets)
    )
    return table, [edit_fit.stack_pooled(parts) for parts in pooled]


def _named(sets: Mapping[str, Sequence[Clip]]) -> Iterator[tuple[str, Clip]]:
    for name, clips in sets.items():
        for clip in clips:
            yield name, clip


def fit_edits(
    saes: Sequence[SparseAutoencoder],
    pooled: Sequence[edit_fit.PooledClips],
    labels: Sequence[Labels],
    nonspeech: np.ndarray,
) -> dict[str, tuple[Edit, dict[str, Any]]]:
    """Edits of every layer with their records, by name.

    labels, nonspeech: of the clips in the order of `pooled`.
    """
    # ours aims at words that come out; AudioSAE's recipe is fitted as published, on no_speech_prob
    ours = edit_fit.choose_contrast(labels, nonspeech, ("text", "hr", "nsp"))
    theirs = edit_fit.choose_contrast(labels, nonspeech, ("nsp", "hr", "text"))
    edits: dict[str, tuple[Edit, dict[str, Any]]] = {}
    for sae, clips in zip(saes, pooled, strict=True):
        layer = f"l{sae.layer}"
        regression = edit_fit.regress(clips.latents[ours.used], ours.positive[ours.used])
        record = dict(edit_fit.record_of(ours, regression))
        for normalised, name in ((True, "svector"), (False, "meandiff")):
            shift = edit_fit.mean_difference(
                sae.layer, clips.mean[ours.used], ours.positive[ours.used], normalised=normalised
            )
            plain = {
                key: value for key, value in record.items() if key.startswith(("contrast", "pos", "neg"))
            }
            edits[f"{name}_{layer}"] = shift, {"form": name, **plain}
        if sae.activation == "topk":
            continue  # its latents have no threshold form to edit by
        for k in TOP_K:
            edit = edit_fit.additive_edit(sae, regression.beta, clips.mean_activation, k)
            edits[f"additive_{layer}_k{k}"] = edit, {"form": "additive", "k": k, **record}
        if theirs.name != ours.name:
            regression = edit_fit.regress(clips.latents[theirs.used], theirs.positive[theirs.used])
        record = dict(edit_fit.record_of(theirs, regression))
        for k in AUDIOSAE_K:
            edit = edit_fit.audiosae_edit(sae, regression.beta, k)
            edits[f"audiosae_{layer}_k{k}"] = edit, {"form": "audiosae", "k": k, **record}
    return edits


def fit_gates(
    saes: Sequence[SparseAutoencoder], sample: gate_fit.FrameSample, *, progress: bool = True
) -> dict[str, Gate]:
    """Gates of every layer by name: latents_l<layer>_m<size>, raw_l<layer>."""
    gates: dict[str, Gate] = {}
    for sae in tqdm(saes, desc="fitting gates", unit="layer", disable=not progress):
        x = sample.x[sae.layer]
        if sae.activation != "topk":
            fitted = gate_fit.fit_latent_gates(sae, x, sample.nobody, sample.weight)
            gates |= {f"latents_l{sae.layer}_m{size}": gate for size, gate in sorted(fitted.items())}
        gates[f"raw_l{sae.layer}"] = gate_fit.fit_raw_gate(sae.layer, x, sample.nobody, sample.weight)
    return gates


def write_fit(
    out: Path,
    model: Whisper,
    gates: Mapping[str, Gate],
    edits: Mapping[str, tuple[Edit, dict[str, Any]]],
    table: WindowTable,
    record: Mapping[str, Any],
) -> None:
    """Write every part as a steering file, the window table, and fit.json last: it makes the folder
    complete.
    """
    out.mkdir(parents=True, exist_ok=True)
    metadata = model_metadata(model)
    for name, gate in gates.items():
        part = Steering((), gate, {**metadata, "name": name, "recipe": {"gate": name}})
        part.save(out / f"gate_{name}.safetensors")
    for name, (edit, recipe) in edits.items():
        Steering((edit,), None, {**metadata, "name": name, "recipe": recipe}).save(
            out / f"edit_{name}.safetensors"
        )
    names = list(table.logits)
    with (out / (WINDOWS + ".tmp")).open("wb") as file:
        np.savez(file, targets=table.targets, logits=np.stack([table.logits[name] for name in names]))
    (out / (WINDOWS + ".tmp")).replace(out / WINDOWS)
    complete = {
        **record,
        "gates": names,
        "edits": {name: recipe for name, (_, recipe) in edits.items()},
        "clips": [{"id": clip.id, "set": clip.set, "rows": clip.rows} for clip in table.clips],
    }
    temporary = out / (RECORD + ".tmp")
    temporary.write_text(json.dumps(complete) + "\n", encoding="utf-8")
    temporary.replace(out / RECORD)


@dataclass(frozen=True)
class Fit:
    """A folder that `write_fit` wrote."""

    gates: Mapping[str, Gate]
    edits: Mapping[str, Edit]
    recipes: Mapping[str, Mapping[str, Any]]
    table: WindowTable
    record: Mapping[str, Any]


def read_fit(
    folder: Path, model: Whisper, sets: Mapping[str, Sequence[Clip]], labels: Mapping[str, Labels]
) -> Fit:
    """Read a fit and check that it belongs to this model and these clips.

    Raises:
        FormatError, MismatchError, UsageError: incomplete, of another model, or of other clips.
    """
    if not (folder / RECORD).is_file():
        raise FormatError(f"{folder} holds no finished fit: run python -m calibration.fit --out {folder}")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    gates: dict[str, Gate] = {}
    edits: dict[str, Edit] = {}
    for name in record["gates"]:
        part = Steering.load(folder / f"gate_{name}.safetensors")
        part.check(model)
        if part.gate is not None:
            gates[name] = part.gate
    for name in record["edits"]:
        part = Steering.load(folder / f"edit_{name}.safetensors")
        part.check(model)
        edits[name] = part.edits[0]
    known = {(name, clip.id): clip for name, clip in _named(sets)}
    clips = []
    for entry in record["clips"]:
        clip = known.get((entry["set"], entry["id"]))
        if clip is None or len(labels[clip.id].transcript.windows) != len(entry["rows"]):
            raise UsageError(f"{folder} was fitted on other clips ({entry['set']} {entry['id']}): fit again")
        reference = None if clip.kind == "nonspeech" else clip.text or ""
        transcript = labels[clip.id].transcript
        clips.append(CalibrationClip(clip.id, entry["set"], reference, transcript, tuple(entry["rows"])))
    with np.load(folder / WINDOWS, allow_pickle=False) as arrays:
        logits, targets = arrays["logits"], arrays["targets"]
    table = WindowTable(tuple(clips), dict(zip(record["gates"], logits, strict=True)), targets)
    return Fit(gates, edits, record["edits"], table, record)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m calibration.fit", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--model", default="mini.en", help="name or path (default: mini.en)")
    parser.add_argument("--saes", type=Path, default=Path("out/saes"), help="folder of calibration.train")
    parser.add_argument(
        "--labels", type=Path, default=Path("out/labels.jsonl"), help="labels, made if missing"
    )
    parser.add_argument(
        "--corpus", type=Path, default=Path("out/corpus"), help="folder of calibration.synthesis"
    )
    parser.add_argument("--data", dest="data_dir", type=Path, default=None, help="folder of real recordings")
    parser.add_argument("--out", type=Path, default=Path("out/fit"))
    parser.add_argument("--clips", type=int, default=400, help="synthetic training clips of speech")
    parser.add_argument(
        "--real", type=int, default=250, help="real training clips of speech, and of the rest"
    )
    parser.add_argument("--layers", default="all", help="'all' or 0-based numbers: 0,3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the small calibration sets")
    args = parser.parse_args(argv)

    from calibration.corpus import describe, eval_sets
    from calibration.frame_source import parse_layers
    from calibration.training_clips import training_clips
    from whisper_steer.zoo import load_model

    started = time.monotonic()
    model = load_model(args.model)
    saes = load_saes(args.saes, model, parse_layers(args.layers))
    sets = eval_sets("calibration", data_dir=args.data_dir, quick=args.quick)
    labels = label_clips(model, [clip for _, clip in _named(sets)], cache=args.labels)
    training = training_clips(
        args.corpus,
        args.data_dir,
        speech=args.clips,
        nonspeech=args.clips * 3 // 4,
        real=args.real,
        seed=args.seed + 1,
    )
    sample = gate_fit.collect_gate_frames(model, training, seed=args.seed)
    gates = fit_gates(saes, sample)
    table, pooled = measure_windows(model, saes, gates, sets, labels)
    nonspeech = np.array([not clip.is_speech for clip in table.clips])
    edits = fit_edits(saes, pooled, [labels[clip.id] for clip in table.clips], nonspeech)
    record = {
        "seed": args.seed,
        "gate_frames": sample.counts,
        "calibrated_on": describe(sets),
        "saes": [sae.metadata.get("recipe", {}) for sae in saes],
    }
    write_fit(args.out, model, gates, edits, table, record)
    for name, (_, recipe) in edits.items():
        if "balanced_accuracy" in recipe:
            print(f"{name:<20} balanced accuracy {recipe['balanced_accuracy']:.3f}, F1 {recipe['f1']:.3f}")
    reason = next(iter(edits.values()))[1]["contrast_reason"]
    print(f"contrast: {reason}")
    print(f"{len(gates)} gates, {len(edits)} edits in {args.out}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run(main)

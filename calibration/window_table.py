"""What gates say about the windows of the calibration clips, and the clips' pooled features, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibration import edit_fit
from calibration.activations import (
    FRAMES_PER_SECOND,
    MAX_FRAMES,
    cut_window,
    encode_windows,
    padded_log_mel,
    true_frames,
)
from calibration.gate_fit import NOBODY, SPEECH, UNCLEAR
from calibration.hallucinations import Labels
from calibration.selection import CalibrationClip
from calibration.training_clips import REAL_SPEECH_DB, frame_levels
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.steering import Gate

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip


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
    saes: Mapping[int, SparseAutoencoder | None],
    gates: Mapping[str, Gate],
    sets: Mapping[str, Sequence[Clip]],
    labels: Mapping[str, Labels],
    *,
    batch: int = 8,
    language: str = "en",
    progress: bool = True,
) -> tuple[WindowTable, dict[int, edit_fit.PooledClips]]:
    """One encoder pass over every window that plain `whisper.transcribe` looked at: all gates' frame
    logits, and by layer the clips' pooled latents and mean activations (first window, padding left out).

    saes: the layers to pool, each with its SAE or with None: its mean activations alone. language: of speech.
    """
    layers = sorted({*saes, *(layer for gate in gates.values() for layer in gate.layers)})
    logits: dict[str, list[np.ndarray]] = {name: [] for name in gates}
    targets: list[np.ndarray] = []
    clips: list[CalibrationClip] = []
    pooled: dict[int, list[tuple[np.ndarray, ...]]] = {layer: [] for layer in saes}

    def flush(group: list[tuple[Tensor, int | None]]) -> None:
        encoded = dict(
            zip(layers, encode_windows(model, torch.stack([mel for mel, _ in group]), layers), strict=True)
        )
        for name, gate in gates.items():
            with torch.no_grad():
                logits[name] += list(gate.frame_logits(encoded).cpu().numpy())
        for index, (_, n_true) in enumerate(group):
            if n_true is not None:
                for layer, sae in saes.items():
                    pooled[layer].append(edit_fit.pool_frames(sae, encoded[layer][index, :n_true].cpu()))

    group: list[tuple[Tensor, int | None]] = []
    total = sum(len(chosen) for chosen in sets.values())
    for name, clip in tqdm(named(sets), total=total, desc="calibration windows", disable=not progress):
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
        if rows:  # too short for a single mel frame: nothing was decoded
            clips.append(CalibrationClip.of(clip, name, transcript, rows, language=language))
    if group:
        flush(group)
    table = WindowTable(
        tuple(clips), {name: np.stack(values) for name, values in logits.items()}, np.stack(targets)
    )
    return table, {layer: edit_fit.stack_pooled(parts) for layer, parts in pooled.items()}


def gate_logits(
    model: Whisper,
    gates: Sequence[Gate],
    chosen: Sequence[int],
    clips: Sequence[CalibrationClip],
    sources: Mapping[tuple[str, str], Clip],
    rows: int,
    *,
    batch: int = 8,
    progress: bool = True,
) -> np.ndarray:
    """(rows, 1500) unsmoothed frame logits of the clips' windows, each clip's by gates[chosen[clip]].

    The gates differ in their coefficients alone: all must read the same layers.
    """
    logits = np.zeros((rows, MAX_FRAMES), dtype=np.float32)
    layers = list(gates[0].layers)
    raw = [replace(gate, smooth=1) for gate in gates]
    waiting: list[tuple[Tensor, int, int]] = []

    def flush() -> None:
        encoded = encode_windows(model, torch.stack([mel for mel, _, _ in waiting]), layers)
        for number, gate in enumerate(raw):
            mine = [index for index, (_, _, owner) in enumerate(waiting) if owner == number]
            if mine:
                streams = {layer: x[mine] for layer, x in zip(layers, encoded, strict=True)}
                with torch.no_grad():
                    values = gate.frame_logits(streams).cpu().numpy()
                logits[[waiting[index][1] for index in mine]] = values
        waiting.clear()

    pairs = list(zip(clips, chosen, strict=True))
    for clip, owner in tqdm(pairs, desc="gate on all windows", unit="clip", disable=not progress):
        mel, content = padded_log_mel(sources[clip.set, clip.id].load(), model.dims.n_mels)
        for row, window in zip(clip.rows, clip.transcript.windows, strict=True):
            waiting.append((cut_window(mel, content, window.seek), row, owner))
            if len(waiting) == batch:
                flush()
    if waiting:
        flush()
    return logits


def named(sets: Mapping[str, Sequence[Clip]]) -> Iterator[tuple[str, Clip]]:
    """(name of the set, clip) of all clips."""
    for name, clips in sets.items():
        for clip in clips:
            yield name, clip

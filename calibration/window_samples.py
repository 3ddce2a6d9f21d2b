"""Windows as window probes and kernels read them: of training clips and of calibration clips.

A training clip gives its first window, which a cache keeps: reading them is most of what such a fit costs.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibration.activations import cut_window, encode_windows, padded_log_mel
from calibration.export import write_whole
from calibration.selection import CalibrationClip, smoothed
from calibration.training_clips import TrainingClip
from whisper_steer.gate import Gate, pooled_windows
from whisper_steer.passing import padding_frames

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip

_BATCH = 16
_KEEP = 500  # clips after which the cache is written again


@dataclass(frozen=True)
class WindowSample:
    """Windows as window probes read them.

    Attributes:
        x: (windows, 3 * layers, d_model) float32 in half precision: `pooled_windows` of the gate's layers.
        nobody: (windows,) bool: nobody speaks.
    """

    x: np.ndarray
    nobody: np.ndarray


@dataclass(frozen=True)
class TrainingWindows:
    """First windows of training clips.

    Attributes:
        sample: what is fitted on. lowest: (windows,) the lowest frame logit of each. clips: of the windows.
    """

    sample: WindowSample
    lowest: np.ndarray
    clips: tuple[TrainingClip, ...]


def training_windows(
    model: Whisper,
    gate: Gate,
    clips: Sequence[TrainingClip],
    *,
    cache: Path | None = None,
    progress: bool = True,
) -> TrainingWindows:
    """The first window of every training clip; of speech only where somebody is known to speak.

    cache: a file that keeps the windows that a gate has read, and is added to now and then.
    """
    known = _read_cache(cache, _reader(gate)) if cache is not None else {}
    missing = [clip for clip in clips if clip.id not in known]
    bar = tqdm(missing, desc="windows as a whole", unit="clip", disable=not progress or not missing)
    waiting: list[tuple[str, Tensor]] = []

    def flush() -> None:
        if waiting:
            x, logits = _read(model, gate, [(mel, None) for _, mel in waiting])
            for (name, _), one, lowest in zip(waiting, x, logits.min(axis=1), strict=True):
                known[name] = (one, float(lowest))
        waiting.clear()

    for number, clip in enumerate(bar, 1):
        audio, intervals = clip.make()
        if clip.kind != "nonspeech" and not intervals:
            known[clip.id] = None  # speech too faint to be found
        else:
            waiting.append((clip.id, cut_window(*padded_log_mel(audio, model.dims.n_mels), 0)))
        if len(waiting) == _BATCH:
            flush()
        if cache is not None and number % _KEEP == 0:
            _write_cache(cache, _reader(gate), known)
    flush()
    if cache is not None and missing:
        _write_cache(cache, _reader(gate), known)
    found = [(clip, window) for clip in clips if (window := known[clip.id]) is not None]
    return TrainingWindows(
        WindowSample(
            np.stack([x for _, (x, _) in found]).astype(np.float32),
            np.array([clip.kind == "nonspeech" for clip, _ in found]),
        ),
        np.array([lowest for _, (_, lowest) in found]),
        tuple(clip for clip, _ in found),
    )


def _reader(gate: Gate) -> str:
    """Of all that decides what is read of a window."""
    key = hashlib.sha256("\n".join(["pooled windows", repr(gate.layers), str(gate.smooth)]).encode())
    for probe in gate.probes:
        key.update(probe.coef.numpy().tobytes())
    key.update(np.float64(gate.intercept).tobytes())
    return key.hexdigest()


_Windows = dict[str, "tuple[np.ndarray, float] | None"]  # by clip; None: nobody is found to speak in it


def _read_cache(path: Path, reader: str) -> _Windows:
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as kept:
        if "reader" not in kept or str(kept["reader"]) != reader:
            return {}
        x, lowest = kept["x"], kept["lowest"].tolist()
        windows: _Windows = dict(zip(kept["ids"].tolist(), zip(x, lowest, strict=True), strict=True))
        return windows | dict.fromkeys(kept["faint"].tolist())


def _write_cache(path: Path, reader: str, windows: _Windows) -> None:
    found = {name: window for name, window in windows.items() if window is not None}
    if not found:
        return
    buffer = io.BytesIO()
    np.savez(
        buffer,
        reader=np.array(reader),
        ids=np.array(list(found)),
        x=np.stack([x for x, _ in found.values()]).astype(np.float16),
        lowest=np.array([lowest for _, lowest in found.values()]),
        faint=np.array([name for name, window in windows.items() if window is None], dtype=str),
    )
    write_whole(path, buffer.getvalue())


def calibration_windows(
    model: Whisper,
    gate: Gate,
    logits: np.ndarray,
    clips: Sequence[CalibrationClip],
    sources: Mapping[tuple[str, str], Clip],
    *,
    progress: bool = True,
) -> np.ndarray:
    """(rows, 3 * layers, d_model) float32: the clips' windows as a `WindowSample` has them; zeros in rows
    that no clip has.

    gate: its smoothing counts. logits: (rows, frames) its unsmoothed frame logits.
    """
    rows: list[int] = []

    def windows() -> Iterable[tuple[Tensor, np.ndarray]]:
        for clip in tqdm(clips, desc="calibration windows", unit="clip", disable=not progress):
            mel, content = padded_log_mel(sources[clip.set, clip.id].load(), model.dims.n_mels)
            for row, window in zip(clip.rows, clip.transcript.windows, strict=True):
                rows.append(row)
                yield cut_window(mel, content, window.seek), smoothed(logits[row : row + 1], gate.smooth)[0]

    found, _ = _read(model, gate, windows())
    x = np.zeros((len(logits), *found.shape[1:]), np.float32)
    x[rows] = found
    return x


def _read(
    model: Whisper, gate: Gate, windows: Iterable[tuple[Tensor, np.ndarray | None]]
) -> tuple[np.ndarray, np.ndarray]:
    """(windows, 3 * layers, d_model) and (windows, frames) from mels, each with its frame logits; None: the
    gate's own. The second: these logits."""
    layers = list(gate.layers)
    found: list[np.ndarray] = []
    said: list[np.ndarray] = []
    waiting: list[tuple[Tensor, np.ndarray | None]] = []

    @torch.no_grad()
    def flush() -> None:
        mels = torch.stack([mel for mel, _ in waiting])
        streams = encode_windows(model, mels, layers)
        frame_logits = gate.frame_logits(dict(zip(layers, streams, strict=True)))
        for i, (_, known) in enumerate(waiting):
            if known is not None:
                frame_logits[i] = torch.from_numpy(known)
        padding = padding_frames(mels.to(streams.device))
        # rounded as they are kept, so that a run that goes on comes to the same
        found.append(pooled_windows(frame_logits, list(streams), padding).half().float().cpu().numpy())
        said.append(frame_logits.cpu().numpy())
        waiting.clear()

    for window in windows:
        waiting.append(window)
        if len(waiting) == _BATCH:
            flush()
    if waiting:
        flush()
    return np.concatenate(found), np.concatenate(said)

"""The activations that the SAEs of `benchmarks.training` are trained and measured on.

"real": one layer of the bundled mini.en on the evaluation sets, made by calibration.corpus: training frames
from the calibration split, held-out frames from the test split. "synthetic": sums of few directions of a
random overcomplete dictionary plus noise, for a width that no bundled model has; nothing is learnt from it
about speech. Both are centred and scaled to unit root-mean-square norm (by the training frames'
statistics), the space in which whisper-steer and dictionary_learning train; so every library sees the same
numbers. Frames are kept as .npy files and made once.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.files import write_whole

VERSION = 1  # raise when a change below changes the frames
MODEL, LAYER = "mini.en", 2
WINDOW = 30 * 16_000  # samples
PAUSE = 1_600  # samples of silence between clips in a window


@dataclass(frozen=True)
class FrameFiles:
    """Three .npy files (frames, d_model) float32 of one source; no clip's frames are in two of them.

    Attributes:
        tuning: for choosing learning rates.
        held_out: for the reported quality.
    """

    train: Path
    tuning: Path
    held_out: Path
    source: str


def prepare(
    source: str, d_model: int, *, train: int, held_out: int, folder: Path, say: Callable[[str], None] = print
) -> FrameFiles:
    """The frames of "real" or "synthetic", made where they are not in `folder` yet.

    train, held_out: numbers of frames; `tuning` has as many as `held_out`.
    """
    stem = f"{source}-d{d_model}-{train}-{held_out}-v{VERSION}"
    train_file, tuning_file, held_out_file = (
        folder / f"{stem}-{part}.npy" for part in ("train", "tuning", "held_out")
    )
    files = FrameFiles(train_file, tuning_file, held_out_file, source)
    if not all(path.is_file() for path in (files.train, files.tuning, files.held_out)):
        say(f"making {source} activations, d {d_model}, into {folder} (once)")
        make = {"real": real_frames, "synthetic": synthetic_frames}[source]
        parts = make(d_model, train, held_out)
        mean, scale = statistics_of(parts[0])
        for path, part in zip((files.train, files.tuning, files.held_out), parts, strict=True):
            buffer = io.BytesIO()
            np.save(buffer, (part - mean) / scale)
            write_whole(path, buffer.getvalue())
    return files


def statistics_of(frames: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Mean (d,) and root-mean-square norm of the centred frames (N, d)."""
    mean = frames.mean(axis=0, dtype=np.float64)
    scale = np.sqrt(np.square(frames - mean, dtype=np.float64).sum(axis=1).mean())
    return mean.astype(np.float32), np.float32(scale)


def synthetic_frames(d_model: int, train: int, held_out: int) -> tuple[np.ndarray, ...]:
    """Train, tuning and held-out frames: 32 draws each from 4 x d_model unit directions, by a power law, with
    exponential amplitudes, plus white noise of norm 2 (6 % of the energy).
    """
    rng = np.random.default_rng([VERSION, d_model])
    directions = rng.standard_normal((4 * d_model, d_model)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    chances = np.arange(1, len(directions) + 1) ** -0.7
    chances /= chances.sum()

    def draw(count: int) -> np.ndarray:
        frames = rng.standard_normal((count, d_model), dtype=np.float32) * np.float32(2 / d_model**0.5)
        for _ in range(32):
            chosen = directions[rng.choice(len(directions), size=count, p=chances)]
            frames += chosen * rng.exponential(1.0, size=(count, 1)).astype(np.float32)
        return frames

    return tuple(draw(count) for count in (train, held_out, held_out))


def real_frames(d_model: int, train: int, held_out: int) -> tuple[np.ndarray, ...]:
    """Train, tuning (disjoint fifths of the calibration split's clips) and held-out frames (test split) of
    layer LAYER of MODEL, in random order."""
    from calibration.adapters import WhisperEncoder
    from calibration.corpus import eval_sets
    from whisper_steer.zoo import load_model

    encoder = WhisperEncoder(load_model(MODEL))
    if encoder.d_model != d_model:
        raise ValueError(f"{MODEL} has width {encoder.d_model}, not {d_model}")
    rng = np.random.default_rng(VERSION)
    clips = [clip for clips in eval_sets("calibration").values() for clip in clips]
    clips = [clips[index] for index in rng.permutation(len(clips))]
    unseen = [clip for clips in eval_sets("test").values() for clip in clips]
    unseen = [unseen[index] for index in rng.permutation(len(unseen))]
    cut = len(clips) // 5

    def encoded(chosen: Sequence, count: int) -> np.ndarray:
        parts: list[np.ndarray] = []
        for window in packed(clip.load() for clip in chosen):
            parts.append(encoder.encode([window], [LAYER])[0][0].cpu().numpy())
            if sum(map(len, parts)) >= count:
                break
        frames = np.concatenate(parts)
        return frames[rng.permutation(len(frames))[:count]]

    return encoded(clips[cut:], train), encoded(clips[:cut], held_out), encoded(unseen, held_out)


def packed(audios: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Windows of at most 30 s (samples at 16 kHz) with several clips in a row, so that frames are not mostly
    padding. Clips are not split; what is longer than a window is cut off."""
    pieces: list[np.ndarray] = []
    length = 0
    for audio in audios:
        audio = audio[:WINDOW].astype(np.float32)
        if pieces and length + len(audio) > WINDOW:
            yield np.concatenate(pieces)[:WINDOW]
            pieces, length = [], 0
        pieces += [audio, np.zeros(PAUSE, np.float32)]
        length += len(audio) + PAUSE
    if pieces:
        yield np.concatenate(pieces)[:WINDOW]

"""A linear gate on the frozen encoder's state: one logistic regression per window, no steering.

The probe reads the mean of the last block's output over the window's true frames and says whether somebody
speaks; it is fitted on the calibration clips that ours may be fitted on, speech against non-speech. A window
below the threshold gives no text. The threshold is set by the share of calibration speech that may fall
below it, on scores of probes that were fitted without the clip's speaker or source
(`calibration.refit.deal_folds`).
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.availability import CALIBRATION
from benchmarks.methods import GATED, Heard, Method, Setup, Unavailable
from benchmarks.peers.judging import Scored, judge_windows
from whisper_steer.errors import UsageError

if TYPE_CHECKING:
    from calibration.corpus import Clip
    from calibration.decoding import ClipTranscript

_GATE, _SCORES = "linear gate", "linear gate's scores"
BATCH = 8  # windows encoded together, as plain Whisper's are
WINDOW = 30 * 16_000  # samples


@dataclass(frozen=True)
class LinearGate:
    """score(state) = coef . state + intercept: the logit that somebody speaks.

    Attributes:
        coef: (d_model,). held_out: scores of the calibration speech clips, from folds not fitted on.
    """

    coef: np.ndarray
    intercept: float
    held_out: np.ndarray

    def score(self, state: np.ndarray) -> float:
        """state: (d_model,)."""
        return float(self.coef @ state + self.intercept)

    def threshold(self, rejected: float) -> float:
        """The score that the share `rejected` (0..1) of the calibration speech does not reach."""
        return float(np.quantile(self.held_out, rejected))


def fit_gate(
    states: np.ndarray, speech: np.ndarray, folds: np.ndarray, taught: np.ndarray | None = None
) -> LinearGate:
    """states: (clips, d_model) mean activations; speech: (clips,) bool; folds: (clips,) int, each clip is
    judged by a probe of the others; taught: (clips,) bool, the clips that may be fitted on (None: all)."""
    taught = np.ones(len(speech), dtype=bool) if taught is None else taught
    scores = np.full(len(speech), np.nan)
    for fold in np.unique(folds):
        coef, intercept = _probe(states[taught & (folds != fold)], speech[taught & (folds != fold)])
        scores[folds == fold] = states[folds == fold] @ coef + intercept
    return LinearGate(*_probe(states[taught], speech[taught]), scores[speech])


def _probe(states: np.ndarray, speech: np.ndarray) -> tuple[np.ndarray, float]:
    """(coefficients (d_model,), intercept) on states as they are."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(states)
    regression = LogisticRegression(C=1.0, max_iter=2000, class_weight="balanced")
    regression.fit(scaler.transform(states), speech)
    coef = regression.coef_[0] / scaler.scale_
    return coef, float(regression.intercept_[0] - coef @ scaler.mean_)


def window_states(frames: np.ndarray, transcript: ClipTranscript) -> np.ndarray:
    """(windows, d_model): mean of frames (n, d_model), a clip's, over those that every decoded window covers.

    Clips of up to 30 s are encoded as they were decoded; in longer ones a later window is read from the
    consecutive 30 s windows."""
    states = []
    for window in transcript.windows:
        first = min(window.seek // 2, len(frames) - 1)  # an encoder frame is two mel frames
        states.append(frames[first : max(first + 1, (window.seek + window.size) // 2)].mean(axis=0))
    return np.stack(states)


def encoded(setup: Setup, clips: Sequence[Clip]) -> Iterator[tuple[np.ndarray, float]]:
    """(frames (n, d_model) behind the last block that hold audio, seconds of compute) of every clip; a batch
    of windows shares its time."""
    import torch

    from calibration.activations import ClipActivations, encode_windows, true_frames, window_mels

    for start in range(0, len(clips), BATCH):
        began = time.perf_counter()
        audios = [setup.audio(clip) for clip in clips[start : start + BATCH]]
        mels = [window_mels(audio, setup.model.dims.n_mels) for audio in audios]
        waiting = torch.cat(mels).split(BATCH)
        states = torch.cat([encode_windows(setup.model, part, [_last(setup)]).cpu() for part in waiting], 1)
        parts = states.split([len(mel) for mel in mels], dim=1)
        each = (time.perf_counter() - began) / states.shape[1]
        for audio, part in zip(audios, parts, strict=True):
            held = tuple(true_frames(len(audio) - index * WINDOW) for index in range(part.shape[1]))
            yield ClipActivations(part, held).frames[0].numpy(), each * part.shape[1]


def _last(setup: Setup) -> int:
    return int(setup.model.dims.n_audio_layer) - 1


def _fit(setup: Setup) -> LinearGate:
    from calibration.evaluate import evenly
    from calibration.refit import deal_folds

    clips = [clip for group in setup.calibration.values() for clip in group]
    nonspeech = [clip for clip in clips if clip.kind == "nonspeech"]
    speech = [clip for clip in clips if clip.kind != "nonspeech"]
    if setup.quick:
        speech = evenly(speech, len(nonspeech))
    chosen = [*speech, *nonspeech]
    try:
        folds = np.array(deal_folds(chosen))
    except UsageError as error:
        raise Unavailable(f"it is fitted on speech and non-speech clips: {error}") from error
    known = {clip.id for clip in setup.taught}
    taught = np.array([clip.id in known for clip in chosen])
    is_speech = np.array([clip.kind != "nonspeech" for clip in chosen])
    if any(len(set(is_speech[taught & (folds != fold)])) < 2 for fold in np.unique(folds)):
        raise Unavailable("it is fitted on speech and non-speech clips, and a fold of them lacks one")
    return fit_gate(_states(setup, chosen), is_speech, folds, taught)


def _states(setup: Setup, clips: Sequence[Clip]) -> np.ndarray:
    """(clips, d_model) of the clips' first windows, kept in setup.cache."""
    import torch
    from tqdm import tqdm

    from benchmarks.files import write_whole
    from calibration.activations import cut_window, encode_windows, padded_log_mel, true_frames
    from calibration.hallucinations import model_crc

    path: Path = setup.cache / f"linear-gate-states-{model_crc(setup.model):08x}.npz"
    ids = np.array([clip.id for clip in clips])
    if path.is_file():
        with np.load(path, allow_pickle=False) as kept:
            if np.array_equal(kept["ids"], ids):
                return np.asarray(kept["states"])
    states = []
    with tqdm(
        total=len(clips), desc="encoding", unit="clip", file=sys.stderr, disable=not setup.progress
    ) as bar:
        for start in range(0, len(clips), 8):
            audios = [setup.audio(clip) for clip in clips[start : start + 8]]
            mels = [cut_window(*padded_log_mel(audio, setup.model.dims.n_mels), seek=0) for audio in audios]
            encoded = encode_windows(setup.model, torch.stack(mels), [_last(setup)])[0].cpu()
            for x, audio in zip(encoded, audios, strict=True):
                states.append(x[: max(1, true_frames(len(audio)))].mean(dim=0).numpy())
                bar.update()
    buffer = io.BytesIO()
    np.savez(buffer, ids=ids, states=np.stack(states))
    write_whole(path, buffer.getvalue())
    return np.stack(states)


@dataclass(frozen=True)
class LinearGatePeer:
    """See benchmarks.methods.Method; strength is the share of calibration speech rejected."""

    name: str = "linear-gate"
    strengths: tuple[float, ...] = (
        *(0.001, 0.002, 0.003, 0.005, 0.007),
        *(0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.07, 0.1),
    )
    timed: str = GATED
    needs: tuple[str, ...] = (CALIBRATION, "sklearn")
    about: str = (
        "logistic regression on the mean of the encoder's last block, fitted on calibration clips, withholds "
        "windows of plain Whisper; strength: share of calibration speech below its threshold"
    )

    def prepare(self, setup: Setup) -> None:
        if _GATE not in setup.memory:
            setup.memory[_GATE] = _fit(setup)

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        self.prepare(setup)
        gate: LinearGate = setup.memory[_GATE]
        threshold = gate.threshold(strength)
        yield from judge_windows(setup, clips, partial(_scores, setup, gate), lambda score: score < threshold)


def _scores(setup: Setup, gate: LinearGate, clips: Sequence[Clip]) -> Mapping[Clip, Scored]:
    """The same at every threshold."""
    known: dict[Clip, Scored] = setup.memory.setdefault(_SCORES, {})
    new = [clip for clip in clips if clip not in known]
    windows = setup.plain_windows(new)
    for clip, transcript, (frames, seconds) in zip(new, windows, encoded(setup, new), strict=True):
        began = time.perf_counter()
        scores = tuple(gate.score(state) for state in window_states(frames, transcript))
        known[clip] = Scored(scores, seconds + time.perf_counter() - began)
    return known


METHODS: tuple[Method, ...] = (LinearGatePeer(),)

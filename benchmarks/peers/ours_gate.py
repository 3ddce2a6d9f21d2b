"""Ours without edits, the bundled steering `gate`: windows are withheld, and all others stay bit for bit.

So nothing has to be decoded again: its words are plain Whisper's, less the windows whose logit is above the
threshold.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.availability import STEERING
from benchmarks.methods import GATED, Heard, Method, Setup
from benchmarks.peers.judging import Scored, judge_windows
from benchmarks.peers.linear_gate import BATCH
from benchmarks.peers.ours import steering_hash, steering_of, without_edits

if TYPE_CHECKING:
    from calibration.corpus import Clip
    from calibration.decoding import ClipTranscript
    from whisper_steer.steering import Gate

_SCORES = "our gate's logits"


@dataclass(frozen=True)
class GateAlone:
    """See benchmarks.methods.Method; strength is alpha, by which the threshold falls."""

    name: str = "whisper-steer-gate"
    about: str = (
        "ours without edits (--steering gate): windows are withheld, the others stay bit for bit; strength: "
        "alpha, calibrated: 1"
    )
    strengths: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0)
    quick_strengths: tuple[float, ...] = (0.5, 1.0, 2.0)
    timed: str = GATED
    needs: tuple[str, ...] = (STEERING,)

    def prepare(self, setup: Setup) -> None:
        self._gate(setup)

    def fingerprint(self, setup: Setup) -> str:
        """What the words depend on beside the model."""
        return steering_hash(without_edits(steering_of(setup)))

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        gate = self._gate(setup)
        threshold = gate.window_threshold(strength)
        yield from judge_windows(setup, clips, partial(_scores, setup, gate), lambda logit: logit > threshold)

    def _gate(self, setup: Setup) -> Gate:
        gate = without_edits(steering_of(setup)).gate
        assert gate is not None
        return gate


def _scores(setup: Setup, gate: Gate, clips: Sequence[Clip]) -> Mapping[Clip, Scored]:
    """By clip the logits of the windows that plain Whisper decoded; the same at every alpha."""
    known: dict[Clip, Scored] = setup.memory.setdefault(_SCORES, {})
    new = [clip for clip in clips if clip not in known]
    for start in range(0, len(new), BATCH):
        group = new[start : start + BATCH]
        transcripts = setup.plain_windows(group)
        began = time.perf_counter()
        logits = window_logits(setup, gate, group, transcripts)
        each = (time.perf_counter() - began) / len(group)
        known.update({clip: Scored(tuple(found), each) for clip, found in zip(group, logits, strict=True)})
    return known


def window_logits(
    setup: Setup, gate: Gate, clips: Sequence[Clip], transcripts: Sequence[ClipTranscript]
) -> list[list[float]]:
    """Of every clip, what the gate says of each window of its transcript."""
    import torch

    from calibration.activations import cut_window, encode_windows, padded_log_mel
    from whisper_steer.passing import padding_frames

    mels: list[torch.Tensor] = []
    for clip, transcript in zip(clips, transcripts, strict=True):
        mel, content = padded_log_mel(setup.audio(clip), setup.model.dims.n_mels)
        mels += [cut_window(mel, content, window.seek) for window in transcript.windows]
    layers, found = sorted({*gate.layers, *gate.window_layers}), []
    for start in range(0, len(mels), BATCH):
        part = torch.stack(mels[start : start + BATCH])
        with torch.no_grad():
            encoded = encode_windows(setup.model, part, layers).cpu()
            streams = dict(zip(layers, encoded, strict=True))
            logits = gate.window_logit(gate.frame_logits(streams), streams, padding_frames(part))
        found += logits.tolist()
    counts = [len(transcript.windows) for transcript in transcripts]
    return [found[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]


METHODS: tuple[Method, ...] = (GateAlone(),)

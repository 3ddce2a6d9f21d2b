"""openai-whisper's own thresholds: no_speech_threshold and logprob_threshold over their range, and off.

It skips a window if no_speech_prob is above the one and avg_logprob at or below the other. The second one
also decides when a window is decoded again at a higher temperature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import whisper

from benchmarks.methods import Heard, Method, Setup
from benchmarks.peers.intervention import GROUP, heard_of, label_events
from calibration.evaluate import SKIP_LOGPROB, SKIP_NO_SPEECH

if TYPE_CHECKING:
    from calibration.corpus import Clip


def skips(no_speech_prob: float, avg_logprob: float, options: Mapping[str, Any]) -> bool:
    """openai-whisper's rule for a window under these options."""
    no_speech = options.get("no_speech_threshold", SKIP_NO_SPEECH)
    logprob = options.get("logprob_threshold", SKIP_LOGPROB)
    if no_speech is None or no_speech_prob <= no_speech:
        return False
    return bool(logprob is None or avg_logprob <= logprob)


def judged_by(heard: Heard, greedy: Sequence[tuple[float, float]], options: Mapping[str, Any]) -> Heard:
    """The label events of the windows that the rule under these options keeps; greedy: (no_speech_prob,
    avg_logprob) of every window."""
    kept = [scores for scores in greedy if not skips(*scores, options)]
    nsp, hr = label_events(kept)
    return replace(heard, nsp=nsp, hr=hr)


@dataclass(frozen=True)
class Thresholds:
    """See benchmarks.methods.Method. options: those of `whisper.transcribe` at a strength."""

    name: str
    strengths: tuple[float, ...]
    quick_strengths: tuple[float, ...]
    about: str
    options: Callable[[float], dict[str, Any]]

    def prepare(self, setup: Setup) -> None:
        """Nothing to do."""

    def fingerprint(self, setup: Setup) -> str:
        """What the words depend on beside the model."""
        return f"openai-whisper-{whisper.__version__}"

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        from calibration.decoding import iterate_transcripts

        for start in range(0, len(clips), GROUP):
            audios = [setup.audio(clip) for clip in clips[start : start + GROUP]]
            began = time.perf_counter()
            options = self.options(strength)
            transcripts = list(iterate_transcripts(setup.model, audios, batch=GROUP, options=options))
            each = (time.perf_counter() - began) / len(audios)
            for transcript in transcripts:
                yield judged_by(heard_of(transcript, each), transcript.greedy, options)


METHODS: tuple[Method, ...] = (
    Thresholds(
        "openai-no-speech-threshold",
        (0.05, 0.2, 0.4, 0.8),
        (0.05,),
        "openai-whisper's no_speech_threshold, logprob_threshold at its default; strength: the threshold, "
        "lower is stricter, default 0.6",
        lambda strength: {"no_speech_threshold": strength},
    ),
    Thresholds(
        "openai-logprob-threshold",
        (0.1, 0.2, 0.4, 0.7),
        (0.2,),
        "openai-whisper's logprob_threshold, no_speech_threshold at its default; strength: minus the "
        "threshold, lower is stricter, default 1",
        lambda strength: {"logprob_threshold": -strength},
    ),
    Thresholds(
        "openai-no-logprob-threshold",
        (0.2, 0.6, 0.9),
        (0.6,),
        "openai-whisper with logprob_threshold off: no_speech_prob decides alone, and nothing is decoded "
        "again for its probability; strength: no_speech_threshold",
        lambda strength: {"logprob_threshold": None, "no_speech_threshold": strength},
    ),
    Thresholds(
        "openai-no-skip-rule",
        (1.0,),
        (),
        "openai-whisper with no_speech_threshold off: every window is written; strength: 1",
        lambda strength: {"no_speech_threshold": None},
    ),
)

"""The no-speech probability alone: a window above the threshold gives no text, however confident it was.

openai-whisper asks for a low avg_logprob too, which a confident caption does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.methods import JUDGED, Heard, Method, Setup
from benchmarks.peers.judging import judge

if TYPE_CHECKING:
    from calibration.corpus import Clip
    from calibration.decoding import ClipTranscript


def without_likely_silence(transcript: ClipTranscript, threshold: float) -> ClipTranscript:
    """The transcript without the windows whose no_speech_prob is above `threshold` (0..1)."""
    from calibration.decoding import withhold

    return withhold(transcript, [window.no_speech_prob > threshold for window in transcript.windows])


@dataclass(frozen=True)
class NoSpeechProb:
    """See benchmarks.methods.Method; strength is the threshold, lower is stricter."""

    name: str = "no-speech-prob"
    strengths: tuple[float, ...] = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)
    timed: str = JUDGED
    about: str = (
        "plain Whisper's windows with no_speech_prob above a threshold give no text, whatever their "
        "avg_logprob; strength: the threshold, lower is stricter"
    )

    def prepare(self, setup: Setup) -> None:
        """Nothing to do."""

    def fingerprint(self, setup: Setup) -> str:
        """The words depend on the model alone."""
        return ""

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        return judge(setup, clips, lambda _, transcript: without_likely_silence(transcript, strength))


METHODS: tuple[Method, ...] = (NoSpeechProb(),)

"""A bag of hallucinations: sentences that plain Whisper writes over non-speech are deleted.

The bag begins with phrases that users report of Whisper in several languages and goes on with what plain
Whisper wrote over the calibration split's non-speech, the most frequent first (the idea: Baranski et al.,
arXiv 2501.11378, who look for the phrases inside the text; here a sentence must be the phrase and nothing
else, so that speech that only contains one stays).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.availability import CALIBRATION
from benchmarks.methods import JUDGED, Heard, Method, Setup
from benchmarks.peers.judging import judge

if TYPE_CHECKING:
    from calibration.corpus import Clip
    from calibration.decoding import ClipTranscript

REPORTED = (
    "Thank you.",
    "Thanks for watching!",
    "Untertitel im Auftrag des ZDF",
    "Sottotitoli creati dalla comunità Amara.org",
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_PHRASES = "bag of hallucinations"


def sentences(text: str) -> list[str]:
    """The sentences of a text, by their punctuation, stripped; none is empty."""
    return [part for part in _SENTENCE_END.split(text.strip()) if part]


def mine(texts: Iterable[str], count: int) -> tuple[str, ...]:
    """The `count` first phrases of the bag, normalised: the reported ones, then sentences of `texts` from the
    most frequent one on, equally frequent ones in alphabetical order."""
    from calibration.evaluate import normalise

    counts = Counter(normalise(sentence) for text in texts for sentence in sentences(text))
    mined = sorted(counts, key=lambda phrase: (-counts[phrase], phrase))
    found = dict.fromkeys(phrase for phrase in (*map(normalise, REPORTED), *mined) if phrase)
    return tuple(found)[:count]


def without_phrases(transcript: ClipTranscript, phrases: Collection[str]) -> ClipTranscript:
    """The transcript without the sentences that are one of the phrases (normalised). Scores stay: the filter
    sees text alone."""
    from calibration.evaluate import normalise

    segments = []
    for start, end, text in transcript.segments:
        kept = [sentence for sentence in sentences(text) if normalise(sentence) not in phrases]
        if kept:
            segments.append((start, end, " " + " ".join(kept)))
    return replace(transcript, text="".join(text for _, _, text in segments), segments=tuple(segments))


@dataclass(frozen=True)
class PhraseFilter:
    """See benchmarks.methods.Method; strength is the number of phrases."""

    name: str = "phrase-filter"
    strengths: tuple[float, ...] = (4.0, 10.0, 30.0, 100.0, 300.0)
    timed: str = JUDGED
    needs: tuple[str, ...] = (CALIBRATION,)
    about: str = (
        "bag of hallucinations: sentences that users report, or that plain Whisper wrote over calibration "
        "non-speech, are deleted (after arXiv 2501.11378); strength: number of phrases"
    )

    def prepare(self, setup: Setup) -> None:
        self.phrases(setup)

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        phrases = frozenset(self.phrases(setup)[: int(strength)])
        return judge(setup, clips, lambda _, transcript: without_phrases(transcript, phrases))

    def phrases(self, setup: Setup) -> tuple[str, ...]:
        """The whole bag, mined once per setup."""
        if _PHRASES not in setup.memory:
            texts = [setup.labels[clip.id].text for clip in setup.taught if clip.kind == "nonspeech"]
            setup.memory[_PHRASES] = mine(texts, int(max(self.strengths)))
        found: tuple[str, ...] = setup.memory[_PHRASES]
        return found


METHODS: tuple[Method, ...] = (PhraseFilter(),)

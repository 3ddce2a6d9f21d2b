"""What happens to the words of a window in which nobody speaks: they are taken out of the result and kept
aside.

A withheld window gives openai-whisper's `transcribe` an empty DecodingResult, in one of two dresses:
- plain: with scores that make `transcribe`'s own rule (no_speech_prob > 0.6 and avg_logprob <= -1.0) skip it,
  without trying higher temperatures;
- inside `collecting(model)`: with harmless scores, so that `transcribe` emits one empty segment that spans
the
  window; its "temperature" is a WithheldMarker that carries the Suppressed record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from whisper.decoding import DecodingResult


@dataclass(frozen=True)
class Suppressed:
    """A window without words because the gate found nobody speaking in it.

    start, end: seconds; None where only a window was decoded and its place in the audio is not known.
    text: what the decoder would have written ("" if nothing); None if it was not run, which is what
    `decode_withheld=False` saves. score: probability (0..1) that nobody speaks, by the gate. no_speech_prob,
    avg_logprob: the decoder's own scores, None if it was not run. logit: the gate's window logit, of which
    `score` is the sigmoid. threshold: the logit above which a window was withheld, at the alpha of that
    moment. Both are None in records that are not of a gate's making.
    """

    start: float | None
    end: float | None
    text: str | None
    score: float
    no_speech_prob: float | None
    avg_logprob: float | None
    logit: float | None = None
    threshold: float | None = None

    @property
    def decoded(self) -> bool:
        """Was the decoder run, so that the withheld words are known?"""
        return self.text is not None


@dataclass(frozen=True)
class LeftOut(Suppressed):
    """A stretch that was not transcribed because the gate, looking for speech in the whole recording, found
    none there (`vad="gate"`).

    logit: of its frame most like speech, of which `score` is the sigmoid. threshold: the logit above which
    a frame is no speech. The logit can be below it where speech was shorter than is asked for.
    """

    by: str = "vad"


Stretch = tuple[float, float]
"""Start and end, seconds."""


class EditedMarker(float):
    """A temperature that also says where in the window the encoder's stream was edited. `stretches`: seconds
    from the window's start."""

    stretches: tuple[Stretch, ...]

    def __new__(cls, temperature: float, stretches: tuple[Stretch, ...]) -> EditedMarker:
        marker = super().__new__(cls, temperature)
        marker.stretches = stretches
        return marker

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (float(self), self.stretches)


class WithheldMarker(float):
    """A temperature that also says: this window was withheld. `record` is what was withheld."""

    record: Suppressed

    def __new__(cls, temperature: float, record: Suppressed) -> WithheldMarker:
        marker = super().__new__(cls, temperature)
        marker.record = record
        return marker

    def __reduce__(self) -> tuple[Any, ...]:
        # float's own would lose the record, e.g. when a result is copied
        return type(self), (float(self), self.record)


@dataclass(frozen=True, eq=False)
class Collector:
    """What was done to one model's windows during a `collecting` block, in the order of decoding. records:
    what was withheld; from openai-whisper without times (its segments have them). edited: where else the
    stream was edited, seconds in the audio; openai-whisper's segments say it by an EditedMarker."""

    model: Any
    records: list[Suppressed] = field(default_factory=list)
    edited: list[Stretch] = field(default_factory=list)


# a context variable: each thread and each asyncio task collects for itself
_collectors: ContextVar[tuple[Collector, ...]] = ContextVar("whisper_steer_collectors", default=())


@contextmanager
def collecting(model: Any) -> Iterator[Collector]:
    """Within the block, in this thread, withheld windows of `model` come back as marked empty segments."""
    collector = Collector(model)
    token = _collectors.set((*_collectors.get(), collector))
    try:
        yield collector
    finally:
        _collectors.reset(token)


def merged(stretches: Iterable[Stretch], duration: float) -> tuple[Stretch, ...]:
    """The union, in time order, within 0 .. duration seconds, to the hundredth; what touches is one."""
    found: list[Stretch] = []
    for start, end in sorted(stretches):
        start, end = round(max(start, 0.0), 2), round(min(end, duration), 2)
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        elif start < end:
            found.append((start, end))
    return tuple(found)


def active_collector(model: Any) -> Collector | None:
    """The innermost `collecting` block around this call for `model`."""
    return next((c for c in reversed(_collectors.get()) if c.model is model), None)


def skipped(result: DecodingResult) -> DecodingResult:
    """An empty result that `whisper.transcribe` drops by its own rule, at the first temperature."""
    return replace(result, tokens=[], text="", no_speech_prob=1.0, avg_logprob=-100.0, compression_ratio=1.0)


def marked(result: DecodingResult, temperature: float, record: Suppressed) -> DecodingResult:
    """An empty result that `whisper.transcribe` turns into one empty segment carrying the record."""
    return replace(
        result,
        tokens=[],
        text="",
        no_speech_prob=0.0,
        avg_logprob=0.0,
        compression_ratio=1.0,
        temperature=WithheldMarker(temperature, record),
    )

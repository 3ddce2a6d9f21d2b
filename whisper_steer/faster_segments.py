"""faster-whisper's segments while it is steered: what was withheld or edited walks among them to the end, so
that its times are treated as theirs are, and is taken out there and recorded."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

from .ct2_steering import Run, SteeredWhisper, Withheld
from .withholding import Collector, active_collector

# is the call inside a `transcribe` of ours, which takes the withheld windows out again?
asked: ContextVar[bool] = ContextVar("whisper_steer_faster", default=False)


@dataclass
class Silent:
    """Stands for a withheld window among the segments, so that its times are treated as theirs are."""

    start: float
    end: float
    withheld: Withheld
    words: None = None


@dataclass
class Edited:
    """Stands for a stretch of edited stream among the segments, for the same reason."""

    start: float
    end: float
    words: None = None


class _Passing:
    """A method that looks like the one it stands for, also to code that reads `__code__` or the signature."""

    def __init__(self, function: Callable[..., Any], original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.__code__ = original.__code__
        self._function = function

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def transcribing(original: Callable[..., Any]) -> Any:
    """`transcribe` of a model or pipeline, less the withheld windows, which are recorded. Its segments are
    decoded when they are asked for, steered by the handles of the call."""

    def transcribe(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = asked.set(True)
        try:
            segments, info = original(_bound(self), *args, **kwargs)
        finally:
            asked.reset(token)
        return _spoken(segments, self), info

    return _Passing(transcribe, original)


def _bound(owner: Any) -> Any:
    """The model or pipeline as it is steered now, whatever is put on it or taken off later."""
    inner = getattr(owner, "model", None)
    if isinstance(inner, SteeredWhisper):
        inner = inner.bound()
    elif isinstance(getattr(inner, "model", None), SteeredWhisper):
        inner = _bound(inner)
    else:  # a pipeline around a model that is not steered
        return owner
    owner = copy.copy(owner)
    owner.model = inner
    return owner


def _spoken(segments: Iterator[Any], owner: Any) -> Iterator[Any]:
    for segment in segments:
        if isinstance(segment, Silent):
            segment.withheld.place(segment.start, segment.end)
            _note(segment.withheld, getattr(owner, "model", owner), owner)
        elif isinstance(segment, Edited):
            collector = _collector_of(getattr(owner, "model", owner), owner)
            if collector is not None:
                collector.edited.append((segment.start, segment.end))
        else:
            yield segment


def _collector_of(*owners: Any) -> Collector | None:
    return next((found for owner in owners if (found := active_collector(owner)) is not None), None)


def _note(withheld: Withheld, *owners: Any) -> None:
    collector = _collector_of(*owners)
    if collector is not None:
        collector.records.append(withheld.record)
    else:
        withheld.handle.record(withheld.record)


def watched(segments: Iterator[Any]) -> Iterator[Any]:
    """The same segments, each after the windows that were withheld and the stretches that were edited before
    it."""
    run = Run()
    while True:
        with run.watching():
            segment = next(segments, None)
        for withheld in run.take():
            start, end = withheld.record.start, withheld.record.end
            if start is None or end is None:  # never cut into segments: its place is not known
                withheld.handle.record(withheld.record)
            else:
                yield Silent(start, end, withheld)
        for start, end in run.take_edited():
            yield Edited(start, end)
        if segment is None:
            return
        yield segment

"""Any backend, on nothing but the stretches in which the gate finds somebody speaking (`vad="gate"`).

Each stretch is transcribed as a recording of its own, so every window begins with speech; times are then
those of the whole recording. What is left out is reported like what is withheld.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..attach import Handle, steer
from ..audio import SAMPLING_RATE
from ..errors import UsageError
from ..registry import model_lock, probability
from ..speech_finder import Found, find_speech
from ..stretches import GateVad, gaps
from ..withholding import LeftOut, Stretch, Suppressed
from . import VADS, make_backend
from .asked import Asked

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from . import Backend, Progress

_MEL_FRAMES_PER_SECOND = 100
_FINDING = 1 / 3  # about what looking for the speech takes of the whole work


def check_vad(vad: str | GateVad) -> GateVad:
    """The parameters of a vad given by name or by its parameters. Raises UsageError."""
    if isinstance(vad, GateVad):
        return vad
    if vad in VADS:
        return GateVad()
    raise UsageError(f"vad is {vad!r}: expected 'gate', a GateVad, or None")


class StretchedBackend:
    """Finds the speech first, then lets a backend transcribe it, stretch by stretch.

    inner: makes the model ready. name: its kind. given, asked: the model and the steering as the caller gave
    them. asked.alpha 0: the gate finds the speech, words are those of plain Whisper.
    """

    def __init__(self, inner: Backend, name: str, given: Any, asked: Asked, options: GateVad) -> None:
        self._inner, self._name, self._given = inner, name, given
        self._asked, self._options = asked, options

    def load(self) -> Any:
        """See Backend."""
        return self._inner.load()

    def transcribe(
        self, audio: NDArray[np.float32], options: Mapping[str, Any], progress: Progress | None = None
    ) -> dict[str, Any]:
        """See Backend; "suppressed" also has what was left out, with its words if its handle decodes what is
        withheld. The language is that of the first stretch if none is given; an initial prompt is for every
        stretch.

        Raises UsageError: no gate, or clip_timestamps, which say the same.
        """
        if options.get("clip_timestamps") not in (None, "0", 0):
            raise UsageError(
                "clip_timestamps and vad both choose the parts to transcribe: leave one of them out"
            )
        model = self.load()
        with model_lock(model), self._steered(model) as handles:
            handle = next((handle for handle in handles if handle.steering.gate), handles[0])
            duration = len(audio) / SAMPLING_RATE
            finding, writing = _in_turn(progress)
            found = find_speech(model, handle, audio, duration, self._options, finding)
            one_by_one = _OneByOne(make_backend(self._name, model), audio, options, writing)
            silent = [
                self._left_out(one_by_one, found, stretch, handle.decode_withheld)
                for stretch in gaps(found.stretches, duration)
            ]
            return one_by_one.joined(found.stretches, silent)

    def close(self) -> None:
        self._inner.close()

    @contextmanager
    def _steered(self, model: Any) -> Iterator[tuple[Handle, ...]]:
        """The handles at work; at alpha 0 one that only lends its gate."""
        loaded_here = isinstance(self._given, (str, Path))
        with self._asked.steered(model, loaded_here) as handles:
            if handles:
                yield handles
                return
            asked = {**self._asked.strength, "alpha": 0.0}
            with steer(model, **asked) as lending:
                yield (lending,)

    def _left_out(self, one_by_one: _OneByOne, found: Found, stretch: Stretch, decode: bool) -> LeftOut:
        logit, threshold = found.least(*stretch), self._options.threshold
        limit = float(np.log((1 - threshold) / threshold))
        text = one_by_one.text(stretch) if decode else None
        return LeftOut(*stretch, text, probability(logit), None, None, logit, limit)


def _in_turn(progress: Progress | None) -> tuple[Progress | None, Progress | None]:
    """Of looking for the speech and of transcribing it: both pass over the whole recording."""
    if progress is None:
        return None, None
    return (
        lambda done, total: progress(_FINDING * done, total),
        lambda done, total: progress(total - (1 - _FINDING) * (total - done), total),
    )


class _OneByOne:
    """Transcribes parts of one recording, each as its own, and puts them together."""

    def __init__(
        self,
        backend: Backend,
        audio: NDArray[np.float32],
        options: Mapping[str, Any],
        progress: Progress | None,
    ) -> None:
        self._backend, self._audio, self._progress = backend, audio, progress
        self._options = dict(options)
        self._options.pop("clip_timestamps", None)
        self._seconds = len(audio) / SAMPLING_RATE

    def text(self, stretch: Stretch) -> str:
        """What would be written of a stretch that is left out."""
        result = self._heard(stretch)
        parts = [(segment["start"], segment["text"]) for segment in result["segments"]]
        parts += [(window.start or 0.0, window.text or "") for window in result["suppressed"]]
        words = (text.strip() for _, text in sorted(parts, key=lambda part: part[0]))
        return " ".join(word for word in words if word)

    def joined(self, stretches: Sequence[Stretch], left_out: Sequence[LeftOut]) -> dict[str, Any]:
        """A backend's result for the whole recording."""
        segments: list[dict[str, Any]] = []
        suppressed: list[Suppressed] = list(left_out)
        edited: list[Stretch] = []
        whole: dict[str, Any] = {}
        for stretch in stretches:
            start, end = stretch
            result = self._heard(stretch, reporting=True)
            # every stretch in the language of the first one
            self._options.setdefault("language", None)
            self._options["language"] = self._options["language"] or result["language"]
            whole = whole or result
            segments += [_moved(segment, start, end) for segment in result["segments"]]
            suppressed += [_placed(window, start, end) for window in result["suppressed"]]
            edited += [(start + first, min(start + last, end)) for first, last in result["edited"]]
            if result["everywhere"]:
                edited.append(stretch)
        if not stretches:
            whole = self._heard((0.0, 0.0))  # language and names, as for no audio
        if self._progress is not None:
            self._progress(self._seconds, self._seconds)
        return {
            **whole,
            "text": "".join(segment["text"] for segment in segments),
            "segments": [{**segment, "id": number} for number, segment in enumerate(segments)],
            "suppressed": sorted(suppressed, key=lambda window: window.start or 0.0),
            "edited": edited,
            "everywhere": False,
        }

    def _heard(self, stretch: Stretch, reporting: bool = False) -> dict[str, Any]:
        start, end = (round(seconds * SAMPLING_RATE) for seconds in stretch)
        progress = self._progress
        report: Progress | None = None
        if reporting and progress is not None:

            def report(done: float, _: float) -> None:
                progress(min(stretch[0] + done, self._seconds), self._seconds)

        return self._backend.transcribe(self._audio[start:end], self._options, report)


def _moved(segment: Mapping[str, Any], start: float, end: float) -> dict[str, Any]:
    """A segment of the stretch from `start` to `end` seconds, with the recording's times, kept within it."""
    found = {**segment, **_times(segment, start, end)}
    found["seek"] = segment["seek"] + round(start * _MEL_FRAMES_PER_SECOND)
    if segment.get("words"):
        found["words"] = [{**word, **_times(word, start, end)} for word in segment["words"]]
    return found


def _times(item: Mapping[str, Any], start: float, end: float) -> dict[str, float]:
    return {name: round(min(start + float(item[name]), end), 2) for name in ("start", "end")}


def _placed(window: Suppressed, start: float, end: float) -> Suppressed:
    if window.start is None or window.end is None:
        return window
    return replace(window, start=min(start + window.start, end), end=min(start + window.end, end))

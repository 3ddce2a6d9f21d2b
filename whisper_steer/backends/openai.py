"""openai-whisper: the reference runtime, and the only one whose own skip rule looks at no_speech_prob."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import whisper
from whisper.audio import FRAMES_PER_SECOND
from whisper.decoding import DecodingOptions
from whisper.model import Whisper

from ..errors import UsageError
from ..fileformat import model_name
from ..registry import model_lock
from ..withholding import EditedMarker, Stretch, Suppressed, WithheldMarker, collecting
from ..zoo import load_model
from .asked import Asked, at_work

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from . import Progress


class OpenAIBackend:
    """One openai-whisper model, given or loaded by name, steered for the length of each call of `transcribe`.

    asked.alpha 0: plain Whisper, no steering is looked for.
    """

    def __init__(
        self,
        model: Whisper | str | Path,
        asked: Asked = Asked(),  # noqa: B008  frozen
        *,
        device: str | torch.device | None = None,
        download_root: str | Path | None = None,
    ) -> None:
        if isinstance(model, Whisper) and device is not None:
            raise UsageError("device is for a model given by name: move a loaded one with model.to(device)")
        if not isinstance(model, (Whisper, str, Path)):
            raise UsageError(
                f"model is a {type(model).__name__}: expected a name, a path or a whisper.Whisper"
            )
        self._given = model
        self._asked = asked
        self._device = device
        self._download_root = download_root
        self._model: Whisper | None = None

    def load(self) -> Whisper:
        """The model; a named one is loaded at the first call. Raises what zoo.load_model raises."""
        if self._model is None:
            given = self._given
            if not isinstance(given, Whisper):
                given = load_model(given, device=self._device, download_root=self._download_root)
            self._model = given
        return self._model

    def transcribe(
        self, audio: NDArray[np.float32], options: Mapping[str, Any], progress: Progress | None = None
    ) -> dict[str, Any]:
        """See Backend. options: those of whisper.transcribe, DecodingOptions included.

        fp16 defaults to False on the CPU, where openai-whisper would warn and do the same. Holds the model's
        lock throughout: word timestamps use state that all threads share.
        Raises UsageError (unknown option, a value openai-whisper refuses), MismatchError (see steer).
        """
        unknown = sorted(set(options) - option_names())
        if unknown:
            raise UsageError(
                f"unknown option {unknown[0]!r}: expected one of openai-whisper's: "
                + ", ".join(sorted(option_names()))
            )
        model = self.load()
        options = dict(options)
        if model.device.type == "cpu":
            options["fp16"] = False
        asked = self._asked
        with model_lock(model), asked.steered(model) as handles, collecting(model), _reporting(progress):
            try:
                result: dict[str, Any] = whisper.transcribe(model, audio, **options)
            except UsageError:
                raise
            except ValueError as error:  # how openai-whisper refuses a language, a beam size, ...
                raise UsageError(str(error)) from error
        result["segments"], result["suppressed"], result["edited"] = _split(result["segments"])
        result["model"] = model_name(model)
        return {**result, **at_work(handles)}

    def close(self) -> None:
        self._model = None


def option_names() -> set[str]:
    """Every keyword option that the installed whisper.transcribe understands."""
    own = {
        parameter.name
        for parameter in inspect.signature(whisper.transcribe).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return own | {field.name for field in dataclasses.fields(DecodingOptions)}


def _split(segments: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Suppressed], list[Stretch]]:
    """(what was said, what was withheld, where else the stream was edited), by the marked temperatures; a
    withheld window is an empty segment."""
    kept: list[dict[str, Any]] = []
    suppressed: list[Suppressed] = []
    edited: list[Stretch] = []
    for segment in segments:
        marker = segment["temperature"]
        if isinstance(marker, WithheldMarker):
            suppressed.append(dataclasses.replace(marker.record, start=segment["start"], end=segment["end"]))
            continue
        if isinstance(marker, EditedMarker):
            start = segment["seek"] / FRAMES_PER_SECOND
            edited += [(start + a, start + b) for a, b in marker.stretches]
        kept.append({**segment, "temperature": float(marker), "id": len(kept)})
    return kept, suppressed, edited


# ---------- progress: whisper.transcribe tells how far it is to a tqdm bar only

_progress: ContextVar[Progress | None] = ContextVar("whisper_steer_progress", default=None)
_guard = threading.Lock()


@contextmanager
def _reporting(progress: Progress | None) -> Iterator[None]:
    """Within the block, in this thread, whisper.transcribe also reports to `progress`."""
    if progress is None:
        yield
        return
    module = importlib.import_module("whisper.transcribe")  # the name whisper.transcribe is the function
    with _guard:
        if not isinstance(module.tqdm, _Bars):
            module.tqdm = _Bars(module.tqdm)  # type: ignore[attr-defined]
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


class _Bars:
    """Stands in for the module `tqdm` inside whisper.transcribe; without a listener it is that module."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def tqdm(self, *args: Any, **kwargs: Any) -> Any:
        bar = self._module.tqdm(*args, **kwargs)
        report = _progress.get()
        return bar if report is None else _Bar(bar, float(kwargs.get("total") or 0), report)


class _Bar:
    """A tqdm bar, counted in mel frames, whose updates also go to a listener, in seconds."""

    def __init__(self, bar: Any, total: float, report: Callable[[float, float], None]) -> None:
        self._bar, self._total, self._report = bar, total, report
        self._done = 0.0

    def __enter__(self) -> _Bar:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._bar.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def update(self, frames: float = 1) -> Any:
        self._done += frames
        self._report(self._done / FRAMES_PER_SECOND, self._total / FRAMES_PER_SECOND)
        return self._bar.update(frames)

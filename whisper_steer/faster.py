"""faster-whisper, steered: the same two classes with the same methods and parameters.

    from whisper_steer.faster import WhisperModel, BatchedInferencePipeline

    model = WhisperModel("small.en", alpha=1.0)          # else as faster_whisper.WhisperModel
    segments, info = model.transcribe("meeting.mp3", vad_filter=True, word_timestamps=True)
    model.alpha = 0.7                                    # live
    model.withheld                                       # windows in which nobody spoke

How the encoder is edited: ct2_steering.py. Windows in which a gate finds nobody speaking give no segment, in
sequence and in batches. `whisper_steer.steer` does the same to a faster_whisper.WhisperModel or pipeline that
exists already. Segments, which are decoded while they are walked through, are steered by the handles of the
call of `transcribe`, also behind the end of their `with` block.

What is relied upon in faster-whisper (1.1 on): a model's `model` is the CTranslate2 model; windows are cut
into segments by `_split_segments_by_timestamps(tokens=, time_offset=, segment_duration=, ...)`; times are put
back after voice detection by setting `start` and `end` of what `generate_segments` and
`_batched_segments_generator` yield.
"""

from __future__ import annotations

import inspect
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import faster_whisper
from faster_whisper.utils import download_model

from .attach import Handle, check_alpha, check_strength, resolve_steering
from .ct2_encoder import Ct2View
from .ct2_search import find_folder
from .ct2_steering import Ct2Source, NoTokens, SteeredWhisper, current_run, read_files
from .errors import UsageError
from .faster_segments import asked, transcribing, watched
from .registry import model_lock
from .steering import Steering
from .withholding import Suppressed

__all__ = ["BatchedInferencePipeline", "WhisperModel", "steer_existing"]

logger = logging.getLogger("whisper_steer")

# as they are found now: programs may put our classes in their place, to be steered unawares
_Whisper: Any = faster_whisper.WhisperModel
_Pipeline: Any = faster_whisper.BatchedInferencePipeline


class WhisperModel(faster_whisper.WhisperModel):
    """faster_whisper.WhisperModel, steered. Takes its parameters, and:

    alpha: 0 = plain faster-whisper, bit for bit; 1 = the calibrated strength, the default; `model.alpha =
    ...` changes it from the next window on. profile: in its place, one of the steering's own strengths
    ("gentle", "balanced", "strict"); `model.profile = ...` changes it. steering: a Steering, a file, or a
    name; None = the one kept for the model (not looked for at alpha 0). decode_withheld: decode withheld
    windows too, to learn which words were withheld.

    Raises what faster-whisper raises, and UsageError, MismatchError, FormatError as `whisper_steer.steer`.
    """

    model: Any  # a SteeredWhisper
    _own: Handle | None = None
    _steering: Steering | str | Path | None = None
    _decode_withheld = False
    _name = ""

    def __init__(
        self,
        *args: Any,
        alpha: float | None = None,
        profile: str | None = None,
        steering: Steering | str | Path | None = None,
        decode_withheld: bool = False,
        **kwargs: Any,
    ) -> None:
        alpha = check_strength(alpha, profile)
        bound = inspect.signature(_Whisper.__init__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        name = os.fspath(given["model_size_or_path"])
        files = read_files(given["files"]) if given.get("files") else None
        if files is None:
            given["model_size_or_path"] = name if os.path.isdir(name) else _download(name, given)
        else:
            given["files"] = dict(files)  # faster-whisper takes out what is its own
        super().__init__(*bound.args[1:], **bound.kwargs)
        options = {
            "device": given["device"],
            "device_index": given["device_index"],
            "compute_type": given["compute_type"],
            "intra_threads": given["cpu_threads"],
            "inter_threads": given["num_workers"],
            **given.get("model_kwargs", {}),
        }
        source = Ct2Source(os.fspath(given["model_size_or_path"]), files, options)
        self.model = SteeredWhisper(self.model, source, _to_text(self))
        self._name, self._steering, self._decode_withheld = name, steering, decode_withheld
        if alpha > 0 or steering is not None:
            self._attach(alpha, profile)

    def _attach(self, alpha: float, profile: str | None = None) -> None:
        resolved = _resolve(self.model.source, self._name, self._steering)
        first = self._own is None
        self._own = Handle(self.model, resolved, alpha, self._decode_withheld, profile)
        self.model.add(self._own, at_once=first)

    def _handle(self) -> Handle | None:
        return self._own or next(iter(handles_of(self)), None)

    @property
    def alpha(self) -> float:
        """Fraction of the calibrated strength; a new value holds from the next window on. Setting raises
        UsageError (not a finite number >= 0), MismatchError (no steering is kept for the model)."""
        handle = self._handle()
        return 0.0 if handle is None else handle.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        value = check_alpha(value)
        handle = self._handle()
        if handle is not None:
            handle.alpha = value
        elif value > 0:
            self._attach(value)

    @property
    def profile(self) -> str | None:
        """The steering's own strength that was asked for by name; None after a plain alpha. Setting raises
        UsageError (the steering has none of that name), MismatchError (no steering is kept for the model)."""
        handle = self._handle()
        return None if handle is None else handle.profile

    @profile.setter
    def profile(self, name: str) -> None:
        handle = self._handle()
        if handle is not None:
            handle.profile = name
        else:
            self._attach(1.0, name)

    @property
    def steering(self) -> Steering | None:
        """What the model is steered with; None while none was needed. Setting takes what `steering=` takes,
        and leaves alpha as it is; raises UsageError (steered by `steer`), MismatchError, FormatError."""
        handle = self._handle()
        return None if handle is None else handle.steering

    @steering.setter
    def steering(self, value: Steering | str | Path | None) -> None:
        handle, own = self._handle(), self._own
        if handle is not own:
            raise UsageError(f"the model is steered already ({handle!r}): handle.remove() first")
        before, self._steering = self._steering, value
        try:
            self._attach(self.alpha)
        except BaseException:
            self._steering = before
            raise
        if own is not None:
            self.model.remove(own)

    @property
    def withheld(self) -> list[Suppressed]:
        """The last 1000 windows that were withheld, oldest first. They are noted while the segments are
        walked through, with times in seconds."""
        handle = self._handle()
        return [] if handle is None else handle.withheld

    transcribe = transcribing(_Whisper.transcribe)

    def generate_segments(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """As faster-whisper's; called by `transcribe`."""
        segments = iter(super().generate_segments(*args, **kwargs))
        return watched(segments) if asked.get() else segments

    def _split_segments_by_timestamps(self, *args: Any, **kwargs: Any) -> Any:
        segments, seek, single = super()._split_segments_by_timestamps(*args, **kwargs)
        tokens, run = kwargs.get("tokens"), current_run()
        if run is not None:
            place = kwargs["time_offset"], kwargs["segment_duration"]
            run.place_next(*place, keep=not isinstance(tokens, NoTokens))
        if not isinstance(tokens, NoTokens):
            return segments, seek, single
        start = kwargs["time_offset"]
        tokens.withheld.place(start, start + kwargs["segment_duration"])
        return [], seek, single

    def add_word_timestamps(self, segments: list[list[dict[str, Any]]], *args: Any, **kwargs: Any) -> Any:
        """As faster-whisper's, which takes it that every window has a segment: a withheld one has none."""
        filled = [window or [{"seek": 0, "start": 0.0, "end": 0.0, "tokens": []}] for window in segments]
        return super().add_word_timestamps(filled, *args, **kwargs)


class BatchedInferencePipeline(faster_whisper.BatchedInferencePipeline):
    """faster_whisper.BatchedInferencePipeline; steered as its model is. Withheld windows give no segment.

    alpha, profile, steering: those of the model, which they change; a faster_whisper.WhisperModel is steered
    from then on, by alpha 1 if steering alone is given. Raises what `whisper_steer.steer` raises.
    """

    def __init__(
        self,
        model: Any,
        *args: Any,
        alpha: float | None = None,
        profile: str | None = None,
        steering: Steering | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        strength = check_strength(alpha, profile)
        super().__init__(model, *args, **kwargs)
        if alpha is None and profile is None and steering is None:
            return
        if not isinstance(model, WhisperModel):
            if strength > 0 or steering is not None:
                steer_existing(self, strength, profile, steering, False, None)
            return
        if steering is not None:
            model.steering = steering
        if profile is not None:
            model.profile = profile
        elif alpha is not None:
            model.alpha = alpha

    @property
    def alpha(self) -> float:
        """That of the model."""
        return float(self.model.alpha)

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.model.alpha = value

    @property
    def profile(self) -> str | None:
        """That of the model."""
        profile: str | None = self.model.profile
        return profile

    @profile.setter
    def profile(self, name: str) -> None:
        self.model.profile = name

    @property
    def steering(self) -> Steering | None:
        """That of the model; setting it changes the model's."""
        steering: Steering | None = self.model.steering
        return steering

    @steering.setter
    def steering(self, value: Steering | str | Path | None) -> None:
        self.model.steering = value

    @property
    def withheld(self) -> list[Suppressed]:
        """That of the model."""
        return list(self.model.withheld)

    transcribe = transcribing(_Pipeline.transcribe)

    def _batched_segments_generator(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        segments = iter(super()._batched_segments_generator(*args, **kwargs))
        return watched(segments) if asked.get() else segments


# ---------- models that exist already


class _Dressed(SteeredWhisper):
    """In the place of a foreign model's CTranslate2 model, until its last handle is removed."""

    def __init__(self, whisper: faster_whisper.WhisperModel, source: Ct2Source) -> None:
        super().__init__(whisper.model, source, _to_text(whisper))
        self._wearers: list[tuple[weakref.ref[Any], type, type]] = []
        self._whisper = weakref.ref(whisper)
        whisper.model = self
        self.dress(whisper, _Whisper, WhisperModel)

    def dress(self, wearer: Any, plain: type, steered: type) -> None:
        """Give an object our class; one of a class derived from faster-whisper's keeps its own."""
        if type(wearer) is plain:
            wearer.__class__ = steered
            self._wearers.append((weakref.ref(wearer), plain, steered))

    def remove(self, handle: Handle) -> None:
        whisper = self._whisper()
        if whisper is None:
            return super().remove(handle)
        with model_lock(whisper):  # not while another thread puts a handle on it
            super().remove(handle)
            self._undress(whisper)

    def _undress(self, whisper: Any) -> None:
        if self.handles or whisper.model is not self:
            return
        whisper.model = self.plain
        for reference, plain, steered in self._wearers:
            wearer = reference()
            if type(wearer) is steered:
                wearer.__class__ = plain


def handles_of(model: Any) -> tuple[Handle, ...]:
    """The handles of a model or pipeline, empty if it is not steered."""
    whisper = model.model if isinstance(model, _Pipeline) else model
    return whisper.model.handles if isinstance(whisper.model, SteeredWhisper) else ()


def steer_existing(
    model: Any,
    alpha: float,
    profile: str | None,
    steering: Steering | str | Path | None,
    decode_withheld: bool,
    files: str | Path | None,
) -> Handle:
    """`attach.steer` for a faster-whisper model or pipeline. files: the folder that it was loaded from. The
    model does not say how many CPU threads it has: what encodes beside it has as many as CTranslate2 and
    PyTorch choose.

    Raises ModelError (no folder given, and none found in the Hugging Face cache), MismatchError (the folder
    or the steering is of another model), UsageError, FormatError.
    """
    pipeline = model if isinstance(model, _Pipeline) else None
    whisper = model if pipeline is None else pipeline.model
    with model_lock(whisper):
        return _steer(whisper, pipeline, alpha, profile, steering, decode_withheld, files)


def _steer(
    whisper: Any,
    pipeline: Any,
    alpha: float,
    profile: str | None,
    steering: Steering | str | Path | None,
    decode_withheld: bool,
    files: str | Path | None,
) -> Handle:
    if isinstance(whisper.model, SteeredWhisper):
        if files is not None:
            raise UsageError("files is for a model that is not steered yet: this one's are known")
        source = whisper.model.source
    else:
        ct2 = whisper.model
        options = {
            "device": ct2.device,
            "device_index": ct2.device_index,
            "compute_type": ct2.compute_type,
            "inter_threads": ct2.num_workers,
            "tensor_parallel": ct2.tensor_parallel,
        }
        source = Ct2Source(str(find_folder(ct2, files)), None, options)
    resolved = _resolve(source, getattr(whisper, "_name", "") or source.path, steering)
    if profile is not None:
        resolved.alpha_of(profile)  # refused before anything is installed
    steered = whisper.model if isinstance(whisper.model, SteeredWhisper) else _Dressed(whisper, source)
    if pipeline is not None and isinstance(steered, _Dressed):
        steered.dress(pipeline, _Pipeline, BatchedInferencePipeline)
    handle = Handle(steered, resolved, alpha, decode_withheld, profile)
    steered.add(handle)
    return handle


def _resolve(source: Ct2Source, name: str, steering: Steering | str | Path | None) -> Steering:
    model_bin = source.model_bin
    view = Ct2View(model_bin, name)
    resolved = resolve_steering(view, steering)
    if view.comparable:
        resolved.check(view, strict=view.exact)
    else:  # quantised weights have another hash: the shape must do
        replace(resolved, metadata={**resolved.metadata, "encoder_sha256": None}).check(view)
        made_for = resolved.metadata.get("base_model")
        if steering is not None or made_for != view.name:
            _warn_unchecked(source.path, view.name, str(made_for or "an unknown model"))
    return resolved


@cache
def _warn_unchecked(path: str, name: str, made_for: str) -> None:
    """Once per model and steering."""
    logger.warning(
        "%s is quantised: that its encoder (%s) is the one the steering was made for (%s) cannot be checked",
        path,
        name,
        made_for,
    )


def _to_text(whisper: faster_whisper.WhisperModel) -> Callable[[list[int]], str]:
    tokenizer = whisper.hf_tokenizer
    end = tokenizer.token_to_id("<|endoftext|>")
    return lambda tokens: tokenizer.decode([token for token in tokens if token < end]).strip()


def _download(name: str, given: dict[str, Any]) -> str:
    """The folder of a model given by size or hub id, fetched as faster-whisper does."""
    known = inspect.signature(download_model).parameters
    wanted = {"cache_dir": given.get("download_root"), **given}
    return str(download_model(name, **{key: wanted[key] for key in known if key in wanted}))

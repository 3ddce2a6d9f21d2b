"""What a steered model needs to know of an ASR pipeline around it: where each chunk lies in the audio. And
windows that were withheld leave no chunk behind there.

A pipeline that was steered is watched (PipelineWatch). One around a model that was steered is found when it
calls the model: the times are as right then, but a withheld window of a long recording leaves a chunk without
text, since the pipeline has chosen its methods by then.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

_FRAMES = 4  # between the pipeline and the model: one, and what others may have put around it


def is_pipeline(model: Any) -> bool:
    """Is it a transformers ASR pipeline? Imports nothing."""
    module = sys.modules.get("transformers.pipelines.automatic_speech_recognition")
    return module is not None and isinstance(model, module.AutomaticSpeechRecognitionPipeline)


class PipelineWatch:
    """Installed as `pipeline._forward` and `pipeline.postprocess` until `stop`.

    Audio in chunks: tells them their place (`local.offsets`, seconds). The pipeline makes chunks overlap by
    their strides, (samples, left, right); they come in order, and the last one of each audio is marked. Other
    audio is decoded in sequence (`local.sequential`); a window that was withheld leaves no empty chunk in the
    result.
    """

    def __init__(self, pipeline: Any, local: threading.local) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._local = local
        self._rate = pipeline.feature_extractor.sampling_rate
        # the very objects that are installed, and what they stand for
        self._installed = {"_forward": self._timed, "postprocess": self._spoken}
        self._originals = {name: getattr(pipeline, name) for name in self._installed}
        for name, ours in self._installed.items():
            setattr(pipeline, name, ours)

    def watches(self, pipeline: Any) -> bool:
        return self._pipeline() is pipeline

    def stop(self) -> None:
        """Take both off, unless somebody has put something else there since."""
        pipeline = self._pipeline()
        for name, ours in self._installed.items():
            if pipeline is not None and pipeline.__dict__.get(name) is ours:
                delattr(pipeline, name)

    def _timed(self, model_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with placed(self._local, model_inputs, self._rate):
            return self._originals["_forward"](model_inputs, *args, **kwargs)

    def _spoken(self, model_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = list(model_outputs)
        withheld = any(self._has_withheld(output) for output in outputs)
        result = self._originals["postprocess"](outputs, *args, **kwargs)
        if withheld and isinstance(result, dict) and isinstance(result.get("chunks"), list):
            result["chunks"] = [chunk for chunk in result["chunks"] if chunk.get("text") != ""]
        return result

    def _has_withheld(self, output: Mapping[str, Any]) -> bool:
        """Is a window among them for which `silence` stands? Whisper itself writes no such token there."""
        pipeline, tokens = self._pipeline(), output.get("tokens")
        config = None if pipeline is None else pipeline.model.generation_config
        silent = getattr(config, "no_timestamps_token_id", None)
        return silent is not None and isinstance(tokens, Tensor) and bool((tokens == silent).any())


def silence(config: Any, window: int) -> list[int]:
    """Tokens of a window without words where the time is known from timestamp tokens alone: from its begin to
    its end (`window` timestamps), around a token that says nothing."""
    silent = int(config.no_timestamps_token_id)  # timestamps begin right behind it
    return [silent + 1, silent, silent + 1 + window]


@contextmanager
def placed(local: threading.local, model_inputs: Mapping[str, Any], rate: int) -> Iterator[None]:
    """Within the block, `local` says where the chunks are that a pipeline hands to its model."""
    local.offsets = _starts(local, model_inputs, rate)
    local.sequential = local.offsets is None
    try:
        yield
    except BaseException:
        local.reached = 0  # the rest of this audio will not come
        raise
    finally:
        local.offsets = None
        local.sequential = False


@contextmanager
def found_around(local: threading.local) -> Iterator[None]:
    """As `placed`, where the model is called by a pipeline that is not watched: by its method's own
    variables."""
    frame, given = sys._getframe(3), None  # behind this generator, contextlib, and the model's method
    watched = getattr(local, "sequential", False) or getattr(local, "offsets", None) is not None
    for _ in range(0 if watched else _FRAMES):
        if frame.f_code.co_name == "_forward" and is_pipeline(frame.f_locals.get("self")):
            given = frame.f_locals
            break
        if frame.f_back is None:
            break
        frame = frame.f_back
    if given is None:
        yield
    else:
        with placed(local, given, given["self"].feature_extractor.sampling_rate):
            yield


def _starts(local: threading.local, model_inputs: Mapping[str, Any], rate: int) -> list[float] | None:
    """Where each chunk of the batch begins, in seconds; None for audio that was not cut."""
    stride, is_last = model_inputs.get("stride"), model_inputs.get("is_last")
    if stride is None:
        return None
    single = isinstance(stride[0], (int, float))
    strides: Sequence[Any] = [stride] if single else stride
    ends = list(is_last) if isinstance(is_last, (list, tuple, Tensor)) else [is_last]
    starts, reached = [], getattr(local, "reached", 0)
    for (samples, left, right), last in zip(strides, ends, strict=True):
        start = max(0, reached - int(left))
        starts.append(start / rate)
        reached = 0 if last else start + int(samples) - int(right)
    local.reached = reached
    return starts

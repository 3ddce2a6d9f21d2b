"""What a steered model needs to know of an ASR pipeline around it: where each chunk lies in the audio. And
windows without words leave no chunk behind there."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


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
        self._local.offsets = self._starts(model_inputs)
        self._local.sequential = self._local.offsets is None
        try:
            return self._originals["_forward"](model_inputs, *args, **kwargs)
        except BaseException:
            self._local.reached = 0  # the rest of this audio will not come
            raise
        finally:
            self._local.offsets = None
            self._local.sequential = False

    def _spoken(self, *args: Any, **kwargs: Any) -> Any:
        result = self._originals["postprocess"](*args, **kwargs)
        if isinstance(result, dict) and isinstance(result.get("chunks"), list):
            result["chunks"] = [chunk for chunk in result["chunks"] if chunk.get("text") != ""]
        return result

    def _starts(self, model_inputs: Mapping[str, Any]) -> list[float] | None:
        """Where each chunk of the batch begins, in seconds; None for audio that was not cut."""
        stride, is_last = model_inputs.get("stride"), model_inputs.get("is_last")
        if stride is None:
            return None
        single = isinstance(stride[0], (int, float))
        strides: Sequence[Any] = [stride] if single else stride
        ends = list(is_last) if isinstance(is_last, (list, tuple, Tensor)) else [is_last]
        starts, reached = [], getattr(self._local, "reached", 0)
        for (samples, left, right), last in zip(strides, ends, strict=True):
            start = max(0, reached - int(left))
            starts.append(start / self._rate)
            reached = 0 if last else start + int(samples) - int(right)
        self._local.reached = reached
        return starts

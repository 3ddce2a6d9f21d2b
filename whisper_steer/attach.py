"""Puts a Steering on a model and takes it off again without a trace.

    with steer(model, alpha=0.5) as handle:
        whisper.transcribe(model, audio)

What follows is about openai-whisper; for transformers see transformers_steering.py. The model stays a plain
`whisper.Whisper`: what is installed on it is in registry.py. While it is steered it cannot be copied or
pickled. `whisper.decode(model, mel)`, the function, gets the edits but withholds nothing; `model.decode` does
both.

Threads: decoding is serialised by a lock per model (`model_lock`), because openai-whisper keeps its key/value
cache in hooks on the shared decoder. Word timestamps use global state of openai-whisper outside of `decode`:
hold `model_lock` around a whole `whisper.transcribe` that asks for them while other threads use the model, as
`whisper_steer.transcribe` does.
"""

from __future__ import annotations

import logging
import math
import numbers
import sys
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from whisper.model import Whisper

from .errors import UsageError
from .registry import Registry, model_lock, registry_of
from .steering import Steering
from .transformers_steering import OpenAIView, TransformersRegistry, is_pipeline, is_transformers_model
from .withholding import Collector, Suppressed, WithheldMarker, collecting

__all__ = [
    "Collector",
    "Handle",
    "Suppressed",
    "WithheldMarker",
    "check_alpha",
    "check_strength",
    "collecting",
    "handles_of",
    "model_lock",
    "steer",
]

logger = logging.getLogger("whisper_steer")

MAX_RECORDS = 1000
_warned_above_one = False


def steer(
    model: Any,
    *,
    alpha: float | None = None,
    profile: str | None = None,
    steering: Steering | str | Path | None = None,
    decode_withheld: bool = False,
    files: str | Path | None = None,
) -> Handle:
    """Steer `model` until the handle is removed (`handle.remove()`, or the end of a `with` block).

    model: an openai-whisper Whisper, or transformers' WhisperForConditionalGeneration or an ASR pipeline with
    one in it (then steered: the model inside), or a faster-whisper WhisperModel or BatchedInferencePipeline.
    alpha: 0 = plain Whisper, bit for bit; 1 = the calibrated strength, the default; can be changed later
    (`handle.alpha`). profile: in its place, one of the steering's own strengths ("gentle", "balanced",
    "strict": `Steering.profiles`).
    steering: a Steering, a file, or a name of the bundled ones; None = the one bundled for this model.
    decode_withheld: run the decoder on withheld windows too, to learn which words were withheld; False saves
    the time, and the record's text is then None. What is kept is the same.
    files: the folder that a faster-whisper model was loaded from, which it does not say itself; None: the
    Hugging Face cache is searched.
    Several handles work together: edits in the order of attaching, and each gate may withhold.

    Raises UsageError (alpha, profile, steering or model of the wrong kind), MismatchError (steering of
    another model, or none bundled for it), FormatError (damaged file), ModelError (the files of a
    faster-whisper model are not found).
    """
    alpha = check_strength(alpha, profile)
    if _is_faster(model):
        from .faster import steer_existing

        return steer_existing(model, alpha, profile, steering, decode_withheld, files)
    if files is not None:
        raise UsageError("files is for a faster-whisper model: leave it out")
    pipeline = model if is_pipeline(model) else None
    model = model if pipeline is None else pipeline.model
    is_openai = isinstance(model, Whisper)
    if not is_openai and not is_transformers_model(model):
        kind = type(model).__name__
        raise UsageError(
            f"model is a {kind}: expected an openai-whisper Whisper, as load_model returns, transformers' "
            "WhisperForConditionalGeneration or an ASR pipeline with one in it, or a faster-whisper model"
        )
    resolved = _resolve_openai(model, steering) if is_openai else _resolve_transformers(model, steering)
    with model_lock(model):
        registry = registry_of(model) or (Registry(model) if is_openai else TransformersRegistry(model))
        handle = Handle(registry, resolved, alpha, decode_withheld, profile)
        registry.add(handle)
        if pipeline is not None and isinstance(registry, TransformersRegistry):
            registry.add_pipeline(pipeline)
    return handle


def handles_of(model: Any) -> tuple[Handle, ...]:
    """The model's (or the pipeline's model's) handles in the order of attaching; empty if it is not
    steered."""
    if _is_faster(model):
        from . import faster

        return faster.handles_of(model)
    registry = registry_of(model.model if is_pipeline(model) else model)
    return () if registry is None else registry.handles


def check_alpha(alpha: float) -> float:
    """alpha as a float, or UsageError unless it is a finite number >= 0. Above 1: one warning per process."""
    global _warned_above_one
    number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)
    if not number or not math.isfinite(alpha) or alpha < 0:
        raise UsageError(
            f"alpha is {alpha!r}: expected a finite number >= 0 (0 = plain Whisper, 1 = calibrated strength)"
        )
    if alpha > 1 and not _warned_above_one:
        _warned_above_one = True
        logger.warning("alpha %g is above 1, the strongest calibrated setting: speech may be lost", alpha)
    return float(alpha)


def check_strength(alpha: float | None, profile: str | None) -> float:
    """alpha as given, 1 if it is None, after `check_alpha`. With a profile the steering decides later.

    Raises UsageError: both are given, or alpha is not a finite number >= 0.
    """
    if alpha is not None and profile is not None:
        raise UsageError(f"alpha {alpha} and profile {profile!r} are both given: leave one of them out")
    return 1.0 if alpha is None else check_alpha(alpha)


class Owner(Protocol):
    """What a handle is attached to."""

    def remove(self, handle: Handle) -> None:
        """Take the handle's steering off."""


class Handle:
    """One steering on one model. A context manager; `remove()` takes it off.

    profile: takes the place of alpha; raises UsageError if the steering has no profile of that name.
    decode_withheld: see `steer`; may be set at any time.
    """

    def __init__(
        self,
        registry: Owner,
        steering: Steering,
        alpha: float,
        decode_withheld: bool = False,
        profile: str | None = None,
    ) -> None:
        self._registry: Owner | None = registry
        self._steering = steering
        self._alpha = alpha if profile is None else steering.alpha_of(profile)
        self._profile = profile
        self.decode_withheld = decode_withheld
        self._records: deque[Suppressed] = deque(maxlen=MAX_RECORDS)
        self._by_device: dict[torch.device, Steering] = {}

    @property
    def steering(self) -> Steering:
        return self._steering

    @property
    def alpha(self) -> float:
        """Fraction of the calibrated strength; a new value holds from the next window on. Setting:
        `check_alpha`."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._alpha, self._profile = check_alpha(value), None

    @property
    def profile(self) -> str | None:
        """The name of the steering's own strength that was asked for; None after a plain alpha. A new one
        holds from the next window on; setting raises UsageError if the steering has none of that name."""
        return self._profile

    @profile.setter
    def profile(self, name: str) -> None:
        self._alpha, self._profile = self._steering.alpha_of(name), name

    @property
    def withheld(self) -> list[Suppressed]:
        """The last 1000 windows that this handle withheld outside of `collecting`, oldest first; without
        times from openai-whisper, with times from the others."""
        return list(self._records)

    def remove(self) -> None:
        """Take this steering off; waits for a decoding in progress, but not for faster-whisper's segments
        that nobody has asked for yet: they stay steered. Harmless when done already."""
        registry, self._registry = self._registry, None
        if registry is not None:
            registry.remove(self)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        name = self._steering.metadata.get("name") or "steering"
        return f"<Handle {name} alpha={self._alpha:g}{'' if self._registry else ' removed'}>"

    def record(self, suppressed: Suppressed) -> None:
        """Note a window that was withheld; the oldest note goes when there are more than MAX_RECORDS."""
        self._records.append(suppressed)

    def on(self, device: torch.device) -> Steering:
        """The steering with its tensors on `device`; copied there once."""
        if device not in self._by_device:
            self._by_device[device] = self._steering.to(device)
        return self._by_device[device]


def _is_faster(model: Any) -> bool:
    """Is it a model or pipeline of faster-whisper? Imports nothing."""
    module = sys.modules.get("faster_whisper")
    return module is not None and isinstance(model, (module.WhisperModel, module.BatchedInferencePipeline))


def _resolve_openai(model: Whisper, steering: Steering | str | Path | None) -> Steering:
    resolved = resolve_steering(model, steering)
    resolved.check(model)
    return resolved


def _resolve_transformers(model: Any, steering: Steering | str | Path | None) -> Steering:
    view = OpenAIView(model)
    resolved = resolve_steering(view, steering)
    # bfloat16 and the like round the weights, so their hash proves nothing: shape and name must do
    resolved.check(view, strict=view.exact)
    return resolved


def resolve_steering(model: Any, steering: Steering | str | Path | None) -> Steering:
    """A Steering from a Steering, a file or a name; None: the one kept for the model, or MismatchError."""
    if isinstance(steering, Steering):
        return steering
    from . import zoo

    if steering is None:
        return zoo.steering_for(model)
    if isinstance(steering, (str, Path)):
        return zoo.load_steering(steering, getattr(model, "name", None))
    raise UsageError(f"steering is a {type(steering).__name__}: expected a Steering, a file or a name")

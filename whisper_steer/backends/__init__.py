"""Runtimes that can run a Whisper. All have the same three methods; transcribe.py picks one by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UsageError
from ..zoo import is_ct2_repo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..steering import Steering
    from ..stretches import GateVad
    from .asked import Asked

Progress = Callable[[float, float], None]
"""Called with (seconds of audio done, seconds in all) while a backend works."""

BACKENDS = ("openai", "faster", "transformers")
VADS = ("gate",)


class Backend(Protocol):
    """A runtime with one model, steered while it transcribes."""

    def load(self) -> Any:
        """Make the model ready, once; returns it in the runtime's own form."""

    def transcribe(
        self, audio: NDArray[np.float32], options: Mapping[str, Any], progress: Progress | None = None
    ) -> dict[str, Any]:
        """audio: mono 16 kHz samples (n,). options: the runtime's own.

        Returns openai-whisper's result dict, withheld windows left out of "segments" and listed under
        "suppressed" (list[Suppressed], with times); also "model" (name), "steering" (name or None), "alpha",
        "profile" (name or None), "edited" (stretches of the other windows in which gated edits acted),
        "everywhere" (edits without a gate were at work).
        """

    def close(self) -> None:
        """Let go of the model."""


def make_backend(
    name: str,
    model: Any,
    *,
    alpha: float | None = None,
    profile: str | None = None,
    steering: Steering | str | Path | None = None,
    decode_withheld: bool | None = None,
    device: Any = None,
    download_root: str | Path | None = None,
    threads: int = 0,
    vad: str | GateVad | None = None,
) -> Backend:
    """The backend of this name. Raises UsageError for an unknown one.

    alpha, profile, steering, decode_withheld: as `steer` takes them; None: see asked.Asked.
    threads: CPU threads of a model that faster-whisper loads, 0: its choice; the other backends use torch's.
    vad: "gate" or its parameters: only the speech that the steering's gate finds is transcribed.
    """
    from .asked import Asked

    asked = Asked(alpha, profile, steering, decode_withheld)
    inner = _backend(name, model, asked, threads, device=device, download_root=download_root)
    if vad is None:
        return inner
    from .stretched import StretchedBackend, check_vad

    return StretchedBackend(inner, name, model, asked, check_vad(vad))


def _backend(name: str, model: Any, asked: Asked, threads: int, **given: Any) -> Backend:
    if name == "openai":
        from .openai import OpenAIBackend

        return OpenAIBackend(model, asked, **given)
    if name == "faster":
        from .faster import FasterBackend

        return FasterBackend(model, asked, **given, cpu_threads=threads)
    if name == "transformers":
        from .transformers import TransformersBackend

        return TransformersBackend(model, asked, **given)
    raise UsageError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")


def backend_for(model: Any, download_root: str | Path | None = None) -> tuple[str, str]:
    """(the backend that suits a model best, why, in words for a person).

    faster for CTranslate2 models: a folder with model.bin, a hub id of such a repository, a loaded one;
    transformers for its loaded models; else openai. download_root: where hub models are kept.
    """
    kind = type(model).__module__.partition(".")[0]
    if kind == "faster_whisper" or isinstance(model, _class("whisper_steer.faster", "WhisperModel")):
        return "faster", "the model is faster-whisper's"
    if kind == "transformers":
        return "transformers", "the model is transformers'"
    if isinstance(model, (str, Path)):
        folder = Path(model).expanduser()
        if (folder / "model.bin").is_file() or is_ct2_repo(str(model), download_root):
            if find_spec("faster_whisper") is not None:
                return "faster", "the model is in CTranslate2's format"
            return "openai", "faster-whisper is not installed"
    return "openai", "the model is not in CTranslate2's format"


def _class(module: str, name: str) -> type | tuple[()]:
    """A class if its module is imported already, else one that nothing is an instance of."""
    found = sys.modules.get(module)
    return () if found is None else getattr(found, name)

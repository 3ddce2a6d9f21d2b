"""Runtimes that can run a Whisper. All have the same three methods; transcribe.py picks one by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..steering import Steering

Progress = Callable[[float, float], None]
"""Called with (seconds of audio done, seconds in all) while a backend works."""

BACKENDS = ("openai",)


class Backend(Protocol):
    """A runtime with one model, steered while it transcribes."""

    def load(self) -> Any:
        """Make the model ready, once; returns it in the runtime's own form."""

    def transcribe(
        self, audio: NDArray[np.float32], options: Mapping[str, Any], progress: Progress | None = None
    ) -> dict[str, Any]:
        """audio: mono 16 kHz samples (n,). options: the runtime's own.

        Returns openai-whisper's result dict, withheld windows left out of "segments" and listed under
        "suppressed" (list[Suppressed], with times); also "model" (name), "steering" (name or None), "alpha".
        """

    def close(self) -> None:
        """Let go of the model."""


def make_backend(
    name: str,
    model: Any,
    *,
    alpha: float | None = None,
    steering: Steering | str | Path | None = None,
    device: Any = None,
    download_root: str | Path | None = None,
) -> Backend:
    """The backend of this name. Raises UsageError for an unknown one."""
    if name == "openai":
        from .openai import OpenAIBackend

        return OpenAIBackend(
            model, alpha=alpha, steering=steering, device=device, download_root=download_root
        )
    raise UsageError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")

"""Plain Whisper, with the default options of `whisper.transcribe`: what every method is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.methods import Heard, Method, Setup

if TYPE_CHECKING:
    from calibration.corpus import Clip

NAME = "plain"


@dataclass(frozen=True)
class Plain:
    """See benchmarks.methods.Method."""

    name: str = NAME
    strengths: tuple[float, ...] = (0.0,)
    about: str = "openai-whisper as it is; strength: none (0)"

    def prepare(self, setup: Setup) -> None:
        """Nothing to do."""

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        yield from setup.plain(clips)


METHODS: tuple[Method, ...] = (Plain(),)

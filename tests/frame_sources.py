"""A source of frames without a model, for tests of caches and workers."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.frames import Frames


@dataclass
class FakeFrames:
    """Random frames that depend on (seed, round, shard) alone.

    Attributes:
        asked: units that were loaded, in order.
        log: a file that gets one line "round shard pid" for every load, from any process.
        kill_once: the first process to load unit (1, 0) while this file does not exist makes it and dies.
    """

    layers: tuple[int, ...] = (0, 2)
    d_model: int = 6
    unit_frames: int = 10
    dtype: torch.dtype = torch.float16
    seed: int = 0
    log: Path | None = None
    kill_once: Path | None = None

    def __post_init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def identity(self) -> dict[str, Any]:
        return {
            "model": {"base_model": "fake"},
            "plan": {"seed": self.seed},
            "layers": list(self.layers),
            "unit_frames": self.unit_frames,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def load(self, round_index: int, shard: int) -> Frames:
        self.asked.append((round_index, shard))
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{round_index} {shard} {os.getpid()}\n")
        if self.kill_once is not None and (round_index, shard) == (1, 0) and not self.kill_once.exists():
            self.kill_once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(1000 * self.seed + 10 * round_index + shard)
        data = torch.randn(len(self.layers), self.unit_frames, self.d_model, generator=generator)
        domains = torch.randint(0, 3, (self.unit_frames,), generator=generator, dtype=torch.uint8)
        return Frames(data.to(self.dtype), domains)


UNITS = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


def content(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of a cache's unit files."""
    return {path.name: path.read_bytes() for path in sorted((folder / "units").glob("*.safetensors"))}

"""Frames that are encoded once and then kept: a cache that training fills by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibration.frame_cache import write_unit
from calibration.frame_files import CacheFolder
from calibration.frames import Frames, FrameSource


class WriteThroughCache:
    """A `FrameSource` that reads units from a cache folder and asks another source for those not there yet.

    Its identity is that source's: what training gets is the same with and without the folder, so a run may
    begin without one and go on with it. `python -m calibration.frame_cache` fills the same folder ahead.
    """

    def __init__(self, source: FrameSource, folder: Path | str):
        """Raises UsageError: the folder holds frames of another source."""
        self.source = source
        self.layers, self.d_model = source.layers, source.d_model
        self.unit_frames, self.dtype = source.unit_frames, source.dtype
        self._cache = CacheFolder.create(folder, source)

    def identity(self) -> dict[str, Any]:
        return self.source.identity()

    def load(self, round_index: int, shard: int) -> Frames:
        """The unit; made and kept if it is not there. Raises FormatError: it cannot be read or written."""
        write_unit(self.source, self._cache, (round_index, shard))
        return self._cache.read((round_index, shard), self.layers)

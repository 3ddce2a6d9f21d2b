"""Keeps the frames of every unit on disk, for training on them more than once.

    python -m calibration.frame_cache --model mini.en --corpus out/corpus --rounds 8 --out out/frames

Streaming needs no disk and is the default of training; a cache pays when the same frames are trained on
several times (other seeds, k or expansions in separate runs) and the disk holds them: whisper-small x
2,800 h is 9.3 TB. The same command continues a cache that was interrupted. Units are bit for bit what
`StreamingFrames` gives on the same machine and number of threads.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from calibration.command import run
from calibration.frame_files import (
    CacheFolder,
    Unit,
    differences,
    listed,
    size_text,
    unit_bytes,
    write_atomically,
)
from calibration.frame_source import SourceSpec, add_source_flags, build_source
from calibration.frames import Frames, FrameSource, StreamingFrames
from whisper_steer.errors import UsageError

logger = logging.getLogger("whisper_steer")
FRAMES_PER_HOUR = 3600 * 50
SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class CacheEstimate:
    """What caching will need.

    Attributes:
        units: all that were asked for; waiting: those not cached yet.
        frames: in all units.
        bytes_needed: on disk, for the waiting units; bytes_free: on the disk of the folder.
    """

    units: int
    waiting: int
    frames: int
    bytes_needed: int
    bytes_free: int

    def __str__(self) -> str:
        return (
            f"{self.units} units, {self.frames} frames ({self.frames / FRAMES_PER_HOUR:.2f} h of audio); "
            f"{self.units - self.waiting} are there, {self.waiting} to make need "
            f"{size_text(self.bytes_needed)} of {size_text(self.bytes_free)} free"
        )


def open_cache(
    source: FrameSource, folder: Path | str, units: Iterable[Unit]
) -> tuple[CacheFolder, list[Unit], CacheEstimate]:
    """(cache, units that are not in it yet, estimate): begins or continues the cache of `source`.

    Raises UsageError: the folder holds other frames, or the disk cannot hold the missing units.
    """
    cache = CacheFolder.create(folder, source)
    cache.sweep()
    wanted = list(dict.fromkeys(units))
    waiting = [unit for unit in wanted if not cache.is_complete(unit)]
    each = unit_bytes(len(cache.layers), cache.unit_frames, cache.d_model, cache.dtype)
    estimate = CacheEstimate(
        len(wanted),
        len(waiting),
        len(wanted) * cache.unit_frames,
        len(waiting) * each,
        shutil.disk_usage(cache.folder).free,
    )
    if estimate.bytes_needed > estimate.bytes_free:
        raise UsageError(
            f"{len(waiting)} units need {size_text(estimate.bytes_needed)}, the disk of {cache.folder} has "
            f"{size_text(estimate.bytes_free)} free: cache fewer rounds or layers, use a 16-bit dtype, give "
            "another disk, or stream instead"
        )
    return cache, waiting, estimate


def record_skipped(folder: Path, records: Sequence[Mapping[str, str]]) -> int:
    """Add unreadable audio to the folder's skipped.jsonl, once for every path; returns how many there are."""
    path = folder / SKIPPED
    listed_before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = {record["path"]: record for record in [*map(json.loads, listed_before), *records]}
    if len(known) > len(listed_before):
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in known.values())
        write_atomically(path, "".join(lines).encode())
    return len(known)


def skipped_by(source: FrameSource) -> list[dict[str, str]]:
    """What a source of audio could not read so far: {"path", "dataset", "id", "reason"}."""
    return list(source.plan.skipped.records) if isinstance(source, StreamingFrames) else []


def write_unit(source: FrameSource, cache: CacheFolder, unit: Unit) -> bool:
    """Make one unit unless it is there; True if it was made. Any number of processes may do so at once."""
    if cache.is_complete(unit):
        return False
    cache.write(unit, source.load(*unit))
    return True


def write_cache(
    source: FrameSource, folder: Path | str, units: Iterable[Unit], *, progress: bool = True
) -> CacheEstimate:
    """Make the units (round, shard) that the cache in `folder` does not hold yet, one after the other.

    One unit is in memory. With `progress`, the sizes are printed to stderr before the start. Raises like
    `open_cache`; FormatError: cannot be written (a full disk).
    """
    cache, waiting, estimate = open_cache(source, folder, units)
    with cache_progress(estimate, cache.unit_frames, progress) as bar:
        for unit in waiting:
            write_unit(source, cache, unit)
            record_skipped(cache.folder, skipped_by(source))
            bar.update(cache.unit_frames)
    return estimate


def cache_progress(estimate: CacheEstimate, unit_frames: int, progress: bool) -> tqdm:
    """The bar of a cache being written, the estimate above it."""
    if progress:
        print(f"frame cache: {estimate}", file=sys.stderr)
    done = (estimate.units - estimate.waiting) * unit_frames
    return tqdm(
        total=estimate.frames, initial=done, unit="frame", unit_scale=True, desc="caching",
        disable=not progress,
    )  # fmt: skip


class CachedFrames:
    """A `FrameSource` that reads what `write_cache` wrote.

    Rounds beyond the cached ones begin again at the first, so a run may see the same frames several times.

    Attributes:
        layers: 0-based, as asked for; only these are read.
        d_model, unit_frames, dtype: of every unit.
        rounds: number of complete rounds.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        layers: Sequence[int] | None = None,
        expected: Mapping[str, Any] | None = None,
    ):
        """layers: None for all that the cache holds. expected: identity of the source that the frames should
        have come from (its layers do not matter); None accepts every one.

        Raises FormatError: no cache there. UsageError: a layer that is not cached, frames of another source,
        no complete round.
        """
        self._cache = CacheFolder.open(folder)
        self.layers = self._cache.layers if layers is None else tuple(layers)
        self.d_model, self.unit_frames = self._cache.d_model, self._cache.unit_frames
        self.dtype = self._cache.dtype
        missing = [layer for layer in self.layers if layer not in self._cache.layers]
        if missing:
            raise UsageError(
                f"layer {missing[0]} is not in {folder}: it holds layers "
                f"{', '.join(map(str, self._cache.layers))} (0-based); cache it or choose among these"
            )
        if expected is not None:
            self._check(expected)
        self.rounds, self._shards = self._complete_rounds()

    def identity(self) -> dict[str, Any]:
        """The identity of the source behind the cache, and the number of rounds, which decides where a run
        begins again at the first one.
        """
        return {**self._cache.identity, "layers": list(self.layers), "cached_rounds": self.rounds}

    def load(self, round_index: int, shard: int) -> Frames:
        """The unit; round `rounds` is round 0 again.

        Raises UsageError: a shard that is not cached. FormatError: a missing or damaged file.
        """
        if shard not in self._shards:
            raise UsageError(
                f"shard {shard} is not in {self._cache.folder}: it holds {len(self._shards)} a round; "
                "cache with --shards, one for every process"
            )
        return self._cache.read((round_index % self.rounds, shard), self.layers)

    def _check(self, expected: Mapping[str, Any]) -> None:
        found = {key: value for key, value in self._cache.identity.items() if key != "layers"}
        wanted = {key: value for key, value in expected.items() if key != "layers"}
        differing = differences(found, wanted)
        if differing:
            raise UsageError(
                f"{self._cache.folder} holds frames made with other settings ({listed(differing)}): "
                "train with the cache's settings, or cache again into another folder"
            )

    def _complete_rounds(self) -> tuple[int, frozenset[int]]:
        units = set(self._cache.units())
        shards = frozenset(shard for _, shard in units)
        rounds = 0
        while units and all((rounds, shard) in units for shard in shards):
            rounds += 1
        if not rounds:
            raise UsageError(
                f"{self._cache.folder} has no complete round yet ({len(units)} finished units): give the "
                "command that caches again, it goes on where it stopped"
            )
        if rounds * len(shards) < len(units):
            logger.warning(
                "%s: rounds 0 to %d are complete and used; %d finished units of later rounds are not",
                self._cache.folder,
                rounds - 1,
                len(units) - rounds * len(shards),
            )
        return rounds, shards


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m calibration.frame_cache", description=(__doc__ or "").split("\n\n")[0]
    )
    add_source_flags(parser)
    parser.add_argument("--rounds", type=int, required=True, help="rounds to cache, each one unit a shard")
    parser.add_argument("--shards", type=int, default=1, help="units a round, as in training (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache")
    parser.add_argument(
        "--ray", nargs="?", const="local", metavar="ADDRESS",
        help="make the units on Ray: on this machine, or on the cluster at ADDRESS (--out must be on a disk "
        "that all its machines share)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    for name in ("rounds", "shards"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} is {getattr(args, name)}: expected at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    spec = SourceSpec.from_args(args)
    units = [(round_index, shard) for round_index in range(args.rounds) for shard in range(args.shards)]
    if args.ray is None:
        estimate = write_cache(build_source(spec), args.out, units)
    else:
        from calibration.ray_jobs import harvest

        gpus = 0 if spec.device == "cpu" else None
        estimate = harvest(partial(build_source, spec), args.out, units, address=args.ray, gpus=gpus)
    print(f"{estimate.units} units, {estimate.frames} frames in {args.out}; {estimate.waiting} made now")
    skipped = record_skipped(args.out, [])
    if skipped:
        print(f"{skipped} audio files could not be read and were left out: {args.out / SKIPPED}")


if __name__ == "__main__":
    run(main)

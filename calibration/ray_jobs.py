"""Caching frames and labelling hallucinations on Ray, on one machine or a cluster (extra "ray").

Work is cut into pieces whose result depends on the piece alone: a unit of frames, a chunk of clips. The
workers run the same function per piece as a single machine does, so the result is the same, bit for bit
with equal hardware and number of threads. A piece whose worker is lost is done again by another one; a
unit that was finished before is recognised by its file, a chunk's labels are taken once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import whisper_steer.errors
from calibration.frame_cache import (
    CacheEstimate,
    cache_progress,
    open_cache,
    record_skipped,
    skipped_by,
    write_unit,
)
from calibration.frame_files import CacheFolder, Unit, write_atomically
from calibration.frames import FrameSource
from calibration.hallucinations import (
    LabelledClip,
    Labels,
    iterate_labelled,
    label_header,
    labels_of,
    model_crc,
    open_label_file,
    transcript_of,
)
from whisper_steer.errors import FormatError, UsageError, WhisperSteerError

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip

OBJECT_STORE_BYTES = 100 * 2**20  # only descriptions of work and labels travel, never frames
CHUNK_BATCHES = 8  # batches of clips in a chunk


def harvest(
    build: Callable[[], FrameSource],
    folder: Path | str,
    units: Iterable[Unit],
    *,
    address: str = "local",
    workers: int | None = None,
    gpus: float | None = None,
    progress: bool = True,
) -> CacheEstimate:
    """`calibration.frame_cache.write_cache` on Ray: make the units that the cache does not hold yet.

    Args:
        build: makes the source, here and in every worker; it must be picklable and give the same source
            everywhere, e.g. functools.partial(build_source, spec).
        folder: of the cache, on a disk that all machines see under the same path.
        address: "local" for this machine, otherwise of a running cluster. A Ray that is already initialised
            is used as it is.
        workers: at most so many at once; None: as many as the CPUs (each takes this process's number of
            torch threads) or the GPUs allow.
        gpus: GPUs of each worker; None: 1 where the cluster has some.

    Raises:
        UsageError: Ray missing, folder of another source, disk too small. FormatError: a unit cannot be
            written, or is not to be seen from here. What `build` and the source raise in a worker is raised
            here.
    """
    folder = Path(folder).resolve()
    with _connected(address) as ray:
        cache, waiting, estimate = open_cache(build(), folder, units)
        rows = [{"round": unit[0], "shard": unit[1]} for unit in waiting]
        arguments = {"build": build, "folder": str(folder)}
        spread = _spread(ray, _UnitWriter, arguments, rows, workers, gpus)
        with cache_progress(estimate, cache.unit_frames, progress) as bar, closing(spread) as finished:
            for done in finished:
                record_skipped(folder, json.loads(done["skipped"]))
                bar.update(cache.unit_frames)
        unseen = [unit for unit in waiting if not cache.is_complete(unit)]
        if unseen:
            raise FormatError(
                f"{len(unseen)} units were made but are not in {folder} on this machine: "
                "give a folder that all machines of the cluster share"
            )
    return estimate


def label(
    build_model: Callable[[], Whisper],
    build_clips: Callable[[], Sequence[Clip]],
    cache: Path | str,
    *,
    address: str = "local",
    workers: int | None = None,
    gpus: float | None = None,
    batch: int = 8,
    progress: bool = True,
) -> dict[str, Labels]:
    """`calibration.hallucinations.label_clips` on Ray: labels by clip id, and the same file at `cache`.

    Finished chunks of clips are kept as files in a folder beside `cache`; at the end their lines are added
    to it in the order of the clips, every clip once. A run that is stopped goes on with the next call.

    Args:
        build_model, build_clips: make the model and the clips, here and in every worker; they must be
            picklable and give the same everywhere, e.g. functools.partial(eval_clips, "calibration").
        batch: clips decoded together.
        The others: see `harvest`; only this process needs to see `cache`.

    Raises:
        UsageError: Ray missing, labels of another model, or a worker that finds other clips than this
            process. FormatError: `cache` is not a label file, or cannot be written.
    """
    cache = Path(cache)
    with _connected(address) as ray:
        crc = model_crc(build_model())
        clips = build_clips()
        before = open_label_file(cache, crc)
        parts = _Parts(cache, crc)
        known = before | parts.read()
        lines_of: dict[str, list[str]] = {}
        for (clip_id, clip_crc), transcript in known.items():
            lines_of.setdefault(clip_id, []).append(LabelledClip(clip_id, clip_crc, transcript).line())
        rows = []
        for start in range(0, len(clips), batch * CHUNK_BATCHES):
            ids = [clip.id for clip in clips[start : start + batch * CHUNK_BATCHES]]
            found = "".join(line for clip_id in ids for line in lines_of.get(clip_id, ()))
            rows.append({"start": start, "ids": json.dumps(ids), "known": found})
        arguments = {"build_model": build_model, "build_clips": build_clips, "batch": batch}
        chunks: dict[int, str] = {}
        spread = _spread(ray, _Labeller, arguments, rows, workers, gpus)
        counted = tqdm(total=len(clips), desc="labels", unit="clip", disable=not progress)
        with counted as bar, closing(spread) as finished:
            for done in finished:
                if done["start"] not in chunks:
                    chunks[done["start"]] = done["lines"]
                    parts.write(done["lines"])
                    bar.update(done["lines"].count("\n"))
    labelled = [_parsed(line) for start in sorted(chunks) for line in chunks[start].splitlines()]
    parts.merge(before, labelled)
    return {done.id: labels_of(done.transcript) for done in labelled}


def eval_clips(split: str, data_dir: Path | None = None, quick: bool = False) -> list[Clip]:
    """The clips of all evaluation sets, in order. Workers of one machine take turns to generate them."""
    import fcntl

    from calibration.corpus import cache_dir, eval_sets

    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / "eval.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return [clip for chosen in eval_sets(split, data_dir, quick).values() for clip in chosen]


class _UnitWriter:
    """A worker that makes units; the source is built with the first one."""

    def __init__(self, build: Callable[[], FrameSource], folder: str, threads: int):
        self.build, self.folder, self.threads = build, folder, threads
        self.source: FrameSource | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            if self.source is None:
                torch.set_num_threads(self.threads)
                self.source = self.build()
                self.cache = CacheFolder.create(self.folder, self.source)
            write_unit(self.source, self.cache, (int(row["round"]), int(row["shard"])))
            return {"skipped": json.dumps(skipped_by(self.source)), **_NO_ERROR}
        except WhisperSteerError as error:
            return {"skipped": "", **_described(error)}


class _Labeller:
    """A worker that labels chunks of clips; the model is loaded with the first one."""

    def __init__(
        self,
        build_model: Callable[[], Whisper],
        build_clips: Callable[[], Sequence[Clip]],
        batch: int,
        threads: int,
    ):
        self.build_model, self.build_clips = build_model, build_clips
        self.batch, self.threads = batch, threads
        self.model: Whisper | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        start, ids = int(row["start"]), json.loads(row["ids"])
        try:
            if self.model is None:
                torch.set_num_threads(self.threads)
                self.model, self.clips = self.build_model(), self.build_clips()
            return {"start": start, "lines": self._lines(start, ids, row["known"]), **_NO_ERROR}
        except WhisperSteerError as error:
            return {"start": start, "lines": "", **_described(error)}

    def _lines(self, start: int, ids: list[str], known: str) -> str:
        chosen = self.clips[start : start + len(ids)]
        if [clip.id for clip in chosen] != ids:
            raise UsageError(
                f"a worker finds other clips than this machine (from {ids[0]} on): "
                "all machines need the same data folder"
            )
        if self.model is None:
            raise RuntimeError("a chunk was asked for before the model was loaded")
        found = {(done.id, done.crc): done.transcript for done in map(_parsed, known.splitlines())}
        groups = iterate_labelled(self.model, chosen, found, batch=self.batch)
        lines = {done.id: done.line() for group in groups for done in group}
        return "".join(lines[clip_id] for clip_id in dict.fromkeys(ids))


class _Parts:
    """Label files of single chunks, in a folder beside the file into which they are merged."""

    def __init__(self, cache: Path, crc: int):
        self.cache, self.crc = cache, crc
        self.folder = cache.with_name(cache.name + ".parts")

    def read(self) -> dict[tuple[str, int], Any]:
        """What an earlier run that was stopped has finished."""
        found: dict[tuple[str, int], Any] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            found |= open_label_file(path, self.crc)
        return found

    def write(self, lines: str) -> None:
        name = hashlib.sha256(lines.encode()).hexdigest()[:20] + ".jsonl"
        with _write_errors_in_one_line(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / name, (label_header(self.crc) + lines).encode())

    def merge(self, before: Mapping[tuple[str, int], Any], labelled: Sequence[LabelledClip]) -> None:
        """Add to the cache what it does not hold yet: this run's clips in order, then what earlier runs had
        finished of others; then remove the parts.
        """
        lines = {(done.id, done.crc): done.line() for done in labelled}
        others = {key: LabelledClip(*key, transcript).line() for key, transcript in self.read().items()}
        ordered = [line for key, line in (lines | others).items() if key not in before]
        with _write_errors_in_one_line(self.cache):
            if ordered:
                write_atomically(self.cache, self.cache.read_bytes() + "".join(ordered).encode())
            if self.folder.exists():
                shutil.rmtree(self.folder)


def _parsed(line: str) -> LabelledClip:
    fields = json.loads(line)
    return LabelledClip(fields["id"], fields["crc"], transcript_of(fields["transcript"]))


@contextmanager
def _write_errors_in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FormatError(
            f"cannot write {path}: {error.strerror or error}; the same command goes on from what is kept"
        ) from error


# the fields of every row that a worker gives back: errors of ours travel as data and are raised here
_NO_ERROR = {"error": "", "error_kind": ""}


def _described(error: WhisperSteerError) -> dict[str, str]:
    return {"error": str(error), "error_kind": type(error).__name__}


def _raised(row: dict[str, Any]) -> dict[str, Any]:
    """The row, unless it holds a worker's error: that is raised."""
    if row["error"]:
        raise getattr(whisper_steer.errors, row["error_kind"], WhisperSteerError)(row["error"])
    return row


def _spread(
    ray: Any,
    worker: type,
    arguments: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    workers: int | None,
    gpus: float | None,
) -> Generator[dict[str, Any], None, None]:
    """What the workers make of the rows, in the order in which they are done, each row once."""
    if not rows:
        return
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = int(sum(machine.get("CPU", 0) for machine in machines))
    all_gpus = sum(machine.get("GPU", 0) for machine in machines)
    # as many threads as here, because their number may change the last bit of a result
    threads = max(1, min(torch.get_num_threads(), int(max(machine.get("CPU", 0) for machine in machines))))
    per_worker = (1.0 if all_gpus else 0.0) if gpus is None else gpus
    room = int(all_gpus / per_worker) if per_worker else cpus // threads
    count = max(1, min(len(rows), room if workers is None else workers))
    with _quiet(ray):
        done = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map(
            worker,
            fn_constructor_kwargs={**arguments, "threads": threads},
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=count, initial_size=count, max_tasks_in_flight_per_actor=1
            ),
            num_cpus=0 if per_worker else threads,
            num_gpus=per_worker or None,
        )  # Ray Data restarts lost actors and repeats their rows without limit
        # closed even if the caller stops early, or the workers would keep their CPUs
        with closing(iter(done.iter_batches(batch_size=None, prefetch_batches=0))) as blocks:
            for block in blocks:
                for values in zip(*block.values(), strict=True):
                    yield _raised(dict(zip(block, values, strict=True)))


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Without Ray Data's own progress bars and messages."""
    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        logger.setLevel(before[1])


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The ray module, connected; what was started here is shut down at the end."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(
            "Ray is not installed: pip install 'whisper-steer[ray]', or run without --ray"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.WARNING}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(**options)
    except Exception as error:  # Ray raises anything here, a bare Exception too
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"cannot start or reach Ray at {address!r} ({reason}): give the address of a running cluster, "
            "such as 10.0.0.1:6379, or --ray alone for this machine"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()

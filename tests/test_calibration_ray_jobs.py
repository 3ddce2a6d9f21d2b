"""Caching and labelling on a local Ray with two workers give what one process gives."""

import json
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
from calibration_tools import FakeClip, clips, make_terse_whisper, sound
from frame_sources import UNITS, FakeFrames, content

from calibration import ray_jobs
from calibration.frame_cache import CachedFrames, write_cache
from calibration.hallucinations import label_clips
from whisper_steer.errors import AudioError, FormatError, UsageError

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
pytestmark = [
    # Ray Data sets its own deprecated options
    pytest.mark.filterwarnings(r"ignore:`\w+` is deprecated:DeprecationWarning:ray\.data"),
    pytest.mark.filterwarnings(r"ignore:subprocess \d+ is still running:ResourceWarning"),
]


@pytest.fixture(scope="module")
def two_workers():
    with pytest.MonkeyPatch.context() as patch:
        # the workers import this file
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        for attempt in range(3):  # Ray gives itself 30 s to start, which a busy machine may exceed
            try:
                ray.init(
                    num_cpus=2, include_dashboard=False, log_to_driver=False,
                    object_store_memory=100 * 2**20, logging_level="warning",
                )  # fmt: skip
                break
            except Exception as error:
                ray.shutdown()
                if "timed out" not in str(error) or attempt == 2:
                    raise
        yield
        ray.shutdown()


@pytest.fixture(params=["here", pytest.param("ray", marks=pytest.mark.slow)])
def engine(request, monkeypatch):
    """The workers' code in this process, one row after the other; and, slow, on Ray."""
    if request.param == "ray":
        request.getfixturevalue("two_workers")
        return

    def spread_here(_ray, worker, arguments, rows, workers, gpus):
        made = worker(**arguments, threads=1)
        for row in [*rows[1::2], *rows[::2]]:  # in another order, as Ray may return them
            yield ray_jobs._raised(made(row))

    monkeypatch.setattr(ray_jobs, "_spread", spread_here)
    monkeypatch.setattr(ray_jobs, "_connected", lambda _: nullcontext())


def loads(log: Path) -> list[tuple[int, int]]:
    return sorted(tuple(map(int, line.split()[:2])) for line in log.read_text().splitlines())


def test_cached_by_two_workers_byte_for_byte_as_by_one_process(engine, tmp_path):
    source = FakeFrames(log=tmp_path / "log")
    estimate = ray_jobs.harvest(partial(replace, source), tmp_path / "ray", UNITS, progress=False)
    write_cache(FakeFrames(), tmp_path / "one", UNITS, progress=False)
    assert estimate.waiting == 6
    assert content(tmp_path / "ray") == content(tmp_path / "one") and len(content(tmp_path / "one")) == 6
    assert loads(tmp_path / "log") == UNITS
    # a second call makes nothing
    assert ray_jobs.harvest(partial(replace, source), tmp_path / "ray", UNITS, progress=False).waiting == 0
    assert len(loads(tmp_path / "log")) == 6


@pytest.mark.slow
def test_a_killed_worker_loses_no_unit_and_none_is_made_twice(two_workers, tmp_path):
    source = FakeFrames(log=tmp_path / "log", kill_once=tmp_path / "killed")
    ray_jobs.harvest(partial(replace, source), tmp_path / "ray", UNITS, progress=False)
    write_cache(FakeFrames(), tmp_path / "one", UNITS, progress=False)
    assert (tmp_path / "killed").exists()
    assert content(tmp_path / "ray") == content(tmp_path / "one")
    assert loads(tmp_path / "log") == sorted(
        [*UNITS, (1, 0)]
    )  # only the unit that was cut off was begun twice
    assert CachedFrames(tmp_path / "ray").rounds == 3


@dataclass
class Unreadable(FakeFrames):
    def load(self, round_index, shard):
        raise AudioError("clip.wav cannot be read: give another file")


def test_an_error_in_a_worker_is_the_same_one_line(engine, tmp_path):
    with pytest.raises(AudioError, match="^clip.wav cannot be read: give another file$"):
        ray_jobs.harvest(Unreadable, tmp_path, UNITS, progress=False)


@pytest.mark.slow
def test_workers_with_another_source_are_refused(two_workers, tmp_path):
    with pytest.raises(UsageError, match="holds frames made with other settings"):
        ray_jobs.harvest(partial(different_elsewhere, os.getpid()), tmp_path, UNITS, progress=False)


def different_elsewhere(pid):
    return FakeFrames(seed=0 if os.getpid() == pid else 1)


# -- labels


@dataclass(frozen=True)
class DeadlyClip(FakeClip):
    """The first process to load it while the file `once` does not exist makes it and dies."""

    once: str = ""

    def load(self):
        if self.id == "speech/9" and not Path(self.once).exists():
            Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return sound(self.id, self.seconds, speech=True)


def make_clips(count=20, once=None):
    chosen = clips(count, 0, seconds=0.5)["speech"]
    if once is not None:
        chosen = [DeadlyClip(clip.id, clip.kind, clip.seconds, clip.text, once=once) for clip in chosen]
    return chosen


BUILD_MODEL = partial(make_terse_whisper, 1)


@pytest.fixture(scope="module")
def labels_of_one_process(tmp_path_factory):
    cache = tmp_path_factory.mktemp("one") / "labels.jsonl"
    return label_clips(BUILD_MODEL(), make_clips(), cache=cache, batch=2, progress=False), cache.read_bytes()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(ray_jobs, "CHUNK_BATCHES", 2)


def test_labelled_by_two_workers_byte_for_byte_as_by_one_process(engine, tmp_path, labels_of_one_process):
    cache = tmp_path / "deep" / "labels.jsonl"
    labels = ray_jobs.label(BUILD_MODEL, make_clips, cache, batch=2, progress=False)
    assert labels == labels_of_one_process[0] and list(labels) == [clip.id for clip in make_clips()]
    assert cache.read_bytes() == labels_of_one_process[1]
    assert [path.name for path in cache.parent.iterdir()] == ["labels.jsonl"]


@pytest.mark.slow
def test_a_killed_worker_loses_no_clip_and_none_is_counted_twice(
    two_workers, tmp_path, labels_of_one_process
):
    cache = tmp_path / "labels.jsonl"
    build = partial(make_clips, once=str(tmp_path / "killed"))
    labels = ray_jobs.label(BUILD_MODEL, build, cache, batch=2, progress=False)
    assert (tmp_path / "killed").exists()
    assert cache.read_bytes() == labels_of_one_process[1]
    assert labels == labels_of_one_process[0]


def test_labelling_goes_on_from_the_file_and_from_parts(engine, tmp_path, labels_of_one_process):
    cache = tmp_path / "labels.jsonl"
    header, *lines = labels_of_one_process[1].splitlines(keepends=True)
    marked = [
        line.replace(b'"text": "', b'"text": "kept ', 1) for line in lines
    ]  # to see that it is not redone
    cache.write_bytes(header + b"".join(marked[:3]) + marked[3][:30])
    parts = tmp_path / "labels.jsonl.parts"
    parts.mkdir()
    (parts / "a.jsonl").write_bytes(header + b"".join(marked[10:12]))
    other = b'{"id": "other", "crc": 5, ' + lines[0].split(b", ", 2)[2]
    (parts / "b.jsonl").write_bytes(header + other)
    ray_jobs.label(BUILD_MODEL, make_clips, cache, batch=2, progress=False)
    written = cache.read_bytes().splitlines(keepends=True)
    assert written[0] == header and written[-1] == other and len(written) == 22
    ids = [json.loads(line)["id"] for line in written[1:-1]]
    assert ids == [clip.id for clip in make_clips()]
    kept = [i for i, line in enumerate(written[1:-1]) if b'"text": "kept ' in line]
    assert kept == [0, 1, 2, 10, 11]
    assert not parts.exists()


def test_labels_of_another_model_are_refused(engine, tmp_path):
    cache = tmp_path / "labels.jsonl"
    label_clips(make_terse_whisper(2), [], cache=cache, progress=False)
    with pytest.raises(UsageError, match="holds labels of another model"):
        ray_jobs.label(BUILD_MODEL, make_clips, cache, progress=False)


def other_clips(pid):
    return make_clips(4) if os.getpid() == pid else make_clips(6)[2:]


@pytest.mark.slow
def test_workers_that_find_other_clips_are_refused(two_workers, tmp_path):
    with pytest.raises(UsageError, match="a worker finds other clips than this machine"):
        ray_jobs.label(
            BUILD_MODEL, partial(other_clips, os.getpid()), tmp_path / "labels.jsonl", progress=False
        )


def test_nothing_to_do_starts_no_worker(engine, tmp_path):
    assert ray_jobs.label(BUILD_MODEL, list, tmp_path / "labels.jsonl", progress=False) == {}


def test_without_ray_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"Ray is not installed: pip install 'whisper-steer\[ray\]'"):
        ray_jobs.harvest(FakeFrames, tmp_path, UNITS)


def test_a_full_disk_while_merging_keeps_the_parts(tmp_path, monkeypatch):
    cache = tmp_path / "labels.jsonl"
    parts = ray_jobs._Parts(cache, 7)
    ray_jobs.open_label_file(cache, 7)
    transcript = {"text": "a", "windows": [], "greedy": [[0.5, -1.0]], "seconds": 1.0, "segments": []}
    line = json.dumps({"id": "a", "crc": 1, "transcript": transcript}) + "\n"
    parts.write(line)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ray_jobs, "write_atomically", full)
    with pytest.raises(FormatError, match="No space left on device; the same command goes on"):
        parts.merge({}, [])
    monkeypatch.undo()
    parts.merge({}, [ray_jobs._parsed(line)])
    assert cache.read_text().splitlines()[1:] == [line.strip()] and not parts.folder.exists()

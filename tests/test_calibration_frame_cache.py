import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibration_tools import FakeClip, clips, make_terse_whisper
from frame_sources import UNITS, FakeFrames, content
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import calibration.frame_files as frame_files
from calibration.frame_cache import CachedFrames, main, open_cache, write_cache
from calibration.frame_files import CacheFolder, differences, size_text, unit_bytes
from calibration.frame_source import SourceSpec, build_source
from calibration.mixture import Mixture
from whisper_steer.errors import AudioError, FormatError, UsageError
from whisper_steer.fileformat import load_metadata

Usage = namedtuple("Usage", "total used free")


def same(a, b):
    return torch.equal(a.data, b.data) and a.data.dtype == b.data.dtype and torch.equal(a.domains, b.domains)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cached_frames_are_bit_for_bit_those_of_the_source(tmp_path, dtype):
    source = FakeFrames(dtype=dtype)
    write_cache(source, tmp_path, UNITS, progress=False)
    cached = CachedFrames(tmp_path)
    assert (cached.layers, cached.d_model, cached.unit_frames, cached.dtype) == ((0, 2), 6, 10, dtype)
    assert cached.rounds == 3
    for unit in UNITS:
        assert same(cached.load(*unit), source.load(*unit))


@settings(max_examples=20, deadline=None)
@given(
    layers=st.lists(st.integers(0, 31), min_size=1, max_size=4, unique=True),
    d_model=st.integers(1, 9),
    unit_frames=st.integers(1, 12),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_any_shape_survives_and_is_plain_safetensors(tmp_path_factory, layers, d_model, unit_frames, dtype):
    folder = tmp_path_factory.mktemp("cache")
    source = FakeFrames(tuple(layers), d_model, unit_frames, dtype)
    write_cache(source, folder, [(0, 0)], progress=False)
    frames = source.load(0, 0)
    assert same(CachedFrames(folder).load(0, 0), frames)
    path = folder / "units" / "r00000_s00.safetensors"
    tensors = load_file(path)
    assert set(tensors) == {f"layer_{layer:02d}" for layer in layers} | {"domains"}
    for layer, data in zip(layers, frames.data, strict=True):
        assert torch.equal(tensors[f"layer_{layer:02d}"], data)
    header = path.stat().st_size - unit_bytes(len(layers), unit_frames, d_model, dtype)
    assert 0 < header < 2000


def test_files_carry_what_they_are(tmp_path):
    write_cache(FakeFrames(), tmp_path, UNITS[:3], progress=False)
    path = tmp_path / "units" / "r00001_s00.safetensors"
    metadata = load_metadata(path, "frames")
    assert (metadata["round"], metadata["shard"]) == (1, 0)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["bytes"] == path.stat().st_size


def test_only_the_layers_asked_for(tmp_path):
    source = FakeFrames(layers=(1, 4, 5))
    write_cache(source, tmp_path, [(0, 0)], progress=False)
    chosen = CachedFrames(tmp_path, layers=[5, 1])
    assert torch.equal(chosen.load(0, 0).data, source.load(0, 0).data[[2, 0]])
    assert chosen.identity()["layers"] == [5, 1]
    with pytest.raises(UsageError, match=r"layer 2 is not in .*: it holds layers 1, 4, 5 \(0-based\)"):
        CachedFrames(tmp_path, layers=[1, 2])


def test_rounds_wrap_and_the_identity_says_where(tmp_path):
    source = FakeFrames()
    write_cache(source, tmp_path, UNITS, progress=False)
    cached = CachedFrames(tmp_path)
    assert same(cached.load(7, 1), source.load(1, 1))
    assert cached.identity() == {**source.identity(), "cached_rounds": 3}
    with pytest.raises(UsageError, match="shard 2 is not in .* holds 2 a round; cache with --shards"):
        cached.load(0, 2)


def test_continues_with_the_missing_units_only(tmp_path):
    write_cache(FakeFrames(), tmp_path, UNITS[:3], progress=False)
    source = FakeFrames()
    estimate = write_cache(source, tmp_path, UNITS, progress=False)
    assert source.asked == UNITS[3:] and (estimate.units, estimate.waiting) == (6, 3)
    again = FakeFrames()
    write_cache(again, tmp_path, [*UNITS, *UNITS], progress=False)
    assert again.asked == []


@pytest.mark.parametrize("harm", ["no record", "half a record", "shorter", "changed", "no data"])
def test_units_that_are_not_whole_are_made_again(tmp_path, harm):
    write_cache(FakeFrames(), tmp_path, UNITS, progress=False)
    whole = content(tmp_path)
    path = tmp_path / "units" / "r00001_s01.safetensors"
    record = path.with_suffix(".json")
    if harm == "no record":
        record.unlink()
    elif harm == "half a record":
        record.write_text(record.read_text()[:20])
    elif harm == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    else:
        path.unlink()
    source = FakeFrames()
    write_cache(source, tmp_path, UNITS, progress=False)
    assert source.asked == [(1, 1)] and content(tmp_path) == whole


def test_a_copied_cache_is_not_made_again(tmp_path):
    write_cache(FakeFrames(), tmp_path / "a", UNITS, progress=False)
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)  # new modification times
    source = FakeFrames()
    write_cache(source, tmp_path / "b", UNITS, progress=False)
    assert source.asked == []


def test_a_damaged_unit_is_named_when_it_is_read(tmp_path):
    write_cache(FakeFrames(), tmp_path, UNITS, progress=False)
    path = tmp_path / "units" / "r00000_s01.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    cached = CachedFrames(tmp_path)
    cached.load(0, 0)
    with pytest.raises(FormatError, match=r"r00000_s01.safetensors is damaged \(its SHA-256"):
        cached.load(0, 1)
    path.unlink()
    with pytest.raises(FormatError, match="missing or unfinished"):
        cached.load(0, 1)


def test_a_unit_of_another_cache_is_refused(tmp_path):
    write_cache(FakeFrames(), tmp_path / "a", UNITS[:1], progress=False)
    write_cache(FakeFrames(seed=1), tmp_path / "b", UNITS[:1], progress=False)
    for path in (tmp_path / "b" / "units").iterdir():
        shutil.copy2(path, tmp_path / "a" / "units")
    with pytest.raises(FormatError, match="is a unit of another cache"):
        CachedFrames(tmp_path / "a").load(0, 0)


def test_checksums_are_compared_once_and_remembered(tmp_path, monkeypatch):
    write_cache(FakeFrames(), tmp_path, UNITS, progress=False)
    read = []
    original = frame_files._sha256
    monkeypatch.setattr(frame_files, "_sha256", lambda path: read.append(path.name) or original(path))
    cached = CachedFrames(tmp_path)
    for unit in [(0, 0), (0, 1), (0, 0), (3, 1)]:
        cached.load(*unit)
    assert read == ["r00000_s00.safetensors", "r00000_s01.safetensors"]
    with (tmp_path / "verified.jsonl").open("a") as file:
        file.write('["r0000')  # a reader was killed while writing
    CachedFrames(tmp_path).load(0, 1)
    assert len(read) == 2
    os.utime(tmp_path / "units" / "r00000_s01.safetensors", (1, 1))
    CachedFrames(tmp_path).load(0, 1)
    assert read[2:] == ["r00000_s01.safetensors"]


def test_other_settings_are_named(tmp_path):
    write_cache(FakeFrames(), tmp_path, UNITS, progress=False)
    with pytest.raises(
        UsageError,
        match=r"other settings \(d_model is 6, wanted 7; identity.plan.seed is 0, wanted 5\): give another",
    ):
        write_cache(FakeFrames(d_model=7, seed=5), tmp_path, UNITS, progress=False)
    expected = replace(FakeFrames(), layers=(2,)).identity()
    assert CachedFrames(tmp_path, layers=[2], expected=expected).rounds == 3
    with pytest.raises(UsageError, match=r"\(plan.seed is 0, wanted 5\): train with the cache's settings"):
        CachedFrames(tmp_path, expected=FakeFrames(seed=5).identity())


def test_differences():
    assert differences({"a": [1, 2], "b": 1}, {"a": [1, 3], "b": 1}) == ["a[1] is 2, wanted 3"]
    assert differences({"a": {"b": 1}}, {"a": {"c": 1}}) == [
        "a.b is 1, wanted null",
        "a.c is null, wanted 1",
    ]
    assert differences({"a": [1]}, {"a": [1, 2]}) == ["a is [1], wanted [1, 2]"]


def test_unfinished_rounds_are_left_out_with_a_warning(tmp_path, caplog):
    write_cache(FakeFrames(), tmp_path, UNITS[:5], progress=False)
    assert CachedFrames(tmp_path).rounds == 2
    assert "rounds 0 to 1 are complete and used; 1 finished units of later rounds are not" in caplog.text
    write_cache(FakeFrames(seed=1), tmp_path / "b", [(1, 0)], progress=False)
    with pytest.raises(UsageError, match=r"no complete round yet \(1 finished units\)"):
        CachedFrames(tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no frame cache"),
        ("{", "cannot be read"),
        ('{"kind": "sae"}', "does not describe a frame cache"),
        ('{"kind": "frame-cache", "format_version": 99}', "has format 99, this version reads 1"),
        ('{"kind": "frame-cache", "format_version": 1}', "is damaged"),
    ],
)
def test_folders_that_are_no_cache(tmp_path, text, message):
    if text is not None:
        (tmp_path / "cache.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        CachedFrames(tmp_path)


def test_a_disk_that_is_too_small_is_refused_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 500, 500))
    source = FakeFrames()  # a unit: 10 frames x (2 layers x 6 x 2 bytes + 1)
    with pytest.raises(UsageError, match=r"6 units need 1.5 kB, the disk of .* has 500 B free: cache fewer"):
        write_cache(source, tmp_path, UNITS, progress=False)
    assert source.asked == []


def test_a_disk_that_fills_up_loses_nothing(tmp_path, monkeypatch):
    original = os.fsync
    left = [8]

    def fsync(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(FormatError, match=r"is full \(.* free, the next unit needs 250 B\): make room"):
        write_cache(FakeFrames(), tmp_path, UNITS, progress=False)
    monkeypatch.undo()
    assert not list((tmp_path / "units").glob(".*"))
    kept = CacheFolder.open(tmp_path).units()
    assert kept == UNITS[:1]
    source = FakeFrames()
    write_cache(source, tmp_path, UNITS, progress=False)
    assert source.asked == UNITS[1:]


WRITER = """
import sys, time
from pathlib import Path
import torch
from frame_sources import FakeFrames, UNITS
from calibration.frame_cache import write_cache
print("ready", flush=True)
write_cache(FakeFrames(unit_frames=200_000), Path(sys.argv[1]), UNITS, progress=False)
"""


def test_killed_at_any_moment_every_unit_is_whole_or_absent(tmp_path):
    source = FakeFrames(unit_frames=200_000)
    write_cache(source, tmp_path / "whole", UNITS, progress=False)
    folder = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for delay in (0.02, 0.06, 0.1):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], env=environment, stdout=subprocess.PIPE
        )
        with process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        if (folder / "cache.json").exists():
            for unit in CacheFolder.open(folder).units():
                frames = CacheFolder.open(folder).read(unit, source.layers)
                assert same(frames, source.load(*unit))
    write_cache(source, folder, UNITS, progress=False)
    assert content(folder) == content(tmp_path / "whole")
    assert not list((folder / "units").glob(".*"))  # the dead writers' temporary files are swept


def test_frames_of_another_shape_are_refused(tmp_path):
    cache, _, _ = open_cache(FakeFrames(), tmp_path, UNITS)
    with pytest.raises(UsageError, match=r"\(2, 11, 6\) float16: .* expects \(2, 10, 6\) float16"):
        cache.write((0, 0), FakeFrames(unit_frames=11).load(0, 0))


def test_sizes_for_people():
    assert [size_text(n) for n in (999, 1500, 2.5e6, 9.3e12)] == ["999 B", "1.5 kB", "2.5 MB", "9.3 TB"]
    # whisper-small, 12 layers x 768, float16, one hour of audio
    assert unit_bytes(12, 180_000, 768, torch.float16) == 180_000 * (12 * 768 * 2 + 1)


def test_the_estimate_is_printed_before_the_start(tmp_path, capsys):
    write_cache(FakeFrames(), tmp_path, UNITS[:2])
    write_cache(FakeFrames(), tmp_path, UNITS)
    printed = capsys.readouterr().err
    assert "2 units, 20 frames (0.00 h of audio); 0 are there, 2 to make need 500 B of" in printed
    assert "6 units, 60 frames (0.00 h of audio); 2 are there, 4 to make need 1.0 kB of" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "--rounds is 0: expected at least 1"),
        (["--rounds", "1", "--layers", "a"], "--layers is 'a': expected 'all'"),
        (["--rounds", "1", "--unit-frames", "0"], "unit_frames is 0: expected at least 1"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        main([*flags, "--out", str(tmp_path)])


def test_a_wrong_dtype_is_one_line():
    with pytest.raises(UsageError, match="dtype is 'int8': expected one of float16, bfloat16, float32"):
        SourceSpec(dtype="int8", corpus=Path("x"))


# -- with a model and audio


@pytest.fixture
def tiny_source_flags(monkeypatch):
    """Flags of a tiny Whisper, of which only the audio is not what they say: clips made on the spot, one of
    them unreadable."""
    from calibration import adapters, frame_source

    chosen = [clip for group in clips(3, 3).values() for clip in group]
    broken = BrokenClip("broken", "nonspeech", 1.0)
    monkeypatch.setattr(frame_source, "build_mixture", lambda spec: Mixture.of([*chosen, broken]))
    model = make_terse_whisper(1)
    monkeypatch.setattr(adapters, "load_encoder", lambda *_: adapters.WhisperEncoder(model))
    return [
        "--unit-frames",
        "700",
        "--packed",
        "0.5",
        "--windows",
        "2",
        "--layers",
        "1,0",
        "--data-seed",
        "3",
    ]


class BrokenClip(FakeClip):
    def load(self):
        raise AudioError("broken.wav holds no audio")


def test_the_command_caches_what_streaming_gives(tmp_path, tiny_source_flags, capsys):
    flags = [*tiny_source_flags, "--rounds", "2", "--shards", "2", "--out", str(tmp_path)]
    main(flags)
    spec = SourceSpec(unit_frames=700, packed=0.5, batch=2, layers=(1, 0), seed=3)
    streaming = build_source(spec)
    cached = CachedFrames(tmp_path, expected=streaming.identity())
    assert cached.layers == (1, 0) and cached.rounds == 2
    for unit in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        assert same(cached.load(*unit), streaming.load(*unit))
    assert not same(cached.load(0, 0), cached.load(0, 1)) and not same(cached.load(0, 0), cached.load(1, 0))
    printed = capsys.readouterr().out
    assert "4 units, 2800 frames in" in printed and "1 audio files could not be read" in printed
    (skipped,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["reason"] == "broken.wav holds no audio"
    main(flags)
    assert "; 0 made now" in capsys.readouterr().out
    with pytest.raises(UsageError, match="plan.seed is 3, wanted 4"):
        CachedFrames(tmp_path, expected=build_source(replace(spec, seed=4)).identity())


def test_a_layer_that_the_model_does_not_have(tiny_source_flags):
    with pytest.raises(UsageError, match=r"layer 2 does not exist: .* has 0 to 1 \(0-based\)"):
        build_source(SourceSpec(layers=(0, 2)))

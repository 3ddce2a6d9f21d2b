"""What methods heard, on disk: lines that a kill cut, other weights, and what a report reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.hearing_cache import (
    Finished,
    HearingCache,
    audio_crc,
    clip_record,
    load_clips,
    read_clips,
    read_run,
    write_clips,
)
from benchmarks.methods import Heard
from calibration.corpus import Clip
from calibration.decoding import ClipTranscript, DecodedWindow
from whisper_steer.errors import FormatError, UsageError

HEARD = Heard(" a b", ((0.0, 1.5, " a"), (1.5, 2.0, " b")), True, None, 0.25)


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    cache = HearingCache(tmp_path)
    transcript = ClipTranscript(
        " a b", (DecodedWindow(0, 200, " a b", 0.5, -0.25, 0.0),), ((0.5, -0.25),), 2.0, HEARD.segments
    )
    first, second = Finished("x/0", 3, HEARD, transcript), Finished("x/1", 4, HEARD)
    cache.append("vad+ours", 0.5, "f", [first])
    cache.append("vad+ours", 0.5, "f", [second])
    cache.append("vad+ours", 2.0, "f", [second])
    assert cache.read("vad+ours", 0.5, "f") == {("x/0", 3): first, ("x/1", 4): second}
    assert cache.path("vad+ours", 0.5) == tmp_path / "heard" / "vad+ours" / "0.5.jsonl"
    assert list(cache.settings()) == [("vad+ours", 0.5), ("vad+ours", 2.0)]
    assert cache.read("vad+ours", 1.0, "f") == {} and cache.read("other", 0.5, "f") == {}


def test_lines_of_other_weights_stay_and_are_not_read(tmp_path: Path) -> None:
    cache = HearingCache(tmp_path)
    cache.append("m", 1.0, "old", [Finished("x", 3, HEARD)])
    new = Finished("x", 3, Heard("", (), False, False, 0.5))
    cache.append("m", 1.0, "new", [new])
    assert cache.read("m", 1.0, "new") == {("x", 3): new}
    assert cache.read("m", 1.0, "old")["x", 3].heard == HEARD


def test_half_a_line_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    cache = HearingCache(tmp_path)
    cache.append("m", 1.0, "f", [Finished("x", 3, HEARD), Finished("y", 3, HEARD)])
    path = cache.path("m", 1.0)
    path.write_bytes(path.read_bytes()[:-20])
    assert set(cache.read("m", 1.0, "f")) == {("x", 3)}
    cache.append("m", 1.0, "f", [Finished("z", 3, HEARD)])
    assert set(cache.read("m", 1.0, "f")) == {("x", 3), ("z", 3)}


def test_names_become_one_folder(tmp_path: Path) -> None:
    cache = HearingCache(tmp_path)
    cache.append("a/../b", 1.0, "f", [Finished("x", 3, HEARD)])
    assert list(cache.settings()) == [("a/../b", 1.0)]
    assert [path.parent for path in tmp_path.rglob("*.jsonl")] == [tmp_path / "heard" / "a%2F..%2Fb"]


def test_a_line_that_is_no_object_is_refused(tmp_path: Path) -> None:
    cache = HearingCache(tmp_path)
    cache.append("m", 1.0, "f", [Finished("x", 3, HEARD)])
    path = cache.path("m", 1.0)
    path.write_text(path.read_text() + "[1]\n")
    with pytest.raises(FormatError, match=r"1\.jsonl, line 2: expected an object; delete the file"):
        cache.read("m", 1.0, "f")


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "heard").write_text("a file")
    with pytest.raises(UsageError, match="cannot write .*choose another --out"):
        HearingCache(tmp_path).append("m", 1.0, "f", [Finished("x", 3, HEARD)])


def test_clips_are_read_back(tmp_path: Path) -> None:
    audio = np.linspace(-1, 1, 8000, dtype=np.float32)
    spoken = Clip("s/0", "speech", "speech", "test", "hello", "g", speech_intervals=((0.1, 0.4),))
    noise = Clip("n/0", "nonspeech", "noise", "test", path="n.wav")
    records = [clip_record(spoken, "speech", audio), clip_record(noise, "noise", audio)]
    write_clips(tmp_path, records)
    assert read_clips(tmp_path) == records
    assert records[0].seconds == 0.5 and records[0].crc == audio_crc(audio.astype(np.float64))
    assert records[0].intervals == ((0.1, 0.4),) and records[1].intervals is None
    assert [record.is_speech for record in records] == [True, False]


def test_measured_clips_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoken, noise = (Clip(name, "speech", "speech", "test") for name in ("s/0", "s/1"))
    asked: list[tuple[object, ...]] = []

    def eval_sets(*arguments: object) -> dict[str, list[Clip]]:
        asked.append(arguments)
        return {"speech": [spoken, noise]}

    monkeypatch.setattr("calibration.corpus.eval_sets", eval_sets)
    (tmp_path / "run.json").write_text(json.dumps({"data": "recordings", "quick": True}))
    write_clips(tmp_path, [clip_record(noise, "speech", np.zeros(160))])
    assert load_clips(tmp_path) == {"s/1": noise} and asked == [("test", "recordings", True)]
    write_clips(tmp_path, [clip_record(Clip("s/2", "speech", "speech", "test"), "speech", np.zeros(160))])
    with pytest.raises(UsageError, match="1 clips of .* are gone, s/2 the first: run it again"):
        load_clips(tmp_path)


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no run\.json: expected the --out folder"):
        read_run(tmp_path)
    with pytest.raises(FormatError, match=r"clips\.jsonl is missing"):
        read_clips(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"model": "mini.en"}))
    assert read_run(tmp_path) == {"model": "mini.en"}
    (tmp_path / "clips.jsonl").write_text('{"id"')
    with pytest.raises(FormatError, match="line 1"):
        read_clips(tmp_path)

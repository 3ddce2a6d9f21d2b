"""Long recordings with known truth, what is counted on them, and the command that runs methods over them."""

from __future__ import annotations

import csv
import json
import math
from itertools import pairwise

import numpy as np
import pytest
from audio_files import write_wav
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.hearing_cache import LONG_ROWS
from benchmarks.long_measure import LongCounts, measure, quiet_stretches, spread, word_times
from benchmarks.long_recordings import (
    LongRecording,
    LongSegment,
    beside_tradeoff,
    choose,
    find_methods,
    long_recordings,
    main,
    prepared,
    run_methods,
    spliced_recordings,
    usual_strength,
)  # fmt: skip
from benchmarks.long_rows import COLUMNS, Measured, headline, rows_of
from benchmarks.long_truth import KINDS, RATE, SECONDS
from benchmarks.methods import Heard, Setup, Unavailable
from calibration import corpus
from calibration.corpus import Clip
from whisper_steer import zoo
from whisper_steer.errors import FormatError, UsageError


def tone(seconds, level, hertz=440):
    t = np.arange(int(seconds * RATE)) / RATE
    return (level * np.sin(2 * np.pi * hertz * t)).astype(np.float32)


def clip(name, kind, seconds, level, *, text=None, path=None, intervals=None):
    return Clip(
        name, kind, name.split("/")[0], "test", text, name, path=path, speech_intervals=intervals,
        audio=lambda: tone(seconds, level),
    )  # fmt: skip


@pytest.fixture
def small_sets(monkeypatch):
    """Few clips per set: speech at level 0.5 from 0.2 s to 1 s before its end, everything else at 0.1."""
    spoken = (
        "speech", "speech_new_voice", "speech_noisy", "speech_reverb", "speech_quiet", "speech_whispered",
    )  # fmt: skip
    sets = {
        name: [
            clip(f"{name}/{i}", "speech", 3 + i, 0.5, text=f"{name} number {i}.", intervals=((0.2, 2.0 + i),))
            for i in range(3)
        ]
        for name in spoken
    }
    for name in ("noise", "tones", "music", "sounds", "human"):
        sets[name] = [clip(f"{name}/{i}", "nonspeech", 4 + i, 0.1) for i in range(3)]
    monkeypatch.setattr(corpus, "eval_sets", lambda split, data_dir=None, quick=False: sets)
    return sets


def recording(*segments):
    """From (start, end, kind, text)."""
    return LongRecording(
        "r", "synthetic", "test", tuple(LongSegment(*segment) for segment in segments), lambda: np.zeros(1)
    )


# 0-10 silence, 10-12 "good morning", 12-20 music, 20-23 "call anna now", 23-30 noise
ALTERNATING = recording(
    (0.0, 10.0, "silence"),
    (10.0, 12.0, "speech", "Good morning."),
    (12.0, 20.0, "music"),
    (20.0, 23.0, "speech", "Call Anna now."),
    (23.0, 30.0, "noise"),
)
RIGHT = [(10.0, 12.0, " Good morning."), (20.0, 23.0, " Call Anna now.")]


# -- building


def test_recordings_cover_their_length_and_say_what_can_be_heard(small_sets):
    texts = {clip.id: clip.text for group in small_sets.values() for clip in group}
    for built in long_recordings("test", None, 3, 0):
        audio = built.load()
        assert built.sort == "synthetic" and audio.dtype == np.float32
        assert len(audio) == round(built.seconds * RATE)
        assert SECONDS[0] <= built.seconds < SECONDS[1] + 60  # a last turn of at most five utterances
        assert built.segments[0].start == 0
        assert all(a.end == b.start for a, b in pairwise(built.segments))
        assert {segment.kind for segment in built.segments} == set(KINDS)
        for segment in built.segments:
            inside = audio[round(segment.start * RATE) : round(segment.end * RATE)]
            peak = {"speech": 0.5, "music": 0.1, "noise": 0.1}.get(segment.kind)
            if peak is not None and segment.end - segment.start > 0.1:
                assert np.abs(inside).max() == pytest.approx(peak, abs=0.01)
            assert segment.text == (texts[segment.source] if segment.kind == "speech" else None)
            assert segment.measured


def test_clips_speech_is_where_its_interval_says(small_sets):
    built = long_recordings("test", None, 1, 5)[0]
    first = built.speech[0]
    number = int(first.source[-1])
    assert first.end - first.start == pytest.approx(1.8 + number)
    heard = built.clip()
    assert heard.text == built.text and heard.category == "long_synthetic"
    assert heard.speech_intervals[0] == (first.start, first.end)
    np.testing.assert_array_equal(heard.load(), built.load())


def test_no_clip_comes_twice_before_all_of_its_set_came(small_sets):
    built = long_recordings("test", None, 1, 1)[0]
    for name in ("speech", "music"):
        drawn = [s.source for s in built.segments if s.source.startswith(f"{name}/")]
        for begin in range(0, len(drawn) - 2, 3):
            assert len(set(drawn[begin : begin + 3])) == 3


def test_same_seed_same_recordings_and_count_adds_at_the_end(small_sets):
    one, two, other = (long_recordings("test", None, n, seed) for n, seed in ((1, 0), (2, 0), (1, 1)))
    assert one[0] == two[0] and two[1] != two[0]
    assert other[0].segments != one[0].segments
    np.testing.assert_array_equal(one[0].load(), two[0].load())
    assert long_recordings("test", None, 0) == []
    with pytest.raises(UsageError, match="count is -1"):
        long_recordings("test", None, -1)


def test_real_recordings_are_mixed_in(small_sets, tmp_path, monkeypatch):
    real = [
        clip("speech/a.flac", "real_speech", 4, 0.7, text="Real words.", path="a"),
        clip("music/b.ogg", "nonspeech", 6, 0.2, path="b"),
        clip("sounds/c.ogg", "nonspeech", 5, 0.3, path="c"),
    ]
    monkeypatch.setattr(corpus, "real_clips", lambda data_dir, split: real)
    real[0] = Clip(**{**vars(real[0]), "category": "real_speech"})
    built = long_recordings("test", tmp_path, 1, 0)
    assert [r.sort for r in built] == ["synthetic", "mixed", "real"]
    assert built[0] == long_recordings("test", None, 1, 0)[0]
    sources = {
        r.sort: {s.source.split("/")[0] + "/" + s.source[-4:] for s in r.segments if s.kind != "silence"}
        for r in built[1:]
    }
    assert sources["real"] == {"speech/flac", "music/.ogg", "sounds/.ogg"}
    assert {"music/.ogg", "sounds/.ogg"} < sources["mixed"] and "speech/flac" not in sources["mixed"]
    whole = next(s for s in built[2].segments if s.kind == "speech")
    assert whole.text == "Real words." and whole.end - whole.start == pytest.approx(4)
    with pytest.raises(UsageError, match="no folder"):
        long_recordings("test", tmp_path / "missing", 1)


# -- spliced files

HEADER = ["file", "start", "end", "type", "text", "source"]


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_spliced_files_are_read_and_sounds_of_other_splits_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "split_of_group", lambda group: "test" if group == "held" else "calibration")
    rows = [
        ["a.wav", "0", "2", "music", "", "owner/repo:tunes/used.ogg [CC0]"],
        ["a.wav", "2", "3", "room_silence(-65dBFS noise)", "", ""],
        ["a.wav", "3", "5", "speech", "GOOD MORNING", "speaker/1.flac"],
        ["a.wav", "5", "7", "noise:rain", "", "rain/held.ogg + rain/unknown.ogg [CC0]"],
        ["a.wav", "7", "9", "noise:rain", "", "rain/held.ogg + rain/used.ogg [CC0]"],
        ["b.wav", "0", "1", "male", "", "mix.mp3"],
        ["b.wav", "1", "4", "noEnergy", "", "mix.mp3"],
    ]
    write_csv(tmp_path / "long" / "segments.csv", [HEADER, *rows])
    manifest = [["file", "source_path", "group"], ["1.ogg", "tunes/used.ogg", "x"]]
    write_csv(tmp_path / "music" / "manifest.csv", manifest)
    manifest = [["file", "source_path", "group"], ["1", "rain/held.ogg", "held"], ["2", "rain/used.ogg", ""]]
    write_csv(tmp_path / "sounds" / "manifest.csv", manifest)
    for name, seconds in (("a.wav", 9), ("b.wav", 4)):
        write_wav(tmp_path / "long" / name, tone(seconds, 0.25))
    first, second = spliced_recordings(tmp_path)
    assert [(s.kind, s.measured) for s in first.segments] == [
        ("music", False), ("silence", True), ("speech", True), ("noise", True), ("noise", False),
    ]  # fmt: skip
    assert first.text == "GOOD MORNING" and first.seconds == 9 and first.split == "test"
    assert len(first.load()) == 9 * RATE and np.abs(first.load()).max() == pytest.approx(0.25, abs=1e-3)
    assert quiet_stretches(first) == [(2.0, 2.5), (5.5, 7.0)]
    assert [s.kind for s in second.segments] == ["speech", "silence"]
    # its words are not known: only what stands in its silence is counted
    counts = measure(second, [(0.0, 1.0, "Whatever was said."), (2.0, 4.0, "Thank you.")])
    assert counts == LongCounts(2, 2.5 / 60, 0, 0, 0, 0)
    assert spliced_recordings(tmp_path / "long") == []


def test_spliced_files_that_are_damaged_are_refused(tmp_path):
    path = tmp_path / "long" / "segments.csv"
    write_csv(path, [HEADER, ["a.wav", "0", "1", "music", "", ""]])
    with pytest.raises(FormatError, match=r"names a\.wav"):
        spliced_recordings(tmp_path)
    write_csv(path, [HEADER, ["a.wav", "zero", "1", "music", "", ""]])
    with pytest.raises(FormatError, match=r"segments\.csv: .*expected the columns"):
        spliced_recordings(tmp_path)
    write_csv(path, [["file", "start"], ["a.wav", "0"]])
    with pytest.raises(FormatError, match="expected the columns"):
        spliced_recordings(tmp_path)


# -- counting


def test_the_truth_itself_has_no_errors():
    assert measure(ALTERNATING, RIGHT) == LongCounts(0, (9.5 + 7 + 6.5) / 60, 5, 0, 0, 0)


def test_nothing_heard_loses_every_word():
    assert measure(ALTERNATING, []) == LongCounts(0, 23 / 60, 5, 5, 0, 0)


def test_invented_words_are_those_in_silence_music_and_noise():
    heard = [(2.0, 5.0, "Thank you."), *RIGHT, (24.0, 40.0, "Thanks for watching!")]
    counts = measure(ALTERNATING, heard)
    assert (counts.invented, counts.lost, counts.substituted, counts.inserted) == (5, 0, 0, 0)


def test_invented_words_do_not_stand_in_for_lost_ones():
    heard = [RIGHT[0], (13.0, 19.0, "Subscribe to channels")]
    counts = measure(ALTERNATING, heard)
    assert (counts.invented, counts.lost, counts.substituted, counts.inserted) == (3, 3, 0, 0)


def test_words_beside_speech_are_insertions():
    counts = measure(ALTERNATING, [(9.6, 12.4, "Good morning to you"), RIGHT[1]])
    assert (counts.invented, counts.inserted, counts.lost) == (0, 2, 0)


def test_a_segment_that_begins_too_early_is_no_invention():
    # spread evenly, "good" would lie at 3 s
    counts = measure(ALTERNATING, [(0.0, 12.0, "Good morning."), RIGHT[1]])
    assert counts == LongCounts(0, 23 / 60, 5, 0, 0, 0)
    # the misheard word takes the place of the spoken one
    counts = measure(ALTERNATING, [(0.0, 12.0, "Good evening."), RIGHT[1]])
    assert (counts.invented, counts.substituted, counts.lost) == (0, 1, 0)


def test_the_right_word_at_the_wrong_time_is_invented():
    counts = measure(ALTERNATING, [(1.0, 3.0, "Good morning."), RIGHT[1]])
    assert (counts.invented, counts.lost) == (2, 2)


def test_word_times_lie_between_what_was_recognised():
    truth = spread([(10.0, 12.0, "Good morning.")])
    assert [word.time for word in truth] == [10.5, 11.5]
    # um: halfway (in words) from the segment's start to "good"; so: from "morning" to its end
    heard = spread([(4.0, 14.0, "well good morning so")])
    assert word_times(truth, heard) == pytest.approx([4 + 6.5 / 3, 10.5, 11.5, 11.5 + 2.5 * 2 / 3])
    assert word_times([], heard) == [5.25, 7.75, 10.25, 12.75]
    assert word_times(truth, []) == []


words = st.lists(st.sampled_from(["good", "morning", "call", "anna", "now", "thank", "you"]), max_size=6)
spans = st.tuples(st.floats(0, 40), st.floats(0, 12), words)


@settings(max_examples=60, deadline=None)
@given(st.lists(spans, max_size=5))
def test_every_word_is_counted_once(found):
    """invented + right + substituted + inserted = heard; right + substituted + lost = spoken."""
    found = sorted(found, key=lambda span: span[0])
    counts = measure(ALTERNATING, [(start, start + length, " ".join(text)) for start, length, text in found])
    heard = sum(len(text) for _, _, text in found)
    right = counts.words - counts.lost - counts.substituted
    assert right >= 0 and counts.words == 5
    assert counts.invented + right + counts.substituted + counts.inserted == heard


def test_sums_of_counts():
    assert LongCounts(1, 0.5, 10, 2, 3, 4) + LongCounts(1, 1.5, 5, 0, 0, 1) == LongCounts(2, 2.0, 15, 2, 3, 5)
    assert math.isclose(sum(b - a for a, b in quiet_stretches(ALTERNATING)), 23)


# -- rows


def measured(sort, invented, lost, minutes=1.0, words=10):
    return Measured(sort, 120.0, 6.0, LongCounts(invented, minutes, words, lost, 1, 2))


PLAIN, VAD, OURS = ("plain", 0.0), ("silero", 0.5), ("whisper-steer", 1.0)
SMALL = {
    PLAIN: [measured("synthetic", 30, 2), measured("mixed", 10, 4)],
    VAD: [measured("synthetic", 4, 3), measured("mixed", 6, 3)],
    OURS: [measured("synthetic", 2, 4), measured("mixed", 1, 1)],
}


def test_rows_compare_the_same_recordings():
    rows = rows_of(SMALL, PLAIN, VAD)
    assert [(row["method"], row["set"]) for row in rows] == [
        (method, name)
        for method in ("plain", "silero", "whisper-steer")
        for name in ("synthetic", "mixed", "all")
    ]
    assert all(tuple(row) == COLUMNS for row in rows)
    ours = rows[-1]
    assert (ours["recordings"], ours["minutes"], ours["words"], ours["invented"]) == (2, 4.0, 20, 3)
    assert (
        ours["invented_per_min"] == 1.5
        and ours["invented_per_min_lo"] == 1
        and ours["invented_per_min_hi"] == 2
    )
    assert ours["lost"] == 0.25 and ours["substituted"] == 0.1 and ours["inserted"] == 0.2
    assert ours["invented_of_plain"] == 3 / 40
    assert ours["invented_more_than_vad"] == (3 - 10) / 2
    # +1 of 10 words on the first, -2 of 10 on the second recording
    assert ours["lost_more_than_vad"] == pytest.approx(-0.05)
    assert ours["lost_more_than_vad_lo"] == pytest.approx(-0.2)
    assert ours["lost_more_than_vad_hi"] == pytest.approx(0.1)
    assert ours["seconds_per_min"] == 3.0
    assert rows[2]["invented_of_plain"] == 1 and rows[5]["lost_more_than_vad"] == 0


def test_what_cannot_be_compared_is_none():
    (row, _) = rows_of({OURS: [measured("spliced", 1, 0, words=0)]}, None, None)
    assert row["lost"] is None and row["lost_lo"] is None
    assert row["invented_of_plain"] is None and row["lost_more_than_vad"] is None
    assert headline([row]) == []


def test_the_headline_says_which_targets_are_met():
    lines = headline(rows_of(SMALL, PLAIN, VAD))
    assert lines == [
        "whisper-steer at 1, synthetic: 93% fewer invented words than plain Whisper (target 90%: met); lost "
        "words +10.0 points against the VAD (target: no more: missed)",
        "whisper-steer at 1, mixed: 90% fewer invented words than plain Whisper (target 90%: met); lost "
        "words -20.0 points against the VAD (target: no more: met)",
        "whisper-steer at 1, all: 92% fewer invented words than plain Whisper (target 90%: met); lost words "
        "-5.0 points against the VAD (target: no more: met)",
    ]
    worse = {**SMALL, OURS: [measured("synthetic", 20, 4), measured("mixed", 1, 1)]}
    assert (
        "48% fewer invented words than plain Whisper (target 90%: missed)"
        in headline(rows_of(worse, PLAIN, VAD))[-1]
    )


# -- running


class Echo:
    """Writes a word for every speech segment, at its time, and one invented word at `strength` seconds."""

    name, about, strengths = "whisper-steer", "for tests; strength: a time", (0.25, 1.0)

    def __init__(self):
        self.asked = []

    def prepare(self, setup):
        pass

    def fingerprint(self, setup):
        return "echo"

    def hear(self, setup, strength, clips):
        for clip in clips:
            self.asked.append(clip.id)
            spoken = [(start, end, "number") for start, end in clip.speech_intervals]
            segments = sorted([(strength, strength, "invented"), *spoken])
            yield Heard(" ".join(text for _, _, text in segments), tuple(segments), None, None, 2.0)


class Impossible(Echo):
    name = "silero"

    def prepare(self, setup):
        raise Unavailable("no such thing here")


@pytest.fixture
def setup(tiny_whisper, tmp_path):
    return Setup(tiny_whisper, "tiny", tmp_path / "fits", lambda c: [], lambda c: [], progress=False)


def test_methods_are_run_and_what_they_heard_is_kept(setup, small_sets, tmp_path):
    method, recordings = Echo(), long_recordings("test", None, 2, 0)
    found = run_methods(setup, [(method, 0.25)], recordings, tmp_path)[method.name, 0.25]
    assert method.asked == [recording.id for recording in recordings]
    for item, recording in zip(found, recordings, strict=True):
        assert item.counts.lost + item.counts.substituted == item.counts.words - len(recording.speech)
        assert item.counts.invented == (recording.speech[0].start - 0.5 > 0.25)
        assert (item.sort, item.length, item.seconds) == ("synthetic", recording.seconds, 2.0)
    again = run_methods(setup, [(method, 0.25)], recordings, tmp_path)[method.name, 0.25]
    assert again == found and len(method.asked) == 2


def test_methods_that_cannot_run_are_left_out(setup, capsys):
    kept = prepared(setup, [(Impossible(), 0.5), (Echo(), 1.0)])
    assert [(method.name, strength) for method, strength in kept] == [("whisper-steer", 1.0)]
    assert capsys.readouterr().err == "left out: silero (no such thing here)\n"
    with pytest.raises(UsageError, match="none of the methods"):
        prepared(setup, [(Impossible(), 0.5)])


def test_strengths_of_named_methods():
    found = find_methods("plain,silero,silero:0.9,whisper-steer,faster-whisper-batched-vad")
    assert [(method.name, strength) for method, strength in found] == [
        ("plain", 0.0), ("silero", 0.5), ("silero", 0.9), ("whisper-steer", 1.0),
        ("faster-whisper-batched-vad", 0.5),
    ]  # fmt: skip
    for wrong in ("plane", "silero:high", "silero:-1", "silero:nan", ""):
        with pytest.raises(UsageError, match="--methods"):
            find_methods(wrong)


def test_choose_takes_some_of_each_sort():
    many = [LongRecording(f"{s}{i}", s, "test", (), lambda: np.zeros(1)) for s in "ab" for i in range(4)]
    assert [recording.id for recording in choose(many, 2)] == ["a0", "a2", "b0", "b2"]


@pytest.fixture
def command(small_sets, tiny_whisper, monkeypatch, tmp_path):
    from benchmarks import long_recordings as module

    monkeypatch.setattr(zoo, "load_model", lambda name, device=None: tiny_whisper)
    monkeypatch.setattr(module, "find_methods", lambda wanted: [(Echo(), 0.25), (Impossible(), 0.5)])
    return ["--out", str(tmp_path / "out")]


def test_the_command_writes_and_prints_rows(command, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert main([*command, "--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [(row["method"], row["alpha"], row["set"], row["recordings"]) for row in rows] == [
        ("whisper-steer", 0.25, "synthetic", 2), ("whisper-steer", 0.25, "all", 2),
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / LONG_ROWS).read_text()) == rows
    assert not (tmp_path / "out" / "rows.json").exists()  # that is the trade-off's
    shown = capsys.readouterr()
    assert "Words invented where nobody spoke" in shown.out and f"wrote {path}" in shown.out
    assert "left out: silero" in shown.err


def test_the_same_methods_run_beside_the_tradeoff(setup, small_sets, tmp_path, capsys):
    setup.quick = True
    marker = setup.plain
    method = Echo()
    assert beside_tradeoff(setup, [method], tmp_path) == [tmp_path / LONG_ROWS]
    rows = json.loads((tmp_path / LONG_ROWS).read_text())
    assert [(row["method"], row["alpha"], row["set"]) for row in rows] == [
        ("whisper-steer", usual_strength(method), "synthetic"),
        ("whisper-steer", usual_strength(method), "all"),
    ]
    assert rows[-1]["recordings"] == 2 and setup.plain is marker


def test_a_wrong_data_folder_is_one_line(command, tmp_path, capsys):
    assert main([*command, "--data", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1

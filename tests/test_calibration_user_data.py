import csv
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from audio_files import write_wav

from calibration.augmentation import active_rms
from calibration.training_clips import REAL_SPEECH_DB, active_intervals
from calibration.user_data import Splits, read_splits
from calibration.user_recordings import joined_groups
from whisper_steer.audio import load_audio
from whisper_steer.errors import AudioError, FormatError, UsageError

RATE = 16_000


def noise(seed, seconds=0.3, level=0.1):
    return (level * np.random.default_rng(seed).standard_normal(int(seconds * RATE))).clip(-1, 1).astype("f4")


def spoken(seed):
    """A burst between two silences."""
    return np.concatenate([np.zeros(4000, "f4"), noise(seed, 0.4, 0.1), np.zeros(4000, "f4")])


def write_sounds(folder, count, *, seconds=0.3, first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write_wav(folder / f"{number:02d}.wav", noise(1000 + first + number, seconds))
    return folder


def write_rows(path, rows, *, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_speech(folder, count=24, *, speakers=6, name="speech.csv", columns=("audio", "text", "speaker")):
    (folder / "talk").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        write_wav(folder / "talk" / f"{number:02d}.wav", spoken(number))
        values = (f"talk/{number:02d}.wav", f"sentence number {number}", f"s{number % speakers}")
        rows.append(dict(zip(columns, values, strict=False)))
    return write_rows(folder / name, rows)


def read(nonspeech, speech, **options):
    return read_splits(nonspeech, speech, progress=False, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """20 fans, 9 kettles, and 24 utterances of 6 speakers."""
    root = tmp_path_factory.mktemp("data")
    write_sounds(root / "fans", 20)
    write_sounds(root / "kettles", 9, first=100)
    write_speech(root)
    return root


@pytest.fixture(scope="module")
def splits(data):
    return read([data / "fans", data / "kettles"], data / "speech.csv")


def clips_of(splits):
    """split -> kind -> clips, variants left out"""
    sides = [splits.training, *([c for s in x.values() for c in s] for x in (splits.validation, splits.test))]
    return [
        {k: [c for c in side if c.kind == k and "#" not in c.id] for k in ("real_speech", "nonspeech")}
        for side in sides
    ]


def test_every_recording_is_in_one_split_by_the_shares(splits):
    sides = clips_of(splits)
    ids = [clip.id for side in sides for clips in side.values() for clip in clips]
    assert len(ids) == len(set(ids)) == 20 + 9 + 24
    # 6 speakers of 4 are 3, 2, 1 by 50, 30, 20 %; 20 fans and 9 kettles are dealt out by themselves
    assert [len(side["real_speech"]) for side in sides] == [12, 8, 4]
    fans = [sum(clip.id.startswith("fans/") for clip in side["nonspeech"]) for side in sides]
    kettles = [sum(clip.id.startswith("kettles/") for clip in side["nonspeech"]) for side in sides]
    assert fans == [10, 6, 4] and sum(kettles) == 9 and all(abs(a - 9 * b) <= 1 for a, b in zip(
        kettles, (0.5, 0.3, 0.2), strict=True))  # fmt: skip
    assert set(splits.validation) == set(splits.test) == {"speech", "speech_noisy", "fans", "kettles"}
    assert splits.counts["training"] == {
        "speech": 12, "speech_groups": 3, "nonspeech": 10 + kettles[0], "nonspeech_groups": 10 + kettles[0],
    }  # fmt: skip
    assert splits.counts["test"]["speech_groups"] == 1 and splits.counts["left_out"] == {}


def test_no_speaker_is_in_two_splits(data, splits):
    speakers = {f"speech/{row['audio']}": row["speaker"] for row in rows_of(data / "speech.csv")}
    sides = [{speakers[clip.id] for clip in side["real_speech"]} for side in clips_of(splits)]
    assert [len(side) for side in sides] == [3, 2, 1] and len(set.union(*sides)) == 6
    assert all(clip.voice == speakers[clip.id] for clip in splits.validation["speech"])


def test_the_same_seed_gives_the_same_splits_wherever_the_data_lies(data, splits, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    again = read([moved / "fans", moved / "kettles"], moved / "speech.csv")
    ids = [[c.id for s in x.values() for c in s] for x in (splits.validation, splits.test)]
    assert ids == [[c.id for s in x.values() for c in s] for x in (again.validation, again.test)]
    assert [clip.id for clip in splits.training] == [clip.id for clip in again.training]
    assert splits.counts == again.counts
    for first, second in zip(splits.training, again.training, strict=True):
        np.testing.assert_array_equal(first.make()[0], second.make()[0])
        assert first.make()[1] == second.make()[1]
    other = read([data / "fans", data / "kettles"], data / "speech.csv", seed=1)
    assert {c.id for c in other.test["fans"]} != {c.id for c in splits.test["fans"]}


def test_clips_decode_their_file_when_they_are_loaded(tmp_path):
    splits = read([write_sounds(tmp_path / "fans", 20)], write_speech(tmp_path))
    clip, speech = splits.test["fans"][0], splits.validation["speech"][0]
    np.testing.assert_array_equal(clip.load(), load_audio(clip.path))
    assert (clip.kind, clip.category, clip.split, clip.text) == ("nonspeech", "fans", "test", None)
    number = int(Path(speech.path).stem)
    assert (speech.kind, speech.category, speech.split) == ("real_speech", "speech", "calibration")
    assert speech.text == f"sentence number {number}"
    np.testing.assert_allclose(speech.load(), spoken(number), atol=2 / 32_000)
    write_wav(Path(clip.path), noise(7, 0.2))
    np.testing.assert_allclose(clip.load(), noise(7, 0.2), atol=2 / 32_000)
    Path(clip.path).unlink()
    with pytest.raises(AudioError, match="no such file"):
        clip.load()


def test_noisy_speech_is_the_same_speech_with_sounds_of_its_split_at_5_db(splits):
    for sets in (splits.validation, splits.test):
        sounds = {c.id: c for name in ("fans", "kettles") for c in sets[name]}
        assert len(sets["speech_noisy"]) == len(sets["speech"])
        for clean, noisy in zip(sets["speech"], sets["speech_noisy"], strict=True):
            assert (noisy.id, noisy.category) == (f"{clean.id}#noisy", "speech_noisy")
            assert (noisy.text, noisy.kind, noisy.group) == (clean.text, "real_speech", clean.group)
            audio = noisy.load()
            np.testing.assert_array_equal(audio, noisy.load())
            background = audio - clean.load()
            ratio = 20 * np.log10(active_rms(clean.load()) / active_rms(background))
            assert ratio == pytest.approx(5.0, abs=0.1)
            name = noisy.source.split(" with ")[1].removesuffix(" at 5 dB")
            repeated = np.tile(sounds[name].load(), 10)[: len(audio)]
            assert np.corrcoef(background, repeated)[0, 1] > 0.999


def test_speech_is_known_to_be_where_it_is_loud(splits):
    clip = splits.test["speech_noisy"][0]
    ((start, end),) = clip.speech_intervals
    assert (start, end) == pytest.approx((0.25, 0.65), abs=0.02)
    assert clip.speech_intervals == splits.test["speech"][0].speech_intervals


def test_training_speech_comes_clean_and_in_a_condition(splits):
    over_a_line = [clip for clip in splits.training if clip.condition == "telephone"]
    first = [clip for clip in splits.training if clip.condition != "telephone"]
    people = [clip for clip in first if clip.kind == "real_speech" and clip.condition == "clean"]
    others = [clip for clip in first if clip not in people]
    assert [clip.id for clip in over_a_line] == [f"{clip.id}#telephone" for clip in (*people, *others[::2])]
    speech = [clip for clip in first if clip.kind == "real_speech"]
    clean = [clip for clip in speech if clip.condition == "clean"]
    others = [clip for clip in speech if clip.condition != "clean"]
    assert [clip.id for clip in others] == [
        f"{a.id}#{b.condition}" for a, b in zip(clean, others, strict=True)
    ]
    assert [clip.condition for clip in others[:5]] == ["noisy", "embedded", "reverb", "quiet", "noisy"]
    for clip in (*clean, *others):
        audio, intervals = clip.make()
        seconds = sum(end - start for start, end in intervals)
        assert seconds == pytest.approx(0.4, abs=0.05) and not clip.silence_is_certain
        if clip.condition == "clean":
            assert intervals == active_intervals(audio, within_db=REAL_SPEECH_DB)
        np.testing.assert_array_equal(audio, clip.load())
    embedded = next(clip for clip in others if clip.condition == "embedded").load()
    assert 8 * RATE <= len(embedded) <= 30 * RATE and np.abs(embedded[:: RATE // 2]).max() > 0


def test_backgrounds_of_training_clips_are_training_files(splits, monkeypatch):
    from calibration import user_recordings

    opened = []
    monkeypatch.setattr(
        user_recordings.Clip, "load", lambda self: opened.append(self.id) or self.audio(), raising=True
    )
    for clip in splits.training:
        clip.load()
    allowed = {clip.id.removesuffix("#telephone") for clip in splits.training}
    assert set(opened) <= allowed and any(name.startswith(("fans/", "kettles/")) for name in opened)


def test_nonspeech_training_clips_hold_no_speech(splits):
    rest = [clip for clip in splits.training if clip.kind == "nonspeech"]
    assert all(clip.make()[1] == () and clip.silence_is_certain for clip in rest)
    assert {clip.condition for clip in rest} == {"fans", "kettles", "telephone"}


def test_long_files_are_cut_and_stay_together(tmp_path):
    folder = write_sounds(tmp_path / "rooms", 10, seconds=1.0)
    splits = read([folder], write_speech(tmp_path), max_seconds=0.95)
    parts = [clip for side in clips_of(splits) for clip in side["nonspeech"]]
    assert len(parts) == 20 and {clip.id.split("@")[1] for clip in parts} == {"0.00", "0.50"}
    for side in clips_of(splits):
        files = [clip.id.split("@")[0] for clip in side["nonspeech"]]
        assert files and all(files.count(file) == 2 for file in files)


def test_cuts_are_the_file(tmp_path):
    folder = write_sounds(tmp_path / "rooms", 10, seconds=2.1)
    splits = read([folder], write_speech(tmp_path), max_seconds=1.0)
    cuts = sorted((c for c in splits.test["rooms"]), key=lambda c: c.id)[:3]
    whole = load_audio(cuts[0].path)
    assert [len(cut.load()) for cut in cuts] == [11_200] * 3
    np.testing.assert_array_equal(np.concatenate([cut.load() for cut in cuts]), whole)


def test_speech_too_long_for_a_clip_is_left_out(tmp_path, caplog):
    speech = write_speech(tmp_path, 24)
    write_wav(tmp_path / "talk" / "05.wav", noise(5, 2.0))
    splits = read([write_sounds(tmp_path / "fans", 20)], speech, max_seconds=1.0)
    assert splits.counts["left_out"] == {"too_long": 1}
    assert "left out: 1 speech that is too long for one clip" in caplog.text and "talk/05.wav" in caplog.text


def test_rows_of_one_speaker_or_one_file_belong_together():
    keys = [("a", "1"), ("b", "2"), ("a", "3"), ("", "2"), ("c", "3"), ("", "4"), ("", "4")]
    groups = joined_groups(keys)
    assert groups[0] == groups[2] == groups[4] != groups[1] == groups[3] != groups[5] == groups[6]
    assert len(set(groups)) == 3
    # nor does their order matter
    assert sorted(joined_groups(keys[::-1])) == sorted(groups)


def test_parts_of_one_file_are_never_apart(tmp_path):
    for number in range(4):
        write_wav(tmp_path / f"{number}.wav", np.concatenate([noise(10 * number + i, 0.5) for i in range(6)]))
    rows = [
        {"path": f"{f}.wav", "text": f"words {f} {i}", "start": 0.5 * i, "duration": 0.5}
        for f in range(4)
        for i in range(6)
    ]
    speech = write_rows(tmp_path / "m.csv", rows)
    splits = read([write_sounds(tmp_path / "fans", 20)], speech)
    sides = [{clip.id.split("@")[0] for clip in side["real_speech"]} for side in clips_of(splits)]
    assert sorted(len(side) for side in sides) == [1, 1, 2] and len(set.union(*sides)) == 4
    clip = splits.test["speech"][0]
    start = float(clip.id.split("@")[1])
    whole = load_audio(clip.path)
    np.testing.assert_array_equal(clip.load(), whole[int(start * RATE) :][: RATE // 2])


@pytest.mark.parametrize(
    "columns", [("path", "sentence", "client_id"), ("file", "transcript", "group"), ("audio", "text")]
)
def test_columns_by_their_usual_names(tmp_path, columns):
    splits = read([write_sounds(tmp_path / "fans", 20)], write_speech(tmp_path, columns=columns))
    assert splits.test["speech"][0].text.startswith("sentence number")
    groups = sum(splits.counts[name]["speech_groups"] for name in ("training", "validation", "test"))
    assert groups == (6 if len(columns) == 3 else 24)


def test_json_lines_and_common_voice(tmp_path):
    fans = write_sounds(tmp_path / "fans", 20)
    write_speech(tmp_path)
    lines = [{"audio": str(tmp_path / f"talk/{i:02d}.wav"), "text": f"w {i}"} for i in range(24)]
    (tmp_path / "m.jsonl").write_text("\n" + "\n".join(json.dumps(line) for line in lines) + "\n")
    by_lines = read([fans], tmp_path / "m.jsonl")
    assert sum(by_lines.counts[name]["speech"] for name in ("training", "validation", "test")) == 24
    (tmp_path / "talk").rename(tmp_path / "clips")
    rows = [{"client_id": f"c{i % 5}", "path": f"{i:02d}.wav", "sentence": f"w {i}"} for i in range(24)]
    voices = read([fans], write_rows(tmp_path / "validated.tsv", rows, delimiter="\t"))
    assert Path(voices.test["speech"][0].path).parent == tmp_path / "clips"
    assert len(voices.test["speech"][0].load()) == len(spoken(0))


@pytest.mark.parametrize("given", ["", "10/1/10-1.trans.txt"])
def test_librispeech_folders(tmp_path, given):
    root = tmp_path / "LibriSpeech"
    for speaker in range(10, 15 if not given else 11):
        folder = root / str(speaker) / "1"
        folder.mkdir(parents=True)
        names = [f"{speaker}-{chapter}-{i:04d}" for chapter in (1, 2) for i in range(12)]
        for name in names:
            write_wav(folder / f"{name}.wav", spoken(int(name.replace("-", ""))))
        (folder / f"{speaker}-1.trans.txt").write_text("".join(f"{name} WORDS OF {name}\n" for name in names))
    fans = write_sounds(tmp_path / "fans", 20)
    if given:  # the folder of one speaker
        with pytest.raises(UsageError, match="24 recordings of speech come from 1 speakers or files"):
            read([fans], root / given)
        return
    splits = read([fans], root)
    sides = [{clip.id.split("/")[1] for clip in side["real_speech"]} for side in clips_of(splits)]
    assert min(map(len, sides)) >= 1 and len(set.union(*sides)) == 5
    clip = splits.test["speech"][0]
    assert clip.text == f"WORDS OF {Path(clip.path).stem}" and clip.voice == Path(clip.path).stem[:2]


def test_what_is_there_twice_is_kept_once(tmp_path, caplog):
    fans, more = write_sounds(tmp_path / "fans", 20), tmp_path / "more"
    write_sounds(more, 3, first=50)
    shutil.copy(fans / "00.wav", more / "copy.wav")
    speech = write_speech(tmp_path, 24)
    shutil.copy(tmp_path / "talk" / "03.wav", tmp_path / "talk" / "04.wav")
    shutil.copy(tmp_path / "talk" / "06.wav", more / "speech.wav")
    splits = read([fans, more], speech)
    assert splits.counts["left_out"] == {"duplicate": 2, "also_speech": 1}
    nonspeech = [clip.id for side in clips_of(splits) for clip in side["nonspeech"]]
    assert "fans/00.wav" in nonspeech and not {"more/copy.wav", "more/speech.wav"} & set(nonspeech)
    assert len(nonspeech) == 23
    assert "left out: 2 there before, such as talk/04.wav" in caplog.text
    assert "1 non-speech that the manifest of speech has too" in caplog.text


def test_copies_of_a_file_join_their_speakers(tmp_path):
    """The same long file under two names, different parts of it under each."""
    speech = write_speech(tmp_path, 24, speakers=24)
    long = np.concatenate([noise(77, 0.5), noise(78, 0.5)])
    for name in ("x.wav", "y.wav"):
        write_wav(tmp_path / "talk" / name, long)
    rows = [{**row, "start": "", "duration": ""} for row in rows_of(speech)]
    rows.append({"audio": "talk/x.wav", "text": "first", "speaker": "p", "start": 0, "duration": 0.5})
    rows.append({"audio": "talk/y.wav", "text": "second", "speaker": "q", "start": 0.5, "duration": 0.5})
    splits = read([write_sounds(tmp_path / "fans", 20)], write_rows(speech, rows))
    sides = [{Path(c.id.split("@")[0]).name for c in side["real_speech"]} for side in clips_of(splits)]
    assert [side for side in sides if "x.wav" in side] == [side for side in sides if "y.wav" in side]
    assert sum(splits.counts[name]["speech_groups"] for name in ("training", "validation", "test")) == 25


def test_unreadable_files_are_skipped_with_a_warning_each(tmp_path, caplog):
    fans, speech = write_sounds(tmp_path / "fans", 20), write_speech(tmp_path, 24)
    (fans / "broken.wav").write_bytes(b"not audio at all")
    (fans / "empty.wav").touch()
    write_wav(fans / "blip.wav", noise(3, 0.05))
    (tmp_path / "talk" / "05.wav").unlink()
    rows = rows_of(speech)
    rows[7]["text"] = " ... "
    splits = read([fans], write_rows(speech, rows))
    assert splits.counts["left_out"] == {"unreadable": 3, "too_short": 1, "without_text": 1}
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert (
        sum("broken.wav" in line for line in warnings) == sum("empty.wav" in line for line in warnings) == 1
    )
    assert sum("05.wav: no such file" in line for line in warnings) == 1
    assert sum("1 shorter than 0.1 s" in line for line in warnings) == 1


def test_sets_of_one_or_two_files_are_dealt_out_together(tmp_path):
    folders = [write_sounds(tmp_path / f"f{n:02d}", 1, first=n) for n in range(20)]
    splits = read(folders, write_speech(tmp_path))
    assert [splits.counts[name]["nonspeech"] for name in ("training", "validation", "test")] == [10, 6, 4]
    assert len(set(splits.test) - {"speech", "speech_noisy"}) == 4


def test_one_huge_speaker_leaves_the_others_to_validation_and_test(tmp_path):
    speech = write_speech(tmp_path, 24)
    rows = rows_of(speech)
    for number, row in enumerate(rows):
        row["speaker"] = {0: "a", 1: "b"}.get(number, "huge")
    write_rows(speech, rows)
    fans = write_sounds(tmp_path / "fans", 20)
    for seed in range(3):
        splits = read([fans], speech, seed=seed)
        sizes = [splits.counts[name]["speech"] for name in ("training", "validation", "test")]
        assert sum(sizes) == 24 and sorted(sizes) == [1, 1, 22]


def test_names_of_sets(tmp_path):
    folders = [tmp_path / "a" / "noise", tmp_path / "b" / "noise", tmp_path / "speech"]
    for number, folder in enumerate(folders):
        write_sounds(folder, 8, first=20 * number)
    splits = read([*folders, folders[0]], write_speech(tmp_path / "s"))
    assert set(splits.test) == {"speech", "speech_noisy", "noise", "noise_2", "nonspeech_speech"}
    assert isinstance(splits, Splits) and splits.counts["left_out"] == {}


# -- errors


def check(error, message, nonspeech, speech, **options):
    with pytest.raises(error, match=message) as caught:
        read(nonspeech, speech, **options)
    assert "\n" not in str(caught.value)


def test_arguments_that_make_no_sense(data):
    fans, speech = data / "fans", data / "speech.csv"
    check(UsageError, "non-speech is .*expected at least one folder", [], speech)
    check(UsageError, "expected at least one folder .* in a list", str(fans), speech)
    check(UsageError, r"shares are \(0.5, 0.5, 0.0\): expected three", [fans], speech, shares=(0.5, 0.5, 0.0))
    check(UsageError, "add up to 1", [fans], speech, shares=(0.5, 0.3, 0.3))
    check(UsageError, "max_seconds is 31: expected .* at most 30", [fans], speech, max_seconds=31)
    check(UsageError, "nowhere: no such folder", [data / "nowhere"], speech)
    check(FormatError, "none.csv: no such file", [fans], data / "none.csv")
    check(FormatError, "a manifest is .csv, .tsv or .jsonl", [fans], data / "fans" / "00.wav")


def test_manifests_that_are_none(data, tmp_path):
    fans = data / "fans"
    bad = write_rows(tmp_path / "m.csv", [{"audio": "a.wav", "words": "hello"}])
    check(UsageError, "no column text, .* or transcription .*the columns are audio, words", [fans], bad)
    bad = write_rows(tmp_path / "m.csv", [{"sound": "a.wav", "text": "hello"}])
    check(FormatError, "no column path", [fans], bad)
    (tmp_path / "m.csv").write_text("audio,text\n")
    check(FormatError, "m.csv: no rows", [fans], tmp_path / "m.csv")
    (tmp_path / "m.jsonl").write_text("[1]\n")
    check(FormatError, "line 1: expected a JSON object", [fans], tmp_path / "m.jsonl")
    check(UsageError, "20 audio files without any text; expected .*trans.txt", [fans], fans)


def test_too_few_recordings(data, tmp_path):
    fans, speech = data / "fans", data / "speech.csv"
    few = write_sounds(tmp_path / "few", 4)
    write_wav(few / "x.wav", noise(1, 0.01))
    message = r"few: 4 usable recordings of non-speech \(left out of all kinds: 1 shorter .*at least 20"
    check(UsageError, message, [few], speech)
    check(UsageError, "m.csv: 19 usable recordings of speech; expected at least 20", [fans],
          write_speech(tmp_path, 19, name="m.csv"))  # fmt: skip
    two = write_speech(tmp_path, 24, name="two.csv", speakers=2)
    check(UsageError, "24 recordings of speech come from 2 speakers or files.*at least 3", [fans], two)
    long = write_sounds(tmp_path / "long", 2, seconds=9.2)
    message = "20 recordings of non-speech come from 2 files.*at least 3 files"
    check(UsageError, message, [long], speech, max_seconds=0.92)


def test_nothing_readable(data, tmp_path):
    fans, speech = data / "fans", data / "speech.csv"
    broken = tmp_path / "broken"
    broken.mkdir()
    check(AudioError, "broken: no audio file in this directory", [broken], speech)
    (broken / "a.wav").write_text("no")
    (broken / "b.wav").write_text("neither")
    check(AudioError, "none of the 2 files of non-speech can be read; the first: .*a.wav", [broken], speech)
    rows = [{"path": f"missing{i}.wav", "text": "hello"} for i in range(3)]
    missing = write_rows(tmp_path / "m.csv", rows)
    check(AudioError, "none of its 3 recordings can be read; the first: .*missing0.wav", [fans], missing)

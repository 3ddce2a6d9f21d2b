import csv
import gzip
import io
import json
import pickle
import sys

import numpy as np
import pytest
from audio_files import tone, write_float_wav, write_wav
from calibration_tools import RATE

from calibration.manifests import declared_seconds, from_lhotse, from_manifest, load_segment
from calibration.mixture import load_mixture
from whisper_steer.audio import load_audio
from whisper_steer.errors import AudioError, FormatError, UsageError


def write_csv(path, *rows, delimiter=","):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


# -- manifests


def test_csv_with_both_names_of_the_columns(tmp_path):
    write_wav(tmp_path / "a.wav", tone(0.2))
    one = write_csv(
        tmp_path / "one.csv",
        ["path", "duration", "domain", "text", "group", "emotion", "note"],
        ["a.wav", "0.2", "speech", "hello", "anna", "happy", ""],
        ["b.wav", "", "Music", "", "", "sad", "x"],
        ["c.wav", "1.5", "traffic", "", "", "", ""],
    )
    items = from_manifest("d", one)
    assert [item.domain for item in items] == ["speech", "music", "sounds"]
    assert [(i.id, i.text, i.group, i.duration) for i in items] == [
        ("a.wav", "hello", "anna", 0.2), ("b.wav", None, "b.wav", None), ("c.wav", None, "c.wav", 1.5),
    ]  # fmt: skip
    assert [item.labels for item in items] == [{"emotion": "happy"}, {"emotion": "sad", "note": "x"}, {}]
    assert len(items[0].load()) == 3200 and items[0].path == str(tmp_path / "a.wav")
    other = write_csv(
        tmp_path / "two.tsv",
        ["file", "duration_s", "transcript", "speaker"],
        ["a.wav", "0.2", "hello", "anna"],
        delimiter="\t",
    )
    item = from_manifest("d", other, domain="speech")[0]
    assert (item.id, item.duration, item.text, item.group, item.labels) == ("a.wav", 0.2, "hello", "anna", {})


def test_jsonl_and_gzip_and_own_columns(tmp_path):
    rows = [
        {"wav": "x/a.wav", "said": "hi", "secs": 0.5, "n": 3, "domain": "speech", "split": "train"},
        {"wav": "x/b.wav", "said": None, "domain": "music", "split": "test"},
        {"wav": "x/c.wav", "domain": "music", "split": "train"},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "m.jsonl").write_text(text)
    with gzip.open(tmp_path / "m.jsonl.gz", "wt") as file:
        file.write(text)
    columns = {"path": "wav", "text": "said", "duration": "secs"}
    for name in ("m.jsonl", "m.jsonl.gz"):
        items = from_manifest("d", tmp_path / name, columns=columns, split="train", audio_root=tmp_path / "r")
        assert [(i.id, i.text, i.duration, i.labels) for i in items] == [
            ("x/a.wav", "hi", 0.5, {"n": "3"}), ("x/c.wav", None, None, {}),
        ]  # fmt: skip
        assert items[0].path == str(tmp_path / "r/x/a.wav")


def test_parts_of_long_files(tmp_path):
    write_wav(tmp_path / "long.wav", np.linspace(0, 0.9, 3 * RATE).astype(np.float32))
    manifest = write_csv(
        tmp_path / "m.csv", ["path", "start", "duration"], ["long.wav", "1.0", "0.5"], ["long.wav", "2.5", ""]
    )
    first, last = from_manifest("d", manifest, domain="sounds")
    assert (first.id, last.id) == ("long.wav@1", "long.wav@2.5") and first.group == last.group == "long.wav"
    whole = load_audio(tmp_path / "long.wav")
    assert np.array_equal(first.load(), whole[RATE : RATE * 3 // 2])
    assert np.array_equal(pickle.loads(pickle.dumps(last)).load(), whole[RATE * 5 // 2 :])


@pytest.mark.parametrize("rate", [16_000, 8_000, 44_100])
def test_a_segment_is_that_part_of_the_file(tmp_path, rate):
    file = write_wav(tmp_path / "a.wav", np.stack([tone(3.0, rate, 300.0), np.zeros(3 * rate)], axis=1), rate)
    whole = load_audio(file)
    part = load_segment(str(file), 1.25, 1.0)
    assert len(part) == RATE and part.dtype == np.float32
    assert np.abs(part - whole[RATE * 5 // 4 : RATE * 9 // 4]).max() < 2e-3
    with pytest.raises(AudioError, match="ends before 5 s"):
        load_segment(str(file), 5.0, 1.0)
    with pytest.raises(AudioError, match="no such file"):
        load_segment(str(tmp_path / "none.wav"), 0.0, 1.0)
    write_float_wav(tmp_path / "nan.wav", np.full(RATE, np.nan, np.float32))
    with pytest.raises(AudioError, match="NaN or infinite samples"):
        load_segment(str(tmp_path / "nan.wav"), 0.25, 0.5)
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(AudioError, match="cannot be read from 1 s on"):
        load_segment(str(tmp_path / "text.wav"), 1.0)


def test_declared_seconds(tmp_path):
    assert declared_seconds(str(write_wav(tmp_path / "a.wav", tone(1.5)))) == pytest.approx(1.5)
    (tmp_path / "text.wav").write_text("hello")
    assert declared_seconds(str(tmp_path / "text.wav")) is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "wav,domain\na.wav,speech\n", r"m.csv, line 2: no column path \(or file\)"),
        ("m.csv", "path,x\na.wav,1\n", "no column domain, and the data set has no domain"),
        ("m.csv", "path,domain\na.wav,\n", "line 2: no domain, and the data set has none"),
        ("m.csv", "path,domain\n,speech\n", "line 2: no path"),
        ("m.csv", "path,domain,duration\na.wav,speech,long\n", "line 2: duration is 'long', expected sec"),
        ("m.csv", "path,domain,start\na.wav,speech,-1\n", "line 2: start is '-1', expected seconds"),
        ("m.csv", "path,domain\na.wav\n", "line 2: expected 2 cells"),
        ("m.csv", "path,domain\na.wav,speech\na.wav,speech\n", r"line 3: the id a.wav is there twice"),
        ("m.csv", "path,domain\n", "m.csv: no rows"),
        ("m.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("m.jsonl", "{\n", "cannot be read as jsonl"),
        ("m.jsonl", '{"path": "a", "domain": "music"}\n{"domain": "music"}\n', "line 2: no column path"),
        ("m.txt", "", r"a manifest is .csv, .tsv or .jsonl"),
        ("m.csv.gz", "plain", "cannot be read as csv"),
        ("m.csv", "path,domain\n\xff\xfe", "cannot be read as csv"),
    ],
)  # fmt: skip
def test_manifests_that_cannot_be_used(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=message) as caught:
        from_manifest("d", tmp_path / name)
    assert "\n" not in str(caught.value)


def test_named_columns_and_splits_must_exist(tmp_path):
    manifest = write_csv(tmp_path / "m.csv", ["path", "domain"], ["a.wav", "speech"])
    with pytest.raises(FormatError, match="no column 'wav'; the columns are path, domain"):
        from_manifest("d", manifest, columns={"path": "wav"})
    with pytest.raises(FormatError, match="no column split to choose 'train' by"):
        from_manifest("d", manifest, split="train")
    manifest = write_csv(tmp_path / "n.csv", ["path", "domain", "split"], ["a.wav", "speech", "test"])
    with pytest.raises(FormatError, match="n.csv: no rows of the split train"):
        from_manifest("d", manifest, split="train")
    with pytest.raises(FormatError, match="no such file"):
        from_manifest("d", tmp_path / "none.csv")


def test_manifest_in_a_mixture_file(tmp_path):
    write_wav(tmp_path / "a.wav", tone(0.2))
    write_csv(tmp_path / "m.csv", ["wav", "kind"], ["a.wav", "music"])
    file = tmp_path / "m.toml"
    file.write_text("""name = "m"
held_out = 0
[[dataset]]
name = "d"
format = "manifest"
path = "m.csv"
columns = {path = "wav", domain = "kind"}
audio_root = "@data"
""")
    item = load_mixture(file, {"data": tmp_path}).datasets[0].items[0]
    assert item.domain == "music" and len(item.load()) == 3200
    file.write_text(file.read_text().replace('path = "wav"', 'wav = "path"'))
    with pytest.raises(UsageError, match="columns is .*expected a table from path, duration, start,"):
        load_mixture(file, {"data": tmp_path})


# -- Lhotse


def cut(**changes):
    return {
        "id": "c0", "start": 0.5, "duration": 0.25,
        "supervisions": [{"speaker": "17", "text": "one two"}],
        "recording": {"id": "r", "sources": [{"type": "file", "source": "long.wav"}]},
    } | changes  # fmt: skip


def test_lhotse_cuts(tmp_path):
    write_wav(tmp_path / "long.wav", np.linspace(0, 0.9, RATE).astype(np.float32))
    path = tmp_path / "cuts.jsonl"
    path.write_text(json.dumps(cut()) + "\n" + json.dumps(cut(id="c1", supervisions=[], start=0.0)) + "\n")
    first, second = from_lhotse("d", path)
    assert (first.id, first.group, first.text, first.duration, first.domain) == (
        "c0",
        "17",
        "one two",
        0.25,
        "speech",
    )
    assert (second.group, second.text) == ("r", None)
    assert np.array_equal(first.load(), load_audio(tmp_path / "long.wav")[RATE // 2 : RATE * 3 // 4])


@pytest.mark.parametrize("line", [{"id": "x"}, cut(recording={"id": "r", "sources": []}), cut(start="now")])
def test_lines_that_are_no_cuts(tmp_path, line):
    path = tmp_path / "cuts.jsonl"
    path.write_text(json.dumps(cut()) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(FormatError, match=r"cuts.jsonl, line 2: not a cut of one recorded file"):
        from_lhotse("d", path)


# -- Hugging Face


def wav_bytes(seconds):
    file = io.BytesIO()
    import wave

    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes((tone(seconds, 8000) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def hf_file(tmp_path, path, more=""):
    file = tmp_path / "m.toml"
    file.write_text(f'''name = "m"
held_out = 0
[[dataset]]
name = "d"
format = "hf"
path = "{path}"
domain = "speech"
{more}
''')
    return file


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hf")
    write_wav(folder / "b.wav", tone(0.3))
    table = datasets.Dataset.from_dict(
        {
            "audio": [
                {"bytes": wav_bytes(0.5), "path": "a.wav"},
                {"bytes": None, "path": str(folder / "b.wav")},
                {"bytes": b"no audio", "path": None},
            ],
            "sentence": ["hello", "", "x"],
            "speaker": [7, 8, 9],
            "mood": ["a", "b", "c"],
        }
    ).cast_column("audio", datasets.Audio(decode=False))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(folder / "saved"))
    table.select([0]).to_parquet(str(folder / "parquet" / "train.parquet"))
    return folder


def test_hugging_face_data_set_in_a_folder(tmp_path, saved):
    file = hf_file(tmp_path, "@hf/saved", 'text = "sentence"\ngroup = "speaker"\nlabels = ["mood"]')
    items = load_mixture(file, {"hf": saved}).datasets[0].items
    assert [(i.id, i.text, i.group, i.labels) for i in items] == [
        ("train/0", "hello", "7", {"mood": "a"}), ("train/1", None, "8", {"mood": "b"}),
        ("train/2", "x", "9", {"mood": "c"}),
    ]  # fmt: skip
    assert len(items[0].load()) == pytest.approx(8000, abs=40) and len(items[1].load()) == 4800
    with pytest.raises(AudioError, match=r"saved, train 2: cannot be read as audio"):
        items[2].load()
    assert (
        len(load_mixture(hf_file(tmp_path, "@hf/saved", 'split = "test"'), {"hf": saved}).datasets[0].items)
        == 1
    )


def test_hugging_face_parquet_folder(tmp_path, saved, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    items = load_mixture(hf_file(tmp_path, "@hf/parquet"), {"hf": saved}).datasets[0].items
    assert [item.group for item in items] == ["train/0"] and len(items[0].load()) > 7900


def test_hugging_face_problems_are_one_line(tmp_path, saved, monkeypatch):
    with pytest.raises(
        UsageError, match="has no column said; its columns are audio, sentence, speaker, mood"
    ):
        load_mixture(hf_file(tmp_path, "@hf/saved", 'text = "said"'), {"hf": saved})
    with pytest.raises(UsageError, match="saved cannot be loaded") as caught:
        load_mixture(hf_file(tmp_path, "@hf/saved", 'split = "dev"'), {"hf": saved})
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"needs the package datasets: pip install 'whisper-steer\[hf\]'"):
        load_mixture(hf_file(tmp_path, "@hf/saved"), {"hf": saved})

"""The trade-off benchmark: rows, pooling, tables, picture, files and its command line."""

from __future__ import annotations

import csv
import io
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_whisper
from whisper.model import ModelDimensions, Whisper

from benchmarks import plots, reports, tradeoff
from benchmarks.files import write_whole
from benchmarks.plots import Point
from benchmarks.tradeoff import Heard
from calibration.corpus import Clip
from calibration.decoding import ClipTranscript, DecodedWindow
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Shift, Steering

# openai-whisper leaves its vocabulary and its spelling table open until they are collected
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file.*whisper:ResourceWarning")

RATE = 16_000


def clip(name: str, kind: str = "speech", text: str | None = None, path: str | None = None) -> Clip:
    tone = np.sin(np.arange(RATE) * 0.05).astype(np.float32) * 0.1
    return Clip(name, kind, name.split("/")[0], "test", text, name, path=path, audio=lambda: tone)


def heard(
    item: Clip, text: str, *, no_speech: float = 0.1, logprob: float = -0.3, seconds: float = 2.0
) -> Heard:
    window = DecodedWindow(0, 100, text, no_speech, logprob, 0.0)
    return Heard(item, ClipTranscript(text, (window,), ((no_speech, logprob),), 30.0), seconds)


@pytest.fixture
def small() -> Whisper:
    """Random weights; a text context of 16 tokens keeps its endless sentences short."""
    model = make_tiny_whisper(dims=ModelDimensions(80, 1500, 64, 1, 2, 51864, 16, 64, 1, 1))
    model.name = "tiny-random"
    return model


def shift_for(model: Whisper, name: str) -> Steering:
    direction = torch.linspace(-1, 1, model.dims.n_audio_state)
    return Steering((Shift(1, direction, 5.0),), None, {"name": name, **model_metadata(model)})


# -- rows -----------------------------------------------------------------------------------------------


def test_summary_counts_by_hand() -> None:
    sets = {
        "speech": [
            heard(clip("speech/0", text="open the green door"), "open the grey door"),
            heard(clip("speech/1", text="close it"), ""),
        ],
        "real_speech": [heard(clip("real/0", "real_speech", "good morning", "a.flac"), "good morning you")],
        "noise": [
            heard(clip("noise/0", "nonspeech"), "Thanks for watching!", no_speech=0.98),
            heard(clip("noise/1", "nonspeech", path="b.ogg"), "", no_speech=1.0, logprob=-100.0, seconds=1.0),
        ],
    }
    rows = {row["set"]: row for row in tradeoff.summarise(sets)}
    pools = ["all_speech", "all_nonspeech"]
    halves = [pool + half for pool in pools for half in ("_synthetic", "_real")]
    assert list(rows) == ["speech", "real_speech", "noise", *pools, *halves]

    speech = rows["speech"]
    assert (speech["sub"], speech["del"], speech["ins"]) == pytest.approx((1 / 6, 2 / 6, 0.0))
    assert speech["wer"] == pytest.approx(0.5)
    assert speech["empty_speech"] == 0.5
    assert speech["clips"] == 2 and speech["seconds"] == 4.0 and speech["audio"] == "synthetic"
    assert all(speech[name] is None for name in ("text_fpr", "text_fpr_lo", "nsp_fpr", "words_per_min_hi"))

    pooled = rows["all_speech"]
    assert pooled["wer"] == pytest.approx(4 / 8) and pooled["ins"] == pytest.approx(1 / 8)
    assert pooled["audio"] == "synthetic+real" and rows["real_speech"]["audio"] == "real"

    noise = rows["noise"]
    assert noise["text_fpr"] == 0.5 and noise["hr"] == 0.5  # a confident caption passes the skip rule
    assert noise["nsp_fpr"] == 0.0  # although no_speech_prob is 0.98
    assert noise["words_per_min"] == pytest.approx(3.0)  # three words in a minute
    assert noise["wer"] is None and noise["empty_speech_hi"] is None
    assert {**rows["all_nonspeech"], "set": "noise"} == noise
    assert {**rows["all_speech_synthetic"], "set": "speech"} == speech
    assert {**rows["all_speech_real"], "set": "real_speech"} == rows["real_speech"]
    assert rows["all_nonspeech_synthetic"]["text_fpr"] == 1.0
    assert rows["all_nonspeech_real"]["text_fpr"] == 0.0
    for row in rows.values():
        for name in reports.RATES:
            if row[name] is not None:
                assert row[f"{name}_lo"] <= row[name] <= row[f"{name}_hi"]


def test_measure_covers_every_setting_and_leaves_the_model_alone(
    small: Whisper, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whisper_steer.attach import handles_of

    seen: list[tuple[str, float]] = []

    def listen(model: Whisper, clips: list[Clip], tick: object) -> list[Heard]:
        (handle,) = handles_of(model) or (None,)
        if handle is not None:
            seen.append((handle.steering.metadata["name"], handle.alpha))
        words = handle is None or handle.alpha < 1
        return [heard(c, "you" if words else "") for c in clips]

    monkeypatch.setattr(tradeoff, "listen", listen)
    steerings = {"whisper-steer": shift_for(small, "ours"), "audiosae": shift_for(small, "paper")}
    sets = {"noise": [clip("noise/0", "nonspeech")]}
    rows = tradeoff.measure(small, sets, steerings, (1.0, 0.0, 0.5), progress=False)

    assert seen == [("ours", 0.0), ("ours", 0.5), ("ours", 1.0), ("paper", 0.5), ("paper", 1.0)]
    assert [(row["method"], row["alpha"], row["set"]) for row in rows] == [
        (method, alpha, name)
        for method in ("whisper-steer", "audiosae")
        for alpha in (0.0, 0.5, 1.0)
        for name in ("noise", "all_nonspeech")
    ]
    assert [row["text_fpr"] for row in rows[::2]] == [1.0, 1.0, 0.0] * 2
    assert all(tuple(row) == reports.COLUMNS for row in rows)
    assert handles_of(small) == () and "decode" not in vars(small)


def test_listening_goes_through_the_steered_model(small: Whisper) -> None:
    from whisper_steer.attach import steer

    item, ticks = clip("noise/0", "nonspeech"), []
    (plain,) = tradeoff.listen(small, [item], lambda: ticks.append(1))
    with steer(small, alpha=0.0, steering=shift_for(small, "ours")):
        (same,) = tradeoff.listen(small, [item], lambda: None)
    with steer(small, alpha=1.0, steering=shift_for(small, "ours")):
        (other,) = tradeoff.listen(small, [item], lambda: None)
    assert ticks == [1] and plain.seconds > 0
    assert same.transcript == plain.transcript
    assert other.transcript.greedy != plain.transcript.greedy


# -- showing --------------------------------------------------------------------------------------------


def made_rows() -> list[reports.Row]:
    """Two methods: ours 60 -> 3 % and +0.4 points, the other 60 -> 30 % and +20 points."""
    rows = []
    for method, alpha, fpr, wer in (
        ("whisper-steer", 0.0, 0.6, 0.04),
        ("whisper-steer", 1.0, 0.03, 0.044),
        ("audiosae", 0.0, 0.6, 0.04),
        ("audiosae", 1.0, 0.3, 0.24),
    ):
        for name in ("noise", "speech", "all_speech", "all_nonspeech"):
            row: reports.Row = dict.fromkeys(reports.COLUMNS)
            row |= {"method": method, "alpha": alpha, "set": name}
            row |= {"clips": 50, "audio": "synthetic", "seconds": 1.5}
            rates = dict.fromkeys(reports.NONSPEECH_RATES, fpr)
            if "noise" not in name and name != "all_nonspeech":
                rates = dict.fromkeys(reports.SPEECH_RATES, wer)
            for rate, value in rates.items():
                row |= {rate: value, f"{rate}_lo": value * 0.5, f"{rate}_hi": value * 1.5}
            rows.append(row)
    return rows


def test_headline_judges_against_the_targets() -> None:
    ours, paper = reports.headline(made_rows())
    assert ours == (
        "whisper-steer, alpha 1: text-FPR 60.0 -> 3.0 % (-95 % relative; target -80 %: reached); "
        "WER 4.00 -> 4.40 % (+0.40 points; target at most +0.5: reached)"
    )
    assert "-50 % relative; target -80 %: missed" in paper
    assert "+20.00 points; target at most +0.5: missed" in paper


def test_headline_needs_something_to_compare() -> None:
    assert reports.headline([row for row in made_rows() if row["alpha"] == 0]) == []
    assert reports.headline([row for row in made_rows() if row["alpha"] == 1]) == []


def test_tables_show_values_with_intervals() -> None:
    from rich.console import Console

    console = Console(width=140, file=io.StringIO())
    for table in reports.tables(made_rows()):
        console.print(table)
    text = console.file.getvalue()
    assert "60.0 [30.0, 90.0]" in text and "4.4 [2.2, 6.6]" in text
    assert "plain (alpha 0)" in text and "audiosae, alpha 1" in text
    assert "24.0 / 24.0 / 24.0" in text
    assert "None" not in text and "nan" not in text


def test_csv_leaves_cells_empty_where_nothing_applies() -> None:
    read = list(csv.DictReader(reports.as_csv(made_rows()).splitlines()))
    assert tuple(read[0]) == reports.COLUMNS
    assert read[0]["set"] == "noise" and read[0]["wer"] == "" and read[0]["text_fpr"] == "0.6"


def test_curves_join_both_pools() -> None:
    panels = reports.curves(made_rows())
    assert list(panels) == ["all clips"] and list(panels["all clips"]) == ["whisper-steer", "audiosae"]
    assert panels["all clips"]["whisper-steer"][1] == Point(
        1.0, (0.03, 0.015, 0.045), (0.044, 0.022, 0.066)
    )
    assert reports.curves([row for row in made_rows() if row["set"] != "all_speech"]) == {}


def test_synthetic_and_real_clips_are_shown_apart() -> None:
    rows = made_rows()
    halves = [
        {**row, "set": row["set"] + half, "wer": row["wer"] and row["wer"] * times}
        for half, times in (("_synthetic", 1), ("_real", 10))
        for row in rows
        if row["set"].startswith("all_")
    ]
    panels = reports.curves(rows + halves)
    assert list(panels) == ["synthetic clips", "real recordings"]
    assert panels["real recordings"]["audiosae"][1].wer[0] == pytest.approx(2.4)
    lines = reports.headline(rows + halves)
    assert len(lines) == 6
    assert lines[4].startswith("whisper-steer, alpha 1, real clips: text-FPR 60.0 -> 3.0 %")
    assert "WER 40.00 -> 44.00 % (+4.00 points; target at most +0.5: missed)" in lines[4]


def test_points_at_one_place_share_a_label() -> None:
    def at(alpha: float, fpr: float) -> Point:
        return Point(alpha, (fpr, fpr, fpr), (0.05, 0.05, 0.05))

    places = plots._shared_places([at(0.5, 0.1), at(0.75, 0.1002), at(1.0, 0.2)])
    assert places == {(10.0, 5.0): [0.5, 0.75], (20.0, 5.0): [1.0]}


def test_arms_never_point_backwards() -> None:
    assert plots._arms([(0.5, 0.4, 0.7), (0.5, 0.5000001, 0.4999999)]) == [
        pytest.approx([10.0, 0.0]),
        pytest.approx([20.0, 0.0]),
    ]


@pytest.mark.parametrize(
    ("worst", "panels", "size"), [(0.05, ["all"], (1350, 900)), (1.2, ["synthetic", "real"], (2100, 900))]
)  # a linear and a logarithmic axis
def test_frontier_is_a_png_of_the_stated_size(
    tmp_path: Path, worst: float, panels: list[str], size: tuple[int, int]
) -> None:
    path = tmp_path / "frontier.png"
    points = [Point(0.0, (0.6, 0.5, 0.7), (0.04, 0.03, 0.05)), Point(1.0, (0.0,) * 3, (worst,) * 3)]
    curves = dict.fromkeys(panels, {"whisper-steer": points})
    plots.frontier(curves, path, title="title", subtitle="subtitle")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == size
    assert list(tmp_path.iterdir()) == [path]


# -- command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alphas", "abc"], "'abc': expected numbers of at least 0"),
        (["--alphas", "0,-1"], "'0,-1': expected numbers"),
        (["--alphas", "nan"], "'nan': expected numbers"),
        (["--alphas", "0,,1"], "'0,,1': expected numbers"),
        (["--methods", "vad"], "vad: expected some of whisper-steer, audiosae"),
        (["--limit", "0"], "'0': expected a whole number of at least 1"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        tradeoff.parse(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_defaults() -> None:
    options = tradeoff.parse([])
    assert options.alphas == (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
    assert options.methods == ("whisper-steer", "audiosae") and options.model == "mini.en"


@pytest.fixture
def bench(small: Whisper, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The benchmark on a tiny model and two clips; the path of a steering for it."""
    import calibration.corpus
    import whisper_steer.zoo

    sets = {
        "speech": [clip("speech/0", text="hello there")],
        "noise": [clip(f"noise/{index}", "nonspeech") for index in range(2)],
    }
    monkeypatch.setattr(calibration.corpus, "eval_sets", lambda split, data, quick: sets)
    monkeypatch.setattr(whisper_steer.zoo, "load_model", lambda name, device=None: small)
    path = tmp_path / "mine.safetensors"
    shift_for(small, "mine").save(path)
    return path


def test_command_prints_and_writes_everything(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows_file = tmp_path / "deep" / "out", tmp_path / "other" / "rows.json"
    arguments = ["--steering", str(bench), "--alphas", "0,1", "--limit", "1"]
    arguments += ["--out", str(out), "--json", str(rows_file)]
    assert tradeoff.main(arguments) == 0
    shown = capsys.readouterr()
    assert "tiny-random (d_model 64, 2 blocks); 1 speech clips (1 synthetic, 0 real)" in shown.out
    assert "whisper-steer, alpha 1: text-FPR" in shown.out
    assert "left out: audiosae" in shown.err
    for path in (out / "tradeoff.csv", out / "tradeoff.png", out / "about.json", rows_file):
        assert f"wrote {path}" in shown.out and path.is_file()
    assert sorted(path.name for path in out.iterdir()) == ["about.json", "tradeoff.csv", "tradeoff.png"]

    rows = json.loads(rows_file.read_text())
    assert [(row["alpha"], row["set"]) for row in rows] == [
        (alpha, name) for alpha in (0.0, 1.0) for name in ("speech", "noise", "all_speech", "all_nonspeech")
    ]
    assert all(tuple(row) == reports.COLUMNS for row in rows)
    assert all(math.isfinite(value) for value in rows[0].values() if isinstance(value, float))
    assert rows[0]["text_fpr"] is None and rows[1]["wer"] is None and rows[0]["seconds"] > 0
    about = json.loads((out / "about.json").read_text())
    assert about["sets"]["noise"]["clips"] == 1 and about["steerings"]["whisper-steer"]["name"] == "mine"


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ([], "error: no steering is bundled for tiny-random: pass --steering FILE", 2),
        (["--steering", "gone.safetensors"], "error: steering gone.safetensors: no such file", 2),
        (["--data", "/nonexistent"], "error: --data /nonexistent holds no recordings", 2),
    ],
)
def test_errors_are_one_line(
    bench: Path, arguments: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tradeoff.main(arguments) == code
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith(message) and shown.out == ""


def test_unwritable_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(Exception, match="cannot write .*choose another --out or --json"):
        write_whole(tmp_path / "file" / "rows.json", "[]")


def test_write_replaces_whole(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "rows.json", "old")
    write_whole(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]

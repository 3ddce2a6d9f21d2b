"""The trade-off benchmark: rows, pooling, tables, picture, files and its command line."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_whisper
from whisper.model import ModelDimensions, Whisper

from benchmarks import measuring, reports, rows, tradeoff
from benchmarks.files import write_whole
from benchmarks.hearing_cache import ClipRecord, HearingCache, clip_record, read_clips, read_run
from benchmarks.listening import PlainWhisper
from benchmarks.methods import Heard, Setup, Unavailable
from benchmarks.peers.ours import METHODS as OURS
from benchmarks.peers.plain import Plain
from benchmarks.rows import Measured
from calibration.corpus import Clip
from whisper_steer.errors import UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Shift, Steering

# openai-whisper leaves its vocabulary and its spelling table open until they are collected
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file.*whisper:ResourceWarning")

RATE = 16_000


def clip(name: str, kind: str = "speech", text: str | None = None, path: str | None = None) -> Clip:
    tone = np.sin(np.arange(RATE) * 0.05).astype(np.float32) * 0.1
    return Clip(name, kind, name.split("/")[0], "test", text, name, path=path, audio=lambda: tone)


def measured(
    item: Clip, text: str, *, nsp: bool | None = True, hr: bool | None = True, seconds: float = 2.0
) -> Measured:
    """A clip of 30 s in which `text` was heard."""
    record = ClipRecord(
        item.id, 7, item.category, item.kind, item.category, item.text, 30.0, item.path, "made", None
    )
    return Measured(record, Heard(text, (), nsp, hr, seconds))


def prepared(*clips: Clip) -> dict[str, list[tuple[Clip, ClipRecord]]]:
    """The clips by set, with their records."""
    sets: dict[str, list[tuple[Clip, ClipRecord]]] = {}
    for item in clips:
        sets.setdefault(item.category, []).append((item, clip_record(item, item.category, item.load())))
    return sets


@pytest.fixture
def small() -> Whisper:
    """Random weights; a text context of 16 tokens keeps its endless sentences short."""
    model = make_tiny_whisper(dims=ModelDimensions(80, 1500, 64, 1, 2, 51864, 16, 64, 1, 1))
    model.name = "tiny-random"
    return model


def shift_for(model: Whisper, name: str) -> Steering:
    direction = torch.linspace(-1, 1, model.dims.n_audio_state)
    return Steering((Shift(1, direction, 5.0),), None, {"name": name, **model_metadata(model)})


def setup_for(model: Whisper, folder: Path, steering: Path | None = None) -> Setup:
    plain = PlainWhisper(model, HearingCache(folder), "weights")
    return Setup(
        model, "tiny-random", folder / "fitted", plain.heard, plain.windows,
        progress=False, steering=None if steering is None else str(steering),
    )  # fmt: skip


class Says:
    """A method that says one thing, and counts what it was asked."""

    about = "says one thing"

    def __init__(self, name: str, text: str, strengths: tuple[float, ...] = (1.0,), reason: str = "") -> None:
        self.name, self.text, self.strengths, self.reason = name, text, strengths, reason
        self.asked: list[tuple[float, list[str]]] = []
        self.fails_after = 10**6

    def prepare(self, setup: Setup) -> None:
        if self.reason:
            raise Unavailable(self.reason)

    def hear(self, setup: Setup, strength: float, clips: list[Clip]) -> object:
        self.asked.append((strength, [item.id for item in clips]))
        for number, _ in enumerate(clips):
            if number == self.fails_after:
                raise KeyboardInterrupt
            yield Heard(self.text, (), True, None, 0.5)


# -- rows -----------------------------------------------------------------------------------------------


def test_summary_counts_by_hand() -> None:
    sets = {
        "speech": [
            measured(clip("speech/0", text="open the green door"), "open the grey door"),
            measured(clip("speech/1", text="close it"), ""),
        ],
        "real_speech": [
            measured(clip("real/0", "real_speech", "good morning", "a.flac"), "good morning you")
        ],
        "noise": [
            measured(clip("noise/0", "nonspeech"), "Thanks for watching!", nsp=False),
            measured(clip("noise/1", "nonspeech", path="b.ogg"), "", nsp=False, hr=False, seconds=1.0),
        ],
    }
    found = {row["set"]: row for row in rows.summarise(sets, "vad", 0.5)}
    pools = ["all_speech", "all_nonspeech"]
    halves = [pool + half for pool in pools for half in ("_synthetic", "_real")]
    assert list(found) == ["speech", "real_speech", "noise", *pools, *halves, "all"]
    assert all(tuple(row) == reports.COLUMNS for row in found.values())
    assert {(row["method"], row["alpha"]) for row in found.values()} == {("vad", 0.5)}

    speech = found["speech"]
    assert (speech["sub"], speech["del"], speech["ins"]) == pytest.approx((1 / 6, 2 / 6, 0.0))
    assert speech["wer"] == pytest.approx(0.5)
    assert speech["empty_speech"] == 0.5
    assert speech["clips"] == 2 and speech["seconds"] == 4.0 and speech["audio"] == "synthetic"
    assert all(speech[name] is None for name in ("text_fpr", "text_fpr_lo", "nsp_fpr", "words_per_min_hi"))

    pooled = found["all_speech"]
    assert pooled["wer"] == pytest.approx(4 / 8) and pooled["ins"] == pytest.approx(1 / 8)
    assert pooled["audio"] == "synthetic+real" and found["real_speech"]["audio"] == "real"

    noise = found["noise"]
    assert noise["text_fpr"] == 0.5 and noise["hr"] == 0.5  # a confident caption passes the skip rule
    assert noise["nsp_fpr"] == 0.0  # although no_speech_prob is high
    assert noise["words_per_min"] == pytest.approx(3.0)  # three words in a minute
    assert noise["wer"] is None and noise["empty_speech_hi"] is None
    assert {**found["all_nonspeech"], "set": "noise"} == noise
    assert {**found["all_speech_synthetic"], "set": "speech"} == speech
    assert {**found["all_speech_real"], "set": "real_speech"} == found["real_speech"]
    assert found["all_nonspeech_synthetic"]["text_fpr"] == 1.0
    assert found["all_nonspeech_real"]["text_fpr"] == 0.0

    both = found["all"]
    assert both["clips"] == 5 and both["seconds"] == 9.0 and both["audio"] == "synthetic+real"
    for pool, rates in (("all_speech", reports.SPEECH_RATES), ("all_nonspeech", reports.NONSPEECH_RATES)):
        for rate in rates:
            assert both[rate] == found[pool][rate] and both[f"{rate}_hi"] == found[pool][f"{rate}_hi"]
    for row in found.values():
        for name in reports.RATES:
            if row[name] is not None:
                assert row[f"{name}_lo"] <= row[name] <= row[f"{name}_hi"]


def test_scores_that_a_runtime_does_not_show_are_none() -> None:
    items = [
        measured(clip("noise/0", "nonspeech"), "you", nsp=None, hr=None),
        measured(clip("noise/1", "nonspeech"), "", nsp=False, hr=False),
    ]
    row = rows.summarise({"noise": items}, "faster", 0.5)[0]
    assert (row["nsp_fpr"], row["nsp_fpr_lo"], row["hr"], row["hr_hi"]) == (None,) * 4
    assert row["text_fpr"] == 0.5 and row["words_per_min"] == pytest.approx(1.0)


def test_paired_differences_by_hand() -> None:
    speech = [clip(f"speech/{number}", text="open the green door") for number in range(2)]
    real = clip("speech/2", "real_speech", "yes", "c.flac")
    noise = [clip(f"noise/{number}", "nonspeech") for number in range(4)]
    ours = {
        "speech": [*(measured(item, "open the green door") for item in speech), measured(real, "")],
        "noise": [measured(item, "") for item in noise[:3]] + [measured(noise[3], "you")],
    }
    theirs = {
        "speech": [
            measured(speech[0], "open the green"), measured(speech[1], "open the green door"),
            measured(real, "yes"),
        ],
        "noise": [measured(item, "bye") for item in noise[:3]] + [measured(noise[3], "")],
    }  # fmt: skip
    found = rows.paired(theirs, ours, ("vad", 0.5), ("whisper-steer", 1.0))
    assert [row["set"] for row in found] == ["all", "all_synthetic", "all_real"]
    assert all(tuple(row) == rows.PAIRED_COLUMNS for row in found)
    both, synthetic, recorded = found
    assert (both["method"], both["alpha"], both["reference"], both["clips"]) == (
        "vad",
        0.5,
        "whisper-steer",
        7,
    )
    assert both["text_fpr_diff"] == pytest.approx((3 - 1) / 4)
    assert both["wer_diff"] == pytest.approx((1 - 1) / 9)  # one word lost, one that ours lost
    assert both["empty_speech_diff"] == pytest.approx(-1 / 3)
    assert synthetic["wer_diff"] == pytest.approx(1 / 8) and synthetic["empty_speech_diff"] == 0.0
    assert recorded["wer_diff"] == -1.0 and recorded["text_fpr_diff"] is None
    for row in found:
        for name in rows.DIFFERENCES:
            if row[f"{name}_diff"] is not None:
                assert row[f"{name}_diff_lo"] <= row[f"{name}_diff"] <= row[f"{name}_diff_hi"]
    same = rows.paired(ours, ours, ("whisper-steer", 1.0), ("whisper-steer", 1.0))[0]
    assert {same[f"{name}_diff{end}"] for name in rows.DIFFERENCES for end in ("", "_lo", "_hi")} == {0.0}


# -- running methods ------------------------------------------------------------------------------------


def run_methods(setup: Setup, out: Path, methods: list, sets: dict) -> measuring.Results:
    strengths = {method.name: method.strengths for method in methods}
    return measuring.measure(HearingCache(out), setup, methods, strengths, sets, lambda method: "f")


def test_every_setting_is_measured_and_kept(small: Whisper, tmp_path: Path) -> None:
    sets = prepared(clip("speech/0", text="yes"), clip("noise/0", "nonspeech"), clip("noise/1", "nonspeech"))
    setup = setup_for(small, tmp_path)
    says = Says("says", "you", (0.5, 2.0))
    cannot = Says("cannot", "", reason="it needs a wheel")
    methods = [Plain(), says, cannot]
    results = run_methods(setup, tmp_path, methods, sets)
    assert list(results.heard) == [("plain", 0.0), ("says", 0.5), ("says", 2.0)]
    assert results.unavailable == {"cannot": "it needs a wheel"}
    assert says.asked == [
        (0.5, ["speech/0", "noise/0", "noise/1"]),
        (2.0, ["speech/0", "noise/0", "noise/1"]),
    ]
    assert [item.heard.text for item in results.heard["says", 2.0]["noise"]] == ["you", "you"]

    found = measuring.rows_of(results, methods)
    assert list(dict.fromkeys((row["method"], row["alpha"]) for row in found)) == [
        ("plain", 0.0), ("says", 0.0), ("says", 0.5), ("says", 2.0),
    ]  # fmt: skip
    by_setting = {(row["method"], row["alpha"], row["set"]): row for row in found}
    assert by_setting["says", 0.0, "all"] == {**by_setting["plain", 0.0, "all"], "method": "says"}
    assert by_setting["says", 2.0, "noise"]["text_fpr"] == 1.0
    assert by_setting["says", 2.0, "noise"]["hr"] is None
    assert measuring.paired_rows(results, methods) == []  # ours was not measured

    again = run_methods(setup_for(small, tmp_path), tmp_path, methods, sets)
    assert len(says.asked) == 2 and again.heard == results.heard  # from the cache, plain Whisper too
    more = prepared(clip("speech/0", text="yes"), clip("noise/2", "nonspeech"))
    run_methods(setup_for(small, tmp_path), tmp_path, methods, more)
    assert says.asked[2:] == [(0.5, ["noise/2"]), (2.0, ["noise/2"])]


def test_an_interrupted_run_goes_on_where_it_was(small: Whisper, tmp_path: Path) -> None:
    sets = prepared(*(clip(f"noise/{number}", "nonspeech") for number in range(5)))
    says = Says("says", "you")
    says.fails_after = 3
    with pytest.raises(KeyboardInterrupt):
        run_methods(setup_for(small, tmp_path), tmp_path, [says], sets)
    path = HearingCache(tmp_path).path("says", 1.0)
    path.write_bytes(path.read_bytes() + b'{"id": "noise/3", "cr')  # the kill came while a line was written
    says.fails_after = 10**6
    results = run_methods(setup_for(small, tmp_path), tmp_path, [says], sets)
    assert says.asked[1] == (1.0, ["noise/3", "noise/4"])
    assert len(results.heard["says", 1.0]["noise"]) == 5
    again = run_methods(setup_for(small, tmp_path), tmp_path, [says], sets)
    assert len(says.asked) == 2 and again.heard == results.heard


def test_a_method_that_measures_strength_0_itself_keeps_its_own(small: Whisper, tmp_path: Path) -> None:
    sets = prepared(clip("noise/0", "nonspeech"))
    methods = [Plain(), Says("base", "bye bye", (0.0,))]
    found = measuring.rows_of(run_methods(setup_for(small, tmp_path), tmp_path, methods, sets), methods)
    own = [row for row in found if row["method"] == "base"]
    assert {row["alpha"] for row in own} == {0.0} and own[0]["hr"] is None  # not plain Whisper's


def test_steered_models_are_left_plain(small: Whisper, tmp_path: Path) -> None:
    from whisper_steer.attach import handles_of

    path = tmp_path / "mine.safetensors"
    shift_for(small, "mine").save(path)
    setup = setup_for(small, tmp_path, path)
    sets = prepared(clip("noise/0", "nonspeech"))
    ours = OURS[0]
    assert ours.name == "whisper-steer"
    before = setup.plain_windows([sets["noise"][0][0]])
    results = run_methods(setup, tmp_path, [Plain(), ours], sets)
    assert handles_of(small) == () and "decode" not in vars(small)
    texts = {setting: found["noise"][0].heard.text for setting, found in results.heard.items()}
    assert texts["whisper-steer", 1.0] != texts["plain", 0.0] == before[0].text
    paired = measuring.paired_rows(results, [Plain(), ours])
    assert [(row["method"], row["alpha"]) for row in paired] == [
        ("plain", 0.0), *(("whisper-steer", alpha) for alpha in (0.25, 0.5, 0.75, 1.5)),
    ]  # fmt: skip


def test_methods_are_chosen_by_name_or_beginning() -> None:
    methods = [
        Plain(),
        *(Says(name, "") for name in ("whisper-steer", "whisper-steer+vad", "vad-a", "vad-b")),
    ]

    def chosen(*names: str) -> list[str]:
        return [method.name for method in measuring.choose_methods(names, methods)]

    assert chosen("vad") == ["plain", "vad-a", "vad-b"]
    assert chosen("whisper-steer", "vad-b") == ["plain", "whisper-steer", "vad-b"]  # a whole name is that one
    assert len(measuring.choose_methods(None, methods)) == 5
    with pytest.raises(UsageError, match="--methods nothing: expected some of plain, whisper-steer"):
        chosen("nothing")
    with pytest.raises(UsageError, match="--methods : expected"):
        chosen("")


def test_strengths_of_a_quick_run_and_of_ours() -> None:
    vad, ours = Says("vad", "", (0.3, 0.5, 0.9)), Says("whisper-steer", "", (0.5, 1.0))
    assert measuring.choose_strengths(vad, (2.0,), quick=False) == (0.3, 0.5, 0.9)
    assert measuring.choose_strengths(vad, None, quick=True) == (0.3, 0.5, 0.9)
    vad.quick_strengths = (0.5,)
    assert measuring.choose_strengths(vad, None, quick=True) == (0.5,)
    assert measuring.choose_strengths(ours, (1.0, 0.0, 0.25, 1.0), quick=True) == (0.25, 1.0)


# -- showing --------------------------------------------------------------------------------------------


def made_rows() -> list[reports.Row]:
    """Two methods: ours 60 -> 3 % and +0.08 points, the other 60 -> 30 % and +20 points."""
    rows = []
    for method, alpha, fpr, wer in (
        ("whisper-steer", 0.0, 0.6, 0.04),
        ("whisper-steer", 1.0, 0.03, 0.0408),
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
    (ours,) = reports.headline(made_rows())  # the targets are ours alone
    assert ours == (
        "whisper-steer, alpha 1: text-FPR 60.0 -> 3.0 % (-95 % relative; target -95 %: reached); "
        "WER 4.00 -> 4.08 % (+0.08 points; target at most +0.1: reached); "
        "empty speech clips 4.0 -> 4.1 % (target at most 0.2: missed)"
    )


def test_headline_needs_something_to_compare() -> None:
    assert reports.headline([row for row in made_rows() if row["alpha"] == 0]) == []
    assert reports.headline([row for row in made_rows() if row["alpha"] == 1]) == []


def test_tables_show_values_with_intervals() -> None:
    from rich.console import Console

    console = Console(width=140, file=io.StringIO())
    for table in reports.tables(made_rows()):
        console.print(table)
    text = console.file.getvalue()
    assert "60.0 [30.0, 90.0]" in text and "4.1 [2.0, 6.1]" in text
    assert "plain (alpha 0)" in text and "audiosae, alpha 1" in text
    assert "24.0 / 24.0 / 24.0" in text
    assert "None" not in text and "nan" not in text


def test_csv_leaves_cells_empty_where_nothing_applies() -> None:
    read = list(csv.DictReader(reports.as_csv(made_rows()).splitlines()))
    assert tuple(read[0]) == reports.COLUMNS
    assert read[0]["set"] == "noise" and read[0]["wer"] == "" and read[0]["text_fpr"] == "0.6"


def test_synthetic_and_real_clips_are_shown_apart() -> None:
    rows = made_rows()
    halves = [
        {**row, "set": row["set"] + half, "wer": row["wer"] and row["wer"] * times}
        for half, times in (("_synthetic", 1), ("_real", 10))
        for row in rows
        if row["set"].startswith("all_")
    ]
    lines = reports.headline(rows + halves)
    assert len(lines) == 3
    assert lines[2].startswith("whisper-steer, alpha 1, real clips: text-FPR 60.0 -> 3.0 %")
    assert "WER 40.00 -> 40.80 % (+0.80 points; target at most +0.1: missed)" in lines[2]


def test_paired_table_shows_points() -> None:
    from rich.console import Console

    row = dict.fromkeys(rows.PAIRED_COLUMNS) | {"method": "vad", "alpha": 0.5, "set": "all", "clips": 9}
    row |= {"reference": "whisper-steer", "reference_alpha": 1.0}
    row |= {"wer_diff": 0.0125, "wer_diff_lo": -0.002, "wer_diff_hi": 0.03}
    table = reports.paired_table([row, {**row, "set": "all_real", "method": "other"}])
    console = Console(width=140, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()
    assert "Minus whisper-steer, alpha 1" in text and "+1.2 [-0.2, +3.0]" in text and "other" not in text
    assert reports.paired_table([]) is None


def test_time_is_shown_per_minute_of_audio() -> None:
    from rich.console import Console

    console = Console(width=140, file=io.StringIO())
    for table in reports.tables(made_rows(), {"all_speech": 0.5, "all_nonspeech": 2.0}):
        console.print(table)
    text = console.file.getvalue()
    assert "s per min" in text and "3.0" in text and "0.8" in text  # 1.5 s for 0.5 and for 2 minutes


# -- command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alphas", "abc"], "'abc': expected numbers of at least 0"),
        (["--alphas", "0,-1"], "'0,-1': expected numbers"),
        (["--alphas", "nan"], "'nan': expected numbers"),
        (["--alphas", "0,,1"], "'0,,1': expected numbers"),
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
    assert options.alphas is None and options.methods is None and options.model == "mini.en"


@pytest.fixture
def bench(small: Whisper, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The benchmark on a tiny model and two clips; the path of a steering for it."""
    import calibration.corpus
    import whisper_steer.zoo

    sets = {
        "speech": [clip("speech/0", text="hello there")],
        "noise": [clip(f"noise/{index}", "nonspeech") for index in range(2)],
    }
    monkeypatch.setattr(calibration.corpus, "eval_sets", lambda split, data_dir=None, quick=False: sets)
    monkeypatch.setattr(whisper_steer.zoo, "load_model", lambda name, device=None: small)
    path = tmp_path / "mine.safetensors"
    shift_for(small, "mine").save(path)
    return path


def test_command_prints_and_writes_everything(
    bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows_file = tmp_path / "deep" / "out", tmp_path / "other" / "rows.json"
    arguments = ["--steering", str(bench), "--alphas", "0,1", "--limit", "1", "--methods", "whisper-steer"]
    arguments += ["--out", str(out), "--json", str(rows_file)]
    assert tradeoff.main(arguments) == 0
    shown = capsys.readouterr()
    assert "tiny-random (d_model 64, 2 blocks); 1 speech clips (1 synthetic, 0 real)" in shown.out
    assert "whisper-steer, alpha 1: text-FPR" in shown.out
    assert "Minus whisper-steer, alpha 1" in shown.out
    names = ("tradeoff.csv", "run.json", "rows.json", "paired.json", "clips.jsonl")
    for path in (*(out / name for name in names), out / "report.html", rows_file):
        assert f"wrote {path}" in shown.out and path.is_file()
    assert sorted(path.name for path in out.glob("heard/*/*")) == ["0.jsonl", "1.jsonl"]

    found = json.loads(rows_file.read_text())
    assert [(row["method"], row["alpha"], row["set"]) for row in found] == [
        (method, alpha, name)
        for method, alpha in (("plain", 0.0), ("whisper-steer", 0.0), ("whisper-steer", 1.0))
        for name in ("speech", "noise", "all_speech", "all_nonspeech", "all")
    ]
    assert json.loads((out / "rows.json").read_text()) == found
    assert all(tuple(row) == reports.COLUMNS for row in found)
    assert all(math.isfinite(value) for value in found[0].values() if isinstance(value, float))
    assert found[0]["text_fpr"] is None and found[1]["wer"] is None and found[0]["seconds"] > 0
    paired = json.loads((out / "paired.json").read_text())
    assert [(row["method"], row["alpha"], row["reference_alpha"]) for row in paired] == [("plain", 0.0, 1.0)]

    run = read_run(out)
    assert run["sets"]["noise"]["clips"] == 1 and list(run["methods"]) == ["plain", "whisper-steer"]
    assert run["steering"] == str(bench) and run["unavailable"] == {}
    records = read_clips(out)
    assert [(record.id, record.set, record.is_speech) for record in records] == [
        ("speech/0", "speech", True), ("noise/0", "noise", False),
    ]  # fmt: skip
    assert all(0 <= record.no_speech_prob <= 1 and record.gate is None for record in records)
    fingerprint = run["methods"]["plain"]["fingerprint"]
    kept = HearingCache(out).read("plain", 0.0, fingerprint)
    assert set(kept) == {(record.id, record.crc) for record in records}


def test_fresh_measures_again(bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steering", str(bench), "--alphas", "1", "--limit", "1", "--methods", "whisper-steer"]
    arguments += ["--out", str(tmp_path / "out")]
    path = HearingCache(tmp_path / "out").path("whisper-steer", 1.0)
    assert tradeoff.main(arguments) == 0
    first = path.read_text()
    assert tradeoff.main(arguments) == 0 and path.read_text() == first
    path.write_text(first.replace('"seconds": ', '"seconds": 1000'))
    assert tradeoff.main([*arguments, "--fresh"]) == 0
    assert len(path.read_text().splitlines()) == 2 and '"seconds": 1000' not in path.read_text()


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert tradeoff.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(": ")[0] for line in lines]
    assert names[0] == "plain" and len(set(names)) == len(names)
    assert {"whisper-steer", "ours-shift", "no-speech-prob", "phrase-filter", "linear-gate"} <= set(names)
    assert all("strength: " in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--methods", "whisper-steer"], "error: no steering is bundled for tiny-random: pass --steering", 2),
        (
            ["--methods", "whisper-steer", "--steering", "gone.safetensors"],
            "error: steering gone.safetensors: no such file", 2,
        ),
        (["--methods", "wolf"], "error: --methods wolf: expected some of plain, whisper-steer", 2),
        (["--data", "/nonexistent"], "error: --data /nonexistent holds no recordings", 2),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    bench: Path, tmp_path: Path, arguments: list[str], message: str, code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert tradeoff.main([*arguments, "--out", str(tmp_path / "out"), "--limit", "1"]) == code
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

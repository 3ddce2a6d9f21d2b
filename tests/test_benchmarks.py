"""The trade-off benchmark: running methods with what was heard kept, files and its command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from benchmark_tools import Says, clip, prepared, setup_for, shift_for, small_whisper
from tiny import says
from whisper.model import Whisper

from benchmarks import listening, measuring, reports, tradeoff
from benchmarks.files import write_whole
from benchmarks.hearing_cache import LONG_ROWS, HearingCache, read_clips, read_run
from benchmarks.methods import AT_ONCE, Setup
from benchmarks.peers import all_methods
from benchmarks.peers.ours import METHODS as OURS
from benchmarks.peers.plain import Plain
from whisper_steer.errors import UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Steering

# openai-whisper leaves its vocabulary and its spelling table open until they are collected
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file.*whisper:ResourceWarning")


@pytest.fixture
def small() -> Whisper:
    return small_whisper()


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


def test_what_is_kept_depends_on_openai_whispers_version_and_on_how_methods_are_fitted(
    small: Whisper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, says = setup_for(small, tmp_path), Says("says", "you")
    says_itself = Says("own", "you")
    says_itself.fingerprint = lambda setup: "mine"  # type: ignore[attr-defined]
    monkeypatch.setattr("whisper.__version__", "20991231")
    found = [listening.fingerprint_of(one, setup, 0xAB, "fits") for one in (Plain(), says, says_itself)]
    base = "000000ab-openai-whisper-20991231"
    assert found == [base, f"{base}-fits", f"{base}-mine"]

    def fits() -> str:
        return listening.fits_hash("no-such-model", 1, None, False, 2)

    first = fits()
    assert fits() == first
    monkeypatch.setattr(listening, "FIT_VERSION", listening.FIT_VERSION + 1)
    second = fits()
    monkeypatch.setattr("calibration.refit.UNTAUGHT", ())
    assert len({first, second, fits()}) == 3


def test_the_threads_with_which_kept_results_were_timed_are_known(small: Whisper, tmp_path: Path) -> None:
    sets = prepared(clip("noise/0", "nonspeech"))
    run_methods(setup_for(small, tmp_path), tmp_path, [Says("says", "you")], sets)
    path = HearingCache(tmp_path).path("says", 1.0)
    path.write_text(path.read_text().replace(f'"threads": {torch.get_num_threads()}', '"threads": 77'))
    cache = HearingCache(tmp_path)
    assert cache.read("says", 1.0, "another") == {} and cache.threads == set()
    assert len(cache.read("says", 1.0, "f")) == 1 and cache.threads == {77}
    cache.append("says", 1.0, "f", [])
    assert cache.threads == {77, torch.get_num_threads()}


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
        ("plain", 0.0), *(("whisper-steer", alpha) for alpha in (0.25, 0.5, 0.75, 2.0, 4.0)),
    ]  # fmt: skip


@pytest.mark.parametrize(("nobody", "logit"), [(True, 10.0), (False, -10.0)])
def test_clips_have_the_scores_of_plain_whisper_and_of_the_gate(
    small: Whisper, tmp_path: Path, nobody: bool, logit: float
) -> None:
    path = tmp_path / "gate.safetensors"
    Steering((), says(nobody), model_metadata(small)).save(path)
    setup = setup_for(small, tmp_path, path)
    sets = prepared(clip("speech/0", text="yes"), clip("noise/0", "nonspeech"))
    found = measuring.scored_records(setup, sets)
    plain = setup.plain_windows([pair[0] for group in sets.values() for pair in group])
    assert [record.id for record in found] == ["speech/0", "noise/0"]
    for record, heard in zip(found, plain, strict=True):
        assert record.gate == pytest.approx(1 / (1 + math.exp(-logit)))
        assert (record.no_speech_prob, record.avg_logprob) == heard.greedy[0]
    line = 1 / (1 + math.exp(-says(nobody).window_threshold(1.0)))
    assert measuring.gate_threshold(setup) == pytest.approx(line)
    setup.memory.clear()
    setup.steering = None  # none is bundled for this model
    assert measuring.gate_threshold(setup) is None
    assert [record.gate for record in measuring.scored_records(setup, sets)] == [None, None]


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
    gate = next(method for method in all_methods() if method.name == "whisper-steer-gate")
    assert measuring.choose_strengths(gate, (1.0,), quick=False) == gate.strengths


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
    assert run["threads"] == [torch.get_num_threads()] and run["gate_threshold"] is None
    assert run["methods"]["whisper-steer"]["timed"] == AT_ONCE
    records = read_clips(out)
    assert [(record.id, record.set, record.is_speech) for record in records] == [
        ("speech/0", "speech", True), ("noise/0", "noise", False),
    ]  # fmt: skip
    assert all(0 <= record.no_speech_prob <= 1 and record.gate is None for record in records)
    fingerprint = run["methods"]["plain"]["fingerprint"]
    kept = HearingCache(out).read("plain", 0.0, fingerprint)
    assert set(kept) == {(record.id, record.crc) for record in records}


def test_long_runs_the_methods_that_ran_and_adds_to_the_report(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], Path]] = []

    def beside(setup: Setup, methods: list, out: Path) -> list[Path]:
        asked.append(([method.name for method in methods], out))
        return [write_whole(out / LONG_ROWS, "[]")]

    monkeypatch.setattr("benchmarks.long_recordings.beside_tradeoff", beside)
    out = tmp_path / "out"
    arguments = ["--steering", str(bench), "--alphas", "1", "--limit", "1", "--out", str(out)]
    assert tradeoff.main([*arguments, "--methods", "whisper-steer"]) == 0 and asked == []
    assert tradeoff.main([*arguments, "--methods", "whisper-steer", "--long"]) == 0
    assert asked == [(["plain", "whisper-steer"], out)]


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

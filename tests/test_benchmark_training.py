"""The training benchmark: quality by one measure, rows, repeats, failing libraries, frames."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_setting import CASE, FAST, FILES, MINE, SETTING, SLOW

from benchmarks import training, training_contestants, training_frames
from benchmarks.peers import environments
from benchmarks.training import COLUMNS, compare
from benchmarks.training_contestants import OURS, Case, Contestant, ContestantError, Outcome, Setting
from benchmarks.training_frames import FrameFiles
from benchmarks.training_quality import measure, select
from whisper_steer.errors import UsageError

# -- quality


def test_topk_keeps_the_largest_of_each_frame_and_nothing_negative() -> None:
    pre = torch.tensor([[3.0, 1.0, 2.0], [-1.0, 0.5, -2.0]])
    expected = torch.tensor([[3.0, 0.0, 2.0], [0.0, 0.5, 0.0]])
    assert torch.equal(select(pre, 2, "topk"), expected)


def test_batchtopk_keeps_the_largest_of_all_frames() -> None:
    pre = torch.tensor([[3.0, 1.0, 2.0], [-1.0, 0.5, -2.0]])
    expected = torch.tensor([[3.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    assert torch.equal(select(pre, 1, "batchtopk"), expected)


def test_select_takes_a_k_beyond_the_latents() -> None:
    pre = torch.tensor([[1.0, 2.0]])
    assert torch.equal(select(pre, 5, "topk"), pre)
    assert torch.equal(select(pre, 5, "batchtopk"), pre)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown rule 'relu'"):
        select(torch.ones(1, 2), 1, "relu")


def test_quality_of_a_case_computed_by_hand() -> None:
    # codes are the positive parts of x; the third latent never fires
    weights = {
        "W_enc": torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]),
        "b_enc": torch.tensor([0.0, 0.0, -1.0]),
        "W_dec": torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]),
        "b_dec": torch.zeros(2),
    }
    frames = torch.tensor([[2.0, 0.0], [0.0, 4.0], [2.0, 1.0], [0.0, 3.0]])
    # k 1: the third frame keeps 2 and loses 1: error 1; mean (1, 2): variance 4 x 1 + 4 + 4 + 1 + 1 = 14
    found = measure(weights, frames, k=1, rule="topk", batch=3)
    assert found.fvu == pytest.approx(1 / 14)
    assert found.l0 == 1.0
    assert found.alive == pytest.approx(2 / 3)
    # the three largest of the first three frames are 2, 4, 2; then 3
    assert measure(weights, frames, k=1, rule="batchtopk", batch=3).fvu == pytest.approx(1 / 14)


def test_biases_enter_the_quality() -> None:
    weights = {
        "W_enc": torch.zeros(2, 2), "b_enc": torch.tensor([1.0, -1.0]),
        "W_dec": torch.tensor([[1.0, 0.0], [0.0, 9.0]]), "b_dec": torch.tensor([0.0, 1.0]),
    }  # fmt: skip
    frames = torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    # every reconstruction is (1, 1): error 4, variance 2
    found = measure(weights, frames, k=2, rule="topk", batch=10)
    assert (found.fvu, found.l0, found.alive) == (2.0, 1.0, 0.5)


# -- the comparison


def outcome(step_s: float, peak_mb: float = 5.0, judged: bool = True) -> Outcome:
    return Outcome(step_s, peak_mb, {"fvu": 0.25, "l0": 2.0, "alive": 0.5} if judged else None)


class Runs:
    """A runner that takes its step times from a list per variant and remembers the calls."""

    def __init__(self, **seconds: list[float]):
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        self.calls: list[tuple[str, int, bool]] = []

    def __call__(
        self, one: Contestant, _c: Case, _f: FrameFiles, _s: Setting, steps: int, judged: bool
    ) -> Outcome:
        self.calls.append((one.variant, steps, judged))
        value = next(self.seconds[one.variant])
        if value < 0:
            raise ContestantError("ImportError: no such thing")
        return outcome(value, judged=judged)


def test_rows_have_every_column_and_the_median_speed() -> None:
    runs = Runs(adam=[1.0, 2.0, 4.0], batchtopk=[0.5, 0.5, 0.5])
    rows = compare(CASE, FILES, SETTING, [FAST, MINE], run=runs)
    assert [tuple(row) for row in rows] == [COLUMNS, COLUMNS]
    first = rows[0]
    assert (first["library"], first["variant"], first["activation"]) == ("sparsify", "adam", "topk")
    assert (first["sae_tokens_per_s"], first["sae_tokens_per_s_min"], first["sae_tokens_per_s_max"]) == (
        5,
        2,
        10,
    )
    assert (first["fvu"], first["l0"], first["alive"], first["peak_mb"]) == (0.25, 2.0, 0.5, 5.0)
    assert (first["d_model"], first["n_latents"], first["k"], first["batch"], first["steps"]) == (
        4,
        8,
        2,
        10,
        6,
    )
    assert (first["device"], first["dtype"], first["threads"], first["repeats"]) == ("cpu", "float32", 1, 3)
    assert first["error"] is None
    assert json.loads(json.dumps(rows)) == rows


def test_repeats_are_interleaved_and_only_the_first_is_judged() -> None:
    runs = Runs(adam=[1.0, 1.0], batchtopk=[1.0, 1.0])
    compare(CASE, FILES, SETTING, [FAST, MINE], repeats=2, run=runs)
    assert runs.calls == [
        ("adam", 6, True), ("batchtopk", 6, True), ("adam", 3, False), ("batchtopk", 3, False),
    ]  # fmt: skip


def test_quick_repeats_the_fastest_variant_of_each_library_alone() -> None:
    runs = Runs(adam=[1.0, 1.0, 1.0], signum=[2.0], batchtopk=[1.0, 1.0, 1.0])
    rows = compare(CASE, FILES, SETTING, [SLOW, FAST, MINE], best_only=True, run=runs)
    assert [row["repeats"] for row in rows] == [1, 3, 3]


def test_a_failing_library_leaves_a_row_with_its_error_and_the_rest_goes_on() -> None:
    runs, ticks = Runs(adam=[-1.0], batchtopk=[1.0, 1.0]), []
    rows = compare(CASE, FILES, SETTING, [FAST, MINE], repeats=2, run=runs, tick=ticks.append)
    assert rows[0]["error"] == "ImportError: no such thing"
    assert all(rows[0][name] is None for name in ("sae_tokens_per_s", "fvu", "l0", "alive", "peak_mb"))
    assert rows[1]["error"] is None and rows[1]["repeats"] == 2
    assert [call[0] for call in runs.calls] == ["adam", "batchtopk", "batchtopk"]
    assert ticks == ["sparsify adam", f"{OURS} batchtopk", f"{OURS} batchtopk"]


def test_a_library_that_fails_later_has_no_figures_either() -> None:
    rows = compare(CASE, FILES, SETTING, [FAST], repeats=2, run=Runs(adam=[1.0, -1.0]))
    assert rows[0]["sae_tokens_per_s"] is None and rows[0]["repeats"] == 1 and rows[0]["error"]


def test_the_best_peer_is_the_fastest_row_of_another_library() -> None:
    rows = compare(
        CASE,
        FILES,
        SETTING,
        [SLOW, FAST, MINE],
        repeats=1,
        run=Runs(adam=[1.0], signum=[2.0], batchtopk=[0.1]),
    )
    best = training.best_peer(rows)
    assert best is not None and best["variant"] == "adam"
    failed = compare(CASE, FILES, SETTING, [FAST, MINE], repeats=1, run=Runs(adam=[-1.0], batchtopk=[0.1]))
    assert training.best_peer(failed) is None


def test_the_table_shows_ratio_figures_and_failures() -> None:
    from rich.console import Console

    runs = Runs(adam=[1.0], signum=[-1.0], batchtopk=[0.25])
    rows = compare(CASE, FILES, SETTING, [FAST, SLOW, MINE], repeats=1, run=runs)
    console = Console(width=160, record=True, file=open(os.devnull, "w"))
    with console.file:
        console.print(training.table(CASE, rows))
    lines = [line for line in console.export_text().splitlines() if "adam" in line or "batchtopk" in line]
    assert lines[0].split() == [OURS, "batchtopk", "40", "4.00", "0.2500", "2.0", "50.0", "5", "0.008"]
    assert lines[1].split()[2:4] == ["10", "1.00"]


def test_the_tuned_learning_rate_is_used() -> None:
    tuned = replace(FAST, lr={"tiny": 0.125})
    assert training_contestants.learning_rate(tuned, CASE) == 0.125
    assert training_contestants.learning_rate(FAST, CASE) == training_contestants.DEFAULT_LR
    rows = compare(CASE, FILES, SETTING, [tuned], repeats=1, run=Runs(adam=[1.0]))
    assert rows[0]["lr"] == 0.125


# -- frames


def test_windows_hold_whole_clips_with_pauses_between() -> None:
    second = 16_000
    clips = [np.full(n * second, value, np.float32) for n, value in ((12, 1.0), (12, 2.0), (40, 3.0))]
    windows = list(training_frames.packed(iter(clips)))
    assert [len(window) for window in windows] == [24 * second + 2 * training_frames.PAUSE, 30 * second]
    first = windows[0]
    assert first[0] == 1 and first[12 * second] == 0 and first[12 * second + training_frames.PAUSE] == 2
    assert set(np.unique(windows[1])) == {3.0}


def test_synthetic_frames_are_reproducible_and_normalised(tmp_path: Path) -> None:
    said: list[str] = []
    files = training_frames.prepare("synthetic", 6, train=400, held_out=100, folder=tmp_path, say=said.append)
    train, tuning, held_out = (np.load(path) for path in (files.train, files.tuning, files.held_out))
    assert [part.shape for part in (train, tuning, held_out)] == [(400, 6), (100, 6), (100, 6)]
    assert all(part.dtype == np.float32 for part in (train, tuning, held_out))
    assert np.allclose(train.mean(axis=0), 0, atol=1e-6)
    assert np.square(train).sum(axis=1).mean() == pytest.approx(1.0, rel=1e-5)
    assert not np.array_equal(tuning, held_out)
    assert len(said) == 1
    training_frames.prepare("synthetic", 6, train=400, held_out=100, folder=tmp_path, say=said.append)
    assert len(said) == 1  # there already
    again = training_frames.prepare(
        "synthetic", 6, train=400, held_out=100, folder=tmp_path / "other", say=said.append
    )
    assert np.array_equal(np.load(again.train), train)


def test_statistics_of_frames_by_hand() -> None:
    mean, scale = training_frames.statistics_of(np.array([[1.0, 0.0], [3.0, 0.0]], np.float32))
    assert mean.tolist() == [2.0, 0.0]
    assert scale == 1.0


# -- command line


def test_without_any_environment_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(["--peers", str(tmp_path), "--quick"]) == 2
    assert capsys.readouterr().err == (
        f"error: nothing to compare with in {tmp_path}: run make bench-env first\n"
    )


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_counts_are_checked(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training.parse(["--threads", value])
    assert "expected a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torch sees no CUDA device"):
        training.settings(training.parse(["--device", "cuda"]), tmp_path)
    assert [s.device for s in training.settings(training.parse([]), tmp_path)] == ["cpu"]


def test_a_run_writes_a_flat_list_and_tells_of_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environments.interpreter(tmp_path, "sparsify").parent.mkdir(parents=True)
    environments.interpreter(tmp_path, "sparsify").touch()
    monkeypatch.setattr(training, "QUICK", (CASE,))
    calls = []

    def run(one: Contestant, *_rest: Any) -> Outcome:
        calls.append(one)
        if one.library == "sae_lens":
            raise ContestantError("no environment")
        return outcome(0.5)

    monkeypatch.setattr(training, "compare", _with_runner(training.compare, run))
    options = ["--peers", str(tmp_path), "--quick", "--device", "cpu", "--out", str(tmp_path / "frames")]
    assert training.main([*options, "--json", str(tmp_path / "rows.json")]) == 1
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == len(training_contestants.CONTESTANTS)
    assert {row["library"] for row in rows if row["error"]} == {"sae_lens"}
    assert "sae_lens topk failed: no environment\n" in capsys.readouterr().out


def _with_runner(original: Any, run: Any) -> Any:
    return lambda *args, **keywords: original(*args, **keywords, run=run)

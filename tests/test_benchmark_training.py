"""The training benchmark: quality by one measure, rows, repeats, failing libraries, frames, environments."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import training, training_contestants, training_frames
from benchmarks.peers import environments
from benchmarks.training import COLUMNS, compare
from benchmarks.training_contestants import OURS, Case, Contestant, ContestantError, Outcome, Setting
from benchmarks.training_frames import FrameFiles
from benchmarks.training_quality import measure, select
from whisper_steer.errors import UsageError

PEERS = Path(environments.__file__).parent
CASE = Case("tiny", "synthetic", 4, 8, 2, steps=6, timing_steps=3, untimed=1, train=40, held_out=20, batch=10)
FILES = FrameFiles(Path("train.npy"), Path("tuning.npy"), Path("held_out.npy"), "synthetic")
SETTING = Setting(Path("nowhere"), "cpu", "float32", 1)
FAST = Contestant("sparsify", "adam", "topk")
SLOW = Contestant("sparsify", "signum", "topk")
MINE = Contestant(OURS, "batchtopk", "batchtopk")


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


# -- processes


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Any]:
    """Gives a function: text of a shell script that stands for sparsify's Python -> the setting to use it."""

    def make(script: str, timeout: float = 60.0) -> Setting:
        python = environments.interpreter(tmp_path, "sparsify")
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        return Setting(tmp_path, "cpu", "float32", 1, timeout)

    yield make


def test_a_missing_environment_is_named_with_the_way_out(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "cpu", "float32", 1)
    with pytest.raises(ContestantError, match="no environment at .*sparsify: run make bench-env"):
        training_contestants.run_once(FAST, CASE, FILES, setting, 2, False)


def test_figures_come_from_the_last_line(environment: Any) -> None:
    setting = environment("""echo chatter; echo '{"step_s": 0.5, "peak_mb": 7, "step_s_mean": 1}'""")
    assert training_contestants.run_once(FAST, CASE, FILES, setting, 2, False) == Outcome(0.5, 7.0, None)


def test_the_process_gets_the_threads_and_not_our_packages(environment: Any) -> None:
    setting = environment(
        """test "$OMP_NUM_THREADS" = 1 && test -z "$PYTHONPATH" && echo '{"step_s": 1, "peak_mb": 1}'"""
    )
    assert training_contestants.run_once(FAST, CASE, FILES, setting, 2, False).step_s == 1.0


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo Traceback >&2; echo 'ImportError: no torch' >&2; exit 1", "^ImportError: no torch$"),
        ("exit 3", "^ended with 3 and said nothing$"),
        ("kill -9 $$", "^ended with -9 and said nothing$"),
        ("echo hello", "^reported no figures$"),
        ("true", "^reported no figures$"),
        ("echo 3", "^reported no figures$"),
        ("""echo '{"step_s": 1}'""", "^reported no figures$"),
    ],
)
def test_a_process_that_fails_is_one_line(environment: Any, script: str, message: str) -> None:
    with pytest.raises(ContestantError, match=message):
        training_contestants.run_once(FAST, CASE, FILES, environment(script), 2, False)


def test_a_process_that_hangs_is_stopped(environment: Any) -> None:
    with pytest.raises(ContestantError, match=r"not done after 0 s"):
        training_contestants.run_once(FAST, CASE, FILES, environment("exec sleep 60", timeout=0.2), 2, False)


# -- the scripts


@pytest.fixture
def request_file(tmp_path: Path) -> Path:
    frames = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    np.save(tmp_path / "frames.npy", frames)
    contents = training_contestants.request_of(
        MINE, CASE, tmp_path / "frames.npy", SETTING, 6, 1e-3, tmp_path / "sae.safetensors"
    )
    (tmp_path / "request.json").write_text(json.dumps(contents))
    return tmp_path / "request.json"


def test_the_worker_serves_batches_in_order_and_saves_the_weights(
    request_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(PEERS))
    import worker

    seen: list[torch.Tensor] = []

    class Toy:
        def __init__(self, request: Any, d_model: int):
            assert (request.k, d_model) == (2, 4)

        def step(self, index: int, x: torch.Tensor) -> None:
            assert index == len(seen)
            seen.append(x)

        def weights(self) -> Any:
            rows = torch.arange(32.0).reshape(4, 8)
            return worker.Weights(rows.T, torch.ones(8), rows.T, torch.zeros(4))

    threads = torch.get_num_threads()
    try:
        answer = worker.train(worker.Request(**json.loads(request_file.read_text())), Toy)
    finally:
        torch.set_num_threads(threads)
    frames = torch.from_numpy(np.load(request_file.with_name("frames.npy")))
    assert len(seen) == 6
    assert torch.equal(torch.cat(seen[:4]), frames)
    assert torch.equal(torch.cat(seen[4:]), frames[:20])  # from the start again
    assert answer["step_s"] > 0 and answer["peak_mb"] >= 0
    saved = load_file(request_file.with_name("sae.safetensors"))
    assert torch.equal(saved["W_enc"], torch.arange(32.0).reshape(4, 8).T)
    assert {name: tuple(value.shape) for name, value in saved.items()} == {
        "W_enc": (8, 4), "b_enc": (8,), "W_dec": (8, 4), "b_dec": (4,),
    }  # fmt: skip


def test_peak_memory_counts_what_training_allocates() -> None:
    """In a process of its own: one that ran other tests may hold freed memory that the block goes into."""
    program = """
import json, numpy, worker
before = worker.resident_bytes()
block = numpy.ones(64 * 2**20 // 8)
print(json.dumps([before, worker.resident_bytes(), worker.peak_resident_bytes(), block[0]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PEERS
    )
    before, with_block, peak, _ = json.loads(done.stdout)
    assert 60 * 2**20 < with_block - before < 80 * 2**20
    assert peak >= with_block - 2**20


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["batchtopk", "batchtopk-float32", "topk"])
def test_our_own_script_runs_and_learns(variant: str, tmp_path: Path) -> None:
    case = replace(CASE, steps=60, train=200)
    files = training_frames.prepare(
        "synthetic", 4, train=200, held_out=50, folder=tmp_path, say=lambda _t: None
    )
    contestant = Contestant(OURS, variant, variant.split("-")[0], {"tiny": 0.02})
    found = training_contestants.run_once(contestant, case, files, SETTING, 60, True)
    assert found.quality is not None
    assert found.quality["fvu"] < 0.4
    assert found.quality["l0"] <= 2.0


# stands in for worker.main: compares the common form with the library's own reconstruction
OWN_RECONSTRUCTION = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
import torch
from worker import Request
torch.set_num_threads(1)
request = Request(**json.load(open(sys.argv[3])))
torch.manual_seed(0)
trainee = importlib.import_module(sys.argv[2]).Trainee(request, 4)
x = torch.randn(10, 4) + 1
for index in range(request.steps):
    trainee.step(index, x)
weights = trainee.weights()
pre = (x @ weights.W_enc.T + weights.b_enc).relu()
if "batchtopk" in request.variant:
    floor = pre.flatten().topk(request.k * len(x)).values.min()
    codes = pre * (pre >= floor)
else:
    kept = pre.topk(request.k, dim=1)
    codes = torch.zeros_like(pre).scatter(1, kept.indices, kept.values)
common = codes @ weights.W_dec + weights.b_dec
if sys.argv[2] == "train_sparsify":
    own = trainee.sae(x).sae_out
elif sys.argv[2] == "train_sae_lens":
    sae = trainee.sae
    codes = sae.encode_with_hidden_pre(x)[0]
    own = sae.decode(codes)
else:
    ae = trainee.trainer.ae
    own = ae.decode(ae.encode(x, use_threshold=False))
print(float((own - common).abs().max()), float((own - x).square().mean()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "contestant",
    [c for c in training_contestants.CONTESTANTS if c.library != OURS],
    ids=lambda c: f"{c.library}-{c.variant}",
)
def test_the_common_form_reconstructs_as_the_library_does(contestant: Contestant, request_file: Path) -> None:
    folder = environments.default_folder()
    problem = environments.missing(folder, contestant.library)
    if problem:
        pytest.skip(problem)
    contents = json.loads(request_file.read_text()) | {"variant": contestant.variant}
    request_file.write_text(json.dumps(contents))
    python = environments.interpreter(folder, contestant.library).absolute()
    done = subprocess.run(
        [str(python), "-c", OWN_RECONSTRUCTION, str(PEERS), f"train_{contestant.library}", str(request_file)],
        capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environments.variables("cpu")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    difference, error = map(float, done.stdout.split()[-2:])
    assert difference < 1e-5
    assert np.isfinite(error)


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


# -- environments


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Records the commands instead of running them; making an environment makes its Python."""
    ran: list[list[str]] = []

    def run(command: list[str]) -> None:
        ran.append(list(command))
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        if any("sae-lens" in word for word in command) and "fail" in os.environ.get("TEST_PEERS", ""):
            raise UsageError("ERROR: No matching distribution found")

    monkeypatch.setattr(environments, "_run", run)
    return ran


def test_environments_are_made_once(tmp_path: Path, commands: list[list[str]]) -> None:
    said: list[str] = []
    environments.make(tmp_path, torch="torch==9 --index-url URL", say=said.append)
    made = [command for command in commands if "venv" in command]
    assert [Path(command[-1]).name for command in made] == list(environments.ENVIRONMENTS)
    installs = [command[command.index("install") + 1 :] for command in commands if "install" in command]
    assert installs[0][-3:] == ["torch==9", "--index-url", "URL"]
    assert "eai-sparsify==1.3.3" in installs[1] and installs[1][-1] == "torch==9"
    assert ["torchvision"] == [command[-1] for command in commands if "uninstall" in command]
    count = len(commands)
    environments.make(tmp_path, torch="torch==9 --index-url URL", say=said.append)
    assert len(commands) == count
    assert said[-3:] == [f"{name}: ready" for name in environments.ENVIRONMENTS]
    environments.make(tmp_path, torch="torch==10", say=said.append)  # other torch: completed, not made anew
    assert len(commands) > count and not any("venv" in command for command in commands[count:])


def test_a_failed_environment_does_not_stop_the_others(
    tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_PEERS", "fail")
    with pytest.raises(UsageError, match=r"could not make sae_lens \(ERROR: No matching distribution"):
        environments.make(tmp_path, say=lambda _text: None)
    assert (tmp_path / "dictionary_learning" / environments.STAMP).is_file()
    assert not (tmp_path / "sae_lens").exists()  # half of an environment only fills the disk


def test_a_full_disk_is_told_before_anything_is_installed(
    tmp_path: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(free=1.44e9)
    monkeypatch.setattr(environments.shutil, "disk_usage", lambda _folder: free)
    with pytest.raises(UsageError, match=r"sparsify \(1\.4 GB are free at .*, 1\.5 GB are needed: "):
        environments.make(tmp_path, say=lambda _text: None)
    assert commands == []


def test_an_environment_sees_our_packages_behind_its_own(tmp_path: Path) -> None:
    """Really made, of nothing: torch is found where our Python finds it, and whisper_steer is not there."""
    nothing = environments.Environment((), "torch")
    environments._install(tmp_path / "empty", nothing, ["torch"])
    probe = "import importlib.util, pip, torch; print(torch.__file__, pip.__file__, sep='\\n')"
    python = str(environments.interpreter(tmp_path, "empty"))
    done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=True, cwd=tmp_path)
    found, own = done.stdout.split()
    assert found == torch.__file__ and Path(own).is_relative_to(tmp_path)


def test_a_failing_command_is_its_last_line() -> None:
    with pytest.raises(UsageError, match="^second$"):
        environments._run([sys.executable, "-c", "import sys; sys.exit('first\\n' + chr(115) + 'econd\\n')"])
    with pytest.raises(UsageError, match="cannot run /no/such/program"):
        environments._run(["/no/such/program"])


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

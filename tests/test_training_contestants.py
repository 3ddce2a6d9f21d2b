"""One run of SAE training by one library: its process, the scripts of all libraries, what they report."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_setting import CASE, FAST, FILES, MINE, SETTING

from benchmarks import training_contestants, training_frames
from benchmarks.peers import environments
from benchmarks.training_contestants import OURS, Contestant, ContestantError, Outcome, Setting

PEERS = Path(environments.__file__).parent


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

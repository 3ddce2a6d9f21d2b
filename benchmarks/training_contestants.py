"""One run of SAE training by one library, in a process and an environment of its own.

The libraries, their variants and learning rates are CONTESTANTS; `benchmarks.training` compares them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.peers import environments
from benchmarks.training_frames import FrameFiles

OURS = "whisper_steer"
# best of the tried ones for whisper_steer and for sparsify with Adam on "real" at 100 steps
DEFAULT_LR = 8e-3


@dataclass(frozen=True)
class Case:
    """One size of SAE on one source of activations.

    Attributes:
        steps: of the run whose quality is measured.
        timing_steps: of the other repeats.
        untimed: first steps of each run that the clock leaves out.
        train, held_out: frames.
    """

    name: str
    source: str
    d_model: int
    n_latents: int
    k: int
    steps: int
    timing_steps: int
    untimed: int
    train: int
    held_out: int
    batch: int = 2500


@dataclass(frozen=True)
class Contestant:
    """One variant of one library; lr by name of the case."""

    library: str
    variant: str
    activation: str
    lr: Mapping[str, float] = field(default_factory=dict, compare=False)


QUICK = (
    Case("real", "real", 192, 1536, 16, 100, 25, 5, 150_000, 20_000),
    Case("wide", "synthetic", 768, 6144, 50, 12, 6, 2, 50_000, 10_000),
)
FULL = (replace(QUICK[0], steps=1000, timing_steps=50), replace(QUICK[1], steps=150, timing_steps=12))

CONTESTANTS = (
    Contestant(OURS, "batchtopk", "batchtopk"),
    Contestant(OURS, "batchtopk-float32", "batchtopk"),
    Contestant(OURS, "topk", "topk"),
    Contestant("sparsify", "signum", "topk", {"real": 2e-3, "wide": 2e-3}),
    Contestant("sparsify", "adam", "topk"),
    Contestant("sae_lens", "topk-sparse", "topk"),
    Contestant("sae_lens", "topk", "topk"),
    Contestant("sae_lens", "batchtopk", "batchtopk"),
    Contestant("dictionary_learning", "topk", "topk"),
    Contestant("dictionary_learning", "batchtopk", "batchtopk"),
)


class ContestantError(Exception):
    """A library's run that gave no figures; the message is one line."""


@dataclass(frozen=True)
class Setting:
    """Where and how everything runs; the same for every library."""

    peers: Path
    device: str
    dtype: str
    threads: int
    timeout: float = 3600.0


@dataclass(frozen=True)
class Outcome:
    """What one process reported; quality where it was measured."""

    step_s: float
    peak_mb: float
    quality: Mapping[str, float] | None = None


Runner = Callable[[Contestant, Case, FrameFiles, Setting, int, bool], Outcome]

# -- running ------------------------------------------------------------------------------------------------


def command(contestant: Contestant, setting: Setting, request: Path) -> list[str]:
    """Raises ContestantError: the library has no environment."""
    script = Path(environments.__file__).with_name(f"train_{contestant.library}.py")
    if contestant.library == OURS:
        return [sys.executable, str(script), str(request)]
    problem = environments.missing(setting.peers, contestant.library)
    if problem:
        raise ContestantError(problem)
    python = environments.interpreter(setting.peers, contestant.library)
    return [str(python.absolute()), str(script), str(request)]


def request_of(
    contestant: Contestant, case: Case, frames: Path, setting: Setting, steps: int, lr: float, out: Path
) -> dict[str, Any]:
    """What `peers.worker.Request` reads."""
    return {
        "frames": str(frames.absolute()),
        "variant": contestant.variant,
        "n_latents": case.n_latents,
        "k": case.k,
        "batch": case.batch,
        "steps": steps,
        "untimed": case.untimed,
        "lr": lr,
        "warmup": max(2, steps // 20),
        "decay": max(1, steps // 5),
        "dtype": setting.dtype,
        "device": setting.device,
        "threads": setting.threads,
        "seed": 0,
        "out": str(out),
    }


def run_once(
    contestant: Contestant, case: Case, files: FrameFiles, setting: Setting, steps: int, judged: bool
) -> Outcome:
    """One process: `steps` steps; with `judged` the SAE is measured on the held-out frames.

    Raises ContestantError: no environment, the process failed, or it reported nothing.
    """
    held_out = files.held_out if judged else None
    return train(contestant, case, files.train, held_out, setting, steps, learning_rate(contestant, case))


def learning_rate(contestant: Contestant, case: Case) -> float:
    """The tuned one; DEFAULT_LR where nothing was tuned."""
    return contestant.lr.get(case.name, DEFAULT_LR)


def train(
    contestant: Contestant,
    case: Case,
    frames: Path,
    held_out: Path | None,
    setting: Setting,
    steps: int,
    lr: float,
) -> Outcome:
    """One process that trains on frames; the SAE is measured on held_out, if there is one. Raises as
    `run_once`."""
    with tempfile.TemporaryDirectory(prefix="whisper-steer-bench-") as folder:
        out, request = Path(folder) / "sae.safetensors", Path(folder) / "request.json"
        request.write_text(json.dumps(request_of(contestant, case, frames, setting, steps, lr, out)))
        answer = _answer(command(contestant, setting, request), setting)
        quality = _quality(out, held_out, case, contestant.activation) if held_out else None
    return Outcome(float(answer["step_s"]), float(answer["peak_mb"]), quality)


def _answer(arguments: Sequence[str], setting: Setting) -> Mapping[str, Any]:
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "TOKENIZERS_PARALLELISM": "false"}
    environment |= environments.variables(setting.device)
    # our own script finds calibration also where the package was not installed; peers must see only theirs
    environment["PYTHONPATH"] = root if arguments[0] == sys.executable else ""
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, env=environment, timeout=setting.timeout
        )
    except subprocess.TimeoutExpired as error:
        raise ContestantError(f"not done after {setting.timeout:.0f} s") from error
    except OSError as error:
        raise ContestantError(f"cannot run {arguments[0]}: {error.strerror or error}") from error
    if done.returncode:
        last = environments.last_line(done.stderr)[:300]
        raise ContestantError(last or f"ended with {done.returncode} and said nothing")
    try:
        answer = json.loads(environments.last_line(done.stdout))
        return {"step_s": answer["step_s"], "peak_mb": answer["peak_mb"]}
    except (ValueError, TypeError, KeyError) as error:
        raise ContestantError("reported no figures") from error


def _quality(weights: Path, held_out: Path, case: Case, rule: str) -> Mapping[str, float]:
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from benchmarks.training_quality import measure

    frames = torch.from_numpy(np.load(held_out))
    return asdict(measure(load_file(weights), frames, k=case.k, rule=rule, batch=case.batch))

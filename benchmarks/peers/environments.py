"""Virtual environments of the libraries that `benchmarks.training` compares with, one each under one folder.

Their pins collide with each other's, so none shares an environment with another. What whisper_steer's own
environment has is seen from each, behind its own packages, and not installed again: torch alone is gigabytes,
and rivals should run on the same one. A stamp file says what was installed; an environment with the right
stamp is left alone, one that could not be made is taken away again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.files import write_whole
from whisper_steer.errors import UsageError

TORCH = "torch==2.13.0"
STAMP = "stamp.json"
SHARED = "whisper_steer_shared.pth"
# 0.3 GB stay, pip unpacks more on the way; another torch than ours is not counted
ROOM = 1.5e9
FOLDER = Path("out/peers")


@dataclass(frozen=True)
class Environment:
    """What one library needs.

    Attributes:
        requirements: installed with pip, after torch.
        without: packages taken out again. nnsight, which dictionary_learning depends on, brings torchvision,
            whose ordinary build does not fit a CPU build of torch and then breaks `import transformers`;
            training needs neither.
        imports: what the library's training script imports; tried once everything is in place.
    """

    requirements: tuple[str, ...]
    imports: str
    without: tuple[str, ...] = ()


ENVIRONMENTS = {
    "sparsify": Environment(
        ("eai-sparsify==1.3.3", "transformers==5.23.0", "numpy==2.4.6", "safetensors==0.8.0"),
        "schedulefree, transformers, safetensors.torch, sparsify.sparse_coder, sparsify.sign_sgd",
    ),
    "sae_lens": Environment(
        ("sae-lens==6.54.12", "transformers==5.23.0", "numpy==2.4.6", "safetensors==0.8.0"),
        "safetensors.torch, sae_lens.training.sae_trainer",
    ),
    "dictionary_learning": Environment(
        ("dictionary-learning==0.1.0", "transformers==5.23.0", "numpy==2.4.6", "safetensors==0.8.0"),
        "safetensors.torch, dictionary_learning.trainers.top_k, dictionary_learning.trainers.batch_top_k",
        without=("torchvision",),
    ),
}


def default_folder() -> Path:
    """$WHISPER_STEER_PEERS, else out/peers."""
    return Path(os.environ.get("WHISPER_STEER_PEERS") or FOLDER)


def interpreter(folder: Path, name: str) -> Path:
    """The environment's Python, whether it exists or not."""
    return folder / name / "bin" / "python"


def variables(device: str) -> dict[str, str]:
    """What a library's process needs to be told to compute on the device.

    sparsify decodes with Triton wherever it can import it, and Triton has nothing for a CPU's tensors.
    """
    return {} if device.startswith("cuda") else {"SPARSIFY_DISABLE_TRITON": "1"}


def missing(folder: Path, name: str) -> str | None:
    """Why the environment cannot be used, in one line; None if it can."""
    if interpreter(folder, name).is_file():
        return None
    return f"no environment at {folder / name}: run make bench-env"


def make(folder: Path, *, torch: str = TORCH, say: Callable[[str], None] = print) -> None:
    """Make or complete every environment.

    torch: requirement installed first, pip options allowed ("torch==2.13.0 --index-url URL").

    Raises UsageError: an environment cannot be made; the others are made before that.
    """
    say(f"making {', '.join(ENVIRONMENTS)} in {folder} (minutes each, the first time)")
    failures = []
    for name, environment in ENVIRONMENTS.items():
        try:
            say(f"{name}: {_make_one(folder / name, environment, shlex.split(torch))}")
        except UsageError as error:
            failures.append(f"{name} ({error})")
    if failures:
        raise UsageError(f"could not make {', '.join(failures)}; the others are ready in {folder}")


def _make_one(folder: Path, environment: Environment, torch: Sequence[str]) -> str:
    """What was done, for the user."""
    wanted = {"torch": list(torch), "requirements": list(environment.requirements)}
    if _read(folder / STAMP) == wanted and interpreter(folder.parent, folder.name).is_file():
        return "ready"
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        need = f"{ROOM / 1e9:.1f} GB are needed: make room"
        raise UsageError(f"{free / 1e9:.1f} GB are free at {folder}, {need}")
    try:
        _install(folder, environment, torch)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # half of one only fills the disk
        raise
    write_whole(folder / STAMP, json.dumps(wanted, indent=1))
    return f"installed {', '.join(environment.requirements)}"


def _install(folder: Path, environment: Environment, torch: Sequence[str]) -> None:
    python = str(interpreter(folder.parent, folder.name).absolute())
    if not Path(python).is_file():
        _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    ours = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    for own in folder.glob("lib*/python*/site-packages"):
        write_whole(own / SHARED, "".join(f"{path}\n" for path in sorted(ours)))
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "install", "--no-cache-dir", *torch])
    pinned = [part for part in torch if part.startswith("torch")]
    _run([*pip, "install", "--no-cache-dir", *environment.requirements, *pinned])
    if environment.without:
        _run([*pip, "uninstall", "--yes", *environment.without])
    _run([python, "-c", f"import {environment.imports}"])


def _read(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_text())
    except (OSError, ValueError):
        return None


def _run(command: Sequence[str]) -> None:
    """Raises UsageError with the last line that the command wrote to stderr."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UsageError(f"cannot run {command[0]}: {error.strerror or error}") from error
    if done.returncode:
        raise UsageError(last_line(done.stderr) or f"{shlex.join(command[:4])} ended with {done.returncode}")


def last_line(text: str) -> str:
    """The last line that is not blank; "" if there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""

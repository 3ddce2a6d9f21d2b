"""What a user gets: the public names, the version, the wheel, the commands of README and Makefile."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import whisper_steer

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

TOP_LEVEL = {
    ".ci", ".gitignore", "LICENSE", "Makefile", "README.md", "benchmarks", "calibration", "docs",
    "pyproject.toml", "sae_weights", "tests", "whisper_steer",
}  # fmt: skip
PUBLIC_NAMES = {
    "__version__", "load_model", "load_steering", "load_sae", "models", "ModelEntry",
    "steer", "handles_of", "Handle", "Steering", "Shift", "LatentEdit", "Gate", "SparseAutoencoder",
    "transcribe", "Transcript", "Segment", "Word", "Suppressed", "LeftOut", "GateVad", "compare",
    "Comparison",
    "load_audio", "find_audio", "bake", "unbake", "Baked", "convert",
    "WhisperSteerError", "UsageError", "AudioError", "ModelError", "FormatError", "MismatchError",
}  # fmt: skip


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=ROOT, env=clean | environment, text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip


# -- names and version ----------------------------------------------------------------------------------


def test_version_is_that_of_pyproject() -> None:
    assert whisper_steer.__version__ == re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)[1]


def test_public_names_are_pinned() -> None:
    assert set(whisper_steer.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(whisper_steer, name) is not None
    assert PUBLIC_NAMES <= set(dir(whisper_steer))


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="transcribble"):
        whisper_steer.transcribble  # noqa: B018


def test_types_are_shipped() -> None:
    assert (Path(whisper_steer.__file__).parent / "py.typed").is_file()
    assert "Typing :: Typed" in PYPROJECT


# -- top level, README, Makefile, CI --------------------------------------------------------------------


def test_no_clutter_at_the_top() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split("/")[0] for line in listed.splitlines()} <= TOP_LEVEL


def test_commands_of_the_readme_exist() -> None:
    named = set(re.findall(r"(?:`|^|^ {4})make ([a-z][a-z-]*)", README, re.MULTILINE))
    assert named <= TARGETS, f"README names {sorted(named - TARGETS)}, the Makefile has {sorted(TARGETS)}"
    for module in set(re.findall(r"python3? -m ((?:calibration|benchmarks|whisper_steer)[\w.]*)", README)):
        assert importlib.util.find_spec(module) is not None, f"README names {module}"


def test_modules_that_the_makefile_runs_exist() -> None:
    modules = set(re.findall(r"\$\(RUN\) ((?:calibration|benchmarks|whisper_steer)[\w.]*)", MAKEFILE))
    assert {"calibration.demo", "benchmarks.tradeoff"} <= modules
    for module in modules:
        assert importlib.util.find_spec(module) is not None, f"the Makefile runs {module}"


@needs_make
def test_every_target_is_well_formed_and_listed() -> None:
    for target in TARGETS:
        planned = make("-n", target)
        assert planned.returncode == 0, planned.stderr
    shown = make("help").stdout
    for target in TARGETS - {"help"}:
        assert f"make {target} " in shown


@needs_make
def test_an_installed_environment_is_used_again(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    for name in ("bin/python", ".installed", ".installed-dev"):
        (venv / name).touch()
    for target in ("demo", "test", "lint", "bench"):
        assert "pip install" not in make("-n", target, f"VENV={venv}").stdout
    # pyproject.toml is newer than what was installed
    long_ago = time.time() - 10 * 365 * 86400
    for name in (".installed", ".installed-dev"):
        os.utime(venv / name, (long_ago, long_ago))
    planned = make("-n", "test", f"VENV={venv}").stdout
    assert planned.index("pip install --quiet torch==") < planned.index("pip install --quiet -e .")
    assert "venv --clear" not in planned


@needs_make
@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "was not found: install Python 3.10 or newer, or name one with PYTHON="),
        ('[ "$1" = -V ] && echo Python 3.8.1; exit 1', "is Python 3.8.1, expected 3.10 or newer"),
        ("case $2 in *ensurepip*) exit 1;; esac", "cannot make virtual environments: install its venv"),
    ],
)
def test_an_unfit_python_is_one_line(tmp_path: Path, script: str | None, message: str) -> None:
    python = tmp_path / "python3"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    result = make("demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert line.startswith(f"error: {python} ") and message in line
    assert not (tmp_path / "venv").exists()


def test_ci_entry_runs_from_anywhere() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
    called = [line.split()[1] for line in lines if line.startswith("make ")]
    assert called == ["test", "lint", "bench-env", "test-slow"] and set(called) <= TARGETS


# -- the wheel ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wheel_holds_everything_and_runs_from_elsewhere(tmp_path: Path) -> None:
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip_wheel, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"whisper_steer-{whisper_steer.__version__}-py3-none-any.whl"
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(installed)
    assert {"whisper_steer/py.typed", "calibration/__init__.py", "benchmarks/tradeoff.py"} <= names
    info = f"whisper_steer-{whisper_steer.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"whisper_steer", "calibration", "benchmarks", info}
    weights = ROOT / "sae_weights"
    shipped = {str(path.relative_to(weights)) for path in weights.rglob("*") if path.is_file()}
    assert {name.split("/_bundled/")[1] for name in names if "/_bundled/" in name} == shipped
    needed = ("whisper.safetensors", "steering.safetensors", "card.json", "demo/noise.flac")
    assert {f"mini.en/{name}" for name in needed} <= shipped
    assert not any("__pycache__" in name for name in names)

    # the unpacked wheel finds its own weights, not those of this checkout
    code = "import whisper_steer.zoo as z; print(z.__file__); print(z.bundled_dir()); z.load_model('mini.en')"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)},
        check=True, capture_output=True, text=True, timeout=300,
    ).stdout.splitlines()  # fmt: skip
    package = installed / "whisper_steer"
    assert [Path(line) for line in found] == [package / "zoo.py", package / "_bundled"]

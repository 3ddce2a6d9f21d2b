"""Environments of the other libraries: made once, taken away when half made, seeing our packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.peers import environments
from whisper_steer.errors import UsageError

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

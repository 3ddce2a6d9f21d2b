"""Checkpoints that survive a kill at any moment: a folder of files appears under its name all at once."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from calibration.collectives import ALONE, Collective
from whisper_steer.errors import FormatError, WhisperSteerError
from whisper_steer.fileformat import load_tensors, save_tensors

KIND = "sae-checkpoint"
_NAME = re.compile(r"step-(\d{9})")


class Checkpoints:
    """Steps' states below a folder: step-000000100/<part>.safetensors.

    A checkpoint is written under a temporary name by all processes, renamed by the first, and only then are
    older ones removed; whatever happens meanwhile, a whole one remains.
    """

    def __init__(self, folder: Path, collective: Collective = ALONE):
        self.folder, self.collective = folder, collective

    def latest(self) -> int | None:
        """The newest checkpoint's step; None without one."""
        if not self.folder.is_dir():
            return None
        steps = [int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return max(steps, default=None)

    def save(self, step: int, parts: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, Any]) -> None:
        """Write this process's parts; every process calls it for the same step.

        Raises FormatError: it cannot be written (a full disk); older checkpoints are untouched.
        """
        unfinished = self.folder / f"unfinished-{step:09d}"
        problem = ""
        if self.collective.first:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.collective.wait()
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            for name, tensors in parts.items():
                save_tensors(
                    unfinished / f"{_file_name(name)}.safetensors",
                    tensors,
                    {**metadata, "kind": KIND, "step": step},
                )
        except (WhisperSteerError, OSError) as error:
            problem = str(error)
        if self.collective.count(int(bool(problem))):
            if self.collective.first:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise FormatError(self._failure(step, problem or "another process could not write its part"))
        self.collective.wait()
        if self.collective.first:
            os.replace(unfinished, self.folder / f"step-{step:09d}")
            _sync(self.folder)
            self._remove_all_but(step)
        self.collective.wait()

    def load(self, step: int, part: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, metadata) of a part. Raises FormatError: missing or damaged."""
        return load_tensors(self.folder / f"step-{step:09d}" / f"{_file_name(part)}.safetensors", KIND)

    def _remove_all_but(self, step: int) -> None:
        for path in self.folder.iterdir():
            if path.name != f"step-{step:09d}":
                shutil.rmtree(path, ignore_errors=True)

    def _failure(self, step: int, problem: str) -> str:
        last = self.latest()
        kept = "there is no earlier one" if last is None else f"the one of step {last} is whole"
        free = shutil.disk_usage(self.folder if self.folder.is_dir() else self.folder.parent).free
        return (
            f"the checkpoint of step {step} could not be written ({problem}; {free / 2**20:.0f} MiB free); "
            f"{kept}: make room and run the same command again"
        )


def _file_name(part: str) -> str:
    return part.replace("/", "--")


def _sync(folder: Path) -> None:
    """Make a rename in `folder` durable (POSIX; elsewhere folders cannot be opened)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""What `make demo` runs: the three bundled clips through the installed command, before and after steering.

    python -m calibration.demo [--alpha 1]

Noise, music and speech come with the model (calibration/bundle.py makes them).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from whisper_steer.errors import ModelError, UsageError, WhisperSteerError
from whisper_steer.fileformat import load_metadata
from whisper_steer.zoo import MODEL_FILE, bundled_dir

CLIPS = ("noise", "music", "speech")


def find_command() -> str:
    """The whisper-steer command of this Python's environment. Raises UsageError if it is not installed."""
    beside = Path(sys.executable).with_name("whisper-steer")
    found = str(beside) if beside.is_file() else shutil.which("whisper-steer")
    if found is None:
        raise UsageError("the whisper-steer command is not installed: run make demo, or pip install .")
    return found


def as_typed(command: str) -> str:
    """The command as a person in this folder would type it."""
    path = Path(command)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def transcripts(command: str, clips: Sequence[Path], model: str, alpha: float) -> list[dict[str, Any]]:
    """What `whisper-steer transcribe --json` prints, one dict per clip.

    Raises WhisperSteerError with the command's own last line when it fails.
    """
    arguments = [command, "transcribe", *map(str, clips), "--model", model, "--alpha", f"{alpha:g}", "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")
        raise WhisperSteerError(f"whisper-steer transcribe ended with {done.returncode}: {reason}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def what_came_out(result: dict[str, Any]) -> str:
    """The words of one result, in quotes, or what was withheld in their place."""
    said = f'"{result["text"].strip()}"' if result["text"].strip() else "(no words)"
    held = []
    for window in result["suppressed"]:
        words = f' "{window["text"].strip()}"' if window["text"] else ""  # none where it was not decoded
        held.append(f"withheld{words}: {100 * window['score']:.1f} % sure that nobody speaks")
    return "\n".join([said, *held])


def demo_folder(model: str) -> Path:
    """Where the bundled clips of a model lie. Raises ModelError if there are none."""
    folder = bundled_dir() / model / "demo"
    missing = [name for name in CLIPS if not (folder / f"{name}.flac").is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}: run python -m calibration.bundle model")
    return folder


def show(model: str, alpha: float) -> None:
    """Prints the three transcripts with alpha 0 and with `alpha`, side by side."""
    folder, command = demo_folder(model), find_command()
    clips = [folder / f"{name}.flac" for name in CLIPS]
    typed = as_typed(command)
    console = Console(width=None if sys.stdout.isatty() else 110)
    results = []
    for strength in (0.0, alpha):
        files = os.path.join(os.path.relpath(folder), "*.flac")
        shown = f"$ {typed} transcribe {files} --model {model} --alpha {strength:g}"
        console.print(shown, highlight=False, markup=False, soft_wrap=True)
        results.append(transcripts(command, clips, model, strength))
    spoken = load_metadata(folder.parent / MODEL_FILE).get("demo", {})
    table = Table(box=SIMPLE_HEAD, show_lines=True)
    table.add_column("clip", no_wrap=True)
    table.add_column("words really spoken")
    table.add_column("before (alpha 0, plain Whisper)")
    table.add_column(f"after (alpha {alpha:g})")
    for clip, before, after in zip(clips, *results, strict=True):
        name = f"{clip.name}\n{before['duration']:.1f} s"
        truth = spoken.get(clip.stem)
        said = "unknown" if truth is None else f'"{truth}"' if truth else "none"
        table.add_row(name, *map(escape, (said, what_came_out(before), what_came_out(after))))
    console.print(table)
    console.print(
        f"Scores and removed words: {typed} compare {os.path.relpath(clips[0])}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m calibration.demo", description="Three bundled clips before and after steering."
    )
    parser.add_argument("--model", default="mini.en", help="a bundled model")
    parser.add_argument("--alpha", type=float, default=1.0, help="strength of the second run")
    options = parser.parse_args(arguments)
    try:
        show(options.model, options.alpha)
    except WhisperSteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

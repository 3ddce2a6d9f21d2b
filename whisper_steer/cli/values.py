"""Values as they are written on the command line: the types of openai-whisper's own command, and alpha.

They are repeated here because importing whisper.utils loads torch. Each raises typer.BadParameter.
"""

from __future__ import annotations

import math

import typer

OUTPUT_FORMATS = ("txt", "vtt", "srt", "tsv", "json", "all")
TASKS = ("transcribe", "translate")


def str2bool(text: str) -> bool:
    """ "True" or "False", in any case."""
    values = {"true": True, "false": False}
    if str(text).lower() not in values:
        raise typer.BadParameter(f"{text!r}: expected True or False")
    return values[str(text).lower()]


def optional_int(text: str) -> int | None:
    """A whole number or None."""
    try:
        return None if text == "None" else int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected a whole number or None") from None


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected a number") from None


def optional_float(text: str) -> float | None:
    """A number or None."""
    try:
        return None if text == "None" else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected a number or None") from None


def alpha(text: str) -> float:
    """A finite number >= 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise typer.BadParameter(
            f"{text!r}: expected a number >= 0; 0 is plain Whisper, 1 the calibrated strength"
        )
    return value


def output_format(text: str) -> str:
    return _choice(text, OUTPUT_FORMATS)


def task(text: str) -> str:
    return _choice(text, TASKS)


def _choice(text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise typer.BadParameter(f"{text!r}: expected one of {', '.join(choices)}")
    return text

"""whisper-steer inspect: what is in an SAE, steering or model file."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from . import options
from .output import print_json

LONGEST = 16  # values of a list that are shown; --json has all


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A .safetensors file, or a folder of them.")],
    as_json: options.Json = False,
) -> None:
    """Show what is in an SAE, steering or compact model file: what it is for, its parts, its measured
    rates."""
    from ..inspection import describe

    descriptions = describe(path)
    if as_json:
        print_json(descriptions if len(descriptions) != 1 else descriptions[0])
        return
    for i, description in enumerate(descriptions):
        if i:
            print()
        _show(description, "")


def _show(value: dict[str, Any], indent: str) -> None:
    """key: value lines, nested ones below their key."""
    width = max((len(str(key)) for key in value), default=0)
    for key, item in value.items():
        if key == "frontier" and item:
            print(f"{indent}{key} (percent and points, on the calibration's validation split)")
            for line in _frontier(item, value.get("profiles") or {}):
                print(f"{indent}  {line}")
        elif isinstance(item, dict) and item:
            print(f"{indent}{key}")
            _show(item, indent + "  ")
        elif isinstance(item, list) and item and all(isinstance(part, dict) for part in item):
            for number, part in enumerate(item):
                print(f"{indent}{key} {number}")
                _show(part, indent + "  ")
        else:
            print(f"{indent}{str(key):<{width}}  {_plain(item)}")


def _frontier(points: list[dict[str, Any]], profiles: dict[str, float]) -> list[str]:
    """A table: one line per point, the profiles' names beside theirs."""
    counts = ("nonspeech_clips", "speech_clips", "unheard_clips")
    names = ("non-speech clips", "speech clips", "not heard")
    counted = any(point[key] is not None for point in points for key in counts)
    head = ("alpha", "threshold", "text-FPR", "WER rise", "at most", "empty speech")
    rows = [(*head, *(names if counted else ()), "profile")]
    for point in points:
        fpr = _percent(point["text_fpr"])
        if point["text_fpr_lo"] is not None and point["text_fpr_hi"] is not None:
            fpr += f" [{_percent(point['text_fpr_lo'])}, {_percent(point['text_fpr_hi'])}]"
        named = ", ".join(name for name, alpha in profiles.items() if math.isclose(alpha, point["alpha"]))
        rates = (_percent(point[key], 2) for key in ("wer_rise", "wer_rise_hi", "empty_speech"))
        clips = (_plain(point[key]) for key in counts if counted)
        rows.append((_plain(point["alpha"]), _plain(point["threshold"]), fpr, *rates, *clips, named))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _percent(fraction: float | None, digits: int = 1) -> str:
    return "-" if fraction is None else f"{100 * fraction:.{digits}f}"


def _plain(item: Any) -> str:
    if item is None or item in ({}, []):
        return "-"
    if isinstance(item, float):
        return f"{item:.6g}"
    if isinstance(item, list):
        pairs = any(isinstance(part, list) for part in item)
        shown = (", " if pairs else " ").join(_plain(part) for part in item[:LONGEST])
        return shown if len(item) <= LONGEST else f"{shown} ... ({len(item)} values, all with --json)"
    return str(item)

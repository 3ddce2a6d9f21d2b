"""whisper-steer inspect: what is in an SAE, steering or model file."""

from __future__ import annotations

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
        if isinstance(item, dict) and item:
            print(f"{indent}{key}")
            _show(item, indent + "  ")
        elif isinstance(item, list) and item and all(isinstance(part, dict) for part in item):
            for number, part in enumerate(item):
                print(f"{indent}{key} {number}")
                _show(part, indent + "  ")
        else:
            print(f"{indent}{str(key):<{width}}  {_plain(item)}")


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

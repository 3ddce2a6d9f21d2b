"""The kernel benchmark's rows as Markdown, and the marked block of docs/kernels.md that they replace.

Nothing but rows comes onto the page: progress goes to stderr, and `replaced` refuses a block with a line that
is none of the table's own, such as one copied from a terminal together with a progress bar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.files import marked_page
from benchmarks.kernels_contestants import OPERATIONS, OURS

BEGIN, END = "<!-- begin: benchmarks.kernels -->", "<!-- end: benchmarks.kernels -->"
COMMAND = "`python -m benchmarks.kernels"
HEADER = "| operation | k | implementation | threads | µs a frame | x dense | x 1 thread | of the roofline |"

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Markdown: one table per device, dtype and size of SAE; within one, by operation and threads.

    "x 1 thread": the same row's time with one thread over this one's; below 1 is a slowdown.
    """
    alone = {_key(row): row["ns_per_frame"] for row in rows if row["threads"] == 1}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_size(row), []).append(row)
    lines: list[str] = []
    for (device, dtype, d, n, frames), group in groups.items():
        lines += [
            "", f"### {device}, {dtype}: d {d}, {n:,} latents, {frames:,} frames", "", HEADER,
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        group.sort(key=lambda row: (OPERATIONS.index(row["op"]), row["threads"]))
        lines += [_line(row, alone.get(_key(row))) for row in group]
    return "\n".join(lines).strip()


def _line(row: Row, alone: float | None) -> str:
    name = f"**{row['impl']}**" if row["impl"] == OURS else row["impl"]
    if row["error"]:
        shown = [f"not run: {cell(row['error'])}", "", "", ""]
    else:
        ratio, limit, taken = row["ratio_to_dense"], row["ratio_to_roofline"], row["ns_per_frame"]
        shown = [
            f"{taken / 1000:.3g}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{alone / taken:.2f}" if alone and row["threads"] > 1 else "",
            "" if limit is None else f"{100 * limit:.0f} %",
        ]
    return f"| {row['op']} | {row['k']} | {name} | {row['threads']} | {' | '.join(shown)} |"


def _size(row: Row) -> tuple[Any, ...]:
    return row["device"], row["dtype"], row["d"], row["n"], row["frames"]


def _key(row: Row) -> tuple[Any, ...]:
    return (*_size(row), row["op"], row["impl"], row["k"])


def cell(text: str) -> str:
    """Any text, a library's last words for instance, as one cell of a table."""
    return " ".join(text.split()).replace("|", "/")


def foreign(block: str) -> list[str]:
    """The lines of a block that no table, heading or headline of ours has."""
    ours = ("### ", "| ", "|-", COMMAND)
    # str.splitlines takes a carriage return, with which progress bars overwrite themselves, for an end
    return [line for line in block.splitlines() if line and not line.startswith(ours)]


def replaced(text: str, block: str) -> str:
    """`text` with what stands between BEGIN and END replaced.

    Raises ValueError: not one such pair of marks; a block with a line that is not of a table.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one {BEGIN} and one {END} behind it")
    if strange := foreign(block):
        raise ValueError(f"the block has a line that is no row of a table: {strange[0][:80]!r}")
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:before]}\n{block.strip()}\n{text[after:]}"


def page(path: Path) -> str:
    """A page with both marks. Raises UsageError: it cannot be read, or lacks them."""
    return marked_page(path, replaced, BEGIN)

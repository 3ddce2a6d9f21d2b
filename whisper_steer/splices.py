"""Small changes to large files: what to put in place of which bytes, and how to take it back.

A patch is a list of splices in ascending order; its inverse restores the original bytes exactly, also where a
splice changed the length. Files are read and written as streams.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import FormatError
from .fileformat import write_atomically

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Splice:
    """At byte `offset` of the source stand the bytes `old`; put `new` there."""

    offset: int
    old: bytes
    new: bytes

    @property
    def end(self) -> int:
        return self.offset + len(self.old)


@dataclass(frozen=True)
class Applied:
    """SHA-256 (hex) of the whole file before and after, and its size in bytes after."""

    sha256_before: str
    sha256_after: str
    size_after: int


def inverse(splices: Sequence[Splice]) -> list[Splice]:
    """The splices that turn the patched file back into the source."""
    back: list[Splice] = []
    grown = 0
    for splice in _ordered(splices):
        back.append(Splice(splice.offset + grown, splice.new, splice.old))
        grown += len(splice.new) - len(splice.old)
    return back


def pieces(source: BinaryIO, splices: Sequence[Splice]) -> Iterator[tuple[bytes, bytes]]:
    """(source bytes, patched bytes) of the whole file, piece by piece; equal where nothing is patched.

    Raises FormatError where the source does not hold a splice's old bytes: the splices were made for another
    file.
    """
    source.seek(0)
    position = 0
    for splice in _ordered(splices):
        while position < splice.offset:
            block = source.read(min(BLOCK_BYTES, splice.offset - position))
            if not block:
                raise FormatError(f"the file ends at byte {position}, expected at least {splice.end}")
            position += len(block)
            yield block, block
        if source.read(len(splice.old)) != splice.old:
            raise FormatError(f"the bytes at {splice.offset} are not those that were expected there")
        position = splice.end
        yield splice.old, splice.new
    while block := source.read(BLOCK_BYTES):
        yield block, block


def patched_bytes(source: BinaryIO, splices: Sequence[Splice]) -> bytes:
    """The whole patched file in memory. Raises FormatError like `pieces`."""
    if any(len(splice.old) != len(splice.new) for splice in splices):
        return b"".join(new for _, new in pieces(source, splices))
    source.seek(0)
    # changed in place: a second copy of a large model would take as long again, and as much memory
    buffer = io.BytesIO(source.read())
    with buffer.getbuffer() as view:
        for splice in splices:
            if view[splice.offset : splice.end] != splice.old:
                raise FormatError(f"the bytes at {splice.offset} are not those that were expected there")
            view[splice.offset : splice.end] = splice.new
    return buffer.getvalue()


def patch_file(source: Path, target: Path, splices: Sequence[Splice]) -> Applied:
    """Write the patched `source` to `target`, atomically; both may be the same path.

    Raises FormatError: not the file that the splices were made for, or it cannot be read or written.
    """
    before, after, size = hashlib.sha256(), hashlib.sha256(), 0

    def patched() -> Iterator[bytes]:
        nonlocal size
        with open(source, "rb") as file:
            for old, new in pieces(file, splices):
                before.update(old)
                after.update(new)
                size += len(new)
                yield new

    try:
        write_atomically(target, patched())
    except FormatError as error:
        raise FormatError(f"{source}: {error}") from error
    return Applied(before.hexdigest(), after.hexdigest(), size)


def _ordered(splices: Sequence[Splice]) -> list[Splice]:
    return sorted(splices, key=lambda splice: splice.offset)

"""Patches of bytes: in memory and in files, the same and different lengths, and back."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisper_steer.errors import FormatError
from whisper_steer.splices import Splice, inverse, patch_file, patched_bytes, pieces

DATA = b"0123456789"


@pytest.mark.parametrize(
    ("splices", "expected"),
    [
        ([], DATA),
        ([Splice(2, b"23", b"ab")], b"01ab456789"),
        ([Splice(8, b"89", b"xy"), Splice(0, b"0", b"z")], b"z1234567xy"),
        ([Splice(2, b"23", b"abcd"), Splice(9, b"9", b"")], b"01abcd45678"),
    ],
)
def test_by_hand(splices: list[Splice], expected: bytes, tmp_path: Path) -> None:
    assert patched_bytes(io.BytesIO(DATA), splices) == expected
    assert patched_bytes(io.BytesIO(expected), inverse(splices)) == DATA
    (tmp_path / "a").write_bytes(DATA)
    patch_file(tmp_path / "a", tmp_path / "b", splices)
    assert (tmp_path / "b").read_bytes() == expected and (tmp_path / "a").read_bytes() == DATA


@given(data=st.binary(min_size=1, max_size=60), places=st.sets(st.integers(0, 59), max_size=6))
def test_in_memory_as_piece_by_piece(data: bytes, places: set[int]) -> None:
    splices = [Splice(at, data[at : at + 1], b"?") for at in sorted(places) if at < len(data)]
    joined = b"".join(new for _, new in pieces(io.BytesIO(data), splices))
    assert patched_bytes(io.BytesIO(data), splices) == joined


def test_the_source_in_memory_stays_as_it_is() -> None:
    """faster-whisper's `files` are read again at the next change of alpha."""
    source = bytes(range(256)) * 64
    before = bytes(bytearray(source))
    assert patched_bytes(io.BytesIO(source), [Splice(0, b"\0", b"x")])[:1] == b"x"
    assert source == before


@pytest.mark.parametrize("splice", [Splice(3, b"x", b"y"), Splice(9, b"9!", b"ab"), Splice(3, b"x", b"long")])
def test_other_bytes_than_expected(splice: Splice) -> None:
    with pytest.raises(FormatError, match=f"bytes at {splice.offset} are not those"):
        patched_bytes(io.BytesIO(DATA), [splice])


def test_one_copy_in_memory(tmp_path: Path) -> None:
    size = 16 << 20
    (tmp_path / "large").write_bytes(bytes(size))
    tracemalloc.start()
    try:
        with open(tmp_path / "large", "rb") as file:
            patched = patched_bytes(file, [Splice(size - 1, b"\0", b"!")])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(patched), patched[-1:]) == (size, b"!") and peak < 1.2 * size

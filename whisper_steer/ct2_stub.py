"""A model.bin with the whole encoder and only a stub of a decoder, to change what is in the encoder quickly.

CTranslate2 loads no encoder alone. A decoder of one block and a few words makes it content, and leaves out
most of the file: of `small` 392 of 967 MB are loaded. What such a model encodes is what the whole one does,
bit for bit; it cannot write words. The full model beside it does that.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .ct2_file import Ct2Layout, Variable, layout_of, opened, packed_string, raw, record_header
from .errors import FormatError
from .floats import added

_LATER_BLOCKS = re.compile(r"decoder/layer_[1-9]\d*/")
_WORDS = re.compile(r"decoder/(embeddings|projection)/")
_EMBEDDINGS = "decoder/embeddings/weight"
_KEPT_WORDS = 16


def encoder_bytes(source: str | Path | bytes, additions: Mapping[str, np.ndarray]) -> bytes:
    """The file for `ctranslate2.models.Whisper(path, files={"model.bin": ...})`, to encode with only.

    source: a model.bin (path, its folder, or the file's bytes). additions: encoder variable -> what is added
    to it, float of its shape; computed in float32, rounded once to the variable's type.

    Raises FormatError (unreadable, no such variable), UsageError (wrong shape, a quantised variable, or a sum
    outside of the range of its type).
    """
    with opened(source) as (file, name):
        layout = layout_of(file, name)
        kept = [key for key in layout.names if not _LATER_BLOCKS.match(key)]
        aliases = _kept_aliases(layout, kept, additions)
        own = [key for key in kept if key not in aliases]
        missing = sorted(set(additions) - set(own))
        if missing:
            raise FormatError(f"{name}: no variable {missing[0]} to add to")
        tail = struct.pack("<I", len(aliases))
        tail += b"".join(packed_string(key) + packed_string(target) for key, target in aliases.items())
        cut = [_cut(layout, key) for key in own]
        file.seek(0)
        head = file.read(layout.count_offset) + struct.pack("<I", len(own))
        headers = [record_header(variable) for variable in cut]
        size = len(head) + sum(map(len, headers)) + sum(variable.nbytes for variable in cut) + len(tail)
        buffer = io.BytesIO()
        buffer.seek(size - 1)
        buffer.write(b"\0")
        # read into place: a second copy of a large model would take as long again, and as much memory
        with buffer.getbuffer() as view:
            view[: len(head)] = head
            at = len(head)
            for header, variable in zip(headers, cut, strict=True):
                view[at : at + len(header)] = header
                at += len(header)
                _fill(view[at : at + variable.nbytes], file, variable, additions.get(variable.name))
                at += variable.nbytes
            view[at:] = tail
        return buffer.getvalue()


def _kept_aliases(layout: Ct2Layout, kept: list[str], additions: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Names that still share the data of another one: both are kept, and neither is changed."""
    names = set(kept) - set(additions)
    return {key: target for key, target in layout.aliases.items() if key in names and target in names}


def _cut(layout: Ct2Layout, key: str) -> Variable:
    """Where the data of `key` lie: the first rows alone of what has a row per word."""
    stored = layout.variable(key)
    shape, nbytes = stored.shape, stored.nbytes
    if _WORDS.match(key) and shape and shape[0] == layout.variable(_EMBEDDINGS).shape[0] > _KEPT_WORDS:
        nbytes = nbytes // shape[0] * _KEPT_WORDS
        shape = (_KEPT_WORDS, *shape[1:])
    return Variable(key, shape, stored.dtype, stored.offset, nbytes)


def _fill(place: memoryview, file: BinaryIO, variable: Variable, addition: np.ndarray | None) -> None:
    if addition is not None:
        place[:] = added(raw(file, variable), variable.dtype, variable.shape, addition, variable.name)
        return
    file.seek(variable.offset)
    done = 0
    while done < len(place):
        count = file.readinto(place[done:])  # type: ignore[attr-defined]
        if not count:
            raise FormatError(f"the file ends inside {variable.name}: convert or fetch the model again")
        done += count

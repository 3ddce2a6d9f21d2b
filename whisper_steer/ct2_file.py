"""CTranslate2's model.bin: its layout, its variables as numpy arrays, and vectors added to some of them.

The file, little-endian (python/ctranslate2/specs/model_spec.py and src/models/model.cc of CTranslate2 4):
u32 binary version; spec name and u32 spec revision; u32 number of variables, each: name, u8 rank, u32
dimensions, u8 type, u32 bytes, data; u32 number of aliases, each: alias, name. A string is a u16 length that
counts its final NUL, the bytes, the NUL. Variables with equal values are stored once, the others are aliases
of it: before one of them is changed, it gets a record of its own.

A quantised weight (i8, i16) is accompanied by `<name>_scale`: value = integer / scale, with a scale per row
(i8) or for the whole tensor (i16). Biases are never quantised.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import FormatError
from .floats import BFLOAT16, added, from_bytes, storage
from .splices import Splice, patched_bytes

MODEL_FILE = "model.bin"
WHISPER_SPEC = "WhisperSpec"
VERSIONS = (4, 5, 6)  # binary versions with this layout
_TYPES = {0: "float32", 1: "int8", 2: "int16", 3: "int32", 4: "float16", 5: BFLOAT16}
_QUANTISED = ("int8", "int16")
_SCALE = "_scale"


@dataclass(frozen=True)
class Variable:
    """Where one variable's data lie: `nbytes` bytes from `offset`, of numpy type `dtype` or "bfloat16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Ct2Layout:
    """What a model.bin holds. aliases: other name -> name of the variable that is stored.

    count_offset: where the number of variables is stored; aliases_offset: where the part with the aliases
    begins, right after the last variable; size: the whole file, bytes.
    """

    version: int
    spec: str
    revision: int
    variables: dict[str, Variable]
    aliases: dict[str, str]
    count_offset: int
    aliases_offset: int
    size: int

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that can be asked for, aliases too."""
        return (*self.variables, *self.aliases)

    def variable(self, name: str) -> Variable:
        """The stored variable behind a name. Raises FormatError naming what there is."""
        stored = self.variables.get(self.aliases.get(name, name))
        if stored is None:
            raise FormatError(f"no variable {name} among the {len(self.names)} of this {self.spec}")
        return stored


def ffn_bias_name(layer: int) -> str:
    """Name of the bias of the second MLP layer of encoder block `layer` (0-based)."""
    return f"encoder/layer_{layer}/ffn/linear_1/bias"


def read_layout(source: str | Path | bytes) -> Ct2Layout:
    """The layout of a model.bin (path, its folder, or the file's bytes); the data are skipped, not read.

    Raises FormatError: missing, truncated, of an unknown version, or not a Whisper.
    """
    with opened(source) as (file, name):
        return layout_of(file, name)


def read_variables(source: str | Path | bytes, prefix: str = "") -> dict[str, np.ndarray]:
    """Variables whose name begins with `prefix`, aliases included, by name.

    Floating-point and quantised ones as float32 (integers divided by their scales; the scales themselves are
    left out), other integers as they are. Raises FormatError like `read_layout`.
    """
    with opened(source) as (file, name):
        layout = layout_of(file, name)
        found: dict[str, np.ndarray] = {}
        for key in layout.names:
            is_scale = key.endswith(_SCALE) and key.removesuffix(_SCALE) in layout.names
            if key.startswith(prefix) and not is_scale:
                found[key] = _values(file, layout, key)
        return found


def addition_splices(source: BinaryIO, additions: Mapping[str, np.ndarray], name: str) -> list[Splice]:
    """Splices that add `additions[variable]` (float, of the variable's shape) to floating-point variables.

    The sum is computed in float32 and rounded once to the variable's type. A variable that shares its data
    with others is given data of its own first, so nothing else changes. `name` is for messages.

    Raises FormatError (unreadable, no such variable), UsageError (wrong shape, quantised variable, or a sum
    outside of the range of the variable's type).
    """
    layout = layout_of(source, name)
    splices: list[Splice] = []
    aliases = dict(layout.aliases)
    new_records: list[bytes] = []
    for key, addition in additions.items():
        stored = layout.variable(key)
        old = raw(source, stored)
        new = added(old, stored.dtype, stored.shape, addition, key)
        if key in layout.aliases:
            del aliases[key]
            new_records.append(_record(key, stored, new))
            continue
        sharing = [alias for alias, target in aliases.items() if target == key and alias not in additions]
        if sharing:  # the first takes over the old data, the others follow it
            new_records.append(_record(sharing[0], stored, old))
            del aliases[sharing[0]]
            aliases.update({alias: sharing[0] for alias in sharing[1:]})
        splices.append(Splice(stored.offset, old, new))
    if new_records:
        splices += _structure_splices(source, layout, new_records, aliases)
    return sorted(splices, key=lambda splice: splice.offset)


def added_bytes(source: str | Path | bytes, additions: Mapping[str, np.ndarray]) -> bytes:
    """A whole patched model.bin in memory, for `ctranslate2.models.Whisper(folder, files={...})`.

    Raises like `addition_splices`.
    """
    with opened(source) as (file, name):
        return patched_bytes(file, addition_splices(file, additions, name))


@contextmanager
def opened(source: str | Path | bytes) -> Iterator[tuple[BinaryIO, str]]:
    """A model.bin (path, its folder, or the file's bytes) opened, and what to call it in messages."""
    if isinstance(source, bytes):
        yield io.BytesIO(source), "model.bin in memory"
        return
    path = Path(source)
    if path.is_dir():
        path = path / MODEL_FILE
    try:
        file = open(path, "rb")
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}): expected {MODEL_FILE}") from error
    with file:
        yield file, str(path)


def layout_of(file: BinaryIO, name: str) -> Ct2Layout:
    """Like `read_layout`, of an open file."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        return _parse_fields(file, name, size)
    except (struct.error, UnicodeDecodeError) as error:
        raise FormatError(f"{name} is truncated or damaged: convert or fetch the model again") from error


def _parse_fields(file: BinaryIO, name: str, size: int) -> Ct2Layout:
    version = _unpack(file, "I")
    if version not in VERSIONS:
        raise FormatError(
            f"{name} is not a CTranslate2 model of version {VERSIONS[0]} to {VERSIONS[-1]} (it begins with "
            f"{version}): convert it with a current CTranslate2"
        )
    spec, revision = _string(file), _unpack(file, "I")
    if spec != WHISPER_SPEC:
        raise FormatError(f"{name} is a CTranslate2 model of kind {spec!r}, expected {WHISPER_SPEC!r}")
    count_offset = file.tell()
    variables: dict[str, Variable] = {}
    for _ in range(_unpack(file, "I")):
        variable = _variable(file, name)
        variables[variable.name] = variable
        if file.seek(variable.nbytes, io.SEEK_CUR) > size:
            raise FormatError(f"{name} is truncated: it ends inside {variable.name}")
    aliases_offset = file.tell()
    aliases = {}
    for _ in range(_unpack(file, "I")):
        alias = _string(file)
        aliases[alias] = _string(file)
    dangling = [target for target in aliases.values() if target not in variables]
    if dangling:
        raise FormatError(f"{name} is damaged: it names {dangling[0]} without storing it")
    return Ct2Layout(version, spec, revision, variables, aliases, count_offset, aliases_offset, size)


def _variable(file: BinaryIO, name: str) -> Variable:
    key = _string(file)
    shape = tuple(_unpack(file, "I") for _ in range(_unpack(file, "B")))
    number, nbytes = _unpack(file, "B"), _unpack(file, "I")
    dtype = _TYPES.get(number)
    if dtype is None:
        raise FormatError(f"{name}: variable {key} has the unknown type {number}")
    if nbytes != int(np.prod(shape, dtype=np.int64)) * storage(dtype).itemsize:
        raise FormatError(f"{name}: variable {key} of shape {shape}, {dtype}, has {nbytes} bytes")
    return Variable(key, shape, dtype, file.tell(), nbytes)


def _structure_splices(
    source: BinaryIO, layout: Ct2Layout, new_records: list[bytes], aliases: Mapping[str, str]
) -> list[Splice]:
    """Splices for more variables and other aliases."""
    count = len(layout.variables)
    source.seek(layout.aliases_offset)
    pairs = b"".join(packed_string(alias) + packed_string(target) for alias, target in aliases.items())
    tail = b"".join(new_records) + struct.pack("<I", len(aliases)) + pairs
    return [
        Splice(layout.count_offset, struct.pack("<I", count), struct.pack("<I", count + len(new_records))),
        Splice(layout.aliases_offset, source.read(), tail),
    ]


def _record(name: str, like: Variable, data: bytes) -> bytes:
    return record_header(replace(like, name=name)) + data


def record_header(variable: Variable) -> bytes:
    """What stands in front of a variable's data."""
    number = next(key for key, dtype in _TYPES.items() if dtype == variable.dtype)
    shape = struct.pack(f"<B{len(variable.shape)}I", len(variable.shape), *variable.shape)
    return packed_string(variable.name) + shape + struct.pack("<BI", number, variable.nbytes)


def _values(file: BinaryIO, layout: Ct2Layout, name: str) -> np.ndarray:
    stored = layout.variable(name)
    values = _values_of(file, stored)
    scale_name = name + _SCALE if name + _SCALE in layout.names else stored.name + _SCALE
    if stored.dtype not in _QUANTISED or scale_name not in layout.names:
        return values  # small integers without a scale are settings, such as the activation function
    scale = _values_of(file, layout.variable(scale_name))
    rows = scale.reshape(scale.shape + (1,) * (values.ndim - scale.ndim))  # per row, or one number
    return values.astype(np.float32) / rows


def _values_of(file: BinaryIO, variable: Variable) -> np.ndarray:
    return from_bytes(raw(file, variable), variable.dtype, variable.shape)


def raw(file: BinaryIO, variable: Variable) -> bytes:
    """The variable's data as they are stored."""
    file.seek(variable.offset)
    return file.read(variable.nbytes)


def _unpack(file: BinaryIO, kind: str) -> int:
    code = "<" + kind
    return int(struct.unpack(code, file.read(struct.calcsize(code)))[0])


def _string(file: BinaryIO) -> str:
    length = _unpack(file, "H")
    data = file.read(length)
    if len(data) != length:
        raise struct.error("truncated string")
    return data.rstrip(b"\0").decode()


def packed_string(text: str) -> bytes:
    """A string as this file format stores it."""
    data = text.encode() + b"\0"
    return struct.pack("<H", len(data)) + data

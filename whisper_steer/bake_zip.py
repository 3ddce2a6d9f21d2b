"""Torch's checkpoints (.pt, pytorch_model.bin) as zips of raw tensors: read without running code of theirs,
and which bytes change when vectors are added to some tensors."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .convert_hf import load_failure
from .errors import FormatError
from .floats import added
from .splices import Splice

if TYPE_CHECKING:
    from torch import Tensor

_LOCAL_HEADER, _CENTRAL_HEADER, _DATA_DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_PAGE = 4096
_LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
)


def zip_tensors(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """Tensors of a .pt or .bin file (or of the dict under the key `inside`), mapped into memory, not read;
    weights_only: no code of it is run. Raises FormatError."""
    import torch

    if not path.is_file():
        raise FormatError(f"{path} is missing")
    if not zipfile.is_zipfile(path):
        raise FormatError(
            f"{path} is not a torch checkpoint, or one of before torch 1.6: load it there and torch.save it"
        )
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        tensors = loaded if inside is None else loaded[inside]
        return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    except _LOAD_ERRORS as error:
        raise FormatError(f"{path} is damaged or not a torch checkpoint ({load_failure(error)})") from error


def zip_splices(
    path: Path, tensors: Mapping[str, Tensor], additions: Mapping[str, np.ndarray]
) -> list[Splice]:
    """Splices that add `additions` to tensors of `zip_tensors`: their bytes, and the CRC-32 of their zip
    entries. Raises FormatError, UsageError."""
    entries = _zip_entries(path)
    offsets = _storage_offsets(path, tensors, entries)
    splices = []
    with open(path, "rb") as file:
        for name, vector in additions.items():
            tensor = tensors.get(name)
            if tensor is None:
                raise FormatError(f"{path} has no tensor {name}")
            storage = tensor.untyped_storage().data_ptr()
            sharing = [key for key, t in tensors.items() if t.untyped_storage().data_ptr() == storage]
            if len(sharing) > 1 or not tensor.is_contiguous():
                raise FormatError(
                    f"{path}: {name} shares its memory with {sharing[-1]}: save it anew with clones"
                )
            entry = entries[offsets[storage]]
            at = tensor.data_ptr() - storage
            file.seek(entry.data)
            old = file.read(entry.size)
            dtype = str(tensor.dtype).removeprefix("torch.")
            length = tensor.numel() * tensor.element_size()
            changed = added(old[at : at + length], dtype, tuple(tensor.shape), vector, name)
            new = old[:at] + changed + old[at + length :]
            splices.append(Splice(entry.data, old, new))
            splices += [Splice(place, _crc(old), _crc(new)) for place in entry.crc_places(file)]
    return splices


@dataclass(frozen=True)
class _ZipEntry:
    """One stored (uncompressed) file in a zip; offsets in bytes from the start of the zip."""

    header: int
    data: int
    size: int
    central: int
    has_descriptor: bool

    def crc_places(self, file: Any) -> list[int]:
        """Where the entry's CRC-32 is stored: in the directory, and before or after the data."""
        if not self.has_descriptor:
            return [self.central + 16, self.header + 14]
        file.seek(self.data + self.size)
        signed = file.read(4) == _DATA_DESCRIPTOR
        return [self.central + 16, self.data + self.size + (4 if signed else 0)]


def _crc(data: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(data))


def _zip_entries(path: Path) -> dict[int, _ZipEntry]:
    """Stored entries by the offset of their data."""
    entries: dict[int, _ZipEntry] = {}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            central = archive.start_dir
            for info in archive.infolist():
                file.seek(central)
                directory = file.read(46)
                file.seek(info.header_offset)
                local = file.read(30)
                if directory[:4] != _CENTRAL_HEADER or local[:4] != _LOCAL_HEADER:
                    raise zipfile.BadZipFile("entries are not where the directory says")
                data = info.header_offset + 30 + sum(struct.unpack("<2H", local[26:30]))
                if info.compress_type == zipfile.ZIP_STORED:
                    descriptor = bool(info.flag_bits & 8)
                    entries[data] = _ZipEntry(info.header_offset, data, info.file_size, central, descriptor)
                central += 46 + sum(struct.unpack("<3H", directory[28:34]))
    except (zipfile.BadZipFile, struct.error, OSError) as error:
        raise FormatError(f"{path} is a damaged zip ({error})") from error
    return entries


def _storage_offsets(
    path: Path, tensors: Mapping[str, Tensor], entries: Mapping[int, _ZipEntry]
) -> dict[int, int]:
    """Address of each tensor's mapped storage -> offset of its zip entry's data.

    The whole file is mapped at one address, which is the one for which every storage falls on an entry of its
    size.
    """
    by_size: dict[int, list[int]] = {}
    for offset, entry in entries.items():
        by_size.setdefault(entry.size, []).append(offset)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    bases: set[int] | None = None
    for address, size in storages.items():
        fitting = {address - offset for offset in by_size.get(size, [])}
        bases = fitting if bases is None else bases & fitting
    pages = {base for base in bases or () if base % _PAGE == 0}
    if len(pages) != 1:
        raise FormatError(f"{path}: its tensors cannot be found in the zip: load it and torch.save it again")
    base = pages.pop()
    return {address: address - base for address in storages}

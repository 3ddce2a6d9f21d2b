"""Which bytes of a model's files change when vectors are added to its encoder blocks' outputs, per format.

A vector added to the output of an encoder block is the same as that vector added to the bias of the block's
second MLP layer, for blocks are pre-norm and residual:

    openai        encoder.blocks.N.mlp.2.bias               .pt (a zip of raw tensors)
    transformers  model.encoder.layers.N.fc2.bias           safetensors (also sharded), pytorch_model.bin
    ct2           encoder/layer_N/ffn/linear_1/bias         model.bin of any quantisation
    ggml          encoder.blocks.N.mlp.2.bias               f32 in files of any quantisation
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import ct2_file, ggml_file
from .errors import FormatError, UsageError
from .floats import added
from .splices import Splice

if TYPE_CHECKING:
    from torch import Tensor

Additions = Mapping[int, np.ndarray]  # layer (0-based) -> (d_model,) float32

_SAFETENSORS_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LOCAL_HEADER, _CENTRAL_HEADER, _DATA_DESCRIPTOR = b"PK\x03\x04", b"PK\x01\x02", b"PK\x07\x08"
_PAGE = 4096
_LOAD_ERRORS = (RuntimeError, EOFError, OSError, LookupError, TypeError, AttributeError, ValueError)


@dataclass(frozen=True)
class Shape:
    """Width and number of blocks of a model's encoder."""

    d_model: int
    n_layers: int


def format_of(path: Path) -> str | None:
    """The format of an existing file or folder, None if it is none of the four."""
    if path.is_dir():
        if (path / ct2_file.MODEL_FILE).is_file():
            return "ct2"
        return "transformers" if (path / "config.json").is_file() else None
    if ggml_file.is_ggml(path):
        return "ggml"
    return "openai" if path.suffix in (".pt", ".pth") else None


def shape_of(path: Path, format: str) -> Shape:
    """Width and depth of the encoder. Raises FormatError."""
    if format == "ct2":
        layout = ct2_file.read_layout(path)
        biases = [name for name in layout.names if re.fullmatch(r"encoder/layer_\d+/ffn/linear_1/bias", name)]
        return Shape(layout.variable(ct2_file.ffn_bias_name(0)).shape[0], len(biases))
    if format == "ggml":
        hparams = ggml_file.read_layout(path).hparams
        return Shape(hparams["n_audio_state"], hparams["n_audio_layer"])
    if format == "transformers":
        config = _json(path / "config.json")
        try:
            return Shape(int(config["d_model"]), int(config["encoder_layers"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{path}: config.json is not a Whisper's (no d_model, encoder_layers)"
            ) from error
    tensors = _openai_tensors(path)
    count = sum(name.startswith("encoder.blocks.") and name.endswith(".mlp.2.bias") for name in tensors)
    return Shape(tensors[ggml_file.mlp_bias_name(0)].shape[0], count)


def splices_of(path: Path, format: str, additions: Additions) -> dict[str, list[Splice]]:
    """Splices by file name (relative to a folder; a file's own name).

    Raises FormatError (unreadable, or without these tensors), UsageError (shapes or range do not fit).
    """
    if format == "openai":
        return {
            path.name: _zip_splices(path, _openai_tensors(path), _named(additions, ggml_file.mlp_bias_name))
        }
    if format == "ggml":
        with open(path, "rb") as file:
            named = _named(additions, ggml_file.mlp_bias_name)
            return {path.name: ggml_file.addition_splices(file, named, str(path))}
    if format == "ct2":
        named = _named(additions, ct2_file.ffn_bias_name)
        with open(path / ct2_file.MODEL_FILE, "rb") as file:
            return {ct2_file.MODEL_FILE: ct2_file.addition_splices(file, named, str(path))}
    return _transformers_splices(path, additions)


def _named(additions: Additions, name: Any) -> dict[str, np.ndarray]:
    return {name(layer): vector for layer, vector in additions.items()}


# ---------- transformers


def fc2_bias_name(layer: int) -> str:
    """transformers' name of the bias of the second MLP layer of encoder block `layer` (0-based)."""
    return f"model.encoder.layers.{layer}.fc2.bias"


def _transformers_splices(folder: Path, additions: Additions) -> dict[str, list[Splice]]:
    from .convert_hf import INDEX_SUFFIX, WEIGHTS, shard_names

    for name in WEIGHTS:
        index = folder / (name + INDEX_SUFFIX)
        if (folder / name).is_file():
            shards = [name]
        elif index.is_file():
            shards = shard_names(index)
        else:
            continue
        return _shard_splices(folder, shards, additions)
    raise FormatError(f"{folder}: no weights; expected {' or '.join(WEIGHTS)}, whole or sharded")


def _shard_splices(folder: Path, shards: list[str], additions: Additions) -> dict[str, list[Splice]]:
    found: dict[str, list[Splice]] = {}
    missing = set(additions)
    for shard in shards:
        path = folder / shard
        safe = path.suffix == ".safetensors"
        header = _safetensors_header(path) if safe else _zip_tensors(path)
        here = {}
        for layer in sorted(missing):
            full = fc2_bias_name(layer)
            name = full if full in header else full.removeprefix("model.")  # some leave the prefix out
            if name in header:
                here[name] = additions[layer]
                missing.discard(layer)
        if here:
            found[shard] = _safetensors_splices(path, here) if safe else _zip_splices(path, header, here)
    if missing:
        raise FormatError(f"{folder} has no tensor {fc2_bias_name(min(missing))}")
    return found


def _safetensors_header(path: Path) -> dict[str, Any]:
    """The header, with "" -> where the data begin."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            return {**header, "": 8 + length}
    except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
        raise FormatError(f"{path} is damaged or not safetensors") from error


def _safetensors_splices(path: Path, additions: Mapping[str, np.ndarray]) -> list[Splice]:
    header = _safetensors_header(path)
    splices = []
    with open(path, "rb") as file:
        for name, vector in additions.items():
            entry = header[name]
            begin, end = entry["data_offsets"]
            file.seek(header[""] + begin)
            old = file.read(end - begin)
            dtype = _SAFETENSORS_TYPES.get(entry["dtype"], entry["dtype"])
            new = added(old, dtype, tuple(entry["shape"]), vector, name)
            splices.append(Splice(header[""] + begin, old, new))
    return splices


# ---------- torch's zip files


def _openai_tensors(path: Path) -> dict[str, Tensor]:
    tensors = _zip_tensors(path, "model_state_dict")
    if ggml_file.mlp_bias_name(0) not in tensors:
        raise FormatError(
            f"{path} is not an openai-whisper checkpoint: it has no {ggml_file.mlp_bias_name(0)}"
        )
    return tensors


def _zip_tensors(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """Tensors of a .pt or .bin file, mapped into memory; weights_only: no code of it is run."""
    import pickle

    import torch

    if not zipfile.is_zipfile(path):
        raise FormatError(f"{path} is not a zip, as torch >= 1.6 writes: load it and torch.save it again")
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        tensors = loaded if inside is None else loaded[inside]
        return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        TypeError,
        AttributeError,
    ) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise FormatError(f"{path} is damaged or not a torch checkpoint ({reason})") from e


def _zip_splices(
    path: Path, tensors: Mapping[str, Tensor], additions: Mapping[str, np.ndarray]
) -> list[Splice]:
    """Splices for tensors inside a zip: their bytes, and the CRC-32 of their zip entries."""
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


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object")
    return value


def fitting(path: Path, format: str, d_model: int, layers: tuple[int, ...], name: str) -> None:
    """Raises UsageError unless the model's encoder has this width and these blocks."""
    shape = shape_of(path, format)
    if shape.d_model != d_model or max(layers) >= shape.n_layers:
        raise UsageError(
            f"{name} is for a d_model of {d_model} and at least {max(layers) + 1} blocks, {path} has "
            f"{shape.d_model} and {shape.n_layers}: pass --steering made for it"
        )

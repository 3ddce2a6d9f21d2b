"""whisper.cpp's model files (ggml-*.bin): layout, reader, writer, and vectors added to some tensors.

Little-endian, as models/convert-pt-to-ggml.py and examples/quantize of whisper.cpp write it: magic
0x67676d6c; eleven i32 (vocabulary, audio context, width, heads, blocks, text context, width, heads, blocks,
mels, file type; + 1000 x the quantisation's version); mel filters (i32 rows, i32 columns, f32 values);
vocabulary (i32 count; each i32 length and bytes); then tensors to the end of the file: i32 dimensions, i32
length of the name, i32 type, the dimensions in reverse, the name, the data. Names and shapes are
openai-whisper's, except that the convolutions' biases are (n, 1).

Tensors of one dimension, those biases and the positional embeddings stay f32 in every file; convolutions are
f16 in all but f32 files; the other matrices have the file's type. whisper.cpp 1.8 loads f32 files but aborts
when it computes their convolutions: they serve to keep exact values, not to transcribe.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from .errors import FormatError, UsageError
from .fileformat import write_atomically
from .floats import added
from .ggml_quant import BY_NAME as TYPE_BY_NAME
from .ggml_quant import TYPES, decode, encode
from .splices import Splice

if TYPE_CHECKING:
    from whisper.model import Whisper

MAGIC = 0x67676D6C
HPARAMS = (
    "n_vocab",
    "n_audio_ctx",
    "n_audio_state",
    "n_audio_head",
    "n_audio_layer",
    "n_text_ctx",
    "n_text_state",
    "n_text_head",
    "n_text_layer",
    "n_mels",
    "ftype",
)
# the file's type, by the type of its matrices; quantised ones add the version (2) of ggml's block layouts
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 2007, "q5_0": 2008}
_MULTILINGUAL_FROM = 51865  # words in the vocabulary of a multilingual model, at least
_CONV_BIASES = ("encoder.conv1.bias", "encoder.conv2.bias")
_ALWAYS_F32 = (*_CONV_BIASES, "encoder.positional_embedding", "decoder.positional_embedding")


@dataclass(frozen=True)
class GgmlTensor:
    """Where one tensor's data lie. shape: openai-whisper's order; kind: "f32", "q5_0", ..."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgmlLayout:
    """What a file holds. hparams: HPARAMS; n_words: size of the stored vocabulary; size: bytes."""

    hparams: dict[str, int]
    n_words: int
    tensors: dict[str, GgmlTensor]
    size: int


def mlp_bias_name(layer: int) -> str:
    """Name of the bias of the second MLP layer of encoder block `layer` (0-based)."""
    return f"encoder.blocks.{layer}.mlp.2.bias"


def is_ggml(path: Path) -> bool:
    """True for a file that begins with ggml's magic number."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == struct.pack("<I", MAGIC)


def read_layout(path: str | Path) -> GgmlLayout:
    """The layout of a file; the tensors' data are skipped.

    Raises FormatError: missing, truncated, of another kind, or with tensors of an unknown type.
    """
    with _opened(path) as file:
        return parse_layout(file, str(path))


def read_tensors(path: str | Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Tensors whose name begins with `prefix`, as float32, by name.

    Raises FormatError like `read_layout`, and for types that ggml_quant does not read.
    """
    with _opened(path) as file:
        layout = parse_layout(file, str(path))
        found = {}
        for name, tensor in layout.tensors.items():
            if name.startswith(prefix):
                file.seek(tensor.offset)
                found[name] = decode(file.read(tensor.nbytes), tensor.kind, tensor.shape)
        return found


def addition_splices(source: BinaryIO, additions: Mapping[str, np.ndarray], name: str) -> list[Splice]:
    """Splices that add `additions[tensor]` (float, of the tensor's shape) to f32 tensors; `name` is for
    messages.

    Raises FormatError (unreadable, no such tensor), UsageError (wrong shape, not f32, or a sum beyond f32).
    """
    layout = parse_layout(source, name)
    splices = []
    for key, addition in additions.items():
        tensor = layout.tensors.get(key)
        if tensor is None:
            raise FormatError(f"{name} has no tensor {key} among its {len(layout.tensors)}")
        if tensor.kind != "f32":
            raise UsageError(f"{key} is {tensor.kind}: only an f32 tensor can be added to")
        source.seek(tensor.offset)
        old = source.read(tensor.nbytes)
        splices.append(Splice(tensor.offset, old, added(old, "float32", tensor.shape, addition, key)))
    return splices


def write_ggml(model: Whisper, path: str | Path, kind: str = "f16") -> None:
    """Write an openai-whisper model for whisper.cpp, atomically; matrices as `kind`, one of FILE_TYPES.

    Raises UsageError (unknown kind, or widths that q8_0 and q5_0 cannot be cut into), FormatError.
    """
    from whisper.audio import mel_filters

    dims = model.dims
    filters = mel_filters("cpu", dims.n_mels).numpy()
    state = {name: value.detach().float().cpu().numpy() for name, value in model.state_dict().items()}
    hparams = {key: int(getattr(dims, key)) for key in HPARAMS[:-1]}
    words = vocabulary(dims.n_vocab)
    write_atomically(Path(path), blocks_of(hparams, filters, words, state, kind))


def blocks_of(
    hparams: Mapping[str, int],
    filters: np.ndarray,
    words: Sequence[bytes],
    state: Mapping[str, np.ndarray],
    kind: str,
) -> Iterator[bytes]:
    """The bytes of a file, piece by piece. filters: (n_mels, 201) float32; state: openai-whisper's names."""
    if kind not in FILE_TYPES:
        raise UsageError(f"ggml type {kind!r}: expected one of {', '.join(FILE_TYPES)}")
    yield struct.pack("<I10i", MAGIC, *(hparams[key] for key in HPARAMS[:-1]))
    yield struct.pack("<3i", FILE_TYPES[kind], *filters.shape) + filters.astype("<f4").tobytes()
    yield struct.pack("<i", len(words))
    yield b"".join(struct.pack("<i", len(word)) + word for word in words)
    for name, values in state.items():
        shaped = values.reshape(-1, 1) if name in _CONV_BIASES else values
        try:
            stored = _stored_kind(name, shaped, kind)
            data = encode(shaped, stored)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
        encoded_name = name.encode()
        header = (shaped.ndim, len(encoded_name), TYPE_BY_NAME[stored].number, *reversed(shaped.shape))
        yield struct.pack(f"<{len(header)}i", *header) + encoded_name + data


def vocabulary(n_vocab: int) -> list[bytes]:
    """The words of openai-whisper's tokenizer with `n_vocab` tokens, without the special ones, by rank."""
    import base64

    import whisper

    name = "multilingual" if n_vocab >= _MULTILINGUAL_FROM else "gpt2"
    path = Path(whisper.__file__).parent / "assets" / f"{name}.tiktoken"
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}): reinstall openai-whisper") from error
    by_rank = {int(rank): base64.b64decode(word) for word, rank in lines}
    return [by_rank[rank] for rank in sorted(by_rank)]


def parse_layout(file: BinaryIO, name: str) -> GgmlLayout:
    """Like `read_layout`, of an open file."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        return _parse(file, name, size)
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise FormatError(f"{name} is truncated or damaged: convert or fetch the model again") from error


def _parse(file: BinaryIO, name: str, size: int) -> GgmlLayout:
    (magic,) = _ints(file, 1)
    if magic != MAGIC:
        raise FormatError(f"{name} is not a whisper.cpp model (it does not begin with ggml's magic number)")
    hparams = dict(zip(HPARAMS, _ints(file, len(HPARAMS)), strict=True))
    rows, columns = _ints(file, 2)
    file.seek(4 * rows * columns, io.SEEK_CUR)
    (n_words,) = _ints(file, 1)
    for _ in range(n_words):
        file.seek(_ints(file, 1)[0], io.SEEK_CUR)
    tensors: dict[str, GgmlTensor] = {}
    while file.tell() < size:
        tensor = _tensor(file, name)
        tensors[tensor.name] = tensor
        if file.seek(tensor.nbytes, io.SEEK_CUR) > size:
            raise FormatError(f"{name} is truncated: it ends inside {tensor.name}")
    return GgmlLayout(hparams, n_words, tensors, size)


def _tensor(file: BinaryIO, name: str) -> GgmlTensor:
    n_dims, length, number = _ints(file, 3)
    shape = tuple(reversed(_ints(file, n_dims)))
    key = file.read(length).decode()
    kind = TYPES.get(number)
    if kind is None or not 1 <= n_dims <= 4:
        raise FormatError(
            f"{name}: tensor {key!r} has type {number} and {n_dims} dimensions, which are unknown"
        )
    nbytes = int(np.prod(shape, dtype=np.int64)) // kind.block * kind.nbytes
    return GgmlTensor(key, shape, kind.name, file.tell(), nbytes)


def _stored_kind(name: str, values: np.ndarray, kind: str) -> str:
    if kind == "f32" or values.ndim < 2 or name in _ALWAYS_F32:
        return "f32"
    return "f16" if values.ndim > 2 else kind


def _opened(path: str | Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise FormatError(
            f"{path} cannot be read ({error.strerror}): expected a whisper.cpp model"
        ) from error


def _ints(file: BinaryIO, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}i", file.read(4 * count))

"""whisper.cpp's files: tensor types against ggml's own quantiser, layout, round trips, vectors added."""

from __future__ import annotations

import ctypes
import importlib.util
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_whisper
from whisper.model import Whisper

from whisper_steer.errors import FormatError, UsageError
from whisper_steer.ggml_file import (
    HPARAMS,
    addition_splices,
    is_ggml,
    mlp_bias_name,
    read_layout,
    read_tensors,
    vocabulary,
    write_ggml,
)
from whisper_steer.ggml_quant import BY_NAME, decode, encode
from whisper_steer.splices import patched_bytes


@pytest.fixture(scope="module")
def model() -> Whisper:
    return make_tiny_whisper()


@pytest.fixture(scope="module")
def written(model: Whisper, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ggml")
    for kind in ("f32", "q5_0"):
        write_ggml(model, folder / f"{kind}.bin", kind)
    return {kind: folder / f"{kind}.bin" for kind in ("f32", "q5_0")}


def test_q8_0_by_hand() -> None:
    values = np.zeros(32, "f4")
    values[:3] = [127.0, -63.5, 1.5]
    data = encode(values, "q8_0")
    assert data[:5] == struct.pack("<e3b", 1.0, 127, -64, 2)  # halves away from zero
    assert len(data) == 34
    assert decode(data, "q8_0", (32,))[:3].tolist() == [127.0, -64.0, 2.0]


def test_q5_0_by_hand() -> None:
    values = np.zeros(32, "f4")
    values[[0, 1, 16]] = [-16.0, 15.0, 3.0]
    data = encode(values, "q5_0")
    scale, high = struct.unpack("<eI", data[:6])
    assert scale == 1.0
    assert high == 0xFFFFFFFE  # -16 is code 0; zero is code 16, whose fifth bit is set
    assert data[6] == 0 | (3 << 4)  # code 0 below, the low bits of code 19 above
    assert data[7] == 15
    assert decode(data, "q5_0", (32,)).tolist() == values.tolist()


@pytest.mark.parametrize("kind", ["q8_0", "q5_0"])
def test_blocks_of_zeros_and_rounding_error(kind: str) -> None:
    assert not decode(encode(np.zeros((2, 32)), kind), kind, (2, 32)).any()
    values = np.random.default_rng(0).normal(size=(40, 64)).astype("f4")
    error = np.abs(decode(encode(values, kind), kind, values.shape) - values).max()
    assert error <= np.abs(values).max() * (0.5 / 127 if kind == "q8_0" else 1 / 16) * 1.01


def _ggml_library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("pywhispercpp")
    origin = None if spec is None else spec.origin
    folder = Path(origin).parents[1] if origin else Path(".")
    found = sorted((folder / "pywhispercpp.libs").glob("libggml-base*.so*"))
    if not found:
        pytest.skip("needs ggml's library, which comes with pip install pywhispercpp")
    return ctypes.CDLL(str(found[0]))


@pytest.mark.parametrize("kind", ["q8_0", "q5_0"])
def test_same_bytes_as_ggml_itself(kind: str) -> None:
    values = (np.random.default_rng(1).normal(size=(16, 96)) * 0.1).astype("f4")
    values[3, :32] = 0
    assert encode(values, kind) == _quantised_by_ggml(values, kind)


@pytest.mark.parametrize("kind", ["q8_0", "q5_0", "q5_1", "q4_0", "q4_1"])
def test_same_values_as_ggml_itself(kind: str) -> None:
    values = (np.random.default_rng(2).normal(size=(4, 64)) + 0.5).astype("f4")
    data = _quantised_by_ggml(values, kind)
    expected = np.empty(values.shape, "f4")
    dequantise = _ggml_library()[f"dequantize_row_{kind}"]
    dequantise.restype = None
    dequantise.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64]
    dequantise(data, expected.ctypes.data, values.size)
    found = decode(data, kind, values.shape)
    assert np.abs(found - expected).max() < 1e-6
    assert 0 < np.abs(found - values).max() < np.abs(values).max() / 6


def test_bf16_by_hand() -> None:
    data = np.array([0x3F80, 0xC049, 0x0000], "<u2").tobytes()  # 1, -3.140625, 0
    assert decode(data, "bf16", (3, 1)).tolist() == [[1.0], [-3.140625], [0.0]]


def _quantised_by_ggml(values: np.ndarray, kind: str) -> bytes:
    """Rows of a multiple of 32 values, in ggml's own words; skips the test without its library."""
    library = _ggml_library()
    rows, columns = values.shape
    theirs = ctypes.create_string_buffer(BY_NAME[kind].nbytes * values.size // 32)
    quantise = library.ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    quantise.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    size = quantise(BY_NAME[kind].number, values.ctypes.data, theirs, 0, rows, columns, None)
    assert size == len(theirs)
    return theirs.raw


def test_encode_refuses() -> None:
    with pytest.raises(UsageError, match="multiple of 32 values, got rows of 33"):
        encode(np.zeros(33), "q8_0")
    with pytest.raises(UsageError, match="'q4_0': expected one of f32, f16"):
        encode(np.zeros(32), "q4_0")
    with pytest.raises(UsageError, match="beyond float16"):
        encode(np.full(32, 1e5), "f16")
    with pytest.raises(FormatError, match="type q6_k cannot be read"):
        decode(b"", "q6_k", (0,))


def test_layout(model: Whisper, written: dict[str, Path]) -> None:
    layout = read_layout(written["q5_0"])
    assert [layout.hparams[key] for key in HPARAMS] == [51864, 1500, 64, 1, 4, 448, 64, 1, 2, 80, 2008]
    assert layout.n_words == 50256
    assert set(layout.tensors) == set(model.state_dict())
    kinds = {name: layout.tensors[name].kind for name in layout.tensors}
    assert kinds["encoder.conv1.weight"] == "f16"
    assert kinds["encoder.blocks.0.mlp.0.weight"] == "q5_0"
    assert kinds["decoder.token_embedding.weight"] == "q5_0"
    assert kinds["encoder.positional_embedding"] == kinds[mlp_bias_name(3)] == "f32"
    assert layout.tensors["encoder.conv1.bias"].shape == (64, 1)
    assert layout.tensors["encoder.blocks.0.mlp.0.weight"].shape == (256, 64)
    assert layout.size == written["q5_0"].stat().st_size
    assert is_ggml(written["q5_0"]) and not is_ggml(Path(__file__))


def test_round_trip_f32(model: Whisper, written: dict[str, Path]) -> None:
    tensors = read_tensors(written["f32"])
    for name, value in model.state_dict().items():
        assert torch.equal(torch.from_numpy(tensors[name]).reshape(value.shape), value), name
    assert list(read_tensors(written["f32"], "encoder.ln_post")) == [
        "encoder.ln_post.weight",
        "encoder.ln_post.bias",
    ]


def test_vocabulary() -> None:
    words = vocabulary(51864)
    assert (len(words), words[0], words[50255]) == (50256, b"!", b" gazed")
    assert len(vocabulary(51865)) == 50257


@pytest.mark.parametrize("kind", ["f32", "q5_0"])
def test_adding_changes_only_that_tensor(written: dict[str, Path], kind: str) -> None:
    vector = np.linspace(-1, 1, 64, dtype="f4")
    name = mlp_bias_name(2)
    with open(written[kind], "rb") as file:
        patched = patched_bytes(file, addition_splices(file, {name: vector}, "x"))
    source = written[kind].read_bytes()
    tensor = read_layout(written[kind]).tensors[name]
    assert len(patched) == len(source)
    assert patched[: tensor.offset] == source[: tensor.offset]
    end = tensor.offset + tensor.nbytes
    assert patched[end:] == source[end:]
    before, after = (np.frombuffer(data[tensor.offset : end], "<f4") for data in (source, patched))
    assert (after == before + vector).all()


def test_adding_refuses(written: dict[str, Path]) -> None:
    with open(written["q5_0"], "rb") as file:
        with pytest.raises(FormatError, match="no tensor encoder.blocks.9.mlp.2.bias"):
            addition_splices(file, {mlp_bias_name(9): np.zeros(64)}, "x")
        with pytest.raises(UsageError, match=r"has shape \(64,\), what is added has \(63,\)"):
            addition_splices(file, {mlp_bias_name(0): np.zeros(63)}, "x")
        with pytest.raises(UsageError, match="is q5_0: only an f32 tensor"):
            addition_splices(file, {"encoder.blocks.0.mlp.0.weight": np.zeros((256, 64))}, "x")


def test_damaged_files(written: dict[str, Path], tmp_path: Path) -> None:
    data = written["q5_0"].read_bytes()
    for cut, message in ((40, "truncated"), (len(data) - 5, "ends inside"), (2, "truncated")):
        (tmp_path / "cut.bin").write_bytes(data[:cut])
        with pytest.raises(FormatError, match=message):
            read_layout(tmp_path / "cut.bin")
    (tmp_path / "other.bin").write_bytes(b"GGUF" + data[4:100])
    with pytest.raises(FormatError, match="not a whisper.cpp model"):
        read_layout(tmp_path / "other.bin")
    with pytest.raises(FormatError, match="cannot be read"):
        read_layout(tmp_path / "none.bin")
    with pytest.raises(UsageError, match="ggml type 'q4_0'"):
        write_ggml(make_tiny_whisper(), tmp_path / "new.bin", "q4_0")
    assert not (tmp_path / "new.bin").exists()
    assert io.BytesIO(data).read(4) == b"lmgg"

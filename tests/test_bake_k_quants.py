"""Baking into k-quantised ggml files, which are not read otherwise: a bias is f32 in every file.

The files are quantised by ggml's own library, which comes with pywhispercpp, and run by whisper.cpp.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_DIMS, make_tiny_whisper
from whisper.model import Whisper

from whisper_steer.bake import bake, unbake
from whisper_steer.errors import FormatError
from whisper_steer.ggml_file import HPARAMS, mlp_bias_name, read_layout, read_tensors, write_ggml
from whisper_steer.ggml_quant import BY_NAME
from whisper_steer.loading import load_path
from whisper_steer.steering import Shift, Steering

WIDTH = 256  # k-types cut rows into blocks of 256
FILE_TYPE = {"q3_k": 2011, "q4_k": 2012, "q5_k": 2013, "q6_k": 2014}
BIAS = mlp_bias_name(1)


@pytest.fixture(scope="module")
def model() -> Whisper:
    dims = replace(
        TINY_DIMS, n_audio_state=WIDTH, n_text_state=WIDTH, n_audio_head=4, n_text_head=4, n_mels=80
    )
    return make_tiny_whisper(dims=dims)


@pytest.fixture
def shift() -> Steering:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    return Steering((Shift(1, vector, 4.0),))


def quantised(data: np.ndarray, kind: str) -> bytes:
    spec = importlib.util.find_spec("pywhispercpp")
    found = sorted(
        (Path(str(spec and spec.origin)).parents[1] / "pywhispercpp.libs").glob("libggml-base*.so*")
    )
    if not found:
        pytest.skip("needs ggml's library, which comes with pip install pywhispercpp")
    quantise = ctypes.CDLL(str(found[0])).ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    quantise.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    out = ctypes.create_string_buffer(data.size // WIDTH * BY_NAME[kind].nbytes)
    assert quantise(BY_NAME[kind].number, data.ctypes.data, out, 0, *data.shape, None) == len(out)
    return out.raw


def k_file(model: Whisper, path: Path, kind: str) -> Path:
    """What whisper.cpp's quantize makes of an f16 file: its matrices become `kind`, all else stays."""
    write_ggml(model, path, "f16")
    whole, values = path.read_bytes(), read_tensors(path)
    layout = read_layout(path)
    first = next(iter(layout.tensors.values()))
    head = bytearray(whole[: first.offset - len(first.name) - 4 * (3 + len(first.shape))])
    struct.pack_into("<i", head, 4 * len(HPARAMS), FILE_TYPE[kind])
    parts = [bytes(head)]
    for name, tensor in layout.tensors.items():
        data, number = whole[tensor.offset : tensor.offset + tensor.nbytes], BY_NAME[tensor.kind].number
        if tensor.kind == "f16" and len(tensor.shape) == 2:
            data, number = quantised(np.ascontiguousarray(values[name]), kind), BY_NAME[kind].number
        sizes = len(tensor.shape), len(name), number, *reversed(tensor.shape)
        parts += [struct.pack(f"<{len(sizes)}i", *sizes), name.encode(), data]
    path.write_bytes(b"".join(parts))
    return path


@pytest.mark.parametrize("kind", ["q5_k"])
def test_bake_changes_the_bias_alone_and_unbake_takes_it_back(
    model: Whisper, shift: Steering, tmp_path: Path, kind: str
) -> None:
    plain = k_file(model, tmp_path / f"ggml-tiny-{kind}.bin", kind)
    baked = bake(plain, alpha=0.5, steering=shift, out=tmp_path / "baked.bin").path
    before, after = plain.read_bytes(), baked.read_bytes()
    place = read_layout(plain).tensors[BIAS]
    assert read_layout(plain).tensors["encoder.blocks.0.mlp.0.weight"].kind == kind
    assert after[: place.offset] == before[: place.offset]
    assert after[place.offset + place.nbytes :] == before[place.offset + place.nbytes :]
    difference = read_tensors(baked, BIAS)[BIAS] - read_tensors(plain, BIAS)[BIAS]
    assert np.abs(difference - shift.edits[0].delta(torch.zeros(1), 0.5).numpy()).max() < 1e-6
    assert unbake(baked).read_bytes() == before


@pytest.mark.parametrize("kind", ["q6_k"])
def test_whisper_cpp_computes_with_what_was_baked(
    model: Whisper, shift: Steering, tmp_path: Path, kind: str
) -> None:
    """A shift in the file moves a logit as the same shift does in a file of f16, but for rounding."""
    calls = pytest.importorskip("_pywhispercpp", reason="pip install pywhispercpp")
    Model = pytest.importorskip("pywhispercpp.model").Model

    def logit(path: Path) -> float:
        loaded = Model(str(path), redirect_whispercpp_logs_to=None)
        sound = np.zeros(16000 * 30, np.float32)
        assert calls.whisper_pcm_to_mel(loaded._ctx, sound, len(sound), 1) == 0
        assert calls.whisper_encode(loaded._ctx, 0, 1) == 0
        assert calls.whisper_decode(loaded._ctx, calls.whisper_token_sot(loaded._ctx), 1, 0, 1) == 0
        return float(calls.whisper_get_logits(loaded._ctx))

    moved = {}
    for name in ("f16", kind):
        plain = tmp_path / f"{name}.bin"
        write_ggml(model, plain, "f16") if name == "f16" else k_file(model, plain, kind)
        baked = bake(plain, alpha=1.0, steering=shift, out=tmp_path / f"{name}-baked.bin").path
        moved[name] = logit(baked) - logit(plain)
    assert abs(moved["f16"]) > 5 and moved[kind] == pytest.approx(moved["f16"], rel=0.15)


def test_conversion_says_that_it_cannot_read_them(model: Whisper, tmp_path: Path) -> None:
    path = k_file(model, tmp_path / "ggml-tiny-q4_k.bin", "q4_k")
    with pytest.raises(FormatError, match="type q4_k cannot be read"):
        load_path(path)

"""CTranslate2's model.bin written by hand: layout, values of every type, vectors added, damage; splices."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest

from whisper_steer.ct2_file import (
    Variable,
    added_bytes,
    addition_splices,
    ffn_bias_name,
    read_layout,
    read_variables,
)
from whisper_steer.ct2_stub import encoder_bytes
from whisper_steer.errors import FormatError, UsageError
from whisper_steer.floats import from_bytes, to_bytes
from whisper_steer.splices import Splice, inverse, patch_file, patched_bytes

BIAS = ffn_bias_name(0)
VALUES = np.array([1.0, -2.0, 0.5], "f4")


def string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def variable(name: str, number: int, shape: tuple[int, ...], data: bytes) -> bytes:
    dims = struct.pack(f"<B{len(shape)}I", len(shape), *shape)
    return string(name) + dims + struct.pack("<BI", number, len(data)) + data


def model_bin(*records: bytes, aliases: dict[str, str] | None = None, spec: str = "WhisperSpec") -> bytes:
    pairs = [string(alias) + string(name) for alias, name in (aliases or {}).items()]
    head = struct.pack("<I", 6) + string(spec) + struct.pack("<II", 3, len(records))
    return head + b"".join(records) + struct.pack("<I", len(pairs)) + b"".join(pairs)


def f32(name: str, values: np.ndarray = VALUES) -> bytes:
    return variable(name, 0, values.shape, values.astype("<f4").tobytes())


def test_layout_by_hand() -> None:
    data = model_bin(f32("a"), variable("b", 1, (), b"\x02"), aliases={"c": "a"})
    layout = read_layout(data)
    assert (layout.version, layout.spec, layout.revision, layout.size) == (6, "WhisperSpec", 3, len(data))
    assert layout.variables["a"] == Variable("a", (3,), "float32", data.index(VALUES.tobytes()), 12)
    assert layout.variables["b"].shape == ()
    assert layout.aliases == {"c": "a"}
    assert layout.names == ("a", "b", "c")
    assert layout.variable("c").name == "a"
    assert ffn_bias_name(11) == "encoder/layer_11/ffn/linear_1/bias"


def test_values_of_every_type() -> None:
    data = model_bin(
        variable("w8", 1, (2, 2), bytes([10, 246, 20, 0])),
        variable("w8_scale", 0, (2,), np.array([10, 5], "<f4").tobytes()),
        variable("w16", 2, (2,), np.array([300, -100], "<i2").tobytes()),
        variable("w16_scale", 0, (), np.array(100, "<f4").tobytes()),
        variable("i", 3, (1,), struct.pack("<i", -7)),
        variable("h", 4, (2,), np.array([0.5, 3], "<f2").tobytes()),
        variable("b", 5, (2,), struct.pack("<2H", 0x3F80, 0xC040)),  # 1 and -3
        variable("setting", 1, (), b"\x03"),
        aliases={"same": "w8"},
    )
    values = read_variables(data)
    assert values["w8"].tolist() == values["same"].tolist() == [[1.0, -1.0], [4.0, 0.0]]
    assert values["w16"].tolist() == [3.0, -1.0]
    assert values["i"].tolist() == [-7]
    assert values["h"].tolist() == [0.5, 3.0]
    assert values["b"].tolist() == [1.0, -3.0]
    assert int(values["setting"]) == 3
    assert sorted(values) == ["b", "h", "i", "same", "setting", "w16", "w8"]
    assert list(read_variables(data, "w1")) == ["w16"]


@pytest.mark.parametrize(("number", "dtype"), [(0, "float32"), (4, "float16"), (5, "bfloat16")])
def test_adding_keeps_everything_else(number: int, dtype: str) -> None:
    stored = to_bytes(VALUES, dtype, "x")
    data = model_bin(f32("before"), variable(BIAS, number, (3,), stored), f32("after"))
    patched = added_bytes(data, {BIAS: np.array([1, 1, 0.25])})
    assert len(patched) == len(data)
    assert read_variables(patched)[BIAS].tolist() == [2.0, -1.0, 0.75]
    at = read_layout(data).variables[BIAS]
    assert patched[: at.offset] + patched[at.offset + at.nbytes :] == (
        data[: at.offset] + data[at.offset + at.nbytes :]
    )


@pytest.mark.parametrize("edited", [["a"], ["x"], ["y"], ["a", "x"], ["x", "y"], ["a", "x", "y"]])
def test_shared_data_are_parted(edited: list[str]) -> None:
    """a is stored, x and y are aliases of it: whichever are edited, the others keep their values."""
    data = model_bin(f32("a"), f32("z", VALUES * 3), aliases={"x": "a", "other": "z", "y": "a"})
    additions = {name: np.full(3, number + 1.0) for number, name in enumerate(edited)}
    splices = addition_splices(io.BytesIO(data), additions, "model.bin")
    patched = patched_bytes(io.BytesIO(data), splices)
    values = read_variables(patched)
    for name in ("a", "x", "y"):
        assert (values[name] == VALUES + additions.get(name, 0)).all()
    assert (values["other"] == VALUES * 3).all()
    assert patched_bytes(io.BytesIO(patched), inverse(splices)) == data


def test_adding_refuses() -> None:
    data = model_bin(f32("a"), variable("w", 1, (3,), b"\1\2\3"), variable("h", 4, (1,), b"\0\0"))
    with pytest.raises(FormatError, match="no variable nothing among the 3"):
        added_bytes(data, {"nothing": VALUES})
    with pytest.raises(UsageError, match="w is int8: only floating-point"):
        added_bytes(data, {"w": VALUES})
    with pytest.raises(UsageError, match=r"a has shape \(3,\), what is added has \(2,\)"):
        added_bytes(data, {"a": VALUES[:2]})
    with pytest.raises(UsageError, match="h would leave the range of float16"):
        added_bytes(data, {"h": np.array([1e6])})


def test_damaged_files(tmp_path: Path) -> None:
    data = model_bin(f32("a"), aliases={"b": "a"})
    for cut in range(len(data)):
        with pytest.raises(FormatError):
            read_layout(data[:cut])
    with pytest.raises(FormatError, match="kind 'TransformerSpec', expected 'WhisperSpec'"):
        read_layout(model_bin(spec="TransformerSpec"))
    with pytest.raises(FormatError, match=r"version 4 to 6 \(it begins with 67324752\)"):
        read_layout(b"PK\3\4" + data)
    with pytest.raises(FormatError, match="unknown type 9"):
        read_layout(model_bin(variable("a", 9, (1,), b"\0")))
    with pytest.raises(FormatError, match=r"of shape \(3,\), float32, has 4 bytes"):
        read_layout(model_bin(variable("a", 0, (3,), b"\0\0\0\0")))
    with pytest.raises(FormatError, match="names c without storing it"):
        read_layout(model_bin(f32("a"), aliases={"b": "c"}))
    with pytest.raises(FormatError, match="cannot be read"):
        read_layout(tmp_path)
    (tmp_path / "model.bin").write_bytes(data)
    assert read_layout(tmp_path) == read_layout(tmp_path / "model.bin") == read_layout(data)


def test_the_stub_of_a_decoder() -> None:
    """All of the encoder, one block and sixteen words of the decoder; what shared data still has its own."""
    rows, bias = np.arange(40, dtype="f4").reshape(20, 2), f32(BIAS)
    data = model_bin(
        f32("decoder/embeddings/weight", rows),
        f32("decoder/embeddings/weight_scale", rows[:, 0]),
        f32("decoder/layer_0/w", rows),
        f32("decoder/layer_1/w", -VALUES),
        bias,
        f32("encoder/w", rows[:, 1]),
        aliases={
            "decoder/projection/weight": "decoder/embeddings/weight",
            "encoder/layer_1/ffn/linear_1/bias": BIAS,
            "encoder/layer_2/ffn/linear_1/bias": "decoder/layer_1/w",
            "decoder/layer_1/v": BIAS,
            "decoder/layer_11/v": BIAS,
        },
    )
    whole, stub = read_variables(data), encoder_bytes(data, {BIAS: np.array([1, 1, 0.25])})
    found = read_variables(stub)
    words = {"decoder/embeddings/weight", "decoder/projection/weight"}
    gone = {"decoder/layer_1/w", "decoder/layer_1/v", "decoder/layer_11/v"}
    assert set(found) == set(whole) - gone
    assert all(np.array_equal(found[name], whole[name][:16]) for name in words)
    assert read_layout(stub).variable("decoder/embeddings/weight_scale").shape == (16,)
    assert found[BIAS].tolist() == [2.0, -1.0, 0.75]
    assert all(np.array_equal(found[name], whole[name]) for name in set(found) - words - {BIAS})
    assert encoder_bytes(stub, {}) == encoder_bytes(encoder_bytes(data, {BIAS: np.array([1, 1, 0.25])}), {})
    with pytest.raises(FormatError, match="no variable decoder/layer_1/w to add to"):
        encoder_bytes(data, {"decoder/layer_1/w": VALUES})
    with pytest.raises(UsageError, match="shape"):
        encoder_bytes(data, {BIAS: VALUES[:2]})


def test_bfloat16_rounds_to_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -1.00390625], "f4")  # halves between two neighbours
    assert from_bytes(to_bytes(values, "bfloat16", "x"), "bfloat16", (4,)).tolist() == [
        1.0,
        1.0,
        1.015625,
        -1.0,
    ]


def test_splices_of_other_lengths_and_back(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"0123456789")
    splices = [Splice(7, b"789", b""), Splice(0, b"", b"<"), Splice(2, b"23", b"twothree")]
    applied = patch_file(source, target, splices)
    assert target.read_bytes() == b"<01twothree456"
    assert applied.size_after == 14
    back = patch_file(target, target, inverse(splices))
    assert target.read_bytes() == b"0123456789"
    assert (back.sha256_before, back.sha256_after) == (applied.sha256_after, applied.sha256_before)


def test_splices_of_another_file(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_bytes(b"0123")
    with pytest.raises(FormatError, match="bytes at 1 are not those that were expected"):
        patch_file(source, tmp_path / "b", [Splice(1, b"x", b"y")])
    with pytest.raises(FormatError, match="the file ends at byte 4"):
        patch_file(source, tmp_path / "b", [Splice(9, b"x", b"y")])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

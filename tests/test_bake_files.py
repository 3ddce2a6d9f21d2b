"""Files that baking must not trust or forget: damaged ones, several sets of weights, stopped runs, names."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_whisper
from safetensors.torch import load_file, save_file
from test_bake import contents
from tiny import shift
from whisper.model import Whisper

from whisper_steer.bake import RECORD_FILE, bake, unbake
from whisper_steer.cli import main
from whisper_steer.convert import convert, default_path, name_of
from whisper_steer.errors import FormatError, UsageError
from whisper_steer.loading import load_path
from whisper_steer.steering import Shift, Steering

STEERING = Steering((shift(1),))  # without a hash: nothing but the header is looked at before
BIAS = "model.encoder.layers.1.fc2.bias"


@pytest.fixture(scope="module")
def model() -> Whisper:
    return make_tiny_whisper()


@pytest.fixture
def folder(model: Whisper, tmp_path: Path) -> Path:
    return convert(model, "transformers", tmp_path / "hf")


def with_header(path: Path, change: object) -> None:
    """Put another header before the same data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(change(header)).encode()  # type: ignore[operator]
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def longer(header: dict) -> dict:
    header[BIAS]["data_offsets"][1] += 4
    return header


def without_offsets(header: dict) -> dict:
    del header[BIAS]["data_offsets"]
    return header


@pytest.mark.parametrize("change", [longer, without_offsets, list, lambda header: {**header, BIAS: 5}, None])
def test_damaged_safetensors(folder: Path, tmp_path: Path, change: object) -> None:
    weights = folder / "model.safetensors"
    if change is None:
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        with_header(weights, change)
    with pytest.raises(FormatError, match="model.safetensors is damaged or not safetensors"):
        bake(folder, steering=STEERING, out=tmp_path / "baked")
    assert sorted(os.listdir(tmp_path)) == ["hf"]


@pytest.mark.parametrize("data", [b"not a zip, but text", b"\x80\x02."])
def test_no_advice_to_run_what_is_in_a_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    for call in (load_path, lambda path: bake(path, steering=STEERING, out=tmp_path / "y.pt")):
        with pytest.raises(FormatError, match="not a torch checkpoint") as caught:
            call(path)
        assert "likely succeed" not in str(caught.value) and "weights_only" not in str(caught.value)
    torch.save({"dims": Path("x")}, path)
    with pytest.raises(FormatError, match=r"it holds a pathlib[\w.]*, not tensors alone"):
        load_path(path)


def test_every_set_of_weights_is_patched_or_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    save_file(weights, folder / "model.fp16.safetensors")
    (folder / "onnx").mkdir()
    for name in ("flax_model.msgpack", "onnx/encoder_model.onnx", "training_args.bin"):
        (folder / name).write_bytes(b"x")
    before = contents(folder)
    done = bake(folder, steering=STEERING, out=tmp_path / "baked")
    gone = ("flax_model.msgpack", "model.fp16.safetensors", "onnx/encoder_model.onnx")
    assert (done.patched, done.left_out) == (("model.safetensors", "pytorch_model.bin"), gone)
    assert [record.getMessage() for record in caplog.records] == [
        f"{done.path}: left out, as it is not baked: {', '.join(gone)}"
    ]
    assert set(contents(done.path)) == {RECORD_FILE, *before} - set(gone)
    wanted = weights[BIAS] + shift(1).direction
    assert torch.equal(load_file(done.path / "model.safetensors")[BIAS], wanted)
    assert torch.equal(torch.load(done.path / "pytorch_model.bin", weights_only=True)[BIAS], wanted)
    assert contents(unbake(done.path)) == {k: v for k, v in before.items() if k not in gone}


def test_unbaking_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path) -> None:
    whole = folder / "model.safetensors"
    weights = load_file(whole)
    shards = {"a.safetensors": {BIAS: weights.pop(BIAS)}, "b.safetensors": weights}
    for name, part in shards.items():
        save_file(part, folder / name)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()
    before = contents(folder)
    two = Steering((shift(1), shift(3)))
    done = bake(folder, steering=two, out=tmp_path / "baked")
    done = bake(done.path, alpha=0.5, steering=two, out=tmp_path / "twice", again=True)
    # killed between the two: one is the original again, and there is what it worked with
    os.remove(done.path / "a.safetensors")
    (done.path / "a.safetensors").write_bytes(before["a.safetensors"])
    (tmp_path / ".twice.unbake").mkdir()
    (tmp_path / ".twice.unbake" / "b.safetensors").write_bytes(b"half of it")
    assert contents(unbake(done.path, tmp_path / "copy")) == before
    assert contents(unbake(done.path)) == before
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_place_that_cannot_be(
    model: Whisper, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    STEERING.save(tmp_path / "s.safetensors")
    baked = bake(folder, steering=STEERING, out=tmp_path / "baked").path
    there = sorted(os.listdir(tmp_path))
    steered = ["--steering", str(tmp_path / "s.safetensors")]
    for out, reason in (
        (tmp_path / "file" / "x", f"as {tmp_path / 'file'} is a file: choose another --out"),
        (tmp_path / "file" / "x" / "y", f"as {tmp_path / 'file'} is a file: choose another --out"),
    ):
        for words in (
            ["bake", "--model", str(folder), *steered],
            ["bake", "--model", str(folder), "--format", "openai", *steered],
            ["convert", "--model", str(folder), "--format", "openai"],
            ["unbake", str(baked)],
        ):
            assert main([*words, "--out", str(out)]) == 2, words
            assert reason in capsys.readouterr().err
    for words, whole in (
        (["bake", "--model", str(folder), *steered], folder),
        (["unbake", str(baked)], baked),
    ):
        assert main([*words, "--out", str(whole / "in" / "side")]) == 2
        assert f"is inside of {whole}: choose an --out elsewhere" in capsys.readouterr().err
        assert not (whole / "in").exists()
    assert main(["unbake", str(tmp_path / "nothere")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nothere'}: no such file or folder\n"
    assert sorted(os.listdir(tmp_path)) == there


def test_names_of_results(model: Whisper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "models--openai--whisper-tiny.en" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    named = convert(model, "transformers", tmp_path / "in" / "tiny.en-v2")
    os.rename(convert(model, "transformers", tmp_path / "in" / "other"), snapshot)
    ggml = convert(model, "ggml", tmp_path / "in" / "ggml-tiny.en.bin", dtype="q8_0")
    names = [bake(path, steering=STEERING).path.name for path in (named, snapshot, ggml)]
    assert names == ["tiny.en-v2-baked", "whisper-tiny.en-baked", "ggml-tiny.en-baked.bin"]
    across = bake(snapshot, format="ggml", steering=STEERING).path.name
    assert across == "ggml-whisper-tiny.en-baked.bin"
    monkeypatch.chdir(named)
    assert default_path(name_of("."), "openai") == Path("tiny.en-v2.pt")


@pytest.mark.parametrize("format", ["openai", "transformers", "ggml"])
def test_what_is_not_finite_is_refused(model: Whisper, tmp_path: Path, format: str) -> None:
    plain = convert(model, format, tmp_path / "plain.pt")
    loud = Steering((Shift(1, torch.full((64,), 30.0), 1.0),))
    with pytest.raises(UsageError, match="beyond the range of float32: choose a smaller alpha"):
        bake(plain, alpha=1e38, steering=loud, out=tmp_path / "baked.pt")
    largest = float(np.finfo(np.float32).max)
    most = Steering((Shift(1, torch.full((64,), largest), 1.0),))
    first = bake(plain, steering=most, out=tmp_path / "first.pt").path
    with pytest.raises(UsageError, match="would leave the range of float32: choose a smaller alpha"):
        bake(first, steering=most, out=tmp_path / "second.pt", again=True)
    assert not (tmp_path / "second.pt").exists()

"""Baking: the same as the hook in every format, exact restoration, refusals."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_whisper
from safetensors.torch import load_file, save_file
from tiny import latents, mel, says, shift
from whisper.model import Whisper

from whisper_steer import ct2_file, ggml_file
from whisper_steer.attach import steer
from whisper_steer.bake import RECORD_FILE, bake, constant_shifts, unbake
from whisper_steer.bake_files import format_of
from whisper_steer.cli import main
from whisper_steer.convert import convert
from whisper_steer.convert_hf import load_transformers
from whisper_steer.errors import FormatError, MismatchError, UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Shift, Steering
from whisper_steer.zoo import load_model

ALPHA = 0.7
# shared/reference/hallucination.md, "Where a shift goes in each runtime": largest difference between what the
# encoder gives with the bias edited and with the hook
REFERENCE = {"openai": 1e-6, "float32": 9.5e-7, "float16": 1.7e-3, "int8": 0.04}
MEL = mel(2, (1, 80, 3000))


@pytest.fixture(scope="module")
def model() -> Whisper:
    return make_tiny_whisper()


@pytest.fixture(scope="module")
def steering(model: Whisper) -> Steering:
    return Steering((shift(3, 2.0), shift(1, 0.5, seed=8)), metadata={**model_metadata(model), "name": "two"})


@pytest.fixture(scope="module")
def hooked(model: Whisper, steering: Steering) -> torch.Tensor:
    """The encoder's output with the steering attached; (1, 1500, 64)."""
    with steer(model, alpha=ALPHA, steering=steering):
        return model.encoder(MEL)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest, relative to the output where that is larger than 1: here it goes up to 6."""
    return float(((found.detach() - wanted).abs() / wanted.abs().clamp(min=1)).max())


@pytest.fixture
def plain(model: Whisper, tmp_path: Path) -> dict[str, Path]:
    return {
        "openai": convert(model, "openai", tmp_path / "plain.pt"),
        "transformers": convert(model, "transformers", tmp_path / "hf"),
        "ggml": convert(model, "ggml", tmp_path / "plain.bin", dtype="q8_0"),
    }


def contents(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def test_constant_shifts(steering: Steering) -> None:
    found = constant_shifts(steering, ALPHA)
    assert sorted(found) == [1, 3]
    assert np.allclose(found[3], 1.4 * shift(3).direction.numpy(), atol=1e-6)
    twice = constant_shifts(Steering((shift(1), shift(1))), 1.0)
    assert np.allclose(twice[1], 2 * shift(1).direction.numpy(), atol=1e-6)
    for bad, words in (
        (Steering((shift(),), says(True)), "has a gate, which depends"),
        (Steering((latents(),)), "has a latent edit, which"),
        (Steering((latents(), shift()), says(True)), "a gate and a latent edit"),
    ):
        with pytest.raises(UsageError, match=words):
            constant_shifts(bad, 1.0)


def test_openai_equals_the_hook(
    plain: dict[str, Path], steering: Steering, hooked: torch.Tensor, tmp_path: Path
) -> None:
    done = bake(plain["openai"], alpha=ALPHA, steering=steering, out=tmp_path / "baked.pt")
    assert (done.format, done.layers, done.patched, done.verified) == ("openai", (1, 3), ("plain.pt",), True)
    assert difference(load_model(done.path, device="cpu").encoder(MEL), hooked) <= REFERENCE["openai"]
    assert done.path.stat().st_size == plain["openai"].stat().st_size
    with zipfile.ZipFile(done.path) as archive:
        assert archive.testzip() is None  # the checksums inside fit


def test_transformers_equals_the_hook(
    plain: dict[str, Path], steering: Steering, hooked: torch.Tensor, tmp_path: Path
) -> None:
    done = bake(plain["transformers"], alpha=ALPHA, steering=steering, out=tmp_path / "baked")
    assert done.patched == ("model.safetensors",)
    assert difference(load_transformers(done.path).encoder(MEL), hooked) <= REFERENCE["openai"]
    assert set(contents(done.path)) == {*contents(plain["transformers"]), RECORD_FILE}
    # what did not change is not stored twice
    assert (done.path / "tokenizer.json").samefile(plain["transformers"] / "tokenizer.json")


def test_shards_and_pickled_weights(
    plain: dict[str, Path], steering: Steering, hooked: torch.Tensor, tmp_path: Path
) -> None:
    whole = plain["transformers"] / "model.safetensors"
    weights = load_file(whole)
    bias = "model.encoder.layers.3.fc2.bias"
    shards = {"a.safetensors": {bias: weights.pop(bias)}, "b.safetensors": weights}
    for name, part in shards.items():
        save_file(part, plain["transformers"] / name)
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (plain["transformers"] / "model.safetensors.index.json").write_text(json.dumps(index))
    whole.unlink()
    done = bake(plain["transformers"], alpha=ALPHA, steering=steering, out=tmp_path / "baked")
    assert done.patched == ("a.safetensors", "b.safetensors")
    assert difference(load_transformers(done.path).encoder(MEL), hooked) <= REFERENCE["openai"]
    for name in (*shards, "model.safetensors.index.json"):
        (plain["transformers"] / name).unlink()
    torch.save(shards["a.safetensors"] | weights, plain["transformers"] / "pytorch_model.bin")
    done = bake(plain["transformers"], alpha=ALPHA, steering=steering, out=tmp_path / "bin")
    assert done.patched == ("pytorch_model.bin",)
    assert difference(load_transformers(done.path).encoder(MEL), hooked) <= REFERENCE["openai"]


def test_ggml_bias_of_a_quantised_file(
    plain: dict[str, Path], model: Whisper, steering: Steering, tmp_path: Path
) -> None:
    done = bake(plain["ggml"], alpha=ALPHA, steering=steering, out=tmp_path / "baked.bin")
    assert done.verified is False  # q8_0: the encoder cannot be recognised
    name = ggml_file.mlp_bias_name(3)
    added = ggml_file.read_tensors(done.path, name)[name] - model.encoder.blocks[3].mlp[2].bias.numpy()
    assert np.allclose(added, constant_shifts(steering, ALPHA)[3], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_ct2_equals_the_hook(
    model: Whisper, steering: Steering, hooked: torch.Tensor, tmp_path: Path, dtype: str
) -> None:
    """The hook is on the model before the conversion, so the runtime's own rounding counts, too: baking adds
    nothing to what it is without. The reference's tolerance is held relative to the largest output."""
    pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    import ctranslate2

    ctranslate2.set_log_level(40)  # float16 is computed as float32 on a CPU: no need to be told

    def encoded(path: Path) -> torch.Tensor:
        loaded = ctranslate2.models.Whisper(str(path))
        return torch.from_numpy(np.array(loaded.encode(ctranslate2.StorageView.from_array(MEL.numpy()))))

    path = convert(model, "ct2", tmp_path / "ct2", dtype=dtype)
    done = bake(path, alpha=ALPHA, steering=steering, out=tmp_path / "baked")
    assert (done.patched, done.verified) == (("model.bin",), dtype == "float32")
    found = encoded(done.path)
    assert difference(found, hooked) <= 1.1 * difference(encoded(path), model.encoder(MEL))
    assert (found - hooked).abs().max() <= REFERENCE[dtype] * hooked.abs().max()
    assert contents(unbake(done.path)) == contents(path)


@pytest.mark.parametrize("kind", ["openai", "transformers", "ggml"])
def test_unbake_restores_every_byte(
    plain: dict[str, Path], steering: Steering, tmp_path: Path, kind: str
) -> None:
    source = plain[kind]
    before = contents(source)
    done = bake(source, alpha=ALPHA, steering=steering, out=tmp_path / f"baked{source.suffix}")
    assert contents(source) == before
    assert contents(done.path) != before
    with pytest.raises(UsageError, match=r"is baked already \(alpha 0.7 of two\): unbake it first"):
        bake(done.path, alpha=1.0, steering=steering, out=tmp_path / "x")
    more = bake(done.path, alpha=0.1, steering=steering, out=tmp_path / f"more{source.suffix}", again=True)
    assert contents(unbake(more.path, tmp_path / f"back{source.suffix}")) == before
    assert unbake(more.path) == more.path
    assert contents(more.path) == before
    assert not more.record.exists()
    with pytest.raises(UsageError, match="no record of baking"):
        unbake(more.path)
    with pytest.raises(UsageError, match="exists already"):
        unbake(done.path, source)
    damaged = done.path if done.path.is_file() else done.path / done.patched[0]
    data = bytearray(damaged.read_bytes())
    data[-9] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(FormatError, match="was changed after it was baked"):
        unbake(done.path)
    assert not [name for name in tmp_path.iterdir() if name.name.startswith(".")]


def test_refusals(plain: dict[str, Path], steering: Steering, model: Whisper, tmp_path: Path) -> None:
    other = Steering((shift(),), metadata={**model_metadata(make_tiny_whisper(seed=5)), "name": "other"})
    with pytest.raises(MismatchError, match="steering is for"):
        bake(plain["openai"], steering=other, out=tmp_path / "x.pt")
    wide = Steering((Shift(0, torch.ones(32), 1.0),))
    with pytest.raises(UsageError, match="d_model of 32 and at least 1 blocks, .* has 64 and 4"):
        bake(plain["ggml"], steering=wide, out=tmp_path / "x.bin")
    with pytest.raises(UsageError, match="exists already"):
        bake(plain["ggml"], steering=steering, out=plain["openai"])
    with pytest.raises(UsageError, match="pass --steering FILE"):
        bake(plain["ggml"], out=tmp_path / "x.bin")
    with pytest.raises(UsageError, match="keeps its types"):
        bake(plain["ggml"], format="ggml", dtype="f16", steering=steering, out=tmp_path / "x.bin")
    with pytest.raises(UsageError, match="format is missing"):
        bake(model, steering=steering)
    with pytest.raises(UsageError, match="alpha is -1"):
        bake(plain["ggml"], alpha=-1, steering=steering)
    half = convert(model, "openai", tmp_path / "half.pt", dtype="float16")
    huge = Steering((Shift(0, torch.full((64,), 1e5), 1.0),))
    with pytest.raises(UsageError, match="leave the range of float16: choose a smaller alpha"):
        bake(half, steering=huge, out=tmp_path / "x.pt")
    (tmp_path / "old.pt").write_bytes(b"not a zip")
    with pytest.raises(FormatError, match="not a torch checkpoint"):
        bake(tmp_path / "old.pt", steering=steering, out=tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists() and not (tmp_path / "x.pt.baked.json").exists()
    assert format_of(plain["ggml"]) == "ggml" and format_of(Path(__file__)) is None


def test_shared_values_in_ct2_get_a_record_of_their_own(model: Whisper, tmp_path: Path) -> None:
    """Equal biases are stored once; baking one of them must leave the others as they are."""
    pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    twin = make_tiny_whisper()
    for block in twin.encoder.blocks:
        block.mlp[2].bias.zero_()
    path = convert(twin, "ct2", tmp_path / "ct2")
    layout = ct2_file.read_layout(path)
    names = [ct2_file.ffn_bias_name(layer) for layer in range(4)]
    assert sum(name in layout.aliases for name in names) >= 3
    for layer in (0, 2):
        one = Steering((Shift(layer, torch.ones(64), 1.0),))
        done = bake(path, steering=one, out=tmp_path / f"baked{layer}")
        values = ct2_file.read_variables(done.path, "encoder/layer_")
        assert [float(values[name].mean()) for name in names] == [float(n == layer) for n in range(4)]
        others = ct2_file.read_variables(path, "")
        for name, value in ct2_file.read_variables(done.path, "").items():
            assert name == names[layer] or (value == others[name]).all()
        assert contents(unbake(done.path)) == contents(path)


def test_commands(steering: Steering, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mini = load_model("mini.en", device="cpu")
    own = Steering((Shift(3, torch.ones(192), 0.5),), metadata={**model_metadata(mini), "name": "ones"})
    own.save(tmp_path / "ones.safetensors")
    out = tmp_path / "mini.bin"
    args = ["--format", "ggml", "--steering", str(tmp_path / "ones.safetensors"), "--out", str(out)]
    assert main(["bake", "--alpha", "2", *args, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["path"], record["layers"], record["verified"]) == (str(out), [3], True)
    name = ggml_file.mlp_bias_name(3)
    added = ggml_file.read_tensors(out, name)[name] - mini.encoder.blocks[3].mlp[2].bias.numpy()
    assert np.allclose(added, 1.0, atol=1e-5)
    assert main(["unbake", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert main(["bake", "--format", "ggml", "--out", str(tmp_path / "y.bin")]) == 2  # its own has a gate
    assert "cannot be baked" in capsys.readouterr().err

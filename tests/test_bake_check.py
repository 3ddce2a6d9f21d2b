"""Whose steering it is: one rule in every format, by how the encoder's weights are stored."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_DIMS, make_tiny_whisper
from safetensors.torch import load_file
from tiny import shift
from whisper.model import Whisper

from whisper_steer.bake import bake, constant_shifts, unbake
from whisper_steer.bake_check import view_of
from whisper_steer.convert import FORMATS, convert
from whisper_steer.errors import MismatchError
from whisper_steer.fileformat import encoder_sha256, model_metadata
from whisper_steer.ggml_file import write_ggml
from whisper_steer.steering import Steering

BIAS = "encoder.blocks.1.mlp.2.bias"
ALPHA = 0.7


@pytest.fixture(scope="module")
def model() -> Whisper:
    """Its weights are float16's, as those of published models."""
    return make_tiny_whisper().half().float()


@pytest.fixture(scope="module")
def own(model: Whisper) -> Steering:
    return Steering((shift(1),), metadata={**model_metadata(model), "name": "own"})


@pytest.fixture(scope="module")
def foreign() -> Steering:
    return Steering((shift(1),), metadata={**model_metadata(make_tiny_whisper(5)), "name": "foreign"})


def stored(model: Whisper, format: str, dtype: str, folder: Path) -> Path:
    path = folder / f"{format}-{dtype}{'.pt' if format == 'openai' else ''}"
    if format == "ct2":
        pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    if format == "ggml":
        write_ggml(model, path, {"float32": "f32", "float16": "f16", "rounded": "q8_0"}[dtype])
        return path
    kinds = {"rounded": "int8" if format == "ct2" else "bfloat16"}
    return convert(model, format, path, dtype=kinds.get(dtype, dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_exact_weights_are_checked(
    model: Whisper, own: Steering, foreign: Steering, tmp_path: Path, format: str
) -> None:
    path = stored(model, format, "float32", tmp_path)
    assert encoder_sha256(view_of(path, format, "x")) == own.metadata["encoder_sha256"]
    with pytest.raises(MismatchError, match=f"steering is for .*{foreign.metadata['encoder_sha256'][:12]}"):
        bake(path, steering=foreign, out=tmp_path / "baked")
    assert not (tmp_path / "baked").exists()
    assert bake(path, steering=own, out=tmp_path / "baked").verified


@pytest.mark.parametrize("format", FORMATS)
def test_float16_is_compared(
    model: Whisper,
    own: Steering,
    foreign: Steering,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    format: str,
) -> None:
    path = stored(model, format, "float16", tmp_path)
    assert bake(path, steering=own, out=tmp_path / "own").verified and not caplog.records
    assert not bake(path, steering=foreign, out=tmp_path / "foreign").verified
    assert "its effect is not calibrated" in caplog.text


@pytest.mark.parametrize("format", FORMATS)
def test_rounded_weights_are_warned_about(
    model: Whisper, own: Steering, tmp_path: Path, caplog: pytest.LogCaptureFixture, format: str
) -> None:
    path = stored(model, format, "rounded", tmp_path)
    assert not bake(path, steering=own, out=tmp_path / "baked").verified
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} is rounded for its runtime: that it is the model of the steering is not checked"
    ]
    narrow = replace(own, metadata={**own.metadata, "n_layers": 6})
    with pytest.raises(MismatchError, match="6 blocks"):
        bake(path, steering=narrow, out=tmp_path / "narrow")


@pytest.mark.parametrize("format", ["openai", "transformers"])
def test_bfloat16_is_patched_in_bfloat16(model: Whisper, own: Steering, tmp_path: Path, format: str) -> None:
    path = stored(model, format, "bfloat16", tmp_path)
    done = bake(path, alpha=ALPHA, steering=own, out=tmp_path / f"baked{path.suffix}")
    if format == "openai":
        found = torch.load(done.path, weights_only=True)["model_state_dict"][BIAS]
    else:
        found = load_file(done.path / "model.safetensors")["model.encoder.layers.1.fc2.bias"]
    bias = model.state_dict()[BIAS].bfloat16().float()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (bias + torch.from_numpy(constant_shifts(own, ALPHA)[1])).bfloat16())
    weights = path if path.is_file() else path / "model.safetensors"
    back = unbake(done.path)
    assert (back if back.is_file() else back / "model.safetensors").read_bytes() == weights.read_bytes()


MEMORY = """
import resource, sys
from whisper_steer.bake import bake
from whisper_steer.steering import Steering
plain, own = Steering.load(sys.argv[2]), Steering.load(sys.argv[3])
def peak(steering, name):
    assert bake(sys.argv[1], steering=steering, out=name).verified == (steering is own)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak(plain, sys.argv[1] + "-plain.pt")
print(peak(own, sys.argv[1] + "-own.pt") - before)
"""


def test_memory_of_the_check(tmp_path: Path) -> None:
    """A .pt is mapped, and of it the encoder alone is looked at. Loading this one takes 150 MB and more."""
    model = make_tiny_whisper(dims=replace(TINY_DIMS, n_audio_state=384, n_text_state=384))
    path = convert(model, "openai", tmp_path / "wide.pt")
    assert path.stat().st_size > 90e6
    edit = replace(shift(1), direction=torch.ones(384))
    Steering((edit,)).save(tmp_path / "plain.safetensors")
    Steering((edit,), metadata=model_metadata(model)).save(tmp_path / "own.safetensors")
    files = [str(path), str(tmp_path / "plain.safetensors"), str(tmp_path / "own.safetensors")]
    done = subprocess.run([sys.executable, "-c", MEMORY, *files], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60  # the encoder has 30

"""What is baked is known wherever it goes: no second baking unasked, through conversions too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_tiny_whisper
from tiny import shift
from whisper.model import Whisper

from whisper_steer import ggml_file
from whisper_steer.bake import bake, constant_shifts, unbake
from whisper_steer.bake_record import read_records
from whisper_steer.cli import main
from whisper_steer.convert import convert
from whisper_steer.errors import MismatchError, UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Steering

BIAS = ggml_file.mlp_bias_name(1)


@pytest.fixture(scope="module")
def model() -> Whisper:
    return make_tiny_whisper()


@pytest.fixture(params=["hash", "no hash"])
def steering(model: Whisper, request: pytest.FixtureRequest) -> Steering:
    metadata = model_metadata(model) if request.param == "hash" else {}
    return Steering((shift(1),), metadata={**metadata, "name": "one"})


@pytest.fixture
def baked(model: Whisper, steering: Steering, tmp_path: Path) -> Path:
    plain = convert(model, "transformers", tmp_path / "hf")
    return bake(plain, alpha=0.7, steering=steering, out=tmp_path / "hf-baked").path


def test_another_format_is_no_way_around(
    model: Whisper, baked: Path, steering: Steering, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"is baked already \(alpha 0.7 of one\): unbake it first"):
        bake(baked, format="ggml", steering=steering, out=tmp_path / "x.bin")
    done = bake(baked, alpha=0.5, format="ggml", steering=steering, out=tmp_path / "more.bin", again=True)
    found = ggml_file.read_tensors(done.path, BIAS)[BIAS]
    wanted = model.state_dict()[BIAS].numpy() + constant_shifts(steering, 1.2)[1]
    assert np.abs(found - wanted).max() < 2e-6
    assert done.verified == (steering.metadata.get("encoder_sha256") is not None)
    assert [(record["alpha"], len(record["files"])) for record in read_records(done.path)] == [
        (0.7, 0), (0.5, 1),
    ]  # fmt: skip


def test_a_conversion_takes_the_record_along(
    baked: Path, steering: Steering, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = convert(baked, "ggml", tmp_path / "moved.bin")
    assert [record.getMessage() for record in caplog.records] == [
        f"{baked} is baked (alpha 0.7 of one), and so is {moved}"
    ]
    with pytest.raises(UsageError, match="is baked already"):
        bake(moved, steering=steering, out=tmp_path / "x.bin")
    with pytest.raises(UsageError, match="before it was converted: unbake the model that it was"):
        unbake(moved)
    before = moved.read_bytes()
    more = bake(moved, steering=steering, out=tmp_path / "more.bin", again=True)
    for target in (None, tmp_path / "back.bin"):
        back = unbake(more.path, target) if target is not None else None
        if back is not None:
            assert back.read_bytes() == before and len(read_records(back)) == 1
    assert unbake(more.path).read_bytes() == before
    assert [record["files"] for record in read_records(more.path)] == [{}]
    folder = convert(moved, "transformers", tmp_path / "folder")
    assert len(read_records(folder)) == 1


def test_another_model_is_refused_by_the_record(
    baked: Path, steering: Steering, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = Steering((shift(1),), metadata={**model_metadata(make_tiny_whisper(5)), "name": "other"})
    if steering.metadata.get("encoder_sha256") is None:
        assert not bake(baked, steering=other, out=tmp_path / "x", again=True).verified
        assert "is not checked" in caplog.text
        return
    with pytest.raises(MismatchError, match="before it was baked: pass --steering made for it"):
        bake(baked, steering=other, out=tmp_path / "x", again=True)


def test_the_record_of_another_file_is_no_record(model: Whisper, baked: Path, tmp_path: Path) -> None:
    """A plain file is not written where the record of a file that is gone would make it look baked."""
    (tmp_path / "new.bin.baked.json").write_text(json.dumps({}))
    with pytest.raises(UsageError, match=r"new.bin.baked.json is the record of another new.bin: remove it"):
        convert(model, "ggml", tmp_path / "new.bin")
    assert main(["unbake", str(tmp_path / "new.bin")]) == 2

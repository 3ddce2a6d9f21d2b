"""bake(approximate=...): what is asked of the fit, when, and what is kept (the fit: test_shift_fit.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny_whisper
from tiny import latents, says, shift

from calibration import shift_fit
from calibration.evaluate import nonspeech_metrics, speech_metrics
from calibration.shift_fit import Measured, ShiftFit, ShiftRefused
from whisper_steer import bake
from whisper_steer.cli import main
from whisper_steer.convert import convert
from whisper_steer.errors import MismatchError, UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Steering

ROWS = tuple(
    Measured(multiple, speech_metrics(["a b"], ["a b"]), nonspeech_metrics([]))
    for multiple in (0.0, None, 1.0)
)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return convert(make_tiny_whisper(), "openai", tmp_path / "plain.pt", dtype="bfloat16")


@pytest.fixture
def steering(tmp_path: Path) -> Path:
    """Gated: it cannot be baked."""
    metadata = {**model_metadata(make_tiny_whisper()), "name": "gated"}
    Steering((latents(2),), says(False), metadata).save(tmp_path / "gated.safetensors")
    return tmp_path / "gated.safetensors"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the fit was asked for; it answers with a Shift of layer 2."""
    calls: list[dict[str, Any]] = []

    def fit(model: str, steering: Steering, folder: str, **options: Any) -> ShiftFit:
        calls.append({"model": model, "steering": steering.name, "folder": folder, **options})
        if not options["anyway"]:
            raise ShiftRefused("no strength of the Shift keeps the WER (plain: WER 0.0%)")
        found = ShiftFit(Steering((shift(2),)), {2: 0.5}, ROWS, 1.0, "it is useless")
        recipe = {"approximates": steering.name, "alpha": options["alpha"]}
        metadata = {"name": "gated-shift", "recipe": recipe, "rates": found.record()}
        return ShiftFit(Steering((shift(2),), metadata=metadata), {2: 0.5}, ROWS, 1.0, found.problem)

    monkeypatch.setattr(shift_fit, "fit_from_folder", fit)
    return calls


def test_what_was_measured_is_in_the_record(
    plain: Path, steering: Path, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    out = tmp_path / "baked.pt"
    done = bake(plain, alpha=0.5, steering=steering, approximate="clips", anyway=True, out=out)
    assert asked == [
        {
            "model": str(plain), "steering": "gated", "folder": "clips", "alpha": 0.5, "anyway": True,
            "download_root": None,
        }
    ]  # fmt: skip
    assert done.fit is not None and (done.fit.problem, done.alpha, done.layers) == (
        "it is useless",
        1.0,
        (2,),
    )
    [record] = json.loads(done.record.read_text())["baked"]
    assert record["rates"] == json.loads(json.dumps(done.fit.record()))
    assert (record["rates"]["problem"], record["recipe"]) == (
        "it is useless", {"approximates": "gated", "alpha": 0.5},
    )  # fmt: skip


def test_nothing_is_fitted_for_what_cannot_be_written(
    plain: Path, steering: Path, tmp_path: Path, asked: list[dict[str, Any]]
) -> None:
    given: dict[str, Any] = {"steering": steering, "approximate": "clips", "anyway": True}
    with pytest.raises(UsageError, match="plain.pt exists already"):
        bake(plain, out=plain, **given)
    with pytest.raises(UsageError, match="is a file: choose another --out"):
        bake(plain, out=plain / "x", **given)
    with pytest.raises(UsageError, match="dtype 'int8' for openai"):
        bake(plain, out=tmp_path / "x", format="openai", dtype="int8", **given)
    other = Steering((latents(2),), metadata={"n_layers": 9, "encoder_sha256": "0" * 64})
    with pytest.raises(MismatchError, match="9 blocks"):
        bake(plain, out=tmp_path / "x", **{**given, "steering": other})
    with pytest.raises(UsageError, match="anyway is for approximate"):
        bake(plain, out=tmp_path / "x", steering=steering, anyway=True)
    assert asked == []


def test_command(
    plain: Path,
    steering: Path,
    tmp_path: Path,
    asked: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["bake", "--model", str(plain), "--steering", str(steering), "--approximate", "clips"]
    words += ["--out", str(tmp_path / "baked.pt")]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == (
        "error: no strength of the Shift keeps the WER (plain: WER 0.0%)"
    )
    assert captured.out == "" and not (tmp_path / "baked.pt").exists()
    assert main([*words, "--anyway", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["fit"]["problem"] == "it is useless" and record["steering"] == "gated-shift"
    assert len(asked) == 2

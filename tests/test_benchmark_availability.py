"""Which methods can run here, found out without loading a model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks import availability, tradeoff
from benchmarks.availability import CALIBRATION, SAES, STEERING, Place, missing
from benchmarks.peers import all_methods

HERE = Place("mini.en")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Modules that are not installed."""
    gone: set[str] = set()
    original = importlib.util.find_spec
    monkeypatch.setattr(
        availability.importlib.util, "find_spec", lambda name: None if name in gone else original(name)
    )
    return gone


def test_packages_and_files_that_are_missing_are_named(
    without: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert missing((SAES, STEERING, CALIBRATION, "sklearn"), HERE) == ""
    without.add("onnxruntime")
    assert missing(("onnxruntime",), HERE) == "onnxruntime is missing: pip install onnxruntime"
    other = Place("small.en")
    assert missing((SAES, STEERING), other) == (
        "no SAEs are kept for small.en (python -m calibration.train makes them); "
        "no steering 'default' is kept for small.en: pass --steering FILE"
    )
    gone = str(tmp_path / "gone.safetensors")
    assert missing((STEERING,), Place("small.en", gone)) == f"--steering {gone}: no such file"
    (tmp_path / "gone.safetensors").touch()
    assert missing((STEERING,), Place("small.en", gone)) == ""
    assert missing((STEERING,), Place("small.en", "mini.en/default")) == ""


def test_clips_are_kept_or_can_be_made(
    without: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHISPER_STEER_CACHE", str(tmp_path))
    assert missing((), HERE) == ""  # a speech synthesiser is installed
    without.add("espeakng_loader")
    assert missing((), HERE) == "the test clips cannot be made: pip install espeakng-loader"
    (tmp_path / "eval-v1" / "test").mkdir(parents=True)
    (tmp_path / "eval-v1" / "test" / "complete").touch()
    assert missing((), HERE) == ""
    assert missing((), Place("mini.en", quick=True)) != ""
    assert (
        missing((CALIBRATION,), HERE) == "the calibration clips cannot be made: pip install espeakng-loader"
    )


def test_every_method_names_what_it_needs() -> None:
    known = {SAES, STEERING, CALIBRATION, *availability.PACKAGES}
    needs = {method.name: getattr(method, "needs", ()) for method in all_methods()}
    assert set().union(*needs.values()) <= known
    assert needs["plain"] == needs["no-speech-prob"] == ()
    assert needs["whisper-steer"] == (STEERING,) and "onnxruntime" in needs["whisper-steer+vad"]
    assert SAES in needs["audiosae-sae-k10"] and SAES not in needs["audiosae-svector"]


def test_the_list_says_which_can_run_and_loads_nothing(
    without: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("whisper_steer.zoo.load_model", None)
    without.add("faster_whisper")
    assert tradeoff.main(["--list", "--model", "small.en"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["plain"].endswith("[can run here]")
    assert lines["silero"].endswith(
        "[cannot run here: faster_whisper is missing: pip install faster-whisper]"
    )
    assert "no steering 'default' is kept for small.en" in lines["whisper-steer"]
    assert "no SAEs are kept for small.en" in lines["followup-latents-k25"]
    assert list(lines) == [method.name for method in all_methods()]

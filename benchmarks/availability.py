"""Whether a method can run here, found out without loading a model: packages, files, audio.

It looks for what is missing and promises nothing: a file may be damaged, and a fit may find no contrast.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SAES, STEERING, CALIBRATION = "SAEs", "a steering", "calibration clips"
PACKAGES = {  # module -> what pip installs
    "faster_whisper": "faster-whisper",
    "onnxruntime": "onnxruntime",
    "ctranslate2": "ctranslate2",
    "transformers": "transformers",
    "sklearn": "scikit-learn",
}


@dataclass(frozen=True)
class Place:
    """Where a method would run. model: its name or path. steering: --steering. quick: the small sets."""

    model: str
    steering: str | None = None
    quick: bool = False


def missing(needs: Iterable[str], place: Place) -> str:
    """What is missing of `needs` (SAES, STEERING, CALIBRATION, modules) and of the clips that are measured,
    with the way out; "" if nothing is."""
    reasons = [reason for need in needs if (reason := _reason(need, place))]
    if reason := _clips("test", place.quick):
        reasons.append(reason)
    return "; ".join(dict.fromkeys(reasons))


def _reason(need: str, place: Place) -> str:
    if need == SAES:
        kept = any(any(folder.glob("layer_[0-9][0-9].safetensors")) for folder in _folders(place.model))
        return "" if kept else f"no SAEs are kept for {place.model} (python -m calibration.train makes them)"
    if need == STEERING:
        return _steering(place)
    if need == CALIBRATION:
        return _clips("calibration", place.quick)
    if importlib.util.find_spec(need) is None:
        return f"{need} is missing: pip install {PACKAGES.get(need, need)}"
    return ""


def _folders(model: str) -> list[Path]:
    """Those that may hold files kept for a model of this name."""
    from whisper_steer.zoo import bundled_dir, cache_dir

    return [root / model for root in (bundled_dir(), cache_dir())]


def _steering(place: Place) -> str:
    given = place.steering or "default"
    if Path(given).expanduser().is_file():
        return ""
    if given.endswith(".safetensors"):
        return f"--steering {given}: no such file"
    model, _, name = given.rpartition("/")
    file = "steering.safetensors" if name in ("default", "steering") else f"steering-{name}.safetensors"
    if any((folder / file).is_file() for folder in _folders(model or place.model)):
        return ""
    return f"no steering {given!r} is kept for {place.model}: pass --steering FILE"


def _clips(split: str, quick: bool) -> str:
    """Synthetic clips are made once and kept; making them takes a speech synthesiser."""
    from calibration.corpus import EVAL_VERSION, cache_dir

    folder = cache_dir() / f"eval-v{EVAL_VERSION}" / (split + ("-quick" if quick else ""))
    if (folder / "complete").exists() or importlib.util.find_spec("espeakng_loader") is not None:
        return ""
    return f"the {split} clips cannot be made: pip install espeakng-loader"

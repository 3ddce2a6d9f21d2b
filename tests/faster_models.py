"""CTranslate2 models for tests: the bundled model, converted once per session."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from whisper_steer.audio import load_audio
from whisper_steer.zoo import bundled_dir

CPU = {"device": "cpu", "cpu_threads": 1}


@cache
def _folder(dtype: str) -> TemporaryDirectory[str]:
    pytest.importorskip("transformers", reason="CTranslate2's converter reads transformers folders")
    from whisper_steer.convert import convert

    folder = TemporaryDirectory(prefix="whisper-steer-test-")
    convert("mini.en", "ct2", Path(folder.name) / "mini.en", dtype=dtype)
    return folder


def mini_ct2(dtype: str = "float32") -> Path:
    """mini.en's CTranslate2 folder."""
    return Path(_folder(dtype).name) / "mini.en"


@cache
def clip(name: str) -> np.ndarray:
    """One of the bundled demo clips: noise, music or speech; (n,) at 16 kHz."""
    return np.asarray(load_audio(bundled_dir() / "mini.en" / "demo" / f"{name}.flac"))

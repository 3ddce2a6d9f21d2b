"""Baking reads files as streams: what it keeps in memory does not grow with them."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY_DIMS, make_tiny_whisper
from tiny import shift

from whisper_steer.bake import bake, unbake
from whisper_steer.convert import FORMATS, convert
from whisper_steer.splices import BLOCK_BYTES
from whisper_steer.steering import Steering

WIDE = replace(TINY_DIMS, n_audio_state=192, n_text_state=192)  # the token embedding alone has 40 MB


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers", reason="CTranslate2's converter needs it")
    model, root = make_tiny_whisper(dims=WIDE), tmp_path_factory.mktemp("wide")
    return {kind: convert(model, kind, root / f"{kind}.pt") for kind in FORMATS}


def largest(path: Path) -> int:
    return max(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))


@pytest.mark.parametrize("kind", FORMATS)
def test_memory_while_baking(plain: dict[str, Path], tmp_path: Path, kind: str) -> None:
    steering = Steering((replace(shift(1), direction=torch.linspace(-1, 1, 192)),))
    size = largest(plain[kind])
    assert size > 20e6  # ggml's matrices are float16
    tracemalloc.start()
    try:
        done = bake(plain[kind], steering=steering, out=tmp_path / "baked.pt")
        unbake(done.path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * BLOCK_BYTES + 2e6 < size

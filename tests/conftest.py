"""Fixtures that every room's tests share: a tiny Whisper with random weights."""

from __future__ import annotations

import copy

import pytest
import torch
import whisper
from whisper.model import ModelDimensions, Whisper

TINY_DIMS = ModelDimensions(80, 1500, 64, 1, 4, 51864, 448, 64, 1, 2)


def make_tiny_whisper(seed: int = 0, dims: ModelDimensions = TINY_DIMS) -> Whisper:
    """A genuine English-only Whisper of 64 x 4 encoder and 64 x 2 decoder blocks with reproducible random
    weights.

    What it writes is meaningless but depends strongly on the audio: the decoder's cross-attention is
    amplified.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = whisper.model.Whisper(dims)
        with torch.no_grad():
            # openai-whisper leaves it uninitialised
            model.decoder.positional_embedding.normal_(std=0.02)
            for block in model.decoder.blocks:
                block.cross_attn.out.weight.mul_(20)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def _tiny_original() -> Whisper:
    return make_tiny_whisper()


@pytest.fixture
def tiny_whisper(_tiny_original: Whisper) -> Whisper:
    """A fresh copy for every test, so that nothing attached to it leaks into another."""
    return copy.deepcopy(_tiny_original)

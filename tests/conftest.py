"""Fixtures that every room's tests share: a tiny Whisper with random weights."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

TINY_DIMS = ModelDimensions(80, 1500, 64, 1, 4, 51864, 448, 64, 1, 2)


def make_tiny_whisper(seed: int = 0, dims: ModelDimensions = TINY_DIMS) -> Whisper:
    """A genuine English-only Whisper (encoder 4 x 64, decoder 2 x 64) with reproducible random weights.

    What it writes is meaningless, but confident and different for different audio: small token embeddings and
    strong convolutions and cross-attention make it listen instead of repeating its last token.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Whisper(dims)
        with torch.no_grad():
            # openai-whisper leaves it uninitialised
            model.decoder.positional_embedding.normal_(std=0.3)
            model.decoder.token_embedding.weight.mul_(0.05)
            model.decoder.ln.weight.mul_(30)
            model.encoder.conv1.weight.mul_(4)
            model.encoder.conv2.weight.mul_(8)
            for block in model.decoder.blocks:
                block.cross_attn.query.weight.mul_(6)
                block.cross_attn.out.weight.mul_(20)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session", autouse=True)
def _quiet_tokenizers() -> None:
    """openai-whisper leaves its vocabulary files to the garbage collector, which warns; both stay cached."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        get_tokenizer(False)
        get_tokenizer(True)


@pytest.fixture(scope="session")
def _tiny_original() -> Whisper:
    return make_tiny_whisper()


@pytest.fixture
def tiny_whisper(_tiny_original: Whisper) -> Whisper:
    """A fresh copy for every test, so that nothing attached to it leaks into another."""
    return copy.deepcopy(_tiny_original)

"""Calm-Whisper (arXiv 2505.12969) without its fine-tuning: the decoder's self-attention heads that
hallucinate most are masked.

Every unit is masked alone while calibration non-speech is decoded greedily; the units are ranked by how much
hallucination is left, and the first few are masked together. A unit is one head of one layer
("calm-whisper"), or the heads of one number in all layers ("calm-whisper-index"), which is how the paper's
abstract counts: 3 of large-v3's 20, a model with 20 heads in each of its 32 layers.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.availability import CALIBRATION
from benchmarks.files import write_whole
from benchmarks.methods import Heard, Method, Setup
from benchmarks.peers.intervention import GROUP, hear_under
from benchmarks.peers.pooling import nonspeech_and_speech

if TYPE_CHECKING:
    from whisper.decoding import DecodingResult
    from whisper.model import Whisper

    from calibration.corpus import Clip

SCAN_CLIPS, QUICK_SCAN_CLIPS = 48, 16
Heads = tuple[tuple[int, int], ...]  # (decoder layer, head), both 0-based


@contextmanager
def masked(model: Whisper, heads: Heads) -> Iterator[None]:
    """Within the block these self-attention heads of the decoder give zeros."""
    width = model.dims.n_text_state // model.dims.n_text_head

    def silence(chosen: Sequence[int], module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        joined = args[0].clone()  # (batch, tokens, heads * width), before the output projection
        for head in chosen:
            joined[..., head * width : (head + 1) * width] = 0
        return (joined,)

    hooks = []
    try:
        for layer in sorted({layer for layer, _ in heads}):
            chosen = [head for other, head in heads if other == layer]
            out = model.decoder.blocks[layer].attn.out
            hooks.append(out.register_forward_pre_hook(partial(silence, chosen)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def single_heads(model: Whisper) -> dict[str, Heads]:
    """Every head of every decoder layer as a unit of its own, by name."""
    layers, heads = range(model.dims.n_text_layer), range(model.dims.n_text_head)
    return {f"layer {layer} head {head}": ((layer, head),) for layer in layers for head in heads}


def head_numbers(model: Whisper) -> dict[str, Heads]:
    """The heads of one number in all decoder layers as a unit, by name."""
    layers = range(model.dims.n_text_layer)
    return {
        f"head {head}": tuple((layer, head) for layer in layers) for head in range(model.dims.n_text_head)
    }


@dataclass(frozen=True, order=True)
class Hallucination:
    """How much non-speech windows hallucinate; compared field by field, so a later one only breaks ties.

    text: share that gives words after openai-whisper's skip rule. hr: share that escapes the rule. words:
    mean number. speech_prob: mean of 1 - no_speech_prob.
    """

    text: float
    hr: float
    words: float
    speech_prob: float


def hallucination(results: Sequence[DecodingResult]) -> Hallucination:
    """Of greedy results on non-speech."""
    from calibration.evaluate import escapes_skip_rule, normalise

    kept = [escapes_skip_rule(result.no_speech_prob, result.avg_logprob) for result in results]
    words = [
        len(normalise(result.text).split()) if stays else 0
        for result, stays in zip(results, kept, strict=True)
    ]
    return Hallucination(
        text=float(np.mean([count > 0 for count in words])),
        hr=float(np.mean(kept)),
        words=float(np.mean(words)),
        speech_prob=float(np.mean([1 - result.no_speech_prob for result in results])),
    )


def ranked(left: Mapping[str, Hallucination]) -> list[str]:
    """Units by the hallucination that is left when they are masked, least first; ties in the given order."""
    return sorted(left, key=lambda unit: left[unit])


def scan(setup: Setup, units: Mapping[str, Heads]) -> dict[str, Hallucination]:
    """What is left when each unit is masked alone, on calibration non-speech. Finished units are kept in
    setup.cache. Raises Unavailable."""
    from tqdm import tqdm

    from calibration.activations import cut_window, padded_log_mel
    from calibration.decoding import greedy_decode
    from calibration.evaluate import evenly
    from calibration.hallucinations import model_crc

    model = setup.model
    clips = evenly(nonspeech_and_speech(setup)[0], QUICK_SCAN_CLIPS if setup.quick else SCAN_CLIPS)
    audios = [setup.audio(clip) for clip in clips]
    crcs = [zlib.crc32(np.ascontiguousarray(audio).tobytes()) for audio in audios]
    digest = hashlib.sha256(repr((model_crc(model), crcs)).encode()).hexdigest()[:16]
    path = setup.cache / f"calm-whisper-{digest}.json"
    known: dict[str, list[float]] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    features: list[Tensor] = []  # by group, encoded when first needed
    for unit in tqdm(units, desc="heads", unit="unit", file=sys.stderr, disable=not setup.progress):
        if unit in known:
            continue
        if not features:
            parameter = next(model.encoder.parameters())
            for start in range(0, len(audios), GROUP):
                mels = [
                    cut_window(*padded_log_mel(audio, model.dims.n_mels), seek=0)
                    for audio in audios[start : start + GROUP]
                ]
                with torch.no_grad():
                    features.append(model.encoder(torch.stack(mels).to(parameter.device, parameter.dtype)))
        with masked(model, units[unit]):
            results = [result for group in features for result in greedy_decode(model, group)]
        known[unit] = list(astuple(hallucination(results)))
        write_whole(path, json.dumps(known, indent=1) + "\n")
    return {unit: Hallucination(*known[unit]) for unit in units}


@dataclass(frozen=True)
class HeadMask:
    """Masks the worst units; strength: how many. by_number: a unit is a head's number in all layers."""

    by_number: bool = False
    strengths: tuple[float, ...] = (1.0, 2.0, 3.0)
    quick_strengths: tuple[float, ...] = (1.0, 3.0)
    needs: tuple[str, ...] = (CALIBRATION,)

    @property
    def name(self) -> str:
        return "calm-whisper-index" if self.by_number else "calm-whisper"

    @property
    def about(self) -> str:
        what = "numbers of heads, each in all layers (as published)," if self.by_number else "single heads"
        return (
            f"Calm-Whisper's masking without its fine-tuning: the decoder self-attention's {what} that "
            "hallucinate most are masked (arXiv 2505.12969); strength: how many"
        )

    def prepare(self, setup: Setup) -> None:
        self.worst(setup, 1)

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        heads = self.worst(setup, int(strength))
        return hear_under(setup, clips, lambda: masked(setup.model, heads))

    def worst(self, setup: Setup, count: int) -> Heads:
        """The heads of the `count` worst units (of all, if there are not as many)."""
        units = (head_numbers if self.by_number else single_heads)(setup.model)
        key = f"scan of {self.name}"
        if key not in setup.memory:
            setup.memory[key] = ranked(scan(setup, units))
        order: Sequence[Any] = setup.memory[key]
        return tuple(head for unit in order[:count] for head in units[unit])


METHODS: tuple[Method, ...] = (HeadMask(), HeadMask(by_number=True, quick_strengths=(1.0,)))

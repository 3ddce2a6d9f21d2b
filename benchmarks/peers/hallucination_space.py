"""Hallucination-space projection at the decoder, built from its description alone.

Known of the method are its name, that it hooks the decoder, that it is used gated, needs some 1,200 clips
and rejects 1-3 % of speech. The space is therefore made as in Nullu (arXiv 2412.13817), which introduced it
for vision-language models: the differences between hidden states of hallucinated and of faithful texts, their
first right singular vectors V, and h' = h - V V^T h. Here: states behind the decoder's upper blocks while
plain Whisper writes about non-speech clips, minus those for speech clips, both of the calibration split.

The gate is our reading: a window is rejected whose first state, seen from the mean of speech, reaches further
into the space than all but a given share of calibration speech does. Where it stays shut nothing changes.
"""

from __future__ import annotations

import hashlib
import io
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.availability import CALIBRATION
from benchmarks.files import write_whole
from benchmarks.methods import Heard, Method, Setup, Unavailable
from benchmarks.peers.intervention import GROUP, hear_under
from benchmarks.peers.pooling import nonspeech_and_speech
from whisper_steer.errors import UsageError

if TYPE_CHECKING:
    from whisper.decoding import DecodingResult
    from whisper.model import Whisper

    from calibration.corpus import Clip

FIT_CLIPS, QUICK_FIT_CLIPS = 240, 48  # of each kind
MIN_CLIPS = 8
RANKS = (1, 2, 4, 8)
GATE_SHARE = 0.03  # of speech: at which the gate's rank is chosen, the upper end of what is published


@dataclass(frozen=True)
class States:
    """Hidden states of one kind of clips.

    Attributes:
        mean: (clips, blocks, d_model) mean over the positions that wrote the text, by decoder block.
        first: (clips, d_model) behind the last block at the position that writes the first token.
        seen: (clips,) bool: of the half that the gate's space is made of; speakers and sources are in one
            half only. None where nobody asks.
    """

    mean: np.ndarray
    first: np.ndarray
    seen: np.ndarray


def space(hallucinated: np.ndarray, faithful: np.ndarray, rank: int) -> np.ndarray:
    """(rank, d_model), orthonormal rows: the first right singular vectors of the differences, row by row.

    hallucinated, faithful: (clips, d_model); the longer one is cut to the shorter one's length.
    """
    count = min(len(hallucinated), len(faithful))
    differences = hallucinated[:count].astype(np.float64) - faithful[:count]
    rows = np.linalg.svd(differences, full_matrices=False)[2]
    return rows[:rank].astype(np.float32)


def reach(states: np.ndarray, centre: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """(n,): squared length of the part of states (n, d_model) - centre that lies in the space."""
    return np.square((states - centre) @ basis.T).sum(axis=1)


@contextmanager
def projected(model: Whisper, spaces: dict[int, Tensor]) -> Iterator[None]:
    """Within the block the outputs of these decoder blocks lose their part in the space: h - V V^T h.

    spaces: block (0-based) -> V^T (rank, d_model), orthonormal rows.
    """

    def hook_of(basis: Tensor) -> Any:
        def project(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            rows = basis.to(output)
            return output - (output @ rows.T) @ rows

        return project

    hooks = []
    try:
        for block, basis in spaces.items():
            hooks.append(model.decoder.blocks[block].register_forward_hook(hook_of(basis)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Gate:
    """Rejects a window if `reach` of its first state is above the limit."""

    centre: np.ndarray
    basis: np.ndarray
    limit: float


@contextmanager
def rejecting(model: Whisper, gate: Gate) -> Iterator[None]:
    """Within the block `model.decode` returns rejected windows without words, as ones that
    `whisper.transcribe` drops by its own rule."""
    from whisper_steer.withholding import skipped

    scores: list[np.ndarray] = []  # of the latest first pass, one per row

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not kwargs.get("kv_cache"):  # nothing is cached yet: a window's first pass
            scores.clear()

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        if not scores:
            first = output[:, -1].detach().float().cpu().numpy()
            scores.append(reach(first, gate.centre, gate.basis))

    original = model.decode

    def decode(*args: Any, **kwargs: Any) -> DecodingResult | list[DecodingResult]:
        results = original(*args, **kwargs)
        several = results if isinstance(results, list) else [results]
        copies = len(scores[0]) // len(several)  # rows per window when several samples are drawn
        judged = [
            skipped(result) if score > gate.limit else result
            for result, score in zip(several, scores[0][::copies], strict=True)
        ]
        return judged if isinstance(results, list) else judged[0]

    replaced = model.__dict__.get("decode")
    hooks = []
    try:
        hooks.append(model.decoder.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(model.decoder.blocks[-1].register_forward_hook(after))
        model.decode = decode  # type: ignore[method-assign]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if replaced is None:
            model.__dict__.pop("decode", None)
        else:
            model.decode = replaced  # type: ignore[method-assign]


# -- fitting --------------------------------------------------------------------------------------------


def states_of(
    model: Whisper, features: Tensor, results: Sequence[DecodingResult]
) -> tuple[np.ndarray, np.ndarray]:
    """(States.mean, States.first) while the results' tokens are read again from features (batch, 1500,
    d_model); the end of the text is read too."""
    from whisper.tokenizer import get_tokenizer

    tokenizer = get_tokenizer(
        model.is_multilingual, num_languages=model.num_languages, language="en", task="transcribe"
    )
    start = list(tokenizer.sot_sequence)
    outputs: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
        for block in model.decoder.blocks
    ]
    means, firsts = [], []
    try:
        for row, result in zip(features, results, strict=True):
            outputs.clear()
            tokens = torch.tensor([start + list(result.tokens)], device=features.device)
            with torch.no_grad():
                model.decoder(tokens, row[None])
            written = torch.stack([output[0, len(start) - 1 :].float() for output in outputs])
            means.append(written.mean(dim=1).cpu().numpy())
            firsts.append(written[-1, 0].cpu().numpy())
    finally:
        for hook in hooks:
            hook.remove()
    return np.stack(means), np.stack(firsts)


def collect(setup: Setup) -> tuple[States, States]:
    """(hallucinated, faithful): calibration non-speech clips about which plain Whisper writes words, and
    speech clips; first windows, greedy; kept in setup.cache. Raises Unavailable (too few of either)."""
    from calibration.evaluate import evenly
    from calibration.hallucinations import model_crc
    from calibration.refit import deal_folds

    count = QUICK_FIT_CLIPS if setup.quick else FIT_CLIPS
    kinds = [evenly(clips, count) for clips in nonspeech_and_speech(setup)]
    clips = [clip for kind in kinds for clip in kind]
    try:
        seen = np.array(deal_folds(clips, 2)) == 0
    except UsageError as error:
        raise Unavailable(f"it is fitted on speech and non-speech clips: {error}") from error
    audios = [np.ascontiguousarray(setup.audio(clip), dtype=np.float32) for clip in clips]
    crcs = [zlib.crc32(audio.tobytes()) for audio in audios]
    digest = hashlib.sha256(repr((model_crc(setup.model), crcs)).encode()).hexdigest()[:16]
    path = setup.cache / f"hallucination-space-{digest}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as arrays:
            mean, first, wrote = arrays["mean"], arrays["first"], arrays["wrote"]
    else:
        mean, first, wrote = _read(setup, audios)
        buffer = io.BytesIO()
        np.savez(buffer, mean=mean, first=first, wrote=wrote)
        write_whole(path, buffer.getvalue())
    is_nonspeech = np.arange(len(clips)) < len(kinds[0])
    chosen = [wrote & is_nonspeech, wrote & ~is_nonspeech]
    for rows, kind in zip(chosen, ("non-speech", "speech"), strict=True):
        if rows.sum() < MIN_CLIPS:
            raise Unavailable(
                f"plain Whisper writes words about {int(rows.sum())} of the {kind} clips, the space needs "
                f"{MIN_CLIPS}"
            )
    hallucinated, faithful = (States(mean[rows], first[rows], seen[rows]) for rows in chosen)
    if any(len(set(states.seen.tolist())) < 2 for states in (hallucinated, faithful)):
        raise Unavailable("all clips about which plain Whisper writes words are of one half of the speakers")
    return hallucinated, faithful


def _read(setup: Setup, audios: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(States.mean, States.first, wrote (clips,) bool: words that the skip rule keeps) of plain Whisper."""
    from tqdm import tqdm

    from calibration.activations import cut_window, padded_log_mel
    from calibration.decoding import greedy_decode
    from calibration.evaluate import escapes_skip_rule, normalise

    model = setup.model
    found: list[tuple[np.ndarray, np.ndarray]] = []
    wrote: list[bool] = []
    starts = range(0, len(audios), GROUP)
    for start in tqdm(
        starts, desc="decoder states", unit="group", file=sys.stderr, disable=not setup.progress
    ):
        mels = [
            cut_window(*padded_log_mel(audio, model.dims.n_mels), seek=0)
            for audio in audios[start : start + GROUP]
        ]
        results = greedy_decode(model, torch.stack(mels))
        features = torch.stack([result.audio_features for result in results])
        found.append(states_of(model, features, results))
        wrote += [
            bool(normalise(result.text)) and escapes_skip_rule(result.no_speech_prob, result.avg_logprob)
            for result in results
        ]
    return (
        np.concatenate([mean for mean, _ in found]),
        np.concatenate([first for _, first in found]),
        np.array(wrote),
    )


def fit_gate(hallucinated: States, speech: States, share: float) -> Gate:
    """A gate that opens for `share` of speech, from first states.

    The space is made of the half of each kind that is marked as seen; the limit is set on the speech clips of
    the other half, at the rank with which most of the unseen hallucinated clips are rejected (the smallest of
    equal ones).
    """
    (known_bad, new_bad), (known, new) = (_halves(states) for states in (hallucinated, speech))
    centre = known.mean(axis=0)

    def gate_of(rank: int, share: float) -> Gate:
        basis = space(known_bad, known, rank)
        return Gate(centre, basis, float(np.quantile(reach(new, centre, basis), 1 - share)))

    def rejected(rank: int) -> float:
        gate = gate_of(rank, GATE_SHARE)
        return float((reach(new_bad, centre, gate.basis) > gate.limit).mean())

    return gate_of(max(RANKS, key=rejected), share)


def _halves(states: States) -> tuple[np.ndarray, np.ndarray]:
    """First states, seen and unseen."""
    return states.first[states.seen], states.first[~states.seen]


# -- methods --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projection:
    """Projects every window; strength: the rank of the space."""

    name: str = "hallucination-space"
    strengths: tuple[float, ...] = tuple(float(rank) for rank in RANKS)
    quick_strengths: tuple[float, ...] = (4.0,)
    needs: tuple[str, ...] = (CALIBRATION,)
    about: str = (
        "Hallucination-space projection at the decoder's upper half, built from its description (space as in "
        "arXiv 2412.13817), without a gate; strength: its rank"
    )

    def prepare(self, setup: Setup) -> None:
        _states(setup)

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        hallucinated, faithful = _states(setup)
        blocks = hallucinated.mean.shape[1]
        spaces = {
            block: torch.from_numpy(
                space(hallucinated.mean[:, block], faithful.mean[:, block], int(strength))
            )
            for block in range(blocks // 2, blocks)
        }
        return hear_under(setup, clips, lambda: projected(setup.model, spaces))


@dataclass(frozen=True)
class GatedProjection:
    """Rejects the windows that lie in the space; strength: the share of calibration speech it may reject."""

    name: str = "hallucination-space-gated"
    strengths: tuple[float, ...] = (0.01, 0.03, 0.1)
    quick_strengths: tuple[float, ...] = (0.03,)
    needs: tuple[str, ...] = (CALIBRATION,)
    about: str = (
        "Hallucination space as a gate at the decoder: a window whose first state lies in the space is "
        "rejected, our reading of its description; strength: share of calibration speech rejected, published "
        "0.01-0.03"
    )

    def prepare(self, setup: Setup) -> None:
        _states(setup)

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        hallucinated, faithful = _states(setup)
        gate = fit_gate(hallucinated, faithful, strength)
        return hear_under(setup, clips, lambda: rejecting(setup.model, gate))


def _states(setup: Setup) -> tuple[States, States]:
    key = "states of the hallucination space"
    if key not in setup.memory:
        setup.memory[key] = collect(setup)
    found: tuple[States, States] = setup.memory[key]
    return found


METHODS: tuple[Method, ...] = (Projection(), GatedProjection())

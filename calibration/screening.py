"""Finds how strong an edit may be, on a few windows: encoder activations are computed once, edits start
from them.

Cost on speech: how much less likely the plain transcript's tokens become (teacher forcing, one decoder pass).
Effect on non-speech: greedy decoding of the edited windows, judged by the three definitions; and on windows
in which speech and other sounds take turns: their word errors, what is invented in the gaps among them.
Strengths are searched on a log scale, in units of the activations: `size` is the edit's mean length over the
mean length of what it edits; several edits together have the same size each. Replacing frames by silence
(MeanAblation) has no size, it is done or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from whisper.tokenizer import get_tokenizer

from calibration.activations import encode_windows
from calibration.decoding import greedy_decode
from calibration.evaluate import counts_as_speech_nsp, escapes_skip_rule, normalise, word_errors
from whisper_steer.passing import padding_frames
from whisper_steer.steering import Edit, Gate, LatentEdit, MeanAblation, Steering

if TYPE_CHECKING:
    from whisper.decoding import DecodingResult
    from whisper.model import Whisper

SIZE_RANGE = (0.003, 4.0)
MAX_COST = (
    0.005  # nats per token on speech: what a rise of the WER by 0.2 points is worth, before it is measured
)
_BISECTIONS = 5


@dataclass(frozen=True)
class Effect:
    """Effect on non-speech windows, as shares of them: text = words left after the skip rule; and the word
    error rate on the windows with gaps (0 where there are none)."""

    text: float
    nsp: float
    hr: float
    no_speech_prob: float
    avg_logprob: float
    gap_wer: float = 0.0

    @property
    def score(self) -> tuple[float, float, float, float]:
        """Smaller is better; the means break ties between shares."""
        return (self.text + self.gap_wer, self.hr, self.nsp, self.avg_logprob - self.no_speech_prob)


@dataclass(frozen=True)
class Candidate:
    """Edits at the strength that the screening found best; several act together, at different layers or in
    order at one."""

    name: str
    edits: tuple[Edit, ...]
    size: float
    cost: float
    effect: Effect


class Windows:
    """A few windows, encoded once."""

    def __init__(self, model: Whisper, mels: Tensor, *, batch: int = 8):
        self.model = model
        with torch.no_grad():
            parts = [encode_windows(model, mels[i : i + batch]) for i in range(0, len(mels), batch)]
        self.layers = torch.cat(parts, dim=1)  # (layers, windows, 1500, d_model)
        self.padding = padding_frames(mels).to(self.layers.device)
        self.batch = batch
        self.gate: Tensor | None = None  # (windows, 1500) share of an edit that each frame gets

    def set_gate(self, gate: Gate | None) -> None:
        """Edits are scaled by this gate from now on, as they are on a steered model."""
        if gate is None:
            self.gate = None
            return
        streams = dict(enumerate(self.layers))
        logits = gate.frame_logits(streams)
        heard = gate.window_logit(logits, streams, self.padding) <= gate.window_threshold(1.0)
        self.gate = gate.frame_gate(logits, self.padding & heard.unsqueeze(1))

    def edited(self, edits: Sequence[Edit]) -> Tensor:
        """Encoder output (windows, 1500, d_model) with the edits at alpha 1; every block sees what the edits
        before it have made."""
        steering = Steering(tuple(edits)) if edits else None
        last = self.layers.shape[0] - 1
        first = min((edit.layer for edit in edits), default=last)
        outputs = []
        for start in range(0, self.layers.shape[1], self.batch):
            x = self.layers[first, start : start + self.batch]
            g = None if self.gate is None else self.gate[start : start + self.batch]
            for layer in range(first, last + 1):
                if layer > first:
                    x = self.model.encoder.blocks[layer](x)
                if steering is not None:
                    x = steering.edit(x, layer, 1.0, g)
            outputs.append(self.model.encoder.ln_post(x))
        return torch.cat(outputs)


def nominal_length(edit: Edit, x: Tensor) -> float:
    """Length per unit of strength, over the mean length of x: of the direction, of the decoded values, or of
    the way to the mean."""
    if isinstance(edit, MeanAblation):
        direction = (edit.mean.mean(dim=0) - x.float().flatten(0, -2).mean(dim=0)).to(edit.mean)
    else:
        direction = edit.values @ edit.W_dec if isinstance(edit, LatentEdit) else edit.direction
    return max(float(direction.norm()), 1e-12) / float(x.float().norm(dim=-1).mean())


class Screen:
    """Measures edits on speech windows and non-speech windows.

    Args:
        speech, nonspeech: mels (windows, n_mels, 3000).
        gate: scales the edits per frame; None: the papers' way, everywhere.
        joined: mels of windows with speech and gaps, and what is said in each.
        language: code of what is spoken.
    """

    def __init__(
        self,
        model: Whisper,
        speech: Tensor,
        nonspeech: Tensor,
        gate: Gate | None,
        joined: tuple[Tensor, Sequence[str]] | None = None,
        *,
        language: str = "en",
    ):
        self.model, self.language = model, language
        self.speech, self.nonspeech = Windows(model, speech), Windows(model, nonspeech)
        self.joined = None if joined is None else Windows(model, joined[0])
        self._said = () if joined is None else tuple(joined[1])
        self._tokens = self._plain_tokens(speech)
        with torch.no_grad():
            self._plain_loss = self._loss(self.speech.edited(()))
        self.use_gate(gate)

    def use_gate(self, gate: Gate | None) -> None:
        for windows in (self.speech, self.nonspeech, self.joined):
            if windows is not None:
                windows.set_gate(gate)

    def _plain_tokens(self, mels: Tensor) -> Tensor:
        """(windows, length): what plain greedy decoding writes, from start to end of text, padded with -1."""
        tokenizer = get_tokenizer(
            self.model.is_multilingual,
            num_languages=self.model.num_languages,
            language=self.language,
            task="transcribe",
        )
        rows = []
        for start in range(0, len(mels), self.speech.batch):
            for result in greedy_decode(self.model, mels[start : start + self.speech.batch], self.language):
                rows.append([*tokenizer.sot_sequence, *result.tokens, tokenizer.eot])
        tokens = torch.full((len(rows), max(map(len, rows))), -1)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        self._prefix = len(tokenizer.sot_sequence)
        return tokens

    @torch.no_grad()
    def _loss(self, features: Tensor) -> float:
        """Mean negative log-likelihood (nats per token) of the plain tokens."""
        total, count = 0.0, 0
        for start in range(0, len(features), self.speech.batch):
            tokens = self._tokens[start : start + self.speech.batch].to(features.device)
            logits = self.model.decoder(tokens.clamp_min(0)[:, :-1], features[start : start + len(tokens)])
            targets = tokens[:, 1:].clone()
            targets[:, : self._prefix - 1] = -1  # the start sequence is given, not predicted
            losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-1, reduction="sum")
            total, count = total + float(losses), count + int((targets >= 0).sum())
        return total / max(count, 1)

    def cost(self, edits: Sequence[Edit]) -> float:
        """Rise of the loss on speech, nats per token."""
        with torch.no_grad():
            return self._loss(self.speech.edited(edits)) - self._plain_loss

    def effect(self, edits: Sequence[Edit]) -> Effect:
        """Greedy decoding of the non-speech windows, and of those with gaps, with the edits."""
        results = self._heard(self.nonspeech, edits)
        kept = [escapes_skip_rule(r.no_speech_prob, r.avg_logprob) for r in results]
        gap_wer = 0.0
        if self.joined is not None:
            texts = [
                r.text if escapes_skip_rule(r.no_speech_prob, r.avg_logprob) else ""
                for r in self._heard(self.joined, edits)
            ]
            counted = [
                word_errors(said, text, self.language) for said, text in zip(self._said, texts, strict=True)
            ]
            said = sum(one.words for one in counted if one is not None)
            gap_wer = sum(one.total for one in counted if one is not None) / max(said, 1)
        words = [normalise(result.text, self.language) for result in results]
        return Effect(
            text=float(np.mean([keep and bool(w) for keep, w in zip(kept, words, strict=True)])),
            nsp=float(np.mean([counts_as_speech_nsp(r.no_speech_prob) for r in results])),
            hr=float(np.mean(kept)),
            no_speech_prob=float(np.mean([r.no_speech_prob for r in results])),
            avg_logprob=float(np.mean([r.avg_logprob for r in results])),
            gap_wer=gap_wer,
        )

    def _heard(self, windows: Windows, edits: Sequence[Edit]) -> list[DecodingResult]:
        with torch.no_grad():
            features = windows.edited(edits)
        results: list[DecodingResult] = []
        for start in range(0, len(features), windows.batch):
            results += greedy_decode(self.model, features[start : start + windows.batch], self.language)
        return results

    def unit(self, edit: Edit) -> float:
        """Strength at which the edit is as long as what it edits."""
        return 1.0 / nominal_length(edit, self.nonspeech.layers[edit.layer])

    def sized(self, edits: Sequence[Edit], size: float) -> tuple[Edit, ...]:
        """The edits, each of that size; silence stays as it is."""
        return tuple(
            edit if isinstance(edit, MeanAblation) else replace(edit, strength=size * self.unit(edit))
            for edit in edits
        )

    def strongest(self, edits: Sequence[Edit], *, max_cost: float = MAX_COST) -> tuple[float, float]:
        """(size, cost): the largest size within the cost, by bisection on a log scale; (0, cost of the
        smallest) if even the smallest costs more.

        The cost of an edit that replaces the activation by a reconstruction counts from the reconstruction
        alone: no strength makes that cheaper.
        """
        if any(isinstance(edit, LatentEdit) and edit.reconstruct for edit in edits):
            max_cost += max(0.0, self.cost(tuple(replace(edit, strength=0.0) for edit in edits)))
        low, high = SIZE_RANGE
        cost_low, cost_high = self.cost(self.sized(edits, low)), self.cost(self.sized(edits, high))
        if cost_low > max_cost:
            return 0.0, cost_low
        if cost_high <= max_cost:
            return high, cost_high
        for _ in range(_BISECTIONS):
            middle = float(np.sqrt(low * high))
            cost = self.cost(self.sized(edits, middle))
            if cost <= max_cost:
                low, cost_low = middle, cost
            else:
                high = middle
        return low, cost_low

    def screen(
        self,
        name: str,
        edits: Sequence[Edit],
        *,
        max_cost: float = MAX_COST,
        fractions: Sequence[float] = (1.0, 0.25, 0.06),
    ) -> Candidate:
        """The edits at the best of a few fractions of their strongest size: more is not always better."""
        if all(isinstance(edit, MeanAblation) for edit in edits):
            return Candidate(name, tuple(edits), 1.0, self.cost(edits), self.effect(edits))
        size, cost = self.strongest(edits, max_cost=max_cost)
        if size == 0.0:
            size = SIZE_RANGE[0]
            fractions = (1.0,)
        tried = []
        for fraction in fractions:
            strong = self.sized(edits, size * fraction)
            tried.append(Candidate(name, strong, size * fraction, cost, self.effect(strong)))
        return min(tried, key=lambda candidate: candidate.effect.score)

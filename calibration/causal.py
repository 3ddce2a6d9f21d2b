"""Chooses latents by what they do: what changes in the decoder when one latent alone is ablated.

A regression finds latents that go with hallucinations; this finds those that cause them. For each latent of
an SAE its code is set to 0 on every frame that holds audio, x' = x - f_j W_dec[j] (the SAE's error is kept),
and three things are compared with the plain model, teacher-forced on what the plain model wrote: the odds of
<|nospeech|> at the decoder's first step and the likelihood of the text on non-speech, and the likelihood of
the text on speech.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from tqdm import tqdm
from whisper.tokenizer import Tokenizer, get_tokenizer

from calibration.activations import MAX_FRAMES, encode_windows, finish_encoder
from calibration.decoding import greedy_decode
from calibration.evaluate import normalise
from whisper_steer.errors import UsageError
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.steering import LatentEdit

if TYPE_CHECKING:
    from whisper.model import Whisper

CANDIDATES = 48  # trying one costs a pass through the later blocks and the decoder per window it is active in
SCORED_TOKENS = (
    64  # of a text: what a loop repeats beyond them says nothing new and would cost most of the time
)


@dataclass(frozen=True)
class CausalEffects:
    """What ablating each of m latents of one layer's SAE changes; means over windows.

    Attributes:
        layer: 0-based, that of the SAE.
        latents: (m,) int64, numbers of the latents.
        nonspeech_nospeech: (m,) change of log(p / (1 - p)), p = no_speech_prob, on non-speech windows. Odds
            and not log p, because log p hardly moves where p is near 1 already.
        nonspeech_text: (m,) change of the mean log-probability per token (nats) of the plain greedy text on
            those non-speech windows that have one.
        speech_text: (m,) the same on speech windows.
        errors: (3, m) standard errors over windows of the three, in this order; None: unknown.
    """

    layer: int
    latents: np.ndarray
    nonspeech_nospeech: np.ndarray
    nonspeech_text: np.ndarray
    speech_text: np.ndarray
    errors: np.ndarray | None = None

    def benefit(self) -> np.ndarray:
        """(m,) above 0 where a latent should be weakened, below 0 where it should be strengthened; 0 where
        neither helps.

        Each effect is divided by its standard error plus the median standard error of all latents, as the
        SAM statistic does (Tusher, Tibshirani & Chu 2001), so that neither a tiny but steady nor a large but
        erratic effect wins; without errors by the root mean square over latents. The gain is that of
        <|nospeech|> minus that of the hallucinated text. Strengthening is taken to do the opposite of
        ablation (first order). What speech text loses that way is subtracted, down to 0; that it gains
        counts for nothing.
        """
        errors = (None, None, None) if self.errors is None else tuple(self.errors)
        nospeech = _standardised(self.nonspeech_nospeech, errors[0])
        text = _standardised(self.nonspeech_text, errors[1])
        speech = _standardised(self.speech_text, errors[2])
        gain = nospeech - text
        side = np.sign(gain)
        loss = np.maximum(-side * speech, 0.0)
        return side * np.maximum(np.abs(gain) - loss, 0.0)


def _standardised(effect: np.ndarray, error: np.ndarray | None) -> np.ndarray:
    if error is not None and (error > 0).any():
        return effect / (error + np.median(error[error > 0]))
    size = np.sqrt(np.mean(effect**2)) if len(effect) else 0.0
    return effect / size if size > 0 else np.zeros_like(effect)


def candidates(beta: np.ndarray, activity: np.ndarray, count: int = CANDIDATES) -> np.ndarray:
    """(<= count,) latents worth trying, ascending: in turn the largest |beta| of a regression and the most
    active ones.

    beta: (n_latents,); activity: (n_latents,) mean codes on non-speech that hallucinates. Zeros are left out.
    Raises UsageError: count below 1, or unequal lengths.
    """
    if count < 1 or beta.shape != activity.shape:
        raise UsageError(
            f"count is {count}, beta has shape {beta.shape}, activity {activity.shape}: expected a count of "
            "at least 1 and two numbers per latent"
        )
    ranked = []
    for size in (np.abs(beta), activity):
        order = np.argsort(-size, kind="stable")
        ranked.append(order[size[order] > 0])
    chosen: dict[int, None] = {}
    for place in range(max(map(len, ranked))):
        for order in ranked:
            if place < len(order) and len(chosen) < count:
                chosen[int(order[place])] = None
    return np.array(sorted(chosen), dtype=np.int64)


# -- measuring


@dataclass(frozen=True)
class _Windows:
    """Windows with what the plain model makes of them.

    x: (windows, 1500, d_model) behind the SAE's block; codes: (windows, 1500, m) of the latents, 0 on
    padding; tokens: (windows, length) from the start of the transcript on, padded with -1; lengths:
    (windows,) without that padding; prefix: tokens that are given; plain: (2, windows), see `scores`.
    """

    x: Tensor
    codes: Tensor
    tokens: Tensor
    lengths: np.ndarray
    prefix: int
    plain: np.ndarray


def content_frames(mels: Tensor) -> Tensor:
    """(windows,) encoder frames that hold audio, in windows (windows, n_mels, 3000) padded with zeros as
    `whisper.transcribe` pads them.
    """
    filled = (mels != 0).any(dim=1)
    places = torch.arange(1, filled.shape[1] + 1, device=mels.device)
    return ((filled * places).amax(dim=1) + 1) // 2


@torch.no_grad()
def scores(
    model: Whisper, features: Tensor, tokens: Tensor, tokenizer: Tokenizer, prefix: int
) -> tuple[Tensor, Tensor]:
    """(log-odds of <|nospeech|> at the first step, mean log-probability per token) of windows, (batch,) each.

    Words and the end of the text count; timestamps are context only, since decoding forces them by rules.
    NaN where no token counts.

    Args:
        features: encoder output (batch, 1500, d_model).
        tokens: (batch, length), the first `prefix` given; -1 behind the end.
    """
    logits = model.decoder(tokens.clamp_min(0)[:, :-1], features).float()
    no_speech = tokenizer.no_speech
    first = logits[:, 0].double()
    others = torch.cat([first[:, :no_speech], first[:, no_speech + 1 :]], dim=1)
    odds = first[:, no_speech] - others.logsumexp(dim=1)
    targets = tokens[:, prefix:]
    counted = (targets >= 0) & (targets <= tokenizer.eot)
    logits = logits[:, prefix - 1 :]
    chosen = logits.gather(2, targets.clamp_min(0).unsqueeze(2)).squeeze(2)
    logprobs = (chosen - logits.logsumexp(dim=2)).double() * counted
    return odds, logprobs.sum(dim=1) / counted.sum(dim=1)


def causal_effects(
    model: Whisper,
    sae: SparseAutoencoder,
    latents: Sequence[int] | np.ndarray,
    speech_mels: Tensor,
    nonspeech_mels: Tensor,
    *,
    batch: int = 8,
    language: str = "en",
    progress: bool = True,
) -> CausalEffects:
    """Ablate each latent alone and measure. Windows in which it is never active change by exactly 0.

    Every window is encoded once; for each latent only the blocks behind the SAE's layer and the decoder run
    again, on the windows in which it is active.

    Args:
        latents: (m,) different numbers of the SAE's latents.
        speech_mels, nonspeech_mels: windows (windows, n_mels, 3000), padding being zeros. Windows without any
            plain text count for <|nospeech|> only.
        batch: windows that run together.
        language: that the transcripts are decoded in.

    Raises UsageError: no windows of one kind, or latents that do not exist or come twice.
    """
    chosen = _checked(latents, sae)
    for name, mels in (("speech", speech_mels), ("non-speech", nonspeech_mels)):
        if mels.ndim != 3 or not len(mels):
            raise UsageError(
                f"windows of {name} have shape {tuple(mels.shape)}: expected (windows, {model.dims.n_mels}, "
                "3000) and at least one"
            )
    tokenizer = get_tokenizer(
        model.is_multilingual, num_languages=model.num_languages, language=language, task="transcribe"
    )
    sets = [
        _plain(model, sae, chosen, mels, tokenizer, batch, language) for mels in (nonspeech_mels, speech_mels)
    ]
    changes = [np.zeros((2, len(chosen), len(windows.x))) for windows in sets]
    for number in tqdm(
        range(len(chosen)), desc=f"ablating latents of layer {sae.layer}", disable=not progress
    ):
        direction = sae.W_dec[int(chosen[number])].detach()
        for windows, change in zip(sets, changes, strict=True):
            for rows in _groups(windows, number, batch):
                code = windows.codes[rows, :, number].to(windows.x).unsqueeze(2)
                x = windows.x[rows] - code * direction.to(windows.x)
                new = _scores_of(model, sae.layer, x, windows.tokens[rows], tokenizer, windows.prefix)
                change[:, number, rows] = new - windows.plain[:, rows]
    nonspeech, speech = changes
    plain = [windows.plain for windows in sets]
    nospeech, nospeech_error = _over_windows(nonspeech[0], plain[0][0])
    invented, invented_error = _over_windows(nonspeech[1], plain[0][1])
    said, said_error = _over_windows(speech[1], plain[1][1])
    errors = np.stack([nospeech_error, invented_error, said_error])
    return CausalEffects(sae.layer, chosen, nospeech, invented, said, errors)


def _checked(latents: Sequence[int] | np.ndarray, sae: SparseAutoencoder) -> np.ndarray:
    chosen = np.asarray(latents, dtype=np.int64).reshape(-1)
    outside = chosen[(chosen < 0) | (chosen >= sae.n_latents)]
    if len(outside):
        raise UsageError(f"there is no latent {outside[0]}: expected 0 to {sae.n_latents - 1}")
    if not len(chosen) or len(np.unique(chosen)) < len(chosen):
        raise UsageError(
            f"{len(chosen)} latents, {len(np.unique(chosen))} of them different: expected at least one, and "
            "each once"
        )
    return chosen


@torch.no_grad()
def _plain(
    model: Whisper,
    sae: SparseAutoencoder,
    latents: np.ndarray,
    mels: Tensor,
    tokenizer: Tokenizer,
    batch: int,
    language: str,
) -> _Windows:
    """Encode, decode greedily, and score what came out."""
    wanted = torch.from_numpy(latents)
    xs, codes, rows = [], [], []
    for start in range(0, len(mels), batch):
        part = mels[start : start + batch]
        x = encode_windows(model, part, [sae.layer])[0]
        silent = torch.arange(MAX_FRAMES) >= content_frames(part).cpu().unsqueeze(1)
        for window, beyond in zip(x, silent, strict=True):  # one at a time: all latents of a window are many
            code = sae.encode(window.to(sae.W_enc.device))[:, wanted.to(sae.W_enc.device)].float().cpu()
            codes.append(code.masked_fill(beyond.unsqueeze(1), 0.0))
        xs.append(x)
        for result in greedy_decode(model, finish_encoder(model, x, sae.layer), language):
            written = [*result.tokens, tokenizer.eot][:SCORED_TOKENS]
            # <|endoftext|> alone would be scored: without words there is nothing to score
            rows.append([*tokenizer.sot_sequence, *(written if normalise(result.text, language) else [])])
    prefix = len(tokenizer.sot_sequence)
    lengths = np.array([len(row) for row in rows])
    tokens = torch.full((len(rows), max(int(lengths.max()), prefix + 1)), -1)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    x = torch.cat(xs)
    plain = np.zeros((2, len(x)))
    windows = _Windows(x, torch.stack(codes), tokens.to(x.device), lengths, prefix, plain)
    for group in _groups(windows, None, batch):
        plain[:, group] = _scores_of(model, sae.layer, x[group], windows.tokens[group], tokenizer, prefix)
    return windows


def _groups(windows: _Windows, number: int | None, batch: int) -> Iterator[np.ndarray]:
    """Rows of up to `batch` windows of similar text length: those in which latent `number` is active, all
    for None.
    """
    rows = np.argsort(windows.lengths, kind="stable")
    if number is not None:
        active = (windows.codes[:, :, number] != 0).any(dim=1).numpy()
        rows = rows[active[rows]]
    for start in range(0, len(rows), batch):
        yield rows[start : start + batch]


def _scores_of(
    model: Whisper, layer: int, x: Tensor, tokens: Tensor, tokenizer: Tokenizer, prefix: int
) -> np.ndarray:
    """(2, batch): `scores` of activations behind a block."""
    length = max(int((tokens >= 0).sum(dim=1).max()), prefix + 1)
    odds, text = scores(model, finish_encoder(model, x, layer), tokens[:, :length], tokenizer, prefix)
    return torch.stack([odds, text]).cpu().numpy()


def _over_windows(change: np.ndarray, plain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard errors (m,) of changes (m, windows) over the windows whose plain score is known."""
    counted = change[:, ~np.isnan(plain)]
    n = counted.shape[1]
    if n == 0:
        return np.zeros(len(change)), np.zeros(len(change))
    error = counted.std(axis=1, ddof=1) / np.sqrt(n) if n > 1 else np.zeros(len(change))
    return counted.mean(axis=1), error


# -- edits


def causal_edit(
    sae: SparseAutoencoder, effects: CausalEffects, mean_activation: np.ndarray, k: int
) -> LatentEdit:
    """The k latents of largest |benefit|, strength 1, fewer where fewer help: value = -benefit / largest
    |benefit| times the latent's mean activation, so each has a strength of its own.

    mean_activation: (n_latents,); latents that were never active are no use and left out.
    Raises UsageError: k below 1, effects of another layer, or no latent helps.
    """
    benefit = _usable(sae, effects, mean_activation, k)
    order = np.argsort(-np.abs(benefit), kind="stable")
    chosen = order[benefit[order] != 0][:k]
    if not len(chosen):
        raise UsageError(
            f"ablating any of {len(benefit)} latents of layer {effects.layer} helps no more than it costs: "
            "expected at least one to edit; try more windows or other latents"
        )
    return _edit(sae, effects.latents[chosen], benefit[chosen], mean_activation)


def both_edit(
    sae: SparseAutoencoder,
    beta: np.ndarray,
    effects: CausalEffects,
    mean_activation: np.ndarray,
    k: int,
) -> LatentEdit | None:
    """The k latents of smallest rank product of |beta| and |benefit|, among those where regression and
    ablation agree on the sign; values as in `causal_edit`. None where they agree on none.

    beta: (n_latents,) of a regression of hallucinated against not. Raises UsageError as `causal_edit`.
    """
    benefit = _usable(sae, effects, mean_activation, k)
    own = beta[effects.latents]
    agree = np.flatnonzero(np.sign(own) * np.sign(benefit) > 0)
    if not len(agree):
        return None
    product = rankdata(-np.abs(own[agree])) * rankdata(-np.abs(benefit[agree]))
    chosen = agree[np.argsort(product, kind="stable")[:k]]
    return _edit(sae, effects.latents[chosen], benefit[chosen], mean_activation)


def _usable(
    sae: SparseAutoencoder, effects: CausalEffects, mean_activation: np.ndarray, k: int
) -> np.ndarray:
    """(m,) benefits, 0 for latents that are never active."""
    if k < 1:
        raise UsageError(f"k is {k}: expected at least 1 latent")
    if effects.layer != sae.layer:
        raise UsageError(
            f"the effects are of layer {effects.layer}, the SAE of layer {sae.layer}: expected the same"
        )
    return np.where(mean_activation[effects.latents] > 0, effects.benefit(), 0.0)


def _edit(
    sae: SparseAutoencoder, latents: np.ndarray, benefit: np.ndarray, mean_activation: np.ndarray
) -> LatentEdit:
    order = np.argsort(latents)
    latents, benefit = latents[order], benefit[order]
    values = -benefit / np.abs(benefit).max() * mean_activation[latents]
    return LatentEdit.from_sae(
        sae, torch.from_numpy(latents), torch.from_numpy(values.astype(np.float32)), mode="add", floor=True
    )

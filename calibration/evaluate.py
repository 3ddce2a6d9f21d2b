"""The measures that calibration and benchmarks share, each with a bootstrap interval over clips.

Clips of one recording, source or speaker are not independent: given their groups, intervals come from
draws of whole groups.

On non-speech: text-FPR (words came out), nsp-FPR (no_speech_prob below 0.5), HR (openai-whisper's skip rule
does not fire), words per minute. On speech: WER with its three parts, and the share of clips that came back
empty. WER is a ratio of sums over clips with a non-empty reference; clips without one are never averaged
into it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TypeVar

import jiwer
import numpy as np
from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

Item = TypeVar("Item")
NSP_THRESHOLD = 0.5  # AudioSAE's tau
SKIP_NO_SPEECH = 0.6  # openai-whisper's no_speech_threshold
SKIP_LOGPROB = -1.0  # openai-whisper's logprob_threshold
# written without spaces: every letter counts as a word, as in Whisper's paper
SPACELESS = frozenset({"zh", "ja", "th", "lo", "my", "yue"})


@lru_cache(maxsize=8)
def _normalizer(language: str) -> Callable[[str], str]:
    if language != "en":
        return BasicTextNormalizer(split_letters=language in SPACELESS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its word list to the garbage collector
        return EnglishTextNormalizer()


@lru_cache(maxsize=65536)
def normalise(text: str, language: str = "en") -> str:
    """Text after whisper's normaliser, without what is no word (it leaves a "." of "...").

    language: code; "en" has a normaliser of its own, the others share BasicTextNormalizer.
    """
    words = str(_normalizer(language)(text)).split()
    return " ".join(word for word in words if any(character.isalnum() for character in word))


def counts_as_speech_nsp(no_speech_prob: float) -> bool:
    """True if the no-speech probability alone lets the window count as speech (nsp-FPR's event)."""
    return no_speech_prob < NSP_THRESHOLD


def escapes_skip_rule(no_speech_prob: float, avg_logprob: float) -> bool:
    """True if openai-whisper's rule would keep the window (HR's event)."""
    return no_speech_prob < SKIP_NO_SPEECH or avg_logprob > SKIP_LOGPROB


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items, evenly spread, so that every part of a sorted collection is represented."""
    if len(items) <= count:
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


@dataclass(frozen=True)
class Rate:
    """A value and its 95 % bootstrap interval; NaN where nothing was measured."""

    value: float
    lo: float
    hi: float


def bootstrap_ratio(
    numerator: Sequence[float] | np.ndarray,
    denominator: Sequence[float] | np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
    groups: Sequence[str] | None = None,
) -> Rate:
    """sum(numerator) / sum(denominator) over clips, with the percentile interval of resampled clips.

    groups: of the clips, which are drawn whole; None: every clip by itself.
    """
    top = np.asarray(numerator, dtype=np.float64)
    bottom = np.asarray(denominator, dtype=np.float64)
    if top.shape != bottom.shape or top.ndim != 1:
        raise ValueError(f"expected two vectors of one length, got shapes {top.shape} and {bottom.shape}")
    if len(top) == 0 or bottom.sum() == 0:
        return Rate(float("nan"), float("nan"), float("nan"))
    if groups is not None and len(groups) != len(top):
        raise ValueError(f"{len(groups)} groups for {len(top)} clips")
    if groups is None or len(set(groups)) == len(groups):
        weights = _resampled(len(top), seed, resamples)
    else:
        weights = group_draws(groups, resamples, seed)
    tops, bottoms = weights @ top, weights @ bottom
    valid = bottoms > 0
    lo, hi = np.quantile(tops[valid] / bottoms[valid], [(1 - level) / 2, (1 + level) / 2])
    return Rate(float(top.sum() / bottom.sum()), float(lo), float(hi))


@lru_cache(maxsize=16)  # many rates are of the same clips
def _resampled(count: int, seed: int, resamples: int) -> np.ndarray:
    """(resamples, count): how often each clip is drawn; with replacement, so multinomial."""
    shares = np.full(count, 1.0 / count)
    return np.random.default_rng(seed).multinomial(count, shares, size=resamples).astype(np.float64)


def group_draws(groups: Sequence[str], draws: int, seed: int) -> np.ndarray:
    """(draws, clips) float64: how often each clip is drawn when whole groups are drawn with replacement.

    Clips of one recording, one source or one speaker go wrong together: they are drawn together or not at
    all. As many groups are drawn as there are, so a draw's number of clips varies with the groups' sizes.
    """
    names, of_clip = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(names) == 0:
        return np.zeros((draws, 0))
    return _resampled(len(names), seed, draws)[:, of_clip.reshape(-1)]


def bootstrap_share(
    events: Sequence[bool] | np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 1000,
    groups: Sequence[str] | None = None,
) -> Rate:
    """Share of true events with its interval; groups: see `bootstrap_ratio`."""
    hits = np.asarray(events, dtype=np.float64)
    return bootstrap_ratio(hits, np.ones_like(hits), seed=seed, resamples=resamples, groups=groups)


@dataclass(frozen=True)
class WordErrors:
    """Word counts of one clip against its reference, both normalised."""

    words: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions


@lru_cache(maxsize=65536)
def word_errors(reference: str, hypothesis: str, language: str = "en") -> WordErrors | None:
    """Errors of one clip; None if the normalised reference is empty (nothing to be wrong about)."""
    truth, guess = normalise(reference, language), normalise(hypothesis, language)
    if not truth:
        return None
    words = len(truth.split())
    if not guess:
        return WordErrors(words, 0, words, 0)
    result = jiwer.process_words(truth, guess)
    return WordErrors(words, result.substitutions, result.deletions, result.insertions)


@dataclass(frozen=True)
class SpeechMetrics:
    """Recognition on clips with a reference; rates as fractions of reference words (or of clips)."""

    clips: int
    words: int
    wer: Rate
    sub: Rate
    del_: Rate
    ins: Rate
    empty_speech: Rate

    def row(self) -> dict[str, float]:
        """Flat numbers: wer, wer_lo, wer_hi, sub..., del..., ins..., empty_speech..."""
        return _flat(self)


def speech_metrics(
    references: Sequence[str],
    hypotheses: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 1000,
    groups: Sequence[str] | None = None,
    language: str = "en",
) -> SpeechMetrics:
    """WER with its parts and the share of empty hypotheses; clips with an empty reference are left out.

    groups: see `bootstrap_ratio`.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses")
    counted = [word_errors(r, h, language) for r, h in zip(references, hypotheses, strict=True)]
    kept = [errors for errors in counted if errors is not None]
    chosen = [index for index, errors in enumerate(counted) if errors is not None]
    kept_groups = None if groups is None else [groups[index] for index in chosen]
    words = [errors.words for errors in kept]

    def rate(values: list[int]) -> Rate:
        return bootstrap_ratio(values, words, seed=seed, resamples=resamples, groups=kept_groups)

    empty = [not normalise(hypotheses[index], language) for index in chosen]
    return SpeechMetrics(
        clips=len(kept),
        words=sum(words),
        wer=rate([errors.total for errors in kept]),
        sub=rate([errors.substitutions for errors in kept]),
        del_=rate([errors.deletions for errors in kept]),
        ins=rate([errors.insertions for errors in kept]),
        empty_speech=bootstrap_share(empty, seed=seed, resamples=resamples, groups=kept_groups),
    )


@dataclass(frozen=True)
class Outcome:
    """What came out of one non-speech clip: its text as the runtime returns it, the two label events, its
    length, and the language that the text was to be in.
    """

    text: str
    nsp: bool
    hr: bool
    seconds: float
    language: str = "en"

    @property
    def words(self) -> int:
        return len(normalise(self.text, self.language).split())

    @property
    def text_fp(self) -> bool:
        return self.words > 0


@dataclass(frozen=True)
class NonSpeechMetrics:
    """The three hallucination rates (shares of clips) and their severity in words per minute of audio."""

    clips: int
    seconds: float
    text_fpr: Rate
    nsp_fpr: Rate
    hr: Rate
    words_per_min: Rate

    def row(self) -> dict[str, float]:
        """Flat numbers: text_fpr, text_fpr_lo, text_fpr_hi, nsp_fpr..., hr..., words_per_min..."""
        return _flat(self)


def nonspeech_metrics(
    outcomes: Sequence[Outcome],
    *,
    seed: int = 0,
    resamples: int = 1000,
    groups: Sequence[str] | None = None,
) -> NonSpeechMetrics:
    """text-FPR, nsp-FPR, HR and words per minute of non-speech clips; groups: see `bootstrap_ratio`."""

    def share(events: list[bool]) -> Rate:
        return bootstrap_share(events, seed=seed, resamples=resamples, groups=groups)

    minutes = [outcome.seconds / 60 for outcome in outcomes]
    words = [outcome.words for outcome in outcomes]
    return NonSpeechMetrics(
        clips=len(outcomes),
        seconds=sum(outcome.seconds for outcome in outcomes),
        text_fpr=share([outcome.text_fp for outcome in outcomes]),
        nsp_fpr=share([outcome.nsp for outcome in outcomes]),
        hr=share([outcome.hr for outcome in outcomes]),
        words_per_min=bootstrap_ratio(words, minutes, seed=seed, resamples=resamples, groups=groups),
    )


def _flat(metrics: SpeechMetrics | NonSpeechMetrics) -> dict[str, float]:
    row: dict[str, float] = {}
    for field in fields(metrics):
        value = getattr(metrics, field.name)
        name = field.name.rstrip("_")
        if isinstance(value, Rate):
            row |= {name: value.value, f"{name}_lo": value.lo, f"{name}_hi": value.hi}
        else:
            row[name] = value
    return row

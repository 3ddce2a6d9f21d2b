"""Chooses a gate, its smoothing and its threshold on calibration clips, without decoding anything again.

What `whisper.transcribe` makes of every clip is known (calibration.hallucinations), and so are the
unsmoothed frame logits of every window it looked at. Withholding a window takes its words out of the
transcript, so the WER, the three rates and the share of speech that is lost follow for any threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from calibration.decoding import ClipTranscript, withhold
from calibration.evaluate import WordErrors, normalise, word_errors
from calibration.gate_fit import NOBODY, SPEECH
from whisper_steer.errors import UsageError
from whisper_steer.gate import MIN_FRAME_GATE, Gate

SMOOTHINGS = (9, 15, 21, 31)
# gates are compared at several budgets at once: one more or one less lost clip must not decide
_BUDGET_FACTORS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class CalibrationClip:
    """A clip of the calibration split with what plain Whisper made of it.

    Attributes:
        rows: for each window of the transcript, its row in the table of frame logits.
        reference: what is said; None for non-speech.
    """

    id: str
    set: str
    reference: str | None
    transcript: ClipTranscript
    rows: tuple[int, ...]

    @property
    def is_speech(self) -> bool:
        return self.reference is not None


@dataclass(frozen=True)
class Budget:
    """What may be lost on calibration speech.

    Attributes:
        wer_rise: of the WER over all speech clips, absolute (0.002 = 0.2 percentage points).
        share: of all speech clips that lose words to withholding.
        set_share: the same within any one set.
    """

    wer_rise: float = 0.002
    share: float = 0.005
    set_share: float = 0.02

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= 1:
                raise UsageError(
                    f"{name} is {value}: expected a fraction between 0 and 1 (0.002 = 0.2 points)"
                )

    def times(self, factor: float) -> Budget:
        """The budget with every limit multiplied, at most 1."""
        return Budget(*(min(1.0, value * factor) for value in asdict(self).values()))


@dataclass(frozen=True)
class GateResult:
    """What withholding at a threshold does, rates as shares of clips."""

    threshold: float
    wer_plain: float
    wer: float
    lost: Mapping[str, float]
    text_fpr: float
    nsp_fpr: float
    hr: float
    plain_text_fpr: float


@dataclass(frozen=True)
class GateChoice:
    """The gate with its smoothing and threshold set, where it came from, and what it does."""

    name: str
    gate: Gate
    result: GateResult
    table: tuple[Mapping[str, float | str | int], ...]


def smoothed(logits: np.ndarray, width: int) -> np.ndarray:
    """Frame logits (rows, frames) as `Gate.frame_logits` smooths them."""
    if width == 1:
        return logits
    pooled = F.avg_pool1d(
        torch.from_numpy(logits).unsqueeze(1), width, stride=1, padding=width // 2, count_include_pad=False
    )
    return pooled.squeeze(1).numpy()


@lru_cache(maxsize=65536)
def _errors(reference: str, hypothesis: str) -> WordErrors | None:
    return word_errors(reference, hypothesis)


def _after(clip: CalibrationClip, window_logits: np.ndarray, threshold: float) -> ClipTranscript:
    withheld = [bool(window_logits[row] > threshold) for row in clip.rows]
    return withhold(clip.transcript, withheld) if any(withheld) else clip.transcript


def _is_lost(clip: CalibrationClip, after: ClipTranscript) -> bool:
    """Whether withholding took words that were right, or all of them."""
    if after.text == clip.transcript.text:
        return False
    before_errors = _errors(clip.reference or "", clip.transcript.text)
    after_errors = _errors(clip.reference or "", after.text)
    worse = (
        before_errors is not None and after_errors is not None and after_errors.total > before_errors.total
    )
    return worse or (bool(normalise(clip.transcript.text)) and not normalise(after.text))


def evaluate_threshold(
    clips: Sequence[CalibrationClip], window_logits: np.ndarray, threshold: float
) -> GateResult:
    """WER, share of lost speech clips per set ("all" too) and the rates on non-speech at a threshold."""
    words = errors = plain_errors = 0
    lost: dict[str, list[bool]] = {}
    outcomes = []
    plain_text = []
    for clip in clips:
        after = _after(clip, window_logits, threshold)
        if not clip.is_speech:
            outcomes.append((bool(normalise(after.text)), after.nsp, after.hr))
            plain_text.append(bool(normalise(clip.transcript.text)))
            continue
        counted = _errors(clip.reference or "", after.text)
        plain = _errors(clip.reference or "", clip.transcript.text)
        if counted is not None and plain is not None:
            words, errors, plain_errors = (
                words + counted.words,
                errors + counted.total,
                plain_errors + plain.total,
            )
        for name in (clip.set, "all"):
            lost.setdefault(name, []).append(_is_lost(clip, after))
    text, nsp, hr = np.array(outcomes, dtype=float).T if outcomes else np.full((3, 1), np.nan)
    return GateResult(
        threshold=threshold,
        wer_plain=plain_errors / max(words, 1),
        wer=errors / max(words, 1),
        lost={name: float(np.mean(values)) for name, values in lost.items()},
        text_fpr=float(np.mean(text)),
        nsp_fpr=float(np.mean(nsp)),
        hr=float(np.mean(hr)),
        plain_text_fpr=float(np.mean(plain_text)) if plain_text else float("nan"),
    )


def lowest_threshold(clips: Sequence[CalibrationClip], window_logits: np.ndarray, budget: Budget) -> float:
    """The lowest threshold within the budget: going down window by window of speech until it would be
    exceeded.

    Between that and the next non-speech window it makes no difference on these clips, so the middle is
    taken: clips that are not here get as much room on either side.
    """
    speech = [clip for clip in clips if clip.is_speech]
    sizes: dict[str, int] = {}
    words = 0
    for clip in speech:
        sizes[clip.set] = sizes.get(clip.set, 0) + 1
        plain = _errors(clip.reference or "", clip.transcript.text)
        words += plain.words if plain is not None else 0
    by_logit: dict[float, list[CalibrationClip]] = {}
    for clip in speech:
        for row in clip.rows:
            by_logit.setdefault(float(window_logits[row]), []).append(clip)
    rise: dict[str, int] = {}  # by clip: words more in error than plainly
    lost: dict[str, str] = {}  # clip -> its set
    floor = min(by_logit, default=0.0) - 1.0
    for value in sorted(by_logit, reverse=True):
        for clip in by_logit[value]:
            after = _after(clip, window_logits, np.nextafter(value, -np.inf))
            before_errors = _errors(clip.reference or "", clip.transcript.text)
            after_errors = _errors(clip.reference or "", after.text)
            if before_errors is not None and after_errors is not None:
                rise[clip.id] = after_errors.total - before_errors.total
            if _is_lost(clip, after):
                lost[clip.id] = clip.set
            else:
                lost.pop(clip.id, None)
        # a fall elsewhere must not pay for words that are lost here, so falls do not count
        within = sum(max(value, 0) for value in rise.values()) <= budget.wer_rise * max(words, 1)
        within &= len(lost) <= budget.share * len(speech)
        within &= all(
            list(lost.values()).count(name) <= budget.set_share * size for name, size in sizes.items()
        )
        if not within:
            floor = value
            break
    others = [window_logits[row] for clip in clips if not clip.is_speech for row in clip.rows]
    above = [value for value in others if value > floor]
    return float((floor + min(above)) / 2) if above else float(floor)


def choose_gate(
    gates: Mapping[str, Gate],
    logits: Mapping[str, np.ndarray],
    clips: Sequence[CalibrationClip],
    budget: Budget,
    *,
    eligible: Sequence[str] | None = None,
    smoothings: Sequence[int] = SMOOTHINGS,
) -> GateChoice:
    """The gate and smoothing with the lowest text-FPR (then HR, then nsp-FPR) over a range of budgets.

    Args:
        logits: by gate name, unsmoothed frame logits (rows, frames).
        eligible: names that may win; the others (controls) are only measured. None: all.
    """
    table: list[Mapping[str, float | str | int]] = []
    best: tuple[tuple[float, ...], str, int, GateResult] | None = None
    for name, gate in gates.items():
        for width in smoothings:
            window_logits = smoothed(logits[name], width).min(axis=1).astype(np.float64)
            results = [
                evaluate_threshold(
                    clips, window_logits, lowest_threshold(clips, window_logits, budget.times(factor))
                )
                for factor in _BUDGET_FACTORS
            ]
            result = results[_BUDGET_FACTORS.index(1.0)]
            table.append(
                {
                    "gate": name,
                    "layer": gate.layer,
                    "kind": gate.kind,
                    "features": gate.n_features,
                    "smooth": width,
                    "threshold": result.threshold,
                    "text_fpr": result.text_fpr,
                    "hr": result.hr,
                    "nsp_fpr": result.nsp_fpr,
                    "wer_rise": result.wer - result.wer_plain,
                    "text_fpr_mean_over_budgets": float(np.mean([r.text_fpr for r in results])),
                }
            )
            score = tuple(
                float(np.mean([getattr(r, rate) for r in results])) for rate in ("text_fpr", "hr", "nsp_fpr")
            )
            # equal: earlier and smaller is better
            score = (*score, float(gate.layer), float(gate.n_features))
            if (eligible is None or name in eligible) and (best is None or score < best[0]):
                best = (score, name, width, result)
    if best is None:
        raise ValueError("no gate to choose from")
    _, name, width, result = best
    gate = replace(gates[name], smooth=width, threshold=result.threshold)
    return GateChoice(name, gate, result, tuple(table))


def with_spread(gate: Gate, logits: np.ndarray, clips: Sequence[CalibrationClip]) -> Gate:
    """Set how the threshold rises towards small alphas: at alpha 0.25 about a quarter of the non-speech
    windows that are withheld at alpha 1 still are.
    """
    window_logits = smoothed(logits, gate.smooth).min(axis=1).astype(np.float64)
    withheld = [
        window_logits[row]
        for clip in clips
        if not clip.is_speech
        for row in clip.rows
        if window_logits[row] > gate.threshold
    ]
    if not withheld:
        return replace(gate, spread=1.0)
    # window_threshold(0.25) = threshold + spread * 3
    return replace(gate, spread=max(0.1, float(np.quantile(withheld, 0.75) - gate.threshold) / 3))


def with_frame_gate(gate: Gate, logits: np.ndarray, targets: np.ndarray) -> Gate:
    """Set slope and centre of the per-frame gate: shut (below 0.01, so exactly 0) on 99 % of speech frames,
    0.9 at the median of non-speech frames.

    logits: (rows, frames) unsmoothed; targets: (rows, frames) SPEECH, NOBODY or UNCLEAR.
    """
    values = smoothed(logits, gate.smooth)
    speech, nobody = values[targets == SPEECH], values[targets == NOBODY]
    if not len(speech) or not len(nobody):
        return gate
    shut, open_ = float(np.quantile(speech, 0.99)), float(np.median(nobody))
    shut_logit = float(np.log(MIN_FRAME_GATE / (1 - MIN_FRAME_GATE)))
    open_logit = float(np.log(0.9 / 0.1))
    # where the classes overlap the slope stays finite: a step of at least 0.5 logits between shut and open
    scale = (open_logit - shut_logit) / max(open_ - shut, 0.5)
    return replace(gate, frame_scale=scale, frame_bias=shut - shut_logit / scale)

"""Chooses a gate, its smoothing and its threshold on calibration clips, without decoding anything again.

What `whisper.transcribe` makes of every clip is known (calibration.hallucinations), and so are the
unsmoothed frame logits of every window it looked at. Withholding a window takes its words out of the
transcript, so the WER, the three rates and the share of speech that is lost follow for any threshold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from calibration.decoding import ClipTranscript, withhold
from calibration.evaluate import Outcome, WordErrors, normalise, word_errors
from calibration.gate_fit import SPEECH
from calibration.speech_costs import SpeechCosts
from whisper_steer.errors import UsageError
from whisper_steer.gate import MIN_FRAME_GATE, Gate

if TYPE_CHECKING:
    from calibration.corpus import Clip

SMOOTHINGS = (9, 15, 21, 31)
SHUT = 0.999  # share of speech frames on which no edit may act
MIN_RUN = 50  # frames (1 s): shorter pauses stay as they are
MARGIN = 15  # frames (0.3 s) beside speech that stay as they are
# gates are compared at several budgets at once: one more or one less lost clip must not decide. Upwards,
# since the budget is an interval's end: it allows few clips or none, and less than that would be the same; so
# far that alphas beyond 1 are compared, too.
_BUDGET_FACTORS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True)
class CalibrationClip:
    """A clip of the calibration split with what plain Whisper made of it.

    Attributes:
        rows: for each window of the transcript, its row in the table of frame logits.
        reference: what is said; None for non-speech. language: of it, a code.
        group: clips of one are not independent (a speaker, a source recording, variants of one recording);
            default: a group of its own.
    """

    id: str
    set: str
    reference: str | None
    transcript: ClipTranscript
    rows: tuple[int, ...]
    group: str = ""
    language: str = "en"

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", self.id)

    @classmethod
    def of(
        cls,
        clip: Clip,
        set_name: str,
        transcript: ClipTranscript,
        rows: Sequence[int] = (),
        *,
        language: str = "en",
    ) -> CalibrationClip:
        """From a source clip and what plain Whisper made of it."""
        reference = None if clip.kind == "nonspeech" else clip.text or ""
        group = str(getattr(clip, "group", "") or clip.id)
        return cls(clip.id, set_name, reference, transcript, tuple(rows), group, language)

    @property
    def is_speech(self) -> bool:
        return self.reference is not None

    def errors(self, text: str) -> WordErrors | None:
        """Of a text against the reference; None if that has no word."""
        return word_errors(self.reference or "", text, self.language)

    def has_words(self, text: str) -> bool:
        return bool(normalise(text, self.language))

    def is_emptied(self, after: ClipTranscript) -> bool:
        """Whether plain Whisper wrote words and nothing is left of them."""
        return self.has_words(self.transcript.text) and not self.has_words(after.text)

    def outcome(self, after: ClipTranscript) -> Outcome:
        """A transcript as an observation on non-speech."""
        return after.outcome(self.language)


@dataclass(frozen=True)
class Budget:
    """What may be lost on calibration speech.

    Attributes:
        wer_rise: of the WER over the speech sets that plain Whisper understands, absolute (0.001 = 0.1
            percentage points), held against the upper end of the rise's 95 % bootstrap interval.
        share: of speech clips that lose words to withholding, held against the upper end of its
            interval, too (`SpeechCosts.share_hi`): 0.002 is one clip in 1,500 or more, and none of fewer.
        set_share: the same within any one set, without an interval.
        set_rise: of the WER within any one set that plain Whisper understands, without an interval: what an
            edit gains elsewhere does not pay for a kind of speech that it spoils.
    """

    wer_rise: float = 0.001
    share: float = 0.002
    set_share: float = 0.02
    set_rise: float = 0.01

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 <= value <= 1:
                raise UsageError(
                    f"{name} is {value}: expected a fraction between 0 and 1 (0.001 = 0.1 points)"
                )

    def times(self, factor: float) -> Budget:
        """The budget with every limit multiplied, at most 1."""
        return Budget(*(min(1.0, value * factor) for value in asdict(self).values()))


@dataclass(frozen=True)
class MoreSpeech:
    """Windows that are not of calibration clips, judged by fits without them. Of speech: calibration's
    speakers are few, and where few clips may be lost, a few hundred more voices say more about the next one.
    A window of theirs that is withheld counts as lost, whatever plain Whisper makes of it. Of other sounds:
    they count where gates are compared; one that is not withheld counts as one with words.

    Attributes:
        window_logits: (n,). groups: of every window, as a CalibrationClip's. nobody: (m,) logits of windows
            without speech.
    """

    window_logits: np.ndarray
    groups: tuple[str, ...]
    nobody: np.ndarray = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class GateResult:
    """What withholding at a threshold does, rates as shares of clips. wer_rise: over the words that the
    budget counts (`SpeechCosts`); wer_plain, wer: over all."""

    threshold: float
    wer_plain: float
    wer: float
    lost: Mapping[str, float]
    text_fpr: float
    nsp_fpr: float
    hr: float
    plain_text_fpr: float
    wer_rise: float = 0.0


@dataclass(frozen=True)
class GateChoice:
    """The gate with its smoothing and threshold set, where it came from, and what it does.

    Attributes:
        table: a row of everything that was tried. window_logits: (rows,) float64, what the choice rests on.
        over_budgets: text-FPR (with `MoreSpeech`, over its other sounds, too), HR and nsp-FPR, each over a
            range of budgets: of the first the geometric mean, so that a half of what is left counts alike at
            every budget (half a clip is added, since none may be left), of the others the mean.
    """

    name: str
    gate: Gate
    result: GateResult
    table: tuple[Mapping[str, float | str | int], ...]
    window_logits: np.ndarray
    over_budgets: tuple[float, ...]


def smoothed(logits: np.ndarray, width: int) -> np.ndarray:
    """Frame logits (rows, frames) as `Gate.frame_logits` smooths them."""
    if width == 1:
        return logits
    pooled = F.avg_pool1d(
        torch.from_numpy(logits).unsqueeze(1), width, stride=1, padding=width // 2, count_include_pad=False
    )
    return pooled.squeeze(1).numpy()


def _after(clip: CalibrationClip, window_logits: np.ndarray, threshold: float) -> ClipTranscript:
    withheld = [bool(window_logits[row] > threshold) for row in clip.rows]
    return withhold(clip.transcript, withheld) if any(withheld) else clip.transcript


def _is_lost(clip: CalibrationClip, after: ClipTranscript) -> bool:
    """Whether withholding took words that were right, or all of them."""
    if after.text == clip.transcript.text:
        return False
    before_errors, after_errors = clip.errors(clip.transcript.text), clip.errors(after.text)
    worse = (
        before_errors is not None and after_errors is not None and after_errors.total > before_errors.total
    )
    return worse or clip.is_emptied(after)


def evaluate_threshold(
    clips: Sequence[CalibrationClip], window_logits: np.ndarray, threshold: float
) -> GateResult:
    """WER, share of lost speech clips per set ("all" too) and the rates on non-speech at a threshold."""
    costs = SpeechCosts(clips)
    lost: dict[str, list[bool]] = {}
    outcomes = []
    plain_text = []
    texts = []
    for clip in clips:
        after = _after(clip, window_logits, threshold)
        if not clip.is_speech:
            outcomes.append((clip.has_words(after.text), after.nsp, after.hr))
            plain_text.append(clip.has_words(clip.transcript.text))
            continue
        texts.append(after.text)
        for name in (clip.set, "all"):
            lost.setdefault(name, []).append(_is_lost(clip, after))
    errors, words = costs.errors(texts), max(float(costs.words.sum()), 1.0)
    text, nsp, hr = np.array(outcomes, dtype=float).T if outcomes else np.full((3, 1), np.nan)
    return GateResult(
        threshold=threshold,
        wer_plain=float(costs.plain.sum()) / words,
        wer=float(errors.sum()) / words,
        lost={name: float(np.mean(values)) for name, values in lost.items()},
        text_fpr=float(np.mean(text)),
        nsp_fpr=float(np.mean(nsp)),
        hr=float(np.mean(hr)),
        plain_text_fpr=float(np.mean(plain_text)) if plain_text else float("nan"),
        wer_rise=costs.rise_value(errors - costs.plain),
    )


def lowest_threshold(
    clips: Sequence[CalibrationClip],
    window_logits: np.ndarray,
    budget: Budget,
    more: MoreSpeech | None = None,
) -> float:
    """The lowest threshold within the budget: going down window by window of speech until it would be
    exceeded. more: counts in the share of clips that may be lost.

    Between that and the next non-speech window it makes no difference on these clips, so the middle is
    taken: clips that are not here get as much room on either side.
    """
    costs = SpeechCosts(clips)
    speech = costs.clips
    sizes: dict[str, int] = {}
    by_logit: dict[float, list[int]] = {}
    for number, clip in enumerate(speech):
        sizes[clip.set] = sizes.get(clip.set, 0) + 1
        for row in clip.rows:
            by_logit.setdefault(float(window_logits[row]), []).append(number)
    others_logits = np.zeros(0) if more is None else more.window_logits.astype(np.float64)
    others_groups = () if more is None else more.groups
    for value in others_logits.tolist():
        by_logit.setdefault(value, [])
    rise = np.zeros(len(speech))  # words more in error than plainly
    lost = np.zeros(len(speech), dtype=bool)
    floor = min(by_logit, default=0.0) - 1.0
    for value in sorted(by_logit, reverse=True):
        for number in by_logit[value]:
            clip = speech[number]
            after = _after(clip, window_logits, np.nextafter(value, -np.inf))
            counted = clip.errors(after.text)
            if counted is not None:
                # a fall elsewhere must not pay for words that are lost here, so falls do not count
                rise[number] = max(counted.total - costs.plain[number], 0)
            lost[number] = _is_lost(clip, after)
        by_set = Counter(speech[number].set for number in np.flatnonzero(lost))
        within = all(count <= budget.set_share * sizes[name] for name, count in by_set.items())
        share_hi = costs.share_hi(lost, others_logits >= value, others_groups)
        if not within or share_hi > budget.share or costs.rise(rise)[1] > budget.wer_rise:
            floor = value
            break
    others = [window_logits[row] for clip in clips if not clip.is_speech for row in clip.rows]
    above = [value for value in others if value > floor]
    return float((floor + min(above)) / 2) if above else float(floor)


def window_choice(
    name: str,
    gate: Gate,
    window_logits: np.ndarray,
    clips: Sequence[CalibrationClip],
    budget: Budget,
    more: MoreSpeech | None = None,
) -> GateChoice:
    """What the gate does at the lowest threshold within the budget, which is set; window_logits: (rows,);
    more: see `lowest_threshold`."""
    window_logits = window_logits.astype(np.float64)
    thresholds = [
        lowest_threshold(clips, window_logits, budget.times(factor), more) for factor in _BUDGET_FACTORS
    ]
    results = [evaluate_threshold(clips, window_logits, threshold) for threshold in thresholds]
    result = results[_BUDGET_FACTORS.index(1.0)]
    hr, nsp_fpr = (float(np.mean([getattr(r, rate) for r in results])) for rate in ("hr", "nsp_fpr"))
    count = sum(not clip.is_speech for clip in clips)
    left = np.array([r.text_fpr for r in results]) * count
    if more is not None:
        count += len(more.nobody)
        left += [np.sum(more.nobody <= r.threshold) for r in results]
    over_budgets = float(np.exp(np.log((left + 0.5) / (count + 1)).mean())), hr, nsp_fpr
    row: dict[str, float | str | int] = {
        "gate": name,
        "layer": gate.layer,
        "kind": gate.kind,
        "features": gate.n_features,
        "smooth": gate.smooth,
        "threshold": result.threshold,
        "text_fpr": result.text_fpr,
        "hr": result.hr,
        "nsp_fpr": result.nsp_fpr,
        "wer_rise": result.wer_rise,
        "text_fpr_mean_over_budgets": over_budgets[0],
    }
    settled = replace(gate, threshold=result.threshold)
    return GateChoice(name, settled, result, (row,), window_logits, over_budgets)


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
    best: tuple[tuple[float, ...], GateChoice] | None = None
    for name, gate in gates.items():
        for width in smoothings:
            lowest = smoothed(logits[name], width).min(axis=1)
            tried = window_choice(name, replace(gate, smooth=width), lowest, clips, budget)
            table += tried.table
            # equal: earlier and smaller is better
            score = (*tried.over_budgets, float(gate.layer), float(gate.n_features))
            if (eligible is None or name in eligible) and (best is None or score < best[0]):
                best = (score, tried)
    if best is None:
        raise ValueError("no gate to choose from")
    return replace(best[1], table=tuple(table))


def with_spread(gate: Gate, window_logits: np.ndarray, clips: Sequence[CalibrationClip]) -> Gate:
    """Set how the threshold rises towards small alphas: at alpha 0.25 about a quarter of the non-speech
    windows that are withheld at alpha 1 still are. window_logits: (rows,).
    """
    withheld = [
        window_logits[row]
        for clip in clips
        if not clip.is_speech
        for row in clip.rows
        if window_logits[row] > gate.threshold
    ]
    if not withheld:
        return replace(gate, spread=1.0)
    # window_threshold(0.25) = threshold + spread * 2
    return replace(gate, spread=max(0.1, float(np.quantile(withheld, 0.75) - gate.threshold) / 2))


def with_frame_gate(
    gate: Gate,
    logits: np.ndarray,
    targets: np.ndarray,
    *,
    shut: float = SHUT,
    min_run: int = MIN_RUN,
    margin: int = MARGIN,
) -> Gate:
    """Set slope, centre, shortest run and margin of the per-frame gate: 0.01, where it opens, at the lowest
    logit (never below 0) at which it is shut on the share `shut` of speech frames, 0.9 one logit above that.

    What counts is where it acts, so frames that short runs and margins keep shut are shut: a weak frame
    inside a word is no reason to leave a gap as it is.
    logits: (rows, frames) unsmoothed; targets: (rows, frames) SPEECH, NOBODY or UNCLEAR. min_run, margin: in
    frames.
    """
    spoken = targets == SPEECH
    rows = spoken.any(axis=1)
    if not rows.any():
        return gate
    shut_logit = float(np.log(MIN_FRAME_GATE / (1 - MIN_FRAME_GATE)))
    scale = float(np.log(0.9 / 0.1)) - shut_logit
    by_row = torch.from_numpy(smoothed(logits[rows], gate.smooth))

    def opening_at(logit: float) -> Gate:
        bias = logit - shut_logit / scale
        return replace(gate, frame_scale=scale, frame_bias=bias, min_run=min_run, margin=margin)

    def open_share(logit: float) -> float:
        opened = opening_at(logit).frame_gate(by_row).numpy() > 0
        return float(opened[spoken[rows]].mean())

    # a logit of 0 says that either is as likely: the gate is never open below
    low, high = 0.0, max(0.0, float(by_row.numpy()[spoken[rows]].max())) + 0.01
    if open_share(low) <= 1 - shut:
        return opening_at(low)
    while high - low > 0.01:
        middle = (low + high) / 2
        if open_share(middle) <= 1 - shut:
            high = middle
        else:
            low = middle
    return opening_at(high)

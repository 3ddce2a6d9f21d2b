"""Settings of a trade-off run as points: hallucination left against recognition lost, and who wins at which
cost.

A setting is a method at one strength. Its cost is the change of WER against plain Whisper on the same
speech clips; what it leaves is the text-FPR on the same non-speech clips.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import grouped
from calibration.evaluate import Rate, word_errors

OURS, PLAIN = "whisper-steer", "plain"
FRONTIER = (OURS, f"{OURS}-gate")  # the bundled steering as it is, and without edits: one choice of ours
FALL, RISE, EMPTY = 0.95, 0.001, 0.002  # targets at alpha 1: text-FPR relative; WER and empty clips absolute
MAX_COST = 0.01  # WER cost up to which methods are compared: one point
# family -> beginnings of its methods' names; the first that fits counts
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "ours": ("whisper-steer", "ours"),
    "voice activity detection": ("silero", "faster-whisper", "vad"),
    "steering by others": ("audiosae", "followup", "follow-up", "activation"),
    "at the decoder": ("calm", "hallucination-space", "hallucination_space"),
    "thresholds and filters": ("openai", "no-speech", "no_speech", "phrase", "bag", "linear"),
}
OTHERS = "others"

RATES = ("nsp_fpr", "hr", "words_per_min", "wer", "sub", "del", "ins", "lost_speech")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """One method at one strength on all clips of a group; fractions, None where not measured.

    rise: WER less that of plain Whisper. Its interval is that of the paired difference; lo = hi = value if
    only rates were kept, not what was heard. seconds: compute per minute of audio. rates: the others, of
    RATES, that were measured.
    """

    method: str
    strength: float
    text_fpr: Rate
    rise: Rate
    wer: float
    empty: Rate | None = None
    words_per_min: float | None = None
    seconds: float | None = None
    rates: Mapping[str, Rate] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return family_of(self.method)

    @property
    def name(self) -> str:
        """Such as "silero 0.5"; plain Whisper has no strength."""
        return self.method if self.method == PLAIN else f"{self.method} {self.strength:g}"


def family_of(method: str) -> str:
    """A key of FAMILIES, or OTHERS (plain Whisper too)."""
    return next((name for name, starts in FAMILIES.items() if method.startswith(starts)), OTHERS)


def rate_of(row: Row, name: str) -> Rate | None:
    """A rate of a row with its interval; None where its set has none."""
    value = row.get(name)
    if value is None:
        return None
    lo, hi = row.get(f"{name}_lo"), row.get(f"{name}_hi")
    return Rate(float(value), float(value if lo is None else lo), float(value if hi is None else hi))


def paired_rise(
    references: Sequence[str], plain: Sequence[str], texts: Sequence[str], groups: Sequence[str]
) -> Rate:
    """WER of `texts` less that of `plain` on the same clips (fractions), with the interval over groups of
    clips (`benchmarks.grouped`)."""
    more: list[float] = []
    words: list[float] = []
    kept: list[str] = []
    for reference, before, after, group in zip(references, plain, texts, groups, strict=True):
        old, new = word_errors(reference, before), word_errors(reference, after)
        if old is not None and new is not None:
            more.append(new.total - old.total)
            words.append(old.words)
            kept.append(group)
    return grouped.ratio(more, words, kept)


def settings_of(
    rows: Sequence[Row],
    *,
    half: str = "",
    rises: Mapping[tuple[str, float], Rate] | None = None,
    minutes: float | None = None,
) -> list[Setting]:
    """Every setting of which text-FPR and WER were measured, plain Whisper first and once.

    half: "" for all clips, "_synthetic", "_real". rises: paired changes of WER by (method, strength).
    minutes: of audio in the pools, for the compute time.
    """
    by_setting: dict[tuple[str, float], dict[str, Row]] = {}
    for row in rows:
        by_setting.setdefault((row["method"], float(row["alpha"])), {})[row["set"]] = row
    silent_name, spoken_name = "all_nonspeech" + half, "all_speech" + half
    both = {
        key: (sets[silent_name], sets[spoken_name])
        for key, sets in by_setting.items()
        if silent_name in sets and spoken_name in sets
    }
    zero = next((key for key in both if key[0] == PLAIN), next((key for key in both if key[1] == 0), None))
    if zero is None:
        return []
    found = []
    base = rate_of(both[zero][1], "wer")
    for (method, strength), (silent, spoken) in both.items():
        is_plain = (method, strength) == zero
        # its rows stand under every method that says what its strength 0 is: plain Whisper
        if not is_plain and strength == 0 and _same(silent, both[zero][0]) and _same(spoken, both[zero][1]):
            continue
        fpr, wer = rate_of(silent, "text_fpr"), rate_of(spoken, "wer")
        if fpr is None or wer is None or base is None:
            continue
        change = wer.value - base.value
        rise = (rises or {}).get((method, strength), Rate(change, change, change))
        spent = [row.get("seconds") for row in (silent, spoken)]
        known = sum(value for value in spent if value is not None) if None not in spent else None
        found.append(
            Setting(
                PLAIN if is_plain else method, strength, fpr, Rate(0, 0, 0) if is_plain else rise, wer.value,
                rate_of(spoken, "empty_speech"), silent.get("words_per_min"),
                known / minutes if known is not None and minutes else None,
                {
                    name: rate
                    for name in RATES
                    if (rate := rate_of(silent, name) or rate_of(spoken, name)) is not None
                },
            )
        )  # fmt: skip
    return sorted(found, key=lambda one: one.method != PLAIN)


def _same(row: Row, other: Row) -> bool:
    return all(row.get(name) == other.get(name) for name in ("text_fpr", "hr", "wer", "empty_speech"))


def reference_setting(settings: Iterable[Setting], method: str = OURS) -> Setting | None:
    """The method as it is used by default: at strength 1, else at the largest below, else at the
    smallest."""
    own = sorted((one for one in settings if one.method == method), key=lambda one: one.strength)
    below = [one for one in own if one.strength <= 1]
    return below[-1] if below else own[0] if own else None


def best_within(settings: Iterable[Setting], cost: float = MAX_COST) -> Setting | None:
    """The setting with the lowest text-FPR of those whose WER rises by at most `cost`; of equal ones the
    cheapest."""
    within = [one for one in settings if one.rise.value <= cost + 1e-12]
    return min(within, key=lambda one: (one.text_fpr.value, one.rise.value), default=None)


def representatives(settings: Sequence[Setting], cost: float = MAX_COST) -> dict[str, Setting]:
    """Per method its best setting within the cost, or where none is, its cheapest; of ours the default
    one."""
    by_method: dict[str, list[Setting]] = {}
    for one in settings:
        by_method.setdefault(one.method, []).append(one)
    chosen = {}
    for method, own in by_method.items():
        default = reference_setting(own, method) if method == OURS else None
        chosen[method] = default or best_within(own, cost) or min(own, key=lambda one: one.rise.value)
    return chosen


@dataclass(frozen=True)
class Lead:
    """A competitor that leaves less than ours at the same cost: where its lead is largest."""

    rival: Setting
    ours: float
    cost: float


def leads(settings: Sequence[Setting], ours: Sequence[str] = FRONTIER, cost: float = MAX_COST) -> list[Lead]:
    """Competitors that lie below our frontier at some WER cost from 0 to `cost`, the largest lead first.

    A method's frontier at a cost is the lowest text-FPR among its settings whose WER rises by at most that;
    ours is that of the bundled steering with edits or without, and includes plain Whisper, i.e. alpha 0.
    """
    own = [one for one in settings if one.method in (*ours, PLAIN)]
    costs = sorted({0.0, *(one.rise.value for one in settings if 0 < one.rise.value <= cost)})
    found: dict[str, Lead] = {}
    for rival_method in dict.fromkeys(one.method for one in settings if one.family != "ours"):
        if rival_method == PLAIN:
            continue
        rivals = [one for one in settings if one.method == rival_method]
        for at in costs:
            rival, us = best_within(rivals, at), best_within(own, at)
            if rival is None or us is None or rival.text_fpr.value >= us.text_fpr.value:
                continue
            lead = us.text_fpr.value - rival.text_fpr.value
            known = found.get(rival_method)
            if known is None or lead > known.ours - known.rival.text_fpr.value:
                found[rival_method] = Lead(rival, us.text_fpr.value, at)
    return sorted(found.values(), key=lambda one: one.rival.text_fpr.value - one.ours)

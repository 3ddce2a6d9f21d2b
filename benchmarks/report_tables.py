"""The tables of a trade-off report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.frontiers import MAX_COST, OURS, PLAIN, Setting, rate_of, representatives
from benchmarks.methods import TIMED
from benchmarks.report_data import ReportData, set_rows
from calibration.evaluate import Rate
from calibration.html_report import (
    Divider,
    Markup,
    Row,
    details,
    facts,
    joined,
    paragraph,
    section,
    table,
    text,
)

PAIRED = {"text_fpr": "text-FPR, points", "wer": "WER, points", "empty_speech": "empty speech, points"}


def percent(fraction: float, digits: int = 1) -> str:
    """0.0312 -> "3.1 %", with a space that does not break."""
    return f"{100 * fraction:.{digits}f}\u00a0%"


def points(fraction: float) -> str:
    """0.0003 -> "+0.03 points"; 0 has no sign."""
    value = round(100 * fraction, 2)
    return f"{value:+.2f} points".replace("-", "−") if value else "±0 points"


def amount(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def interval(
    rate: Rate | None, scale: float = 100.0, digits: int = 1, sign: bool = False, under: bool = False
) -> Markup:
    """A value with its interval in small print, beside or under it; None is a dash."""
    if rate is None:
        return text(None)
    form = f"{'+' if sign else ''}.{digits}f"
    shown = format(scale * rate.value, form)
    if rate.lo == rate.hi == rate.value and sign:  # the interval of the difference is not known
        return text(shown.replace("-", "−"))
    span = f"[{scale * rate.lo:{form}}, {scale * rate.hi:{form}}]"
    between = "<br>" if under else " "
    return Markup(f"{shown}{between}<span class='ci'>{span}</span>".replace("-", "−"))


NOT_GIVEN = "not given"  # by the method's runtime


def _three_rates(one: Setting) -> list[object]:
    """text-FPR, nsp-FPR and HR."""
    others = (one.rates.get(name) for name in ("nsp_fpr", "hr"))
    shown = (NOT_GIVEN if rate is None else interval(rate, under=True) for rate in others)
    return [interval(one.text_fpr, under=True), *shown]


def _marks(data: ReportData) -> dict[str, str]:
    """A letter for every way in which the run's methods were run (keys of TIMED)."""
    names = dict.fromkeys(_timed(data, one.method) for one in data.settings)
    return dict(zip((name for name in names if name is not None), "abcdefgh", strict=False))


def _spent(one: Setting, data: ReportData) -> Markup | None:
    """Seconds per minute with the letter of how they came about."""
    if one.seconds is None:
        return None
    mark = _marks(data).get(_timed(data, one.method) or "")
    return Markup(f"{one.seconds:.1f}{f'<sup>{mark}</sup>' if mark else ''}")


def _summary_row(one: Setting, data: ReportData) -> Row:
    plain, is_plain = data.plain, one.method == PLAIN
    relative = None
    if plain is not None and plain.text_fpr.value:
        relative = f"{100 * (one.text_fpr.value / plain.text_fpr.value - 1):+.0f} %".replace("-", "−")
    first, *others = _three_rates(one)
    about = _abouts(data).get(one.method, "")
    name = Markup(f"<span title='{text(about)}'>{text(one.name)}</span>") if about else one.name
    return Row(
        (
            name, first, "" if is_plain else relative, *others,
            "" if is_plain else interval(one.rise, digits=2, sign=True, under=True),
            interval(one.empty, under=True),
            None if one.words_per_min is None else amount(one.words_per_min), _spent(one, data),
        ),
        strong=one.method == OURS,
    )  # fmt: skip


SUMMARY = (
    "method and strength", "text-FPR %", "against plain", "nsp-FPR %", "HR %", "WER change, points",
    "empty speech %", "invented words/min", "compute, s/min",
)  # fmt: skip


def _full_row(one: Setting, data: ReportData) -> Row:
    parts = [interval(one.rates.get(name), under=True) for name in ("wer", "sub", "del", "ins")]
    return Row(
        (
            one.name, *_three_rates(one), interval(one.rates.get("words_per_min"), 1.0, under=True),
            "" if one.method == PLAIN else interval(one.rise, digits=2, sign=True, under=True), *parts,
            interval(one.empty, under=True), interval(one.rates.get("lost_speech"), under=True),
            _spent(one, data),
        ),
        strong=one.method == OURS,
    )  # fmt: skip


FULL = (
    "method and strength", "text-FPR %", "nsp-FPR %", "HR %", "invented words/min", "WER change, points",
    "WER %", "subst. %", "del. %", "ins. %", "empty speech %", "lost speech %", "compute, s/min",
)  # fmt: skip


def method_sections(data: ReportData) -> list[Markup]:
    """One line per method, then every setting folded away."""
    if not data.settings:
        return []
    chosen = sorted(
        representatives(data.settings).values(),
        key=lambda one: (one.rise.value > MAX_COST, one.text_fpr.value, one.rise.value),
    )
    within = [one for one in chosen if one.rise.value <= MAX_COST]
    beyond = [one for one in chosen if one.rise.value > MAX_COST]
    rows: list[Row | Divider] = [_summary_row(one, data) for one in within]
    if beyond:
        limit = f"{100 * MAX_COST:g} point of WER"
        rows.append(Divider(f"Cost more than {limit} at every strength; shown at the cheapest:"))
        rows += [_summary_row(one, data) for one in beyond]
    every = [_full_row(one, data) for one in data.settings]
    parts = [
        table(SUMMARY, rows, left=1),
        details(f"All {len(every)} settings", table(FULL, every, left=1)),
        Markup(f"<p class='note'>{text(SCORES_NOTE)}</p>"),
        Markup(f"<p class='note'>{_time_note(data)}.</p>"),
    ]
    note = (
        f"Each at its best strength within {100 * MAX_COST:g} point of WER on these very clips, which "
        f"favours the competitors; {OURS} at its default. Value [95 % interval]. Lowest text-FPR first."
    )
    return [section("Methods", *parts, note=note)]


SCORES_NOTE = (
    "nsp-FPR (no_speech_prob below 0.5) and HR (openai-whisper's skip rule would keep it) are of every 30 s "
    "window, greedy; of faster-whisper and of the gate as speech finder, of the segments in the transcript. "
    "What a method withholds, skips or leaves out counts as recognised non-speech. "
    f"{NOT_GIVEN.capitalize()}: the runtime does not show the scores."
)


def _time_note(data: ReportData) -> Markup:
    """How the compute column came about: threads, and what each letter in it means."""
    threads = data.run.get("threads")
    used = " or ".join(map(str, threads)) if threads else "an unrecorded number of"
    words = f"Compute: wall-clock seconds per minute of audio, {used} PyTorch thread"
    meant = [
        joined((Markup(f"<sup>{mark}</sup> "), f"{name}: {TIMED.get(name, '')}"))
        for name, mark in _marks(data).items()
    ]
    return joined((f"{words}{'' if threads == [1] else 's'}", *meant), ". ")


def _timed(data: ReportData, method: str) -> str | None:
    """How the method was run, a key of TIMED; None where the run does not say."""
    found = data.run.get("methods", {}).get(method, {}).get("timed")
    return None if found is None else str(found)


def category_tables(data: ReportData) -> list[Markup]:
    """text-FPR of every method's best setting on every kind of non-speech, and WER on every kind of
    speech."""
    chosen = list(representatives(data.settings).values())
    parts = []
    for rate, title in (("text_fpr", "text-FPR % by kind of non-speech"), ("wer", "WER % by kind of speech")):
        by_set = set_rows(data.rows, rate)
        if not by_set or not chosen:
            continue
        rows = []
        for one in chosen:
            found = [sets.get((one.method, one.strength)) for sets in by_set.values()]
            values = [None if row is None else row[rate] for row in found]
            cells = [None if value is None else f"{100 * value:.1f}" for value in values]
            label = one.name
            rows.append(Row((label, *cells), one.method == OURS, (None, *values)))
        columns = ("method and strength", *(f"{name} ({_clips(sets)})" for name, sets in by_set.items()))
        parts.append(details(f"{title}, every method", table(columns, rows)))
    return parts


def _clips(sets: Mapping[Any, Mapping[str, Any]]) -> str:
    return f"{next(iter(sets.values())).get('clips', '?')} clips"


def paired_sections(data: ReportData) -> list[Markup]:
    """Differences from ours on the same clips."""
    if not data.paired:
        return []
    rows = []
    for one in data.paired:
        if one.get("set") != "all":
            continue  # the halves
        rates = [rate_of(one, f"{name}_diff") for name in PAIRED]
        strength = one.get("alpha")
        cells = [
            interval(rate, digits=2 if name == "wer" else 1, sign=True)
            for name, rate in zip(PAIRED, rates, strict=True)
        ]
        worse = [_sides(rate) for rate in rates]
        rows.append(
            Row((one.get("method"), None if strength is None else f"{strength:g}", *cells, _verdict(worse)))
        )
    columns = ("method", "strength", *PAIRED.values(), "against ours")
    note = (
        f"Each setting less {OURS} at its default, on the same clips: positive is worse than ours. Interval "
        "of the paired difference; where it excludes 0, the last column says who is better."
    )
    body = table(columns, rows)
    return [section("Paired with ours", details(f"{len(rows)} settings", body), note=note)]


LONG = {
    "invented_per_min": ("invented words/min", 1.0),
    "invented_of_plain": ("of plain's %", 100.0),
    "lost": ("lost words %", 100.0),
    "lost_more_than_vad": ("lost, against Silero, points", 100.0),
    "substituted": ("substituted %", 100.0),
    "inserted": ("inserted near speech %", 100.0),
}  # rate -> heading, scale


def long_sections(data: ReportData) -> list[Markup]:
    """Recordings of minutes in which speech and other things take turns: all of them, then by their sort."""
    if not data.long:
        return []
    sorts = [name for name in dict.fromkeys(str(row["set"]) for row in data.long) if name != "all"]
    columns = ("method", "strength", *(heading for heading, _ in LONG.values()), "compute, s/min")

    def shown(name: str) -> Markup:
        rows = [
            Row(
                (
                    row["method"], f"{row['alpha']:g}",
                    *(
                        interval(rate_of(row, rate), scale, sign="more_than" in rate)
                        for rate, (_, scale) in LONG.items()
                    ),
                    f"{row['seconds_per_min']:.1f}",
                ),
                strong=str(row["method"]).startswith(OURS),
            )
            for row in data.long
            if row["set"] == name
        ]  # fmt: skip
        return table(columns, rows, left=1)

    whole = next((row for row in data.long if row["set"] == "all"), data.long[0])
    note = (
        f"{whole['recordings']} recording{'s' if whole['recordings'] > 1 else ''}, "
        f"{whole['minutes']:.0f} minutes, of which {whole['nonspeech_minutes']:.0f} without speech; "
        "each is transcribed as a whole. Invented: words more than 0.5 s from all speech. Lost: "
        "words of the reference without a counterpart. Intervals: 95 %, bootstrap over "
        "recordings (python -m benchmarks.long_recordings)."
    )
    parts = [details(f"{name} recordings", shown(name)) for name in sorts]
    return [section("Long recordings", shown("all"), *parts, note=note)]


def _sides(rate: Rate | None) -> int:
    """1: surely worse than ours, -1: surely better, 0: not told apart."""
    if rate is None:
        return 0
    return 1 if rate.lo > 0 else -1 if rate.hi < 0 else 0


def _verdict(sides: Sequence[int]) -> str:
    names = ("hallucination", "WER", "empty speech")
    worse = [name for name, side in zip(names, sides, strict=True) if side > 0]
    better = [name for name, side in zip(names, sides, strict=True) if side < 0]
    parts = [f"worse: {', '.join(worse)}"] if worse else []
    parts += [f"better: {', '.join(better)}"] if better else []
    return "; ".join(parts) or "not told apart"


def _abouts(data: ReportData) -> dict[str, str]:
    methods = data.run.get("methods", {})
    return {name: str(record.get("about", "")) for name, record in methods.items()}


def run_sections(data: ReportData) -> list[Markup]:
    """What could not run and why, what the methods are, how it was measured."""
    found = []
    unavailable = data.run.get("unavailable", {})
    if unavailable:
        rows = [Row((name, reason)) for name, reason in unavailable.items()]
        found.append(section("Could not run", table(("method", "reason"), rows, left=2)))
    abouts = {name: about for name, about in _abouts(data).items() if about}
    if abouts:
        rows = [Row((name, about)) for name, about in abouts.items()]
        found.append(section("What the methods are", table(("method", "what it does"), rows, left=2)))
    shown = (
        "command", "package_version", "model", "steering", "data", "quick", "measured", "threads",
        "wall_seconds",
    )  # fmt: skip
    measured = {name.replace("_", " "): data.run[name] for name in shown if data.run.get(name) is not None}
    if isinstance(measured.get("threads"), list):
        measured["threads"] = " or ".join(map(str, measured["threads"]))
    terms = paragraph(
        "text-FPR: share of non-speech clips that came back with words after Whisper's English text "
        "normaliser. WER: over clips with a reference, errors over words. Empty speech: share of speech "
        "clips whose transcript holds no word. Intervals: 95 %, 1,000 bootstrap draws of whole speakers and "
        "source recordings (a synthetic clip stands alone), the same draws for all methods."
    )
    found.append(section("How it was measured", joined((terms, facts(measured)))))
    return found

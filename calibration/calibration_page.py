"""The report of `whisper-steer calibrate`: the frontier with the budget, what was chosen, and what a third
split says.

`write_report` puts one self-contained HTML page and the frontier as PNG on disk; nothing is measured here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.export import write_whole
from calibration.html_report import (
    Markup,
    Row,
    Tile,
    Tone,
    details,
    facts,
    figure,
    headline,
    page,
    paragraph,
    section,
    table,
    text,
    tiles,
)
from calibration.report_figures import Label, Theme, arms, picture, place_labels
from whisper_steer.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDED = ("alpha", "text_fpr", "wer_rise")
# rates that are shares; the others are shown as they are
SHARES = (
    "text_fpr",
    "nsp_fpr",
    "hr",
    "wer",
    "wer_rise",
    "sub",
    "del",
    "ins",
    "empty_speech",
    "wrongly_emptied",
)
NAMES = {
    "text_fpr": "non-speech clips with words (text-FPR), %",
    "nsp_fpr": "no_speech_prob below 0.5 (nsp-FPR), %",
    "hr": "skip rule does not fire (HR), %",
    "words_per_min": "invented words per minute of non-speech",
    "wer": "word error rate, %",
    "wer_rise": "change of the word error rate, points",
    "sub": "substitutions, %",
    "del": "deletions, %",
    "ins": "insertions, %",
    "empty_speech": "speech clips that came back empty, %",
    "wrongly_emptied": "speech clips emptied wrongly, %",
    "counted_words": "words that its change is over",
}

Point = Mapping[str, Any]


def write_report(
    path_html: Path | str,
    path_png: Path | str,
    *,
    title: str,
    model_line: str,
    frontier: Sequence[Point],
    profiles: Mapping[str, float],
    test: Mapping[str, Any],
    splits: Mapping[str, Any],
    record: Mapping[str, Any],
    budget: float,
    notes: Sequence[str] = (),
) -> tuple[Path, Path]:
    """Writes the page and the picture of its frontier; returns their paths.

    model_line: the model in a sentence. frontier: points measured on the validation split, each with alpha,
    threshold (the gate's window logit; None or absent without a gate), text_fpr with text_fpr_lo and
    text_fpr_hi, wer_rise with wer_rise_hi, empty_speech; fractions; and nonspeech_clips, speech_clips and
    unheard_clips, where they are known. The chosen point is the one at alpha 1.
    profiles: name -> alpha. test: rates on the test split by name, fractions, each with _lo and _hi where
    it has an interval and with _plain where plain Whisper was measured too (or all of plain's under
    "plain"), and counted_words and counted_sets, over which the rise of the WER is. splits: split -> its
    clips, a number or kind -> number. record: what else the file should say of how it was made. budget:
    highest accepted rise of the WER, a fraction, held against the upper end of its interval. notes: sentences
    that every reader should see.

    Raises UsageError (no frontier, a point without a number it needs, a budget below 0), FormatError
    (cannot be written).
    """
    points = _checked(frontier)
    if not (math.isfinite(budget) and budget >= 0):
        raise UsageError(f"the WER budget is {budget}: expected a fraction of at least 0, e.g. 0.001")
    drawn = picture(lambda one, theme: _draw(one, theme, points, profiles, budget, title), (8.6, 5.6))
    chosen = chosen_point(points)
    caption = (
        "Validation split. Across: change of the word error rate, the bar ends at the upper end of its 95 % "
        "interval, which the budget is held against. Up: hallucinated non-speech clips with interval. Ring: "
        "alpha 1. Numbers: alpha."
    )
    body = [
        *_answer(chosen, test, budget),
        *([section("Gate and latents", *(paragraph(note + ".") for note in notes))] if notes else []),
        section("Frontier", figure(drawn, caption, alt="hallucination rate against change of WER by alpha")),
        section(
            "Profiles",
            _profile_table(points, profiles),
            note="Points of the frontier: --profile NAME, or --alpha.",
        ),
    ]
    if test:
        note = "Clips that neither the fit nor the choice has seen." + _counted(test)
        body.append(section("On the test split", _test_table(test), note=note))
    if splits:
        body.append(section("What was measured", _split_table(splits)))
    body.append(section("All points of the frontier", _point_table(points, chosen), note=_of_clips(points)))
    if record:
        body.append(
            section("Record", details("Everything the file says of how it was made", facts(_flat(record))))
        )
    html = page(title, body, subtitle=model_line, footer=_version())
    for path, content in ((Path(path_png), drawn.light), (Path(path_html), html.encode())):
        write_whole(path, content)
    return Path(path_html), Path(path_png)


def chosen_point(points: Sequence[Point]) -> Point:
    """The point whose alpha is nearest to 1."""
    return min(points, key=lambda one: (abs(one["alpha"] - 1), one["alpha"]))


def _checked(frontier: Sequence[Point]) -> list[Point]:
    if not frontier:
        raise UsageError("the frontier has no point: measure at least one alpha on the validation split")
    for number, point in enumerate(frontier):
        for name in NEEDED:
            value = point.get(name)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UsageError(f"frontier point {number} has {name} {value!r}: expected a number")
    return sorted(frontier, key=lambda one: one["alpha"])


def _version() -> str:
    from whisper_steer.fileformat import package_version

    return f"whisper-steer {package_version()} calibrate"


def _bound(point: Point, name: str, end: str) -> float:
    """A bound of an interval, the value itself where there is none."""
    found = point.get(name + end)
    return float(point[name] if found is None else found)


# -- the parts ------------------------------------------------------------------------------------------


def _answer(chosen: Point, test: Mapping[str, Any], budget: float) -> list[Markup]:
    """The headline: what the test split says, or the validation split where there is none."""
    plain = _plain_of(test, "text_fpr")
    rate, rise = test.get("text_fpr"), _rise_of(test)
    if rate is None or rise is None:
        high = _bound(chosen, "wer_rise", "_hi")
        sentence = (
            f"At alpha {chosen['alpha']:g}, {100 * chosen['text_fpr']:.1f} % of non-speech still comes back "
            f"with words, and the word error rate changes by {_points(chosen['wer_rise'])}."
        )
        more = f"Validation split; upper end of the interval {_points(high)}, budget {_points(budget)}."
        return [headline(sentence, more)]
    fall = f"{100 * plain:.1f} % → " if plain is not None else ""
    sentence = (
        f"On the test split, {fall}{100 * rate:.1f} % of non-speech comes back with words, and the word "
        f"error rate changes by {_points(rise)}."
    )
    figures = []
    if plain:
        figures.append(
            Tile("hallucinated transcripts", f"{100 * (rate / plain - 1):+.1f} %".replace("-", "−"))
        )
    low, high = (_bound({"wer_rise": rise, **test}, "wer_rise", end) for end in ("_lo", "_hi"))
    span = "" if low == high else f"{_points(low)} to {_points(high)}, "
    tone: Tone = "good" if high <= budget else "bad"
    figures.append(Tile("word error rate", _points(rise), f"{span}budget {_points(budget)}", tone))
    figures += _emptied(test)
    doubts = []
    if rise <= budget < high:
        doubts.append(
            f"The upper end of the interval, {_points(high)}, is above the budget: so few recordings do not "
            "show that it is kept."
        )
    at_choice = _bound(chosen, "wer_rise", "_hi")
    if at_choice > budget:
        doubts.append(
            f"Alpha {chosen['alpha']:g} does not keep the budget on the validation split: the upper end of "
            f"its interval is {_points(at_choice)}."
        )
    return [headline(sentence, *doubts), tiles(figures)]


def _emptied(test: Mapping[str, Any]) -> list[Tile]:
    """Speech that came back without a word: what steering took, with its interval, else all of it."""
    if test.get("wrongly_emptied") is not None:
        low, high = (100 * _bound(test, "wrongly_emptied", end) for end in ("_lo", "_hi"))
        value = f"{100 * test['wrongly_emptied']:.1f} %"
        return [Tile("speech clips emptied wrongly", value, f"{low:.1f} to {high:.1f} %")]
    if test.get("empty_speech") is None:
        return []
    before = _plain_of(test, "empty_speech")
    detail = "" if before is None else f"plain: {100 * before:.1f} %"
    return [Tile("speech clips that came back empty", f"{100 * test['empty_speech']:.1f} %", detail)]


def _counted(test: Mapping[str, Any]) -> str:
    """Over which words the rise of the WER is; "" where that is not known."""
    if test.get("counted_words") is None:
        return ""
    sets = ", ".join(test.get("counted_sets") or ())
    return (
        f" The change of the word error rate is over the {test['counted_words']} words of {sets}; sets of "
        "which plain Whisper gets more than every second word wrong are left out, unless it does of all."
    )


def _of_clips(points: Sequence[Point]) -> str:
    """How many clips the points are of; "" where that is not known."""
    counts = {(one.get("nonspeech_clips"), one.get("speech_clips")) for one in points}
    if len(counts) != 1 or None in (found := next(iter(counts))):
        return ""
    return (
        f"Every point is of the same {found[0]} clips of non-speech and {found[1]} of speech. Not heard: "
        "those of them that an edit may change at this alpha; clips like them that were heard stand for them."
    )


def _rise_of(test: Mapping[str, Any]) -> float | None:
    """Change of the WER, given or from both values."""
    if test.get("wer_rise") is not None:
        return float(test["wer_rise"])
    plain = _plain_of(test, "wer")
    return None if plain is None or test.get("wer") is None else float(test["wer"]) - plain


def _plain_of(test: Mapping[str, Any], name: str) -> float | None:
    """Plain Whisper's value of a rate."""
    inner = test.get("plain")
    found = test.get(f"{name}_plain", inner.get(name) if isinstance(inner, Mapping) else None)
    return None if found is None else float(found)


def _points(fraction: float) -> str:
    value = round(100 * fraction, 3)
    return f"{value:+g} points".replace("-", "−") if value else "±0 points"


def _profile_table(points: Sequence[Point], profiles: Mapping[str, float]) -> Markup:
    rows = []
    for name, alpha in sorted(profiles.items(), key=lambda item: item[1]):
        nearest = min(points, key=lambda one: abs(one["alpha"] - alpha))
        measured = abs(nearest["alpha"] - alpha) < 1e-9
        rows.append(
            Row((name, f"{alpha:g}", *(_cells(nearest) if measured else ("not measured",) * len(COLUMNS))))
        )
    return table(("profile", "alpha", *COLUMNS), rows)


COLUMNS = (
    "window threshold, logit",
    "text-FPR %",
    "WER change, points",
    "empty speech %",
    "clips",
    "not heard",
)


def _cells(point: Point) -> tuple[object, ...]:
    threshold, empty = point.get("threshold"), point.get("empty_speech")
    low, high = (_bound(point, "text_fpr", end) for end in ("_lo", "_hi"))
    up = _bound(point, "wer_rise", "_hi")
    return (
        None if threshold is None else f"{threshold:.2f}",
        _with_span(f"{100 * point['text_fpr']:.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]"),
        _with_span(f"{100 * point['wer_rise']:+.2f}", f"up to {100 * up:+.2f}"),
        None if empty is None else f"{100 * empty:.2f}",
        point.get("clips"),
        point.get("unheard_clips"),
    )


def _with_span(value: str, span: str) -> Markup:
    return Markup(f"{text(value)} <span class='ci'>{text(span)}</span>".replace("-", "−"))


def _point_table(points: Sequence[Point], chosen: Point) -> Markup:
    rows = [Row((f"{one['alpha']:g}", *_cells(one)), strong=one is chosen) for one in points]
    return table(("alpha", *COLUMNS), rows)


def _test_table(test: Mapping[str, Any]) -> Markup:
    rows = []
    for name, value in test.items():
        bound = name.endswith(("_lo", "_hi", "_plain"))
        if bound or not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        scale = 100 if name in SHARES else 1
        digits = 0 if isinstance(value, int) and scale == 1 else 2
        span = ""
        if test.get(f"{name}_lo") is not None and test.get(f"{name}_hi") is not None:
            low, high = test[f"{name}_lo"], test[f"{name}_hi"]
            span = f"[{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
        plain = _plain_of(test, name)
        before = None if plain is None else f"{scale * plain:.{digits}f}"
        label = NAMES.get(name, name.replace("_", " "))
        rows.append(Row((label, before, _with_span(f"{scale * value:.{digits}f}", span))))
    return table(("measure", "plain Whisper", "steered [95 %]"), rows)


def _split_table(splits: Mapping[str, Any]) -> Markup:
    kinds = list(
        dict.fromkeys(kind for counts in splits.values() if isinstance(counts, Mapping) for kind in counts)
    )
    if not kinds:
        return table(("split", "clips"), [Row((name, count)) for name, count in splits.items()])
    rows = []
    for name, counts in splits.items():
        inner = counts if isinstance(counts, Mapping) else {}
        total = None if isinstance(counts, Mapping) else counts
        rows.append(Row((name, *(inner.get(kind) for kind in kinds), total)))
    if all(isinstance(counts, Mapping) for counts in splits.values()):
        return table(("split", *kinds), [Row(row.cells[:-1]) for row in rows])
    return table(("split", *kinds, "clips"), rows)


def _flat(record: Mapping[str, Any], before: str = "") -> dict[str, object]:
    """Nested mappings as dotted names; lists as JSON, long ones cut."""
    found: dict[str, object] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.")
        elif isinstance(value, (list, tuple)):
            written = json.dumps(value, default=str, ensure_ascii=False)
            found[before + name] = (
                written if len(written) <= 300 else f"{written[:300]}… ({len(value)} items)"
            )
        else:
            found[before + name] = f"{value:.6g}" if isinstance(value, float) else value
    return found


# -- the picture ----------------------------------------------------------------------------------------


def _draw(
    figure: Figure,
    theme: Theme,
    points: Sequence[Point],
    profiles: Mapping[str, float],
    budget: float,
    title: str,
) -> None:
    axes = figure.subplots()
    across = [100 * one["wer_rise"] for one in points]
    up = [100 * one["text_fpr"] for one in points]
    spans = [(100 * _bound(one, "text_fpr", "_lo"), 100 * _bound(one, "text_fpr", "_hi")) for one in points]
    ends = [
        max(value, 100 * _bound(one, "wer_rise", "_hi")) for value, one in zip(across, points, strict=True)
    ]
    reach = [(value, end) for value, end in zip(across, ends, strict=True)]
    axes.plot(across, up, color=theme.accent, linewidth=2, zorder=3)
    axes.errorbar(
        across, up, xerr=arms(across, reach), yerr=arms(up, spans), fmt="none", ecolor=theme.accent,
        elinewidth=1, alpha=0.5, capsize=2.5, zorder=2,
    )  # fmt: skip
    axes.plot(across, up, "o", color=theme.accent, markersize=7, markeredgecolor=theme.paper, zorder=4)
    left, right = min([*across, 0.0]), max([*ends, 100 * budget])
    room = 0.08 * max(right - left, 0.05)
    highest = max(high for _, high in spans) or 1.0
    axes.set_xlim(left - room, right + 2 * room)
    axes.set_ylim(-0.04 * highest, 1.1 * highest)
    axes.axvspan(left - room, 100 * budget, color=theme.good, alpha=0.1, linewidth=0, zorder=0)
    axes.axvline(100 * budget, color=theme.good, linewidth=1.5, linestyle="--", zorder=1)
    chosen = chosen_point(points)
    spot = (100 * chosen["wer_rise"], 100 * chosen["text_fpr"])
    axes.plot(*spot, "o", markersize=15, fillstyle="none", color=theme.accent, markeredgewidth=1.8, zorder=5)
    labels = []
    for one, x, y in zip(points, across, up, strict=True):
        names = [name for name, alpha in profiles.items() if abs(alpha - one["alpha"]) < 1e-9]
        words = ", ".join([f"α {one['alpha']:g}", *names])
        labels.append(Label(words, x, y, theme.ink if names else theme.soft, bool(names)))
    axes.set_xlabel("change of the word error rate, points (left is better)")
    axes.set_ylabel("non-speech clips with words, % (down is better)")
    axes.set_title(title)
    axes.grid(linewidth=0.6, alpha=0.6)
    axes.annotate(
        f"budget {_points(budget)}", (100 * budget, 1), xycoords=("data", "axes fraction"), xytext=(4, -4),
        textcoords="offset points", va="top", color=theme.good, fontsize=9,
    )  # fmt: skip
    place_labels(axes, labels, list(zip(across, up, strict=True)), theme.paper)

"""One HTML page from a trade-off run: the answer, the frontier, then the detail; and its pictures as PNG.

    python -m benchmarks.report_page out/tradeoff          # writes report.html and *.png into the run's
    folder

The page holds its pictures and sounds, loads nothing from outside, and opens without a network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import report_plots, report_tables
from benchmarks.failures import LEFT, Failure, marked_words
from benchmarks.files import write_whole
from benchmarks.frontiers import (
    EMPTY,
    FALL,
    MAX_COST,
    OURS,
    PLAIN,
    RISE,
    Setting,
    leads,
    representatives,
)
from benchmarks.report_data import ReportData, category_rates, read_report_data
from benchmarks.report_tables import amount, percent, points
from calibration.evaluate import NSP_THRESHOLD, SKIP_NO_SPEECH
from calibration.html_report import (
    Markup,
    Tile,
    Tone,
    audio_player,
    badge,
    details,
    facts,
    figure,
    headline,
    joined,
    page,
    paragraph,
    section,
    text,
    tiles,
    waveform,
)
from calibration.report_figures import Picture
from whisper_steer.errors import WhisperSteerError

if TYPE_CHECKING:
    from calibration.corpus import Clip

REPORT = "report.html"
TITLE = "whisper-steer: what steering saves and what it costs"
BARS = 8  # methods that are shown by category


def write_report(out: Path, *, audio: Mapping[str, Clip] | None = None) -> list[Path]:
    """Writes report.html and the PNG files into the run's folder; returns their paths, the page first.

    audio: the measured clips by id, for the players; None: they are found again from run.json, and where
    that fails the page says so and does without sounds. Raises UsageError (`out` is not a run's folder, or
    cannot be written), FormatError (a file is damaged).
    """
    data = read_report_data(out)
    silent = ""
    if audio is None:
        from benchmarks.hearing_cache import load_clips

        try:
            audio = load_clips(out) if data.failures else {}
        except WhisperSteerError as error:
            audio, silent = {}, f"No sounds: {error}"
    pictures = draw(data)
    written = [write_whole(out / REPORT, build(data, pictures, audio, silent))]
    return written + [write_whole(out / f"{name}.png", drawn.light) for name, drawn in pictures.items()]


def draw(data: ReportData) -> dict[str, Picture]:
    """The pictures by name: frontier, its halves, categories, speech, distributions; those that can be
    drawn."""
    found: dict[str, Picture] = {}
    if data.settings:
        title = "Hallucination against recognition: every method at every strength"
        found["frontier"] = report_plots.frontier(data.settings, title=title)
    for name, settings in data.halves.items():
        stem = "frontier_" + name.split()[0]
        found[stem] = report_plots.frontier(settings, title=f"Hallucination against recognition: {name}")
    shown = _shown(data.settings)
    accented = [label for label, one in shown.items() if one.family == "ours"]
    for stem, rate, title, label in (
        ("categories", "text_fpr", "Hallucinations by kind of non-speech", "clips with words, %"),
        ("speech", "wer", "Word error rate by kind of speech", "WER, %"),
    ):
        panels = category_rates(data.rows, rate, shown)
        if panels:
            found[stem] = report_plots.bars(panels, title=title, label=label, accented=accented)
    if scores := _scores(data):
        title = "How well one number tells speech from non-speech, clip by clip"
        found["distributions"] = report_plots.distributions(scores, title=title)
    return found


def _shown(settings: Sequence[Setting]) -> dict[str, Setting]:
    """Methods for the bars by label: plain, ours, then the best of the others, each family's best first."""
    best = representatives(settings)
    ranked = sorted(best.values(), key=lambda one: (one.rise.value > MAX_COST, one.text_fpr.value))
    rivals = [one for one in ranked if one.family != "ours" and one.method != PLAIN]
    firsts = list({one.family: one for one in reversed(rivals)}.values())
    order = [best[name] for name in (PLAIN, OURS) if name in best]
    order += [one for one in ranked if one.family == "ours" and one.method == f"{OURS}+vad"]
    order += sorted(firsts, key=lambda one: one.text_fpr.value)
    order += [one for one in rivals if one not in firsts]
    return {one.name: one for one in order[:BARS]}


def _scores(data: ReportData) -> dict[str, tuple[np.ndarray, np.ndarray, Mapping[str, float]]]:
    """Panels of the distributions; scores that no clip has are left out."""
    marks: dict[str, Mapping[str, float]] = {
        "no_speech_prob": {f"AudioSAE's τ {NSP_THRESHOLD:g}": NSP_THRESHOLD, "skip rule": SKIP_NO_SPEECH},
        "gate": {} if data.gate_threshold is None else {"withheld beyond (α 1)": data.gate_threshold},
    }
    titles = {
        "no_speech_prob": "no_speech_prob of plain Whisper",
        "gate": "gate: probability that nobody speaks",
    }
    panels = {}
    for name, title in titles.items():
        values = [(clip.is_speech, getattr(clip, name)) for clip in data.clips]
        speech, silent = (
            np.array([value for spoken, value in values if spoken == wanted and value is not None])
            for wanted in (True, False)
        )
        if len(speech) or len(silent):
            panels[title] = (speech, silent, marks[name])
    return panels


# -- the page -------------------------------------------------------------------------------------------


def build(
    data: ReportData, pictures: Mapping[str, Picture], audio: Mapping[str, Clip], silent: str = ""
) -> str:
    """The page. silent: why there are no sounds, one sentence."""
    body = [*_answer(data)]
    if "frontier" in pictures:
        body.append(_frontier_section(data, pictures))
    body += report_tables.method_sections(data)
    body += _category_sections(data, pictures)
    if "distributions" in pictures:
        body.append(_distribution_section(data, pictures["distributions"]))
    body += report_tables.paired_sections(data)
    body += report_tables.long_sections(data)
    body.append(_failure_section(data, audio, silent))
    body += report_tables.run_sections(data)
    run = data.run
    footer = joined(
        (text(run.get("command", "")), f"whisper-steer {run.get('package_version', '')}".strip()), " · "
    )
    return page(TITLE, body, subtitle=str(run.get("measured", "")), footer=footer)


def _answer(data: ReportData) -> list[Markup]:
    """The headline and the figures under it."""
    ours, plain = data.ours, data.plain
    if ours is None or plain is None or not plain.text_fpr.value:
        missing = f"no setting of {OURS}" if ours is None else "no hallucination of plain Whisper to remove"
        return [headline(f"This run has {missing}; below is what was measured.")]
    fall = 1 - ours.text_fpr.value / plain.text_fpr.value
    sentence = (
        f"{OURS} at α {ours.strength:g} removes {100 * fall:.1f}\u00a0% of hallucinated transcripts and "
        f"changes the word error rate by {points(ours.rise.value)}."
    )
    ahead = leads(data.settings)
    if not [one for one in data.settings if one.family != "ours" and one.method != PLAIN]:
        standing: object = "No competitor was measured in this run."
    elif not ahead:
        standing = (
            f"No competitor leaves fewer hallucinations than {OURS}, with or without edits, at any WER cost "
            f"up to {100 * MAX_COST:g} point, each at its best strength for that cost."
        )
    else:
        named = "; ".join(
            f"{one.rival.name} ({percent(one.rival.text_fpr.value)} against {percent(one.ours)} "
            f"at {points(one.cost)})"
            for one in ahead[:4]
        )
        more = f"; and {len(ahead) - 4} more" if len(ahead) > 4 else ""
        standing = (
            f"Ahead of {OURS}, with or without edits, at some WER cost up to {100 * MAX_COST:g} point: "
            f"{named}{more}."
        )
    chosen = [
        Tile(
            "hallucinated transcripts", f"−{100 * fall:.1f}\u00a0%",
            f"{percent(plain.text_fpr.value)} → {percent(ours.text_fpr.value)} of non-speech clips; "
            f"target −{100 * FALL:g}\u00a0%",
            _tone(fall >= FALL),
        ),
        Tile(
            "word error rate", points(ours.rise.value),
            f"{_span(ours)}; target at most +{100 * RISE:g}", _tone(ours.rise.value <= RISE),
        ),
    ]  # fmt: skip
    if ours.empty is not None:
        before = "–" if plain.empty is None else percent(plain.empty.value)
        chosen.append(
            Tile(
                "speech clips that came back empty", percent(ours.empty.value),
                f"plain: {before}; target at most {100 * EMPTY:g}\u00a0%",
                _tone(ours.empty.value <= EMPTY),
            )
        )  # fmt: skip
    if ours.words_per_min is not None:
        before = "–" if plain.words_per_min is None else amount(plain.words_per_min)
        chosen.append(Tile("invented words per minute", amount(ours.words_per_min), f"plain: {before}"))
    if ours.seconds is not None and plain.seconds:
        detail = f"{ours.seconds:.1f} s against {plain.seconds:.1f} s per minute of audio"
        chosen.append(Tile("compute", f"× {ours.seconds / plain.seconds:.2f}", detail))
    return [headline(sentence, standing), tiles(chosen)]


def _tone(reached: bool) -> Tone:
    return "good" if reached else "bad"


def _span(one: Setting) -> str:
    if one.rise.lo == one.rise.hi:
        return f"to {percent(one.wer, 2)}"
    return f"to {percent(one.wer, 2)}; 95 %: {points(one.rise.lo)} to {points(one.rise.hi)}"


def _frontier_section(data: ReportData, pictures: Mapping[str, Picture]) -> Markup:
    caption = (
        "Every point is a method at one strength, on the same held-out clips; bars are 95 % bootstrap "
        "intervals that draw speakers and sources whole, of WER that of the paired difference. Star: plain "
        "Whisper. Ring: whisper-steer as it is by default. Names stand at each method's best setting within "
        "one point of "
        "WER. Shaded: the target."
    )
    alt = "scatter plot of hallucination rate against change of word error rate, one line per method"
    halves = [
        figure(pictures[stem], f"The same for {name}.", alt=f"{alt}, {name}")
        for name in data.halves
        if (stem := "frontier_" + name.split()[0]) in pictures
    ]
    folded = details("Synthetic clips and real recordings apart", *halves) if halves else ""
    return section("Frontier", figure(pictures["frontier"], caption, alt=alt), folded)


def _category_sections(data: ReportData, pictures: Mapping[str, Picture]) -> list[Markup]:
    shown = "Plain Whisper, ours, and the best competitors: each kind's best setting within one point of WER."
    parts = [
        figure(pictures[name], caption, alt=alt)
        for name, caption, alt in (
            ("categories", shown, "bars of hallucination rate by kind of non-speech and method"),
            (
                "speech",
                "What the same settings cost on each kind of speech.",
                "bars of WER by kind of speech",
            ),
        )
        if name in pictures
    ]
    parts += report_tables.category_tables(data)
    return [section("By category", *parts)] if parts else []


def _distribution_section(data: ReportData, drawn: Picture) -> Markup:
    caption = (
        "Per clip the window most like speech. Words appear although no_speech_prob is high, because "
        "openai-whisper drops a window only if avg_logprob is low as well."
    )
    alt = "histograms of scores of speech and non-speech clips"
    return section("Scores", figure(drawn, caption, alt=alt))


# -- failures -------------------------------------------------------------------------------------------


def _failure_section(data: ReportData, audio: Mapping[str, Clip], silent: str) -> Markup:
    title = "Worst failures of ours"
    if data.ours is None:
        return section(title, paragraph(f"{OURS} was not measured."))
    setting = data.ours.name
    if not data.failures:
        return section(title, paragraph(f"{setting}: no words lost in speech, none left on non-speech."))
    deleted = sum(one.kind != LEFT for one in data.failures)
    note = (
        f"{setting}: {deleted} of speech that was wrongly deleted (emptied clips first, then by words lost "
        f"that plain Whisper had), {len(data.failures) - deleted} hallucinations that are left (most words "
        f"first). {silent}"
    )
    cards = [_card(one, audio.get(one.clip.id)) for one in data.failures]
    return section(title, Markup(f"<div class='cards'>{joined(cards)}</div>"), note=note)


def _card(failure: Failure, clip: Clip | None) -> Markup:
    record = failure.clip
    sound: list[Markup] = []
    if clip is not None:
        samples = clip.load()
        sound = [waveform(samples, record.intervals or ()), audio_player(samples, label=record.id)]
    if failure.kind == LEFT:
        what = badge(f"hallucination left: {_words(failure.words)}", "bad")
        wrote = {"ours": text(failure.ours.strip())}
    else:
        lost = "emptied: " if failure.emptied else "deleted: "
        what = badge(lost + _words(failure.words), "bad")
        wrote = {
            "said": text(record.text),
            "ours": _marked(record.text or "", failure.ours),
        }
    scores = {
        "no_speech_prob": record.no_speech_prob,
        "avg_logprob": record.avg_logprob,
        "gate": record.gate,
    }
    named = ", ".join(f"{name} {value:.3g}" for name, value in scores.items() if value is not None)
    values = {
        **wrote,
        "plain Whisper": text(failure.plain.strip() or "(nothing)"),
        "scores": named or None,
        "clip": f"{record.id}, {record.seconds:.1f} s, {record.source}",
    }
    return Markup(
        f"<article class='card'><h3>{text(record.set)} {what}</h3>{joined(sound)}{facts(values)}</article>"
    )


def _words(count: int) -> str:
    return "1 word" if count == 1 else f"{count} words"


def _marked(reference: str, heard: str) -> Markup:
    """What was heard, words lost struck through, new words marked."""
    forms = {"same": "{}", "lost": "<del>{}</del>", "new": "<mark>{}</mark>"}
    words = marked_words(reference, heard)
    return joined((Markup(forms[kind].format(text(word))) for kind, word in words), " ")


# -- command --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report_page", description="One HTML page from a trade-off run."
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="the --out folder of benchmarks.tradeoff")
    options = parser.parse_args(arguments)
    try:
        for path in write_report(options.out):
            print(f"wrote {path}")
    except WhisperSteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

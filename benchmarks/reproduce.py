"""The papers' tables on steering Whisper, measured again, with the published figure beside each.

    python -m benchmarks.reproduce --model small --data DIR --saes SAES   # official model and data sets
    python -m benchmarks.reproduce --quick                                # mini.en, evaluation sets

AudioSAE (arXiv 2602.05027v2): Table 2, the appendix's tables (6 to 13), the distributions of no_speech_prob;
the follow-up (arXiv 2606.07473): its hallucination rates. `benchmarks.corpora` says how the data sets lie
below DIR; those that are absent are left out, and if all are, the evaluation sets of `calibration.corpus`
take their places: then rows and columns are the papers', the figures cannot be compared, and every output
says so. Official models are loaded by name (`whisper-steer models`); their SAEs come from --saes, a folder of
layer_XX.safetensors as `whisper-steer saes import` writes it from AudioSAE's own checkpoints.

As in the papers, every 30 s window is decoded once, greedily. Unlike them: an SAE's threshold is fixed
instead of taken over the clip, WER is counted after whisper's text normaliser, and nothing is fitted on what
is measured. Prints tables; writes reproduce.html, nsp_distributions.png, steering.png and about.json to
--out, with --json one row per cell. A run that was killed goes on from --out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import grouped
from benchmarks.command import exit_code
from benchmarks.files import write_whole
from benchmarks.published import ALL, FOLLOW_UP_SETS, VECTOR_SETS, Cell, Condition, Table, tables_for
from whisper_steer.errors import UsageError

if TYPE_CHECKING:
    from whisper.model import Whisper

    from benchmarks.corpora import Corpora, Corpus
    from benchmarks.reproduce_fit import Edits, Fit, Source
    from benchmarks.steered_scores import Score
    from calibration.evaluate import Rate
    from whisper_steer.sae import SparseAutoencoder

QUICK_FIT, QUICK_TEST = 24, 8  # clips per data set
DECODED = ("hr", "text_fpr", "wer")  # measures that need the text or its probability


@dataclass(frozen=True)
class Measured:
    """A cell's value with its interval, and the number of clips behind it."""

    rate: Rate
    clips: int


@dataclass(frozen=True)
class Reproduction:
    """What came out.

    Attributes:
        cells: what could be measured.
        probabilities: no_speech_prob of every clip by data set and condition, for the conditions of Table 2.
        contrasts: what "hallucinated" means in each fit, by the data set it is fitted on.
        notes: what was left out and why, one line each.
    """

    cells: Mapping[Cell, Measured]
    probabilities: Mapping[str, Mapping[Condition, tuple[float, ...]]]
    contrasts: Mapping[str, str]
    notes: tuple[str, ...]


# -- measuring ------------------------------------------------------------------------------------------


def measure(
    model: Whisper,
    corpora: Corpora,
    tables: Sequence[Table],
    saes: Mapping[int, SparseAutoencoder],
    *,
    layer: int | None = None,
    store: Path | None = None,
    batch: int = 8,
    progress: bool = True,
) -> Reproduction:
    """Fits on every data set's own clips, then measures every cell of `tables` that can be.

    layer: 0-based, instead of the papers' (see `reproduce_fit.layers_of`). store: folder of finished work.
    """
    from benchmarks.reproduce_fit import Edits, layers_of
    from benchmarks.steered_scores import Setting, score

    blocks = model.dims.n_audio_layer
    conditions = list(dict.fromkeys(row for table in tables for row in table.rows))
    layers = sorted({n for row in conditions for n in layers_of(row.where, blocks, layer)})
    notes: dict[str, None] = {}  # an ordered set
    fits = _fits(model, corpora, saes, layers, notes, store, batch, progress)
    edits = Edits(blocks, saes, fits, layer)
    asked = _asked(tables)
    scored: dict[str, dict[Condition, dict[str, Score]]] = {}
    for corpus in corpora.sets:
        settings = {}
        for condition, measures in asked.get(corpus.name, {}).items():
            try:
                made = edits.of(condition)
            except UsageError as error:
                notes[f"rows are left out: {error}"] = None
                continue
            settings[condition] = Setting(made, any(name in DECODED for name in measures))
        if not corpus.test or not settings:
            continue
        by_key = {condition.key: setting for condition, setting in settings.items()}
        found = score(
            model, corpus.test, by_key, store=store, batch=batch, progress=progress, what=corpus.name
        )
        scored[corpus.name] = {
            condition: {clip.id: found[clip.id][condition.key] for clip in corpus.test if clip.id in found}
            for condition in settings
        }
    cells = {
        cell: value
        for table in tables
        for cell in table.cells()
        if (value := _cell(cell, scored, corpora, fits, edits)) is not None
    }
    probabilities = {
        name: {
            row: tuple(score.no_speech_prob for score in rows[row].values())
            for row in tables[0].rows
            if row in rows
        }
        for name, rows in scored.items()
    }
    contrasts = {name or "follow-up": fit.contrast.reason for name, fit in fits.items()}
    return Reproduction(cells, probabilities, contrasts, (*corpora.notes, *notes))


def _asked(tables: Sequence[Table]) -> dict[str, dict[Condition, set[str]]]:
    """data set -> condition -> measures that need its test clips."""
    asked: dict[str, dict[Condition, set[str]]] = {}
    for table in tables:
        for condition, name, measure_name in table.cells():
            if condition.method == "classifier":
                continue
            for part in FOLLOW_UP_SETS if name == ALL else (name,):
                asked.setdefault(part, {}).setdefault(condition, set()).add(measure_name)
    return asked


def _fits(
    model: Whisper,
    corpora: Corpora,
    saes: Mapping[int, SparseAutoencoder],
    layers: Sequence[int],
    notes: dict[str, None],
    store: Path | None,
    batch: int,
    progress: bool,
) -> dict[str, Fit]:
    """By data set, and "" for the follow-up's fit on all of them together."""
    from benchmarks.reproduce_fit import Source, fit_source, join, pool_clips, readable
    from benchmarks.steered_scores import Setting, score

    def source(corpus: Corpus) -> Source:
        what = f"{corpus.name}, to fit on"
        plain = {"plain": Setting((), True)}
        scores = score(model, corpus.fit, plain, store=store, batch=batch, progress=progress, what=what)
        clips = readable(corpus.fit, scores)
        pooled = pool_clips(
            model, clips, saes, layers, store=store, batch=batch, progress=progress, what=what
        )
        return Source(tuple(scores[clip.id]["plain"] for clip in clips), pooled)

    wanted = [c for c in corpora.sets if c.fit and (c.speech or c.name in VECTOR_SETS)]
    sources = {corpus.name: source(corpus) for corpus in wanted}
    speech = next((sources[corpus.name] for corpus in wanted if corpus.speech), None)
    nonspeech = {corpus.name: sources[corpus.name] for corpus in wanted if not corpus.speech}
    fits: dict[str, Fit] = {}
    for name, own in nonspeech.items():
        try:
            fits[name] = fit_source(own, speech, ("nsp", "hr", "text"))
        except UsageError as error:
            notes[f"nothing is fitted on {name}: {error}"] = None
    if nonspeech:
        try:
            fits[""] = fit_source(join(list(nonspeech.values())), speech, ("hr", "nsp", "text"))
        except UsageError as error:
            notes[f"nothing is fitted for the follow-up: {error}"] = None
    return fits


def _cell(
    cell: Cell,
    scored: Mapping[str, Mapping[Condition, Mapping[str, Score]]],
    corpora: Corpora,
    fits: Mapping[str, Fit],
    edits: Edits,
) -> Measured | None:
    """None where the data set is not at hand or the condition could not be made."""
    from benchmarks.reproduce_fit import classifier_f1
    from calibration.evaluate import word_errors

    condition, name, measure_name = cell
    if measure_name == "f1":
        fit = fits.get(name)
        if fit is None:
            return None
        latents = fit.pooled[edits.layer_of(condition)].latents
        if not latents.shape[1]:
            return None
        rate = classifier_f1(latents, fit.contrast.positive, condition.k)
        return Measured(rate, len(latents))
    parts = FOLLOW_UP_SETS if name == ALL else (name,)
    # "all" of two sets is not the paper's "all"
    if any(condition not in scored.get(part, {}) for part in parts):
        return None
    scores = {clip: score for part in parts for clip, score in scored[part][condition].items()}
    clips = {clip.id: clip for part in parts if (c := corpora.get(part)) is not None for clip in c.test}
    groups = {name: clip.group or name for name, clip in clips.items()}
    if measure_name == "wer":
        pairs = [(clip, word_errors(clips[clip].text or "", said.text)) for clip, said in scores.items()]
        kept = [(groups[clip], errors) for clip, errors in pairs if errors is not None]
        errors, words = [e.total for _, e in kept], [e.words for _, e in kept]
        return Measured(grouped.ratio(errors, words, [group for group, _ in kept]), len(kept))
    event = {"nsp_fpr": "nsp", "tpr": "nsp", "hr": "hr", "text_fpr": "text_fp"}[measure_name]
    events = [getattr(score, event) for score in scores.values()]
    return Measured(grouped.share(events, [groups[clip] for clip in scores]), len(scores))


# -- command --------------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce",
        description="AudioSAE's and its follow-up's tables, published figures beside measured ones.",
    )
    parser.add_argument("--model", default="mini.en", help="any name or path that whisper-steer loads")
    parser.add_argument("--data", type=Path, help="folder with musan/, FSD50K/, LibriSpeech/, ...")
    parser.add_argument("--saes", type=Path, help="folder of layer_XX.safetensors (default: those kept)")
    parser.add_argument("--layer", type=int, help="0-based, instead of the papers' last and block 8 of 12")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"at most {QUICK_FIT} + {QUICK_TEST} clips per data set",
    )
    parser.add_argument("--fit-limit", type=positive, help="clips per data set to fit on")
    parser.add_argument("--limit", type=positive, help="clips per data set to measure")
    parser.add_argument("--batch", type=positive, default=8, help="30 s windows at once (default 8)")
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("out/reproduce"), help="folder for report and cache")
    parser.add_argument("--json", type=Path, metavar="FILE", help="one row per cell as a flat list")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes. Raises WhisperSteerError."""
    try:
        from rich.console import Console

        from benchmarks import reproduce_report as report
        from benchmarks.corpora import read_corpora
        from benchmarks.reproduce_fit import layers_of, load_saes
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: pip install 'whisper-steer[calibration]'") from error
    from calibration.activations import check_layers
    from whisper_steer.fileformat import model_name, package_version
    from whisper_steer.zoo import load_model

    began = time.perf_counter()
    corpora = read_corpora(
        options.data,
        fit_limit=options.fit_limit or (QUICK_FIT if options.quick else None),
        test_limit=options.limit or (QUICK_TEST if options.quick else None),
        quick=options.quick,
    )
    model = load_model(options.model, device=options.device)
    blocks = model.dims.n_audio_layer
    if options.layer is not None:
        check_layers(model, [options.layer])
    tables = tables_for(blocks)
    wanted = {n for t in tables for row in t.rows for n in layers_of(row.where, blocks, options.layer)}
    saes, missing = load_saes(model, options.saes, wanted)
    measured_on = f"{model_name(model)} (d_model {model.dims.n_audio_state}, {blocks} blocks)"
    print(f"measuring {measured_on} on {'; '.join(corpora.about.values())}", file=sys.stderr)
    result = measure(
        model, corpora, tables, saes,
        layer=options.layer, store=options.out / "cache", batch=options.batch,
    )  # fmt: skip
    notes = (*result.notes, *missing)
    about = report.About(measured_on, model_name(model), corpora.about, corpora.stand_in, notes)

    # outside a terminal rich would fold the tables at 80 columns
    console = Console(width=None if sys.stdout.isatty() else 170)
    for line in about.lines(tables):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for table in tables:
        parts = list(report.console_tables(table, result, about))
        for line in report.console_lines(table) if parts else ():
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        for part in parts:
            console.print(part)
    for name, reason in result.contrasts.items():
        text = f"hallucinated, in the fit on {name}: {reason}"
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    rows = report.json_rows(tables, result, about)
    written = report.write_pictures_and_page(options.out, tables, result, about)
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.reproduce", *sys.argv[1:]]),
        "package_version": package_version(),
        "measured_on": measured_on,
        "data": corpora.about,
        "stand_in": corpora.stand_in,
        "notes": list(notes),
        "contrasts": dict(result.contrasts),
        "wall_seconds": round(time.perf_counter() - began, 1),
    }
    written.append(write_whole(options.out / "about.json", json.dumps(record, indent=2) + "\n"))
    if options.json:
        written.append(write_whole(options.json, json.dumps(rows, indent=1, allow_nan=False) + "\n"))
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

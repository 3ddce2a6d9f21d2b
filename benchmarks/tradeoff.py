"""What steering saves on non-speech and costs on speech: every method at every alpha, on held-out clips.

    python -m benchmarks.tradeoff --quick                      # bundled model, about ten minutes on two cores
    python -m benchmarks.tradeoff --data ../shared/data        # all clips of the test split, real ones too
    python -m benchmarks.tradeoff --model small.en --steering my-steering.safetensors --json rows.json

Per set and pooled (all_speech, all_nonspeech; synthetic and real clips also apart), each with a 95 %
bootstrap interval over clips: on non-speech text-FPR, nsp-FPR, HR and words per minute; on speech WER with
its three parts and the share of clips that came back empty. A window that a gate withholds counts as
recognised non-speech. Alpha 0 is plain Whisper, bit for bit: it is measured once, and its rows stand under
every method. Prints tables; writes tradeoff.csv, tradeoff.png and about.json to --out, and with --json one
flat list of rows.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import plots, reports
from benchmarks.files import write_whole
from benchmarks.reports import ALL_NONSPEECH, ALL_SPEECH, COLUMNS, REAL, SYNTHETIC, Row
from whisper_steer.errors import MismatchError, UsageError, WhisperSteerError

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip
    from calibration.decoding import ClipTranscript
    from whisper_steer.steering import Steering

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
METHODS = {"whisper-steer": "default", "audiosae": "audiosae"}  # method -> name of its bundled steering
QUICK_CLIPS = 12  # per set: the default settings end within ten minutes on two cores


@dataclass(frozen=True)
class Heard:
    """One clip under one setting: what came out, and its share of the compute time in seconds."""

    clip: Clip
    transcript: ClipTranscript
    seconds: float


# -- measuring ------------------------------------------------------------------------------------------


def listen(model: Whisper, clips: Sequence[Clip], tick: Callable[[], object]) -> list[Heard]:
    """Every clip through whisper.transcribe with its default options; `tick` is called after each."""
    from calibration.decoding import iterate_transcripts

    audios = [clip.load() for clip in clips]  # before the clock starts
    start = time.perf_counter()
    transcripts = []
    for transcript in iterate_transcripts(model, iter(audios)):
        transcripts.append(transcript)
        tick()
    each = (time.perf_counter() - start) / max(1, len(clips))
    return [Heard(clip, transcript, each) for clip, transcript in zip(clips, transcripts, strict=True)]


def measure(
    model: Whisper,
    sets: Mapping[str, Sequence[Clip]],
    steerings: Mapping[str, Steering],
    alphas: Sequence[float],
    *,
    progress: bool = True,
) -> list[Row]:
    """Rows of every method, alpha and set, pooled rows last within a setting; `model` is left as it was."""
    from tqdm import tqdm

    from whisper_steer.attach import steer

    settings = list(_settings(list(steerings), alphas))
    clips = sum(len(chosen) for chosen in sets.values())
    plain: list[Row] | None = None
    rows: list[Row] = []
    listen(model, next(iter(sets.values()))[:1], lambda: None)  # first-use costs stay out of the clock
    with tqdm(total=clips * len(settings), unit="clip", file=sys.stderr, disable=not progress) as bar:
        for method, alpha in settings:
            bar.set_description(f"{method}, alpha {alpha:g}")
            with steer(model, alpha=alpha, steering=steerings[method]):
                heard = {name: listen(model, chosen, bar.update) for name, chosen in sets.items()}
            measured = summarise(heard)
            rows += [{**row, "method": method, "alpha": alpha} for row in measured]
            if alpha == 0:
                plain = measured
    for method in steerings:
        if plain is not None and not any(row["method"] == method and row["alpha"] == 0 for row in rows):
            rows += [{**row, "method": method, "alpha": 0.0} for row in plain]
    order = {method: place for place, method in enumerate(steerings)}
    rows.sort(key=lambda row: (order[row["method"]], row["alpha"]))
    return [{name: row[name] for name in COLUMNS} for row in rows]


def _settings(methods: Sequence[str], alphas: Sequence[float]) -> Iterator[tuple[str, float]]:
    """(method, alpha) pairs to compute; alpha 0, the same for all, only with the first method."""
    for place, method in enumerate(methods):
        for alpha in sorted(set(alphas)):
            if alpha > 0 or place == 0:
                yield method, alpha


def summarise(heard: Mapping[str, Sequence[Heard]]) -> list[Row]:
    """One row per set, then the pools all_speech and all_nonspeech, and where synthetic and real clips are in
    one also its two halves (all_speech_real, ...). What a set cannot measure is None."""
    from calibration.evaluate import nonspeech_metrics, speech_metrics

    def is_speech(items: Sequence[Heard]) -> bool:
        return items[0].clip.kind != "nonspeech"

    groups = {name: items for name, items in heard.items() if items}
    pools: dict[str, Sequence[Heard]] = {
        ALL_SPEECH: [item for items in groups.values() if is_speech(items) for item in items],
        ALL_NONSPEECH: [item for items in groups.values() if not is_speech(items) for item in items],
    }
    for name, items in list(pools.items()):
        if _audio(items) == "synthetic+real":
            pools[name + SYNTHETIC] = [item for item in items if item.clip.path is None]
            pools[name + REAL] = [item for item in items if item.clip.path is not None]
    rows = []
    for name, items in [*groups.items(), *((name, items) for name, items in pools.items() if items)]:
        measured: Mapping[str, float]
        if is_speech(items):
            texts = [item.transcript.text for item in items]
            measured = speech_metrics([item.clip.text or "" for item in items], texts).row()
        else:
            measured = nonspeech_metrics([item.transcript.outcome() for item in items]).row()
        row: Row = dict.fromkeys(COLUMNS)
        row |= {key: _number(value) for key, value in measured.items() if key in row}
        row |= {"set": name, "clips": len(items), "audio": _audio(items)}
        row["seconds"] = round(sum(item.seconds for item in items), 3)
        rows.append(row)
    return rows


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _audio(items: Sequence[Heard]) -> str:
    """Where a set's clips come from: "synthetic", "real" or "synthetic+real"."""
    real = sum(item.clip.path is not None for item in items)
    return "synthetic" if not real else "real" if real == len(items) else "synthetic+real"


def what_was_measured(model: Whisper, sets: Mapping[str, Sequence[Clip]]) -> str:
    """One line: the model, and how many clips of each kind are synthetic and real."""
    counts = {
        kind: (sum(clip.path is None for clip in clips), sum(clip.path is not None for clip in clips))
        for kind, clips in (
            ("speech", [clip for group in sets.values() for clip in group if clip.kind != "nonspeech"]),
            ("non-speech", [clip for group in sets.values() for clip in group if clip.kind == "nonspeech"]),
        )
    }
    parts = [f"{sum(n)} {kind} clips ({n[0]} synthetic, {n[1]} real)" for kind, n in counts.items()]
    dims = model.dims
    name = getattr(model, "name", "unnamed")
    return f"{name} (d_model {dims.n_audio_state}, {dims.n_audio_layer} blocks); " + ", ".join(parts)


# -- command --------------------------------------------------------------------------------------------


def find_steerings(model: Whisper, given: str | None, methods: Sequence[str]) -> dict[str, Steering]:
    """The Steering of each method, checked against the model; what is not bundled for it is left out with a
    line on stderr.

    Raises UsageError (none is left), and what zoo.load_steering and Steering.check raise for a given one.
    """
    from whisper_steer.zoo import load_steering

    name = getattr(model, "name", "unnamed")
    found: dict[str, Steering] = {}
    for method in methods:
        explicit = given if method == "whisper-steer" else None
        try:
            steering = load_steering(explicit or METHODS[method], name)
            steering.check(model)
        except (UsageError, MismatchError) as error:
            if explicit is not None:
                raise
            print(f"left out: {method} ({error})", file=sys.stderr)
            continue
        found[method] = steering
    if not found:
        raise UsageError(f"no steering is bundled for {name}: pass --steering FILE")
    return found


def alpha_list(text: str) -> tuple[float, ...]:
    """ "0,0.5,1" -> (0.0, 0.5, 1.0)."""
    try:
        alphas = tuple(float(part) for part in text.split(","))
    except ValueError:
        alphas = (math.nan,)
    if not all(math.isfinite(alpha) and alpha >= 0 for alpha in alphas):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers of at least 0 with commas, e.g. 0,0.5,1"
        )
    return alphas


def method_list(text: str) -> tuple[str, ...]:
    """ "whisper-steer,audiosae" -> its parts."""
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(METHODS)}")
    return names


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tradeoff",
        description="Hallucination against recognition: every method at every alpha, on held-out clips.",
    )
    parser.add_argument("--quick", action="store_true", help=f"at most {QUICK_CLIPS} clips per set")
    parser.add_argument("--model", default="mini.en", help="any name or path that whisper-steer loads")
    parser.add_argument("--steering", help="measure this file or name as whisper-steer, not the bundled one")
    parser.add_argument("--methods", type=method_list, default=tuple(METHODS), help=f"of {','.join(METHODS)}")
    parser.add_argument("--alphas", type=alpha_list, default=ALPHAS, help="default 0,0.25,0.5,0.75,1,1.5")
    parser.add_argument("--limit", type=positive, help="clips per set, evenly chosen")
    parser.add_argument("--data", type=Path, help="folder of real recordings, measured beside the synthetic")
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--out", type=Path, default=Path("out/tradeoff"), help="folder for CSV and PNG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows as one flat list")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes. Raises WhisperSteerError."""
    try:
        from rich.console import Console

        from calibration import corpus
        from calibration.evaluate import evenly
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: pip install 'whisper-steer[calibration]'") from error
    from whisper_steer.fileformat import package_version
    from whisper_steer.zoo import load_model

    if options.data is not None and not corpus.real_clips(options.data, "test"):
        raise UsageError(
            f"--data {options.data} holds no recordings: expected folders such as speech/ and sounds/ with a "
            "manifest.csv each"
        )
    model = load_model(options.model, device=options.device)
    steerings = find_steerings(model, options.steering, options.methods)
    limit = options.limit or (QUICK_CLIPS if options.quick else None)
    everything = corpus.eval_sets("test", options.data, options.quick)
    sets = {name: evenly(clips, limit or len(clips)) for name, clips in everything.items()}
    about = what_was_measured(model, sets)
    print(f"measuring {about}", file=sys.stderr)
    began = time.perf_counter()
    rows = measure(model, sets, steerings, options.alphas)

    # outside a terminal rich would fold the table at 80 columns
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"Held-out test split of {about}", highlight=False)
    for table in reports.tables(rows):
        console.print(table)
    for line in reports.headline(rows):
        console.print(line, highlight=False, soft_wrap=True)

    written = [write_whole(options.out / "tradeoff.csv", reports.as_csv(rows))]
    if panels := reports.curves(rows):
        picture = options.out / "tradeoff.png"
        plots.frontier(panels, picture, title="What steering saves and what it costs", subtitle=about)
        written.append(picture)
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.tradeoff", *sys.argv[1:]]),
        "package_version": package_version(),
        "measured": about,
        "sets": corpus.describe(sets),
        "steerings": {name: steering.metadata for name, steering in steerings.items()},
        "wall_seconds": round(time.perf_counter() - began, 1),
    }
    text = json.dumps(record, indent=2, default=str) + "\n"
    written.append(write_whole(options.out / "about.json", text))
    if options.json:
        written.append(write_whole(options.json, json.dumps(rows, indent=1, allow_nan=False) + "\n"))
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        run(options)
    except WhisperSteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

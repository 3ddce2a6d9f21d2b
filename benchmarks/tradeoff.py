"""What methods save on non-speech and cost on speech: every competitor and ours, on held-out clips.

    python -m benchmarks.tradeoff --quick                      # bundled model, within 15 minutes on two cores
    python -m benchmarks.tradeoff --data ../shared/data        # all clips of the test split, real ones too
    python -m benchmarks.tradeoff --methods whisper-steer,silero --json rows.json
    python -m benchmarks.tradeoff --model small.en --steering my-steering.safetensors
    python -m benchmarks.tradeoff --long                       # and benchmarks.long_recordings, same methods

Per set and pooled (all_speech, all_nonspeech, and "all" for both; synthetic and real clips also apart), each
with a 95 % bootstrap interval that draws speakers and source recordings whole: on non-speech text-FPR,
nsp-FPR, HR and words per minute; on speech WER with its three parts and the share of clips that came back
empty. A window that a method withholds counts as recognised non-speech. "alpha" is a method's strength, and 0
is plain Whisper: its rows stand under every method. Every other setting is compared with ours at alpha 1 over
the same clips.

What is heard is kept under --out clip by clip: a run that was stopped goes on where it was, and one method
more costs only that method (--fresh: after a change of the code, which the kept files do not know of). Prints
tables; writes rows.json, paired.json, tradeoff.csv, run.json and a report with its pictures to --out, and
with --json the rows as one flat list.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import reports
from benchmarks.command import exit_code
from benchmarks.files import write_whole
from benchmarks.methods import Setup
from whisper_steer.errors import UsageError
from whisper_steer.fileformat import package_version

if TYPE_CHECKING:
    from whisper.model import Whisper

    from benchmarks.hearing_cache import ClipRecord
    from calibration.corpus import Clip

QUICK_CLIPS = 5  # per set: all methods end within 15 minutes on two cores


def describe_measured(model: Whisper, records: Sequence[ClipRecord]) -> str:
    """One line: the model, and how many clips of each kind are synthetic and real."""
    parts = []
    for kind, speech in (("speech", True), ("non-speech", False)):
        chosen = [record for record in records if record.is_speech == speech]
        real = sum(record.path is not None for record in chosen)
        parts.append(f"{len(chosen)} {kind} clips ({len(chosen) - real} synthetic, {real} real)")
    dims, name = model.dims, getattr(model, "name", "unnamed")
    return f"{name} (d_model {dims.n_audio_state}, {dims.n_audio_layer} blocks); " + ", ".join(parts)


# -- command --------------------------------------------------------------------------------------------


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


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tradeoff",
        description="Hallucination against recognition: every method at every strength, on held-out clips.",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"at most {QUICK_CLIPS} clips per set, fewer strengths"
    )
    parser.add_argument("--model", default="mini.en", help="any name or path that whisper-steer loads")
    parser.add_argument("--steering", help="measure this file or name as whisper-steer, not the bundled one")
    parser.add_argument(
        "--methods", type=lambda text: tuple(text.split(",")), metavar="NAMES",
        help="some methods, by name or beginning, with commas (default: all; see --list)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="say what the methods are and which can run here")
    parser.add_argument(
        "--alphas", type=alpha_list, help="of our methods that decode (default: each its own)"
    )
    parser.add_argument("--limit", type=positive, help="clips per set, evenly chosen")
    parser.add_argument("--data", type=Path, help="folder of real recordings, measured beside the synthetic")
    parser.add_argument(
        "--labels",
        type=Path,
        help="labels of plain Whisper on calibration clips (default: found or made)",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="measure the methods anew (fits in OUT/fitted stay)",
    )
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument(
        "--long", action="store_true", help="the same methods on long recordings, too, in the same report"
    )
    parser.add_argument("--out", type=Path, default=Path("out/tradeoff"), help="folder for results")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows as one flat list")
    return parser.parse_args(arguments)


def label_file(given: Path | None, crc: int) -> Path:
    """Where labels of plain Whisper on calibration clips are kept: the given file, that of
    calibration.hallucinations if it is of this model, else one in the cache folder."""
    from calibration.corpus import cache_dir

    if given is not None:
        return given
    usual = Path("out/labels.jsonl")
    try:
        with usual.open(encoding="utf-8") as lines:
            if json.loads(lines.readline()).get("model_crc") == crc:
                return usual
    except (OSError, ValueError, AttributeError):
        pass  # none, or another file of that name
    return cache_dir() / "labels" / f"{crc:08x}.jsonl"


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes. Raises WhisperSteerError."""
    try:
        from rich.console import Console

        from benchmarks import (
            availability,
            hearing_cache,
            listening,
            long_recordings,
            measuring,
            peers,
            report_page,
        )
        from calibration import corpus
        from calibration.evaluate import evenly
        from calibration.hallucinations import model_crc
    except ImportError as error:
        raise UsageError(f"{error.name} is missing: pip install 'whisper-steer[calibration]'") from error
    from whisper_steer.zoo import load_model

    # outside a terminal rich would fold the tables at 80 columns
    console = Console(width=None if sys.stdout.isatty() else 150)
    methods = measuring.choose_methods(options.methods, peers.all_methods())
    if options.list:
        place = availability.Place(options.model, options.steering, options.quick)
        for method in methods:
            lacking = availability.missing(getattr(method, "needs", ()), place)
            verdict = f"cannot run here: {lacking}" if lacking else "can run here"
            line = f"{method.name}: {method.about} [{verdict}]"
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        return
    if options.data is not None and not corpus.real_clips(options.data, "test"):
        raise UsageError(
            f"--data {options.data} holds no recordings: expected folders such as speech/ and sounds/ with a "
            "manifest.csv each"
        )
    began = time.perf_counter()
    model = load_model(options.model, device=options.device)
    name, crc = getattr(model, "name", options.model), model_crc(model)
    strengths = {
        method.name: measuring.choose_strengths(method, options.alphas, options.quick) for method in methods
    }

    limit = options.limit or (QUICK_CLIPS if options.quick else None)
    sets: dict[str, list[tuple[Clip, ClipRecord]]] = {}
    for group, clips in corpus.eval_sets("test", options.data, options.quick).items():
        chosen = evenly(clips, limit or len(clips))
        sets[group] = [(clip, hearing_cache.clip_record(clip, group, clip.load())) for clip in chosen]
    about = describe_measured(model, [record for pairs in sets.values() for _, record in pairs])
    print(f"measuring {about}", file=sys.stderr)

    cache = hearing_cache.HearingCache(options.out)
    plain = listening.PlainWhisper(model, cache, listening.plain_fingerprint(crc))
    fits = listening.fits_hash(name, crc, options.data, options.quick, model.dims.n_audio_layer)
    setup = Setup(
        model=model, name=name, cache=options.out / "fitted" / fits,
        plain=plain.heard, plain_windows=plain.windows,
        data_dir=options.data, quick=options.quick,
        labels_file=label_file(options.labels, crc), steering=options.steering,
    )  # fmt: skip
    setup.cache.mkdir(parents=True, exist_ok=True)
    running = [method for method in methods if strengths[method.name]]
    if options.fresh:
        for method in running:
            if method.name != "plain" or options.methods is None or "plain" in options.methods:
                cache.forget(method.name)
    results = measuring.measure(
        cache, setup, running, strengths, sets,
        lambda method: listening.fingerprint_of(method, setup, crc, fits),
    )  # fmt: skip
    if options.methods and len(results.heard) == 1 and results.unavailable:
        raise UsageError(next(iter(results.unavailable.values())))

    rows, paired = measuring.rows_of(results, running), measuring.paired_rows(results, running)
    records = measuring.scored_records(setup, sets)
    console.print(f"Held-out test split of {about}", highlight=False)
    for table in (*reports.tables(rows, measuring.minutes_of(records)), reports.paired_table(paired)):
        if table is not None:
            console.print(table)
    for line in reports.headline(rows):
        console.print(line, highlight=False, soft_wrap=True)
    for missing, reason in results.unavailable.items():
        console.print(f"cannot run: {missing} ({reason})", highlight=False, soft_wrap=True)

    record = {
        "command": shlex.join(["python", "-m", "benchmarks.tradeoff", *sys.argv[1:]]),
        "package_version": package_version(),
        "measured": about,
        "model": str(options.model),
        "data": None if options.data is None else str(options.data.resolve()),
        "quick": options.quick,
        "steering": options.steering,
        "gate_threshold": measuring.gate_threshold(setup),
        "threads": sorted(cache.threads),
        **measuring.describe_methods(methods, strengths, results),
        "sets": corpus.describe({group: [clip for clip, _ in pairs] for group, pairs in sets.items()}),
        "wall_seconds": round(time.perf_counter() - began, 1),
    }
    written = write_results(options, record, records, rows, paired)
    if options.long:
        able = [method for method in running if method.name in results.fingerprints]
        written += long_recordings.beside_tradeoff(setup, able, options.out)
    audio = {clip.id: clip for pairs in sets.values() for clip, _ in pairs}
    for path in [*written, *report_page.write_report(options.out, audio=audio)]:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def write_results(
    options: argparse.Namespace,
    record: Mapping[str, Any],
    clips: Sequence[ClipRecord],
    rows: Sequence[reports.Row],
    paired: Sequence[reports.Row],
) -> list[Path]:
    """The run's files, without the report that is made of them. Raises UsageError."""
    from benchmarks import hearing_cache

    out = options.out
    text = json.dumps(rows, indent=1, allow_nan=False) + "\n"
    written = [
        write_whole(out / hearing_cache.RUN, json.dumps(record, indent=2, default=str) + "\n"),
        hearing_cache.write_clips(out, clips),
        write_whole(out / hearing_cache.ROWS, text),
        write_whole(out / hearing_cache.PAIRED, json.dumps(paired, indent=1, allow_nan=False) + "\n"),
        write_whole(out / "tradeoff.csv", reports.as_csv(rows)),
    ]
    if options.json:
        written.append(write_whole(options.json, text))
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

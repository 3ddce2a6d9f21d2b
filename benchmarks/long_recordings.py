"""Words invented and words lost on long recordings in which speech, silence, music and noise alternate.

    python -m benchmarks.long_recordings --quick                  # bundled model, two synthetic recordings
    python -m benchmarks.long_recordings --data ../shared/data    # and mixed, real and spliced ones
    python -m benchmarks.long_recordings --methods plain,silero:0.9,whisper-steer:1.5 --json rows.json

Recordings of 2 to 4 minutes with known truth are built from held-out clips (long_truth.py); every method
transcribes them as wholes. Invented: words more than 0.5 s from all speech. Lost: words of the reference
without a counterpart (long_measure.py). Both with 95 % bootstrap intervals over recordings, and against plain
Whisper and Silero VAD on the same ones. Results are kept under --out: a run that was killed goes on. In the
--out folder of `benchmarks.tradeoff` (or by its --long) they become a part of that report.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import exit_code
from benchmarks.files import write_whole
from benchmarks.long_measure import LongCounts, measure
from benchmarks.long_truth import LongRecording, LongSegment, long_recordings, spliced_recordings
from whisper_steer.errors import UsageError

if TYPE_CHECKING:
    from benchmarks.long_rows import Measured, Row, Setting
    from benchmarks.methods import Method, Setup

__all__ = [
    "LongCounts",
    "LongRecording",
    "LongSegment",
    "long_recordings",
    "main",
    "measure",
    "spliced_recordings",
]

DEFAULT_METHODS = (
    "plain,silero,faster-whisper-batched-vad,whisper-steer,whisper-steer+vad,whisper-steer-gate+vad,"
    "whisper-steer+gate-vad"
)
PLAIN, VAD = "plain", "silero"
COUNT, QUICK_COUNT = 8, 2  # recordings of each sort


def run_methods(
    setup: Setup,
    methods: Sequence[tuple[Method, float]],
    recordings: Sequence[LongRecording],
    out: Path,
) -> dict[Setting, list[Measured]]:
    """What every method at its strength made of every recording, counted. What is kept under out/heard from
    the same model, audio and steering is not transcribed again."""
    from tqdm import tqdm

    from benchmarks.hearing_cache import HearingCache, clip_record
    from benchmarks.listening import PlainWhisper, fingerprint_of, fits_hash, listen, plain_fingerprint
    from benchmarks.long_rows import Measured
    from calibration.hallucinations import model_crc

    crc = model_crc(setup.model)
    fits = fits_hash(setup.name, crc, setup.data_dir, setup.quick, setup.model.dims.n_audio_layer)
    cache = HearingCache(out)
    plain = PlainWhisper(setup.model, cache, plain_fingerprint(crc))
    setup.plain, setup.plain_windows = plain.heard, plain.windows
    measured: dict[Setting, list[Measured]] = {(method.name, strength): [] for method, strength in methods}
    total = len(methods) * len(recordings)
    with tqdm(total=total, unit="recording", file=sys.stderr, disable=not setup.progress) as bar:
        # recordings outside: each is built and read once, and a run that is cut short compares all methods
        for recording in recordings:
            clip = recording.clip()
            record = clip_record(clip, clip.category, clip.load())
            for method, strength in methods:
                bar.set_description(f"{recording.id}, {method.name}")
                if method.name == PLAIN:
                    (heard,) = plain.heard([clip])
                    bar.update()
                else:
                    print_of = fingerprint_of(method, setup, crc, fits)
                    (heard,) = listen(cache, setup, method, strength, print_of, [(clip, record)], bar.update)
                counts = measure(recording, heard.segments)
                item = Measured(recording.sort, recording.seconds, heard.seconds, counts)
                measured[method.name, strength].append(item)
    return measured


def usual_strength(method: Method) -> float:
    """1 where the method has it, else 0.5, else its lowest."""
    return next((usual for usual in (1.0, 0.5) if usual in method.strengths), method.strengths[0])


def find_methods(wanted: str) -> list[tuple[Method, float]]:
    """ "plain,silero:0.9" -> methods with their strengths; without one the usual one. Raises UsageError."""
    from benchmarks.peers import all_methods

    known = {method.name: method for method in all_methods()}
    found = []
    for part in wanted.split(","):
        name, colon, given = part.partition(":")
        if name not in known:
            raise UsageError(f"--methods {name}: expected some of {', '.join(known)}")
        strength = usual_strength(known[name])
        if colon:
            try:
                strength = float(given)
            except ValueError:
                strength = math.nan
            if not math.isfinite(strength) or strength < 0:
                raise UsageError(f"--methods {part}: expected a number of at least 0 after the colon")
        found.append((known[name], strength))
    return found


def prepared(setup: Setup, methods: Sequence[tuple[Method, float]]) -> list[tuple[Method, float]]:
    """The methods that can run here; the others are named on stderr. Raises UsageError if none is left."""
    from benchmarks.methods import Unavailable

    left = []
    for method, strength in methods:
        try:
            method.prepare(setup)
        except Unavailable as reason:
            print(f"left out: {method.name} ({reason})", file=sys.stderr)
            continue
        left.append((method, strength))
    if not left:
        raise UsageError("none of the methods can run here: choose others with --methods")
    return left


def choose(recordings: Sequence[LongRecording], count: int) -> list[LongRecording]:
    """At most `count` of each sort."""
    from calibration.evaluate import evenly

    sorts = dict.fromkeys(recording.sort for recording in recordings)
    return [
        recording
        for sort in sorts
        for recording in evenly([recording for recording in recordings if recording.sort == sort], count)
    ]


def show(rows: Sequence[Row]) -> None:
    """The table and the sentences on stdout."""
    from rich.console import Console

    from benchmarks.long_rows import headline, table

    console = Console(width=None if sys.stdout.isatty() else 180)  # wide enough for no name to be cut
    console.print(table(rows))
    for line in headline(rows):
        console.print(line, highlight=False, soft_wrap=True)


def run(options: argparse.Namespace) -> None:
    """Builds, measures, prints, writes. Raises WhisperSteerError."""
    from benchmarks.listening import fits_hash
    from benchmarks.methods import Setup
    from calibration.hallucinations import model_crc
    from whisper_steer.zoo import load_model

    methods = find_methods(options.methods)
    count = options.count or (QUICK_COUNT if options.quick else COUNT)
    recordings = long_recordings(options.split, options.data, count, options.seed)
    if options.quick:
        recordings = choose(recordings, count)
    model = load_model(options.model, device=options.device)
    name, layers = getattr(model, "name", "unnamed"), model.dims.n_audio_layer
    fits = fits_hash(name, model_crc(model), options.data, options.quick, layers)
    setup = Setup(
        model=model,
        name=name,
        cache=options.out / "fitted" / fits,
        plain=lambda clips: [],  # set by run_methods
        plain_windows=lambda clips: [],
        data_dir=options.data,
        quick=options.quick,
        labels_file=options.labels,
        steering=options.steering,
    )
    for path in measure_all(setup, methods, recordings, options.out, options.json):
        print(f"wrote {path}")


def measure_all(
    setup: Setup,
    methods: Sequence[tuple[Method, float]],
    recordings: Sequence[LongRecording],
    out: Path,
    also: Path | None = None,
) -> list[Path]:
    """Runs what can run, prints, and writes the rows to out/long_rows.json and `also`; the paths."""
    from benchmarks.hearing_cache import LONG_ROWS
    from benchmarks.long_rows import rows_of

    measured = run_methods(setup, prepared(setup, methods), recordings, out)
    plain, vad = (next((s for s in measured if s[0] == name), None) for name in (PLAIN, VAD))
    rows = rows_of(measured, plain, vad)
    show(rows)
    text = json.dumps(rows, indent=1, allow_nan=False) + "\n"
    return [write_whole(path, text) for path in dict.fromkeys([out / LONG_ROWS, also]) if path is not None]


def beside_tradeoff(setup: Setup, methods: Sequence[Method], out: Path) -> list[Path]:
    """The same methods at their usual strengths on long recordings of the same data; the paths written."""
    count = QUICK_COUNT if setup.quick else COUNT
    recordings = long_recordings("test", setup.data_dir, count, 0)
    if setup.quick:
        recordings = choose(recordings, count)
    own = replace(setup)  # run_methods gives it its own plain Whisper
    return measure_all(own, [(method, usual_strength(method)) for method in methods], recordings, out)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_recordings", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_COUNT} recordings of each sort")
    parser.add_argument("--count", type=_positive, help=f"recordings of each sort (default: {COUNT})")
    parser.add_argument("--seed", type=int, default=0, help="other recordings of the same clips")
    parser.add_argument(
        "--split", default="test", choices=("calibration", "test"), help="whose clips (default: test)"
    )
    parser.add_argument("--data", type=Path, help="folder of real recordings")
    parser.add_argument("--model", default="mini.en", help="any name or path that whisper-steer loads")
    parser.add_argument("--steering", help="of whisper-steer: a file or name, not the bundled one")
    parser.add_argument(
        "--methods", default=DEFAULT_METHODS, metavar="NAME[:STRENGTH],...",
        help=f"of benchmarks.tradeoff (default: {DEFAULT_METHODS})",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, ...")
    parser.add_argument("--labels", type=Path, help="labels of plain Whisper, for methods that are fitted")
    parser.add_argument("--out", type=Path, default=Path("out/long"), help="folder for results")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows as one flat list")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

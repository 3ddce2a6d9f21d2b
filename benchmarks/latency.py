"""What steering costs: plain against steered, in turns, in one run.

    python -m benchmarks.latency --quick                       # within ten minutes on two cores
    python -m benchmarks.latency --json rows.json              # tiny, base, small; all installed runtimes
    python -m benchmarks.latency --shapes large-v3 --device cuda --runtimes openai --dtypes float32 float16
    python -m benchmarks.latency --quick --clock cpu --threads 1       # on a machine that others use, too

Modes: shift_baked (in the weights), shift_hook, latents (LatentEdit of m latents), gate (a Gate that reads m
latents, no edit), window_gate (one on raw activations of four layers that reads windows as a whole, too, like
the bundled one), gated_latents (gate and latents), reconstruction (the papers' form: all 8 x d_model latents,
50 of them active in a frame), and with an edit before the gate's layer: a gate on the first and last block,
silence (MeanAblation) at the first. early_speech: the gate stays shut, as in a window full of speech;
early_gap: it opens for about half of the frames, so that the blocks behind the edit run a second time. A
ratio is the median over rounds of steered / plain, which take turns; encoder_low and encoder_high: the 95 %
interval of that median (lowest and highest of fewer than nine rounds). Where a round is short there are more
of them, until they take 3 s (1 s with --quick). Models have random weights (see latency_runtimes). faster-
whisper bakes every shift; whisper.cpp can do nothing else, one window at a time. alpha_change (faster-
whisper): the encoder_seconds that a new alpha of a Shift costs at the next window. The last row, nonspeech,
is the bundled mini.en on its noise clip: a withheld window need not be decoded.

Columns: runtime, mode, m, batch, shape, encoder_ratio, end_to_end_ratio, peak_mb; and encoder_low,
encoder_high, encoder_seconds (steered, a batch), real_time_factor (steered, seconds of computing per second
of audio: features, encoder, greedy decoding of 32 tokens a window), rounds, dtype. peak_mb: highest resident
memory of the process while steered (CPU; with faster, two models are loaded: plain and steered), or memory
allocated on the device; None where the system does not tell. dtype: float32, or float16 (--dtypes, on CUDA):
features and activations in half precision, as openai-whisper computes there unless it is told not to. With
--clock cpu every time is the processor time of this process in place of what the clock on the wall says:
other programs cannot stretch it (threads that wait for one another count, hence --threads 1).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.command import exit_code
from benchmarks.files import write_whole
from benchmarks.latency_timing import paired, peak_mb, ratio_of, reset_peak
from whisper_steer.errors import UsageError

MODES: tuple[tuple[str, int | None], ...] = (
    ("shift_baked", None),
    ("shift_hook", None),
    ("latents", 10),
    ("latents", 100),
    ("gate", 100),
    ("window_gate", None),
    ("gated_latents", 100),
    ("reconstruction", None),
    ("early_speech", 100),
    ("early_gap", 100),
)
# highest allowed encoder_ratio on the CPU; (mode, shape or None for every shape)
TARGETS: dict[tuple[str, str | None], float] = {
    ("shift_baked", None): 1.0,
    ("shift_hook", None): 1.01,
    ("gated_latents", "small"): 1.02,
    # 16 d^2 multiplications per frame beside the encoder's 12 d^2 per block: out of reach for tiny's 4 blocks
    ("reconstruction", "small"): 1.08,
}
ALPHA_CHANGE_SECONDS = 1.0  # highest allowed, at small's shape
# --quick measures these alone in batches, and with the early ones at small's shape: a round is long there
SHORT_MODES = ("shift_baked", "shift_hook", "gated_latents", "reconstruction")
EARLY_MODES = ("early_speech", "early_gap")
ROW_SECONDS, QUICK_ROW_SECONDS = 3.0, 1.0
QUICK_SECONDS = 510.0  # then settings are left out, and named
DTYPES = ("float32", "float16")
HALF_RUNTIMES = ("openai", "transformers")  # those that can be told to compute in float16
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_PACKAGES = {
    "openai": "whisper",
    "transformers": "transformers",
    "faster": "faster_whisper",
    "whisper.cpp": "pywhispercpp",
}


@dataclass(frozen=True)
class Row:
    """One setting; see the columns above. Ratios are steered / plain."""

    runtime: str
    mode: str
    m: int | None
    batch: int
    shape: str
    encoder_ratio: float | None
    end_to_end_ratio: float | None
    peak_mb: float | None
    encoder_low: float | None
    encoder_high: float | None
    encoder_seconds: float | None
    real_time_factor: float | None
    rounds: int
    dtype: str = "float32"


def verdict(row: Row, device: str) -> str:
    """ "yes", "no", or "within noise": the interval of a missed target still reaches it; "" without a
    target."""
    if row.mode == "alpha_change" and row.encoder_seconds is not None:
        met = "yes" if row.encoder_seconds < ALPHA_CHANGE_SECONDS else "no"
        target = f", < {ALPHA_CHANGE_SECONDS:.0f} s: {met}" if row.shape == "small" else ""
        return f"{row.encoder_seconds:.2f} s{target}"
    limit = TARGETS.get((row.mode, row.shape), TARGETS.get((row.mode, None)))
    if limit is None or row.encoder_ratio is None or (row.mode == "reconstruction" and device != "cpu"):
        return ""
    if row.encoder_ratio <= limit:
        return f"<= {limit:.2f}: yes"
    reached = row.encoder_low is not None and row.encoder_low <= limit
    return f"<= {limit:.2f}: {'within noise' if reached else 'no'}"


def table(rows: Sequence[Row], device: str) -> str:
    """All rows, aligned, for people."""
    head = tuple("runtime,shape,batch,dtype,mode,m,encoder,interval,end to end,RTF,MB,target".split(","))
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        spread = "" if row.encoder_low is None else f"{row.encoder_low:.3f}-{row.encoder_high:.3f}"
        lines.append(
            (
                row.runtime, row.shape, str(row.batch), row.dtype, row.mode,
                "" if row.m is None else str(row.m),
                _number(row.encoder_ratio), spread, _number(row.end_to_end_ratio),
                _number(row.real_time_factor), _number(row.peak_mb, 0), verdict(row, device),
            )
        )  # fmt: skip
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# ---------- measuring


def modes_of(runtime: str, only: Sequence[str] | None = None) -> list[tuple[str, int | None]]:
    """The (mode, m) that are measured: what the runtime can do; only: these modes alone."""
    able = {"faster": lambda mode: mode != "shift_hook", "whisper.cpp": lambda mode: mode == "shift_baked"}
    can = able.get(runtime, lambda mode: True)
    return [(mode, m) for mode, m in MODES if can(mode) and (only is None or mode in only)]


def measure(
    runtime: Any,
    name: str,
    shape: str,
    batch: int,
    modes: Sequence[tuple[str, int | None]],
    spread: float,
    args: argparse.Namespace,
    late: Callable[[], bool],
) -> Iterator[Row]:
    """A row per mode for one model. spread: see `steering_for`. late: is it time to stop?"""
    from benchmarks.latency_runtimes import WINDOW_SECONDS, dimensions, sound, steering_for

    audio = sound(batch)
    features = runtime.features(audio)

    def encode() -> object:
        return runtime.encode(features)

    def everything() -> object:
        return runtime.decode(runtime.encode(runtime.features(audio)))

    clock, device = CLOCKS[args.clock], args.device
    seconds = QUICK_ROW_SECONDS if args.quick else ROW_SECONDS
    for mode, m in modes:
        steering = steering_for(mode, m, dimensions(shape), spread=spread)
        on = (
            partial(runtime.baked, steering.edits[0])
            if mode == "shift_baked"
            else partial(runtime.steered, steering)
        )
        reset_peak(device)
        times = paired(encode, encode, on, args.rounds, clock, late, seconds)
        encoder = ratio_of(*times)
        whole = ratio_of(*paired(everything, everything, on, max(1, args.rounds // 2), clock, late))
        yield Row(
            name, mode, m, batch, shape, encoder.median, whole.median, peak_mb(device), encoder.low,
            encoder.high, encoder.seconds, whole.seconds / (batch * WINDOW_SECONDS), len(times[0]),
        )  # fmt: skip


def alpha_change(runtime: Any, name: str, shape: str, rounds: int, clock: Callable[[], float]) -> Row:
    """What a new alpha of a Shift costs in faster-whisper, at the next window."""
    from benchmarks.latency_runtimes import dimensions, steering_for

    seconds = statistics.median(
        runtime.alpha_changes(steering_for("shift_baked", None, dimensions(shape)), rounds, clock)
    )
    return Row(name, "alpha_change", None, 1, shape, None, None, None, None, None, seconds, None, rounds)


def nonspeech(
    rounds: int, device: str, clock: Callable[[], float] = time.perf_counter, dtype: str = "float32"
) -> Row:
    """The bundled model and steering on the bundled noise clip, through whisper.transcribe."""
    import whisper

    from whisper_steer.attach import steer
    from whisper_steer.audio import SAMPLING_RATE, load_audio
    from whisper_steer.zoo import DEFAULT_MODEL, bundled_dir, load_model

    model = load_model(DEFAULT_MODEL, device=device)
    audio = load_audio(bundled_dir() / DEFAULT_MODEL / "demo" / "noise.flac")

    def work() -> object:
        return whisper.transcribe(model, audio, fp16=dtype == "float16")

    reset_peak(device)
    whole = ratio_of(*paired(work, work, lambda: steer(model, decode_withheld=False), rounds, clock))
    seconds = whole.seconds / (len(audio) / SAMPLING_RATE)
    return Row(
        "openai", "nonspeech", None, 1, DEFAULT_MODEL, None, whole.median, peak_mb(device), None, None, None,
        seconds, rounds, dtype,
    )  # fmt: skip


# ---------- command


def settings(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(runtime, shape, batch) in the order in which they are measured, one model after another."""
    plan = [(name, shape, batch) for shape in args.shapes for name in args.runtimes for batch in args.batches]
    if args.quick:  # the cheapest first: what is left out for lack of time is left out at the end
        small = [("openai", "small", 1)] if "openai" in args.runtimes else []
        one, eight = ([(name, "tiny", batch) for name in args.runtimes] for batch in (1, 8))
        plan = [*one, *small, *eight]
    return [(name, shape, batch) for name, shape, batch in plan if batch == 1 or name != "whisper.cpp"]


def run(args: argparse.Namespace, save: Callable[[list[Row]], object] = lambda rows: None) -> list[Row]:
    """All rows; prints what it is at, and what is left out, to stderr. save: is given the rows so far after
    each one, so that a run that is stopped leaves what it has measured."""
    from benchmarks.latency_runtimes import MAKERS, random_model, stream_spread

    start = time.perf_counter()

    def late() -> bool:
        return args.quick and time.perf_counter() - start > QUICK_SECONDS

    last = [nonspeech(args.rounds, args.device, CLOCKS[args.clock], dtype) for dtype in args.dtypes]
    rows: list[Row] = []
    made: tuple[str, str] | None = None
    runtime: Any = None
    worn = DTYPES[0]
    spread = 1.0
    for name, shape, batch in settings(args):
        label = f"{name}, {shape}, batch {batch}"
        if late():
            print(f"latency: left out, for lack of time: {label}", file=sys.stderr)
            continue
        print(f"latency: {label}", file=sys.stderr, flush=True)
        if made != (name, shape):
            runtime = None  # let go of the last model first
            model = random_model(shape)
            spread = stream_spread(model, args.device)
            runtime, made, worn = MAKERS[name](model, args.device), (name, shape), DTYPES[0]
            del model  # a runtime that has weights of its own shall not be charged for these
        if name == "faster" and batch == 1:
            rows.append(alpha_change(runtime, name, shape, args.rounds, CLOCKS[args.clock]))
        brief = (*SHORT_MODES, *(EARLY_MODES if batch == 1 else ()))
        only = args.modes or (brief if args.quick and (shape != "tiny" or batch > 1) else None)
        modes = modes_of(name, only)
        for dtype in args.dtypes:
            if dtype != worn:
                runtime.use(dtype)
                worn = dtype
            for done, row in enumerate(measure(runtime, name, shape, batch, modes, spread, args, late), 1):
                rows.append(replace(row, dtype=dtype))
                save([*rows, *last])
                if late() and done < len(modes):
                    print(f"latency: stopped, for lack of time, after {row.mode} of {label}", file=sys.stderr)
                    break
    return [*rows, *last]


def parser() -> argparse.ArgumentParser:
    from benchmarks.latency_runtimes import RUNTIMES, SHAPES

    found = [name for name in RUNTIMES if find_spec(_PACKAGES[name]) is not None]
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.latency", description="What steering costs, per runtime and mode."
    )
    made.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=found, help="default: all installed")
    made.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "base", "small"])
    made.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N")
    made.add_argument("--rounds", type=int, default=None, metavar="N", help="default: 9, or 3 with --quick")
    names = list(dict.fromkeys(mode for mode, _ in MODES))
    made.add_argument("--modes", nargs="+", choices=names, default=None, help="default: all")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="float16: on CUDA; default: float32"
    )
    made.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time of this process")
    made.add_argument("--threads", type=int, default=0, metavar="N", help="0: torch's choice")
    made.add_argument(
        "--quick", action="store_true", help="small once, tiny with all runtimes; in ten minutes"
    )
    made.add_argument("--json", type=Path, default=None, metavar="FILE", help="the rows, one by one")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 (could not do it), 2 (wrong usage)."""
    args = parser().parse_args(argv)
    return exit_code(lambda: report(args))


def report(args: argparse.Namespace) -> None:
    """Measures, prints, writes. Raises WhisperSteerError."""
    import torch

    args.rounds = args.rounds if args.rounds is not None else 3 if args.quick else 9
    if args.rounds < 1 or args.threads < 0 or min(args.batches) < 1:
        raise UsageError("--rounds and --batches must be at least 1, --threads at least 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no CUDA device here; use cpu")
    if "float16" in args.dtypes:
        if args.device == "cpu":
            raise UsageError("--dtypes float16 is for --device cuda: on a CPU Whisper computes in float32")
        if unable := [name for name in args.runtimes if name not in HALF_RUNTIMES]:
            raise UsageError(
                f"--dtypes float16: {unable[0]} is measured in float32 only; choose --runtimes "
                + " ".join(HALF_RUNTIMES)
            )
    if args.threads:
        torch.set_num_threads(args.threads)

    def save(rows: list[Row]) -> None:
        if args.json is not None:
            write_whole(args.json, json.dumps([asdict(row) for row in rows], indent=1) + "\n")

    rows = run(args, save)
    save(rows)
    print(table(rows, args.device))


if __name__ == "__main__":
    sys.exit(main())

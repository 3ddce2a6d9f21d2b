"""From which share of active latents on a dense product is faster, for each operation that has one.

    python -m benchmarks.kernels_break_even                 # a minute or two
    python -m benchmarks.kernels_break_even --clock cpu     # on a machine that does other work

Prints a Markdown table: what was measured here beside the constant that whisper_steer.kernels decides by
(whisper_steer/kernels/choice.py, BREAK_EVEN). A constant above the measured share means that the sparse form
is taken where the dense one would be faster; one below it, the other way round.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from tqdm import tqdm

from benchmarks.command import exit_code
from benchmarks.scaling import load, machine
from benchmarks.training import positive
from whisper_steer.errors import UsageError
from whisper_steer.kernels import choice

DTYPES = ("float32", "bfloat16", "float16")


def run(options: argparse.Namespace) -> int:
    if options.clock == "cpu" and (options.threads > 1 or options.device != "cpu"):
        raise UsageError("--clock cpu measures one thread of a CPU: leave out --threads and --device")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no CUDA device; leave it out to measure the CPU")
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    constants = dict(choice.BREAK_EVEN)
    lines = [
        f"{machine(options.device, options.threads)['device']}; torch {torch.__version__}; d {options.d}, "
        f"{options.n:,} latents, {options.frames:,} frames; {options.clock} clock; load {load()}",
        "", "| operation | dtype | dense wins from | BREAK_EVEN |", "|---|---|---|---|",
    ]  # fmt: skip
    todo = [(operation, dtype) for dtype in options.dtypes for operation in choice.BY_DENSITY]
    for operation, name in tqdm(todo, unit="operation", file=sys.stderr, disable=None):
        dtype = getattr(torch, name)
        found = choice.measure_break_even(
            options.device, dtype, operation=operation, d_model=options.d, n_latents=options.n,
            frames=options.frames, clock=clock,
        )  # fmt: skip
        shown = f"{100 * found:.2g} %" if found < choice.SHARES[-1] else f"above {100 * found:.0f} %"
        limit = constants[operation, options.device, dtype]
        lines.append(f"| {operation} | {name} | {shown} | {100 * limit:.3g} % |")
    print("\n".join(lines))
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels_break_even",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="default: all")
    parser.add_argument("--d", type=positive, default=768, help="width (default: 768)")
    parser.add_argument("--n", type=positive, default=6144, help="latents (default: 6144)")
    parser.add_argument("--frames", type=positive, default=256, help="default: 256")
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())

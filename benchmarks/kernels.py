"""How fast sparse encode, decode, edit and training steps are beside dense torch and other libraries' paths.

    python -m benchmarks.kernels --quick --json rows.json       # under five minutes on two cores
    python -m benchmarks.kernels --markdown docs/kernels.md     # every size, and the figures into the page
    python -m benchmarks.kernels --devices cuda --alone         # the GPU without the CPU, ours against dense

Everything runs on the same made-up activations and weights, in one run: dense torch, the same through
torch.compile, whisper_steer's kernels, sparsify and SAELens in their own environments (make bench-env), and
openai/sparse_autoencoder from a checkout beside them. Every CPU row is measured with one thread and with two.
Where there is a CUDA device it is measured, too, and each operation is set beside the
roofline of that GPU: its bytes at the copy bandwidth, its FLOP at the matrix rate, both measured in the
same run. Otherwise `ratio_to_roofline` is null.

Rows: op (encode-threshold, encode-topk, decode, edit, train), impl, device, dtype, d, n, k, frames,
ns_per_frame (the shortest of several runs), ratio_to_dense (dense torch's time over this one's: above 1
is faster), ratio_to_roofline (the least time over this one's: 1 is the machine's limit), threads, error.
k of an edit: the latents it edits. A contestant that cannot run has a row that says why, and no figures.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.command import exit_code
from benchmarks.files import write_whole
from benchmarks.kernels_contestants import DENSE, EDITED, OPERATIONS, OURS, check, works
from benchmarks.kernels_page import BEGIN, COMMAND, END, page, replaced, table
from benchmarks.kernels_roofline import Roofline
from benchmarks.peers import environments
from benchmarks.peers.kernels_worker import Request, answer
from benchmarks.scaling import load, machine
from benchmarks.training import positive
from whisper_steer.errors import UsageError

__all__ = ["BEGIN", "END", "COLUMNS", "main", "measured", "replaced", "table"]

COLUMNS = (
    "op", "impl", "device", "dtype", "d", "n", "k", "frames", "ns_per_frame", "ratio_to_dense",
    "ratio_to_roofline", "threads", "error",
)  # fmt: skip
PEERS = ("sparsify", "sae_lens", "openai")
# what this package's targets are about, and what a peer's path has
PEER_OPERATIONS = ("encode-threshold", "encode-topk", "decode")
OPENAI = "openai/sparse_autoencoder"
OPENAI_URL = f"https://github.com/{OPENAI}"
NAMES = {"openai": OPENAI}
TIMEOUT = 600.0
QUICK_SECONDS = 270.0
LATE = "not reached within --limit"

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One size; operations to run, and whether peers run, too."""

    d: int
    n: int
    k: int
    frames: int
    dtype: str = "float32"
    operations: tuple[str, ...] = OPERATIONS
    peers: bool = False

    def request(self, device: str, options: argparse.Namespace, threads: int = 1) -> Request:
        return Request(
            self.d, self.n, self.k, self.frames, self.dtype, device, threads,
            repeats=3 if options.quick else 7, seconds=0.3 if options.quick else 1.0, clock=options.clock,
        )  # fmt: skip


_INFERENCE = ("encode-threshold", "encode-topk", "decode", "edit")
_BACK = ("decode", "edit")
# training at 1x, 8x and 32x: 8x is among the others
_TRAINING = tuple(Case(192, n, 25, 1500, operations=("train",)) for n in (192, 6144))
CPU_QUICK = (
    Case(768, 6144, 50, 512, peers=True),
    Case(768, 6144, 50, 1, operations=_BACK),
    Case(192, 1536, 25, 1500, peers=True),
    *_TRAINING,
)
CPU_FULL = (
    Case(768, 6144, 50, 1500, peers=True),
    Case(192, 1536, 25, 1500, peers=True),
    *(Case(768, 6144, 50, frames, operations=_BACK) for frames in (1, 64)),
    *(Case(768, 6144, k, 512, operations=("decode",)) for k in (1, 16, 128, 512, 1024, 2048)),
    *(Case(d, 8 * d, 50, 512, operations=_INFERENCE) for d in (384, 512, 1024, 1280)),
    *(Case(768, 6144, 50, 512, dtype, _INFERENCE) for dtype in ("bfloat16", "float16")),
    Case(768, 24_576, 50, 512, operations=_INFERENCE),
    *_TRAINING,
)
GPU = (
    *(Case(768, 6144, 50, 24_000, dtype, peers=True) for dtype in ("bfloat16", "float32")),
    Case(768, 24_576, 50, 24_000, "bfloat16", peers=True),
    *(Case(768, 6144, k, 24_000, "bfloat16", ("decode",)) for k in (1, 16, 128, 512)),
    *(Case(d, 8 * d, 50, 24_000, "bfloat16", _INFERENCE) for d in (384, 512, 1024, 1280)),
    Case(768, 6144, 50, 1, "bfloat16", _BACK),
)


def cases(device: str, quick: bool) -> tuple[Case, ...]:
    if device == "cpu":
        return CPU_QUICK if quick else CPU_FULL
    return GPU[:2] if quick else GPU


# -- measuring ------------------------------------------------------------------------------------------


def measured(
    case: Case, device: str, options: argparse.Namespace, roofline: Roofline | None
) -> Iterator[Row]:
    """The rows of one case, for each number of threads; dense torch's first for each operation.

    After options.deadline (time.monotonic) rows say that they were not reached.
    """
    operations = [operation for operation in case.operations if operation in options.ops]
    for threads in options.threads if device == "cpu" else options.threads[-1:]:
        request = case.request(device, options, threads)
        torch.set_num_threads(threads)
        check(request)
        dense: dict[str, float] = {}
        for operation, contestant, work in works(request, operations, compiled=not options.alone):
            if time.monotonic() > options.deadline:
                work = LATE
            found = work if isinstance(work, str) else answer(request, {"it": work})["it"]
            row = row_of(operation, contestant, request, found, roofline)
            if contestant == DENSE and row["ns_per_frame"] is not None:
                dense[operation] = row["ns_per_frame"]
            yield with_ratio(row, dense)
        if case.peers and not options.alone:
            for row in peer_rows(operations, request, options.peers, roofline, options.deadline):
                yield with_ratio(row, dense)


def peer_rows(
    wanted: Sequence[str], request: Request, folder: Path, roofline: Roofline | None,
    deadline: float = math.inf,
) -> Iterator[Row]:  # fmt: skip
    operations = [operation for operation in PEER_OPERATIONS if operation in wanted]
    for library in PEERS if operations else ():
        found = ask(library, request, folder, deadline - time.monotonic())
        # a problem as a whole is told once per operation that the library has
        for operation in operations:
            if isinstance(found, str):
                yield row_of(operation, NAMES.get(library, library), request, found, roofline)
            elif operation in found:
                yield row_of(operation, NAMES.get(library, library), request, found[operation], roofline)


def ask(
    library: str, request: Request, folder: Path, seconds: float = TIMEOUT
) -> dict[str, float | str] | str:
    """The library's figures from its own environment and process, or why there are none."""
    if seconds <= 0:
        return LATE
    environment = {**os.environ, "OMP_NUM_THREADS": str(request.threads), "PYTHONPATH": ""}
    environment |= environments.variables(request.device)
    if library == "openai":
        # on no package index: a checkout, run with this environment's torch
        if not (folder / library / "sparse_autoencoder").is_dir():
            return f"no checkout: git clone {OPENAI_URL} {folder / library} (its kernels need CUDA)"
        python, environment["PYTHONPATH"] = Path(sys.executable), str((folder / library).absolute())
    else:
        problem = environments.missing(folder, library)
        if problem:
            return problem
        python = environments.interpreter(folder, library).absolute()
    script = Path(environments.__file__).with_name(f"kernels_{library}.py")
    with tempfile.TemporaryDirectory(prefix="whisper-steer-kernels-") as place:
        path = Path(place) / "request.json"
        path.write_text(json.dumps(asdict(request)))
        try:
            done = subprocess.run(
                [str(python), str(script), str(path)], capture_output=True, text=True, env=environment,
                timeout=min(seconds, TIMEOUT),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"not done after {min(seconds, TIMEOUT):.0f} s"
        except OSError as error:
            return f"cannot run {python}: {error.strerror or error}"
    if done.returncode:
        return environments.last_line(done.stderr)[:300] or f"ended with {done.returncode}"
    try:
        found = json.loads(environments.last_line(done.stdout))
        return {str(name): value for name, value in found.items()}
    except (ValueError, AttributeError):
        return "reported no figures"


def row_of(
    operation: str, contestant: str, request: Request, found: float | str, roofline: Roofline | None
) -> Row:
    """found: nanoseconds per frame, or why there are none."""
    request = replace(request, k=min(EDITED, request.n)) if operation == "edit" else request
    row: Row = dict.fromkeys(COLUMNS)
    row |= {
        "op": operation, "impl": contestant, "device": request.device, "dtype": request.dtype,
        "d": request.d, "n": request.n, "k": request.k, "frames": request.frames, "threads": request.threads,
    }  # fmt: skip
    if isinstance(found, str):
        row["error"] = found or "no figures"
        return row
    least = roofline.nanoseconds(operation, request) if roofline else None
    row["ns_per_frame"] = round(found, 2)
    row["ratio_to_roofline"] = None if least is None else round(least / found, 4)
    return row


def with_ratio(row: Row, dense: dict[str, float]) -> Row:
    if row["ns_per_frame"] and row["op"] in dense:
        row["ratio_to_dense"] = round(dense[row["op"]] / row["ns_per_frame"], 3)
    return row


# -- the command --------------------------------------------------------------------------------------


def headline(
    options: argparse.Namespace, devices: Sequence[str], before: float | None, seconds: float
) -> str:
    places = "; ".join(machine(device, options.threads[-1])["device"] for device in devices)
    timed = (
        "processor time of the process (other work ran on the machine)"
        if options.clock == "cpu"
        else "wall-clock time"
    )
    flags = " --quick" if options.quick else ""
    flags += "" if len(options.ops) == len(OPERATIONS) else f" --ops {' '.join(options.ops)}"
    flags += f" --devices {' '.join(options.devices)}" if options.devices else ""
    flags += " --alone" if options.alone else ""
    flags += f" --threads {' '.join(map(str, options.threads))} --clock {options.clock}"
    return (
        f"{COMMAND}{flags}` on {places}; torch {torch.__version__}; "
        f"{seconds / 60:.1f} min; {timed}, the shortest of several runs; load {before} before, "
        f"{load()} after."
        + ("" if torch.cuda.is_available() else " No GPU was at hand: nothing below was measured on one.")
    )


def run(options: argparse.Namespace) -> int:
    """Returns the exit code: 1 where one of our own operations failed. Raises UsageError: a wrong page."""
    most = max(options.threads)
    if options.clock == "cpu" and most > 1:
        raise UsageError(f"--clock cpu with --threads {most}: processor time needs --threads 1")
    text = page(options.markdown) if options.markdown else None
    there = ["cpu"] + (["cuda"] if torch.cuda.is_available() and options.clock != "cpu" else [])
    devices = options.devices or there
    if "cuda" in devices and "cuda" not in there:
        why = "--clock cpu times a CPU" if options.clock == "cpu" else "there is no CUDA device"
        raise UsageError(f"--devices cuda: {why}; leave it out to measure the CPU")
    before, started = load(), time.monotonic()
    options.deadline = started + options.limit
    rows: list[Row] = []
    todo = [(device, case) for device in devices for case in cases(device, options.quick)]
    rooflines: dict[str, Roofline] = {}
    # a bar on a terminal alone: elsewhere, in a log for instance, each row is a line
    with tqdm(todo, unit="size", file=sys.stderr, disable=None) as bar:
        for device, case in bar:
            if device != "cpu" and case.dtype not in rooflines:
                rooflines[case.dtype] = Roofline.measured(case.request(device, options))
            for row in measured(case, device, options, rooflines.get(case.dtype)):
                rows.append(row)
                bar.set_description(done := progress(row))
                if bar.disable:
                    print(f"{time.monotonic() - started:5.0f} s  {done}", file=sys.stderr, flush=True)
            if options.json is not None:
                write_whole(options.json, json.dumps(rows, indent=1))
    block = f"{headline(options, devices, before, time.monotonic() - started)}\n\n{table(rows)}"
    print(block)
    if text is not None:
        write_whole(options.markdown, replaced(text, block))
    return int(any(row["error"] and row["impl"] == OURS for row in rows))


def progress(row: Row) -> str:
    taken = "not run" if row["error"] else f"{row['ns_per_frame'] / 1000:.3g} µs a frame"
    size = f"{row['device']} {row['dtype']}, d {row['d']}, n {row['n']}, {row['threads']} threads"
    return f"{size}: {row['op']}, {row['impl']}: {taken}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few sizes, few repeats, --limit 270")
    parser.add_argument(
        "--threads", type=positive, nargs="+", help="of the CPU, one table row each (default: 1 2)"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: processor time, for a machine that does other work (default: wall)",
    )  # fmt: skip
    parser.add_argument("--devices", nargs="+", choices=("cpu", "cuda"), help="default: all there are")
    parser.add_argument("--ops", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="default: all")
    parser.add_argument("--alone", action="store_true", help="dense torch and whisper_steer, no others")
    parser.add_argument(
        "--peers", type=Path, default=environments.default_folder(), help="environments of other libraries"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="SECONDS", help="begin no further measurement after that long"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a page whose marked block is replaced")
    options = parser.parse_args(arguments)
    options.threads = options.threads or ([1] if options.clock == "cpu" or os.cpu_count() == 1 else [1, 2])
    options.limit = options.limit or (QUICK_SECONDS if options.quick else math.inf)
    options.deadline = math.inf
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(lambda: run(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main())

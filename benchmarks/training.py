"""Speed, memory and quality of SAE training beside sparsify, SAELens and dictionary_learning.

    python -m benchmarks.training --make-envs                  # once: an environment for each of them
    python -m benchmarks.training --quick --json rows.json     # about ten minutes on two cores
    python -m benchmarks.training                              # longer runs, every variant three times

Every library trains one SAE on the same activations in the same order, with the same batch, steps, dtype and
threads, through its own trainer (see `benchmarks.peers`), in its own environment and process. Its variants
(activation, optimiser, sparse or dense) stand apart. The peak learning rate is DEFAULT_LR unless a variant
has one of its own in training_contestants; --tune prints the FVU of each of LEARNING_RATES on frames that
are neither trained on nor reported. After 1/20 of the steps for warm-up comes a fall to 0 over the last
fifth, or the library's own schedule where it has no such one.

Timed are optimiser steps alone, after some untimed ones. Repeats are interleaved, because other work on a
machine comes and goes: one repeat of every variant, then the next. The first repeat runs all steps and its
SAE is measured on held-out frames: fraction of variance unexplained, L0 and the share of latents alive,
for every library by the same code from the weights alone. The others only time some steps; with --quick
they do so for the fastest variant of each library. A library that fails is a row with an error, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import exit_code
from benchmarks.files import write_whole
from benchmarks.peers import environments
from benchmarks.training_contestants import (
    CONTESTANTS,
    FULL,
    OURS,
    QUICK,
    Case,
    Contestant,
    ContestantError,
    Outcome,
    Runner,
    Setting,
    learning_rate,
    run_once,
    train,
)
from benchmarks.training_frames import FrameFiles, prepare
from whisper_steer.errors import UsageError

COLUMNS = (
    "library", "variant", "activation", "data", "d_model", "n_latents", "k", "batch", "steps", "lr",
    "sae_tokens_per_s", "sae_tokens_per_s_min", "sae_tokens_per_s_max", "repeats", "fvu", "l0", "alive",
    "peak_mb", "device", "dtype", "threads", "error",
)  # fmt: skip
LEARNING_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)

Row = dict[str, Any]


# -- the comparison -----------------------------------------------------------------------------------------


def compare(
    case: Case,
    files: FrameFiles,
    setting: Setting,
    contestants: Sequence[Contestant] = CONTESTANTS,
    *,
    repeats: int = 3,
    best_only: bool = False,
    run: Runner = run_once,
    tick: Callable[[str], None] = lambda _text: None,
) -> list[Row]:
    """One row per contestant. best_only: repeats after the first only for each library's fastest variant.

    `tick` is called with the contestant's name after every run. A contestant that fails once is not run
    again; its row has the error and no figures.
    """
    done: dict[Contestant, list[Outcome]] = {contestant: [] for contestant in contestants}
    errors: dict[Contestant, str] = {}
    for repeat in range(repeats):
        for contestant in _round(done, errors, best_only=best_only and repeat > 0):
            steps = case.steps if repeat == 0 else case.timing_steps
            try:
                done[contestant].append(run(contestant, case, files, setting, steps, repeat == 0))
            except ContestantError as error:
                errors[contestant] = str(error)
            tick(f"{contestant.library} {contestant.variant}")
    return [row_of(c, case, setting, outcomes, errors.get(c)) for c, outcomes in done.items()]


def _round(
    done: Mapping[Contestant, Sequence[Outcome]], errors: Mapping[Contestant, str], *, best_only: bool
) -> list[Contestant]:
    running = [contestant for contestant in done if contestant not in errors]
    if not best_only:
        return running
    fastest: dict[str, Contestant] = {}
    for contestant in running:
        rival = fastest.get(contestant.library)
        if rival is None or done[contestant][0].step_s < done[rival][0].step_s:
            fastest[contestant.library] = contestant
    return list(fastest.values())


def row_of(
    contestant: Contestant, case: Case, setting: Setting, outcomes: Sequence[Outcome], error: str | None
) -> Row:
    """A row with all COLUMNS; figures are None where there is an error. Speed is the median over repeats."""
    row: Row = dict.fromkeys(COLUMNS)
    row |= {
        "library": contestant.library, "variant": contestant.variant, "activation": contestant.activation,
        "data": case.source, "d_model": case.d_model, "n_latents": case.n_latents, "k": case.k,
        "batch": case.batch, "steps": case.steps, "lr": learning_rate(contestant, case),
        "device": setting.device, "dtype": setting.dtype, "threads": setting.threads,
        "repeats": len(outcomes), "error": error,
    }  # fmt: skip
    if error is None:
        speeds = [case.batch / outcome.step_s for outcome in outcomes]
        row |= {
            "sae_tokens_per_s": round(statistics.median(speeds)),
            "sae_tokens_per_s_min": round(min(speeds)),
            "sae_tokens_per_s_max": round(max(speeds)),
            "peak_mb": round(max(outcome.peak_mb for outcome in outcomes), 1),
        }
        row |= {name: round(value, 5) for name, value in (outcomes[0].quality or {}).items()}
    return row


def best_peer(rows: Sequence[Row]) -> Row | None:
    """The fastest row that is not ours; None if none has a speed."""
    peers = [row for row in rows if row["library"] != OURS and row["sae_tokens_per_s"]]
    return max(peers, key=lambda row: row["sae_tokens_per_s"], default=None)


# -- learning rates -----------------------------------------------------------------------------------------


def tune(
    case: Case,
    files: FrameFiles,
    setting: Setting,
    contestants: Sequence[Contestant] = CONTESTANTS,
    *,
    rates: Sequence[float] = LEARNING_RATES,
    tick: Callable[[str], None] = lambda _text: None,
) -> dict[tuple[str, str], dict[float, float]]:
    """(library, variant) -> lr -> FVU on the tuning frames after the case's steps; failed runs left out."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for contestant in contestants:
        by_rate = found.setdefault((contestant.library, contestant.variant), {})
        for rate in rates:
            try:
                outcome = train(contestant, case, files.train, files.tuning, setting, case.steps, rate)
            except ContestantError as error:
                tick(f"{contestant.library} {contestant.variant} lr {rate:g}: {error}")
                break
            if outcome.quality is not None:
                by_rate[rate] = outcome.quality["fvu"]
                tick(f"{contestant.library} {contestant.variant} lr {rate:g}: FVU {by_rate[rate]:.4f}")
    return found


# -- output -------------------------------------------------------------------------------------------------


def table(case: Case, rows: Sequence[Row]) -> Any:
    """A rich table of one case's rows, fastest first, failures last."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    first = rows[0]
    drawn = Table(
        title=(
            f"{case.source} activations: d {case.d_model}, {case.n_latents} latents, k {case.k}, "
            f"batch {case.batch}, {case.steps} steps, {first['device']} {first['dtype']}, "
            f"{first['threads']} threads"
        ),
        title_justify="left", title_style="bold", box=SIMPLE_HEAD,
    )  # fmt: skip
    for name in ("library", "variant"):
        drawn.add_column(name)
    for name in ("SAE-tokens/s [min, max]", "x best peer", "FVU", "L0", "alive %", "peak MB", "lr"):
        drawn.add_column(name, justify="right")
    best = best_peer(rows)
    for row in sorted(rows, key=lambda row: -(row["sae_tokens_per_s"] or 0)):
        if row["error"]:
            drawn.add_row(row["library"], row["variant"], "failed")
            continue
        speed = row["sae_tokens_per_s"]
        spread = f" [{row['sae_tokens_per_s_min']:,}, {row['sae_tokens_per_s_max']:,}]"
        ratio = f"{speed / best['sae_tokens_per_s']:.2f}" if best else "-"
        quality = [f"{row['fvu']:.4f}", f"{row['l0']:.1f}", f"{100 * row['alive']:.1f}"]
        drawn.add_row(
            row["library"], row["variant"], f"{speed:,}{spread if row['repeats'] > 1 else ''}", ratio,
            *quality, f"{row['peak_mb']:.0f}", f"{row['lr']:g}",
        )  # fmt: skip
    return drawn


# -- command line -------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description="SAE training beside other libraries"
    )
    parser.add_argument("--make-envs", action="store_true", help="make the libraries' environments and stop")
    parser.add_argument("--torch", default=environments.TORCH, help="what --make-envs installs first")
    parser.add_argument("--peers", type=Path, help="folder of the environments (default out/peers)")
    parser.add_argument("--quick", action="store_true", help="about ten minutes on two cores")
    parser.add_argument("--tune", action="store_true", help="print FVU by learning rate and stop")
    parser.add_argument("--case", choices=[case.name for case in QUICK], help="only this one")
    parser.add_argument("--repeats", type=positive, default=3, help="interleaved repeats (default 3)")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads of each library (default 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu, then cuda if there is one")
    parser.add_argument("--out", type=Path, default=Path("out/training"), help="folder for the activations")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the rows as one flat list")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def settings(options: argparse.Namespace, peers: Path) -> list[Setting]:
    """CPU in float32; CUDA in bfloat16 autocast where there is one.

    Raises UsageError: --device cuda without one.
    """
    import torch

    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise UsageError("--device cuda: torch sees no CUDA device here; leave --device out for the CPU")
    cpu = Setting(peers, "cpu", "float32", options.threads)
    cuda = Setting(peers, "cuda", "bfloat16", options.threads)
    return [
        setting
        for setting, wanted in ((cpu, options.device != "cuda"), (cuda, has_cuda and options.device != "cpu"))
        if wanted
    ]


def run(options: argparse.Namespace) -> int:
    """0, or 1 if a library failed. Raises UsageError: no environment at all."""
    from rich.console import Console
    from tqdm import tqdm

    console = Console(width=max(120, Console().width))
    peers = options.peers or environments.default_folder()
    if options.make_envs:
        environments.make(peers, torch=options.torch)
        return 0
    absent = [environments.missing(peers, name) for name in environments.ENVIRONMENTS]
    if all(absent):
        raise UsageError(f"nothing to compare with in {peers}: run make bench-env first")
    rows: list[Row] = []
    for setting in settings(options, peers):
        for case in QUICK if options.quick else FULL:
            if options.case not in (None, case.name):
                continue
            files = prepare(
                case.source, case.d_model, train=case.train, held_out=case.held_out, folder=options.out,
                say=lambda text: print(text, file=sys.stderr),
            )  # fmt: skip
            if options.tune:
                tune(case, files, setting, tick=print)
                continue
            runs = _number_of_runs(options)
            with tqdm(total=runs, unit="run", file=sys.stderr) as bar:

                def tick(text: str, bar: Any = bar) -> None:
                    bar.set_description(text)
                    bar.update()

                found = compare(
                    case, files, setting, repeats=options.repeats, best_only=options.quick, tick=tick
                )
            console.print(table(case, found))
            for row in found:
                if row["error"]:
                    print(f"{row['library']} {row['variant']} failed: {row['error']}")
            rows += found
            if options.json:
                write_whole(options.json, json.dumps(rows, indent=1))
    return int(any(row["error"] for row in rows))


def _number_of_runs(options: argparse.Namespace) -> int:
    libraries = len({contestant.library for contestant in CONTESTANTS})
    return len(CONTESTANTS) + (options.repeats - 1) * (libraries if options.quick else len(CONTESTANTS))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())

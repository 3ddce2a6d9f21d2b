"""What SAE training costs on this machine, and what a run of the paper's size costs here and elsewhere.

    python -m benchmarks.scaling --quick                         # a minute or two on two cores
    python -m benchmarks.scaling --json rows.json                # five minutes
    python -m benchmarks.scaling --markdown docs/scaling.md      # ... and put the figures into the page

Measured: encoding (mini.en, and a Whisper with random weights and whisper-small's dimensions: weights do not
change the time), decoding and preparing audio, SAE training steps, memory and files of two small runs. From
these, and from sizes alone, follow the cost, disk and traffic of AudioSAE's run: 2,800 h, 12 layers. Where
there is a CUDA device everything is measured there too, in bfloat16; without one, figures for GPUs are
estimated from operations and say so. The machine should do nothing else meanwhile; its load is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.command import exit_code
from benchmarks.files import marked_page, write_whole
from benchmarks.scaling_costs import PAPER, Speed, encoder_flop
from benchmarks.scaling_measure import (
    RunPlan,
    Shape,
    Timing,
    measure_audio,
    measure_encoding,
    measure_run,
    measure_training,
    mini_encoder,
    small_encoder,
    write_recordings,
)
from benchmarks.scaling_rows import (
    BEGIN,
    PROCESSES,
    Row,
    audio_rows,
    disk_rows,
    encoding_row,
    estimate_rows,
    job_rows,
    replaced,
    run_rows,
    sum_rows,
    tables,
    traffic_rows,
    training_rows,
)
from benchmarks.training import positive

BATCH = 2500
MINI, WIDE, WIDEST = Shape(192, 1536, 16), Shape(768, 6144, 50), Shape(768, 24_576, 50)


def device_rows(device: str, folder: Path, threads: int, quick: bool, bar: Any) -> list[Row]:
    """Everything that is measured on one device, and what follows from it. folder: see write_recordings."""

    def begin(text: str) -> None:
        bar.set_description(f"{device}: {text}")
        bar.update()

    begin("audio")
    cuda = device.startswith("cuda")
    audio = measure_audio(folder, windows=4 if quick else 16)
    rows = audio_rows(audio)
    encoded: dict[str, Timing] = {}
    for name, make, windows, depth in (
        ("mini.en", mini_encoder, 8, (192, 4)),
        ("whisper-small's size", small_encoder, 2 if quick else 8 if cuda else 4, (768, 12)),
    ):
        begin(f"encoding, {name}")
        encoder = make(device)
        encoded[name] = measure_encoding(encoder, windows=windows, repeats=2 if quick else 3)
        rows.append(encoding_row(f"{name}, {encoder.n_layers} layers", encoded[name], encoder_flop(*depth)))
        del encoder
    trained: dict[Shape, list[Timing]] = {}
    part = PAPER.batch // PROCESSES
    for shape, steps in ((MINI, 20), (WIDE, 12), (WIDEST, 5)):
        begin(f"training, {shape}")
        batches = [BATCH, part] if shape is WIDE else [BATCH]
        trained[shape] = measure_training(
            shape, batches, steps=max(3, steps // 4) if quick else steps, device=device
        )
        rows += training_rows(shape, batches, trained[shape])
    small, mini = (
        Speed(
            0.0 if cuda else audio.windows.median, encoded[name].median,
            trained[shape][0].median, trained[shape][-1].median, audio.filled,
        )
        for name, shape in (("whisper-small's size", WIDE), ("mini.en", MINI))
    )  # fmt: skip
    rounds, batches_a_round = 3, 4 if quick else 10
    for name, shape, layers, source in (
        ("mini.en, 4 layers, x8", MINI, 4, folder),
        ("made-up frames, 2 layers of d 768, x8", WIDE, 2, None),
    ):
        begin(f"a small run, {name}")
        found = measure_run(
            RunPlan(shape, layers, batches_a_round, rounds * batches_a_round, source, device, threads, BATCH)
        )
        rows += run_rows(name, shape, found)
        if source is not None:
            rows += sum_rows(name, found, layers, mini)
    return rows + job_rows(machine(device, threads)["device"], small, device)


MEASUREMENTS = 8  # calls of `begin` above


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the figures hold for."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {threads} threads"
    return {
        "device": name, "dtype": "bfloat16" if device.startswith("cuda") else "float32", "threads": threads,
        "torch": torch.__version__, "system": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load() -> float | None:
    """Runnable processes, mean of the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


BUSY = (
    "**Other work ran meanwhile**: times, and what is derived from them, are too long by an unknown factor; "
    "sizes and traffic do not depend on it. "
)


def headline(
    found: Sequence[dict[str, Any]], loads: Sequence[float | None], seconds: float, flags: str
) -> str:
    places = "; ".join(f"{entry['device']}, {entry['dtype']}" for entry in found)
    shown = " before, ".join("unknown" if value is None else str(value) for value in loads)
    return (
        f"`python -m benchmarks.scaling{flags}` on {places}; torch {found[0]['torch']}, "
        f"{found[0]['system']}; {seconds / 60:.1f} min; load {shown} after (mean number of running processes "
        "over a minute, this one's threads included). "
        + (BUSY if loads[0] is not None and loads[0] > 1 else "")
        + ("" if torch.cuda.is_available() else "No GPU was at hand: nothing below was measured on one.")
    ).strip()


def run(options: argparse.Namespace) -> list[Row]:
    """Measures, prints, writes. Raises UsageError: a page without marks, a device that is not there."""
    if options.markdown is not None:
        marked_page(options.markdown, replaced, BEGIN)  # before minutes are spent
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    torch.set_num_threads(options.threads)
    started, loads = time.monotonic(), [load()]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="whisper-steer-scaling-") as folder:
        write_recordings(Path(folder))
        with tqdm(total=MEASUREMENTS * len(devices), unit="part", file=sys.stderr) as bar:
            for device in devices:
                found = device_rows(device, Path(folder), options.threads, options.quick, bar)
                prefix = f"{device}: " if len(devices) > 1 else ""
                for entry in found:
                    entry["section"] = prefix + entry["section"]
                rows += [entry | machine(device, options.threads) for entry in found]
    derived = [*traffic_rows(), *disk_rows(), *estimate_rows()]
    rows += [entry | {"device": None, "dtype": None, "threads": None} for entry in derived]
    loads.append(load())
    for entry in rows:
        entry["load_before"], entry["load_after"] = loads
    machines = [machine(device, options.threads) for device in devices]
    flags = " --quick" if options.quick else ""
    block = headline(machines, loads, time.monotonic() - started, flags) + "\n\n" + tables(rows)
    print(block)
    if options.json is not None:
        write_whole(options.json, json.dumps(rows, indent=1))
    if options.markdown is not None:
        write_whole(options.markdown, replaced(marked_page(options.markdown, replaced, BEGIN), block))
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="few repeats, small buffers")
    parser.add_argument(
        "--threads", type=positive, default=torch.get_num_threads(), help="of the CPU (default: torch's)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures as one flat list of rows")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="a page whose marked block is replaced")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)

    def work() -> None:
        run(options)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())

"""Figures of `benchmarks.scaling` as rows, and what follows from them for a large run.

A row is one figure: section, name, value, high (end of a range, else None), unit (s, B, B/s, share or "1/s"),
basis and how it comes about. basis: "measured" here; "derived" from measured figures or from sizes alone;
"estimated" from operations at an assumed utilisation; "published" by somebody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.scaling_costs import (
    GPUS,
    PAPER,
    PUBLISHED_SAE_TOKENS,
    UTILISATION,
    Job,
    Speed,
    cache_bytes,
    checkpoint_bytes,
    encoder_flop,
    estimated_seconds,
    gradients_payload,
    gradients_traffic,
    job_flop,
    largest_share,
    saes_traffic,
    seconds_alone,
    seconds_shared,
    training_bytes,
    training_flop,
)
from benchmarks.scaling_measure import AudioTimes, RunFigures, Shape, Timing

Row = dict[str, Any]
PROCESSES = 8
# one direction of one link, bytes per second
LINKS = {"10 Gbit/s Ethernet": 1.25e9, "100 Gbit/s": 12.5e9, "NVLink, 300 GB/s": 300e9}


def row(
    section: str,
    name: str,
    value: float,
    unit: str,
    basis: str,
    how: str = "",
    high: float | None = None,
) -> Row:
    return {
        "section": section, "name": name, "value": value, "high": high, "unit": unit, "basis": basis,
        "how": how,
    }  # fmt: skip


def spread(timing: Timing, unit: str = "s") -> str:
    """What a median leaves out."""
    low, high = min(timing.values), max(timing.values)
    return f"median of {len(timing.values)}, {low:.3g} to {high:.3g} {unit}"


# ---------- measured


def audio_rows(found: AudioTimes) -> list[Row]:
    section = "Audio, per hour (on the CPU, one thread)"
    return [
        row(section, "decode FLAC, 16 kHz mono", found.flac.median, "s", "measured", spread(found.flac)),
        row(section, "decode MP3, 44.1 kHz stereo", found.mp3.median, "s", "measured", spread(found.mp3)),
        row(section, "add noise or music to all of it (AudioSAE: to 7.5 %)", found.mix.median, "s",
            "measured", spread(found.mix)),
        row(section, "windows of 15 s FLAC clips: decode, augment, pack", found.windows.median, "s",
            "measured", f"{spread(found.windows)}; {found.filled:.0%} of their frames are audio, the rest "
            "is padding of windows with one clip alone"),
    ]  # fmt: skip


def encoding_row(name: str, timing: Timing, flop: float) -> Row:
    rate = flop * 120 / timing.median
    return row(
        "Encoding, per hour of full windows", name, timing.median, "s", "measured",
        f"{spread(timing)}; {rate / 1e9:,.0f} GFLOP/s",
    )  # fmt: skip


def training_rows(shape: Shape, batches: Sequence[int], timings: Sequence[Timing]) -> list[Row]:
    rows = []
    for batch, timing in zip(batches, timings, strict=True):
        per_million = timing.times(1e6 / batch)
        rows.append(
            row(
                "Training, per SAE and million frames",
                f"{shape}, batch {batch}",
                per_million.median,
                "s",
                "measured",
                f"{1e6 / per_million.median:,.0f} SAE-tokens/s; {spread(per_million)}",
            )  # fmt: skip
        )
    return rows


def run_rows(name: str, shape: Shape, found: RunFigures) -> list[Row]:
    section = f"A small run: {name}"
    buffers, saes = found.planned["buffers"], found.planned["saes"]
    peak = found.device_peak or found.peak
    where = "CUDA's allocator" if found.device_peak else "resident memory"
    planned = saes if found.device_peak else saes + buffers
    rows = [
        row(section, "two buffers", buffers, "B", "derived", "TrainingRun.memory()"),
        row(section, f"{found.saes} SAEs, 16 bytes a parameter", saes, "B", "derived",
            "TrainingRun.memory()"),
        row(section, f"peak of {where} above that before the run", peak, "B", "measured",
            f"{(peak - planned) / 1e6:+,.0f} MB to the formula: what a step and a forward pass hold for a "
            "moment"),
        row(section, "peak of resident memory with the checkpoint being written", found.peak_saving, "B",
            "measured", f"+{(found.peak_saving - found.peak) / 1e6:,.0f} MB to the line above where that is "
            "resident memory"),
        row(section, "checkpoint", found.checkpoint, "B", "measured",
            f"formula {found.saes * checkpoint_bytes(shape.d_model, shape.n_latents) / 1e6:,.1f} MB: "
            "12 bytes a parameter; for a moment there are two"),
        row(section, "cached unit", found.unit, "B", "measured",
            f"formula {found.unit_planned / 1e6:,.1f} MB: frames x (layers x d_model x 2 + 1)"),
    ]  # fmt: skip
    return rows


def sum_rows(name: str, found: RunFigures, layers: int, speed: Speed) -> list[Row]:
    """Whether the parts add up to what a whole run takes."""
    hours = found.frames / 180_000
    expected = hours / speed.filled * (speed.audio + speed.encode) + speed.train * found.saes * (
        found.frames / 2500
    )
    return [
        row(f"A small run: {name}", "time", found.seconds, "s", "measured",
            f"{expected:,.1f} s from the parts above: {hours:.2f} h of audio, {layers} layers"),
    ]  # fmt: skip


# ---------- derived


def job_rows(where: str, speed: Speed, device: str, job: Job = PAPER) -> list[Row]:
    """The paper's run on one device and on PROCESSES of them."""
    section = f"The paper's run on {where}"
    one, many = ("GPU", "GPUs") if device.startswith("cuda") else ("machine", "machines")
    encoding, training = seconds_alone(job, speed)
    parts = "audio and encoding" if speed.audio else "encoding"
    rows = [
        row(section, f"1 {one}: {parts}, one pass for all layers", encoding, "s", "derived",
            f"{job.hours:,.0f} h / {speed.filled:.2f} x {speed.audio + speed.encode:,.3g} s"),
        row(section, f"1 {one}: {job.layers} SAEs", training, "s", "derived",
            f"{job.steps:,} steps x {job.layers} x {speed.train:.3g} s"),
        row(section, f"1 {one}: both", encoding + training, "s", "derived", "their sum"),
    ]  # fmt: skip
    for split in ("gradients", "saes"):
        encoding, training = seconds_shared(job, speed, PROCESSES, split)
        how = (
            f"encoding / {PROCESSES} + steps x {job.layers} x {speed.part:.3g} s, measured on 1/{PROCESSES} "
            "of the batch"
            if split == "gradients"
            else f"encoding / {PROCESSES} + steps x {largest_share(job.layers, PROCESSES)} SAEs of the "
            "busiest process"
        )
        rows.append(row(section, f"{PROCESSES} {many}, --split {split}, without traffic",
                        encoding + training, "s", "derived", how))  # fmt: skip
    return rows


def traffic_rows(job: Job = PAPER) -> list[Row]:
    section = f"Traffic of {PROCESSES} processes, one SAE for each of {job.layers} layers"
    payload = gradients_payload(job, PROCESSES)
    gradients = gradients_traffic(job, PROCESSES)
    total, busiest = saes_traffic(job, PROCESSES)
    rows = [
        row(section, "--split gradients: each process sends per step", gradients, "B", "derived",
            f"ring: 2 (p - 1) / p x {payload['gradients'] / 1e6:,.0f} MB of float32 gradients, and "
            "BatchTopK's candidates"),
        row(section, "--split saes: all processes together per step", total, "B", "derived",
            f"(p - 1) / p x {job.layers} layers x batch x d_model x 2"),
        row(section, "--split saes: the busiest process receives per step", busiest, "B", "derived",
            f"it owns {largest_share(job.layers, PROCESSES)} of the {job.layers} SAEs"),
    ]  # fmt: skip
    for name, rate in LINKS.items():
        for split, amount in (("gradients", gradients), ("saes", busiest)):
            rows.append(row(section, f"--split {split}: whole run at {name}", job.steps * amount / rate, "s",
                            "derived", "steps x bytes / rate, one link a process"))  # fmt: skip
    return rows


def disk_rows(job: Job = PAPER) -> list[Row]:
    section = "Disk and memory for the paper's run"
    n = job.layers
    return [
        row(section, "cache of all frames", cache_bytes(job.hours, n, job.d_model), "B", "derived",
            f"{job.hours:,.0f} h x 180,000 frames/h x {n} layers x {job.d_model} x 2 bytes"),
        row(section, "cache of one layer", cache_bytes(job.hours, 1, job.d_model), "B", "derived",
            f"1/{n} of it"),
        row(section, "two buffers of 100 batches", 2 * 100 * job.batch * n * job.d_model * 2, "B", "derived",
            f"2 x 100 x {job.batch} x {n} x {job.d_model} x 2 bytes"),
        row(section, f"{n} SAEs in training", n * training_bytes(job.d_model, job.n_latents), "B", "derived",
            "16 bytes x (2 d n + n + d)"),
        row(section, "pre-activations of a batch, float32", 4 * job.batch * job.n_latents, "B", "derived",
            "batch x n x 4, one SAE at a time; autograd on a GPU holds several such"),
        row(section, "checkpoint", n * checkpoint_bytes(job.d_model, job.n_latents), "B", "derived",
            "12 bytes a parameter; for a moment there are two"),
    ]  # fmt: skip


def estimate_rows(job: Job = PAPER) -> list[Row]:
    encoding, training = job_flop(job)
    low, high = UTILISATION
    section = "GPUs, estimated from operations (not measured)"
    rows = [
        row(section, "encoding", encoding, "FLOP", "derived",
            f"{job.hours * 120:,.0f} windows x {encoder_flop(job.d_model, job.layers) / 1e9:,.0f} GFLOP"),
        row(section, f"{job.layers} SAEs, dense steps", training, "FLOP", "derived",
            f"{job.frames / 1e6:,.0f} M frames x {job.layers} x "
            f"{training_flop(job.d_model, job.n_latents) / 1e6:.1f} MFLOP"),
    ]  # fmt: skip
    for gpu in GPUS:
        for count in (1, PROCESSES):
            best, worst = (estimated_seconds(job, gpu.flops, used, count) for used in (high, low))
            rows.append(row(
                section, f"{count} x {gpu.name}", best, "s", "estimated",
                f"{low:.0%} to {high:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s"
                + (f"; --split saes, {largest_share(job.layers, count)} SAEs on the busiest GPU, without "
                   "traffic" if count > 1 else ""),
                high=worst,
            ))  # fmt: skip
    rows.append(row(
        section, "for comparison: the SAEs alone at dictionary_learning's rate on an RTX 3090",
        job.frames * job.layers / PUBLISHED_SAE_TOKENS, "s", "published",
        f"{PUBLISHED_SAE_TOKENS / 1000:.0f} k SAE-tokens/s (24 SAEs x 50 M tokens in about 1 h, SAEs of "
        "another size)",
    ))  # fmt: skip
    return rows


# ---------- as text


def duration(seconds: float) -> str:
    """For people: 0.31 s, 4.2 min, 5.0 h, 12.3 days."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


def value_text(found: Row) -> str:
    from calibration.frame_files import size_text

    def one(value: float) -> str:
        if found["unit"] == "s":
            return duration(value)
        if found["unit"] == "B":
            return size_text(value)
        return f"{value:.3g} {found['unit']}"

    return one(found["value"]) if found["high"] is None else f"{one(found['value'])} to {one(found['high'])}"


def tables(rows: Sequence[Row]) -> str:
    """A Markdown table for each section, in the order in which sections first appear."""
    sections: dict[str, list[Row]] = {}
    for found in rows:
        sections.setdefault(found["section"], []).append(found)
    parts = []
    for section, members in sections.items():
        lines = [f"### {section}", "", "| what | figure | basis | how |", "|---|---|---|---|"]
        for found in members:
            lines.append(f"| {found['name']} | {value_text(found)} | {found['basis']} | {found['how']} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


BEGIN, END = "<!-- begin: benchmarks.scaling -->", "<!-- end: benchmarks.scaling -->"


def replaced(text: str, block: str) -> str:
    """`text` with what stands between the marks BEGIN and END replaced.

    Raises ValueError: not exactly one such pair.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one {BEGIN} and one {END} behind it")
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:before]}\n{block.strip()}\n{text[after:]}"

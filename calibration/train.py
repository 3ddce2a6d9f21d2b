"""Trains SAEs on every encoder layer, a whole grid of them side by side, from one forward pass of the audio.

    python -m calibration.train --audio recordings/ --model mini.en --out out/saes
    python -m calibration.train --mixture mini.en --corpus out/corpus --data recordings/ --out out/saes
    python -m calibration.train --mixture audiosae --data /datasets --model openai/whisper-small \\
        --k 25,50,75,100,200 --expansion 8,32 --out out/sweep
    torchrun --nproc-per-node=4 -m calibration.train ...        # several processes or machines

Settings come from the flags, else from the mixture file's [training] table, else from `TrainConfig`. A killed
run continues with the same command and ends with the same weights. At the end thresholds are set and every
SAE measured on held-out audio: layer_XX.safetensors and report.json, for a grid also a table and figures.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from calibration.collectives import ALONE, Collective, connected
from calibration.command import run
from calibration.engine import SPLITS, TrainingRun
from calibration.frame_cache import record_skipped, skipped_by
from calibration.frame_files import size_text, unit_bytes
from calibration.frame_source import SourceSpec, add_source_flags, build_mixture, source_of
from calibration.frames import FrameSource, StreamingFrames
from calibration.recipe import GRID, SAESpec, TrainConfig
from calibration.sae_training import SAETrainer
from calibration.write_through import WriteThroughCache
from whisper_steer.errors import UsageError
from whisper_steer.sae import SparseAutoencoder

if TYPE_CHECKING:
    from calibration.mixture import Mixture


@dataclass(frozen=True)
class TrainedSAE:
    """A finished SAE as `calibration.export` takes it; name: its folder, "" in a run of one variant."""

    name: str
    spec: SAESpec
    trainer: SAETrainer
    recipe: Mapping[str, Any]

    @property
    def layer(self) -> int:
        return self.spec.layer

    @property
    def k(self) -> int | None:
        return self.spec.k

    @property
    def activation(self) -> str:
        return self.spec.activation

    def export(self) -> SparseAutoencoder:
        return self.trainer.export()


def trained_saes(run: TrainingRun) -> list[TrainedSAE]:
    """The SAEs of a finished run, in the order of its grid."""
    single = len({spec.variant for spec in run.specs}) == 1
    return [
        TrainedSAE("" if single else spec.variant, spec, run.trainers[spec], run.config.recipe_of(spec))
        for spec in run.specs
    ]


# ---------- flags


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers such as 25,50") from None


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m calibration.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_flags(made, unit_frames=False)
    default, flag = TrainConfig(), made.add_argument
    grid = made.add_argument_group("grid: every combination is trained, for every layer")
    grid.add_argument("--activation", type=lambda text: text.split(","), metavar="NAME,...",
                      help="batchtopk, matryoshka, topk, jumprelu, relu")  # fmt: skip
    for name, what in (
        ("k", "active latents per frame"),
        ("expansion", "latents per dimension of the model"),
        ("seed", "of the SAEs' start"),
    ):
        grid.add_argument(f"--{name}", type=_numbers, metavar="N,...", help=f"{what} (default: "
                          f"{getattr(default, name)[0]})")  # fmt: skip
    for name, kind, what in (
        ("batch", int, "frames per step, over all processes"),
        ("steps", int, "optimiser steps"),
        ("buffer_batches", int, "batches shuffled together in memory"),
        ("lr", float, "Adam's learning rate"),
        ("warm_up", int, "steps over which the rate rises"),
        ("decay", float, "share of the steps over which it falls to 0"),
        ("sparsity", float, "weight of the sparsity loss of jumprelu and relu"),
        ("auxiliary", float, "weight of the loss that revives dead latents, e.g. 0.03"),
        ("dead_after", int, "frames without activation after which a latent is dead"),
        ("shards", int, "streams of audio; processes share them out (default: one for every process)"),
    ):
        text = what if "default" in what else f"{what} (default: {getattr(default, name)})"
        flag(f"--{name.replace('_', '-')}", type=kind, help=text)
    flag("--no-centre", action="store_true", help="do not subtract the mean activation")
    flag(
        "--split", choices=SPLITS,
        help="what several processes share (default: saes where there are enough for all, else gradients)",
    )  # fmt: skip
    flag("--cache", type=Path, metavar="DIR", help="keep frames on disk, for repeated runs on the same audio")
    flag("--checkpoint-minutes", type=float, default=2.0, help="least time between checkpoints (default: 2)")
    flag("--no-background", action="store_true", help="encode between rounds, not beside the training")
    flag("--float32", action="store_true", help="write float32 files (default: float16)")
    flag("--wer-clips", type=int, default=60, help="clips heard with each SAE spliced in; 0: none")
    flag("--out", type=Path, default=Path("out/saes"), help="folder of the results (default: out/saes)")
    return made


def config_of(args: argparse.Namespace, mixture: Mixture, processes: int) -> TrainConfig:
    """Flags over the mixture's [training] table over the defaults."""
    table = dict(mixture.training)
    for name in (*GRID, "batch", "steps", "buffer_batches", "lr", "warm_up", "decay", "sparsity",
                 "auxiliary", "dead_after", "shards"):  # fmt: skip
        value = getattr(args, name)
        if value is not None:
            table[name] = value
    if args.no_centre:
        table["centre"] = False
    table.setdefault("shards", processes)
    table["data_seed"] = args.data_seed
    return TrainConfig.of(table, f"settings of {mixture.name}")


# ---------- the command


def available_memory() -> int | None:
    """Bytes that new work may take without swapping; None where the system does not say (not Linux)."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def announce(training: TrainingRun, mixture: Mixture, cache: Path | None) -> None:
    """What is about to happen, and what it takes; raises UsageError if it does not fit into memory."""
    config, source = training.config, training.source
    memory, free = training.memory(), available_memory()
    needed = memory["buffers"] + (memory["saes"] if training.device.type == "cpu" else 0)
    rounds = -(-config.steps // training.steps_per_round)
    unit = unit_bytes(len(source.layers), source.unit_frames, source.d_model, source.dtype)
    whole = rounds * config.shards * unit
    for line in mixture.describe()[0]:
        print(line, file=sys.stderr)
    print(
        f"{len(training.specs)} SAEs: {len(training.specs) // len(source.layers)} of each of "
        f"{len(source.layers)} layers; {config.steps} steps of {config.batch} frames in {rounds} rounds\n"
        f"memory: {size_text(memory['buffers'])} for the frames in use and the ones being encoded, "
        f"{size_text(memory['saes'])} for the SAEs",
        file=sys.stderr,
    )
    if training.collective.size > 1:
        shared = {"saes": "each trains its part of the SAEs", "gradients": "all train every SAE"}
        print(
            f"{training.collective.size} processes: each encodes its part of the audio, "
            f"{shared[training.split]} (--split {training.split})",
            file=sys.stderr,
        )
    if cache is None:
        text = (
            f"frames: streamed from the audio, which needs no disk (kept, these rounds would take "
            f"{size_text(whole)}; --cache DIR keeps them for further runs on the same audio)"
        )
    else:
        text = f"frames: from {cache} where they are there, else encoded and kept: {size_text(whole)} in all"
    print(text, file=sys.stderr)
    if free is not None and needed > free:
        raise UsageError(
            f"{size_text(needed)} of memory are needed, {size_text(free)} are available: give a smaller "
            "--buffer-batches, fewer layers or SAEs in one run, or --split saes over several machines"
        )


def train(args: argparse.Namespace, collective: Collective) -> None:
    from calibration.adapters import load_encoder
    from calibration.export import export_saes, print_report
    from calibration.pareto import write_sweep

    started = time.monotonic()
    spec = SourceSpec.from_args(args, unit_frames=1)
    mixture = build_mixture(spec)
    held_out = mixture.held_out()
    if not any(len(items) > 1 for items in held_out.values()):
        raise UsageError(
            f"mixture {mixture.name} holds no audio out, so SAEs could not be measured: "
            "raise its held_out, or add recordings"
        )
    config = config_of(args, mixture, collective.size)
    encoder = load_encoder(args.model, args.device, torch.bfloat16 if _on_cuda(args.device) else None)
    frames = source_of(replace(spec, unit_frames=config.unit_frames), encoder, mixture)
    source: FrameSource = frames if args.cache is None else WriteThroughCache(frames, args.cache)
    device = torch.device(encoder.device)
    enough = len(config.specs(source.layers)) >= collective.size > 1
    split = args.split or ("saes" if enough else "gradients")
    settings: dict[str, Any] = {"device": device, "autocast": device.type == "cuda"}
    training = TrainingRun(
        source, config, args.out, collective=collective, split=split, **settings,
        background=not args.no_background, checkpoint_seconds=60 * args.checkpoint_minutes,
    )  # fmt: skip
    if collective.first:
        announce(training, mixture, args.cache)
    done = training.resume()
    if done and collective.first:
        print(f"going on from the checkpoint of step {done}", file=sys.stderr)
    training.train()
    _note_skipped(args.out, frames, collective)
    if not collective.first:
        return
    if split == "saes" and collective.size > 1:
        training = TrainingRun(source, config, args.out, **settings)
        training.resume()
    dtype = torch.float32 if args.float32 else torch.float16
    report = export_saes(
        encoder, trained_saes(training), held_out, args.out, dtype=dtype, wer_clips=args.wer_clips
    )
    print_report(report)
    if len({spec.variant for spec in training.specs}) > 1:
        print(f"operating point {write_sweep(report, args.out).reason}")
    print(f"{len(training.specs)} SAEs in {args.out}, {time.monotonic() - started:.0f} s")


def _on_cuda(device: str | None) -> bool:
    return device.startswith("cuda") if device else torch.cuda.is_available()


def _note_skipped(out: Path, frames: StreamingFrames, collective: Collective) -> None:
    """Processes take turns, as all add to one file."""
    for rank in range(collective.size):
        if rank == collective.rank and (found := skipped_by(frames)):
            count = record_skipped(out, found)
            print(f"{count} audio files could not be read: {out / 'skipped.jsonl'}", file=sys.stderr)
        collective.wait()


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        train(args, ALONE)
        return
    if torch.cuda.is_available() and args.device is None:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    with connected() as collective:
        train(args, collective)


if __name__ == "__main__":
    run(main)

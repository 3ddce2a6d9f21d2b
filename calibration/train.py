"""Trains the SAEs of every encoder layer in one run: one forward pass feeds all of them.

    python -m calibration.train --model mini.en --corpus out/corpus --data ../shared/data --out out/saes

Training goes in rounds: fill a buffer with the frames of freshly drawn windows, shuffle, train every layer
    on it once,
write a checkpoint. A round depends on nothing but the checkpoint before it and the seed, so a run that was
killed continues with the same command and ends with the same weights. Then, on audio of the calibration
split, thresholds are set and the SAEs measured; layer_XX.safetensors and report.json are written.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from calibration.activations import ActivationBuffer, AudioClip, WindowPlan, check_layers, iterate_windows
from calibration.command import run
from calibration.evaluate import evenly
from calibration.sae_quality import calibrate_threshold, collect_frames, quality_record, recognition, spliced
from calibration.sae_training import LayerTrainer
from whisper_steer.errors import FormatError, UsageError
from whisper_steer.fileformat import encoder_sha256, load_tensors, model_metadata, save_tensors
from whisper_steer.sae import SparseAutoencoder

if TYPE_CHECKING:
    from whisper.model import Whisper

CHECKPOINT = "checkpoint.safetensors"
REPORT = "report.json"


@dataclass(frozen=True)
class TrainConfig:
    """How SAEs are trained; everything here is stored with them.

    Attributes:
        expansion: latents per dimension of the model.
        k: active latents per frame (batchtopk, topk: exactly; jumprelu: the target of its sparsity loss).
        frames: at least this many frames (of 20 ms) are seen; rounded up to whole rounds.
        batch: frames per optimiser step.
        lr: Adam's learning rate after warm-up; it falls linearly to 0 over the last `decay` share of the
            steps.
        warm_up: share of the steps over which the rate (and the sparsity weight) rises from 0.
        centre: subtract the layer's mean activation first (folded into the exported weights).
        sparsity: weight of the sparsity loss of jumprelu and relu; nothing for the others.
        packed: share of windows filled with several clips; the others hold one clip.
        buffer_mb: memory for the shuffled frames of all layers.
    """

    activation: str = "batchtopk"
    expansion: int = 8
    k: int = 16
    frames: int = 1_500_000
    batch: int = 2048
    lr: float = 3e-3
    warm_up: float = 0.05
    decay: float = 0.2
    centre: bool = True
    sparsity: float = 1.0
    packed: float = 0.75
    buffer_mb: int = 384
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("expansion", "k", "frames", "batch", "buffer_mb"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: expected at least 1")
        if not self.lr > 0:
            raise UsageError(f"lr is {self.lr}: expected a number above 0")
        if not 0 <= self.packed <= 1:
            raise UsageError(f"packed is {self.packed}: expected a share between 0 and 1")


def learning_factor(step: int, steps: int, warm_up: float, decay: float) -> float:
    """Share of the full learning rate at `step` (0-based) of `steps`: linear up, constant, linear to 0."""
    rising = (step + 1) / max(1.0, warm_up * steps)
    falling = (steps - step) / max(1.0, decay * steps)
    return min(1.0, rising, falling)


def train_saes(
    model: Whisper,
    clips: Sequence[AudioClip],
    config: TrainConfig,
    out: Path,
    *,
    layers: Sequence[int] | None = None,
    progress: bool = True,
    after_round: Callable[[int], None] | None = None,
) -> list[LayerTrainer]:
    """Train the SAEs of `layers` (None: all); returns the trainers, finished.

    A checkpoint is written to `out` after every round; a run with the same settings continues from it.

    Raises:
        UsageError: the checkpoint in `out` was made with other settings or another model.
    """
    chosen = check_layers(model, layers)
    d_model = model.dims.n_audio_state
    buffer = ActivationBuffer(len(chosen), d_model, batch=config.batch, max_bytes=config.buffer_mb * 2**20)
    rounds = -(-config.frames // buffer.capacity)
    steps = rounds * buffer.batches_per_round
    trainers = [
        LayerTrainer(
            layer,
            d_model,
            config.expansion * d_model,
            activation=config.activation,
            k=None if config.activation == "relu" else config.k,
            lr=config.lr,
            sparsity=config.sparsity,
            seed=config.seed,
        )
        for layer in chosen
    ]
    settings = _settings(model, clips, config, chosen)
    done = _restore(out / CHECKPOINT, trainers, settings)
    plan = WindowPlan(clips, seed=config.seed, packed_share=config.packed)
    if progress:
        print(
            f"{len(chosen)} layers x {config.expansion * d_model} latents; {rounds} rounds of "
            f"{buffer.capacity} frames = {steps} steps of {config.batch}; "
            f"buffer {buffer.nbytes / 2**20:.0f} MiB; {done} rounds done before"
        )
    with tqdm(total=steps, initial=done * buffer.batches_per_round, unit="step", disable=not progress) as bar:
        for round_index in range(done, rounds):
            bar.set_description(f"round {round_index + 1}/{rounds}: encoding")
            buffer.fill(iterate_windows(model, plan.windows(round_index), layers=chosen))
            if round_index == 0:
                for trainer, frames in zip(trainers, buffer.data, strict=True):
                    trainer.set_normalisation(frames, centre=config.centre)
            bar.set_description(f"round {round_index + 1}/{rounds}: training")
            step = round_index * buffer.batches_per_round
            for batch in buffer.batches([config.seed, round_index]):
                errors = _train_step(trainers, batch, step, steps, config)
                step += 1
                bar.update()
            bar.set_postfix_str("error " + " ".join(f"{error:.3f}" for error in errors))
            _checkpoint(out / CHECKPOINT, trainers, settings, round_index + 1)
            if after_round is not None:
                after_round(round_index)
    return trainers


def _train_step(
    trainers: Sequence[LayerTrainer], batch: Tensor, step: int, steps: int, config: TrainConfig
) -> list[float]:
    factor = learning_factor(step, steps, config.warm_up, config.decay)
    ramp = min(1.0, (step + 1) / max(1.0, config.warm_up * steps))
    return [
        trainer.step(x, lr_factor=factor, sparsity_factor=ramp)
        for trainer, x in zip(trainers, batch, strict=True)
    ]


def _settings(
    model: Whisper, clips: Sequence[AudioClip], config: TrainConfig, layers: Sequence[int]
) -> dict[str, Any]:
    return {
        "config": asdict(config),
        "layers": list(layers),
        "encoder_sha256": encoder_sha256(model),
        "clips": len(clips),
    }


def _checkpoint(path: Path, trainers: Sequence[LayerTrainer], settings: dict[str, Any], rounds: int) -> None:
    tensors: dict[str, Tensor] = {}
    for trainer in trainers:
        tensors |= trainer.state(f"{trainer.layer}.")
    save_tensors(path, tensors, {"kind": "sae-checkpoint", "rounds": rounds, "settings": settings})


def _restore(path: Path, trainers: Sequence[LayerTrainer], settings: dict[str, Any]) -> int:
    """Load the checkpoint into the trainers if there is one; returns the rounds that it has behind it."""
    if not path.exists():
        return 0
    tensors, metadata = load_tensors(path, "sae-checkpoint")
    found = metadata.get("settings", {})
    if found != settings:
        differing = [key for key in settings if found.get(key) != settings[key]]
        raise UsageError(
            f"{path} belongs to a run with other settings ({', '.join(differing)}): "
            "delete it or give another --out"
        )
    for trainer in trainers:
        try:
            trainer.load_state(tensors, f"{trainer.layer}.")
        except (KeyError, RuntimeError) as error:
            raise FormatError(
                f"{path} is damaged ({str(error).splitlines()[0]}): delete it and train again"
            ) from error
    return int(metadata["rounds"])


def export_saes(
    model: Whisper,
    trainers: Sequence[LayerTrainer],
    calibration: Mapping[str, Sequence[Any]],
    config: TrainConfig,
    out: Path,
    *,
    dtype: torch.dtype = torch.float16,
    max_frames: int = 40_000,
    wer_clips: int = 60,
    progress: bool = True,
) -> dict[str, Any]:
    """Set thresholds on held-out audio, measure, write layer_XX.safetensors and report.json; returns the
    report.

    calibration: sets of clips by name, as `calibration.corpus.eval_sets` gives them. Every other clip sets
        the
    thresholds, the others are measured on. Weights are rounded to `dtype` before either.
    """
    clips = [clip for chosen in calibration.values() for clip in chosen]
    speech = [clip for clip in clips if clip.kind != "nonspeech"]
    nonspeech = [clip for clip in clips if clip.kind == "nonspeech"]
    layers = [trainer.layer for trainer in trainers]
    frames = {
        (name, part): collect_frames(model, evenly(chosen[part::2], 120), max_frames)[layers]
        for name, chosen in (("speech", speech), ("nonspeech", nonspeech))
        for part in (0, 1)
    }
    heard = evenly([clip for clip in speech if clip.text], wer_clips)
    audios, texts = [clip.load() for clip in heard], [clip.text for clip in heard]
    plain = recognition(model, audios, texts) if heard else None
    report: dict[str, Any] = {"config": asdict(config), **model_metadata(model), "layers": []}
    for position, trainer in enumerate(tqdm(trainers, desc="measuring", unit="layer", disable=not progress)):
        sae = _rounded(trainer.export(), dtype)
        if sae.activation == "batchtopk":
            # equal shares of both domains, whatever the corpus has of each
            both = [frames["speech", 0][position], frames["nonspeech", 0][position]]
            few = min(len(part) for part in both) or max(len(part) for part in both)
            calibrate_threshold(sae, torch.cat([part[:few] for part in both]), config.k)
        with spliced(model, sae):
            reconstructed = recognition(model, audios, texts) if heard else None
        record = quality_record(
            sae, frames["speech", 1][position], frames["nonspeech", 1][position], plain, reconstructed
        )
        report["layers"].append(record)
        sae.metadata = {
            **model_metadata(model),
            "calibrated_on": {name: len(chosen) for name, chosen in calibration.items()},
            "rates": record,
            "recipe": asdict(config),
        }
        sae.save(out / f"layer_{trainer.layer:02d}.safetensors", dtype=dtype)
    _write_json(out / REPORT, report)
    return report


def _rounded(sae: SparseAutoencoder, dtype: torch.dtype) -> SparseAutoencoder:
    with torch.no_grad():
        for weight in (sae.W_enc, sae.W_dec):
            weight.copy_(weight.to(dtype).float())
    return sae


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def print_report(report: dict[str, Any]) -> None:
    """One line per layer."""
    print(
        f"{'layer':>5} {'alive':>6} | {'speech: L0':>10} {'FVU':>6} {'alive':>6} | "
        f"{'other: L0':>9} {'FVU':>6} {'alive':>6} | WER"
    )
    for row in report["layers"]:
        cells = [
            f"{row[domain]['l0']:>{width}.1f} {row[domain]['fvu']:>6.3f} {row[domain]['alive']:>6.2f}"
            for domain, width in (("speech", 10), ("nonspeech", 9))
        ]
        wer = ""
        if "wer_spliced" in row:
            wer = f"{row['wer_plain']['value']:.3f} -> {row['wer_spliced']['value']:.3f}"
        print(f"{row['layer']:>5} {row['alive']:>6.2f} | {' | '.join(cells)} | {wer}")


def parse_layers(text: str) -> list[int] | None:
    """ "all" -> None, "0,3" -> [0, 3]."""
    if text == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"layers is {text!r}: expected 'all' or 0-based numbers such as 0,3") from error


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m calibration.train", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--model", default="mini.en", help="name or path (default: mini.en)")
    parser.add_argument(
        "--corpus", type=Path, default=Path("out/corpus"), help="folder of calibration.synthesis"
    )
    parser.add_argument(
        "--data", dest="data_dir", type=Path, default=None, help="folder with real recordings"
    )
    parser.add_argument("--out", type=Path, default=Path("out/saes"))
    parser.add_argument("--layers", default="all", help="'all' or 0-based numbers: 0,3")
    parser.add_argument("--clips", type=int, default=1500, help="synthetic training clips of each kind")
    parser.add_argument(
        "--activation", default="batchtopk", choices=("batchtopk", "topk", "jumprelu", "relu")
    )
    for name, kind in (("expansion", int), ("k", int), ("frames", int), ("batch", int), ("lr", float)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(TrainConfig, name))
    for name, kind in (("sparsity", float), ("packed", float), ("buffer-mb", int), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(TrainConfig, name.replace("-", "_")))
    parser.add_argument("--no-centre", action="store_true", help="do not subtract the mean activation")
    parser.add_argument("--float32", action="store_true", help="write float32 files (default: float16)")
    parser.add_argument("--quick", action="store_true", help="the small calibration sets")
    args = parser.parse_args(argv)

    from calibration.corpus import eval_sets
    from calibration.training_clips import training_clips
    from whisper_steer.zoo import load_model

    started = time.monotonic()
    model = load_model(args.model)
    config = TrainConfig(
        args.activation, args.expansion, args.k, args.frames, args.batch, args.lr, centre=not args.no_centre,
        sparsity=args.sparsity, packed=args.packed, buffer_mb=args.buffer_mb, seed=args.seed,
    )  # fmt: skip
    clips = training_clips(
        args.corpus, args.data_dir, speech=args.clips, nonspeech=args.clips, seed=args.seed
    )
    trainers = train_saes(model, clips, config, args.out, layers=parse_layers(args.layers))
    sets = eval_sets("calibration", data_dir=args.data_dir, quick=args.quick)
    dtype = torch.float32 if args.float32 else torch.float16
    report = export_saes(model, trainers, sets, config, args.out, dtype=dtype)
    print_report(report)
    print(f"{len(trainers)} SAEs in {args.out}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run(main)

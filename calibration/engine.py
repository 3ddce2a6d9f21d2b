"""The training engine: a grid of SAEs on every layer, side by side, from one forward pass of the audio.

Training goes in rounds: while one buffer of shuffled frames is trained on, the next is filled in the
background. A round's frames depend on the seed and its number alone, so a checkpoint needs none of the
buffer's content: a run that was killed continues and ends with the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibration.checkpoints import Checkpoints
from calibration.collectives import ALONE, Collective
from calibration.frames import Ahead, Frames, FrameSource
from calibration.mixture import DOMAINS
from calibration.recipe import SAESpec, TrainConfig
from calibration.sae_training import Moments, SAETrainer, Step
from calibration.training_choice import measured_choice
from whisper_steer.errors import FormatError, UsageError

logger = logging.getLogger("whisper_steer")

CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
SPLITS = ("gradients", "saes")


class TrainingRun:
    """A grid of SAEs in training.

    With several processes every one encodes its own shards of the audio. split "gradients": all hold every
    SAE and share the gradients of their part of the batch. split "saes": each holds some of the SAEs and
    gets the others' frames of the batch; less traffic and less memory where there are many SAEs. Either way
    the result is that of one process on the same batches.
    """

    def __init__(
        self,
        source: FrameSource,
        config: TrainConfig,
        out: Path,
        *,
        collective: Collective = ALONE,
        split: str = "gradients",
        device: str | torch.device = "cpu",
        autocast: bool = False,
        background: bool = True,
        checkpoint_seconds: float = 0,
    ):
        """source: units of config.unit_frames frames. out: folder of checkpoints and log. autocast: products
        in bfloat16 where there are no sparse kernels (CUDA). background: fill the next buffer meanwhile.
            checkpoint_seconds: least time between checkpoints, which are written between rounds.

        Raises UsageError: sizes that do not fit each other.
        """
        if split not in SPLITS:
            raise UsageError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
        if config.shards % collective.size:
            raise UsageError(
                f"{config.shards} shards cannot be shared by {collective.size} processes: "
                f"give a multiple of {collective.size}"
            )
        if source.unit_frames != config.unit_frames:
            raise UsageError(
                f"the source gives {source.unit_frames} frames at a time, the settings need "
                f"{config.unit_frames}: make the cache with the same batch, buffer and shards, "
                "or train from the audio"
            )
        self.source, self.config, self.out = source, config, out
        self.collective, self.split, self.background = collective, split, background
        self.checkpoint_seconds = checkpoint_seconds
        self.device = torch.device(device)
        self.specs = config.specs(source.layers)
        self.owners = {
            spec: position * collective.size // len(self.specs) for position, spec in enumerate(self.specs)
        }
        sharing = collective if split == "gradients" else ALONE
        mine = [spec for spec in self.specs if split == "gradients" or self.owners[spec] == collective.rank]
        self.trainers = {spec: self._trainer(spec, sharing, autocast) for spec in mine}
        self.checkpoints = Checkpoints(out / CHECKPOINTS, collective)
        self.step = 0

    def _trainer(self, spec: SAESpec, sharing: Collective, autocast: bool) -> SAETrainer:
        config = self.config
        sparse = None  # on a CPU the trainer knows
        if self.device.type == "cuda":
            latents, device = spec.expansion * self.source.d_model, str(self.device)
            sparse = measured_choice(
                spec.activation, self.source.d_model, latents, spec.k, config.batch, device, autocast
            ).sparse
            if sharing.size > 1:  # clocks differ: all processes must do the same
                sparse = sharing.count(int(sparse)) * 2 > sharing.size
        return SAETrainer(
            spec.layer, self.source.d_model, spec.expansion * self.source.d_model,
            activation=spec.activation, k=spec.k, lr=config.lr, sparsity=config.sparsity,
            auxiliary=config.auxiliary, dead_after=config.dead_after, seed=spec.seed, sparse=sparse,
            device=self.device, autocast=autocast, collective=sharing,
        )  # fmt: skip

    @property
    def shards(self) -> list[int]:
        """This process's shards."""
        count = self.config.shards // self.collective.size
        return list(range(self.collective.rank * count, (self.collective.rank + 1) * count))

    @property
    def steps_per_round(self) -> int:
        return min(self.config.buffer_batches, self.config.steps)

    def memory(self) -> dict[str, int]:
        """Bytes that this process will hold: two buffers (one in use, one being filled), and the SAEs with
        gradients and Adam's two moments."""
        per_value = torch.empty((), dtype=self.source.dtype).element_size()
        frames = self.config.unit_frames * len(self.shards) * len(self.source.layers)
        parameters = sum(p.numel() for t in self.trainers.values() for p in t.sae.parameters())
        buffers = (1 + self.background) * frames * self.source.d_model * per_value
        return {"buffers": buffers, "saes": 4 * 4 * parameters}

    def settings(self) -> dict[str, Any]:
        """What decides the result, as JSON-able values."""
        found = {"config": self.config.record(), "source": self.source.identity()}
        return json.loads(json.dumps(found))

    # ---------- the loop

    def resume(self) -> int:
        """Continue from the newest checkpoint, if there is one; returns its step.

        Raises UsageError: it belongs to other settings. FormatError: it is damaged.
        """
        latest = self.checkpoints.latest()
        if latest is None:
            return 0
        for spec, trainer in self.trainers.items():
            tensors, metadata = self.checkpoints.load(latest, spec.name)
            self._check_settings(metadata.get("settings", {}))
            try:
                trainer.load_state(tensors)
            except (KeyError, RuntimeError) as error:
                raise FormatError(
                    f"the checkpoint of step {latest} in {self.out} is damaged "
                    f"({str(error).splitlines()[0]}): delete it and train again"
                ) from error
        self.step = latest
        return latest

    def _check_settings(self, found: dict[str, Any]) -> None:
        differing = _differences(found, self.settings())
        if differing:
            raise UsageError(
                f"{self.out} holds a run with other settings ({'; '.join(differing[:4])}): "
                "delete it or give another --out"
            )

    def train(
        self, *, progress: bool = True, after_step: Callable[[int], None] | None = None
    ) -> dict[SAESpec, SAETrainer]:
        """Train to the end; returns this process's trainers, finished. Checkpoints are written
        between rounds and at the end.

        Raises AudioError: too many unreadable files. FormatError: a checkpoint cannot be written.
        """
        if self.step >= self.config.steps:
            return self.trainers
        rounds = -(-self.config.steps // self.steps_per_round)
        first = self.step // self.steps_per_round
        ahead = Ahead(
            lambda round_index: [self.source.load(round_index, shard) for shard in self.shards],
            range(first, rounds),
            background=self.background,
        )
        self._trim_log()
        show = progress and self.collective.first
        saved = time.monotonic()
        with tqdm(total=self.config.steps, initial=self.step, unit="step", disable=not show) as bar:
            for round_index, units in enumerate(ahead, start=first):
                bar.set_description(f"round {round_index + 1}/{rounds}")
                if round_index == 0 and self.step == 0:
                    self._set_normalisation(units)
                record = self._train_round(round_index, units, bar, after_step)
                bar.set_postfix_str(f"unexplained {record['fvu']:.3f}")
                self._write_log(record)
                if self._checkpoint_is_due(saved):
                    self._checkpoint()
                    saved = time.monotonic()
        return self.trainers

    def _checkpoint_is_due(self, last: float) -> bool:
        due = self.step >= self.config.steps or time.monotonic() - last >= self.checkpoint_seconds
        # clocks differ: the first process decides
        return self.collective.count(int(due and self.collective.first)) > 0

    def _checkpoint(self) -> None:
        self.checkpoints.save(
            self.step,
            {spec.name: trainer.state() for spec, trainer in self._saved().items()},
            {"settings": self.settings()},
        )

    def _saved(self) -> dict[SAESpec, SAETrainer]:
        """The SAEs whose state this process writes."""
        return {spec: t for spec, t in self.trainers.items() if self.owners[spec] == self.collective.rank}

    def _set_normalisation(self, units: Sequence[Frames]) -> None:
        for position, layer in enumerate(self.source.layers):
            parts = [Moments.of(unit.data[position]) for unit in units]
            moments = reduce(add, parts).over(self.collective)
            for spec, trainer in self.trainers.items():
                if spec.layer == layer:
                    trainer.set_moments(moments, centre=self.config.centre)

    def _train_round(
        self, round_index: int, units: Sequence[Frames], bar: Any, after_step: Callable[[int], None] | None
    ) -> dict[str, Any]:
        size = self.config.batch // self.config.shards
        orders = [self._order(round_index, shard) for shard in self.shards]
        begin = round_index * self.steps_per_round
        watch = _Watch(self.trainers)
        for step in range(self.step, min(begin + self.steps_per_round, self.config.steps)):
            part = slice((step - begin) * size, (step - begin + 1) * size)
            chosen = [(unit, order[part]) for unit, order in zip(units, orders, strict=True)]
            domains = torch.cat([unit.domains[index] for unit, index in chosen])
            watch.add(self._train_step(step, chosen), self._of_batch(domains))
            self.step = step + 1
            bar.update()
            if after_step is not None:
                after_step(self.step)
        return {"step": self.step, **watch.record()}

    def _order(self, round_index: int, shard: int) -> Tensor:
        """The order in which a shard's frames of a round are used: each once."""
        rng = np.random.default_rng([self.config.data_seed, round_index, shard])
        return torch.from_numpy(rng.permutation(self.config.unit_frames))

    def _train_step(self, step: int, chosen: Sequence[tuple[Frames, Tensor]]) -> dict[SAESpec, Step]:
        batches = {}
        for position, layer in enumerate(self.source.layers):
            x = torch.cat([unit.data[position, index] for unit, index in chosen])
            for owner in self._receivers(layer):
                gathered = self.collective.gathered(x, owner) if self.split == "saes" else x
                if gathered is not None:
                    batches[layer] = gathered
        taken = {}
        for layer, x in batches.items():
            x = x.to(self.device).float()
            for spec, trainer in self.trainers.items():
                if spec.layer == layer:
                    taken[spec] = trainer.step(
                        x,
                        lr_factor=self.config.learning_factor(step),
                        sparsity_factor=self.config.ramp(step),
                    )
        return taken

    def _receivers(self, layer: int) -> list[int]:
        """The processes that need a layer's whole batch."""
        if self.split == "gradients":
            return [self.collective.rank]
        return sorted({owner for spec, owner in self.owners.items() if spec.layer == layer})

    def _of_batch(self, domains: Tensor) -> Tensor:
        """Domains of the frames that this process's SAEs see."""
        if self.split == "gradients" or self.collective.size == 1:
            return domains
        everyones = [self.collective.gathered(domains, owner) for owner in range(self.collective.size)]
        return next(found for found in everyones if found is not None)

    # ---------- the log

    def _write_log(self, record: dict[str, Any]) -> None:
        if self.collective.first:
            self.out.mkdir(parents=True, exist_ok=True)
            with suppress(OSError), (self.out / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _trim_log(self) -> None:
        """Drop what was logged after the checkpoint that is continued from."""
        path = self.out / LOG
        if not self.collective.first or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a line that a kill cut off
                if json.loads(line)["step"] <= self.step:
                    kept.append(line + "\n")
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)


class _Watch:
    """Means over a round's steps: error and active latents by domain, for every SAE."""

    def __init__(self, trainers: dict[SAESpec, SAETrainer]):
        self.trainers = trainers
        self.frames = torch.zeros(len(DOMAINS), dtype=torch.float64)
        self.sums = {spec: torch.zeros(2, len(DOMAINS), dtype=torch.float64) for spec in trainers}

    def add(self, taken: dict[SAESpec, Step], domains: Tensor) -> None:
        kinds = domains.long()
        self.frames += torch.bincount(kinds, minlength=len(DOMAINS))
        for spec, step in taken.items():
            for row, values in enumerate((step.errors, step.active)):
                self.sums[spec][row].index_add_(0, kinds, values.cpu().double())

    def record(self) -> dict[str, Any]:
        total = max(float(self.frames.sum()), 1.0)
        seen = [index for index, frames in enumerate(self.frames) if frames > 0]
        saes: dict[str, dict[str, Any]] = {}
        for spec, sums in self.sums.items():
            saes[spec.name] = {
                "fvu": float(sums[0].sum()) / total,
                "alive": self.trainers[spec].alive,
                **{
                    DOMAINS[i]: {
                        "error": float(sums[0, i] / self.frames[i]),
                        "l0": float(sums[1, i] / self.frames[i]),
                    }
                    for i in seen
                },
            }
        shares = {DOMAINS[i]: float(self.frames[i]) / total for i in seen}
        mean = sum(entry["fvu"] for entry in saes.values()) / max(len(saes), 1)
        return {"fvu": mean, "domain_shares": shares, "saes": saes}


def _differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """What differs between two JSON values, as "batch: 256, now 512"."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted({*found, *wanted})
            for line in _differences(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if found == wanted else [f"{path}: {_short(found)}, now {_short(wanted)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."

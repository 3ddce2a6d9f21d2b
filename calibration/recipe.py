"""What to train and how: the grid of SAEs of one run, and the schedule they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

from calibration.sae_training import VARIANTS
from whisper_steer.errors import UsageError

# a recipe's entries that a mixture file's [training] table may hold
GRID = ("activation", "k", "expansion", "seed")


@dataclass(frozen=True)
class SAESpec:
    """One SAE of a run: which layer, and its place in the grid. k: None for relu."""

    layer: int
    activation: str
    k: int | None
    expansion: int
    seed: int

    @property
    def variant(self) -> str:
        """Its place in the grid, the same for every layer: batchtopk-k50-x8-seed0."""
        sparsity = "" if self.k is None else f"-k{self.k}"
        return f"{self.activation}{sparsity}-x{self.expansion}-seed{self.seed}"

    @property
    def name(self) -> str:
        return f"{self.variant}/layer_{self.layer:02d}"


@dataclass(frozen=True)
class TrainConfig:
    """How SAEs are trained; everything here is stored with them. Defaults: AudioSAE's (arXiv 2602.05027), but
    for a run of minutes: 1,000 steps at ten times the rate (there: 200,000 steps at 2e-4).

    Attributes:
        activation, k, expansion, seed: the grid; every combination is trained, for every layer, side by side
            from the same activations. k is ignored by relu, the target L0 of jumprelu. expansion: latents per
            dimension of the model. seed: of the weights' start.
        batch: frames per optimiser step, over all processes.
        steps: optimiser steps.
        buffer_batches: batches that are in memory and shuffled together.
        lr: Adam's learning rate after warm-up; it falls linearly to 0 over the last `decay` share of steps.
        warm_up: steps over which the rate (and the sparsity weight) rises from 0.
        centre: subtract the layer's mean activation first (folded into the exported weights).
        sparsity: weight of the sparsity loss of jumprelu and relu; nothing for the others.
        auxiliary: weight of the loss that revives dead latents; 0: none.
        dead_after: frames without activation after which a latent counts as dead.
        data_seed: of the order of the audio and of the frames.
        shards: independent streams of audio, each with its own shuffle; the processes share them out, and any
            number of processes that divides it gives the same result.
    """

    activation: tuple[str, ...] = ("batchtopk",)
    k: tuple[int, ...] = (50,)
    expansion: tuple[int, ...] = (8,)
    seed: tuple[int, ...] = (0,)
    batch: int = 2500
    steps: int = 1000
    buffer_batches: int = 100
    lr: float = 2e-3
    warm_up: int = 100
    decay: float = 0.2
    centre: bool = True
    sparsity: float = 1.0
    auxiliary: float = 0.0
    dead_after: int = 250_000
    data_seed: int = 0
    shards: int = 1

    def __post_init__(self) -> None:
        problems = []
        for name in GRID:
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                problems.append(f"{name} is {list(values)}: expected different values, at least one")
        for name in ("k", "expansion"):
            if any(value < 1 for value in getattr(self, name)):
                problems.append(f"{name} is {list(getattr(self, name))}: expected numbers of at least 1")
        for name in ("batch", "steps", "buffer_batches", "dead_after", "shards"):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}: expected at least 1")
        for name in ("warm_up", "sparsity", "auxiliary"):
            if getattr(self, name) < 0:
                problems.append(f"{name} is {getattr(self, name)}: expected at least 0")
        if not self.lr > 0:
            problems.append(f"lr is {self.lr}: expected a number above 0")
        if not 0 <= self.decay <= 1:
            problems.append(f"decay is {self.decay}: expected a share between 0 and 1")
        unknown = [name for name in self.activation if name not in VARIANTS]
        if unknown:
            problems.append(f"activation is {', '.join(unknown)}: expected {', '.join(VARIANTS)}")
        if self.shards >= 1 and self.batch % self.shards:
            problems.append(f"batch is {self.batch}: expected a multiple of the {self.shards} shards")
        if problems:
            raise UsageError("; ".join(problems))

    @classmethod
    def of(cls, table: Mapping[str, Any], source: str) -> TrainConfig:
        """From a table such as a mixture file's [training]; grid entries may be single values.

        Raises UsageError: an unknown name, or a value of the wrong type or range; all problems in one line.
        """
        defaults = cls()
        known = {field.name: getattr(defaults, field.name) for field in fields(cls)}
        problems: list[str] = []
        values: dict[str, Any] = {}
        for name, value in table.items():
            if name not in known:
                problems.append(f"{name} is unknown (known: {', '.join(known)})")
                continue
            default = known[name]
            many = isinstance(default, tuple)
            entries = value if isinstance(value, (list, tuple)) else [value]
            kind = type(default[0] if isinstance(default, tuple) else default)
            right = all(
                isinstance(entry, bool) == (kind is bool)
                and isinstance(entry, (int, float) if kind is float else kind)
                for entry in entries
            )
            if not right or (isinstance(value, (list, tuple)) and not many):
                problems.append(f"{name} is {value!r}, expected {kind.__name__}{' values' * many}")
                continue
            values[name] = tuple(entries) if many else kind(value)
        if problems:
            raise UsageError(f"{source}: " + "; ".join(problems))
        return cls(**values)

    def specs(self, layers: Sequence[int]) -> list[SAESpec]:
        """Every SAE of the run, layer by layer."""
        grid = []
        for activation, k, expansion, seed in product(self.activation, self.k, self.expansion, self.seed):
            entry = (activation, None if activation == "relu" else k, expansion, seed)
            if entry not in grid:  # relu has no k
                grid.append(entry)
        return [SAESpec(layer, *entry) for layer in layers for entry in grid]

    @property
    def unit_frames(self) -> int:
        """Frames of one shard of one round."""
        return min(self.buffer_batches, self.steps) * (self.batch // self.shards)

    def record(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def recipe_of(self, spec: SAESpec) -> dict[str, Any]:
        """What is stored with one SAE: the schedule and its own place in the grid."""
        return self.record() | {name: getattr(spec, name) for name in GRID}

    def learning_factor(self, step: int) -> float:
        """Share of the full learning rate at `step` (0-based): linear up, constant, linear to 0."""
        falling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, self.ramp(step), falling)

    def ramp(self, step: int) -> float:
        """Share of the full sparsity weight at `step` (0-based)."""
        return min(1.0, (step + 1) / max(1, self.warm_up))

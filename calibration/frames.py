"""Activation frames on their way to SAE training: units of frames, loaded one ahead of the training.

A *round* is one filling of the shuffled buffer; a *unit* is one shard of a round (one shard unless training
is split over processes). What a unit holds depends on nothing but the source's seed and its (round, shard)
pair, so a checkpoint needs none of the buffer's content, a unit can be cached on disk or made on another
machine, and a killed run continues with the same frames.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from whisper_steer.errors import AudioError, UsageError

if TYPE_CHECKING:
    from calibration.adapters import AudioEncoder
    from calibration.plan import WindowPlan

Item = TypeVar("Item")
Result = TypeVar("Result")

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Frames:
    """One unit.

    Attributes:
        data: (layers, frames, d_model) on the CPU, in the source's dtype; padding is not in it.
        domains: (frames,) uint8, index into `calibration.mixture.DOMAINS`.
    """

    data: Tensor
    domains: Tensor


class FrameSource(Protocol):
    """Where units come from: audio (`StreamingFrames`) or a cache on disk (`frame_cache.CachedFrames`).

    Attributes:
        layers: 0-based layers that a unit holds, in order.
        unit_frames: frames of every unit.
        dtype: of the units' data.
    """

    layers: tuple[int, ...]
    d_model: int
    unit_frames: int
    dtype: torch.dtype

    def identity(self) -> dict[str, Any]:
        """What decides the content of the units, as JSON-able values: model, data, seed, sizes."""
        ...

    def load(self, round_index: int, shard: int) -> Frames:
        """The unit; the same for the same arguments."""
        ...


class StreamingFrames:
    """Encodes audio as it is needed: nothing is kept on disk."""

    def __init__(
        self,
        encoder: AudioEncoder,
        plan: WindowPlan,
        *,
        layers: Sequence[int],
        unit_frames: int,
        dtype: torch.dtype = torch.float16,
        batch: int = 8,
    ):
        """batch: windows per forward pass.

        Raises UsageError: a dtype that is not float16, bfloat16 or float32.
        """
        if dtype not in DTYPES.values():
            raise UsageError(f"frames cannot be kept as {dtype}: expected one of {', '.join(DTYPES)}")
        self.encoder, self.plan, self.batch = encoder, plan, batch
        self.layers, self.d_model = tuple(layers), encoder.d_model
        self.unit_frames, self.dtype = unit_frames, dtype

    def identity(self) -> dict[str, Any]:
        return {
            "model": self.encoder.metadata(),
            "plan": self.plan.settings(),
            "layers": list(self.layers),
            "unit_frames": self.unit_frames,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def load(self, round_index: int, shard: int) -> Frames:
        data = torch.empty(len(self.layers), self.unit_frames, self.d_model, dtype=self.dtype)
        domains = torch.empty(self.unit_frames, dtype=torch.uint8)
        filled = 0
        for frames, kinds in self._encoded(round_index, shard):
            take = min(frames.shape[1], self.unit_frames - filled)
            data[:, filled : filled + take] = frames[:, :take].to(self.dtype)
            domains[filled : filled + take] = torch.from_numpy(kinds[:take])
            filled += take
            if filled == self.unit_frames:
                break
        if not bool(torch.isfinite(data).all()):
            raise AudioError(
                f"activations do not fit into {self.dtype} (an outlier above 65504?): use --dtype bfloat16"
            )
        return Frames(data, domains)

    def _encoded(self, round_index: int, shard: int) -> Iterator[tuple[Tensor, np.ndarray]]:
        windows = self.plan.windows(round_index, shard)
        while True:
            chosen = [next(windows) for _ in range(self.batch)]
            encoded = self.encoder.encode([window.audio for window in chosen], self.layers)
            for window, frames in zip(chosen, encoded, strict=True):
                yield frames, window.frame_domains(frames.shape[1], self.encoder.frame_samples)


class Ahead(Generic[Item, Result]):
    """Iterates over load(item) for every item, loading the next one in a background thread meanwhile.

    At most two results are in memory: the one in use and the one being loaded. An error in the background is
    raised where the result would have been used.
    """

    def __init__(self, load: Callable[[Item], Result], items: Iterable[Item], *, background: bool = True):
        self.load, self.items, self.background = load, list(items), background

    def __iter__(self) -> Iterator[Result]:
        if not self.background:
            yield from map(self.load, self.items)
            return
        loading = _Loading(self.load, self.items[0]) if self.items else None
        for position in range(1, len(self.items) + 1):
            if loading is None:
                return
            result = loading.result()
            more = position < len(self.items)
            loading = _Loading(self.load, self.items[position]) if more else None
            yield result


class Prefetched(Ahead[tuple[int, int], Frames]):
    """A source's units, one ahead."""

    def __init__(self, source: FrameSource, units: Iterable[tuple[int, int]], *, background: bool = True):
        super().__init__(lambda unit: source.load(*unit), units, background=background)


class _Loading(Generic[Item, Result]):
    """One call in a daemon thread (it must not keep a stopped program alive)."""

    def __init__(self, load: Callable[[Item], Result], item: Item):
        self._results: list[Result] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(load, item), daemon=True)
        self._thread.start()

    def _run(self, load: Callable[[Item], Result], item: Item) -> None:
        try:
            self._results.append(load(item))
        except BaseException as error:  # handed to the thread that waits for the result
            self._error = error

    def result(self) -> Result:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._results.pop()

"""What training shares between processes; alone, every operation returns its own input.

torchrun sets the environment; `connected` joins the group (gloo for what is on the CPU, NCCL on GPUs).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Collective:
    """One process's view of the group: `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the processes; one message for all."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def sum(self, value: Tensor) -> Tensor:
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def any_(self, flags: Tensor) -> Tensor:
        """Elementwise or of bool tensors."""
        if self.size > 1:
            counts = flags.to(torch.uint8)
            dist.all_reduce(counts, op=dist.ReduceOp.MAX)
            flags = counts.bool()
        return flags

    def count(self, value: int) -> int:
        return int(self.sum(torch.tensor(value, dtype=torch.int64))) if self.size > 1 else value

    def joined(self, values: np.ndarray) -> np.ndarray:
        """The processes' float32 values (n_i,) one behind the other; n may differ."""
        if self.size == 1:
            return values
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(values)]))
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest)
        padded[: len(values)] = torch.from_numpy(values)
        parts = [torch.empty(longest) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return np.concatenate([p[: int(n)].numpy() for p, n in zip(parts, lengths, strict=True)])

    def gathered(self, value: Tensor, owner: int) -> Tensor | None:
        """The processes' tensors joined along dimension 0 at `owner`; None elsewhere."""
        if self.size == 1:
            return value
        value = value.contiguous()
        parts = [torch.empty_like(value) for _ in range(self.size)] if self.rank == owner else None
        dist.gather(value, parts, dst=owner)
        return torch.cat(parts) if parts is not None else None

    def wait(self) -> None:
        """Until every process is here."""
        self.count(0)


ALONE = Collective()


@contextmanager
def connected() -> Iterator[Collective]:
    """The group that torchrun describes in the environment; `ALONE` without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # counts and candidates are on the CPU everywhere, gradients where the SAEs are
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Collective(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()

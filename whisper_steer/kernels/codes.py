"""Codes: the few non-zero latents of many frames, and the layouts that kernels write and read.

Two layouts. *Padded*: every frame has `width` places, unused ones hold the value 0 (TopK, where width =
k; CUDA, where sizes must be known before the codes are). *CSR*: the codes of all frames one after the
other, frame i's at offsets[i] : offsets[i + 1] (thresholds and BatchTopK on the CPU, where frames differ
much in their number of codes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UsageError


@dataclass(frozen=True, eq=False)
class Codes:
    """values and indices: (frames, width) padded, or (nnz,) with offsets (frames + 1,). indices are int32
    (int16 after `compact`, where n_latents allows), in no particular order within a frame unless CSR made
    them ascending.

    lead: the shape of the input without its last dimension; frames is its product. counts (frames,), padded
    layout only: how many codes each frame has, more than `width` where some had no place (see `complete`).
    """

    values: Tensor
    indices: Tensor
    n_latents: int
    lead: tuple[int, ...]
    offsets: Tensor | None = None
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.shape != self.indices.shape:
            raise UsageError(
                f"codes have {tuple(self.values.shape)} values and {tuple(self.indices.shape)} indices: "
                "expected as many of each"
            )
        rows = len(self.values) if self.offsets is None else len(self.offsets) - 1
        if self.values.ndim != (2 if self.offsets is None else 1) or rows != self.frames:
            raise UsageError(
                f"codes of {self.frames} frames have values of shape {tuple(self.values.shape)}: expected "
                "(frames, width), or (nnz,) with frames + 1 offsets"
            )

    @property
    def frames(self) -> int:
        return torch.Size(self.lead).numel()

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def density(self) -> float:
        """Stored codes per latent and frame, 0 to 1: what a sparse product's cost grows with."""
        return self.values.numel() / max(self.frames * self.n_latents, 1)

    @property
    def complete(self) -> bool:
        """Did every code find a place? (Asking makes a GPU wait.)"""
        return self.counts is None or self.frames == 0 or int(self.counts.max()) <= self.values.shape[1]

    def with_values(self, values: Tensor) -> Codes:
        """The same places with other values, of the same shape."""
        return replace(self, values=values)

    def per_frame(self) -> Tensor:
        """(frames,) int64: stored codes of each frame other than 0."""
        if self.offsets is None:
            return (self.values != 0).sum(dim=1)
        return self.frame_sums((self.values != 0).long())

    def frame_sums(self, numbers: Tensor) -> Tensor:
        """(frames,): numbers, shaped like the values, summed over each frame."""
        if self.offsets is None:
            return numbers.sum(dim=1)
        return torch.zeros(self.frames, dtype=numbers.dtype, device=self.device).index_add_(
            0, self.rows(), numbers
        )

    def rows(self) -> Tensor:
        """int64: the frame of every value, shaped like them."""
        frames = torch.arange(self.frames, device=self.device)
        if self.offsets is None:
            return frames.unsqueeze(1).expand(self.values.shape)
        return torch.repeat_interleave(frames, self.offsets.diff(), output_size=len(self.values))

    def dense(self) -> Tensor:
        """(*lead, n_latents), in the values' dtype."""
        flat = torch.zeros(self.frames, self.n_latents, dtype=self.values.dtype, device=self.device)
        # adding, not writing: places without a code name latent 0, which may have one
        if self.offsets is None:
            flat = flat.scatter_add(1, self.indices.long(), self.values)
        else:
            flat = flat.index_put((self.rows(), self.indices.long()), self.values, accumulate=True)
        return flat.reshape(*self.lead, self.n_latents)

    def csr(self) -> Codes:
        """The same codes in CSR layout, without places that hold 0 (a GPU has to wait for their number)."""
        if self.offsets is not None:
            return self
        keep = self.values != 0
        offsets = torch.zeros(self.frames + 1, dtype=torch.int64, device=self.device)
        offsets[1:] = keep.sum(dim=1).cumsum(0)
        return replace(
            self, values=self.values[keep], indices=self.indices[keep], offsets=offsets, counts=None
        )

    def padded(self, width: int | None = None) -> Codes:
        """The same codes in padded layout; width: at least the largest number of codes of a frame
        (default: it).

        Raises UsageError: some frame has more.
        """
        if self.offsets is None and (width is None or width == self.values.shape[1]):
            return self
        whole = self.csr()
        counts = whole.offsets.diff() if whole.offsets is not None else torch.zeros(0)
        most = int(counts.max()) if self.frames else 0
        width = most if width is None else width
        if width < most:
            raise UsageError(f"a frame has {most} codes: expected a width of at least that, not {width}")
        values = torch.zeros(self.frames, width, dtype=self.values.dtype, device=self.device)
        indices = torch.zeros(self.frames, width, dtype=self.indices.dtype, device=self.device)
        there = torch.arange(width, device=self.device) < counts.unsqueeze(1)
        values[there], indices[there] = whole.values, whole.indices
        return replace(self, values=values, indices=indices, offsets=None, counts=counts)

    def compact(self) -> Codes:
        """The same codes with int16 indices, for keeping, where there are at most 32,767 latents."""
        if self.n_latents > torch.iinfo(torch.int16).max:
            return self
        return replace(self, indices=self.indices.short())

    def transposed(self, order: Tensor | None = None) -> Codes:
        """(n_latents, frames) codes in CSR layout: for each latent its frames, ascending, places of 0
        included.

        Its `indices` are frames. Needs no answer from a GPU: only a stable sort. `transposed_order` says
        where each value came from.
        """
        order = self.transposed_order() if order is None else order
        width = 1 if self.offsets is not None else max(self.values.shape[1], 1)
        rows = self.rows().reshape(-1)[order] if self.offsets is not None else order // width
        # unlike a bincount, a search makes no GPU wait
        bounds = torch.arange(self.n_latents + 1, dtype=torch.int32, device=self.device)
        offsets = torch.searchsorted(self.indices.reshape(-1)[order].int(), bounds)
        return Codes(self.values.reshape(-1)[order], rows.int(), self.frames, (self.n_latents,), offsets)

    def transposed_order(self) -> Tensor:
        """int64 (values,): positions in the flattened values, sorted by latent and, within it, by frame."""
        keys = self.indices.reshape(-1)
        # fewer bits are sorted in fewer passes
        return torch.argsort(keys.short() if self.n_latents <= 32_767 else keys, stable=True)

    @classmethod
    def of(cls, dense: Tensor) -> Codes:
        """From dense codes (..., n_latents), in CSR layout, indices ascending."""
        flat = dense.reshape(-1, dense.shape[-1])
        rows, columns = flat.nonzero(as_tuple=True)
        offsets = torch.zeros(len(flat) + 1, dtype=torch.int64, device=dense.device)
        offsets[1:] = torch.bincount(rows, minlength=len(flat)).cumsum(0)
        lead = tuple(dense.shape[:-1])
        return cls(flat[rows, columns], columns.int(), dense.shape[-1], lead, offsets)

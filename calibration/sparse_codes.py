"""The few non-zero codes of a batch: choosing them, and multiplying with nothing but them.

Only k of n codes per frame survive, so everything behind the encoder's product can run on those alone.
`whisper_steer.kernels` does the multiplying; on a CPU numpy does the choosing, several times as fast there as
torch's own dense top-k and scatter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from calibration.collectives import ALONE, Collective
from whisper_steer import kernels
from whisper_steer.kernels.cpu import bfloat16_is_fast, sparse_products_work

__all__ = [
    "LargestOfBatch", "LargestOfFrame", "SparseCodes", "bfloat16_is_fast", "screened", "sparse_products_work",
]  # fmt: skip

# shares of the last step's smallest kept value above which pre-activations are looked at when the largest
# k x B are sought, one after the other until there are enough; only speed depends on them
MARGINS = (0.9, 0.6)
# the same for a frame's k largest, relative to the frame's norm; bfloat16's error is some 0.1 %
FRAME_MARGIN = 0.97
SAMPLE = 128  # frames that a first hint is taken from


@dataclass(frozen=True)
class SparseCodes:
    """Non-zero codes of a batch, row by row: values, their columns, and the offset of each row (CSR).

    order: for a transpose, where its values stood in the original.
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]
    order: Tensor | None = None

    @classmethod
    def at(cls, flat: Tensor, values: Tensor, shape: tuple[int, int]) -> SparseCodes:
        """From ascending flat indices into a (frames, latents) matrix."""
        rows = torch.div(flat, shape[1], rounding_mode="floor")
        offsets = torch.zeros(shape[0] + 1, dtype=torch.int64)
        offsets[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
        return cls(offsets, flat - rows * shape[1], values, shape)

    @classmethod
    def of(cls, dense: Tensor) -> SparseCodes:
        """From dense codes (B, n), on any device."""
        codes = kernels.Codes.of(dense)
        offsets = codes.offsets if codes.offsets is not None else torch.zeros(1, dtype=torch.int64)
        return cls(offsets, codes.indices.long(), codes.values, (dense.shape[0], dense.shape[1]))

    def codes(self) -> kernels.Codes:
        """The same as the kernels take it."""
        rows, latents = self.shape
        return kernels.Codes(self.values, self.columns.int(), latents, (rows,), self.offsets)

    def dense(self) -> Tensor:
        """(B, n)."""
        return self.codes().dense()

    def with_values(self, values: Tensor) -> SparseCodes:
        """The same places with other values."""
        return replace(self, values=values)

    def times(self, weights: Tensor) -> Tensor:
        """codes (B, n) @ weights (n, d)."""
        return kernels.decode(self.codes(), weights)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """left[row] . right[column] for every non-zero: left (B, d), right (n, d)."""
        return kernels.products(self.codes(), left, right)

    def transposed(self) -> SparseCodes:
        """The (n, B) transpose; `order` says where each value went."""
        codes = self.codes()
        order = codes.transposed_order()
        turned = codes.transposed(order)
        offsets = self.offsets if turned.offsets is None else turned.offsets
        shape = (self.shape[1], self.shape[0])
        return SparseCodes(offsets, turned.indices.long(), turned.values, shape, order)

    def chosen(self, keep: Tensor) -> SparseCodes:
        """The codes where `keep` (one bool per non-zero) is set."""
        offsets = torch.zeros_like(self.offsets)
        offsets[1:] = keep.cumsum(0)[self.offsets[1:] - 1] if len(keep) else 0
        # rows without any non-zero at the start look at index -1
        offsets[self.offsets == 0] = 0
        return SparseCodes(offsets, self.columns[keep], self.values[keep], self.shape)

    def columns_between(self, first: int, end: int) -> SparseCodes:
        """The columns first..end - 1, as a (B, end - first) matrix."""
        part = self.chosen((self.columns >= first) & (self.columns < end))
        return SparseCodes(part.offsets, part.columns - first, part.values, (self.shape[0], end - first))

    def frames_active(self) -> Tensor:
        """(B,): non-zero codes of each row."""
        return self.offsets.diff()


class LargestOfBatch:
    """Chooses the k x B largest positive pre-activations of a batch: BatchTopK's codes.

    The last step's smallest kept value is a hint where to look in the next: what lies well below it is never
    compared. With `screen`, the full product runs in bfloat16 and only finds the candidates; their values
    are then computed in float32 and the choice is made among those. A latent would be lost only where
    bfloat16's error exceeds the margin between candidate and choice (10 % of the threshold; the error is
    some 0.1 %), so codes are those of the float32 product.
    """

    def __init__(self, k: int, *, screen: bool = False):
        self.k, self.screen = k, screen
        self.smallest = 0.0

    def __call__(
        self, z: Tensor, W_enc: Tensor, b_enc: Tensor, collective: Collective = ALONE
    ) -> SparseCodes:
        """Codes of z (B, d) under W_enc (n, d), b_enc (n,): the k x B x processes largest of all."""
        shape = (len(z), len(W_enc))
        wanted = min(self.k * shape[0], shape[0] * shape[1]) * collective.size
        if self.screen and self.smallest > 0:
            rough = in_bfloat16(z, W_enc, b_enc)
            for margin in MARGINS:
                flat = above(rough, self.smallest * margin)
                if collective.count(len(flat)) >= wanted:
                    return self._reduced(in_float32(flat, z, W_enc, b_enc), wanted, collective)
        pre = linear(z, W_enc, b_enc)
        return self.of(pre, collective)

    def of(self, pre: Tensor, collective: Collective = ALONE) -> SparseCodes:
        """The same from pre-activations (B, n) that are there already."""
        wanted = min(self.k * len(pre), pre.numel()) * collective.size
        everything = pre.numpy().reshape(-1)
        # all processes must look above the same value, and a sample is each one's own
        hint = self.smallest or (_smallest_of_sample(pre, self.k) if collective.size == 1 else 0.0)
        for floor in (*(hint * margin for margin in MARGINS), 0.0) if hint > 0 else (0.0,):
            kept = np.flatnonzero(everything > floor)
            if collective.count(len(kept)) >= wanted:
                break
        values = torch.from_numpy(everything[kept])
        codes = SparseCodes.at(torch.from_numpy(kept), values, (pre.shape[0], pre.shape[1]))
        return self._reduced(codes, wanted, collective)

    def _reduced(self, codes: SparseCodes, wanted: int, collective: Collective) -> SparseCodes:
        values = codes.values.numpy()
        everyones = collective.joined(values)
        if len(everyones) > wanted:
            smallest = np.partition(everyones, len(everyones) - wanted)[-wanted] if wanted else np.inf
            keep = values >= smallest
            surplus = int(keep.sum()) - wanted if collective.size == 1 else 0
            if surplus > 0:  # ties at the threshold: the last ones go, so that exactly `wanted` stay
                keep[np.flatnonzero(values == smallest)[-surplus:]] = False
            codes = codes.chosen(torch.from_numpy(keep))
            self.smallest = float(smallest)
        elif len(everyones):
            self.smallest = float(everyones.min())
        if len(codes.values) and float(codes.values.min()) <= 0:
            codes = codes.chosen(codes.values > 0)
        return codes


class LargestOfFrame:
    """Chooses the k largest positive pre-activations of every frame: TopK's codes.

    As with `LargestOfBatch` a hint from the last step leaves few candidates, found in bfloat16 with `screen`.
    The hint is a threshold relative to the frame's norm; a frame with fewer than k values above it is looked
    at as a whole.
    """

    def __init__(self, k: int, *, screen: bool = False):
        self.k, self.screen = k, screen
        self.smallest = 0.0

    def __call__(self, z: Tensor, W_enc: Tensor, b_enc: Tensor) -> SparseCodes:
        """Codes of z (B, d) under W_enc (n, d), b_enc (n,)."""
        norms = z.norm(dim=1)
        if not (self.screen and self.smallest > 0):
            return self.of(linear(z, W_enc, b_enc), norms)
        sure_above = self.smallest * norms
        candidates = screened(z, W_enc, b_enc, sure_above * FRAME_MARGIN)
        return self._best(candidates, sure_above, norms, lambda frames: linear(z[frames], W_enc, b_enc))

    def of(self, pre: Tensor, norms: Tensor | None = None) -> SparseCodes:
        """The same from pre-activations (B, n) that are there already; norms (B,) of the frames."""
        norms = torch.ones(len(pre)) if norms is None else norms
        hint = self.smallest or _smallest_of_sample(pre, self.k) / max(float(norms[:SAMPLE].mean()), 1e-8) / 2
        sure_above = hint * norms
        everything = pre.numpy()
        found = np.flatnonzero((everything > sure_above.numpy()[:, None]).reshape(-1))
        shape = (pre.shape[0], pre.shape[1])
        values = torch.from_numpy(everything.reshape(-1)[found])
        candidates = SparseCodes.at(torch.from_numpy(found), values, shape)
        return self._best(candidates, sure_above, norms, lambda frames: pre[frames])

    def _best(
        self,
        candidates: SparseCodes,
        sure_above: Tensor,
        norms: Tensor,
        pre_of: Callable[[Tensor], Tensor],
    ) -> SparseCodes:
        """sure_above (B,): every value of a frame above it is a candidate. pre_of: pre-activations of some
        frames.
        """
        frames, latents = candidates.shape
        k = min(self.k, latents)
        counts = candidates.frames_active()
        width = max(int(counts.max()), k) if frames else k
        # candidates side by side, one row a frame: much narrower than the pre-activations
        rows = torch.repeat_interleave(torch.arange(frames), counts)
        places = torch.arange(len(rows)) - candidates.offsets[rows]
        values = torch.zeros(frames, width)
        columns = torch.zeros(frames, width, dtype=torch.int64)
        values[rows, places] = candidates.values
        columns[rows, places] = candidates.columns
        best, order = values.topk(k, dim=1, sorted=False)
        chosen = columns.gather(1, order)
        short = ((best.min(dim=1).values <= sure_above) & (sure_above > 0)).nonzero().squeeze(1)
        if len(short):
            best[short], chosen[short] = pre_of(short).topk(k, dim=1, sorted=False)
        if frames:  # low enough that a few frames in a hundred, not most, are looked at as a whole next time
            relative = best.min(dim=1).values / norms.clamp_min(1e-8)
            self.smallest = float(relative.quantile(0.03).clamp_min(0))
        keep = best > 0
        flat, order = (chosen + torch.arange(frames)[:, None] * latents)[keep].sort()
        return SparseCodes.at(flat, best[keep][order], (frames, latents))


def screened(z: Tensor, W_enc: Tensor, b_enc: Tensor, floor: Tensor) -> SparseCodes:
    """Where W_enc z + b_enc is above `floor` (B,), each > 0, in bfloat16, with the values in float32."""
    return in_float32(above(in_bfloat16(z, W_enc, b_enc), floor), z, W_enc, b_enc)


def in_bfloat16(z: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """W_enc z + b_enc (B, n), roughly."""
    return linear(z.bfloat16(), W_enc.bfloat16(), b_enc.bfloat16())


def above(rough: Tensor, floor: float | Tensor) -> Tensor:
    """Flat indices where bfloat16 `rough` (B, n) is above `floor` > 0: one number, or one for each row."""
    # positive bfloat16 numbers are ordered like their bits, and negative ones have the sign bit
    least = torch.as_tensor(floor).bfloat16().view(torch.int16).numpy()
    larger = rough.view(torch.int16).numpy() > (least[:, None] if least.ndim else least)
    return torch.from_numpy(np.flatnonzero(larger.reshape(-1)))


def in_float32(flat: Tensor, z: Tensor, W_enc: Tensor, b_enc: Tensor) -> SparseCodes:
    """W_enc z + b_enc at ascending flat indices of (B, n)."""
    codes = SparseCodes.at(flat, torch.ones(len(flat)), (len(z), len(W_enc)))
    values = codes.products(z, W_enc) + b_enc[codes.columns]
    return SparseCodes(codes.offsets, codes.columns, values, codes.shape)


def _smallest_of_sample(pre: Tensor, k: int, frames: int = SAMPLE) -> float:
    """The smallest of the k x B largest values of the first frames: where to look without a hint."""
    sample = pre[:frames].numpy().reshape(-1)
    wanted = min(k * min(frames, len(pre)), sample.size)
    return max(float(np.partition(sample, -wanted)[-wanted]), 0.0) if wanted else 0.0

"""The least time an operation can take on a GPU: its bytes at the copy bandwidth, its FLOP at the matrix
rate.

Both rates are measured in the same run: copying 1 GiB (read and written), and a square matrix product.
Bytes are counted once each: activations and results, codes, and every weight that is touched; what a
cache may save is saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.peers.kernels_worker import Request, nanoseconds

SIDE = 8192
COPIED = 1 << 30  # bytes


@dataclass(frozen=True)
class Roofline:
    """bandwidth: bytes per second; rate: FLOP per second in the request's dtype."""

    bandwidth: float
    rate: float

    @classmethod
    def measured(cls, request: Request) -> Roofline:
        """On the request's CUDA device. float32 products in float32, as the kernels' are."""
        dtype = getattr(torch, request.dtype)
        whole = Request(**{**vars(request), "frames": 1})
        source = torch.empty(COPIED, dtype=torch.uint8, device=request.device)
        target = torch.empty_like(source)
        copying = nanoseconds(lambda: target.copy_(source), whole) / 1e9
        a = torch.randn(SIDE, SIDE, device=request.device, dtype=dtype)
        b = torch.randn(SIDE, SIDE, device=request.device, dtype=dtype)
        multiplying = nanoseconds(lambda: a @ b, whole) / 1e9
        return cls(2 * COPIED / copying, 2 * SIDE**3 / multiplying)

    def nanoseconds(self, operation: str, request: Request) -> float | None:
        """Per frame, the larger of the two; None for operations without a count."""
        counted = cost(operation, request)
        if counted is None:
            return None
        moved, flop = counted
        return 1e9 * max(moved / self.bandwidth, flop / self.rate) / request.frames


def cost(operation: str, request: Request) -> tuple[float, float] | None:
    """(bytes, FLOP) of all frames together. k of an edit is the number of its latents."""
    size = 2 if request.dtype in ("bfloat16", "float16") else 4
    d, n, k, frames = request.d, request.n, request.k, request.frames
    codes = frames * k * (4 + 4)  # float32 values, int32 indices
    touched = min(n, frames * k)
    if operation in ("encode-threshold", "encode-topk"):
        return size * (frames * d + n * d) + codes, 2.0 * frames * d * n
    if operation == "decode":
        return size * (frames * d + touched * d) + codes, 2.0 * frames * d * k
    if operation == "edit":
        return size * (2 * frames * d + 2 * k * d), 4.0 * frames * d * k
    return None

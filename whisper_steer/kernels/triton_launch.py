"""Launches the Triton kernels: sizes of blocks, memory for results, and what they do not cover.

Nothing here asks the device for an answer, so calls can be recorded in CUDA graphs; the one exception is
`encode_threshold` without a `width`, which must know how many codes the fullest frame has. Imports
without Triton. With TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors, slowly: that is
how they are tested where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import reference
from .arguments import MODES, Change
from .codes import Codes

# latents of one fused edit: more are better served by the dense products of the reference
MOST_EDITED = 256
# frames of an edit in float32 beyond which the same goes for it
MOST_FRAMES = 2048
# bytes of pre-activations that are written at a time
WRITTEN_BYTES = 1 << 28
SEGMENTS = 4
# places per frame that are tried first where a width is not given
FIRST_WIDTH = 128


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Do the kernels run in Triton's interpreter?"""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=8)
def problem(device: str) -> str | None:
    """Why the kernels cannot run on that type of device, in words; None if they can."""
    if not _installed():
        return "triton is not installed"
    if interpreted():
        return None if device == "cpu" else "triton's interpreter is on"
    if device != "cuda":
        return f"triton has no kernels for {device}"
    if torch.version.hip is not None:
        return "not tried on AMD's GPUs"
    if torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


@lru_cache(maxsize=1)
def _kernels() -> Any:
    from . import triton_kernels

    kernels: ModuleType = triton_kernels
    return kernels


def _run(kernel: Any, grid: tuple[int, ...], x: Tensor, *arguments: Any, **options: Any) -> None:
    """Launch with x as its first argument, on x's device: Triton takes the current one."""
    with torch.cuda.device_of(x):
        kernel[grid](x, *arguments, **options)


def encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, *, width: int | None = None
) -> Codes:
    """Padded codes, indices ascending. width: places per frame; None: as many as the fullest frame needs,
    for which the device is waited for. With a width, codes beyond it are dropped and `counts` tells
    (Codes.complete)."""
    n = len(W_enc)
    flat = _rows(x.to(torch.promote_types(x.dtype, W_enc.dtype)))
    tried = min(n, FIRST_WIDTH) if width is None else max(1, min(width, n))
    codes = _encode_threshold(flat, W_enc, b_enc, theta, tried, tuple(x.shape[:-1]))
    if width is None and not codes.complete and codes.counts is not None:
        codes = _encode_threshold(flat, W_enc, b_enc, theta, int(codes.counts.max()), tuple(x.shape[:-1]))
    return codes


def _encode_threshold(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, width: int, lead: tuple[int, ...]
) -> Codes:
    frames, n = len(x), len(W_enc)
    values = torch.empty(frames, width, dtype=torch.float32, device=x.device)
    indices = torch.empty(frames, width, dtype=torch.int32, device=x.device)
    counts = torch.empty(frames, dtype=torch.int32, device=x.device)
    codes = Codes(values, indices, n, lead, counts=counts)
    weights = _fitting(W_enc, x), b_enc.contiguous(), theta.contiguous()
    if frames and _is_written(x.dtype):
        _find_in_written(x, *weights, values, indices, counts)
    elif frames:
        _find_while_multiplying(x, *weights, values, indices, counts)
    return codes


def _is_written(dtype: torch.dtype) -> bool:
    """Are pre-activations written, by torch's own product, before codes are looked for in them? That is more
    than twice as fast as a product in Triton that looks for them on the way (docs/kernels.md), where torch
    can give the sums of such a product in float32."""
    return dtype == torch.float32 or _gives_float32_sums()


def _find_in_written(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, values: Tensor, indices: Tensor, counts: Tensor
) -> None:
    n, width = len(W_enc), values.shape[1]
    first = 0
    for part in x.split(_written_frames(n)):
        _run(
            _kernels().keep_above, (len(part),),
            _product(part, W_enc), b_enc, theta, values, indices, counts, first, n, width,
            BLOCK=min(1024, _power(n)), BLOCK_W=_power(width), num_warps=4,
        )  # fmt: skip
        first += len(part)


def _find_while_multiplying(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, values: Tensor, indices: Tensor, counts: Tensor
) -> None:
    (frames, d), n, width = x.shape, len(W_enc), values.shape[1]
    blocks = {"BLOCK_F": 16 if interpreted() else 64, "BLOCK_N": 32 if interpreted() else 128}
    segment = _up(-(-n // SEGMENTS), blocks["BLOCK_N"])
    parts = -(-n // segment)
    places = min(width, segment)
    part_values = torch.empty(frames, parts, places, dtype=torch.float32, device=x.device)
    part_indices = torch.empty(frames, parts, places, dtype=torch.int32, device=x.device)
    part_counts = torch.empty(frames, parts, dtype=torch.int32, device=x.device)
    _run(
        _kernels().encode_threshold, (-(-frames // blocks["BLOCK_F"]), parts),
        x, W_enc, b_enc, theta, part_values, part_indices, part_counts,
        frames, n, d, segment, places, **blocks, BLOCK_D=32 if interpreted() else 64,
        PRECISION="ieee", UPCAST=_upcast(x.dtype), num_warps=4,
    )  # fmt: skip
    _run(
        _kernels().gather_segments, (frames,),
        part_values, part_indices, part_counts, values, indices, counts, parts, places, width,
        BLOCK_P=_power(places), BLOCK_W=_power(width),
    )  # fmt: skip


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Codes:
    """Padded codes, in no order. torch's own top-k of pre-activations that are written for some frames at a
    time: a running top-k inside the product took ten times as long as both (docs/kernels.md)."""
    n = len(W_enc)
    k = min(k, n)
    flat = _rows(x.to(torch.promote_types(x.dtype, W_enc.dtype)))
    values = torch.empty(len(flat), k, dtype=torch.float32, device=x.device)
    indices = torch.empty(len(flat), k, dtype=torch.int32, device=x.device)
    weights, bias = _fitting(W_enc, flat), b_enc.float()
    first = 0
    for part in flat.split(_written_frames(n)):
        here = slice(first, first + len(part))
        pre = _product(part, weights).add_(bias).relu_()
        values[here], indices[here] = pre.topk(k, dim=1, sorted=False)
        first += len(part)
    return Codes(values, indices, n, tuple(x.shape[:-1]))


def _product(x: Tensor, W_enc: Tensor) -> Tensor:
    """W_enc x of some frames, float32 whatever comes in, by torch's own product."""
    if x.dtype == torch.float32:
        return linear(x, W_enc)
    if x.is_cuda and _gives_float32_sums():
        return torch.mm(x, W_enc.T, out_dtype=torch.float32)
    return linear(x.float(), W_enc.float())


@lru_cache(maxsize=1)
def _gives_float32_sums() -> bool:
    """Can torch give the sums of a product of halves as they are? From 2.8 on."""
    return hasattr(torch.ops.aten.mm, "dtype")


def _written_frames(n: int) -> int:
    """How many frames' pre-activations are written at a time."""
    return max(16, WRITTEN_BYTES // (4 * n) // 16 * 16)


def decode(codes: Codes, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """codes W_dec + b_dec, (frames, d), in W_dec's dtype, summed in float32."""
    d = W_dec.shape[1]
    out = torch.empty(codes.frames, d, dtype=W_dec.dtype, device=codes.device)
    if out.numel() == 0:
        return out
    csr = codes.offsets is not None
    # one warp: several would have to add their shares of a sum up through shared memory
    single = W_dec.dtype == torch.float32
    block = min(128 if single else 256, _power(d))
    values = codes.values.contiguous()
    _run(
        _kernels().weighted_rows, (codes.frames, -(-d // block)),
        values, codes.indices.contiguous(), codes.offsets if csr else values, W_dec.contiguous(),
        values if b_dec is None else b_dec.contiguous(), out, d, 0 if csr else codes.values.shape[1],
        CSR=csr, HAS_BIAS=b_dec is not None, BLOCK_K=8 if single else 4, BLOCK_D=block, num_warps=1,
    )  # fmt: skip
    return out


def weight_gradient(codes: Codes, g: Tensor, *, deterministic: bool = True) -> Tensor:
    """codes^T g, (n_latents, d) float32: summed in the frames' order, or by atomic additions without a
    sort."""
    if deterministic:
        return decode(codes.transposed(), g.float().contiguous())
    d = g.shape[1]
    out = torch.zeros(codes.n_latents, d, dtype=torch.float32, device=codes.device)
    count = codes.values.numel()
    if count and d:
        csr, block = codes.offsets is not None, min(256, _power(d))
        _run(
            _kernels().scatter_rows, (count, -(-d // block)),
            codes.values.contiguous(), codes.indices.contiguous(), codes.rows() if csr else codes.indices,
            g.contiguous(), out, d, 1 if csr else codes.values.shape[1], count,
            CSR=csr, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
    return out


def products(codes: Codes, left: Tensor, right: Tensor) -> Tensor:
    """left[frame] . right[latent] for every place, float32, shaped like the values."""
    out = torch.empty(codes.values.shape, dtype=torch.float32, device=codes.device)
    if out.numel():
        csr, d = codes.offsets is not None, left.shape[1]
        _run(
            _kernels().products, (-(-out.numel() // 16),),
            codes.indices.contiguous(), codes.rows() if csr else codes.indices, left.contiguous(),
            right.contiguous(), out, out.numel(), d, 1 if csr else codes.values.shape[1],
            CSR=csr, BLOCK_K=16, BLOCK_D=min(128, _power(d)), num_warps=4,
        )  # fmt: skip
    return out


def edit(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    theta: Tensor,
    W_dec: Tensor,
    change: Change,
    gate: Tensor | None,
) -> Tensor:
    """As reference.edit: one read of x, one write of x'. More than MOST_EDITED latents go to the reference,
    and so do more than MOST_FRAMES frames in float32."""
    m = len(W_enc)
    # one dtype for all products: the wider of the two, so that float32 weights stay exact
    work = x.dtype if W_enc.dtype == x.dtype else torch.float32
    flat = _rows(x)
    frames, d = flat.shape
    if m > MOST_EDITED or (work == torch.float32 and frames > MOST_FRAMES):
        return reference.edit(x, W_enc, b_enc, theta, W_dec, change, gate)
    out = torch.empty_like(flat)
    if out.numel():
        rows = 16 if interpreted() or work == torch.float32 else 64 if m <= 128 else 32
        dummy = b_enc.contiguous()
        _run(
            _kernels().edit, (-(-frames // rows),),
            flat, W_enc.to(work).contiguous(), dummy, theta.contiguous(), W_dec.to(work).contiguous(),
            change.values.contiguous(), dummy if gate is None else gate.reshape(-1).contiguous(), out,
            frames, m, d, float(change.amount), MODE=MODES.index(change.mode), FLOOR=change.floor,
            GATED=gate is not None, M=max(16, _power(m)), BLOCK_F=rows,
            BLOCK_D=64 if work != torch.float32 or m <= 128 else 32, PRECISION="ieee",
            UPCAST=_upcast(work) or work != x.dtype, SCALED=work == torch.float16, num_warps=4,
        )  # fmt: skip
    return out.reshape(x.shape)


# ---------- sizes


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _fitting(W: Tensor, x: Tensor) -> Tensor:
    """Weights in the activations' dtype: tl.dot takes one for both."""
    return W.to(x.dtype).contiguous()


def _upcast(dtype: torch.dtype) -> bool:
    """numpy, in which the interpreter computes, has no bfloat16."""
    return interpreted() and dtype == torch.bfloat16


def _power(size: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(0, size - 1).bit_length()


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

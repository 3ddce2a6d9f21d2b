"""The Triton kernels. Imported by triton_launch alone, where Triton is there; d need not be a power of
two, rows are contiguous, products accumulate in float32.

PRECISION is tl.dot's for float32 inputs. It is "ieee" everywhere: tensor cores would take 11 bits of a
float32 number (tf32), and three such products (tf32x3) still add up by truncation, which costs more than
1e-6 at these widths. UPCAST: multiply in float32 (mixed dtypes; the interpreter has no bfloat16).

Offsets of rows are int64: 24,000 frames times 24,576 latents or 4 segments of places exceed int32.
"""

# mypy: disable-error-code="no-untyped-def"
# (arguments of a kernel are pointers and numbers of Triton's own)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def encode_tile(
    x, w, b, rows, columns, frames, n, d,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """W_enc x + b_enc of some rows and latents, float32, never written anywhere."""
    pre = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    for begin in range(0, d, BLOCK_D):
        depth = begin + tl.arange(0, BLOCK_D)
        x_there = (rows < frames)[:, None] & (depth < d)[None, :]
        w_there = (columns < n)[None, :] & (depth < d)[:, None]
        x_tile = tl.load(x + rows.to(tl.int64)[:, None] * d + depth[None, :], mask=x_there, other=0.0)
        w_tile = tl.load(w + columns.to(tl.int64)[None, :] * d + depth[:, None], mask=w_there, other=0.0)
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
            w_tile = w_tile.to(tl.float32)
        pre = tl.dot(x_tile, w_tile, pre, input_precision=PRECISION)
    return pre + tl.load(b + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]


@triton.jit
def encode_threshold(
    x, w, b, theta, values, indices, counts, frames, n, d, segment, places,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Codes of BLOCK_F frames among the `segment` latents of program (i, s), ascending, to the first
    places of values and indices (frames, segments, places); how many there are to counts (frames,
    segments)."""
    rows = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    cells = rows.to(tl.int64) * parts + part
    used = tl.zeros((BLOCK_F,), dtype=tl.int32)
    end = tl.minimum((part + 1) * segment, n)
    for begin in range(part * segment, end, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        pre = encode_tile(x, w, b, rows, columns, frames, n, d, BLOCK_D, PRECISION, UPCAST)
        least = tl.load(theta + columns, mask=columns < n, other=0.0).to(tl.float32)
        keep = (pre > tl.maximum(least, 0.0)[None, :]) & (columns < end)[None, :] & (rows < frames)[:, None]
        flags = keep.to(tl.int32)
        place = used[:, None] + tl.cumsum(flags, 1) - flags
        fits = keep & (place < places)
        target = cells[:, None] * places + place
        tl.store(values + target, pre, mask=fits)
        tl.store(indices + target, tl.broadcast_to(columns[None, :], (BLOCK_F, BLOCK_N)), mask=fits)
        used += tl.sum(flags, 1)
    tl.store(counts + cells, used, mask=rows < frames)


@triton.jit
def gather_segments(
    part_values, part_indices, part_counts, values, indices, counts, parts, places, width,
    BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One frame's codes from its segments into one padded row of `width`; the rest of the row becomes 0."""
    row = tl.program_id(0).to(tl.int64)
    total = 0
    steps = tl.arange(0, BLOCK_P)
    for part in range(parts):
        cell = row * parts + part
        count = tl.load(part_counts + cell)
        there = (steps < tl.minimum(count, places)) & (total + steps < width)
        found = tl.load(part_values + cell * places + steps, mask=there, other=0.0)
        tl.store(values + row * width + total + steps, found, mask=there)
        names = tl.load(part_indices + cell * places + steps, mask=there, other=0)
        tl.store(indices + row * width + total + steps, names, mask=there)
        total += count
    rest = tl.arange(0, BLOCK_W)
    empty = (rest >= total) & (rest < width)
    tl.store(values + row * width + rest, tl.zeros((BLOCK_W,), dtype=tl.float32), mask=empty)
    tl.store(indices + row * width + rest, tl.zeros((BLOCK_W,), dtype=tl.int32), mask=empty)
    tl.store(counts + row, total)


@triton.jit
def keep_above(
    pre, b, theta, values, indices, counts, first, n, width,
    BLOCK: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One frame's codes from its pre-activations without the bias, pre (frames, n) float32, ascending, into
    the padded row `first` places below; the rest of the row becomes 0."""
    here = tl.program_id(0).to(tl.int64)
    row = first + here
    used = 0
    for begin in range(0, n, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        there = columns < n
        value = tl.load(pre + here * n + columns, mask=there, other=0.0)
        value += tl.load(b + columns, mask=there, other=0.0).to(tl.float32)
        least = tl.load(theta + columns, mask=there, other=0.0).to(tl.float32)
        keep = (value > tl.maximum(least, 0.0)) & there
        flags = keep.to(tl.int32)
        place = used + tl.cumsum(flags, 0) - flags
        fits = keep & (place < width)
        tl.store(values + row * width + place, value, mask=fits)
        tl.store(indices + row * width + place, columns, mask=fits)
        used += tl.sum(flags, 0)
    rest = tl.arange(0, BLOCK_W)
    empty = (rest >= used) & (rest < width)
    tl.store(values + row * width + rest, tl.zeros((BLOCK_W,), dtype=tl.float32), mask=empty)
    tl.store(indices + row * width + rest, tl.zeros((BLOCK_W,), dtype=tl.int32), mask=empty)
    tl.store(counts + row, used)


@triton.jit
def weighted_rows(
    values, indices, offsets, weights, bias, out, d, width,
    CSR: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[row] = sum over the row's codes of value x weights[index] (+ bias), BLOCK_D columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if CSR:
        begin = tl.load(offsets + row)
        end = tl.load(offsets + row + 1)
    else:
        begin = row * width
        end = begin + width
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(begin, end, BLOCK_K):
        places = first + tl.arange(0, BLOCK_K)
        value = tl.load(values + places, mask=places < end, other=0.0).to(tl.float32)
        index = tl.load(indices + places, mask=places < end, other=0).to(tl.int64)
        # places that hold 0 cost no traffic
        there = (value != 0)[:, None] & (columns < d)[None, :]
        tile = tl.load(weights + index[:, None] * d + columns[None, :], mask=there, other=0.0)
        total += tl.sum(value[:, None] * tile.to(tl.float32), 0)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < d, other=0.0).to(tl.float32)
    tl.store(out + row * d + columns, total.to(out.dtype.element_ty), mask=columns < d)


@triton.jit
def scatter_rows(
    values, indices, rows, g, out, d, width, count,
    CSR: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[index] += value x g[row] for one code, by atomic additions: no order is promised."""
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    value = tl.load(values + place).to(tl.float32)
    index = tl.load(indices + place).to(tl.int64)
    row = tl.load(rows + place).to(tl.int64) if CSR else place // width
    there = columns < d
    tile = tl.load(g + row * d + columns, mask=there, other=0.0).to(tl.float32)
    tl.atomic_add(out + index * d + columns, value * tile, mask=there, sem="relaxed")


@triton.jit
def products(
    indices, rows, left, right, out, count, d, width,
    CSR: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[place] = left[row] . right[index] for BLOCK_K codes."""
    places = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    there = places < count
    index = tl.load(indices + places, mask=there, other=0).to(tl.int64)
    row = tl.load(rows + places, mask=there, other=0).to(tl.int64) if CSR else places // width
    total = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for begin in range(0, d, BLOCK_D):
        columns = begin + tl.arange(0, BLOCK_D)
        mask = there[:, None] & (columns < d)[None, :]
        a = tl.load(left + row[:, None] * d + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(right + index[:, None] * d + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(a * b, 1)
    tl.store(out + places, total, mask=there)


@triton.jit
def edit(
    x, w_enc, b_enc, theta, w_dec, values, gate, out, frames, m, d, amount,
    MODE: tl.constexpr, FLOOR: tl.constexpr, GATED: tl.constexpr, M: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """x + g sum_j (f'_j - f_j) W_dec[j] of BLOCK_F frames, m <= M latents.

    x is read twice, but by the same program at once: the second time it comes from the cache. MODE: 0 add, 1
    scale, 2 clamp, as in arguments.Change. SCALED: differences are rounded to float16 for the second product.
    """
    rows = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    latents = tl.arange(0, M)
    f = encode_tile(x, w_enc, b_enc, rows, latents, frames, m, d, BLOCK_D, PRECISION, UPCAST)
    least = tl.load(theta + latents, mask=latents < m, other=0.0).to(tl.float32)
    f = tl.where(f > tl.maximum(least, 0.0)[None, :], f, 0.0)
    value = tl.load(values + latents, mask=latents < m, other=0.0).to(tl.float32)[None, :]
    if MODE == 0:
        difference = amount * value + tl.zeros_like(f)
        if FLOOR:
            difference = tl.maximum(difference, -f)
    elif MODE == 1:
        difference = f * (tl.maximum(1 + amount * (value - 1), 0.0) - 1)
    else:
        difference = tl.minimum(amount, 1.0) * (value - f)
    difference = tl.where((latents < m)[None, :], difference, 0.0)
    inside = rows < frames
    if GATED:
        g = tl.load(gate + rows, mask=inside, other=0.0).to(tl.float32)
        difference = difference * g[:, None]
    if SCALED:
        # float16 ends at 65,504: each frame's differences are divided by the largest
        largest = tl.maximum(tl.max(tl.abs(difference), 1), 1e-30)
        difference = difference / largest[:, None]
    narrow = difference if UPCAST else difference.to(w_dec.dtype.element_ty)
    for begin in range(0, d, BLOCK_D):
        columns = begin + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (columns < d)[None, :]
        place = rows.to(tl.int64)[:, None] * d + columns[None, :]
        tile = tl.load(x + place, mask=mask, other=0.0)
        w_there = (latents < m)[:, None] & (columns < d)[None, :]
        w_tile = tl.load(w_dec + latents[:, None] * d + columns[None, :], mask=w_there, other=0.0)
        if UPCAST:
            w_tile = w_tile.to(tl.float32)
        added = tl.dot(narrow, w_tile, input_precision=PRECISION)
        if SCALED:
            added *= largest[:, None]
        changed = (tile.to(tl.float32) + added).to(out.dtype.element_ty)
        if GATED:
            changed = tl.where((g > 0)[:, None], changed, tile)
        tl.store(out + place, changed, mask=mask)

"""What an SAE is worth, measured on audio it was not trained on: sparsity, error, alive latents, duplicates.

Every number is over frames that hold audio (padding excluded), domains apart. The measures, for activations
x_t and reconstructions x^_t of T frames:

    L0   = mean_t number of latents above 0
    FVU  = sum_t |x_t - x^_t|^2 / sum_t |x_t - mean x|^2                     (mean over the domain's frames)
    L2   = mean_t |x_t - x^_t| / scale,   scale = sqrt(mean_t |x_t|^2)       (one scale per layer)

L2 is AudioSAE's (arXiv 2602.05027): activations divided by one scale per layer so that their mean square norm
is 1, then the mean Euclidean norm of the error, as dictionary_learning evaluates it. The scale is taken over
all domains with equal weights. Duplicates are AudioSAE's, too: latents with a twin in the same SAE, i.e. one
whose binary activation pattern over the frames has an intersection over union above 0.5 with theirs.

What a reconstruction costs recognition is in `calibration.splicing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from whisper_steer.sae import SparseAutoencoder

DUPLICATE_IOU = 0.5  # AudioSAE's chi: above it two latents are twins
_CODES = 2**25  # dense codes held at once: 128 MiB as float32
_TWIN_BLOCK = 512  # latents compared with all others at once


@dataclass(frozen=True)
class DomainQuality:
    """One SAE on the frames of one domain.

    Attributes:
        frames: number of frames measured.
        l0: active latents per frame.
        fvu: squared error / variance of the activations (0 is perfect, 1 is predicting the mean).
        alive: share of latents that are active in at least one of the frames.
        l2: mean norm of the error of activations scaled to mean square norm 1.
    """

    frames: int
    l0: float
    fvu: float
    alive: float
    l2: float


def _chunks(sae: SparseAutoencoder, x: Tensor) -> Iterator[Tensor]:
    """x (frames, d_model) piece by piece on the SAE's device, so that dense codes stay within memory."""
    size = max(1, _CODES // sae.n_latents)
    for start in range(0, len(x), size):
        yield x[start : start + size].to(sae.W_enc.device)


@torch.no_grad()
def calibrate_threshold(sae: SparseAutoencoder, x: Tensor, target_l0: float) -> float:
    """Set one threshold for all latents so that `target_l0` latents are active per frame of x (frames,
    d_model).

    The training form keeps exactly k per frame on average over a batch; the running mean of its smallest
    kept value drifts behind the weights, so the stored threshold is measured again on held-out audio.
    Returns it; 0 if fewer latents than the target are above 0.
    """
    wanted = round(target_l0 * len(x))
    # the largest `wanted` values of all chunks, found without holding every pre-activation
    largest = np.zeros(0, dtype=np.float32)
    for chunk in _chunks(sae, x):
        pre = sae.pre_activations(chunk).cpu().numpy().ravel()
        floor = largest.min() if len(largest) > wanted else 0.0
        largest = np.concatenate([largest, pre[pre > floor]])
        if len(largest) > wanted + 1:
            largest = np.partition(largest, len(largest) - wanted - 1)[-wanted - 1 :]
    # codes survive if pre > theta: theta is the largest value that must go
    theta = float(largest.min()) if len(largest) > wanted else 0.0
    sae.theta.fill_(theta)
    return theta


def input_scale(domains: Mapping[str, Tensor]) -> float:
    """sqrt of the mean square norm of activations (frames, d_model) per domain, domains weighing the same."""
    squares = [float(x.double().square().sum(dim=1).mean()) for x in domains.values() if len(x)]
    return float(np.sqrt(np.mean(squares))) or 1.0 if squares else 1.0


@torch.no_grad()
def domain_quality(sae: SparseAutoencoder, x: Tensor, *, scale: float | None = None) -> DomainQuality:
    """Measure an SAE on activations x (frames, d_model). scale: of L2 (None: from x alone)."""
    return _measure(sae, x, scale or input_scale({"x": x}))[0]


def _measure(
    sae: SparseAutoencoder, x: Tensor, scale: float, every: int | None = None
) -> tuple[DomainQuality, Tensor, sparse.csr_matrix | None]:
    """(quality, times each latent (n_latents,) was active, pattern of every `every`th frame if asked for)."""
    times = torch.zeros(sae.n_latents, dtype=torch.int64)
    if len(x) == 0:
        nothing = sparse.csr_matrix((0, sae.n_latents), dtype=np.int32) if every else None
        return DomainQuality(0, *[float("nan")] * 4), times, nothing
    squared, norms, seen = 0.0, 0.0, 0
    patterns: list[sparse.csr_matrix] = []
    for chunk in _chunks(sae, x):
        codes = sae.encode(chunk)
        active = codes > 0
        times += active.sum(dim=0).cpu()
        errors = (sae.decode(codes) - chunk).double().square().sum(dim=1)
        squared += float(errors.sum())
        norms += float(errors.sqrt().sum())
        if every:
            rows = active[-seen % every :: every]
            frames, latents = rows.nonzero(as_tuple=True)
            ones = np.ones(len(frames), dtype=np.int32)
            where = (frames.cpu().numpy(), latents.cpu().numpy())
            patterns.append(sparse.csr_matrix((ones, where), shape=tuple(rows.shape)))
        seen += len(chunk)
    variance = float((x - x.mean(dim=0)).double().square().sum())
    quality = DomainQuality(
        frames=len(x),
        l0=int(times.sum()) / len(x),
        fvu=squared / max(variance, 1e-12),
        alive=float((times > 0).float().mean()),
        l2=norms / len(x) / scale,
    )
    return quality, times, sparse.vstack(patterns, format="csr") if every else None


def duplicates(patterns: sparse.spmatrix | np.ndarray, *, iou: float = DUPLICATE_IOU) -> np.ndarray:
    """Which latents have a twin: (n_latents,) bool.

    patterns: (frames, n_latents), non-zero where a latent is active. Two latents are twins if the
    intersection over union of the frames in which they are active is above `iou` (0..1); latents that are
    never active have none. Co-occurrences are counted sparsely, block by block: the cost is the sum over
    frames of the squared number of active latents.
    """
    active = sparse.csc_matrix(patterns, dtype=np.int32, copy=True)
    active.sum_duplicates()
    active.data[:] = active.data != 0
    active.eliminate_zeros()
    counts = np.diff(active.indptr)
    # only latents that ever fire take part; rows are frames again, for a quick product
    alive = np.flatnonzero(counts)
    counts, active = counts[alive], active[:, alive]
    frames = active.tocsr()
    twin = np.zeros(len(alive), dtype=bool)
    for start in range(0, len(alive), _TWIN_BLOCK):
        common = (active[:, start : start + _TWIN_BLOCK].T.tocsr() @ frames).tocoo()
        first, second = common.row + start, common.col
        union = counts[first] + counts[second] - common.data
        twin[first[(first != second) & (common.data > iou * union)]] = True
    result = np.zeros(patterns.shape[1], dtype=bool)
    result[alive[twin]] = True
    return result


@torch.no_grad()
def measure_sae(
    sae: SparseAutoencoder, domains: Mapping[str, Tensor], *, duplicate_frames: int = 60_000
) -> dict[str, Any]:
    """JSON-able measures of an SAE on frames (frames, d_model) by domain; domains without any are left out.

    Holds: domains (name -> frames, l0, fvu, alive, l2); l0, fvu, l2 (means over domains of equal weight);
    input_scale; alive (share of latents active in any domain), dead (number active in none), duplicates
    (number with a twin), duplicate_frames (on how many frames, evenly spread over all, twins were sought: at
    most about `duplicate_frames`).
    """
    scale = input_scale(domains)
    total = sum(len(x) for x in domains.values())
    every = max(1, -(-total // duplicate_frames))
    times = torch.zeros(sae.n_latents, dtype=torch.int64)
    rows: dict[str, dict[str, Any]] = {}
    patterns: list[sparse.csr_matrix] = []
    for name, x in domains.items():
        if len(x) == 0:
            continue
        quality, active, pattern = _measure(sae, x, scale, every)
        rows[name] = asdict(quality)
        times += active
        patterns.append(pattern)
    joined = sparse.vstack(patterns, format="csr") if patterns else np.zeros((0, sae.n_latents), np.int32)
    means = {
        key: float(np.mean([row[key] for row in rows.values()])) if rows else None
        for key in ("l0", "fvu", "l2")
    }
    return {
        **means,
        "input_scale": scale,
        "alive": float((times > 0).float().mean()),
        "dead": int((times == 0).sum()),
        "duplicates": int(duplicates(joined).sum()),
        "duplicate_frames": int(joined.shape[0]),
        "domains": rows,
    }

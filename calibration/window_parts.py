"""What a gate can be given to read windows as a whole: probes, or a kernel, of some of its layers.

Probes are a logistic regression on both means of the pools (window and sound probes). A kernel is a support
vector machine on all three pools (`whisper_steer.window_kernel`), which costs more bytes. What either says is
known from fits without the windows that it judges, and is weighed beside the gate's frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.svm import SVC

from calibration.window_samples import WindowSample
from whisper_steer.gate import Gate
from whisper_steer.probe import Probe
from whisper_steer.window_kernel import WindowKernel

REGULARISATIONS = (0.3, 1.0, 3.0)  # C of the regression
COMPONENTS = 128  # of the standardised pools: what a kernel compares
WIDTHS = (1.0, 2.0)  # gamma of a kernel, in units of one over the number of pooled features
LINEAR = (0.0, 0.3)  # what the scalar product counts beside the radial function
PENALTY = 10.0  # C of the support vector machine
_FLAT = 1e-4  # of the widest: what varies less than this counts as so wide, for one over it must fit a half


def fit_probes(sample: WindowSample, layers: Sequence[int], c: float) -> tuple[tuple[Probe, ...], float]:
    """(one raw probe per place of the sample, the intercept) of the logit that nobody speaks; both classes
    weigh the same. layers: of the places."""
    mean = sample.x.mean(axis=0)
    std = np.maximum(sample.x.std(axis=0), 1e-6)
    features = ((sample.x - mean) / std).reshape(len(sample.x), -1)
    regression = LogisticRegression(C=c, max_iter=3000, class_weight="balanced")
    regression.fit(features, sample.nobody)
    coefficients = regression.coef_[0].reshape(len(layers), -1).astype(np.float32)
    probes = tuple(
        Probe(layer, "raw", torch.from_numpy(coefficients[i].copy()), mean=mean[i], std=std[i])
        for i, layer in enumerate(layers)
    )
    return probes, float(regression.intercept_[0])


def fit_kernel(
    sample: WindowSample, layers: Sequence[int], width: float, linear: float = 0.0, seed: int = 0
) -> WindowKernel:
    """A support vector machine on the principal components of the standardised pools, both classes weighing
    the same; its logit is the distance from the margin, in units of the margin.

    sample: of all pools of `layers`. linear: what the scalar product, over the number of pooled features,
    counts beside the radial function in how alike two windows are: where a sound is like none that is known,
    the radial function says nothing, and a line still goes on. Projection and landmarks are rounded to half
    precision, in which they are kept. All pairs of windows are held in memory: 8 bytes times n^2.
    """
    flat = sample.x.reshape(len(sample.x), -1).astype(np.float64)
    mean, std = flat.mean(axis=0), flat.std(axis=0)
    std = np.maximum(std, max(_FLAT * std.max(), _FLAT))
    standard = (flat - mean) / std
    count = min(COMPONENTS, *standard.shape)
    components = PCA(count, svd_solver="randomized", random_state=seed).fit(standard).components_
    projection = (components / std).astype(np.float16).astype(np.float64)
    z = ((flat - mean) @ projection.T).astype(np.float16).astype(np.float64)
    features = flat.shape[1]
    alike = rbf_kernel(z, gamma=width / features)
    if linear:
        alike += (linear / features) * (z @ z.T)
    machine = SVC(C=PENALTY, kernel="precomputed", class_weight="balanced", cache_size=1000)
    machine.fit(alike, sample.nobody)
    landmarks, weights = z[machine.support_], machine.dual_coef_[0]
    slopes = (linear / features) * (weights @ landmarks)
    return WindowKernel(
        layers=tuple(layers),
        projection=torch.from_numpy(projection),
        offset=torch.from_numpy(projection @ mean),
        landmarks=torch.from_numpy(landmarks),
        weights=torch.from_numpy(weights),
        gamma=width / features,
        intercept=float(machine.intercept_[0]),
        linear=torch.from_numpy(slopes) if linear else None,
    )


def scaled(kernel: WindowKernel, slope: float, start: float) -> WindowKernel:
    """The kernel whose logits are slope times as large, plus start."""
    return replace(
        kernel,
        weights=slope * kernel.weights,
        linear=None if kernel.linear is None else slope * kernel.linear,
        intercept=slope * kernel.intercept + start,
    )


@dataclass(frozen=True)
class Part:
    """What is added to a gate, and what it says of windows that it was fitted without.

    Attributes:
        row: what it is, for the table. add: (gate, share) -> the gate with it, weighing so much.
        said, of_sample: of calibration's windows and of the training ones, as logits.
    """

    row: Mapping[str, float]
    share_name: str
    add: Callable[[Gate, float], Gate]
    said: np.ndarray
    of_sample: np.ndarray

    def weighed(self, gate: Gate, share: float) -> Tried:
        """The gate with it."""
        row = {self.share_name: share, **self.row}
        return Tried(row, self.add(gate, share), share * self.said, share * self.of_sample)


@dataclass(frozen=True)
class Tried:
    """A gate to try, and what was added to it says, out of fold."""

    row: Mapping[str, float]
    gate: Gate
    said: np.ndarray
    of_sample: np.ndarray


Judge = Callable[
    [Callable[[WindowSample], Callable[[np.ndarray], np.ndarray]]], tuple[np.ndarray, np.ndarray]
]


def depths(gate: Gate) -> list[int]:
    """How many of the gate's layers, from the first, window fits read: half of them or more. The last ones
    know most of words, but less of voices that they were not fitted on."""
    count = len(gate.layers)
    return list(range((count + 1) // 2, count + 1))


def _places(gate: Gate, count: int, pools: int) -> list[int]:
    """Of the first `count` layers among the pools of all layers."""
    return [pool * len(gate.layers) + layer for pool in range(pools) for layer in range(count)]


def best_probes(gate: Gate, whole: WindowSample, judge: Judge, own: WindowSample, spoken: np.ndarray) -> Part:
    """Window and sound probes, of the C (of all layers) and then the depth under which those fitted without a
    window say most of it."""

    def only(part: WindowSample, count: int) -> WindowSample:
        return WindowSample(part.x[:, _places(gate, count, 2)], part.nobody)

    def layers(count: int) -> tuple[int, ...]:
        return (*gate.layers[:count], *gate.layers[:count])

    def fit(part: WindowSample, count: int, c: float) -> Callable[[np.ndarray], np.ndarray]:
        probes, intercept = fit_probes(only(part, count), layers(count), c)
        return lambda x: _said(probes, intercept, x[:, _places(gate, count, 2)])

    said: dict[tuple[int, float], tuple[np.ndarray, np.ndarray]] = {}

    def loss(one: tuple[int, float]) -> float:
        if one not in said:
            said[one] = judge(partial(fit, count=one[0], c=one[1]))
        return _loss(said[one][0][own.nobody], said[one][0][spoken])

    _, c = min(((len(gate.layers), c) for c in REGULARISATIONS), key=loss)
    count, c = min(((count, c) for count in depths(gate)), key=loss)
    probes, intercept = fit_probes(only(whole, count), layers(count), c)

    def add(gate: Gate, share: float) -> Gate:
        weighed = tuple(replace(probe, coef=share * probe.coef) for probe in probes)
        return replace(
            gate,
            window_probes=weighed[:count],
            sound_probes=weighed[count:],
            window_intercept=share * intercept,
        )

    return Part({"window_c": c, "window_layers": float(count)}, "window_share", add, *said[count, c])


def kernel_of(
    gate: Gate,
    count: int,
    width: float,
    linear: float,
    whole: WindowSample,
    judge: Judge,
    known: np.ndarray,
    nobody: np.ndarray,
) -> Part:
    """A kernel of the gate's first `count` layers, its logits scaled by what it says out of fold."""
    layers, places = gate.layers[:count], _places(gate, count, 3)

    def only(part: WindowSample) -> WindowSample:
        return WindowSample(part.x[:, places], part.nobody)

    def fit(part: WindowSample) -> Callable[[np.ndarray], np.ndarray]:
        kernel = fit_kernel(only(part), layers, width, linear)
        return lambda x: np.asarray(kernel.logits(torch.from_numpy(x[:, places])).double())

    said, of_sample = judge(fit)
    slope, start = _as_logit(said[known], nobody[known])
    kernel = scaled(fit_kernel(only(whole), layers, width, linear), slope, start)
    row = {
        "kernel_width": width,
        "kernel_linear": linear,
        "kernel_layers": float(count),
        "landmarks": float(len(kernel.weights)),
    }

    def add(gate: Gate, share: float) -> Gate:
        return replace(gate, kernel=kernel, kernel_share=share)

    return Part(row, "kernel_share", add, slope * said + start, slope * of_sample + start)


def _as_logit(said: np.ndarray, nobody: np.ndarray) -> tuple[float, float]:
    """(slope, start) of Platt's scaling: slope * said + start is the logit; both classes weigh the same."""
    regression = LogisticRegression(C=1e3, class_weight="balanced").fit(said[:, None], nobody)
    return float(regression.coef_[0, 0]), float(regression.intercept_[0])


def _loss(nobody: np.ndarray, spoken: np.ndarray) -> float:
    """Mean cross-entropy (nats) of logits that nobody speaks, both classes weighing the same."""
    return float(np.logaddexp(0.0, -nobody).mean() + np.logaddexp(0.0, spoken).mean()) / 2


def _said(probes: Sequence[Probe], intercept: float, x: np.ndarray) -> np.ndarray:
    """(windows, places, d_model) -> (windows,) float64."""
    parts = [probe.logits(torch.from_numpy(x[:, i])) for i, probe in enumerate(probes)]
    return np.asarray((torch.stack(parts).sum(dim=0) + intercept).double())

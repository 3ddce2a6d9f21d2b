"""The Gate: says how surely nobody speaks, so that edits spare speech and empty windows are withheld."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import UsageError
from .plaindata import set_int, set_number
from .probe import Probe
from .window_kernel import WindowKernel

# a frame this surely spoken is not touched at all, so that clear speech stays bit-identical
MIN_FRAME_GATE = 0.01
PROBES = ("probes", "window_probes", "sound_probes")  # a gate's fields that hold them


@dataclass(frozen=True, eq=False)
class Gate:
    """Says, per 20 ms frame and per 30 s window, how surely *nobody* speaks.

    The logit of a frame is the sum of its probes (one to four layers, ascending) and the intercept,
    averaged over `smooth` frames (odd).
    threshold: the window logit above which a window is withheld at alpha 1; spread: how much it rises where
    alpha is halved, and falls where it is doubled. frame_scale, frame_bias: slope and centre of the per-frame
    gate.
    window_probes, sound_probes: read the window as a whole: raw activations of some of the gate's layers,
    averaged over its frames by how likely each is speech (softmax of minus the frame logits), and evenly over
    the frames before the padding; their logits and window_intercept are added to the window's.
    kernel: reads both averages and the standard deviation over the frames before the padding; its logit,
    kernel_share times, is added, too. Without any of these, the frame most like speech decides alone.
    min_run: the per-frame gate stays shut in stretches of fewer frames than this: a pause inside a sentence
    is speech. margin: it also stays shut for so many frames beside what it took for speech, whose onsets and
    ends are soft.
    """

    probes: tuple[Probe, ...]
    intercept: float
    smooth: int
    threshold: float
    spread: float
    frame_scale: float
    frame_bias: float
    min_run: int = 1
    margin: int = 0
    window_probes: tuple[Probe, ...] = ()
    window_intercept: float = 0.0
    sound_probes: tuple[Probe, ...] = ()
    kernel: WindowKernel | None = None
    kernel_share: float = 1.0

    def __post_init__(self) -> None:
        for name in PROBES:
            object.__setattr__(self, name, tuple(getattr(self, name)))
            probes, what = getattr(self, name), name.replace("_", " ")
            layers = [probe.layer for probe in probes]
            if layers != sorted(set(layers)) or (name == "probes" and not layers):
                raise UsageError(f"gate has {what} on layers {layers}: expected one each, ascending")
            if extra := [layer for layer in layers if layer not in self.layers]:
                raise UsageError(
                    f"gate has a {what[:-1]} on layer {extra[0]}: expected some of {self.layers}"
                )
            if name != "probes" and any(probe.kind != "raw" for probe in probes):
                raise UsageError(f"gate has a {what[:-1]} on latents: expected kind 'raw'")
        if self.kernel and (extra := [layer for layer in self.kernel.layers if layer not in self.layers]):
            raise UsageError(f"gate has a kernel on layer {extra[0]}: expected some of {self.layers}")
        widths = {probe.d_model for name in PROBES for probe in getattr(self, name)}
        if len(widths | ({self.kernel.d_model} if self.kernel else set())) > 1:
            raise UsageError("gate has probes of different d_model: expected those of one model")
        for name in ("intercept", "threshold", "spread", "frame_scale", "frame_bias", "window_intercept"):
            set_number(self, name)
        set_number(self, "kernel_share")
        if self.spread < 0:
            raise UsageError(f"gate has spread {self.spread}: expected a number >= 0")
        set_int(self, "smooth", 1)
        if self.smooth % 2 == 0:
            raise UsageError(f"gate has smooth {self.smooth}: expected an odd number of frames")
        set_int(self, "min_run", 1)
        set_int(self, "margin", 0)

    @property
    def layer(self) -> int:
        """The last layer that is read: what the gate says is known from there on."""
        return self.probes[-1].layer

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(probe.layer for probe in self.probes)

    @property
    def d_model(self) -> int:
        return self.probes[0].d_model

    @property
    def kind(self) -> str:
        """Of its probes: "latents", "raw" or "latents+raw"."""
        return "+".join(sorted({probe.kind for probe in self.probes}))

    @property
    def n_features(self) -> int:
        return sum(len(probe.coef) for probe in self.probes)

    def part(self, layer: int, x: Tensor) -> Tensor:
        """(batch, frames, d_model), the output of block `layer` -> (batch, frames): what that layer's
        probe adds to the logits. Raises KeyError if it has none."""
        return {probe.layer: probe for probe in self.probes}[layer].logits(x)

    def frame_logits(self, streams: Tensor | Mapping[int, Tensor]) -> Tensor:
        """(batch, frames, d_model) of its layer, or by layer -> (batch, frames): smoothed logit that nobody
        speaks in the frame."""
        by_layer = streams if isinstance(streams, Mapping) else {self.layer: streams}
        if missing := [layer for layer in self.layers if layer not in by_layer]:
            raise UsageError(f"the gate reads layers {self.layers}: pass that of layer {missing[0]}, too")
        parts = [self.part(layer, by_layer[layer]) for layer in self.layers]
        return self.smoothed(torch.stack(parts).sum(dim=0))

    def smoothed(self, parts: Tensor) -> Tensor:
        """The sum of all parts (batch, frames) -> the frames' logits: the intercept and the moving
        average."""
        logits = parts + self.intercept
        if self.smooth == 1 or logits.shape[-1] == 0:
            return logits
        # count_include_pad=False: at the edges the mean is over the frames that exist
        pooled = F.avg_pool1d(
            logits.unsqueeze(1), self.smooth, stride=1, padding=self.smooth // 2, count_include_pad=False
        )
        return pooled.squeeze(1)

    @property
    def window_layers(self) -> tuple[int, ...]:
        """Layers whose streams `window_logit` needs, ascending."""
        read = {probe.layer for probe in (*self.window_probes, *self.sound_probes)}
        return tuple(sorted(read.union(self.kernel.layers if self.kernel else ())))

    @property
    def needs_padding(self) -> bool:
        """Must `window_logit` be told where the padding is?"""
        return bool(self.sound_probes or self.kernel)

    def window_logit(
        self,
        frame_logits: Tensor,
        streams: Mapping[int, Tensor] | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """(batch, frames) -> (batch,): the minimum, so the frame most like speech decides; plus what the
        window and sound probes and the kernel say.

        streams: by layer (batch, frames, d_model), at least the `window_layers`. padding: (batch, frames)
        bool, see `passing.padding_frames`; None: there is none. Raises UsageError if a stream is missing.
        """
        lowest = frame_logits.amin(dim=-1)
        streams = streams or {}
        if missing := [layer for layer in self.window_layers if layer not in streams]:
            raise UsageError(
                f"to judge windows the gate reads layers {self.window_layers}: pass {missing[0]}, too"
            )
        said = [
            probe.logits(likely_speech(frame_logits, streams[probe.layer])) for probe in self.window_probes
        ]
        said += [probe.logits(mean_of_sound(streams[probe.layer], padding)) for probe in self.sound_probes]
        if said:
            said.append(torch.full_like(lowest, self.window_intercept))
        if self.kernel:
            pooled = pooled_windows(frame_logits, [streams[layer] for layer in self.kernel.layers], padding)
            said.append(self.kernel_share * self.kernel.logits(pooled))
        return lowest + torch.stack(said).sum(dim=0) if said else lowest

    def frame_gate(self, frame_logits: Tensor, shut: Tensor | None = None) -> Tensor:
        """(batch, frames) -> (batch, frames) in [0, 1]: how much of an edit a frame gets; 0 below 0.01, in
        stretches shorter than min_run, and within `margin` frames of these.
        shut: (batch, frames) bool, where it is 0, too, but beside which there is no margin."""
        g = torch.sigmoid(self.frame_scale * (frame_logits - self.frame_bias))
        open_ = g >= MIN_FRAME_GATE  # False for NaN, too
        if shut is not None:
            open_ = open_ & ~shut
        if self.min_run > 1 and open_.shape[-1] > 0:
            open_ = _long_runs(open_, self.min_run)
        if self.margin > 0 and open_.shape[-1] > 0:
            speech = ~open_ if shut is None else ~(open_ | shut)
            near = F.max_pool1d(speech.float().unsqueeze(1), 2 * self.margin + 1, 1, self.margin)
            open_ = open_ & (near.squeeze(1) == 0)
        return torch.where(open_, g, torch.zeros_like(g))

    def window_threshold(self, alpha: float) -> float:
        """Window logit above which the window's words are withheld; infinite at alpha 0."""
        if alpha <= 0:
            return math.inf
        return self.threshold - self.spread * math.log2(alpha)


def pooled_windows(frame_logits: Tensor, streams: Sequence[Tensor], padding: Tensor | None) -> Tensor:
    """(batch, frames), by layer (batch, frames, d_model), (batch, frames) bool -> (batch, 3 * layers,
    d_model), float32: `likely_speech` of every layer, then `mean_of_sound`, then `spread_of_sound`."""
    odds, even = _odds(frame_logits), _sound_weights(frame_logits, padding)
    weights = torch.cat([odds, even], dim=-2)  # one product per layer gives both means
    pools: list[list[Tensor]] = [[], [], []]
    for stream in streams:
        x = stream.float()
        means = weights @ x
        spread = (even @ (x - means[:, 1:]).square()).sqrt()
        for pool, one in zip(pools, (means[:, :1], means[:, 1:], spread), strict=True):
            pool.append(one)
    return torch.cat([one for pool in pools for one in pool], dim=1)


def likely_speech(frame_logits: Tensor, x: Tensor) -> Tensor:
    """(batch, frames), (batch, frames, d_model) -> (batch, d_model), float32: the mean of x over the frames,
    each weighted by the odds exp(-logit) that somebody speaks in it."""
    return (_odds(frame_logits) @ x.float()).squeeze(-2)


def mean_of_sound(x: Tensor, padding: Tensor | None) -> Tensor:
    """(batch, frames, d_model), (batch, frames) bool -> (batch, d_model), float32: the mean of x over the
    frames that are not padding; over all of a window that is nothing else."""
    return (_sound_weights(x[..., 0], padding) @ x.float()).squeeze(-2)


def spread_of_sound(x: Tensor, padding: Tensor | None) -> Tensor:
    """As `mean_of_sound`, the standard deviation over those frames (of n, not n - 1)."""
    weights, x = _sound_weights(x[..., 0], padding), x.float()
    return (weights @ (x - weights @ x).square()).squeeze(-2).sqrt()


def _odds(frame_logits: Tensor) -> Tensor:
    """(batch, frames) -> (batch, 1, frames), float32: the odds that somebody speaks; their sum is 1."""
    return torch.softmax(-frame_logits.float(), dim=-1).unsqueeze(-2)


def _sound_weights(like: Tensor, padding: Tensor | None) -> Tensor:
    """(batch, 1, frames), float32: even over the frames that are not padding, over all if there are none;
    their sum is 1. like: (batch, frames)."""
    if padding is None:
        padding = torch.zeros_like(like, dtype=torch.bool)
    sound = ~padding | padding.all(dim=-1, keepdim=True)
    return (sound / sound.sum(dim=-1, keepdim=True)).unsqueeze(-2)


def _long_runs(mask: Tensor, length: int) -> Tensor:
    """(batch, frames) bool: only the runs of True that are at least that long (a morphological opening). A
    run at the window's edge goes on beyond it, so it counts as long."""
    closed = F.pad((~mask).float().unsqueeze(1), (length - 1, length - 1))
    # eroded[i]: the whole run of `length` frames from i - (length - 1) on is open
    eroded = 1 - F.max_pool1d(closed, length, stride=1)
    return F.max_pool1d(eroded, length, stride=1).squeeze(1) > 0

"""One pass through a steered encoder: gates read it, edits change it, what lies before a gate runs again.

A gate knows who speaks when its last layer is reached. Edits from that layer on are applied on the way.
For edits
at earlier layers the pass goes back: the stream of the first of them was kept, is edited now, and the blocks
up to the gate's layer run a second time, only for the windows that the edits change.

Padding behind a clip's end, and digital silence up to the end of the window, says nothing about speech and
has no sound to take out: gated edits leave it as it is, unless the gate withholds the window anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .steering import Steering

if TYPE_CHECKING:
    from .attach import Handle

FRAME_SECONDS = 0.02  # an encoder frame

# runs an encoder block by its number, unsteered: (layer, x (batch, frames, d_model)) -> the same shape
RunBlock = Callable[[int, Tensor], Tensor]


@dataclass(eq=False)
class Step:
    """One handle's part in one encoder pass. alpha was read once, when the pass began."""

    handle: Handle
    alpha: float
    steering: Steering
    logits: Tensor | None = None  # (batch, frames): the sum of the gate's parts read so far
    frame_gate: Tensor | None = None  # (batch, frames)
    window_logit: Tensor | None = None  # (batch,)
    streams: dict[int, Tensor] = field(default_factory=dict)  # those that the gate's window probes wait for
    padding: Tensor | None = None  # (batch, frames) bool, see `padding_frames`; None: not known

    @property
    def ready(self) -> bool:
        """Is it known where to edit?"""
        return self.steering.gate is None or self.frame_gate is not None

    def read(self, layer: int, x: Tensor) -> bool:
        """Let the gate read the output of block `layer`; True if it has now read all it needs."""
        gate = self.steering.gate
        if gate is None or layer not in gate.layers:
            return False
        part = gate.part(layer, x)
        self.logits = part if self.logits is None else self.logits + part
        if layer in gate.window_layers:
            self.streams[layer] = x
        if layer < gate.layer:
            return False
        logits = gate.smoothed(self.logits)
        self.window_logit = gate.window_logit(logits, self.streams, self.padding)
        self.frame_gate = gate.frame_gate(logits, self._left_alone())
        self.streams.clear()
        return True

    def forget(self) -> None:
        """Be ready for another pass of the same encoder."""
        self.logits = self.frame_gate = self.window_logit = self.padding = None
        self.streams.clear()

    def _left_alone(self) -> Tensor | None:
        """(batch, frames) bool: the padding of the windows that keep their words."""
        withheld = self.withholds()
        return None if self.padding is None or withheld is None else self.padding & ~withheld.unsqueeze(1)

    def withholds(self) -> Tensor | None:
        """(batch,) bool: the windows whose words the gate withholds; None without a gate."""
        if self.steering.gate is None or self.window_logit is None:
            return None
        return self.window_logit > self.steering.gate.window_threshold(self.alpha)


def padding_frames(mel: Tensor) -> Tensor:
    """(batch, n_mels, 2 * frames), what goes into the encoder -> (batch, frames) bool: from there to the end
    of the window every mel frame has one value in all its bins, as where a clip has ended or its samples are
    zero (or all bins lie more than 80 dB below the loudest: `log_mel_spectrogram` cuts there)."""
    same = (mel == mel[:, :1, :]).all(dim=1)
    to_the_end = same.flip(1).cumprod(dim=1).flip(1).bool()
    return to_the_end[:, ::2]  # the encoder halves the rate


def edited_stretches(steps: Sequence[Step], count: int) -> list[tuple[tuple[float, float], ...]]:
    """Per window of a pass that has ended: where gated edits acted, (start, end) in seconds from its start.

    Edits without a gate act everywhere and are not listed: that much is known without asking. An edit of a
    layer of which `LatentEdit` finds nothing to change still counts: its gate was open.
    """
    gates = [step.frame_gate for step in steps if step.steering.edits and step.frame_gate is not None]
    if not gates:
        return [()] * count
    open_ = torch.stack([gate > 0 for gate in gates]).any(dim=0)
    closed = open_.new_zeros(len(open_), 1)
    steps_at = torch.cat([closed, open_, closed], dim=1).to(torch.int8).diff(dim=1).cpu()
    return [
        tuple(
            (FRAME_SECONDS * first, FRAME_SECONDS * end)
            for first, end in zip(
                (row == 1).nonzero().flatten().tolist(),
                (row == -1).nonzero().flatten().tolist(),
                strict=True,
            )
        )
        for row in steps_at
    ]


@dataclass(eq=False)
class Pass:
    """The steps of an encoder pass. of_decode: it belongs to `decode`, else to a bare call of the encoder."""

    steps: tuple[Step, ...]
    of_decode: bool
    rewinding: bool = False  # blocks are being run again: they are steered from here, not by their hooks
    _kept: dict[int, Tensor] = field(default_factory=dict)  # outputs of blocks that edits may go back to

    def begin(self, mel: Tensor) -> None:
        """Look at what the encoder is about to read: mel (batch, n_mels, frames). What an earlier pass has
        left is forgotten: a runtime may encode some of the windows again, as transformers does for those that
        it decodes at another temperature."""
        self._kept.clear()
        for step in self.steps:
            step.forget()
        gated = [
            step
            for step in self.steps
            if (gate := step.steering.gate) is not None and (step.steering.edits or gate.needs_padding)
        ]
        if gated:
            padding = padding_frames(mel)
            for step in gated:
                step.padding = padding

    def after_block(self, layer: int, output: Tensor, block: RunBlock) -> Tensor | None:
        """What block `layer` is taken to have put out; None: its output as it is. output: (batch, frames,
        d_model)."""
        if any(layer in step.steering.early_layers for step in self.steps):
            self._kept[layer] = output
        done = [step for step in self.steps if step.read(layer, output)]
        back = [step for step in done if step.steering.early_layers]
        x = self._again(back, layer, output, block) if back else output
        x = self._edited(layer, x, None)
        return None if x is output else x

    def _edited(self, layer: int, x: Tensor, rows: Tensor | None) -> Tensor:
        """x after the edits at `layer` of every step that knows where. rows: the windows that x holds."""
        for step in self.steps:
            if step.ready:
                g = step.frame_gate if rows is None or step.frame_gate is None else step.frame_gate[rows]
                x = step.steering.edit(x, layer, step.alpha, g)
        return x

    def _again(self, back: Sequence[Step], layer: int, output: Tensor, block: RunBlock) -> Tensor:
        """The output of block `layer` with the early edits of `back`; `output` itself if they change
        nothing."""
        first = min(step.steering.early_layers[0] for step in back)
        rows = self._changed(back, output)
        if not rows.numel():
            return output
        x = self._edited(first, self._kept[first][rows], rows)
        self.rewinding = True
        try:
            for number in range(first + 1, layer + 1):
                x = block(number, x)
                if number < layer:
                    x = self._edited(number, x, rows)
        finally:
            self.rewinding = False
        if len(rows) == len(output):
            return x
        result = output.clone()
        result[rows] = x
        return result

    def _changed(self, back: Sequence[Step], output: Tensor) -> Tensor:
        """Numbers of the windows that an early edit changes. A window that is withheld anyway is not
        changed: what would have been written in it is what plain Whisper writes."""
        changed = torch.zeros(len(output), dtype=torch.bool, device=output.device)
        for step in back:
            for layer in step.steering.early_layers:
                before = self._kept[layer]
                edited = step.steering.edit(before, layer, step.alpha, step.frame_gate)
                if edited is not before:
                    changed |= (edited != before).flatten(1).any(dim=1)
        if self.of_decode:
            for step in self.steps:
                withheld = step.withholds()
                if withheld is not None:
                    changed &= ~withheld
        return changed.nonzero().flatten()

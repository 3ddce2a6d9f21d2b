"""A Steering: edits, an optional gate, and the file that holds them. `attach.steer` puts one on a model.

The parts are documented where they are defined (edits.py, gate.py) and can all be imported from here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .edits import Edit, LatentEdit, MeanAblation, Shift, gated
from .errors import FormatError, MismatchError, UsageError
from .fileformat import UNNAMED, encoder_sha256, load_tensors, model_name, save_tensors
from .gate import PROBES, Gate
from .plaindata import moved, split, with_prefix
from .probe import Probe
from .profiles import FrontierPoint, alpha_of, point_at, read_frontier, read_profiles
from .window_kernel import WindowKernel

__all__ = ["Edit", "FrontierPoint", "Gate", "LatentEdit", "MeanAblation", "Probe", "Shift", "Steering"]

logger = logging.getLogger("whisper_steer")

KIND = "steering"
_EDIT_TYPES: dict[str, type[Shift] | type[LatentEdit] | type[MeanAblation]] = {
    "shift": Shift, "latents": LatentEdit, "mean_ablation": MeanAblation,
}  # fmt: skip
_TYPE_NAMES = {kind: name for name, kind in _EDIT_TYPES.items()}
_EMPTY_CARD: dict[str, Any] = {
    "base_model": None,
    "encoder_sha256": None,
    "n_layers": None,
    "calibrated_on": {},
    "rates": {},
    "recipe": {},
    "licence": "MIT",
}


@dataclass(frozen=True, eq=False)
class Steering:
    """Edits applied in order (an edit sees the ones before it), scaled per frame by the gate if there is one.

    The gate reads the stream before any of its steering's edits. An edit may be at an earlier layer than
    the gate's last one: the blocks between them are then run again, for the windows that the edit changes
    (registry.Pass).
    metadata: name, base_model, encoder_sha256, d_model, n_layers, calibrated_on, rates, recipe, licence, ...
    (`fileformat.model_metadata(model)` gives the ones that `check` compares); profiles and frontier: see
    profiles.py.
    """

    edits: tuple[Edit, ...]
    gate: Gate | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))
        parts = self._parts()
        if not parts:
            raise UsageError("a steering needs at least one edit or a gate, got neither")
        widths = sorted({part.d_model for part in parts})
        if len(widths) > 1:
            raise UsageError(f"a steering's parts have different d_model: {', '.join(map(str, widths))}")
        read_profiles(self.metadata)  # a damaged record is refused now, not when it is asked for
        read_frontier(self.metadata)

    @property
    def d_model(self) -> int:
        return self._parts()[0].d_model

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that are read or edited, ascending."""
        gates = () if self.gate is None else self.gate.layers
        return tuple(sorted({*gates, *(edit.layer for edit in self.edits)}))

    @property
    def early_layers(self) -> tuple[int, ...]:
        """Layers of edits that come before the gate's last one, ascending."""
        last = -1 if self.gate is None else self.gate.layer
        return tuple(sorted({edit.layer for edit in self.edits if edit.layer < last}))

    @property
    def name(self) -> str:
        return str(self.metadata.get("name") or "unnamed")

    @property
    def profiles(self) -> Mapping[str, float]:
        """Named strengths: name -> alpha, ascending, read-only; empty if none are stored."""
        return read_profiles(self.metadata)

    @property
    def frontier(self) -> tuple[FrontierPoint, ...]:
        """What the calibration measured at some alphas, ascending; empty if none are stored."""
        return read_frontier(self.metadata)

    def alpha_of(self, profile: str) -> float:
        """The alpha of a profile. Raises UsageError (no such profile, or none at all)."""
        base = self.metadata.get("base_model")
        return alpha_of(self.profiles, profile, self.name, None if base is None else str(base))

    def measured(self, alpha: float) -> FrontierPoint | None:
        """The frontier's point at this very alpha, if one was measured."""
        return point_at(self.frontier, alpha)

    def edit(self, x: Tensor, layer: int, alpha: float, frame_gate: Tensor | None = None) -> Tensor:
        """Apply this layer's edits to x (batch, frames, d_model); x itself if there is nothing to do.

        frame_gate (batch, frames) in [0, 1] scales every edit: x + g (x' - x), untouched where g is 0.
        """
        for edit in self.edits:
            if edit.layer == layer:
                x = gated(edit, x, alpha, frame_gate)
        return x

    def to(self, device: torch.device | str) -> Steering:
        """The same steering with its tensors on `device`."""
        gate = self.gate
        if gate is not None:
            probes: dict[str, Any] = {
                name: tuple(moved(probe, device) for probe in getattr(gate, name)) for name in PROBES
            }
            kernel = None if gate.kernel is None else moved(gate.kernel, device)
            gate = replace(gate, kernel=kernel, **probes)
        return replace(self, edits=tuple(moved(edit, device) for edit in self.edits), gate=gate)

    def check(self, model: Any, *, strict: bool = True) -> None:
        """Raises MismatchError unless this steering was made for `model` (an openai-whisper Whisper).

        strict=False: an encoder of the right shape with other weights is only warned about.
        """
        d, n = model.dims.n_audio_state, model.dims.n_audio_layer
        own_n = self.metadata.get("n_layers")
        own_name, name = self.metadata.get("base_model") or "an unknown model", model_name(model)
        way_out = (
            "pass steering=... made for it, or make one: whisper-steer calibrate --model "
            f"{'MODEL' if name == UNNAMED else name} --nonspeech DIR --speech MANIFEST --out FILE"
        )
        name = "one without a name" if name == UNNAMED else name
        if self.d_model != d or (own_n is not None and own_n != n) or max(self.layers) >= n:
            blocks = f"{own_n} blocks" if own_n is not None else f"at least {max(self.layers) + 1} blocks"
            raise MismatchError(
                f"steering is for {own_name} (d_model {self.d_model}, {blocks}), "
                f"the model is {name} (d_model {d}, {n} blocks): {way_out}"
            )
        own_sha = self.metadata.get("encoder_sha256")
        if own_sha is None or own_sha == (sha := encoder_sha256(model)):
            return
        message = (
            f"steering is for {own_name} with encoder {str(own_sha)[:12]}, "
            f"the model is {name} with encoder {sha[:12]} of the same shape"
        )
        if strict:
            raise MismatchError(f"{message}: {way_out}")
        logger.warning("%s: its effect is not calibrated", message)

    def save(self, path: str | Path) -> None:
        """Write atomically. Raises FormatError if it cannot be written."""
        tensors: dict[str, Tensor] = {}
        edits = [
            {"type": _TYPE_NAMES[type(edit)], **split(edit, f"edits.{number}.", tensors)}
            for number, edit in enumerate(self.edits)
        ]
        structure = {
            "kind": KIND,
            "d_model": self.d_model,
            "layers": list(self.layers),
            "edits": edits,
            "gate": None if self.gate is None else _gate_record(self.gate, tensors),
        }
        save_tensors(path, tensors, {"name": Path(path).stem, **_EMPTY_CARD, **self.metadata, **structure})

    @classmethod
    def load(cls, path: str | Path) -> Steering:
        """Read what `save` wrote. Raises FormatError (missing, corrupt, another kind, inconsistent)."""
        tensors, metadata = load_tensors(path, KIND)
        try:
            records, gate_record = metadata.pop("edits"), metadata.pop("gate")
            edits = tuple(_read_edit(record, number, tensors) for number, record in enumerate(records))
            gate = None if gate_record is None else _read_gate(gate_record, tensors)
            return cls(edits, gate, metadata)
        except UsageError as error:
            raise FormatError(f"{path}: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise FormatError(f"{path} is damaged inside ({reason}): make or fetch it again") from error

    def _parts(self) -> tuple[Edit | Gate, ...]:
        return self.edits if self.gate is None else (*self.edits, self.gate)


def _read_edit(record: dict[str, Any], number: int, tensors: dict[str, Tensor]) -> Edit:
    plain = {key: value for key, value in record.items() if key != "type"}
    arguments: dict[str, Any] = {**plain, **with_prefix(f"edits.{number}.", tensors)}
    return _EDIT_TYPES[record["type"]](**arguments)


def _gate_record(gate: Gate, tensors: dict[str, Tensor]) -> dict[str, Any]:
    plain = split(gate, "gate.", tensors)
    for name in PROBES:
        probes = [split(probe, f"gate.{name}.{n}.", tensors) for n, probe in enumerate(getattr(gate, name))]
        plain[name] = probes
    if gate.kernel is not None:
        mine: dict[str, Tensor] = {}
        plain["kernel"] = split(gate.kernel, "gate.kernel.", mine)
        tensors.update({name: _halved(tensor) for name, tensor in mine.items()})
    return plain


def _halved(tensor: Tensor) -> Tensor:
    """In half precision if that keeps every value: kernels are fitted with such."""
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor


def _read_gate(record: dict[str, Any], tensors: dict[str, Tensor]) -> Gate:
    probes = {
        name: tuple(
            Probe(**{**plain, **with_prefix(f"gate.{name}.{n}.", tensors)})
            for n, plain in enumerate(record.get(name, ()))
        )
        for name in PROBES
    }
    kernel = record.get("kernel")
    if kernel is not None:
        kernel = WindowKernel(**{**kernel, **with_prefix("gate.kernel.", tensors)})
    return Gate(**{**record, **probes, "kernel": kernel})

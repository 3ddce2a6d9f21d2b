"""What is in one of our files, as plain JSON types. The whole file is read, so a damaged one is found out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import FormatError
from .fileformat import load_metadata, load_tensors
from .sae import SparseAutoencoder
from .steering import Edit, Gate, MeanAblation, Shift, Steering

_STRUCTURE = ("edits", "gate", "dims")  # said in another way below


def describe(path: str | Path) -> list[dict[str, Any]]:
    """One description per file: of `path`, or of every .safetensors in the folder `path`.

    Keys: "file", "bytes", "kind", then what the kind has: for a steering "edits", "gate", "profiles" and
    "frontier", for an SAE its sizes and thresholds, for a model its dimensions; then the file's metadata.
    Raises FormatError: missing, damaged, of another program, a folder without such files.
    """
    path = Path(path)
    if not path.is_dir():
        return [_describe_file(path)]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise FormatError(f"{path}: no .safetensors file in this folder")
    return [_describe_file(file) for file in files]


def _describe_file(path: Path) -> dict[str, Any]:
    metadata = load_metadata(path)
    kind = metadata["kind"]
    details = {"sae": _sae, "steering": _steering}.get(kind, _other)(path, metadata)
    rest = {key: value for key, value in metadata.items() if key not in (*_STRUCTURE, *details, "kind")}
    return {"file": str(path), "bytes": path.stat().st_size, "kind": kind, **details, **rest}


def _sae(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    sae = SparseAutoencoder.load(path)
    theta = sae.theta
    return {
        "layer": sae.layer,
        "d_model": sae.d_model,
        "n_latents": sae.n_latents,
        "activation": sae.activation,
        "k": sae.k,
        "theta": {"min": float(theta.min()), "median": float(theta.median()), "max": float(theta.max())},
    }


def _steering(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    steering = Steering.load(path)
    return {
        "edits": [_edit(edit) for edit in steering.edits],
        "gate": None if steering.gate is None else _gate(steering.gate),
        "profiles": dict(steering.profiles),
        "frontier": [asdict(point) for point in steering.frontier],
    }


def _edit(edit: Edit) -> dict[str, Any]:
    if isinstance(edit, Shift):
        return {
            "type": "shift",
            "layer": edit.layer,
            "strength": edit.strength,
            "norm": float(edit.direction.norm()),
        }
    if isinstance(edit, MeanAblation):
        return {
            "type": "mean_ablation",
            "layer": edit.layer,
            "strength": edit.strength,
            "tolerance": edit.tolerance,
            "positions": len(edit.mean),
        }
    return {
        "type": "latents",
        "layer": edit.layer,
        "strength": edit.strength,
        "mode": edit.mode,
        "floor": edit.floor,
        "reconstruct": edit.reconstruct,
        "latents": len(edit.values),
        "indices": edit.indices.tolist() if len(edit.indices) <= 100 else f"{len(edit.indices)} of them",
    }


def _gate(gate: Gate) -> dict[str, Any]:
    return {
        "kind": gate.kind,
        "layers": list(gate.layers),
        "features": gate.n_features,
        "window_layers": [probe.layer for probe in gate.window_probes],
        "sound_layers": [probe.layer for probe in gate.sound_probes],
        "kernel_layers": list(gate.kernel.layers) if gate.kernel else [],
        "landmarks": len(gate.kernel.weights) if gate.kernel else 0,
        "smooth": gate.smooth,
        "threshold": gate.threshold,
        "spread": gate.spread,
        "frame_scale": gate.frame_scale,
        "frame_bias": gate.frame_bias,
        "min_run": gate.min_run,
        "margin": gate.margin,
    }


def _other(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    tensors, _ = load_tensors(path)
    details: dict[str, Any] = {
        "tensors": len(tensors),
        "numbers": sum(tensor.numel() for tensor in tensors.values()),
    }
    return {**details, "dims": metadata["dims"]} if "dims" in metadata else details

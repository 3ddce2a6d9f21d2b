"""The folder of a fit: every part as a steering file of its own, the window table, the record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calibration.gate_fit import FrameSample
from calibration.hallucinations import Labels
from calibration.selection import CalibrationClip
from calibration.window_table import WindowTable, named
from whisper_steer.errors import FormatError, UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Edit, Gate, Steering

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip

WINDOWS, FRAMES, RECORD = "windows.npz", "frames.npz", "fit.json"


@dataclass(frozen=True)
class Fit:
    """What `calibration.fit` makes.

    Attributes:
        gates, edits: by name. recipes: of the edits. table: what the gates say. record: how it was made.
        sample: the frames that the gates were fitted on.
    """

    gates: Mapping[str, Gate]
    edits: Mapping[str, Edit]
    recipes: Mapping[str, Mapping[str, Any]]
    table: WindowTable
    record: dict[str, Any]
    sample: FrameSample


def write_fit(out: Path, model: Whisper, fitted: Fit) -> None:
    """Write every part as a steering file, the arrays, and fit.json last: it makes the folder complete."""
    out.mkdir(parents=True, exist_ok=True)
    (out / RECORD).unlink(missing_ok=True)
    metadata = model_metadata(model)
    for name, gate in fitted.gates.items():
        part = Steering((), gate, {**metadata, "name": name, "recipe": {"gate": name}})
        part.save(out / f"gate_{name}.safetensors")
    for name, edit in fitted.edits.items():
        Steering((edit,), None, {**metadata, "name": name, "recipe": fitted.recipes[name]}).save(
            out / f"edit_{name}.safetensors"
        )
    names = list(fitted.table.logits)
    sample = fitted.sample
    _save_arrays(
        out / WINDOWS,
        targets=fitted.table.targets,
        logits=np.stack([fitted.table.logits[name] for name in names]),
    )
    _save_arrays(
        out / FRAMES,
        nobody=sample.nobody,
        weight=sample.weight,
        **{f"layer_{layer}": x.half().numpy() for layer, x in sample.x.items()},
    )
    complete = {
        **fitted.record,
        "gates": names,
        "edits": fitted.recipes,
        "clips": [{"id": clip.id, "set": clip.set, "rows": clip.rows} for clip in fitted.table.clips],
    }
    temporary = out / (RECORD + ".tmp")
    temporary.write_text(json.dumps(complete) + "\n", encoding="utf-8")
    temporary.replace(out / RECORD)


def _save_arrays(path: Path, **arrays: np.ndarray) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its first keyword is a flag
    temporary.replace(path)


def read_fit(
    folder: Path,
    model: Whisper,
    sets: Mapping[str, Sequence[Clip]],
    labels: Mapping[str, Labels],
    *,
    language: str = "en",
) -> Fit:
    """Read a fit and check that it belongs to this model and these clips. language: of the speech.

    Raises:
        FormatError, MismatchError, UsageError: incomplete, of another model, or of other clips.
    """
    if not (folder / RECORD).is_file():
        raise FormatError(f"{folder} holds no finished fit: run python -m calibration.fit --out {folder}")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    gates: dict[str, Gate] = {}
    edits: dict[str, Edit] = {}
    for name in record["gates"]:
        part = Steering.load(folder / f"gate_{name}.safetensors")
        part.check(model)
        if part.gate is not None:
            gates[name] = part.gate
    for name in record["edits"]:
        part = Steering.load(folder / f"edit_{name}.safetensors")
        part.check(model)
        edits[name] = part.edits[0]
    known = {(name, clip.id): clip for name, clip in named(sets)}
    clips = []
    for entry in record["clips"]:
        clip = known.get((entry["set"], entry["id"]))
        if clip is None or len(labels[clip.id].transcript.windows) != len(entry["rows"]):
            raise UsageError(f"{folder} was fitted on other clips ({entry['set']} {entry['id']}): fit again")
        transcript = labels[clip.id].transcript
        clips.append(CalibrationClip.of(clip, entry["set"], transcript, entry["rows"], language=language))
    with np.load(folder / WINDOWS, allow_pickle=False) as arrays:
        logits, targets = arrays["logits"], arrays["targets"]
    table = WindowTable(tuple(clips), dict(zip(record["gates"], logits, strict=True)), targets)
    with np.load(folder / FRAMES, allow_pickle=False) as arrays:
        layers = {
            int(key.removeprefix("layer_")): torch.from_numpy(arrays[key]).float()
            for key in arrays.files
            if key.startswith("layer_")
        }
        sample = FrameSample(layers, arrays["nobody"], arrays["weight"], record["gate_frames"])
    return Fit(gates, edits, record["edits"], table, record, sample)

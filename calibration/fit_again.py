"""A finished steering file taken apart again, so that thresholds and window probes can be chosen anew.

Fitting gates on frames is the dear part of a calibration, and often what it gave is not in question: other
calibration clips, another budget or other window probes need only the choice. `calibration.sweep --again`
takes the frame probes and the edits of a steering file in place of a fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.fit_files import Fit
from calibration.gate_fit import FrameSample, neutral_gate
from calibration.hallucinations import Labels
from calibration.window_table import measure_windows
from whisper_steer.errors import UsageError
from whisper_steer.steering import Steering

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip

# what calibration.fit draws by default, for files that do not say
DEFAULT_TRAINING = {"speech": 1600, "nonspeech": 1200, "real": 700, "seed": 1, "telephone": True}


def fit_of(
    path: Path,
    model: Whisper,
    sets: Mapping[str, Sequence[Clip]],
    labels: Mapping[str, Labels],
    *,
    progress: bool = True,
) -> Fit:
    """The frame probes of a steering file's gate, neutral otherwise, and its edits, as a fit of one gate.

    Without a sample of frames: the gate cannot be fitted again. Raises UsageError where the file has no gate
    or no recipe; FormatError, MismatchError as `Steering.load` and `check` do.
    """
    steering = Steering.load(path)
    steering.check(model)
    recipe: dict[str, Any] = dict(steering.metadata.get("recipe", {}))
    gate, edit = steering.gate, recipe.get("edit")
    if gate is None or "gate" not in recipe or (steering.edits and not edit):
        raise UsageError(
            f"{path} was not made by calibration.sweep with a gate: pass --fit, a folder of calibration.fit"
        )
    names = str(edit["name"]).split("+") if edit else []
    bare = neutral_gate(gate.probes, gate.intercept)
    table, _ = measure_windows(model, {}, {recipe["gate"]: bare}, sets, labels, progress=progress)
    record = {
        "seed": int(recipe.get("fit_seed", 0)),
        "training": recipe.get("training", DEFAULT_TRAINING),
        "gate_frames": {},
        # of the choice that gave the file; what window probes and kernels did there is no longer so
        "earlier_gates": [
            row for row in recipe.get("gates", ()) if not {"window_share", "kernel_share"} & row.keys()
        ],
    }
    return Fit(
        gates={recipe["gate"]: bare},
        edits=dict(zip(names, steering.edits, strict=True)),
        recipes=dict(zip(names, edit["recipes"] if edit else (), strict=True)),
        table=table,
        record=record,
        sample=FrameSample({}, np.zeros(0, bool), np.zeros(0), {}),
    )


def with_edits_of(folder: Path, fit: Fit, model: Whisper) -> Fit:
    """The fit with the edits of another, a folder of `calibration.fit`, beside its own; those of a name that
    it has are left out.

    Raises UsageError (no edit is there), FormatError (a damaged file), MismatchError (of another model).
    """
    edits, recipes = dict(fit.edits), dict(fit.recipes)
    for path in sorted(folder.glob("edit_*.safetensors")):
        steering = Steering.load(path)
        steering.check(model)
        name = path.stem.removeprefix("edit_")
        if name not in edits:
            (edits[name],), recipes[name] = steering.edits, dict(steering.metadata.get("recipe", {}))
    if len(edits) == len(fit.edits):
        raise UsageError(f"{folder} holds no edit that is not there: expected a folder of calibration.fit")
    return replace(fit, edits=edits, recipes=recipes)

"""whisper-steer models: what can be loaded by name."""

from __future__ import annotations

from . import options
from .output import print_json


def models(model_dir: options.ModelDir = None, as_json: options.Json = False) -> None:
    """List the models that are bundled, downloaded already (cached), or known and downloadable."""
    from ..zoo import models as list_models

    entries = list_models(model_dir)
    if as_json:
        print_json(
            [
                {
                    "name": entry.name,
                    "status": entry.status,
                    "path": None if entry.path is None else str(entry.path),
                    "d_model": entry.d_model,
                    "layers": entry.layers,
                    "steerings": list(entry.steerings),
                }
                for entry in entries
            ]
        )
        return
    rows = [("MODEL", "STATUS", "D_MODEL", "LAYERS", "STEERINGS", "PATH")]
    rows += [
        (
            entry.name,
            entry.status,
            str(entry.d_model),
            str(entry.layers),
            ", ".join(entry.steerings) or "-",
            str(entry.path or "-"),
        )
        for entry in entries
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

"""Competitors and our own forms, one small file each.

MODULES are the methods of the trade-off benchmark (see benchmarks.methods): each has METHODS. The train_*
scripts are for `benchmarks.training`, which runs each inside its library's own environment.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.methods import Method

MODULES = (
    "plain",
    "ours",
    "ours_gate",
    "silero",
    "faster_whisper",
    "openai_thresholds",
    "no_speech_prob",
    "phrase_filter",
    "linear_gate",
    "calm_whisper",
    "hallucination_space",
    "audiosae",
    "followup",
)


def all_methods() -> tuple[Method, ...]:
    """Every method, in the order of MODULES; a module whose file is not there has none."""
    found: list[Method] = []
    for name in MODULES:
        full = f"{__name__}.{name}"
        if importlib.util.find_spec(full) is not None:
            found += importlib.import_module(full).METHODS
    return tuple(found)

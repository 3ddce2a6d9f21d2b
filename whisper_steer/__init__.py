"""whisper-steer: stops Whisper from writing words nobody said.

    import whisper_steer

    model = whisper_steer.load_model("mini.en", alpha=1.0)   # a plain whisper.Whisper, steered
    transcript = whisper_steer.transcribe("meeting.flac", model)

    with whisper_steer.steer(model, alpha=0.5) as handle:    # any whisper.Whisper that a steering exists for
        handle.alpha = 0.8                                   # live

The names below are imported when they are first used: `import whisper_steer` alone does not load torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import AudioError, FormatError, MismatchError, ModelError, UsageError, WhisperSteerError

if TYPE_CHECKING:
    from .attach import Handle, handles_of, steer
    from .audio import find_audio, load_audio
    from .bake import Baked, bake, unbake
    from .comparison import Comparison, compare
    from .convert import convert
    from .sae import SparseAutoencoder
    from .steering import Gate, LatentEdit, Shift, Steering
    from .stretches import GateVad
    from .transcribe import Segment, Transcript, Word, transcribe
    from .withholding import LeftOut, Suppressed
    from .zoo import ModelEntry, load_model, load_sae, load_steering, models

    __version__: str

_HOMES = {
    "Handle": "attach",
    "handles_of": "attach",
    "steer": "attach",
    "find_audio": "audio",
    "load_audio": "audio",
    "Baked": "bake",
    "bake": "bake",
    "unbake": "bake",
    "Comparison": "comparison",
    "compare": "comparison",
    "convert": "convert",
    "SparseAutoencoder": "sae",
    "Gate": "steering",
    "GateVad": "stretches",
    "LatentEdit": "steering",
    "LeftOut": "withholding",
    "Shift": "steering",
    "Steering": "steering",
    "Segment": "transcribe",
    "Transcript": "transcribe",
    "Word": "transcribe",
    "transcribe": "transcribe",
    "Suppressed": "withholding",
    "ModelEntry": "zoo",
    "load_model": "zoo",
    "load_sae": "zoo",
    "load_steering": "zoo",
    "models": "zoo",
}

__all__ = [
    "AudioError",
    "Baked",
    "Comparison",
    "FormatError",
    "Gate",
    "GateVad",
    "Handle",
    "LatentEdit",
    "LeftOut",
    "MismatchError",
    "ModelEntry",
    "ModelError",
    "Segment",
    "Shift",
    "SparseAutoencoder",
    "Steering",
    "Suppressed",
    "Transcript",
    "UsageError",
    "WhisperSteerError",
    "Word",
    "__version__",
    "bake",
    "compare",
    "convert",
    "find_audio",
    "handles_of",
    "load_audio",
    "load_model",
    "load_sae",
    "load_steering",
    "models",
    "steer",
    "transcribe",
    "unbake",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("whisper-steer")
        except PackageNotFoundError:  # imported from a folder, without being installed
            value = "unknown"
    elif name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the submodule whisper_steer.transcribe makes Python put the module here, under the name of
        # the function: the function stays.
        if _HOMES.get(name) == name and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

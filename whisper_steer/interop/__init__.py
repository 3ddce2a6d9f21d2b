"""SAEs of other libraries: reads the files of dictionary_learning (and AudioSAE), SAELens and sparsify,
writes those of SAELens and sparsify.

Whatever the source subtracts, scales or rescales around its encoder is folded into the weights, so that the
SparseAutoencoder gives the same codes and reconstructions on raw activations. Layers are counted from 0 here;
AudioSAE's folders, which count from 1, are converted on reading.

    sae = load_foreign("Egorgij21/Audio-SAE-Whisper-small", layer=6)     # hub id, folder or file
    save_saelens(sae, "out/encoder.layers.6")
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError, UsageError, WhisperSteerError
from ..sae import SparseAutoencoder
from . import dictionary_learning, saelens, sparsify
from .dictionary_learning import load_dictionary_learning
from .hub import HUB_ID, download_foreign
from .saelens import load_saelens, save_saelens
from .sparsify import load_sparsify, save_sparsify

__all__ = [
    "EXPORT_FORMATS",
    "FORMATS",
    "ForeignSAE",
    "download_foreign",
    "find_foreign",
    "load_dictionary_learning",
    "load_foreign",
    "load_saelens",
    "load_sparsify",
    "save_saelens",
    "save_sparsify",
]

FORMATS = (dictionary_learning.LIBRARY, saelens.LIBRARY, sparsify.LIBRARY)
EXPORT_FORMATS: dict[str, Callable[[SparseAutoencoder, str | Path], None]] = {
    saelens.LIBRARY: save_saelens,
    sparsify.LIBRARY: save_sparsify,
}

_LOADERS: dict[str, Callable[[str | Path, int | None], SparseAutoencoder]] = {
    dictionary_learning.LIBRARY: load_dictionary_learning,
    saelens.LIBRARY: load_saelens,
    sparsify.LIBRARY: load_sparsify,
}
_WEIGHTS = {
    dictionary_learning.WEIGHTS: dictionary_learning.LIBRARY,
    saelens.WEIGHTS: saelens.LIBRARY,
    sparsify.WEIGHTS: sparsify.LIBRARY,
}


@dataclass(frozen=True)
class ForeignSAE:
    """One SAE of another library on the disk.

    path: its folder, or its .pt file where that is not called ae.pt. format: one of FORMATS. layer: 0-based,
    None if the files do not tell.
    """

    path: Path
    format: str
    layer: int | None

    def load(self, layer: int | None = None) -> SparseAutoencoder:
        """layer: 0-based, overrides what the files say. Raises FormatError, UsageError (layer unknown)."""
        return _LOADERS[self.format](self.path, layer)


def load_foreign(
    path: str | Path, *, layer: int | None = None, format: str | None = None
) -> SparseAutoencoder:
    """Read one SAE of another library; which one is told by the files' names.

    path: an SAE's folder or weights file, a folder that holds one SAE per layer, or a Hugging Face hub id
    (`download_foreign`). layer: 0-based; picks one of several, and overrides what a single SAE's own folder
    says. format: one of FORMATS, where a folder holds more than one.

    Raises FormatError (nothing found, damaged, not convertible), UsageError (several found, layer unknown),
    ModelError (hub).
    """
    folder = local_path(path, layer)
    found = find_foreign(folder, format=format)
    if len(found) == 1 and (layer is None or _stands_for(found[0], folder)):
        return found[0].load(layer)
    chosen = [sae for sae in found if layer is not None and sae.layer == layer]
    if len(chosen) == 1:
        return chosen[0].load()
    if chosen:
        places = ", ".join(f"{sae.path} ({sae.format})" for sae in chosen)
        raise UsageError(f"{path} holds {len(chosen)} SAEs for layer {layer}: pass one of {places}")
    layers = sorted({sae.layer for sae in found if sae.layer is not None})
    kept = f"layers {', '.join(map(str, layers))}" if layers else "no known layer"
    if layer is None:
        raise UsageError(f"{path} holds {len(found)} SAEs ({kept}): pass layer=, counted from 0")
    raise UsageError(f"{path} holds no SAE for layer {layer}, counted from 0: it holds {kept}")


def find_foreign(path: str | Path, *, format: str | None = None) -> list[ForeignSAE]:
    """Every SAE of another library in a folder and below it, or the one of a weights file, by layer.

    Raises FormatError where there is none, UsageError for an unknown format.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise UsageError(f"format is {format!r}: expected one of {', '.join(FORMATS)}")
    if not path.exists():
        raise FormatError(f"{path} does not exist: expected an SAE's folder, its weights file, or a hub id")
    if path.is_file():
        found = [_of_file(path)]
    else:
        found = [
            ForeignSAE(Path(root), _WEIGHTS[name], _layer(Path(root), _WEIGHTS[name]))
            for root, _, names in os.walk(path)
            for name in sorted(_WEIGHTS.keys() & set(names))
        ]
    found = [sae for sae in found if format in (None, sae.format)]
    if not found:
        raise FormatError(
            f"{path} holds no SAE{f' of {format}' if format else ''}: expected "
            + ", ".join(f"{name} ({library})" for name, library in _WEIGHTS.items())
        )
    return sorted(found, key=lambda sae: (sae.layer is None, sae.layer or 0, str(sae.path)))


def local_path(path: str | Path, layer: int | None = None) -> Path:
    """`path` itself if it exists or cannot be a hub id, else the folder it is downloaded to."""
    local = Path(path).expanduser()
    is_id = HUB_ID.fullmatch(str(path)) and local.suffix not in (".pt", ".pth", ".safetensors")
    return download_foreign(str(path), layer) if is_id and not local.exists() else local


def _of_file(path: Path) -> ForeignSAE:
    format = _WEIGHTS.get(path.name) or (
        dictionary_learning.LIBRARY if path.suffix in (".pt", ".pth") else None
    )
    if format is None:
        raise FormatError(f"{path} is no SAE of another library: expected {', '.join(_WEIGHTS)}")
    place = path if format == dictionary_learning.LIBRARY and path.name not in _WEIGHTS else path.parent
    return ForeignSAE(place, format, _layer(path.parent, format))


def _layer(folder: Path, format: str) -> int | None:
    """What the files say; None where they cannot be read, which loading them then reports."""
    try:
        if format == dictionary_learning.LIBRARY:
            return dictionary_learning.recorded_layer(folder, dictionary_learning.read_config(folder))
        if format == sparsify.LIBRARY:
            return sparsify.recorded_layer(folder)
        return saelens.recorded_layer(saelens.read_json(folder / saelens.CONFIG))
    except WhisperSteerError:
        return None


def _stands_for(sae: ForeignSAE, path: Path) -> bool:
    """Whether `path` names this very SAE rather than a folder around it."""
    return path.is_file() or sae.path == path or sae.layer is None

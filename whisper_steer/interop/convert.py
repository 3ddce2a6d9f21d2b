"""Whole files and folders: SAEs of another library to whisper-steer files, and the other way round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import FormatError, MismatchError, UsageError
from ..sae import SparseAutoencoder
from . import EXPORT_FORMATS, find_foreign, load_foreign, local_path
from .dictionary_learning import THRESHOLD_MISSING
from .parts import hook_of_layer


@dataclass(frozen=True)
class Conversion:
    """One SAE that was converted.

    source: what was read. written: file (import) or folder (export). layer: 0-based. theta_missing: the
    source has no threshold, theta is 0 until it is calibrated. exact: the same codes come out of both.
    """

    source: str
    written: Path
    format: str
    layer: int
    d_model: int
    n_latents: int
    activation: str
    k: int | None
    theta_missing: bool
    exact: bool


def import_saes(
    path: str | Path,
    out: str | Path,
    *,
    layer: int | None = None,
    format: str | None = None,
    model: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    before_saving: Callable[[Sequence[SparseAutoencoder]], None] = lambda saes: None,
) -> list[Conversion]:
    """Write every SAE found at `path` (or only `layer`'s) as `out`/layer_XX.safetensors, XX counted from 0.

    path, layer, format: as in `load_foreign`. model: fileformat.model_metadata of the model that the SAEs
    were trained on, stored with them. dtype: of the two matrices; torch.float16 halves the file.
    before_saving: may change the SAEs in place, such as their thresholds.

    Raises FormatError, UsageError (layer unknown or twice, a file is there already), MismatchError (another
    width or fewer layers than the model has), ModelError (hub).
    """
    folder, out = local_path(path, layer), Path(out)
    found = find_foreign(folder, format=format)
    if layer is not None:
        pairs = [(found[0].format, load_foreign(folder, layer=layer, format=format))]
    else:
        twice = [number for number, n in Counter(sae.layer for sae in found).items() if n > 1]
        if len(found) > 1 and twice:
            places = ", ".join(str(sae.path) for sae in found if sae.layer == twice[0])
            which = "an unknown layer" if twice[0] is None else f"layer {twice[0]}"
            raise UsageError(f"{path} holds several SAEs for {which}: pass one of {places}")
        pairs = [(sae.format, sae.load()) for sae in found]
    for _, sae in pairs:
        _check_model(sae, model, path)
    targets = [out / f"layer_{sae.layer:02d}.safetensors" for _, sae in pairs]
    _check_free(targets, overwrite)
    before_saving([sae for _, sae in pairs])
    done = []
    for (library, sae), target in zip(pairs, targets, strict=True):
        if model is not None:
            sae.metadata.update(model)
        sae.save(target, dtype=dtype)
        done.append(_conversion(sae, str(path), target, library, exact=dtype == torch.float32))
    return done


def export_saes(
    path: str | Path, out: str | Path, format: str, *, overwrite: bool = False
) -> list[Conversion]:
    """Write an SAE file, or every layer_XX.safetensors of a folder, as `out`/encoder.layers.N in another
    library's format: one of EXPORT_FORMATS.

    Raises UsageError (unknown format, activation the format lacks, a folder is there already), FormatError.
    """
    if format not in EXPORT_FORMATS:
        raise UsageError(f"format is {format!r}: expected one of {', '.join(EXPORT_FORMATS)}")
    path, out = Path(path), Path(out)
    files = sorted(path.glob("layer_[0-9][0-9].safetensors")) if path.is_dir() else [path]
    if not files:
        raise FormatError(f"{path}: no layer_XX.safetensors in this folder")
    saes = [SparseAutoencoder.load(file) for file in files]
    targets = [out / hook_of_layer(sae.layer) for sae in saes]
    _check_free(targets, overwrite)
    done = []
    for file, sae, target in zip(files, saes, targets, strict=True):
        EXPORT_FORMATS[format](sae, target)
        exact = format != "sparsify" or sae.activation == "topk"
        done.append(_conversion(sae, str(file), target, format, exact=exact))
    return done


def _check_model(sae: SparseAutoencoder, model: Mapping[str, Any] | None, path: str | Path) -> None:
    if model is not None and (sae.d_model != model["d_model"] or sae.layer >= model["n_layers"]):
        raise MismatchError(
            f"{path} is for d_model {sae.d_model}, layer {sae.layer} counted from 0; {model['base_model']} "
            f"has d_model {model['d_model']} and {model['n_layers']} layers: pass the model it was trained on"
        )


def _check_free(targets: list[Path], overwrite: bool) -> None:
    taken = [str(target) for target in targets if target.exists()]
    if taken and not overwrite:
        raise UsageError(f"{', '.join(taken)} would be overwritten: choose another folder or pass overwrite")


def _conversion(sae: SparseAutoencoder, read: str, written: Path, format: str, *, exact: bool) -> Conversion:
    return Conversion(
        source=read,
        written=written,
        format=format,
        layer=sae.layer,
        d_model=sae.d_model,
        n_latents=sae.n_latents,
        activation=sae.activation,
        k=sae.k,
        theta_missing=bool(sae.metadata.get(THRESHOLD_MISSING)),
        exact=exact,
    )

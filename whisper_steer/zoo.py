"""Where models, SAEs and Steerings are found, by name or by path.

A name is looked up in the bundled folder, then in the user's own folder (cache_dir()), then among
openai-whisper's names and on the Hugging Face hub. Both folders are laid out alike:

    <model>/whisper.safetensors      the model itself (absent where only a Steering is kept for a known model)
    <model>/layer_00.safetensors ... one SAE per encoder layer, 0-based
    <model>/steering.safetensors     the recommended Steering; steering-<name>.safetensors are others
    <model>/card.json                how all of it was made, and what it measured
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MismatchError, ModelError, UsageError

if TYPE_CHECKING:
    import torch
    from whisper.model import Whisper

    from .sae import SparseAutoencoder
    from .steering import Steering

logger = logging.getLogger("whisper_steer")

DEFAULT_MODEL = "mini.en"
MODEL_FILE = "whisper.safetensors"
STEERING_FILE = "steering.safetensors"

# (d_model, encoder layers) by the first part of an openai-whisper name
_SIZES = {"tiny": (384, 4), "base": (512, 6), "small": (768, 12), "medium": (1024, 24), "large": (1280, 32)}
_SIZES["turbo"] = _SIZES["large"]  # a large encoder with a short decoder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CT2_REPO = re.compile(r"/faster-|[-_.](ct2|ctranslate2)\b")
_CT2_WEIGHTS = "model.bin"
# as transformers writes them, whole or sharded
_TRANSFORMERS_WEIGHTS = tuple(
    name + suffix for name in ("model.safetensors", "pytorch_model.bin") for suffix in ("", ".index.json")
)


@dataclass(frozen=True)
class ModelEntry:
    """One model that load_model accepts by name.

    status: "bundled" (ships with the package, or lies in cache_dir()), "cached" (downloaded before), "known"
    (downloadable). path: file or folder, None while only known. d_model, layers: width and depth of the
    encoder. steerings: names that load_steering accepts for it, "default" first.
    """

    name: str
    status: str
    path: Path | None
    d_model: int
    layers: int
    steerings: tuple[str, ...]


def bundled_dir() -> Path:
    """sae_weights: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_bundled", package.parent / "sae_weights"):
        if folder.is_dir():
            return folder
    raise ModelError(f"the bundled weights are missing from {package}: reinstall whisper-steer")


def cache_dir() -> Path:
    """The user's own models, SAEs and Steerings, laid out like the bundled folder; it need not exist.

    $WHISPER_STEER_CACHE/models, else ~/.cache/whisper-steer/models.
    """
    root = os.environ.get("WHISPER_STEER_CACHE")
    return (Path(root) if root else _user_cache() / "whisper-steer") / "models"


def models(download_root: str | Path | None = None) -> list[ModelEntry]:
    """Every model that can be loaded by name: bundled ones, downloaded ones, then those that would be
    downloaded."""
    import whisper

    entries = _bundled_entries()
    taken = {entry.name for entry in entries}
    for name, config, path in _hub_cache():
        width, layers = config.get("d_model", 0), config.get("encoder_layers", 0)
        entries.append(ModelEntry(name, "cached", path, width, layers, _steering_names(name)))
    known = []
    for name in whisper.available_models():
        if name in taken:
            continue
        # several names share one file (turbo is large-v3-turbo)
        path = _download_root(download_root) / whisper._MODELS[name].rsplit("/", 1)[-1]
        width, layers = _SIZES[re.split(r"[.-]", name)[0]]
        steerings = _steering_names(name)
        if path.is_file():
            entries.append(ModelEntry(name, "cached", path, width, layers, steerings))
        else:
            known.append(ModelEntry(name, "known", None, width, layers, steerings))
    return entries + known


def load_model(
    name: str | Path = DEFAULT_MODEL,
    *,
    alpha: float | None = None,
    profile: str | None = None,
    steering: Steering | str | Path | None = None,
    device: str | torch.device | None = None,
    download_root: str | Path | None = None,
) -> Whisper:
    """A plain whisper.Whisper, in evaluation mode; with `alpha` or `profile`, already steered (its handle:
    handles_of(model)).

    name: a bundled model ("mini.en"), an openai-whisper name ("small.en"; downloaded and checksummed by
    openai-whisper into `download_root`), a .pt checkpoint, a transformers or CTranslate2 folder or hub id
    ("openai/whisper-tiny", "Systran/faster-whisper-tiny"), a compact model file or its folder. device None:
    CUDA if there is one. model.name is set to the name.

    Raises ModelError (unknown name, no network), FormatError (damaged file), UsageError (bad device, steering
    without alpha), MismatchError (steering of another model).
    """

    if steering is not None and alpha is None and profile is None:
        raise UsageError("steering is given without alpha: pass alpha=1.0 too")
    target = _device(device)
    model, label = _load_plain(str(name), download_root)
    model = model.to(target).eval()
    model.name = label
    if alpha is not None or profile is not None:
        from .attach import steer

        steer(model, alpha=alpha, profile=profile, steering=steering)
    return model


def load_steering(name_or_path: str | Path, model_name: str | None = None) -> Steering:
    """A Steering from a file, or by name among those kept for a model ("default", "audiosae", ...).

    Without `model_name` the name may be spelt "mini.en/audiosae", or just "mini.en" for its default.
    Raises UsageError (nothing of that name or path), FormatError (damaged file).
    """
    from .steering import Steering

    given = str(name_or_path)
    path = Path(given).expanduser()
    if path.is_file():
        return Steering.load(path)
    if path.suffix == ".safetensors":
        raise UsageError(f"steering {given}: no such file")
    model, _, name = given.rpartition("/")
    if model_name is None and not model and _steering_names(given):
        model, name = given, "default"
    model = model or model_name or ""
    for folder in _folders_of(model):
        if (folder / _steering_file(name)).is_file():
            return Steering.load(folder / _steering_file(name))
    available = [f"{folder.name}/{name}" for folder in _model_folders() for name in _names_in(folder)]
    raise UsageError(
        f"no steering {given!r}{f' for {model}' if model else ''}: pass a .safetensors file"
        + (f" or one of {', '.join(dict.fromkeys(available))}" if available else "")
    )


def steering_for(model: Whisper) -> Steering:
    """The recommended Steering of a loaded model: by model.name, else by the SHA-256 of its encoder.

    Raises MismatchError if none is kept for it.
    """
    from .fileformat import UNNAMED, encoder_sha256, load_metadata, model_name
    from .steering import Steering

    name = model_name(model)
    files = [folder / STEERING_FILE for folder in _folders_of(name)]
    for path in files:
        if path.is_file():
            return Steering.load(path)
    sha = encoder_sha256(model)
    for folder in _model_folders():
        path = folder / STEERING_FILE
        if path.is_file() and load_metadata(path, "steering").get("encoder_sha256") == sha:
            return Steering.load(path)
    described = "this model, which has no name" if name == UNNAMED else f"the model {name}"
    raise MismatchError(
        f"no steering is kept for {described} "
        f"(d_model {model.dims.n_audio_state}, {model.dims.n_audio_layer} blocks): pass a steering file, or "
        "alpha 0 for plain Whisper"
    )


def load_sae(model_name: str, layer: int, variant: str | None = None) -> SparseAutoencoder:
    """The SAE kept for one encoder layer (0-based) of a model.

    variant: a folder of further SAEs of the same layers, such as "seed1" (another start, for stability), or
    one of a training run's grid; None: the recommended one. Raises ModelError if there is none.
    """
    from .sae import SparseAutoencoder

    folders = [folder / variant if variant else folder for folder in _folders_of(model_name)]
    for folder in folders:
        path = folder / f"layer_{layer:02d}.safetensors"
        if path.is_file():
            return SparseAutoencoder.load(path)
    layers = sorted(
        {int(path.stem[-2:]) for folder in folders for path in folder.glob("layer_[0-9][0-9].safetensors")}
    )
    which = f" ({variant})" if variant else ""
    kept = f"layers {', '.join(map(str, layers))} are kept" if layers else "none is kept for this model"
    raise ModelError(f"no SAE{which} for layer {layer} of {model_name}: {kept}")


def is_ct2_repo(name: str, download_root: str | Path | None = None) -> bool:
    """Is it the hub id of a CTranslate2 model? By the files in the cache (or in `download_root`), else by
    those that the hub lists; where it cannot be reached, by what such repositories are called."""
    if not _HUB_ID.fullmatch(name) or Path(name).expanduser().exists():
        return False
    try:
        from huggingface_hub import HfApi, try_to_load_from_cache

        weights = (*_TRANSFORMERS_WEIGHTS, _CT2_WEIGHTS)
        paths = {file: try_to_load_from_cache(name, file, download_root) for file in weights}
        cached = {file for file, path in paths.items() if isinstance(path, str)}
        files = cached or set(HfApi().list_repo_files(name))
    except Exception as error:  # the hub client lets errors of its HTTP library through
        logger.debug("%s: %s", name, error)
        return _CT2_REPO.search(name) is not None
    return _CT2_WEIGHTS in files and files.isdisjoint(_TRANSFORMERS_WEIGHTS)


def is_known_name(name: str) -> bool:
    """Is a model or a steering of that name bundled or kept, or is it one of openai-whisper's?"""
    import whisper

    return bool(_folders_of(name)) or name in whisper.available_models()


def _load_plain(name: str, download_root: str | Path | None) -> tuple[Whisper, str]:
    """(model on the CPU, the name it goes by)."""
    import whisper

    from .loading import load_hub, load_openai, load_path

    for folder in _folders_of(name):
        if (folder / MODEL_FILE).is_file():
            return load_path(folder)[0], name

    if name in whisper.available_models():
        return load_openai(name, _download_root(download_root)), name
    path = Path(name).expanduser()
    if name and path.exists():
        return load_path(path)
    if _HUB_ID.fullmatch(name) and path.suffix not in (".pt", ".pth", ".safetensors"):
        return load_hub(name, download_root)
    names = [entry.name for entry in _bundled_entries()] + whisper.available_models()
    if path.suffix in (".pt", ".pth", ".safetensors") or path.is_absolute() or name.startswith((".", "~")):
        raise ModelError(f"model {name}: no such file or folder")
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ModelError(
        f"unknown model {name!r}: {hint}expected one of {', '.join(names)}, a .pt file, a transformers "
        "folder, or a hub id like openai/whisper-tiny"
    )


def _device(device: str | torch.device | None) -> torch.device:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"device {str(device)!r} cannot be used here ({reason}): pass cpu, or leave it out"
        ) from error
    return chosen


def _model_folders() -> Iterator[Path]:
    """Folders of models and steerings, bundled ones first."""
    for root in (bundled_dir(), cache_dir()):
        if root.is_dir():
            yield from sorted(folder for folder in root.iterdir() if folder.is_dir())


def _folders_of(model_name: str) -> list[Path]:
    return [folder for folder in _model_folders() if folder.name == model_name]


def _names_in(folder: Path) -> list[str]:
    names = [path.stem.removeprefix("steering-") for path in sorted(folder.glob("steering-*.safetensors"))]
    return ["default", *names] if (folder / STEERING_FILE).is_file() else names


def _steering_names(model_name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for folder in _folders_of(model_name) for name in _names_in(folder)))


def _steering_file(name: str) -> str:
    return STEERING_FILE if name in ("default", "steering") else f"steering-{name}.safetensors"


def _bundled_entries() -> list[ModelEntry]:
    from .fileformat import load_metadata

    entries = {}
    for folder in _model_folders():
        if folder.name in entries or not (folder / MODEL_FILE).is_file():
            continue
        dims = load_metadata(folder / MODEL_FILE)["dims"]
        entries[folder.name] = ModelEntry(
            folder.name,
            "bundled",
            folder,
            dims["n_audio_state"],
            dims["n_audio_layer"],
            _steering_names(folder.name),
        )
    return list(entries.values())


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _download_root(download_root: str | Path | None) -> Path:
    """Where openai-whisper keeps its checkpoints."""
    return Path(download_root) if download_root is not None else _user_cache() / "whisper"


def _hub_cache() -> Iterator[tuple[str, dict[str, Any], Path]]:
    """(hub id, config, snapshot folder) of every Whisper in the Hugging Face cache."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return
    for config_path in sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/config.json")):
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and config.get("model_type") == "whisper":
            repo = config_path.parents[2].name.removeprefix("models--").replace("--", "/")
            yield repo, config, config_path.parent

"""Fetches SAEs of other libraries from the Hugging Face hub: only their weights and settings, checksummed."""

from __future__ import annotations

import logging
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, ModelError
from ..loading import _quiet_hub
from . import dictionary_learning, saelens, sparsify
from .parts import layer_of_hook, sha256

if TYPE_CHECKING:
    from . import ForeignSAE

logger = logging.getLogger("whisper_steer")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_WEIGHTS = (dictionary_learning.WEIGHTS, saelens.WEIGHTS, sparsify.WEIGHTS)
_WANTED = (*_WEIGHTS, dictionary_learning.CONFIG, saelens.CONFIG, saelens.SCALER, saelens.WHITENING)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def download_foreign(repo: str, layer: int | None = None, *, cache_dir: str | Path | None = None) -> Path:
    """The folder of a hub repository with its SAEs, fetched into the hub's cache (or `cache_dir`).

    Fetches weights and settings only, and with `layer` (0-based) only that layer's where folder names tell
    it. A layer that is in the cache already is used without asking the network. Every weights file fetched is
    compared with the SHA-256 that the hub states.

    Raises ModelError: not a hub id, not there, no network, damaged.
    """
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ImportError as error:
        raise ModelError(f"{repo} is a hub id, which needs: pip install huggingface_hub") from error
    if not HUB_ID.fullmatch(repo):
        raise ModelError(f"{repo}: not a hub id; expected owner/name")
    cached = _cached(repo, cache_dir)
    if cached is not None and layer is not None and any(sae.layer == layer for sae in _complete(cached)):
        return cached
    try:
        with _quiet_hub():
            info = HfApi().model_info(repo, files_metadata=True)
            files = _selected({file.rfilename: file for file in info.siblings or []}, layer)
            if not files:
                raise ModelError(
                    f"{repo} holds no SAE that can be read: expected {', '.join(_WEIGHTS)} in it"
                )
            paths = {
                name: Path(hf_hub_download(repo, name, revision=info.sha, cache_dir=cache_dir))
                for name in files
            }
    except ModelError:
        raise
    except Exception as error:  # the hub client lets errors of its HTTP library through
        if cached is not None and layer is None and _complete(cached):
            logger.warning("%s: the Hugging Face hub cannot be reached, what is in the cache is used", repo)
            return cached
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{repo}: not here, and not available from the Hugging Face hub ({reason}): connect to the "
            "network once, or copy the SAE's folder here"
        ) from error
    for name, path in paths.items():
        _verify(path, _stated_sha256(files[name]))
    name, path = next(iter(paths.items()))
    return path.parents[len(PurePosixPath(name).parts) - 1]


def _selected(files: dict[str, Any], layer: int | None) -> dict[str, Any]:
    """Wanted files; with `layer`, only the folders whose name says that layer, if any folder's does."""
    wanted = {name: file for name, file in files.items() if PurePosixPath(name).name in _WANTED}
    folders = {PurePosixPath(name).parent for name in wanted if PurePosixPath(name).name in _WEIGHTS}
    if layer is not None:
        of_layer = {folder for folder in folders if _layer_by_name(folder, folders) == layer}
        folders = of_layer or folders
    return {name: file for name, file in wanted.items() if PurePosixPath(name).parent in folders}


def _layer_by_name(folder: PurePosixPath, folders: set[PurePosixPath]) -> int | None:
    counts_from_0 = folder.with_name("layer_0") in folders if folder.name else False
    numbered = dictionary_learning.layer_of_folder(folder.name, counts_from_0=counts_from_0)
    return layer_of_hook(folder.name) if numbered is None else numbered


def _cached(repo: str, cache_dir: str | Path | None) -> Path | None:
    """The repository's snapshot in the cache, without asking the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, cache_dir=cache_dir, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None


def _complete(folder: Path) -> list[ForeignSAE]:
    """The SAEs in a cached snapshot that have both of their files."""
    from . import find_foreign

    try:
        found = find_foreign(folder)
    except FormatError:
        return []
    configs = (dictionary_learning.CONFIG, saelens.CONFIG)
    return [sae for sae in found if any((sae.path / name).is_file() for name in configs)]


def _stated_sha256(file: Any) -> str | None:
    """Of a file kept in large-file storage; small ones have none."""
    large = getattr(file, "lfs", None)
    stated = large.get("sha256") if isinstance(large, dict) else getattr(large, "sha256", None)
    return stated if isinstance(stated, str) and _SHA256.fullmatch(stated) else None


def _verify(path: Path, stated: str | None) -> None:
    if stated is not None and (got := sha256(path)) != stated:
        for file in {path, path.resolve()}:
            file.unlink(missing_ok=True)
        raise ModelError(
            f"{path.name}: SHA-256 is {got[:12]}..., the hub states {stated[:12]}...: it was damaged on the "
            "way and has been removed, fetch it again"
        )

"""The places a Whisper can come from: a file, a folder, openai-whisper's downloads, the Hugging Face hub.

Every loader returns a plain whisper.Whisper, float32, on the CPU.
"""

from __future__ import annotations

import logging
import pickle
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import whisper
from whisper.model import ModelDimensions, Whisper

from .compact import unpack_model
from .convert_from import is_ct2_folder, load_ct2, load_ggml, runtime_name
from .convert_hf import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX_SUFFIX,
    WEIGHTS,
    build_model,
    is_transformers_folder,
    load_transformers,
    read_pickle,
    shard_names,
)
from .ct2_encoder import plain_name
from .ct2_file import MODEL_FILE as CT2_FILE
from .errors import FormatError, ModelError, WhisperSteerError
from .zoo import MODEL_FILE

logger = logging.getLogger("whisper_steer")


def load_path(path: Path) -> tuple[Whisper, str]:
    """(model, name taken from the path): a .pt checkpoint, a compact model file, a whisper.cpp file, or a
    folder (transformers, CTranslate2, or our own).

    Raises FormatError (damaged), ModelError (a folder without a model).
    """
    foreign = runtime_name(path)
    if foreign is not None:
        return (load_ct2(path) if path.is_dir() else load_ggml(path)), foreign
    if path.is_dir():
        if is_transformers_folder(path):
            return load_transformers(path), path.resolve().name
        if (path / MODEL_FILE).is_file():
            return unpack_model(path / MODEL_FILE)[0], path.resolve().name
        raise ModelError(
            f"{path}: no model in this folder; expected {CONFIG} (transformers), {CT2_FILE} (CTranslate2) or "
            f"{MODEL_FILE}"
        )
    if path.suffix == ".safetensors":
        model, metadata = unpack_model(path)
        folder_name = path.resolve().parent.name if path.name == MODEL_FILE else path.stem
        return model, str(metadata.get("name") or folder_name)
    return _load_checkpoint(path), path.stem


def load_openai(name: str, download_root: Path) -> Whisper:
    """One of openai-whisper's own models, downloaded and checksummed by it. Raises ModelError."""
    try:
        return whisper.load_model(name, device="cpu", download_root=str(download_root))
    except urllib.error.URLError as error:
        raise ModelError(
            f"{name} is not in {download_root} and cannot be downloaded ({error.reason}): connect to the "
            "network once, or copy the .pt file there"
        ) from error
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ModelError(f"{name} cannot be downloaded to {download_root}: {_first_line(error)}") from error


def load_hub(repo: str, download_root: str | Path | None) -> tuple[Whisper, str]:
    """A transformers or CTranslate2 model from the Hugging Face hub, by its id.

    What is in the hub's cache (or in `download_root`) already is used without asking the network; else only
    the needed files are fetched into it. Returns (model, the name it goes by: the id, for CTranslate2's
    without what converters add to it). Raises ModelError, FormatError.
    """
    try:
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise ModelError(f"{repo} is a hub id, which needs: pip install huggingface_hub") from error
    try:
        return _load_snapshot(_hub_folder(repo, download_root, local_files_only=True), repo)
    except LocalEntryNotFoundError:
        logger.info("%s is not in the cache: asking the Hugging Face hub", repo)
    except ValueError as error:  # not a possible id
        raise ModelError(f"{repo}: no such file or folder here, and not a hub id") from error
    try:
        with _quiet_hub():
            folder = _hub_folder(repo, download_root, local_files_only=False)
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{repo}: no such file or folder here, not in the cache, and the Hugging Face hub cannot be "
            "reached"
        ) from error
    except WhisperSteerError:
        raise
    except Exception as error:  # the hub client lets errors of its HTTP library through
        raise ModelError(
            f"{repo}: no such file or folder here, and not available from the Hugging Face hub "
            f"({_first_line(error)})"
        ) from error
    return _load_snapshot(folder, repo)


def _load_snapshot(folder: Path, repo: str) -> tuple[Whisper, str]:
    if is_ct2_folder(folder):
        return load_ct2(folder), plain_name(repo)
    return load_transformers(folder), repo


def _hub_folder(repo: str, download_root: str | Path | None, *, local_files_only: bool) -> Path:
    """The snapshot folder with everything that load_transformers reads, or load_ct2 where there is but that.

    Raises the hub client's errors (LocalEntryNotFoundError where a file is not at hand), ModelError.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> Path:
        path = hf_hub_download(repo, name, cache_dir=download_root, local_files_only=local_files_only)
        return Path(path)

    def fetch_weights() -> None:
        for name in (*WEIGHTS, CT2_FILE):
            for candidate in (name, name + INDEX_SUFFIX):
                try:
                    path = fetch(candidate)
                except EntryNotFoundError:
                    continue
                for shard in shard_names(path) if candidate != name else ():
                    fetch(shard)
                return
        if local_files_only:
            raise LocalEntryNotFoundError(f"no {' or '.join(WEIGHTS)}")
        raise ModelError(
            f"{repo}: neither {' nor '.join(WEIGHTS)} nor CTranslate2's {CT2_FILE} can be fetched from the "
            "Hugging Face hub"
        )

    folder = fetch(CONFIG).parent
    fetch_weights()
    try:
        fetch(GENERATION_CONFIG)  # names the heads for word timestamps; many fine-tuned models lack it
    except EntryNotFoundError as error:
        logger.debug("%s: no %s (%s)", repo, GENERATION_CONFIG, error)
    return folder


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Without the line that the hub client logs at every retry: one error at the end says it all."""
    hub_logger = logging.getLogger("huggingface_hub")
    before = hub_logger.level
    hub_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub_logger.setLevel(before)


def _load_checkpoint(path: Path) -> Whisper:
    """openai-whisper's .pt: {"dims": ..., "model_state_dict": ...}, read with weights_only=True."""
    checkpoint = read_pickle(path)
    try:
        dims, weights = ModelDimensions(**checkpoint["dims"]), checkpoint["model_state_dict"]
        if not all(isinstance(value, torch.Tensor) for value in weights.values()):
            raise TypeError("a value is not a tensor")
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path}: not an openai-whisper checkpoint; expected 'dims' and 'model_state_dict' in it"
        ) from error
    return build_model(dims, weights, str(path))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

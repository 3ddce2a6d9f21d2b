"""HuBERT, wav2vec 2.0 and WavLM from a transformers folder or the Hugging Face hub (the extra "hf").

What is in the hub's cache is used without asking the network; otherwise config, preprocessor and weights are
fetched into it, safetensors where the repository has them. A model is then read from its folder, so that
transformers itself never goes online.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from whisper_steer.convert_hf import CONFIG, INDEX_SUFFIX, WEIGHTS, is_transformers_folder, shard_names
from whisper_steer.errors import FormatError, ModelError, WhisperSteerError

logger = logging.getLogger("whisper_steer")

RAW_FAMILIES = ("hubert", "wav2vec2", "wavlm")  # config.json's model_type
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # newer transformers keep the preprocessor's settings in here
_USED = ("feature_extractor.", "feature_projection.", "encoder.")

Fetch = Callable[[str], Path]  # a file's name in the repository -> where it lies in the cache


def model_type(name_or_path: str | Path) -> str | None:
    """config.json's model_type of a transformers folder or hub id; None for any other name or path.

    Raises FormatError (unreadable config), ModelError (hub not reachable, unknown id).
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        config = folder / CONFIG
        if not config.is_file():
            return None
    elif _is_hub_id(str(name_or_path)):
        config = _from_hub(str(name_or_path), _named(CONFIG))
    else:
        return None
    kind = _read_json(config).get("model_type")
    if not isinstance(kind, str):
        raise FormatError(
            f"{name_or_path}: config.json has no model_type; expected that of a transformers model"
        )
    return kind


def load_raw_model(name_or_path: str | Path) -> tuple[torch.nn.Module, bool]:
    """(model, do_normalize) of a folder or hub id whose `model_type` is one of RAW_FAMILIES.

    The model is a bare HubertModel, Wav2Vec2Model or WavLMModel without a head, float32, on the CPU.
    do_normalize is taken from the preprocessor's settings; without any it is False, with a warning.

    Raises ModelError (transformers missing, hub not reachable, not for 16 kHz), FormatError (damaged or
    incomplete files).
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ModelError(
            f"{name_or_path} is a transformers model, which needs: pip install 'whisper-steer[hf]'"
        ) from error
    folder = Path(name_or_path).expanduser()
    if not is_transformers_folder(folder):
        folder = _snapshot(str(name_or_path))
    do_normalize = _do_normalize(folder, str(name_or_path))
    try:
        with _quiet("transformers"):
            model, report = AutoModel.from_pretrained(
                str(folder), local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise FormatError(
            f"{name_or_path}: transformers cannot load this model ({_first_line(error)})"
        ) from error
    missing = sorted(name for name in report["missing_keys"] if name.startswith(_USED))
    if missing:  # transformers would go on with random numbers
        raise FormatError(
            f"{name_or_path}: {len(missing)} tensors are missing from the weights: {', '.join(missing[:5])}"
        )
    return model.float().eval(), do_normalize


def _do_normalize(folder: Path, name: str) -> bool:
    if (folder / PREPROCESSOR).is_file():
        settings = _read_json(folder / PREPROCESSOR)
    elif (folder / PROCESSOR).is_file():
        settings = _read_json(folder / PROCESSOR).get("feature_extractor", {})
    else:
        logger.warning("%s has no %s: its input is not normalised", name, PREPROCESSOR)
        return False
    rate = settings.get("sampling_rate", 16_000)
    if rate != 16_000:
        raise ModelError(f"{name} is made for audio at {rate} Hz: expected 16000")
    return bool(settings.get("do_normalize", True))  # Wav2Vec2FeatureExtractor's default


def _is_hub_id(name: str) -> bool:
    path = Path(name)
    if path.exists() or path.suffix in (".pt", ".pth", ".safetensors"):
        return False
    try:
        from huggingface_hub.utils import HFValidationError, validate_repo_id
    except ImportError:
        return False  # load_model says what is missing
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _snapshot(repo: str) -> Path:
    """The folder in the hub's cache that holds config, weights and, where there are any, preprocessor
    settings."""
    folder = _from_hub(repo, _named(CONFIG)).parent
    _from_hub(repo, _weights)
    for name in (PREPROCESSOR, PROCESSOR):
        try:
            _from_hub(repo, _named(name))
            break
        except ModelError as error:
            logger.debug("%s: no %s (%s)", repo, name, error)
    return folder


def _from_hub(repo: str, get: Callable[[Fetch, bool], Path]) -> Path:
    """What `get` fetches with (fetch, whether only the cache is looked at): from the cache if it is there,
    else from the network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def cached(name: str) -> Path:
        return Path(hf_hub_download(repo, name, local_files_only=True))

    def downloaded(name: str) -> Path:
        return Path(hf_hub_download(repo, name))

    try:
        return get(cached, True)
    except LocalEntryNotFoundError:
        logger.info("%s is not in the cache: asking the Hugging Face hub", repo)
    try:
        with _quiet("huggingface_hub"):
            return get(downloaded, False)
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


def _named(name: str) -> Callable[[Fetch, bool], Path]:
    return lambda fetch, _local: fetch(name)


def _weights(fetch: Fetch, local: bool) -> Path:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in (file + suffix for file in WEIGHTS for suffix in ("", INDEX_SUFFIX)):
        try:
            path = fetch(name)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not local:
                raise  # no network, which says nothing about this file
            continue
        for shard in shard_names(path) if name.endswith(INDEX_SUFFIX) else ():
            fetch(shard)
        return path
    if local:
        raise LocalEntryNotFoundError(f"no {' or '.join(WEIGHTS)}")
    raise ModelError(f"the repository holds neither {' nor '.join(WEIGHTS)}, whole or sharded")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object")
    return value


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without a library's own warnings: what matters in them is said in one error."""
    library = logging.getLogger(name)
    before = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(before)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

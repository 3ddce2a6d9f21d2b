"""Which folder was this CTranslate2 model loaded from? It does not say, so its encoder is compared."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import ctranslate2
import numpy as np
import torch

from .ct2_encoder import load_encoder, run_encoder
from .ct2_file import MODEL_FILE, read_layout
from .errors import FormatError, MismatchError, ModelError

logger = logging.getLogger("whisper_steer")

_PROBE_FRAMES = 200  # mel frames of the input that is compared
# cosine of two encoder outputs: quantisation leaves more than 0.99, other weights are near 0
_MIN_COSINE = 0.9


def find_folder(model: ctranslate2.models.Whisper, given: str | Path | None) -> Path:
    """The folder of the model's files: `given` if its encoder is the model's, else one in the hub's cache.

    Raises MismatchError (given, but of another model), ModelError (none found), FormatError (given, and
    unreadable).
    """
    if given is not None:
        folder = Path(given)
        if not _matches(model, folder):
            raise MismatchError(f"files {folder} hold another model than the one that was loaded")
        return folder
    for folder in _cached_folders():
        try:
            if _matches(model, folder):
                logger.info("the model's files: %s", folder)
                return folder
        except FormatError as error:
            logger.debug("%s", error)
    raise ModelError(
        "a faster-whisper model does not say where it was loaded from, and nothing in the Hugging Face cache "
        "matches it: pass files=FOLDER, or load it with whisper_steer.faster.WhisperModel"
    )


def _matches(model: ctranslate2.models.Whisper, folder: Path) -> bool:
    mels, frames = model.n_mels, _PROBE_FRAMES
    shape = read_layout(folder).variable("encoder/conv1/weight").shape
    if shape[1] != mels:
        return False
    mel = np.random.default_rng(0).normal(size=(1, mels, frames)).astype(np.float32)
    there = model.encode(ctranslate2.StorageView.from_array(mel), to_cpu=True)
    if there.shape[-1] != shape[0]:
        return False
    values = np.asarray(there.to(ctranslate2.DataType.float32)).ravel()
    here = run_encoder(load_encoder(folder), torch.from_numpy(mel)).numpy().ravel()
    return bool(values @ here > _MIN_COSINE * np.linalg.norm(values) * np.linalg.norm(here))


def _cached_folders() -> Iterator[Path]:
    """Folders with a model.bin in the Hugging Face cache, the latest first."""
    from huggingface_hub import constants

    found = Path(constants.HF_HUB_CACHE).glob(f"models--*/snapshots/*/{MODEL_FILE}")
    yield from (path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True))

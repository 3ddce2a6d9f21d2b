"""An openai-whisper model as transformers' WhisperForConditionalGeneration, in memory: the same weights under
transformers' names, with the generation settings that belong to Whisper's vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from whisper.model import Whisper
from whisper.tokenizer import get_tokenizer

from .convert_hf import openai_name
from .errors import FormatError, ModelError
from .fileformat import model_name
from .transformers_settings import generation_config, model_config

if TYPE_CHECKING:
    from whisper.tokenizer import Tokenizer


def require_transformers() -> Any:
    """The module. Raises ModelError with the way out if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError("transformers is not installed: pip install 'whisper-steer[hf]'") from error
    return transformers


@contextmanager
def quietly() -> Iterator[None]:
    """Within the block transformers shows no progress bars, and does not warn of the deprecated call that its
    own `generate_with_fallback` makes (5.24), which nobody else can change."""
    transformers_logging = require_transformers().utils.logging
    shown = transformers_logging.is_progress_bar_enabled()
    source = logging.getLogger("transformers.generation.utils")
    transformers_logging.disable_progress_bar()
    source.addFilter(_is_not_its_own_call)
    try:
        yield
    finally:
        source.removeFilter(_is_not_its_own_call)
        if shown:
            transformers_logging.enable_progress_bar()


def _is_not_its_own_call(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not ("Passing `generation_config` together" in message and "begin_suppress_tokens" in message)


def vocabulary(vocab_size: int) -> Tokenizer | None:
    """openai-whisper's tokenizer for a vocabulary of this size; None if it is none of Whisper's three."""
    if vocab_size == 51864:
        return get_tokenizer(False)
    languages = {51865: 99, 51866: 100}.get(vocab_size)
    return None if languages is None else get_tokenizer(True, num_languages=languages)


def from_openai(model: Whisper) -> Any:
    """A WhisperForConditionalGeneration with copies of the model's weights, in its dtype, on its device, in
    evaluation mode; `name_or_path` is the model's name.

    Raises ModelError (transformers is missing), FormatError (a vocabulary that is not Whisper's).
    """
    transformers = require_transformers()
    tokenizer = vocabulary(model.dims.n_vocab)
    if tokenizer is None:
        raise FormatError(
            f"the model has {model.dims.n_vocab} tokens: expected Whisper's 51864, 51865 or 51866"
        )
    config = transformers.WhisperConfig(**model_config(model, tokenizer))
    # made without memory first: initialising weights that are replaced at once takes seconds
    with torch.device("meta"):
        converted = transformers.WhisperForConditionalGeneration(config)
    own = model.state_dict()
    renamed = {name: openai_name(name) for name in converted.state_dict() if name != "proj_out.weight"}
    weights = {name: own[source].clone() for name, source in renamed.items() if source is not None}
    converted.load_state_dict(weights, strict=False, assign=True)
    converted.tie_weights()
    converted.name_or_path = model_name(model)
    converted.generation_config = transformers.GenerationConfig(**generation_config(model, tokenizer))
    return converted.eval().requires_grad_(False)

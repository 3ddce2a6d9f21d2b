"""An openai-whisper model as transformers' WhisperForConditionalGeneration, in memory: the same weights under
transformers' names, with the generation settings that belong to Whisper's vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from whisper.model import Whisper
from whisper.tokenizer import get_tokenizer

from .convert_hf import DIMS, openai_name
from .errors import FormatError, ModelError
from .fileformat import model_name

if TYPE_CHECKING:
    from whisper.tokenizer import Tokenizer

MAX_INITIAL_TIMESTAMP = 50  # openai-whisper: the first timestamp is at most 1 s, in steps of 20 ms


def require_transformers() -> Any:
    """The module. Raises ModelError with the way out if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError("transformers is not installed: pip install 'whisper-steer[hf]'") from error
    return transformers


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
    sizes = {key: getattr(model.dims, name) for name, key in DIMS.items()}
    special = {
        "pad_token_id": tokenizer.eot,
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot,
        "decoder_start_token_id": tokenizer.sot,
    }
    feed_forward = {f"{part}_ffn_dim": 4 * sizes["d_model"] for part in ("encoder", "decoder")}
    config = transformers.WhisperConfig(**sizes, **special, **feed_forward, dropout=0.0)
    # made without memory first: initialising weights that are replaced at once takes seconds
    with torch.device("meta"):
        converted = transformers.WhisperForConditionalGeneration(config)
    own = model.state_dict()
    renamed = {name: openai_name(name) for name in converted.state_dict() if name != "proj_out.weight"}
    weights = {name: own[source].clone() for name, source in renamed.items() if source is not None}
    converted.load_state_dict(weights, strict=False, assign=True)
    converted.tie_weights()
    converted.name_or_path = model_name(model)
    converted.generation_config = _generation_config(transformers, model, tokenizer, special)
    return converted.eval().requires_grad_(False)


def _generation_config(transformers: Any, model: Whisper, tokenizer: Tokenizer, special: Any) -> Any:
    first = tokenizer.sot_prev
    multilingual: dict[str, Any] = {}
    if model.is_multilingual:
        codes = zip(tokenizer.all_language_codes, tokenizer.all_language_tokens, strict=True)
        multilingual["lang_to_id"] = {f"<|{code}|>": token for code, token in codes}
        multilingual["task_to_id"] = {"transcribe": tokenizer.transcribe, "translate": tokenizer.translate}
    silent = (tokenizer.transcribe, tokenizer.translate, tokenizer.sot, first, tokenizer.sot_lm)
    return transformers.GenerationConfig(
        **special,
        **multilingual,
        is_multilingual=model.is_multilingual,
        max_length=model.dims.n_text_ctx,
        no_timestamps_token_id=tokenizer.no_timestamps,
        prev_sot_token_id=first,
        max_initial_timestamp_index=MAX_INITIAL_TIMESTAMP,
        return_timestamps=False,
        suppress_tokens=sorted({*tokenizer.non_speech_tokens, *silent, tokenizer.no_speech}),
        begin_suppress_tokens=[*tokenizer.encode(" "), tokenizer.eot],
        alignment_heads=model.alignment_heads.indices().T.tolist(),
    )

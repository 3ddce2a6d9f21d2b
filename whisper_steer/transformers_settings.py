"""Whisper's settings in transformers' words: config.json and generation_config.json as plain dicts.

Used for the folder that is written (transformers_folder.py) and for the model that is made in memory
(transformers_model.py), so that the two cannot drift apart. transformers itself is not needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .convert_hf import DIMS

if TYPE_CHECKING:
    from whisper.model import Whisper
    from whisper.tokenizer import Tokenizer

MAX_INITIAL_TIMESTAMP = 50  # openai-whisper: the first timestamp is at most 1 s, in steps of 20 ms


def tokenizer_of(model: Whisper) -> Tokenizer:
    """openai-whisper's tokenizer for this model, with as many languages as its vocabulary has."""
    from whisper.tokenizer import get_tokenizer

    return get_tokenizer(model.is_multilingual, num_languages=model.num_languages)


def model_config(model: Whisper, tokenizer: Tokenizer) -> dict[str, Any]:
    """What WhisperConfig takes: sizes, special tokens, and no dropout."""
    dims = model.dims
    return {
        **{key: int(getattr(dims, field)) for field, key in DIMS.items()},
        **_special_ids(tokenizer),
        "encoder_ffn_dim": 4 * dims.n_audio_state,
        "decoder_ffn_dim": 4 * dims.n_text_state,
        "activation_function": "gelu",
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "scale_embedding": False,
        "is_encoder_decoder": True,
        "use_cache": True,
    }


def generation_config(model: Whisper, tokenizer: Tokenizer) -> dict[str, Any]:
    """What GenerationConfig takes, as in the published openai/whisper-* repositories.

    suppress_tokens is what openai-whisper's `suppress_tokens="-1"` means: symbols that are not spoken, and
    tokens of the protocol.
    """
    protocol = {
        tokenizer.transcribe,
        tokenizer.translate,
        tokenizer.sot,
        tokenizer.sot_prev,
        tokenizer.sot_lm,
        tokenizer.no_speech,
    }
    config: dict[str, Any] = {
        **_special_ids(tokenizer),
        "alignment_heads": model.alignment_heads.to_dense().nonzero().tolist(),
        "begin_suppress_tokens": [*tokenizer.encode(" "), tokenizer.eot],
        "is_multilingual": model.is_multilingual,
        "max_initial_timestamp_index": MAX_INITIAL_TIMESTAMP,
        "max_length": model.dims.n_text_ctx,
        "no_timestamps_token_id": tokenizer.no_timestamps,
        "prev_sot_token_id": tokenizer.sot_prev,
        "return_timestamps": False,
        "suppress_tokens": sorted({*tokenizer.non_speech_tokens, *protocol}),
    }
    if model.is_multilingual:
        # openai-whisper lists them in the order of a set, which differs from run to run
        languages = sorted(zip(tokenizer.all_language_tokens, tokenizer.all_language_codes, strict=True))
        config["lang_to_id"] = {f"<|{code}|>": token for token, code in languages}
        config["task_to_id"] = {"transcribe": tokenizer.transcribe, "translate": tokenizer.translate}
    return config


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.eot,
        "eos_token_id": tokenizer.eot,
        "pad_token_id": tokenizer.eot,
        "decoder_start_token_id": tokenizer.sot,
    }

"""The arguments and results of transformers' `generate_with_fallback`, for some of its windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def sounding_frames(given: Mapping[str, Any]) -> list[int] | None:
    """Mel frames with sound per audio: by the attention mask, else all; None where even that is padding."""
    mask, features = given.get("attention_mask"), given.get("input_features")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return [int(total) for total in mask.sum(-1).tolist()]
    return [features.shape[-1]] * len(features) if isinstance(features, Tensor) else None


def only_rows(arguments: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The arguments of `generate_with_fallback` for some of the windows."""
    kwargs = dict(arguments["kwargs"])
    if kwargs.get("decoder_attention_mask") is not None:
        kwargs["decoder_attention_mask"] = kwargs["decoder_attention_mask"][rows]
    listed = ("batch_idx_map", "do_condition_on_prev_tokens")
    return {
        **arguments,
        "cur_bsz": len(rows),
        "segment_input": arguments["segment_input"][rows],
        "decoder_input_ids": arguments["decoder_input_ids"][rows],
        "kwargs": kwargs,
        **{name: [arguments[name][row] for row in rows] for name in listed},
    }


def not_decoded(prompt: Tensor, config: Any) -> Any:
    """Stands for the output of a window that the decoder never saw: its prompt, nothing behind it."""
    if not getattr(config, "return_dict_in_generate", False):
        return prompt
    return {"sequences": prompt.cpu(), "token_timestamps": torch.zeros(len(prompt))}


def silenced(output: Any, prompt_length: int, config: Any) -> Any:
    """The window's output with its tokens gone: the end of text right behind the prompt, then padding."""
    if isinstance(output, Mapping):
        return {**output, "sequences": silenced(output["sequences"], prompt_length, config)}
    ends = config.eos_token_id
    end = int(ends[0] if isinstance(ends, (list, tuple)) else ends)
    silent = output.clone()
    silent[prompt_length:] = end if config.pad_token_id is None else int(config.pad_token_id)
    silent[prompt_length : prompt_length + 1] = end
    return silent


def no_speech_prob(processors: Any, row: int, count: int) -> float | None:
    """What transformers' own detector says of this window; it runs only if no_speech_threshold is given."""
    found = [p.no_speech_prob for p in processors or () if hasattr(p, "no_speech_prob")]
    return float(found[0][row]) if found and len(found[0]) == count else None

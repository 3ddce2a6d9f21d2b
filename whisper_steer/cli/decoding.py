"""From options as written to what whisper.transcribe takes, by the rules of openai-whisper's own command."""

from __future__ import annotations

import logging
from typing import Any

from ..errors import UsageError

logger = logging.getLogger("whisper_steer")


def known_options(args: dict[str, Any]) -> dict[str, Any]:
    """Options for whisper.transcribe; one that an older openai-whisper lacks is left out where it is off."""
    from ..backends.openai import option_names

    names = option_names()
    return {name: value for name, value in args.items() if name in names or value not in (None, False)}


def check_word_options(word_options: dict[str, Any], word_timestamps: bool) -> None:
    """openai-whisper's own rules."""
    for name, value in word_options.items():
        if value and not word_timestamps:
            raise UsageError(f"--{name.replace('_', '-')} requires --word-timestamps True")
    if word_options["max_line_count"] and not word_options["max_line_width"]:
        logger.warning("--max-line-count has no effect without --max-line-width")
    if word_options["max_words_per_line"] and word_options["max_line_width"]:
        logger.warning("--max-words-per-line has no effect with --max-line-width")


def temperatures(first: float, step: float | None) -> tuple[float, ...]:
    """first, first + step, ... up to 1: tried in turn until decoding succeeds."""
    import numpy as np

    if not first >= 0:
        raise UsageError(f"--temperature {first}: expected a number >= 0")
    if step is None:
        return (first,)
    if not step > 0:
        raise UsageError(f"--temperature-increment-on-fallback {step}: expected a number > 0, or None")
    return tuple(float(t) for t in np.arange(first, 1.0 + 1e-6, step)) or (first,)


def language(given: str | None) -> str | None:
    """A code, from a code or a name in any case."""
    if given is None:
        return None
    from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE

    name = given.lower()
    if name not in LANGUAGES and name not in TO_LANGUAGE_CODE:
        raise UsageError(f"--language {given}: expected a code or name Whisper knows, such as en or English")
    return TO_LANGUAGE_CODE.get(name, name)


def fitting_language(model: Any, language: str | None, task: str) -> str | None:
    """The language to ask a loaded model of any backend for."""
    if _is_multilingual(model):
        return language
    if language not in (None, "en"):
        logger.warning("the model is English-only: --language %s is ignored", language)
    if task == "translate":
        logger.warning("the model is English-only: --task translate is ignored")
    return "en"


def _is_multilingual(model: Any) -> bool:
    """Some models say so themselves, faster-whisper's in its CTranslate2 model."""
    for place in (model, getattr(model, "model", None), getattr(model, "generation_config", None)):
        found = getattr(place, "is_multilingual", None)
        if isinstance(found, bool):
            return found
    return True

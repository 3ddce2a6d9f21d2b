"""transformers: the sequential long-form `generate` of WhisperForConditionalGeneration."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from whisper.utils import compression_ratio

from ..audio import SAMPLING_RATE
from ..convert_from import is_ct2_folder
from ..convert_hf import is_transformers_folder
from ..errors import ModelError, UsageError
from ..fileformat import model_name
from ..registry import model_lock
from ..transformers_model import from_openai, quietly, require_transformers, vocabulary
from ..transformers_steering import OpenAIView, is_pipeline, is_transformers_model
from ..withholding import collecting
from ..zoo import load_model
from .asked import Asked, at_work
from .openai import option_names

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from . import Progress

# openai-whisper's name: transformers'
_RENAMED = {
    "language": "language",
    "task": "task",
    "beam_size": "num_beams",
    "sample_len": "max_new_tokens",
    "condition_on_previous_text": "condition_on_prev_tokens",
}
# decoding rules and their defaults; transformers takes the compression ratio of token numbers, not of the
# text, and recommends 1.35 where openai-whisper has 2.4
_RULES: dict[str, Any] = {
    "temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    "compression_ratio_threshold": 1.35,
    "logprob_threshold": -1.0,
    "no_speech_threshold": 0.6,
}
_OPENAI_COMPRESSION_RATIO = 2.4
# settings that mean "as usual" in openai-whisper and its command; anything else has no counterpart
_USUAL: dict[str, tuple[Any, ...]] = {
    "verbose": (None, False),
    "fp16": (True, False),  # the model's own precision holds
    "best_of": (None, 5),
    "clip_timestamps": ("0",),
    "suppress_tokens": (None, "-1", ""),
    "prepend_punctuations": ("\"'“¿([{-",),
    "append_punctuations": ("\"'.。,，!！?？:：”)]}、",),
    "suppress_blank": (True,),
    "max_initial_timestamp": (1.0,),
}


class TransformersBackend:
    """One transformers Whisper (or an ASR pipeline's), given or loaded by name, steered for the length of
    each call of `transcribe`.

    asked.alpha 0: plain Whisper, no steering is looked for.
    """

    def __init__(
        self,
        model: Any,
        asked: Asked = Asked(),  # noqa: B008  frozen
        *,
        device: str | torch.device | None = None,
        download_root: str | Path | None = None,
    ) -> None:
        model = model.model if is_pipeline(model) else model
        loaded = is_transformers_model(model)
        if loaded and device is not None:
            raise UsageError("device is for a model given by name: move a loaded one with model.to(device)")
        if not loaded and not isinstance(model, (str, Path)):
            raise UsageError(
                f"model is a {type(model).__name__}: expected a name, a path, or transformers' "
                "WhisperForConditionalGeneration or ASR pipeline"
            )
        self._given = model
        self._asked = asked
        self._device = device
        self._download_root = download_root
        self._model: Any = None

    def load(self) -> Any:
        """The model; a named one is loaded at the first call: a transformers folder as it is, anything else
        that zoo.load_model takes converted in memory. Raises ModelError, FormatError, UsageError."""
        if self._model is None:
            require_transformers()
            self._model = self._loaded() if isinstance(self._given, (str, Path)) else self._given
        return self._model

    def transcribe(
        self, audio: NDArray[np.float32], options: Mapping[str, Any], progress: Progress | None = None
    ) -> dict[str, Any]:
        """See Backend. options: openai-whisper's, as far as transformers has a counterpart; thresholds and
        temperatures default to openai-whisper's.

        Raises UsageError (unknown option, no counterpart, a refused value), MismatchError (see steer).
        """
        arguments = _arguments(options)
        model = self.load()
        tokenizer = vocabulary(model.config.vocab_size)
        if tokenizer is None:
            raise UsageError(
                f"the model has {model.config.vocab_size} tokens: expected Whisper's own vocabulary"
            )
        prompt = options.get("initial_prompt")
        if prompt:
            tokens = [tokenizer.sot_prev, *tokenizer.encode(" " + prompt.strip())]
            arguments["prompt_ids"] = torch.tensor(tokens, device=model.device)
        if not getattr(model.generation_config, "lang_to_id", None):
            for name in ("language", "task"):
                arguments.pop(name, None)  # transformers refuses them for English-only models
        words = bool(options.get("word_timestamps"))
        with model_lock(model), self._asked.steered(model) as handles, collecting(model) as collector:
            with _noting(model) as notes, quietly():
                output = self._generate(model, audio, arguments, words, progress)
            segments = [_segment(s, notes, tokenizer, words) for s in output]
        kept = [{**s, "id": i} for i, s in enumerate(s for s in segments if s["text"].strip())]
        return {
            "text": "".join(segment["text"] for segment in kept),
            "segments": kept,
            "language": _language(output, model) or options.get("language") or "en",
            "suppressed": list(collector.records),
            "edited": list(collector.edited),
            "model": model_name(OpenAIView(model)),
            **at_work(handles),
        }

    def close(self) -> None:
        self._model = None

    def _loaded(self) -> Any:
        given = Path(self._given).expanduser()
        if not is_transformers_folder(given) or is_ct2_folder(given):  # both have a config.json
            return from_openai(
                load_model(self._given, device=self._device, download_root=self._download_root)
            )
        try:
            with quietly():
                model = require_transformers().WhisperForConditionalGeneration.from_pretrained(
                    given, local_files_only=True
                )
        except (OSError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{given}: transformers cannot load it ({reason})") from error
        default = "cuda" if torch.cuda.is_available() else "cpu"
        return model.to(self._device or default).eval()

    def _generate(
        self,
        model: Any,
        audio: NDArray[np.float32],
        arguments: dict[str, Any],
        words: bool,
        progress: Progress | None,
    ) -> list[dict[str, Any]]:
        """transformers' segments of the audio; [] if there is none."""
        if len(audio) == 0:
            return []
        extractor = require_transformers().WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
        features = extractor(
            audio,
            sampling_rate=SAMPLING_RATE,
            truncation=False,
            padding="longest" if len(audio) > extractor.n_samples else "max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        seconds = len(audio) / SAMPLING_RATE
        if progress is not None and "monitor_progress" in inspect.signature(type(model).generate).parameters:
            arguments["monitor_progress"] = lambda state: progress(
                min(seconds, float(state[0, 0]) / 100), seconds
            )
        try:
            output = model.generate(
                features["input_features"].to(model.device, model.dtype),
                attention_mask=features["attention_mask"].to(model.device),
                return_timestamps=True,
                return_segments=True,
                return_token_timestamps=words or None,
                **arguments,
            )
        except UsageError:
            raise
        except ValueError as error:  # how transformers refuses a language, a prompt that is too long, ...
            raise UsageError((str(error).splitlines() or ["transformers refused an option"])[0]) from error
        if progress is not None:
            progress(seconds, seconds)
        segments: list[dict[str, Any]] = output["segments"][0]
        return segments


@dataclasses.dataclass
class _Notes:
    """What transformers forgets about a window: by the identity of its output."""

    seek: int = 0
    windows: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)


@contextmanager
def _noting(model: Any) -> Iterator[_Notes]:
    """Within the block, the temperature, the scores and the place of each window are written down."""
    notes = _Notes()
    decode, judge = model.generate_with_fallback, model._need_fallback
    before = {name: model.__dict__.get(name) for name in ("generate_with_fallback", "_need_fallback")}

    def decoding(*args: Any, **kwargs: Any) -> Any:
        asked = inspect.signature(decode).bind(*args, **kwargs).arguments
        # through a steered model's own method the arguments arrive by name
        seek = asked.get("seek", asked.get("kwargs", {}).get("seek"))
        notes.seek = int(seek[0])
        return decode(*args, **kwargs)

    def judging(*args: Any, **kwargs: Any) -> Any:
        answer = judge(*args, **kwargs)
        sequence, outputs, index, processors, _, _, temperature = args
        output = outputs[index]  # a tensor where no threshold needs the scores
        scores = output.get("scores") if isinstance(output, Mapping) else None
        logprob = (
            float("nan")
            if scores is None
            else float(model._retrieve_avg_logprobs(scores, sequence, temperature))
        )
        found = [p.no_speech_prob for p in processors or () if hasattr(p, "no_speech_prob")]
        notes.windows[id(output)] = {
            "temperature": float(temperature),
            "avg_logprob": logprob,
            "no_speech_prob": float(found[0][index]) if found and index < len(found[0]) else float("nan"),
            "seek": notes.seek,
            "output": output,  # kept alive, so that its id stays its own
        }
        return answer

    replacements: dict[str, Callable[..., Any]] = {
        "generate_with_fallback": decoding,
        "_need_fallback": judging,
    }
    for name, replacement in replacements.items():
        setattr(model, name, replacement)
    try:
        yield notes
    finally:
        for name, earlier in before.items():
            if earlier is None:
                delattr(model, name)
            else:
                setattr(model, name, earlier)


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """openai-whisper's options as arguments of `generate`."""
    unknown = sorted(set(options) - option_names())
    if unknown:
        raise UsageError(
            f"unknown option {unknown[0]!r}: expected one of openai-whisper's: "
            + ", ".join(sorted(option_names()))
        )
    arguments = {name: options.get(name, default) for name, default in _RULES.items()}
    if arguments["compression_ratio_threshold"] == _OPENAI_COMPRESSION_RATIO:
        arguments["compression_ratio_threshold"] = _RULES["compression_ratio_threshold"]
    if isinstance(arguments["temperature"], (int, float)):
        arguments["temperature"] = (float(arguments["temperature"]),)
    if arguments["logprob_threshold"] is None and arguments["no_speech_threshold"] is not None:
        raise UsageError("transformers needs logprob_threshold for no_speech_threshold: pass both or neither")
    arguments["condition_on_prev_tokens"] = True
    for name, value in options.items():
        if name in _RENAMED:
            if value is not None:
                arguments[_RENAMED[name]] = value
        elif name not in (*_RULES, "initial_prompt", "word_timestamps"):
            if value not in _USUAL.get(name, (None, False)):
                raise UsageError(
                    f"transformers has no counterpart of {name}={value!r}: leave it out, or use the backend "
                    "openai"
                )
    return arguments


def _segment(found: Mapping[str, Any], notes: _Notes, tokenizer: Any, words: bool) -> dict[str, Any]:
    """One of transformers' segments as openai-whisper's dict, without its id."""
    tokens = found["tokens"].tolist()
    text = tokenizer.decode([token for token in tokens if token < tokenizer.eot])
    nothing = {"temperature": 0.0, "avg_logprob": 0.0, "no_speech_prob": 0.0, "seek": 0}
    note = notes.windows.get(id(found["result"]), nothing)
    segment = {
        "seek": note["seek"],
        "start": round(float(found["start"]), 2),
        "end": round(float(found["end"]), 2),
        "text": text,
        "tokens": tokens,
        "temperature": note["temperature"],
        "avg_logprob": note["avg_logprob"],
        "compression_ratio": compression_ratio(text),
        "no_speech_prob": note["no_speech_prob"],
    }
    if words:
        segment["words"] = _words(found, tokens, tokenizer)
    return segment


def _words(found: Mapping[str, Any], tokens: list[int], tokenizer: Any) -> list[dict[str, Any]]:
    """Words with their times: a token begins at its own timestamp and ends at the next one's."""
    if not tokens:  # a withheld window; where it was not decoded there are no scores either
        return []
    times = [float(time) for time in found["token_timestamps"]]
    first = found["idxs"][0] - (len(found["result"]["sequences"]) - len(found["result"]["scores"]))
    places = [place for place, token in enumerate(tokens) if token < tokenizer.eot]
    parts, groups = tokenizer.split_to_word_tokens([tokens[place] for place in places])
    words, reached = [], 0
    for text, group in zip(parts, groups, strict=True):
        own = places[reached : reached + len(group)]
        reached += len(group)
        if not own:
            continue
        end = times[own[-1] + 1] if own[-1] + 1 < len(times) else float(found["end"])
        scores = found["result"]["scores"]
        chances = [
            float(scores[first + place].float().softmax(-1)[tokens[place]])
            for place in own
            if 0 <= first + place < len(scores)
        ]
        words.append(
            {
                "word": text,
                "start": round(times[own[0]], 2),
                "end": round(max(end, times[own[0]]), 2),
                "probability": sum(chances) / len(chances) if chances else float("nan"),
            }
        )
    return words


def _language(segments: list[dict[str, Any]], model: Any) -> str | None:
    """The language token in the first window's prompt; None for an English-only model."""
    names = {token: name for name, token in (getattr(model.generation_config, "lang_to_id", {})).items()}
    for segment in segments[:1]:
        output = segment["result"]
        for token in (output["sequences"] if isinstance(output, Mapping) else output).tolist():
            if token in names:
                return str(names[token]).strip("<|>")
    return None

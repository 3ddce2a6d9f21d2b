"""faster-whisper: CTranslate2's decoder, several times faster than openai-whisper's."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faster_whisper

from .. import faster
from ..audio import SAMPLING_RATE
from ..ct2_encoder import plain_name
from ..ct2_steering import SteeredWhisper
from ..errors import ModelError, UsageError
from ..registry import model_lock
from ..withholding import collecting
from .asked import Asked, at_work
from .openai import option_names

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from . import Progress


def _suppressed_tokens(value: Any) -> Any:
    if isinstance(value, str):
        return [int(token) for token in value.split(",") if token.strip()]
    return value


def _language(value: Any) -> Any:
    from whisper.tokenizer import TO_LANGUAGE_CODE

    return TO_LANGUAGE_CODE.get(value.lower(), value.lower()) if isinstance(value, str) else value


def _one_if_none(value: Any) -> Any:
    return 1 if value is None else value


# openai-whisper's name: (faster-whisper's, the same value there)
_TRANSLATED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "logprob_threshold": ("log_prob_threshold", lambda value: value),
    "sample_len": ("max_new_tokens", lambda value: value),
    "suppress_tokens": ("suppress_tokens", _suppressed_tokens),
    "language": ("language", _language),
    # None is openai-whisper's greedy decoding, one candidate, and so on
    "beam_size": ("beam_size", _one_if_none),
    "best_of": ("best_of", _one_if_none),
    "patience": ("patience", _one_if_none),
    "length_penalty": ("length_penalty", _one_if_none),
    "max_initial_timestamp": ("max_initial_timestamp", lambda value: 30.0 if value is None else value),
}
# openai-whisper's that say nothing here: fp16 is compute_type, of the model; verbose prints
_WITHOUT_EFFECT = ("fp16", "verbose")


class FasterBackend:
    """One faster-whisper model, given or loaded by name, steered for the length of each call of `transcribe`.

    model: a folder with a model.bin, a size or hub id that faster-whisper downloads, or a loaded
    WhisperModel (whisper_steer.faster's or faster-whisper's own). asked.alpha 0: plain Whisper, no steering
    is looked for. cpu_threads: of a named model; 0: CTranslate2's choice.
    """

    def __init__(
        self,
        model: Any,
        asked: Asked = Asked(),  # noqa: B008  frozen
        *,
        device: str | torch.device | None = None,
        download_root: str | Path | None = None,
        cpu_threads: int = 0,
    ) -> None:
        loaded = isinstance(model, faster_whisper.WhisperModel)
        if loaded and device is not None:
            raise UsageError("device is for a model given by name: a loaded one stays where it is")
        if not loaded and not isinstance(model, (str, Path)):
            raise UsageError(
                f"model is a {type(model).__name__}: expected a CTranslate2 folder, a name that "
                "faster-whisper knows, or a faster-whisper WhisperModel"
            )
        self._given = model
        self._asked = asked
        self._device = device
        self._download_root = download_root
        self._cpu_threads = cpu_threads
        self._model: Any = None

    def load(self) -> faster_whisper.WhisperModel:
        """The model; a named one is loaded at the first call, steered by then.

        Raises ModelError (unknown name, no network, not a CTranslate2 model), MismatchError, FormatError.
        """
        if self._model is None:
            named = isinstance(self._given, (str, Path))
            self._model = self._loaded(str(self._given)) if named else self._given
        return self._model

    def transcribe(
        self, audio: NDArray[np.float32], options: Mapping[str, Any], progress: Progress | None = None
    ) -> dict[str, Any]:
        """See Backend. options: those of the installed WhisperModel.transcribe, or openai-whisper's, which
        are translated; what is not given has faster-whisper's default (beam_size 5).

        Raises UsageError (unknown option, no counterpart, a refused value), MismatchError (see steer).
        """
        arguments = _arguments(options)
        model = self.load()
        seconds, ours = len(audio) / SAMPLING_RATE, model is not self._given
        # to the last segment: they are decoded while they are walked through
        with model_lock(model), self._asked.steered(model, ours) as handles, collecting(model) as collector:
            try:
                found, info = model.transcribe(audio, **arguments)
                segments: list[dict[str, Any]] = []
                for segment in found:
                    segments.append(_segment(segment, len(segments)))
                    if progress is not None:
                        progress(min(float(segment.end), seconds), seconds)
            except UsageError:
                raise
            except (
                ValueError
            ) as error:  # how faster-whisper refuses a language, a prompt that is too long, ...
                raise UsageError(
                    (str(error).splitlines() or ["faster-whisper refused an option"])[0]
                ) from error
        if progress is not None:
            progress(seconds, seconds)
        return {
            "text": "".join(segment["text"] for segment in segments),
            "segments": segments,
            "language": info.language,
            "suppressed": list(collector.records),
            "edited": list(collector.edited),
            "model": self._name(model),
            **at_work(handles),
        }

    def close(self) -> None:
        self._model = None

    def _loaded(self, name: str) -> faster.WhisperModel:
        path = Path(name).expanduser()
        name = str(path) if path.exists() else name
        if path.exists() and not is_ct2_folder(path):
            raise ModelError(
                f"{name} is not a CTranslate2 model (a folder with model.bin): make one with whisper-steer "
                f"convert --model {name} --format ct2, or choose another backend"
            )
        options: dict[str, Any] = {} if self._device is None else _placed(str(self._device))
        if self._download_root is not None:
            options["download_root"] = str(self._download_root)
        options["cpu_threads"] = self._cpu_threads
        try:
            return faster.WhisperModel(name, **self._asked.strength, **options)
        except UsageError:
            raise
        except (OSError, RuntimeError, ValueError) as error:  # faster-whisper's, CTranslate2's and the hub's
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")
            way_out = _way_out(name, reason, isinstance(error, ValueError))
            raise ModelError(f"faster-whisper cannot load {name} ({reason}): {way_out}") from error

    def _name(self, model: Any) -> str:
        steered = model.model if isinstance(model.model, SteeredWhisper) else None
        given = self._given if isinstance(self._given, (str, Path)) else ""
        return plain_name(
            getattr(model, "_name", "") or given or (steered.source.path if steered else "unnamed")
        )


def is_ct2_folder(path: str | Path) -> bool:
    """Does a CTranslate2 model lie there?"""
    return (Path(path).expanduser() / "model.bin").is_file()


def _way_out(name: str, reason: str, refused: bool) -> str:
    """What helps when a model cannot be loaded. refused: for its name, or for the value of an option."""
    if re.search("cuda|cublas|cudnn", reason, re.IGNORECASE):
        return "pass device cpu, or repair CUDA"
    if is_ct2_folder(name):
        return "fetch or convert the model again if its files are damaged"
    if refused or "model.bin" in reason:
        return (
            f"pass a CTranslate2 folder (whisper-steer convert --model {name} --format ct2 makes one), or "
            "choose another backend"
        )
    return "connect to the network once, or pass a CTranslate2 folder"


def _placed(device: str) -> dict[str, Any]:
    """torch's name of a device ("cuda:1") in faster-whisper's words."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "auto") or (index and not index.isdigit()):
        raise UsageError(f"device {device!r} is not one of faster-whisper's: expected cpu, cuda or cuda:N")
    return {"device": kind, **({"device_index": int(index)} if index else {})}


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as arguments of WhisperModel.transcribe."""
    known = set(inspect.signature(faster_whisper.WhisperModel.transcribe).parameters) - {"self", "audio"}
    openai = option_names()
    arguments: dict[str, Any] = {}
    for name, value in options.items():
        target, translate = _TRANSLATED.get(name, (name, lambda value: value))
        if target in known:
            arguments[target] = translate(value)
        elif name not in openai:
            raise UsageError(
                f"unknown option {name!r}: expected one of faster-whisper's: {', '.join(sorted(known))}"
            )
        elif name not in _WITHOUT_EFFECT and value not in (None, False):
            raise UsageError(
                f"faster-whisper has no counterpart of {name}={value!r}: leave it out, or use the backend "
                "openai"
            )
    return arguments


def _segment(segment: Any, number: int) -> dict[str, Any]:
    """faster-whisper's Segment as openai-whisper's dict."""
    found: dict[str, Any] = {
        "id": number,
        "seek": segment.seek,
        "start": float(segment.start),
        "end": float(segment.end),
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": float(segment.temperature or 0.0),
        "avg_logprob": float(segment.avg_logprob),
        "compression_ratio": float(segment.compression_ratio),
        "no_speech_prob": float(segment.no_speech_prob),
    }
    if segment.words is not None:
        names = ("word", "start", "end", "probability")
        found["words"] = [{name: getattr(word, name) for name in names} for word in segment.words]
    return found

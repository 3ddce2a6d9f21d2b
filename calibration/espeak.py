"""espeak-ng through the pip package espeakng-loader: text in, 16 kHz speech with word and phoneme times out.

No espeak binary is needed. The library keeps one global state, so there is one engine per process; start a
second process for a second engine.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import numpy as np

from whisper_steer.errors import ModelError

SAMPLING_RATE = 16_000
_EVENT_END, _EVENT_WORD, _EVENT_PHONEME = 0, 1, 7  # espeak_EVENT_TYPE in speak_lib.h
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER
_SEED = 1
_SYNCHRONOUS, _PHONEME_EVENTS, _DONT_EXIT, _UTF8 = 2, 1, 0x8000, 1


@dataclass(frozen=True)
class Voice:
    """One way of speaking: an accent (the name of a file in espeak-ng's lang/, so British English is "en"), a
    variant (timbre, a file in voices/!v) and prosody.

    rate: words per minute (80..450); pitch and pitch_range: 0..99.
    """

    accent: str = "en-us"
    variant: str = ""
    rate: int = 165
    pitch: int = 50
    pitch_range: int = 50

    @property
    def name(self) -> str:
        """espeak's spelling, accent+variant."""
        return f"{self.accent}+{self.variant}" if self.variant else self.accent


@dataclass(frozen=True)
class Utterance:
    """audio: float32 (n,), 16 kHz, -1..1. words: (character position from 0, start in seconds). phonemes:
    (name, start in seconds), stress marks removed, pauses named "_". The phoneme that starts at t lasts
    until the next one."""

    audio: np.ndarray
    words: tuple[tuple[int, float], ...]
    phonemes: tuple[tuple[str, float], ...]


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


class _Engine:
    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise ModelError(
                "speech synthesis needs espeakng-loader: pip install 'whisper-steer[calibration]'"
            ) from error
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.rate = self.library.espeak_Initialize(_SYNCHRONOUS, 0, data, _PHONEME_EVENTS | _DONT_EXIT)
        if self.rate <= 0:
            raise ModelError(f"espeak-ng did not start with the voices in {data.decode()}")
        self.pieces: list[bytes] = []
        self.words: list[tuple[int, float]] = []
        self.phonemes: list[tuple[str, float]] = []
        self._callback = _CALLBACK(self._receive)  # kept: ctypes does not own it
        self.library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count, events) -> int:  # type: ignore[no-untyped-def]
        if samples and count > 0:
            self.pieces.append(ctypes.string_at(samples, count * 2))
        index = 0
        while events[index].type != _EVENT_END:
            event = events[index]
            seconds = event.audio_position / 1000
            if event.type == _EVENT_WORD:
                self.words.append((event.text_position - 1, seconds))
            elif event.type == _EVENT_PHONEME:
                name = event.id.string.decode("utf-8", "replace").strip("',%=|:!") or "_"
                self.phonemes.append(("_" if name.startswith("_") else name, seconds))
            index += 1
        return 0

    def speak(self, text: str, voice: Voice) -> Utterance:
        import soxr

        self.pieces, self.words, self.phonemes = [], [], []
        if self.library.espeak_SetVoiceByName(voice.name.encode()) != 0:  # it would go on with the last voice
            raise ModelError(
                f"espeak-ng has no voice {voice.name!r}: expected a name such as en-us or en-us+f3"
            )
        for parameter, value in ((_RATE, voice.rate), (_PITCH, voice.pitch), (_RANGE, voice.pitch_range)):
            self.library.espeak_SetParameter(parameter, value, 0)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))  # breath and whisper are random noise
        data = text.encode() + b"\0"
        if self.library.espeak_Synth(data, len(data), 0, 1, 0, _UTF8, None, None) != 0:
            raise ModelError(f"espeak-ng could not speak {text!r} with {voice.name}")
        native = np.frombuffer(b"".join(self.pieces), np.int16).astype(np.float32) / 32768
        audio = soxr.resample(native, self.rate, SAMPLING_RATE).astype(np.float32)
        return Utterance(audio, tuple(self.words), tuple(self.phonemes))


@functools.cache
def _engine() -> _Engine:
    return _Engine()


def speak(text: str, voice: Voice | None = None) -> Utterance:
    """`text` spoken by `voice`. Raises ModelError for an unknown voice.

    espeak-ng carries a little state from one utterance to the next: a fresh process that speaks the same
    list in the same order gives the same samples, the same sentence later in a list need not.
    """
    return _engine().speak(text, voice or Voice())

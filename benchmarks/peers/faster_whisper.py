"""faster-whisper: CTranslate2's decoder in sequence and in batches, each with and without its VAD filter.

The model is converted to CTranslate2 in float32 once per weights. Options are faster-whisper's defaults
(beam_size 5; in sequence temperature fallback and the skip rule, in batches neither); the language is
English. Its scores are only shown for segments with words: the label events are those of the segments, and
what its VAD or its skip rule left out counts as recognised non-speech.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.methods import FASTER, Heard, Method, Setup, Unavailable
from benchmarks.peers.intervention import label_events
from benchmarks.peers.silero import THRESHOLDS, check_vad, vad_version

if TYPE_CHECKING:
    from calibration.corpus import Clip

RATE = 16_000
WINDOW = 30 * RATE
BATCH = 8  # faster-whisper's default
_LOADED = "faster-whisper's model"


def converted(setup: Setup) -> Path:
    """The CTranslate2 folder of setup.model, made once per weights under setup.cache. Raises Unavailable."""
    from calibration.hallucinations import model_crc
    from whisper_steer.convert import convert
    from whisper_steer.errors import FormatError, UsageError

    folder = setup.cache / f"ct2-{model_crc(setup.model):08x}"
    if not folder.exists():
        try:
            convert(setup.model, "ct2", folder)
        except (FormatError, UsageError) as error:
            if not folder.exists():  # another process may have been faster
                raise Unavailable(f"it needs the model in CTranslate2's format: {error}") from error
    return folder


def load(setup: Setup) -> Any:
    """faster-whisper's WhisperModel of setup.model, on the same device and with torch's number of threads;
    loaded once per setup. Raises Unavailable."""
    if _LOADED not in setup.memory:
        try:
            import faster_whisper
        except ImportError as error:
            raise Unavailable(f"{error.name} is missing: pip install faster-whisper") from error
        import torch

        device = setup.model.device
        if device.type not in ("cpu", "cuda"):
            raise Unavailable(f"CTranslate2 does not run on {device.type}: expected cpu or cuda")
        setup.memory[_LOADED] = faster_whisper.WhisperModel(
            str(converted(setup)),
            device=device.type,
            device_index=device.index or 0,
            compute_type="float32",
            cpu_threads=torch.get_num_threads(),
        )
    return setup.memory[_LOADED]


def windows(samples: int) -> list[dict[str, float]]:
    """Consecutive windows of 30 s in seconds, as the batched pipeline wants them where nothing finds speech;
    one for no audio."""
    starts = range(0, max(samples, 1), WINDOW)
    return [{"start": start / RATE, "end": min(start + WINDOW, samples) / RATE} for start in starts]


@dataclass(frozen=True)
class FasterWhisper:
    """See benchmarks.methods.Method. batched: BatchedInferencePipeline. vad: with the VAD filter, strength is
    then its threshold (else 0)."""

    name: str
    about: str
    batched: bool
    vad: bool
    timed: str = FASTER
    needs: tuple[str, ...] = ("faster_whisper", "ctranslate2", "transformers", "onnxruntime")

    @property
    def strengths(self) -> tuple[float, ...]:
        return THRESHOLDS if self.vad else (0.0,)

    @property
    def quick_strengths(self) -> tuple[float, ...]:
        return (0.5,) if self.vad else (0.0,)

    def prepare(self, setup: Setup) -> None:
        if self.vad:
            check_vad()
        load(setup)

    def fingerprint(self, setup: Setup) -> str:
        """What the words depend on beside the model."""
        return vad_version()

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        import ctranslate2
        import faster_whisper

        model = load(setup)
        runtime = faster_whisper.BatchedInferencePipeline(model) if self.batched else model
        for clip in clips:
            audio = np.ascontiguousarray(setup.audio(clip), dtype=np.float32)
            ctranslate2.set_random_seed(0)  # sampling at higher temperatures repeats
            began = time.perf_counter()
            found, _ = runtime.transcribe(audio, **self.options(strength, len(audio)))
            kept = list(found)  # it decodes while it is read
            segments = tuple((float(s.start), float(s.end), str(s.text)) for s in kept)
            nsp, hr = label_events((s.no_speech_prob, s.avg_logprob) for s in kept)
            yield Heard(
                text="".join(text for _, _, text in segments),
                segments=segments,
                nsp=nsp,
                hr=hr,
                seconds=time.perf_counter() - began,
            )

    def options(self, threshold: float, samples: int) -> dict[str, Any]:
        """Arguments of `transcribe` for a recording of so many samples at 16 kHz."""
        options: dict[str, Any] = {"language": "en", "vad_filter": self.vad}
        if self.batched:
            options["batch_size"] = BATCH
        if self.vad:
            options["vad_parameters"] = {"threshold": threshold}
            if self.batched:
                # what the pipeline sets only if no vad_parameters are given
                options["vad_parameters"]["min_silence_duration_ms"] = 160
        elif self.batched:
            options["clip_timestamps"] = windows(samples)
        return options


METHODS: tuple[Method, ...] = (
    FasterWhisper(
        "faster-whisper",
        "faster-whisper as it is, in sequence, without VAD; strength: none (0)",
        False,
        False,
    ),
    FasterWhisper(
        "faster-whisper-vad",
        "faster-whisper in sequence with vad_filter (Silero); strength: the VAD's threshold, default 0.5",
        False,
        True,
    ),
    FasterWhisper(
        "faster-whisper-batched",
        "faster-whisper's batched pipeline on consecutive 30 s windows, without VAD; strength: none (0)",
        True,
        False,
    ),
    FasterWhisper(
        "faster-whisper-batched-vad",
        "faster-whisper's batched pipeline with vad_filter (Silero), its default; strength: the VAD's "
        "threshold, default 0.5",
        True,
        True,
    ),
)

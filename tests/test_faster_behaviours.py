"""What faster-whisper's own tests ask of its two classes, asked of ours: the same answers at alpha 0, and
sensible ones with steering on. Written anew for the bundled model, since the originals download theirs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import faster_whisper
import numpy as np
import pytest
from faster_models import CPU, clip, mini_ct2

from whisper_steer.faster import BatchedInferencePipeline, WhisperModel

SENTENCE = " No, Sarah did not cover the little cat."
SPEECH = clip("speech")
TWICE = np.concatenate([SPEECH, np.zeros(16000, np.float32), SPEECH])
OPTIONS: dict[str, dict[str, Any]] = {
    "prefix": {"prefix": "No, Sarah"},
    "hotwords": {"hotwords": "Sarah, coat"},
    "initial prompt": {"initial_prompt": "Two questions."},
    "prompt in tokens": {"initial_prompt": [1400, 2683], "word_timestamps": True},
    "clips": {"clip_timestamps": "0.0,3.2,3.2,5.3"},
    "no timestamps": {"without_timestamps": True},
    "new tokens": {"max_new_tokens": 6},
    "sampling": {"temperature": [0.0, 0.4], "best_of": 1, "compression_ratio_threshold": 2.4},
    "silence": {"hallucination_silence_threshold": 0.5, "word_timestamps": True},
    "suppressed": {"suppress_tokens": [-1, 2435], "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    "chunks": {"chunk_length": 4, "word_timestamps": True},
    "voice detection": {"vad_filter": True, "vad_parameters": {"min_silence_duration_ms": 200}},
}


@pytest.fixture(scope="module")
def plain() -> faster_whisper.WhisperModel:
    return faster_whisper.WhisperModel(str(mini_ct2()), **CPU)


@pytest.fixture(scope="module")
def ours() -> WhisperModel:
    return WhisperModel(str(mini_ct2()), **CPU)


def dicts(found: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [asdict(segment) for segment in found[0]]


@pytest.mark.parametrize("name", OPTIONS)
def test_options_do_the_same_at_alpha_zero(plain: Any, ours: WhisperModel, name: str) -> None:
    ours.alpha = 0
    options = {"beam_size": 1, **OPTIONS[name]}
    theirs = dicts(plain.transcribe(TWICE, **options))
    assert dicts(ours.transcribe(TWICE, **options)) == theirs and theirs


@pytest.mark.parametrize(
    "options", [{}, {"word_timestamps": True}, {"without_timestamps": False, "chunk_length": 10}]
)
def test_batches_do_the_same_at_alpha_zero(plain: Any, ours: WhisperModel, options: dict[str, Any]) -> None:
    ours.alpha = 0
    theirs = faster_whisper.BatchedInferencePipeline(plain).transcribe(TWICE, batch_size=2, **options)
    found = BatchedInferencePipeline(ours).transcribe(TWICE, batch_size=2, **options)
    assert dicts(found) == dicts(theirs) and asdict(found[1]) == asdict(theirs[1])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("batched", [False, True])
def test_words_and_times_with_steering(ours: WhisperModel, alpha: float, batched: bool) -> None:
    """Words join up to the text of their segment, and no time goes back."""
    ours.alpha = alpha
    model = BatchedInferencePipeline(ours) if batched else ours
    segments = dicts(model.transcribe(SPEECH, word_timestamps=True, vad_filter=True))
    assert "".join(segment["text"] for segment in segments).startswith(SENTENCE)
    times = []
    for segment in segments:
        assert "".join(word["word"] for word in segment["words"]) == segment["text"]
        assert (
            segment["start"] == segment["words"][0]["start"] <= segment["words"][-1]["end"] == segment["end"]
        )
        times += [time for word in segment["words"] for time in (word["start"], word["end"])]
    assert times == sorted(times) and 0 <= times[0] and times[-1] <= len(SPEECH) / 16000 + 0.1


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_prefix_is_the_begin_of_what_is_written(ours: WhisperModel, alpha: float) -> None:
    ours.alpha = alpha
    segments, _ = ours.transcribe(SPEECH, prefix="No, Sarah", beam_size=1)
    assert "".join(segment.text for segment in segments).startswith(SENTENCE)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_clips_keep_their_times(ours: WhisperModel, alpha: float) -> None:
    """Only the part that is asked for is heard: not the noise before and behind it."""
    ours.alpha = alpha
    sound = np.concatenate([clip("noise"), SPEECH, clip("noise")])
    segments = list(ours.transcribe(sound, clip_timestamps=[8.0, 13.385], beam_size=1)[0])
    assert "".join(segment.text for segment in segments).startswith(SENTENCE)
    assert all(8.0 <= segment.start < segment.end <= 13.5 for segment in segments)


def test_channels_of_a_stereo_recording(ours: WhisperModel) -> None:
    """Noise on the left, speech on the right."""
    ours.alpha = 1.0
    assert list(ours.transcribe(clip("noise")[: len(SPEECH)], beam_size=1)[0]) == []
    heard = ours.transcribe(SPEECH, beam_size=1)[0]
    assert "".join(segment.text for segment in heard).startswith(SENTENCE)


def test_languages(plain: Any, ours: WhisperModel) -> None:
    assert ours.supported_languages == plain.supported_languages == ["en"]
    assert ours.feat_kwargs == plain.feat_kwargs and ours.max_length == plain.max_length

"""faster-whisper's own test suite (1.2.1: tests/test_transcribe.py, test_tokenizer.py), one test for each of
its own, on the bundled model in place of those that it downloads: what it looks at is looked at here, and at
alpha 0 everything is what faster-whisper's own classes give. Its multilingual tests have their counterpart in
test_multilingual.py, with random models; its tests of downloads look at nothing that is ours.
"""

from __future__ import annotations

import inspect
import wave
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faster_whisper
import numpy as np
import pytest
from faster_models import CPU, clip, mini_ct2
from faster_whisper.tokenizer import Tokenizer
from faster_whisper.transcribe import get_suppressed_tokens

from whisper_steer.faster import BatchedInferencePipeline, WhisperModel

RATE = 16000
SPEECH = clip("speech")
SENTENCE = " No, Sarah did not cover the little cat. Who has a blue coat?"
GAP = np.zeros(RATE // 4, np.float32)
LONG = np.concatenate([SPEECH, GAP] * 4)  # 23 s
Found = tuple[list[Any], Any]


@pytest.fixture(scope="module")
def plain() -> Any:
    return faster_whisper.WhisperModel(str(mini_ct2()), **CPU)


@pytest.fixture(scope="module")
def ours() -> WhisperModel:
    return WhisperModel(str(mini_ct2()), alpha=0, **CPU)


@pytest.fixture(scope="module")
def pipelines(plain: Any, ours: WhisperModel) -> tuple[Any, BatchedInferencePipeline]:
    return faster_whisper.BatchedInferencePipeline(plain), BatchedInferencePipeline(ours)


def same(theirs: Any, mine: Any, audio: Any, **options: Any) -> Found:
    """Our segments and information, which are theirs in every field."""
    options = {"temperature": 0.0, **options}  # what is drawn by chance cannot be compared
    segments, info = mine.transcribe(audio, **options)
    expected, their_info = theirs.transcribe(audio, **options)
    found = list(segments)
    assert [asdict(segment) for segment in found] == [asdict(segment) for segment in expected]
    assert asdict(info) == asdict(their_info)
    return found, info


def text(segments: list[Any]) -> str:
    return "".join(segment.text for segment in segments)


def test_supported_languages(plain: Any, ours: WhisperModel) -> None:
    assert ours.supported_languages == plain.supported_languages == ["en"]


def test_transcribe(plain: Any, ours: WhisperModel, pipelines: Any) -> None:
    """Language, duration, words that join up to the text; in a batch, the same text."""
    segments, info = same(plain, ours, SPEECH, word_timestamps=True)
    assert (info.language, info.language_probability) == ("en", 1) and info.duration == len(SPEECH) / RATE
    assert text(segments) == SENTENCE
    for segment in segments:
        assert segment.text == "".join(word.word for word in segment.words)
        assert segment.words[0].start <= segment.end == segment.words[-1].end
    segments, info = same(*pipelines, SPEECH, word_timestamps=True, vad_filter=False)
    assert text(segments) == SENTENCE and info.language == "en"


def test_batched_transcribe(pipelines: Any) -> None:
    """A segment per window without timestamps; more with them, all with words."""
    segments, _ = same(*pipelines, LONG, batch_size=16, chunk_length=15)
    assert len(segments) == 2
    timed, _ = same(
        *pipelines, LONG, batch_size=16, without_timestamps=False, word_timestamps=True, chunk_length=15
    )
    assert len(timed) > len(segments) and all(segment.words is not None for segment in timed)


def test_empty_audio(plain: Any, ours: WhisperModel, pipelines: Any) -> None:
    nothing = np.zeros(0, np.float32)
    assert same(plain, ours, nothing)[0] == [] and same(*pipelines, nothing)[0] == []
    for model in (plain, ours):  # a model of one language has nothing to detect, and says so
        with pytest.raises(RuntimeError, match="multilingual"):
            model.detect_language(nothing)


def test_prefix_with_timestamps(plain: Any, ours: WhisperModel) -> None:
    segments, _ = same(plain, ours, SPEECH, prefix="No, Sarah did not")
    assert text(segments).startswith(" No, Sarah did not") and segments[0].start == 0
    assert 4 < segments[-1].end <= 5.5


def test_vad(plain: Any, ours: WhisperModel) -> None:
    """The silence in front is cut off, the times are those of the recording, the options are reported."""
    audio = np.concatenate([np.zeros(2 * RATE, np.float32), SPEECH])
    parameters = {"min_silence_duration_ms": 500, "speech_pad_ms": 200}
    segments, info = same(plain, ours, audio, vad_filter=True, vad_parameters=parameters)
    assert text(segments) == SENTENCE and 1.5 < segments[0].start < 3 and 6 < segments[-1].end < 7.5
    assert (info.vad_options.min_silence_duration_ms, info.vad_options.speech_pad_ms) == (500, 200)
    assert info.duration_after_vad < info.duration


def test_stereo_diarization(plain: Any, ours: WhisperModel, tmp_path: Path) -> None:
    """A file with a sentence on the left and two on the right, decoded by channel."""
    sides = np.stack([np.where(np.arange(len(SPEECH)) < 3.2 * RATE, SPEECH, 0), SPEECH], axis=1)
    with wave.open(str(tmp_path / "stereo.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((sides * 32767).astype("<i2").tobytes())
    left, right = faster_whisper.decode_audio(str(tmp_path / "stereo.wav"), split_stereo=True)
    heard = [text(same(plain, ours, side)[0]) for side in (left, right)]
    assert heard[0] != heard[1] == SENTENCE and heard[0].startswith(" No, Sarah")


def test_hotwords(plain: Any, ours: WhisperModel, pipelines: Any) -> None:
    for classes in ((plain, ours), pipelines):
        segments, info = same(*classes, SPEECH, hotwords="Sarah")
        assert "Sarah" in segments[0].text and info.transcription_options.hotwords == "Sarah"


def test_transcribe_signature() -> None:
    names = set(inspect.getargs(WhisperModel.transcribe.__code__).args)
    batched = set(inspect.getargs(BatchedInferencePipeline.transcribe.__code__).args)
    assert batched - {"batch_size"} == names


def test_monotonic_timestamps(plain: Any, ours: WhisperModel, pipelines: Any) -> None:
    for classes in ((plain, ours), pipelines):
        segments, info = same(*classes, LONG, word_timestamps=True, chunk_length=15)
        for segment in segments:
            assert segment.start <= segment.end
            assert all(word.start <= word.end <= segment.end for word in segment.words)
        for segment, following in zip(segments, segments[1:], strict=False):
            assert segment.end <= following.start
        assert segments[-1].end <= info.duration


def test_cliptimestamps_segments(pipelines: Any) -> None:
    """A segment per clip, with the clip's times and words."""
    end = len(SPEECH) / RATE
    clips = [{"start": 0.0, "end": end}, {"start": end, "end": 2 * end}]
    segments, _ = same(*pipelines, np.concatenate([SPEECH, SPEECH]), clip_timestamps=clips)
    times = [(segment.start, segment.end) for segment in segments]
    assert times == [pytest.approx((c["start"], c["end"]), abs=1e-3) for c in clips]
    assert [segment.text for segment in segments] == [SENTENCE] * 2


def test_cliptimestamps_timings(pipelines: Any) -> None:
    """Clips with a hole between them keep their times."""
    clips = [{"start": 0.0, "end": 3.2}, {"start": 5.6, "end": 11.0}]
    segments, _ = same(*pipelines, LONG, clip_timestamps=clips)
    assert [(segment.start, segment.end) for segment in segments] == [(0.0, 3.2), (5.6, 11.0)]
    assert segments[0].text.startswith(" No, Sarah") and segments[1].text == SENTENCE


@pytest.mark.parametrize("given", [[-1], [13]])
def test_suppressed_tokens(plain: Any, ours: WhisperModel, given: list[int]) -> None:
    """-1: symbols that are not spoken; always the tokens of the protocol."""
    found, expected = (get_suppressed_tokens(Tokenizer(m.hf_tokenizer, False), given) for m in (ours, plain))
    assert found == expected and found[-5:] == (50357, 50358, 50359, 50360, 50361)
    assert len(found) == (90 if given == [-1] else 7)


def test_split_on_unicode(ours: WhisperModel) -> None:
    """Half of a character is a word of its own until the other half comes."""
    tokenizer = Tokenizer(ours.hf_tokenizer, False)
    tokens = ours.hf_tokenizer.encode(" elle est l'écrit", add_special_tokens=False).ids
    words, word_tokens = tokenizer.split_tokens_on_unicode(tokens)
    assert "".join(words) == " elle est l'écrit" and sum(word_tokens, []) == tokens
    assert tokenizer.split_tokens_on_unicode(tokens[:-1] + [246])[0][-1] == "\ufffd"


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(faster_whisper, "WhisperModel", WhisperModel)
    monkeypatch.setattr(faster_whisper, "BatchedInferencePipeline", BatchedInferencePipeline)
    yield


def test_ours_in_the_place_of_the_originals(replaced: None) -> None:
    """A program that makes faster_whisper.WhisperModel gets ours, without knowing."""
    model = faster_whisper.WhisperModel(str(mini_ct2()), **CPU)
    assert model.alpha == 1.0
    assert list(model.transcribe(clip("noise"), beam_size=1)[0]) == []
    batched = faster_whisper.BatchedInferencePipeline(model)
    assert list(batched.transcribe(clip("noise"), beam_size=1, vad_filter=False)[0]) == []
    assert text(list(batched.transcribe(SPEECH, beam_size=1)[0])) == SENTENCE

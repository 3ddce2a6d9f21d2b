import json

import numpy as np
import pytest
from calibration_tools import clips, make_terse_whisper

import calibration.hallucinations as hallucinations
from calibration.decoding import ClipTranscript
from calibration.hallucinations import (
    is_nonspeech,
    label,
    label_clips,
    labels_of,
    model_crc,
    open_label_file,
    summary,
)
from whisper_steer.errors import FormatError, UsageError


@pytest.fixture(scope="module")
def model():
    return make_terse_whisper(1)


def test_labels_by_all_three_definitions(model):
    audio = clips(0, 1)["tones"][0].load()
    labels = label(model, audio)
    assert labels.no_speech_prob < 0.5 and labels.nsp  # random weights never say <|nospeech|>
    assert labels.hr and labels.text_fp and labels.text == labels.transcript.text


def test_cached_labels_are_the_same_and_not_computed_again(model, tmp_path, monkeypatch):
    sets = clips(2, 3)
    chosen = [clip for group in sets.values() for clip in group]
    cache = tmp_path / "deep" / "labels.jsonl"
    first = label_clips(model, chosen, cache=cache, batch=2, progress=False)
    assert len(cache.read_text().splitlines()) == 6

    def never(*_args, **_kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(
        hallucinations, "transcribe_clips", lambda _m, audios, **_k: [] if not audios else never()
    )
    assert label_clips(model, chosen, cache=cache, progress=False) == first


def test_resumes_after_a_half_written_line(model, tmp_path, caplog):
    chosen = clips(0, 3)["tones"]
    cache = tmp_path / "labels.jsonl"
    whole = label_clips(model, chosen, cache=cache, batch=1, progress=False)
    text = cache.read_text()
    cache.write_text(text[: -len(text.splitlines()[-1]) // 2])
    assert label_clips(model, chosen, cache=cache, batch=1, progress=False) == whole
    assert "unfinished line" in caplog.text
    assert len([json.loads(line) for line in cache.read_text().splitlines()]) == 4


def test_changed_audio_is_labelled_anew(model, tmp_path, monkeypatch):
    chosen = clips(0, 1)["tones"]
    cache = tmp_path / "labels.jsonl"
    label_clips(model, chosen, cache=cache, progress=False)
    monkeypatch.setattr(type(chosen[0]), "load", lambda self: np.zeros(16000, np.float32))
    label_clips(model, chosen, cache=cache, progress=False)
    assert len(cache.read_text().splitlines()) == 3


def test_a_cache_of_another_model_is_refused(model, tmp_path):
    cache = tmp_path / "labels.jsonl"
    label_clips(model, clips(0, 1)["tones"], cache=cache, progress=False)
    with pytest.raises(UsageError, match="holds labels of another model"):
        label_clips(make_terse_whisper(2), clips(0, 1)["tones"], cache=cache, progress=False)


@pytest.mark.parametrize(
    "content", ["not json\n", '{"kind": "other"}\n', '{"kind": "hallucination-labels"}\n', ""]
)
def test_foreign_files_are_refused(model, tmp_path, content):
    cache = tmp_path / "labels.jsonl"
    cache.write_text(content)
    with pytest.raises(FormatError, match="labels.jsonl"):
        label_clips(model, [], cache=cache, progress=False)


def test_summary_measures_speech_and_the_rest_apart(model):
    sets = clips(2, 2)
    labels = label_clips(model, [clip for group in sets.values() for clip in group], progress=False)
    speech, tones = summary(sets, labels)
    assert speech["set"] == "speech" and speech["wer"] >= 1 and "text_fpr" not in speech
    assert (
        tones["set"] == "tones"
        and tones["text_fpr"] == 1.0
        and tones["nsp_fpr"] == 1.0
        and "wer" not in tones
    )
    assert is_nonspeech(sets["tones"]) and not is_nonspeech(sets["speech"]) and not is_nonspeech([])


def test_labels_are_of_one_language(model, tmp_path):
    chosen = clips(0, 2)["tones"]
    english, german = tmp_path / "en.jsonl", tmp_path / "de.jsonl"
    label_clips(model, chosen, cache=english, progress=False)
    assert "language" not in json.loads(english.read_text().splitlines()[0])  # as it always was
    with pytest.raises(UsageError, match="en.jsonl holds labels in the language en, not de: delete it"):
        label_clips(model, chosen, cache=english, language="de", progress=False)
    first = open_label_file(german, model_crc(model), "de")
    assert first == {} and json.loads(german.read_text())["language"] == "de"
    with pytest.raises(UsageError, match="de.jsonl holds labels in the language de, not en"):
        open_label_file(german, model_crc(model))
    filler = ClipTranscript(" Um.", (), ((0.1, -0.2),), 1.0)
    assert not labels_of(filler).text_fp and labels_of(filler, "pt").text_fp

"""A transformers pipeline over recordings longer than a window, decoded in sequence; from our own folder."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_models import clip, mini_ct2

import whisper_steer

pytest.importorskip("transformers", reason="the runtime under test")

from transformers import pipeline  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning")

WORDS = "No, Sarah did not cover the little cat. Who has a blue coat?"
INVENTED = "Thank you for watching."
WINDOW = 30 * 16000
QUICK = {"num_beams": 1, "temperature": 0.0, "condition_on_prev_tokens": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whisper_steer.convert("mini.en", "transformers", tmp_path_factory.mktemp("long") / "mini.en")


def recogniser(folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    return pipeline(
        "automatic-speech-recognition",
        model=str(folder),
        device="cpu",
        dtype=dtype,
        model_kwargs={"attn_implementation": attention},
    )


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return recogniser(folder, torch.float32)


@pytest.fixture(scope="module")
def noise_then_speech() -> np.ndarray:
    """A window of noise, then 5.4 s of speech."""
    return np.concatenate([np.resize(clip("noise"), WINDOW), clip("speech")])


@pytest.mark.parametrize("decode_withheld", [True, False])
def test_in_sequence(plain: Any, noise_then_speech: np.ndarray, decode_withheld: bool) -> None:
    before = plain(noise_then_speech, return_timestamps=True, generate_kwargs=QUICK)
    assert INVENTED in before["text"] and WORDS in before["text"]
    with whisper_steer.steer(plain, decode_withheld=decode_withheld) as handle:
        after = plain(noise_then_speech, return_timestamps=True, generate_kwargs=QUICK)
    assert after["text"].strip() == WORDS
    assert "".join(chunk["text"] for chunk in after["chunks"]).strip() == WORDS
    starts = [chunk["timestamp"][0] for chunk in after["chunks"] if chunk["text"].strip()]
    assert all(30 <= start <= 36 for start in starts) and starts == sorted(starts)
    (record,) = handle.withheld
    assert (record.start, record.end) == (0.0, 30.0)
    assert (record.text or "").strip().startswith(INVENTED if decode_withheld else "")
    assert (record.text is None) == (not decode_withheld)
    # transformers' own word times are absolute without our help
    with whisper_steer.steer(plain, decode_withheld=decode_withheld):
        words = plain(noise_then_speech, return_timestamps="word", generate_kwargs=QUICK)["chunks"]
    assert "".join(word["text"] for word in words).strip() == WORDS and words[0]["timestamp"][0] >= 30
    assert plain(noise_then_speech, return_timestamps=True, generate_kwargs=QUICK) == before


def test_several_recordings_in_one_batch(plain: Any, noise_then_speech: np.ndarray) -> None:
    rest = len(noise_then_speech) - WINDOW  # transformers cannot put different lengths into one batch
    other = np.concatenate([np.resize(clip("speech"), WINDOW), clip("noise")[:rest]])
    recordings = [noise_then_speech, other]
    with whisper_steer.steer(plain) as handle:
        alone = [plain(sound, return_timestamps=True, generate_kwargs=QUICK)["text"] for sound in recordings]
        records = [(record.start, record.end) for record in handle.withheld]
        together = plain(recordings, return_timestamps=True, generate_kwargs=QUICK, batch_size=2)
    assert [found["text"] for found in together] == alone
    assert alone[0].strip() == WORDS and "blue coat" in alone[1] and INVENTED not in alone[1]
    assert records == [(0.0, 30.0), (30.0, pytest.approx(35.4, abs=0.05))]
    times = [(record.start, record.end) for record in handle.withheld[2:]]
    assert sorted(times) == [(0.0, 30.0), (30.0, pytest.approx(35.4, abs=0.05))]


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [(torch.bfloat16, "sdpa"), (torch.float16, "sdpa"), (torch.float32, "eager")],
)
def test_types_and_attention(
    folder: Path, noise_then_speech: np.ndarray, dtype: torch.dtype, attention: str
) -> None:
    found = recogniser(folder, dtype, attention)
    assert found.model.dtype == dtype and found.model.config._attn_implementation == attention
    with whisper_steer.steer(found) as handle:
        text = found(noise_then_speech, return_timestamps=True, generate_kwargs=QUICK)["text"]
    assert text.strip() == WORDS
    assert [(record.start, record.end) for record in handle.withheld] == [(0.0, 30.0)]


def test_a_pipeline_around_a_steered_model_tells_the_same_times(plain: Any) -> None:
    """The model is steered, the pipeline is not known: two windows of noise, then speech."""
    sound = np.concatenate([np.resize(clip("noise"), 2 * WINDOW), clip("speech")])
    places = {}
    for name, steered in (("pipeline", plain), ("model", plain.model)):
        with whisper_steer.steer(steered) as handle:
            found = plain(sound, return_timestamps=True, generate_kwargs=QUICK)
            records = [(record.start, record.end) for record in handle.withheld]
        chunks = [(chunk["timestamp"], chunk["text"]) for chunk in found["chunks"]]
        places[name] = [chunk for chunk in chunks if chunk[1]], records
        silent = [chunk[0] for chunk in chunks if not chunk[1]]
        # chosen before the pipeline was found: what leaves out the chunks without text
        assert silent == ([] if name == "pipeline" else [(0.0, 30.0), (30.0, 60.0)])
    spoken, records = places["model"]
    assert places["pipeline"] == places["model"] and records == [(0.0, 30.0), (30.0, 60.0)]
    assert [text for _, text in spoken] == [
        " No, Sarah did not cover the little cat.",
        " Who has a blue coat?",
    ]
    assert [start for (start, _), _ in spoken] == [pytest.approx(60.6, abs=0.1), pytest.approx(63.7, abs=0.1)]


@pytest.mark.parametrize("batch", [1, 3])
def test_chunks_of_a_pipeline_around_a_steered_model(plain: Any, batch: int) -> None:
    sound = np.concatenate([np.resize(clip("noise"), 26 * 16000), clip("speech")])
    cut = {"chunk_length_s": 10, "stride_length_s": 1, "batch_size": batch}
    with whisper_steer.steer(plain.model) as handle:
        for _ in range(2):
            plain(sound, **cut, generate_kwargs=QUICK)
    places = [(0.0, 10.0), (8.0, 18.0), (16.0, 26.0)]
    assert [(record.start, record.end) for record in handle.withheld] == places * 2


def test_tokens_of_a_long_recording_keep_their_time(plain: Any, noise_then_speech: np.ndarray) -> None:
    given = plain.feature_extractor(
        noise_then_speech, sampling_rate=16000, truncation=False, padding="longest", return_tensors="pt"
    )
    with whisper_steer.steer(plain.model):
        tokens = plain.model.generate(given["input_features"], return_timestamps=True, **QUICK)
    found = plain.tokenizer.decode(tokens[0].tolist(), output_offsets=True, skip_special_tokens=True)
    assert found["text"].strip() == WORDS
    (start, _) = next(part["timestamp"] for part in found["offsets"] if "Sarah" in part["text"])
    assert 30 <= start <= 31


def test_chunks_without_text_are_left_out_only_where_a_window_was_withheld(plain: Any) -> None:
    """A recording in which the model itself writes nothing between two timestamps."""
    begin = plain.model.generation_config.no_timestamps_token_id + 1
    ours, withheld = [begin, begin + 50], [begin, begin - 1, begin + 1500]
    empty = {"timestamp": (0.0, 1.0), "text": ""}
    with whisper_steer.steer(plain):
        kept = plain.postprocess([{"tokens": torch.tensor([ours])}], return_timestamps=True)
        assert kept["chunks"] == [empty]
        silent = plain.postprocess([{"tokens": torch.tensor([withheld])}], return_timestamps=True)
        assert silent["chunks"] == []


def test_the_backend_reads_both_kinds_of_folders(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both have a config.json. Nothing of transformers' own is printed."""
    from transformers.utils import logging

    logging.warning_once.cache_clear()
    for path in (folder, mini_ct2()):
        found = whisper_steer.transcribe(
            clip("speech"), path, backend="transformers", device="cpu", temperature=0.0
        )
        assert (found.text.strip(), found.model, found.alpha) == (WORDS, "mini.en", 1.0)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()


def test_calls_on_one_model_take_turns(plain: Any) -> None:
    heard: dict[str, Any] = {}

    def call(name: str, sound: str, **options: Any) -> None:
        try:
            heard[name] = whisper_steer.transcribe(clip(sound), plain.model, temperature=0.0, **options)
        except Exception as error:
            heard[name] = error

    others = [
        threading.Thread(target=call, args=(str(alpha), "noise"), kwargs={"alpha": alpha})
        for alpha in (0, 0.5)
    ]

    def begin(done: float, total: float) -> None:
        for thread in others:
            if thread.ident is None:
                thread.start()
                thread.join(0.3)

    call("first", "speech", alpha=1, progress=begin)
    for thread in others:
        thread.join(120)
    found = {name: (r.text.strip(), len(r.suppressed), r.alpha) for name, r in heard.items()}
    assert found == {"first": (WORDS, 0, 1.0), "0": (INVENTED, 0, 0.0), "0.5": ("", 1, 0.5)}
    assert whisper_steer.handles_of(plain.model) == ()

"""The backend faster: options, results, the choice of a backend, and the command."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import faster_whisper
import pytest
import torch
from faster_models import CPU, clip, mini_ct2

import whisper_steer
from whisper_steer.backends import backend_for, make_backend
from whisper_steer.backends.faster import FasterBackend
from whisper_steer.cli import main
from whisper_steer.errors import ModelError, UsageError
from whisper_steer.faster import WhisperModel
from whisper_steer.fileformat import encoder_sha256
from whisper_steer.zoo import bundled_dir, load_model

SPOKEN = " No, Sarah did not cover the little cat. Who has a blue coat?"
INVENTED = "Thank you for watching."


@pytest.fixture(scope="module")
def model() -> WhisperModel:
    return WhisperModel(str(mini_ct2()), **CPU)


def test_transcript_of_noise_and_speech(model: WhisperModel) -> None:
    seen: list[tuple[float, float]] = []
    noise = whisper_steer.transcribe(clip("noise"), model, progress=lambda *at: seen.append(at))
    assert (noise.text, noise.segments, noise.language, noise.duration) == ("", (), "en", 8.0)
    (window,) = noise.suppressed
    assert (window.start, window.end, window.text) == (0.0, 8.0, None)
    with pytest.raises(UsageError, match="steered already"):
        whisper_steer.transcribe(clip("noise"), model, decode_withheld=True)
    assert (noise.model, noise.steering, noise.alpha) == ("mini.en", "default", 1.0)
    assert seen[-1] == (8.0, 8.0) and model.withheld == []
    # openai-whisper's names and values
    options: dict[str, Any] = {
        "beam_size": None,
        "logprob_threshold": -1.0,
        "fp16": False,
        "language": "English",
    }
    speech = whisper_steer.transcribe(clip("speech"), model, word_timestamps=True, **options)
    assert speech.text == SPOKEN and speech.suppressed == ()
    assert [s.id for s in speech.segments] == list(range(len(speech.segments)))
    words = [word for segment in speech.segments for word in segment.words or ()]
    assert "".join(word.word for word in words) == SPOKEN and 0 < words[0].probability <= 1


def test_a_plain_model_is_steered_for_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    plain = faster_whisper.WhisperModel(str(mini_ct2()), **CPU)
    heard = whisper_steer.transcribe(clip("noise"), plain, alpha=0)
    assert heard.text.strip() == INVENTED and (heard.steering, heard.alpha) == (None, 0.0)
    with pytest.raises(ModelError, match="pass files=FOLDER"):
        whisper_steer.transcribe(clip("noise"), plain)
    with whisper_steer.steer(plain, alpha=0.9, files=mini_ct2()):
        assert whisper_steer.transcribe(clip("noise"), plain).alpha == 0.9
        with pytest.raises(UsageError, match="steered already"):
            whisper_steer.transcribe(clip("noise"), plain, alpha=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_such": 1}, "unknown option 'no_such'"),
        ({"carry_initial_prompt": True}, "no counterpart of carry_initial_prompt=True"),
        ({"initial_prompt": "word " * 500, "sample_len": 400}, "`max_length`"),
    ],
)
def test_options_that_are_refused(model: WhisperModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        whisper_steer.transcribe(clip("noise"), model, **options)


def test_models_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a CTranslate2 model"):
        make_backend("faster", tmp_path).load()
    with pytest.raises(ModelError, match="faster-whisper cannot load mini.en"):
        FasterBackend("mini.en").load()
    damaged = tmp_path / "mini.en-ct2"
    damaged.mkdir()
    (damaged / "model.bin").write_bytes(mini_ct2().joinpath("model.bin").read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"fetch or convert the model again if its files are damaged$"):
        FasterBackend(damaged).load()
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="pass device cpu, or repair CUDA$"):
            FasterBackend(mini_ct2(), device="cuda").load()
    with pytest.raises(UsageError, match="device 'mps' is not one of faster-whisper's"):
        FasterBackend(mini_ct2(), device="mps").load()
    with pytest.raises(UsageError, match="model is a int"):
        make_backend("faster", 3)


def test_choice_of_a_backend(model: WhisperModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert backend_for(model)[0] == backend_for(mini_ct2())[0] == "faster"
    for name in ("Systran/faster-whisper-x", "Systran/faster-distil-whisper-x", "me/x-ct2"):
        assert backend_for(name)[0] == "faster"  # the hub is not at hand: by its name
    assert backend_for("mini.en")[0] == backend_for("someone/whisper-x")[0] == "openai"


def test_what_a_hub_model_is_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {"me/x": ["model.bin", "config.json"], "me/faster-y": ["model.bin", "model.safetensors"]}
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, name: lists[name])
    assert [backend_for(name, tmp_path)[0] for name in lists] == ["faster", "openai"]


def test_a_hub_model_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For the backends openai and transformers, and for convert, it is read out of CTranslate2's format."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--me--distil-mini.en-ct2"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "snapshots" / ("0" * 40)).symlink_to(mini_ct2())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    name, place = "me/distil-mini.en-ct2", ["--model-dir", str(tmp_path)]
    assert backend_for(name, tmp_path)[0] == "faster"
    loaded, own = load_model(name, device="cpu", download_root=tmp_path), load_model("mini.en", device="cpu")
    assert loaded.name == "distil-mini.en" and encoder_sha256(loaded) == encoder_sha256(own)
    heard = whisper_steer.transcribe(clip("noise"), name, download_root=tmp_path, device="cpu")
    assert (heard.text, len(heard.suppressed), heard.model) == ("", 1, "distil-mini.en")
    words = ["convert", "--model", name, "--format", "openai", "--out", str(tmp_path / "x.pt"), *place]
    assert main(words) == 0 and (tmp_path / "x.pt").is_file()
    assert encoder_sha256(load_model(tmp_path / "x.pt", device="cpu")) == encoder_sha256(own)


def test_the_command_chooses_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    noise = str(bundled_dir() / "mini.en" / "demo" / "noise.flac")
    words = ["transcribe", noise, "--model", str(mini_ct2()), "--device", "cpu", "--threads", "1"]
    assert main([*words, "--keep-suppressed"]) == 0
    captured = capsys.readouterr()
    assert INVENTED in captured.out
    assert "backend: faster (the model is in CTranslate2's format)" in captured.err
    assert main([*words, "--alpha", "0", "--backend", "faster"]) == 0
    captured = capsys.readouterr()
    assert INVENTED in captured.out and captured.err == "backend: faster (asked for)\n"
    assert main([*words, "--backend", "slower"]) == 2
    assert "--backend slower: expected one of openai, faster, transformers" in capsys.readouterr().err


@pytest.mark.parametrize("vad", [None, "gate"])
def test_calls_on_one_model_take_turns(vad: str | None) -> None:
    """While one call is under way, others of another strength begin; nobody hears of anybody."""
    shared = WhisperModel(str(mini_ct2()), alpha=0, **CPU)
    heard: dict[str, Any] = {}

    def call(name: str, sound: str, **options: Any) -> None:
        try:
            heard[name] = whisper_steer.transcribe(clip(sound), shared, **options)
        except Exception as error:
            heard[name] = error

    others = [
        threading.Thread(target=call, args=("plain", "noise"), kwargs={"alpha": 0}),
        threading.Thread(target=call, args=("default", "noise"), kwargs={"vad": vad}),
        threading.Thread(target=call, args=("half", "noise"), kwargs={"alpha": 0.5}),
    ]

    def begin(done: float, total: float) -> None:
        for thread in others:
            if thread.ident is None:
                thread.start()
                thread.join(0.3)

    call("first", "speech", alpha=1, progress=begin, vad=vad)
    for thread in others:
        thread.join(60)
    found = {name: (r.text.strip(), len(r.suppressed), r.alpha) for name, r in heard.items()}
    assert found.pop("first")[0::2] == (SPOKEN.strip(), 1.0)
    assert found == {"plain": (INVENTED, 0, 0.0), "default": ("", 1, 1.0), "half": ("", 1, 0.5)}
    assert whisper_steer.handles_of(shared) == ()

"""whisper.cpp itself, through pywhispercpp: our files load, give the same words, and can be silenced."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import whisper
from torch.nn import functional as F
from whisper.decoding import DecodingOptions
from whisper.model import Whisper
from whisper.tokenizer import get_tokenizer

from whisper_steer.audio import load_audio
from whisper_steer.bake import bake
from whisper_steer.convert import convert
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Shift, Steering
from whisper_steer.zoo import bundled_dir, load_model

pywhispercpp = pytest.importorskip("pywhispercpp.model", reason="pip install pywhispercpp")

CLIPS = ("noise", "music", "speech")
LAYER = 3
SENTENCE = "No, Sarah did not cover the little cat."
# one greedy pass without fallbacks; an empty transcript is allowed
SETTINGS = {
    "n_threads": 1,
    "no_timestamps": True,
    "single_segment": True,
    "suppress_blank": False,
    "temperature_inc": 0.0,
    "print_progress": False,
}


@pytest.fixture(scope="module")
def model() -> Whisper:
    return load_model("mini.en", device="cpu")


@pytest.fixture(scope="module")
def clips() -> dict[str, np.ndarray]:
    return {name: load_audio(bundled_dir() / "mini.en" / "demo" / f"{name}.flac") for name in CLIPS}


@pytest.fixture(scope="module")
def plain_words(model: Whisper, clips: dict[str, np.ndarray]) -> dict[str, whisper.DecodingResult]:
    """What openai-whisper writes, with SETTINGS."""
    options = DecodingOptions(language="en", fp16=False, without_timestamps=True, suppress_blank=False)
    mels = {name: whisper.log_mel_spectrogram(whisper.pad_or_trim(clip)) for name, clip in clips.items()}
    return {name: whisper.decode(model, mel, options) for name, mel in mels.items()}


@pytest.fixture(scope="module")
def silencing(model: Whisper, clips: dict[str, np.ndarray], plain_words: dict) -> Steering:
    """A Shift after which the model ends at once on noise and music, and hears speech as before.

    Found by gradient descent on these clips: what is tested is baking, not how well it generalises.
    """
    tokenizer, frames, wanted = get_tokenizer(False), {}, {}
    block = model.encoder.blocks[LAYER]
    for name, clip in clips.items():
        hook = block.register_forward_hook(lambda m, a, x, name=name: frames.__setitem__(name, x))
        with torch.no_grad():
            model.encoder(whisper.log_mel_spectrogram(whisper.pad_or_trim(clip))[None])
        hook.remove()
        wanted[name] = [*(plain_words[name].tokens if name == "speech" else ()), tokenizer.eot]
    start = [tokenizer.sot, tokenizer.no_timestamps]
    vector = torch.zeros(model.dims.n_audio_state, requires_grad=True)
    optimiser = torch.optim.Adam([vector], lr=0.3)
    for _ in range(120):
        loss = torch.zeros(())
        for name, x in frames.items():
            tokens = torch.tensor([start + wanted[name][:-1]])
            logits = model.decoder(tokens, model.encoder.ln_post(x + vector))[0, 1:]
            loss = loss + F.cross_entropy(logits, torch.tensor(wanted[name]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    metadata = {**model_metadata(model), "name": "silencing"}
    return Steering((Shift(LAYER, vector.detach(), 1.0),), metadata=metadata)


def words(path: Path, clips: dict[str, np.ndarray]) -> dict[str, str]:
    """Text by clip."""
    loaded = pywhispercpp.Model(str(path), redirect_whispercpp_logs_to=None, **SETTINGS)
    return {
        name: " ".join(segment.text.strip() for segment in loaded.transcribe(clip)).strip()
        for name, clip in clips.items()
    }


@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q5_0"])
def test_same_words_as_openai_whisper(
    model: Whisper, clips: dict[str, np.ndarray], plain_words: dict, tmp_path: Path, dtype: str
) -> None:
    found = words(convert(model, "ggml", tmp_path / "mini.bin", dtype=dtype), clips)
    assert found["speech"] == plain_words["speech"].text
    assert found["noise"] == plain_words["noise"].text == "Thank you for watching."


@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q5_0"])
def test_words_over_noise_are_there_at_0_and_gone_at_1(
    model: Whisper, clips: dict[str, np.ndarray], silencing: Steering, tmp_path: Path, dtype: str
) -> None:
    plain = convert(model, "ggml", tmp_path / "plain.bin", dtype=dtype)
    at_0 = bake(plain, alpha=0.0, steering=silencing, out=tmp_path / "at0.bin")
    at_1 = bake(plain, alpha=1.0, steering=silencing, out=tmp_path / "at1.bin")
    assert at_0.path.read_bytes() == plain.read_bytes()
    before, after = words(at_0.path, clips), words(at_1.path, clips)
    assert before["noise"] and before["music"]
    assert (after["noise"], after["music"]) == ("", "")
    assert before["speech"].startswith(SENTENCE) and after["speech"].startswith(SENTENCE)


def test_same_words_as_the_hook(
    model: Whisper, clips: dict[str, np.ndarray], plain_words: dict, tmp_path: Path
) -> None:
    """A shift in an f16 file does to whisper.cpp what it does to openai-whisper's own encoder as a hook, on
    the same weights: mini.en's are float16's."""
    vector = torch.randn(model.dims.n_audio_state, generator=torch.Generator().manual_seed(0))
    shift = Steering((Shift(2, vector, 15.0),), metadata={**model_metadata(model), "name": "random"})
    options = DecodingOptions(language="en", fp16=False, without_timestamps=True, suppress_blank=False)
    hook = model.encoder.blocks[2].register_forward_hook(lambda module, args, x: x + 15.0 * vector)
    try:
        mels = {name: whisper.log_mel_spectrogram(whisper.pad_or_trim(clip)) for name, clip in clips.items()}
        hooked = {name: whisper.decode(model, mel, options).text.strip() for name, mel in mels.items()}
    finally:
        hook.remove()
    baked = bake(convert(model, "ggml", tmp_path / "plain.bin"), steering=shift, out=tmp_path / "baked.bin")
    assert baked.verified
    assert words(baked.path, clips) == hooked
    assert hooked != {name: plain_words[name].text for name in CLIPS} and all(hooked.values())

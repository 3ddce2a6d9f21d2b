import numpy as np
import pytest
import torch
from calibration_tools import make_terse_whisper, sound

from calibration.activations import encode_clip
from calibration.adapters import WhisperEncoder
from whisper_steer.errors import AudioError, UsageError
from whisper_steer.fileformat import model_metadata


@pytest.fixture(scope="module")
def whisper_model():
    return make_terse_whisper(1)


@pytest.fixture(scope="module")
def openai(whisper_model):
    return WhisperEncoder(whisper_model)


def test_whisper_frames_are_those_of_encode_clip(openai, whisper_model):
    audios = [sound("a", 1.23, speech=True), sound("b", 31.0, speech=False), np.zeros(0, np.float32)]
    both = openai.encode(audios, [0, 1])
    assert [frames.shape for frames in both] == [(2, 62, 32), (2, 1550, 32), (2, 0, 32)]
    for audio, frames in zip(audios[:2], both, strict=False):
        assert frames.dtype == torch.float32 and frames.device == openai.device and not frames.requires_grad
        torch.testing.assert_close(frames, encode_clip(whisper_model, audio).frames, rtol=1e-5, atol=1e-5)


def test_layers_come_in_the_order_asked_for_and_later_blocks_do_not_run(openai, whisper_model):
    audio = sound("a", 0.5, speech=True)
    both = openai.encode([audio], [0, 1])[0]
    assert torch.equal(openai.encode([audio], [1, 0])[0], both.flip(0))
    ran = []
    handle = whisper_model.encoder.blocks[1].register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        assert torch.equal(openai.encode([audio], [0])[0], both[:1]) and not ran
    finally:
        handle.remove()
    assert not any(block._forward_hooks for block in whisper_model.encoder.blocks)


def test_whisper_metadata(openai, whisper_model):
    assert openai.metadata() == {**model_metadata(whisper_model), "family": "whisper", "precision": "float32"}
    assert (openai.n_layers, openai.d_model, openai.frame_samples, openai.max_samples) == (
        2,
        32,
        320,
        480_000,
    )
    assert WhisperEncoder(whisper_model, autocast=torch.bfloat16).metadata()["precision"] == "bfloat16"


def test_what_cannot_be_encoded_is_said_in_one_line(openai, whisper_model):
    audio = sound("a", 0.5, speech=True)
    with pytest.raises(UsageError, match=r"layer 2 does not exist.*0 to 1"):
        openai.encode([audio], [0, 2])
    with pytest.raises(UsageError, match="no layers"):
        openai.encode([audio], [])
    with pytest.raises(AudioError, match=r"\(2, 4000\).*one channel"):
        openai.encode([audio.reshape(2, -1)], [0])
    with pytest.raises(UsageError, match="torch.float64"):
        WhisperEncoder(whisper_model, autocast=torch.float64)
    assert openai.encode([], [0]) == []

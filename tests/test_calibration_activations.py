import pytest
import torch
import whisper
from calibration_tools import make_terse_whisper, sound

from calibration.activations import (
    encode_clip,
    encode_windows,
    finish_encoder,
    true_frames,
    window_mels,
)
from whisper_steer.errors import UsageError


@pytest.fixture(scope="module")
def model():
    return make_terse_whisper(1)


@pytest.mark.parametrize(
    ("samples", "frames"), [(0, 0), (1, 1), (320, 1), (321, 2), (16000, 50), (480_000, 1500), (900_000, 1500)]
)
def test_true_frames(samples, frames):
    assert true_frames(samples) == frames


def test_windows_are_those_that_whisper_transcribe_decodes(model, monkeypatch):
    audio = sound("x", 41.0, speech=True)
    seen = []
    original = whisper.decoding.decode

    def spy(self, mel, options):
        seen.append(mel.clone())
        result = original(self, mel, options)
        # no timestamps in the text: transcribe then moves on by whole windows
        return type(result)(**{**result.__dict__, "tokens": [100], "text": "x", "avg_logprob": 0.0})

    monkeypatch.setattr(whisper.model.Whisper, "decode", spy)
    whisper.transcribe(model, audio, fp16=False)
    ours = window_mels(audio, 80)
    assert len(seen) == len(ours) == 2
    assert all(torch.equal(a, b) for a, b in zip(seen, ours, strict=True))
    assert (ours[1][:, 1100:] == 0).all() and (ours[1][:, 1099] != 0).any()


def test_all_layers_come_from_one_pass_and_finish_as_the_encoder_does(model):
    mels = torch.cat([window_mels(sound(name, 3.0, speech=True), 80) for name in "ab"])
    layers = encode_windows(model, mels)
    assert layers.shape == (2, 2, 1500, 32) and layers.dtype == torch.float32
    plain = model.encoder(mels)
    for layer in range(2):
        torch.testing.assert_close(finish_encoder(model, layers[layer], layer), plain)
    assert torch.equal(encode_windows(model, mels, [1])[0], layers[1])
    assert not any(block._forward_hooks for block in model.encoder.blocks)


def test_hooks_are_removed_when_the_encoder_raises(model):
    with pytest.raises(AssertionError):
        encode_windows(model, torch.zeros(1, 80, 100))
    assert not any(block._forward_hooks for block in model.encoder.blocks)


def test_unknown_layer(model):
    with pytest.raises(UsageError, match="layer 2 does not exist: the encoder has layers 0 to 1"):
        encode_windows(model, torch.zeros(1, 80, 3000), [2])


def test_encode_clip_masks_padding_by_true_length(model):
    audio = sound("y", 31.0, speech=False)
    clip = encode_clip(model, audio)
    assert clip.n_true == (1500, 50)
    assert clip.windows.shape == (2, 2, 1500, 32)
    assert clip.frames.shape == (2, 1550, 32)
    assert torch.equal(clip.frames[:, 1500:], clip.windows[:, 1, :50])

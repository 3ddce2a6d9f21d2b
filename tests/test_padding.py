"""Padding behind a clip is not edited, unless the window is withheld; the same in every runtime."""

import copy
from dataclasses import replace

import pytest
import torch
from gates import changed_gate
from tiny import audio, frame_gate, mel, outputs, says, shift
from whisper.audio import log_mel_spectrogram, pad_or_trim

from whisper_steer.attach import steer
from whisper_steer.passing import Pass, Step, padding_frames
from whisper_steer.registry import registry_of
from whisper_steer.steering import Steering

SOUND = 1001  # mel frames; the encoder halves them, so frame 500 still holds sound
OPEN = changed_gate(says(True), threshold=1e9)  # for every frame, but nothing is withheld


def padded_mel(value=0.0):
    """(3, 80, 3000): two clips that end early, and one that does not."""
    batch = torch.stack([mel(seed) for seed in (0, 1, 2)])
    batch[:2, :, SOUND:] = value
    return batch


def test_where_padding_begins():
    row = torch.tensor([3.0, 0, 0, 1, 2, -1, 0, 0, 7])
    row, other = torch.stack([row, row]), torch.stack([row, row])
    row[0, :5] += 1
    other[0, [1, 7]] += 1
    found = padding_frames(torch.stack([row, other]))
    # the third pair of frames begins with sound; in the second window only the last frame is padding
    assert found.tolist() == [[False, False, False, True, True], [False, False, False, False, True]]


def test_silence_that_is_not_the_same_in_all_bins_is_sound():
    steps = torch.arange(4.0)[:, None].expand(4, 10)[None]
    assert not padding_frames(steps).any()
    assert padding_frames(torch.full((1, 4, 10), -1.5)).all()


@pytest.mark.parametrize("value", [0.0, -0.75], ids=["zero features", "features of zero samples"])
def test_padding_is_left_as_it_is(tiny_whisper, value):
    features = padded_mel(value)
    last = len(tiny_whisper.encoder.blocks) - 1
    plain, _ = outputs(tiny_whisper, features)
    with torch.no_grad(), steer(tiny_whisper, steering=Steering((shift(last),), OPEN)):
        edited = tiny_whisper.encoder(features)
    same = (edited == plain).all(dim=-1)
    assert same.tolist() == [[i > 500 for i in range(1500)]] * 2 + [[False] * 1500]


def test_a_withheld_window_is_edited_to_its_end(tiny_whisper):
    features = padded_mel()
    last = len(tiny_whisper.encoder.blocks) - 1
    plain, _ = outputs(tiny_whisper, features)
    with torch.no_grad(), steer(tiny_whisper, steering=Steering((shift(last),), says(True))):
        edited = tiny_whisper.encoder(features)
    assert not (edited == plain).all(dim=-1).any()


def test_a_short_stretch_before_padding_is_as_short_as_it_is():
    """Without padding, the end of the window could be the beginning of a long pause."""
    gate = changed_gate(OPEN, min_run=40, smooth=1)
    logits = torch.full((1, 100), 10.0)
    logits[0, :30] = -10.0
    assert gate.frame_gate(logits).gt(0).sum() == 70
    shut = torch.arange(100)[None] >= 60
    assert not gate.frame_gate(logits, shut).any()
    shut = torch.arange(100)[None] >= 75
    assert gate.frame_gate(logits, shut).gt(0)[0].nonzero().flatten().tolist() == list(range(30, 75))
    margin = changed_gate(gate, margin=5)
    assert margin.frame_gate(logits, shut).gt(0)[0].nonzero().flatten().tolist() == list(range(35, 75))
    plain = margin.frame_gate(torch.where(shut, -10.0, logits)).gt(0)[0].nonzero().flatten().tolist()
    assert plain == list(range(35, 70))  # speech has soft onsets, padding has none


def test_a_real_clips_padding_is_found_however_it_was_made():
    """openai-whisper pads features with 0; transformers pads samples with 0."""
    sound = torch.from_numpy(audio(0, seconds=5))
    features = pad_or_trim(log_mel_spectrogram(sound), 3000)
    assert padding_frames(features[None])[0].nonzero()[0].item() == 250
    samples = log_mel_spectrogram(pad_or_trim(sound, 480_000))
    assert padding_frames(samples[None])[0].nonzero()[0].item() in (250, 251)  # the last window hangs over
    # silence of the recording's own, and then the end of it: two values, both padding
    silent = pad_or_trim(log_mel_spectrogram(torch.cat([sound, torch.zeros(80_000)])), 3000)
    assert silent[0, 700] != silent[0, 1500] == 0
    assert padding_frames(silent[None])[0].nonzero()[0].item() in (250, 251)


def test_edits_without_a_gate_do_not_look_for_padding():
    step = Step(None, 1.0, Steering((shift(),), None))
    Pass((step,), of_decode=False).begin(padded_mel())
    assert step.padding is None


def test_transformers_leaves_padding_alone_too(tiny_whisper):
    pytest.importorskip("transformers", reason="the runtime under test")
    from whisper_steer.transformers_model import from_openai

    features, steering = padded_mel(), Steering((shift(), shift(0)), frame_gate())
    with torch.no_grad(), steer(tiny_whisper, steering=steering):
        expected = tiny_whisper.encoder(features)
    model = from_openai(copy.deepcopy(tiny_whisper))
    with torch.no_grad(), steer(model, steering=steering):
        by_place = model.model.encoder(features)[0]
        by_name = model.model.encoder(input_features=features)[0]
    assert torch.allclose(by_place, expected, atol=1e-5)
    assert torch.equal(by_name, by_place)


def test_every_runtime_reads_the_same_mean_of_sound(tiny_whisper):
    """A gate whose verdict rests on it: a window is withheld by what sounds, not by its padding."""
    pytest.importorskip("transformers", reason="the runtime under test")
    from whisper_steer.transformers_model import from_openai

    features, gate = padded_mel(), frame_gate()
    direction = torch.randn(gate.d_model, generator=torch.Generator().manual_seed(3))
    gate = changed_gate(gate, sound_probes=(replace(gate.probes[0], coef=direction),), threshold=1e9)
    steering, found = Steering((), gate), []
    for model in (tiny_whisper, from_openai(copy.deepcopy(tiny_whisper))):
        encoder = getattr(model, "encoder", None) or model.model.encoder
        with torch.no_grad(), steer(model, steering=steering):
            registry = registry_of(model)
            steps = registry._steps()
            with registry._passing(steps):
                encoder(features)
            found.append(steps[0].window_logit)
    plain, streams = outputs(tiny_whisper, features)
    logits = gate.frame_logits(streams[0])
    padding = torch.arange(1500) > torch.tensor([500, 500, 1500])[:, None]
    expected = gate.window_logit(logits, {0: streams[0]}, padding)
    for one in found:
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)
    without = gate.window_logit(logits, {0: streams[0]})
    assert (without - expected).abs()[:2].min() > 1e-3


def test_faster_whisper_leaves_padding_alone_too():
    pytest.importorskip("faster_whisper", reason="the runtime under test")
    import ctranslate2
    import numpy as np
    from faster_models import CPU, mini_ct2

    from whisper_steer.faster import WhisperModel
    from whisper_steer.steering import Shift
    from whisper_steer.zoo import load_model

    direction = torch.randn(192, generator=torch.Generator().manual_seed(5))
    open_ = changed_gate(OPEN, coef=torch.zeros(192), mean=torch.zeros(192), std=torch.ones(192))
    steering = Steering((Shift(3, direction, 1.0),), open_)
    features = padded_mel()[:1]
    model = load_model("mini.en", device="cpu")
    with torch.no_grad(), steer(model, steering=steering):
        expected = model.encoder(features)
    faster = WhisperModel(str(mini_ct2()), steering=steering, **CPU)
    found = faster.model.encode(ctranslate2.StorageView.from_array(features.numpy()))
    assert np.allclose(np.asarray(found), expected.numpy(), atol=1e-4)
    faster.alpha = 0.0
    plain = np.asarray(faster.model.encode(ctranslate2.StorageView.from_array(features.numpy())))
    difference = np.abs(np.asarray(found) - plain).max(axis=2)[0]
    assert difference[:501].min() > 0.01
    assert difference[501:].max() < 1e-3

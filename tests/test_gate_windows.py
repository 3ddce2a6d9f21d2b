"""Window probes: what the gate says of a window as a whole."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_passing import WIDTH, gate, mels, streams  # noqa: F401

from whisper_steer.attach import steer
from whisper_steer.edits import Shift
from whisper_steer.errors import UsageError
from whisper_steer.gate import Gate, likely_speech, mean_of_sound
from whisper_steer.passing import Step
from whisper_steer.probe import Probe
from whisper_steer.registry import registry_of
from whisper_steer.steering import Steering


def raw(layer, coef, mean=0.0, std=1.0):
    d = len(coef)
    coef = torch.as_tensor(coef)
    return Probe(layer, "raw", coef, mean=torch.full((d,), mean), std=torch.full((d,), std))


def whole_gate(probes, window_probes, **changes):
    neutral = {"intercept": 0.0, "smooth": 1, "threshold": 0.0, "spread": 0.0, "frame_scale": 1.0}
    return Gate(probes, **{**neutral, "frame_bias": 0.0, **changes}, window_probes=window_probes)


def test_frames_weigh_by_their_odds_of_speech():
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    logits = torch.tensor([[0.0, -math.log(3.0), math.inf]])  # odds 1 : 3, and surely nobody
    assert likely_speech(logits, x)[0].tolist() == pytest.approx([0.25, 0.75])


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_mean_lies_within_the_frames_and_follows_the_lowest(frames, seed):
    generator = torch.Generator().manual_seed(seed)
    x, logits = torch.randn(2, frames, 3, generator=generator), torch.randn(2, frames, generator=generator)
    found = likely_speech(logits, x)
    assert (found >= x.amin(dim=1) - 1e-5).all() and (found <= x.amax(dim=1) + 1e-5).all()
    lowest = logits.sort(dim=1).values
    assume(frames == 1 or (lowest[:, 1] - lowest[:, 0]).min() > 0.01)
    sure = likely_speech(1e4 * logits, x)
    torch.testing.assert_close(sure, x[torch.arange(2), logits.argmin(dim=1)])


def test_the_window_logit_by_hand():
    found = whole_gate(
        (raw(0, [1.0, 1.0]),), (raw(0, [2.0, -1.0], mean=0.5, std=0.5),), window_intercept=0.25
    )
    x = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    logits = torch.tensor([[-1.0, -1.0]])  # both the same, so the mean is 0: (0 - 0.5) / 0.5 = -1 twice
    assert found.window_logit(logits, {0: x}).tolist() == [-1.0 + (2 * -1 + -1 * -1) + 0.25]
    # without them the frame decides alone
    assert whole_gate((raw(0, [1.0, 1.0]),), ()).window_logit(logits).tolist() == [-1.0]


def test_the_mean_of_sound_by_hand():
    x = torch.tensor([[[1.0], [3.0], [8.0]]]).expand(3, 3, 1)
    padding = torch.tensor([[False, False, True], [False, False, False], [True, True, True]])
    assert mean_of_sound(x, padding).flatten().tolist() == [2.0, 4.0, 4.0]  # all is padding: all counts
    assert mean_of_sound(x.half(), None).flatten().tolist() == [4.0, 4.0, 4.0]
    found = whole_gate(
        (raw(0, [1.0]), raw(1, [1.0])), (), window_intercept=0.5, sound_probes=(raw(1, [2.0], 1.0, 0.5),)
    )
    assert found.window_layers == (1,)
    said = found.window_logit(torch.zeros(3, 3), {1: x}, padding)
    assert said.tolist() == [0.5 + 2 * (2 - 1) / 0.5, 0.5 + 2 * (4 - 1) / 0.5, 0.5 + 2 * (4 - 1) / 0.5]


def test_window_probes_need_their_layers():
    probes = (raw(0, [1.0]), raw(1, [1.0]))
    found = whole_gate(probes, (raw(1, [1.0]),))
    assert found.window_layers == (1,)
    with pytest.raises(UsageError, match=r"reads layers \(1,\): pass 1"):
        found.window_logit(torch.zeros(1, 2), {0: torch.zeros(1, 2, 1)})
    with pytest.raises(UsageError, match=r"window probe on layer 2: expected some of \(0, 1\)"):
        whole_gate(probes, (raw(2, [1.0]),))
    with pytest.raises(UsageError, match=r"window probes on layers \[1, 0\]"):
        whole_gate(probes, (raw(1, [1.0]), raw(0, [1.0])))
    with pytest.raises(UsageError, match=r"sound probe on layer 2: expected some of \(0, 1\)"):
        whole_gate(probes, (), sound_probes=(raw(2, [1.0]),))
    with pytest.raises(UsageError, match="different d_model"):
        whole_gate(probes, (raw(1, [1.0, 2.0]),))
    latents = Probe(
        0, "latents", torch.ones(1), torch.ones(1, 1), torch.zeros(1), torch.zeros(1), torch.ones(1)
    )
    with pytest.raises(UsageError, match="window probe on latents: expected kind 'raw'"):
        whole_gate(probes, (latents,))


def two_layers(model, mels, **changes):  # noqa: F811
    """A gate on blocks 0 and 2 with window probes on both, and its window logits by hand."""
    directions = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)]
    found, _ = streams(model, mels)
    probes = tuple(raw(layer, gate(seed=layer).probes[0].coef) for layer in (0, 2))
    whole = tuple(raw(layer, direction) for layer, direction in zip((0, 2), directions, strict=True))
    mine = whole_gate(probes, whole, smooth=5, **changes)
    by_layer = dict(enumerate(found))
    logits = mine.frame_logits(by_layer)
    weights = torch.softmax(-logits, dim=1)
    said = sum(
        torch.einsum("bt,btd,d->b", weights, found[layer], direction)
        for layer, direction in zip((0, 2), directions, strict=True)
    )
    return mine, logits.amin(dim=1) + said, by_layer


def test_a_steered_encoder_says_the_same(tiny_whisper, mels):  # noqa: F811
    mine, expected, by_layer = two_layers(tiny_whisper, mels)
    torch.testing.assert_close(mine.window_logit(mine.frame_logits(by_layer), by_layer), expected)
    with steer(tiny_whisper, steering=Steering((), mine)) as handle:
        step = Step(handle, 1.0, handle.steering)
        assert not step.read(0, by_layer[0]) and not step.read(1, by_layer[1]) and step.read(2, by_layer[2])
        torch.testing.assert_close(step.window_logit, expected)
        assert not step.streams  # kept no longer than needed


def test_a_steered_encoder_tells_sound_from_padding(tiny_whisper, mels):  # noqa: F811
    features = mels.clone()
    features[0, :, 400:] = 0.0
    found, _ = streams(tiny_whisper, features)
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(7))
    probe = gate().probes[0]
    mine = whole_gate((replace(probe, layer=2),), (), sound_probes=(raw(2, direction),), threshold=1e9)
    expected = mine.frame_logits(found[2]).amin(dim=1) + torch.stack(
        [found[2][0, :200].mean(dim=0) @ direction, found[2][1].mean(dim=0) @ direction]
    )
    with torch.no_grad(), steer(tiny_whisper, steering=Steering((), mine)):
        registry = registry_of(tiny_whisper)
        steps = registry._steps()
        with registry._passing(steps):
            tiny_whisper.encoder(features)
        torch.testing.assert_close(steps[0].window_logit, expected)


def test_the_window_decides_what_is_withheld(tiny_whisper, mels):  # noqa: F811
    import whisper

    _, logits, _ = two_layers(tiny_whisper, mels)
    options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False, sample_len=4)
    low = int(logits.argmin())
    mine, _, _ = two_layers(tiny_whisper, mels, threshold=float(logits.mean()))
    early = Shift(0, torch.zeros(WIDTH), 1.0)  # an edit before the gate: the stream that it reads is kept
    with steer(tiny_whisper, steering=Steering((early,), mine)) as handle:
        results = tiny_whisper.decode(mels, options)
        assert results[1 - low].tokens == [] and results[low].tokens
        assert handle.withheld[0].logit == pytest.approx(float(logits.max()), abs=1e-3)


def test_a_steering_file_keeps_window_probes(tmp_path):
    mine = whole_gate(
        (raw(0, [1.0, 2.0]), raw(3, [3.0, 4.0])),
        (raw(3, [5.0, 6.0], 0.5, 2.0),),
        window_intercept=-0.75,
        sound_probes=(raw(0, [7.0, 8.0], 1.5, 3.0),),
    )
    Steering((), mine).save(tmp_path / "s.safetensors")
    loaded = Steering.load(tmp_path / "s.safetensors")
    for found in (loaded.gate, loaded.to("cpu").gate):
        (probe,) = found.window_probes
        assert found.window_layers == (0, 3) and found.window_intercept == -0.75
        assert found.sound_probes[0].coef.tolist() == [7.0, 8.0] and found.sound_probes[0].layer == 0
        assert probe.coef.tolist() == [5.0, 6.0] and probe.std.tolist() == [2.0, 2.0]
        assert found.probes[1].coef.tolist() == [3.0, 4.0]

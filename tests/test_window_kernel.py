"""Window kernels: a window judged by its likeness to known ones."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gate_windows import raw, whole_gate
from tiny import audio, frame_gate

from calibration.activations import encode_windows, window_mels
from whisper_steer.attach import steer
from whisper_steer.comparison import scores_of_windows
from whisper_steer.errors import UsageError
from whisper_steer.gate import likely_speech, mean_of_sound, pooled_windows, spread_of_sound
from whisper_steer.passing import Step, padding_frames
from whisper_steer.registry import registry_of
from whisper_steer.steering import Steering
from whisper_steer.window_kernel import WindowKernel


def kernel(**changes):
    """One layer of one number, its three pools as they are, two landmarks."""
    plain = {
        "layers": (1,),
        "projection": torch.eye(3),
        "offset": torch.zeros(3),
        "landmarks": torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]]),
        "weights": torch.tensor([2.0, -3.0]),
        "gamma": 0.5,
        "intercept": 0.25,
    }
    return WindowKernel(**{**plain, **changes})


def random_kernel(layers, d, seed=0, n=5, k=4):
    g = torch.Generator().manual_seed(seed)
    return WindowKernel(
        layers,
        torch.randn(k, 3 * len(layers) * d, generator=g) / d,
        torch.randn(k, generator=g),
        torch.randn(n, k, generator=g),
        torch.randn(n, generator=g),
        0.3,
        -0.2,
        torch.randn(k, generator=g),
    )


def test_the_spread_of_sound_by_hand():
    x = torch.tensor([[[1.0], [3.0], [8.0]]]).expand(3, 3, 1)
    padding = torch.tensor([[False, False, True], [False, False, False], [True, True, True]])
    whole = math.sqrt((9 + 1 + 16) / 3)  # around 4
    assert spread_of_sound(x, padding).flatten().tolist() == pytest.approx([1.0, whole, whole])
    assert spread_of_sound(x.half(), None).flatten().tolist() == pytest.approx([whole] * 3)


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 40), seed=st.integers(0, 99), offset=st.sampled_from([0.0, 30.0, -1000.0]))
def test_the_spread_is_numpy_s_wherever_the_stream_lies(frames, seed, offset):
    x = torch.randn(2, frames, 3, generator=torch.Generator().manual_seed(seed)) + offset
    expected = torch.from_numpy(x.double().numpy().std(axis=1)).float()
    torch.testing.assert_close(spread_of_sound(x, None), expected, rtol=1e-3, atol=1e-3)


def test_the_logit_by_hand():
    pooled = torch.tensor([[[1.0], [2.0], [0.5]], [[1.0], [0.0], [0.5]]])
    squares = torch.tensor([[0.0, 1 + 4 + 0.25], [4.0, 1 + 0.25]])
    expected = 2 * torch.exp(-0.5 * squares[:, 0]) - 3 * torch.exp(-0.5 * squares[:, 1]) + 0.25
    torch.testing.assert_close(kernel().logits(pooled), expected)
    moved = kernel(offset=torch.tensor([1.0, 0.0, 0.0]), landmarks=torch.tensor([[0.0, 2.0, 0.5]] * 2))
    torch.testing.assert_close(moved.logits(pooled[:1]), torch.tensor([2.0 - 3.0 + 0.25]))
    sloped = kernel(linear=torch.tensor([0.5, -1.0, 2.0]))
    torch.testing.assert_close(sloped.logits(pooled), expected + torch.tensor([0.5 - 2 + 1, 0.5 + 1]))
    # the gate adds it to the frame most like speech
    found = whole_gate((raw(0, [1.0]), raw(1, [1.0])), (), kernel=kernel(), kernel_share=4.0)
    assert found.window_layers == (1,) and found.needs_padding
    x = torch.tensor([[[1.0], [3.0], [8.0]]])
    frame_logits, padding = torch.tensor([[-2.0, -2.0, 9.0]]), torch.tensor([[False, False, True]])
    read = pooled_windows(frame_logits, [x], padding)
    torch.testing.assert_close(read.flatten(), torch.tensor([2.0, 2.0, 1.0]), atol=1e-4, rtol=0)
    said = found.window_logit(frame_logits, {1: x}, padding)
    torch.testing.assert_close(said, -2.0 + 4 * kernel().logits(read))


def test_pools_stand_by_pool_then_layer():
    g = torch.Generator().manual_seed(1)
    a, b, logits = torch.randn(2, 7, 3, generator=g), torch.randn(2, 7, 3, generator=g), torch.randn(2, 7)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    found = pooled_windows(logits, [a, b], padding)
    assert found.shape == (2, 6, 3)
    for place, expected in enumerate(
        [*(likely_speech(logits, x) for x in (a, b))]
        + [mean_of_sound(x, padding) for x in (a, b)]
        + [spread_of_sound(x, padding) for x in (a, b)]
    ):
        assert torch.equal(found[:, place], expected)


def test_what_does_not_fit_is_refused():
    for changes, message in (
        ({"layers": ()}, r"reads layers \[\]: expected some"),
        ({"layers": (2, 1)}, r"reads layers \[2, 1\]"),
        ({"projection": torch.zeros(3, 4)}, "projection of 4 numbers: expected a multiple of 3"),
        ({"landmarks": torch.zeros(2, 2)}, "landmarks of shape"),
        ({"weights": torch.zeros(3)}, "weights of shape"),
        ({"linear": torch.zeros(2)}, "linear of shape"),
        ({"gamma": 0.0}, "gamma 0.0: expected a number > 0"),
        ({"intercept": math.nan}, "expected a finite number"),
    ):
        with pytest.raises(UsageError, match=message):
            kernel(**changes)
    with pytest.raises(UsageError, match=r"a kernel on layer 1: expected some of \(0,\)"):
        whole_gate((raw(0, [1.0]),), (), kernel=kernel())
    with pytest.raises(UsageError, match="different d_model"):
        whole_gate((raw(1, [1.0, 2.0]),), (), kernel=kernel())


def test_a_steering_file_keeps_the_kernel_in_half_precision_where_that_loses_nothing(tmp_path):
    from safetensors.torch import load_file

    mine = random_kernel((0, 2), 2)
    half = WindowKernel(
        mine.layers,
        mine.projection.half(),
        mine.offset,
        mine.landmarks.half(),
        mine.weights,
        mine.gamma,
        mine.intercept,
        mine.linear,
    )
    gate = whole_gate((raw(0, [1.0, 2.0]), raw(2, [3.0, 4.0])), (), kernel=half, kernel_share=0.5)
    path = tmp_path / "s.safetensors"
    Steering((), gate, {"base_model": "m"}).save(path)
    stored = load_file(path)
    assert stored["gate.kernel.projection"].dtype == stored["gate.kernel.landmarks"].dtype == torch.float16
    assert stored["gate.kernel.offset"].dtype == torch.float32
    for found in (Steering.load(path).gate, Steering.load(path).to("cpu").gate):
        assert found.kernel_share == 0.5 and found.kernel.layers == (0, 2)
        pooled = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(9))
        assert torch.equal(found.kernel.logits(pooled), half.logits(pooled))
        assert torch.equal(found.kernel.linear, mine.linear)
    # an older file has none
    Steering((), whole_gate((raw(0, [1.0]),), ()), {"base_model": "m"}).save(path)
    assert Steering.load(path).gate.kernel is None


def test_a_steered_encoder_judges_windows_by_it(tiny_whisper):
    """In an encoder pass, in a comparison and by hand the same."""
    gate = frame_gate(1)
    changed = {"kernel": random_kernel((1,), gate.d_model, n=7), "kernel_share": 2.0}
    gate = type(gate)(**{**{f: getattr(gate, f) for f in gate.__dataclass_fields__}, **changed})
    samples = np.asarray(audio(1, 5))
    mels = window_mels(samples, tiny_whisper.dims.n_mels)
    streams = {1: encode_windows(tiny_whisper, mels, [1])[0]}
    logits, padding = gate.frame_logits(streams), padding_frames(mels)
    pooled = pooled_windows(logits, [streams[1]], padding)
    expected = logits.amin(dim=1) + 2 * gate.kernel.logits(pooled)
    assert abs(float(gate.kernel.logits(pooled)) + 0.2) > 1e-4  # it says more than its intercept
    steering = Steering((), gate, {"base_model": "tiny"})
    with steer(tiny_whisper, alpha=1.0, steering=steering) as handle:
        step = Step(handle, 1.0, steering)
        step.padding = padding
        assert registry_of(tiny_whisper) is not None and step.read(1, streams[1])
    torch.testing.assert_close(step.window_logit, expected)
    (score,) = scores_of_windows(tiny_whisper, samples, [0], gate).values()
    assert abs(score - float(torch.sigmoid(expected.double())[0])) < 1e-4

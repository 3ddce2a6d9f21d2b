import math
from dataclasses import replace

import pytest
import torch
from gates import one_probe_gate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sae import frames, hand_made, random_sae

from whisper_steer.errors import UsageError

COMMON = {"smooth": 1, "threshold": 2.0, "spread": 0.5, "frame_scale": 2.0, "frame_bias": 1.0}


def latent_gate(**changes):
    sae = hand_made()
    rows = torch.tensor([0, 1])
    fields = {
        "layer": 0,
        "coef": torch.tensor([2.0, -3.0]),
        "intercept": 0.5,
        "W_enc": sae.W_enc[rows],
        "b_enc": sae.b_enc[rows],
        "theta": sae.theta[rows],
        "kind": "latents",
        "unit": torch.tensor([1.0, 0.5]),
        **COMMON,
    }
    return one_probe_gate(**{**fields, **changes})


def raw_gate(d=2, **changes):
    fields = {
        "layer": 0,
        "coef": torch.arange(1.0, d + 1),
        "intercept": -1.0,
        "W_enc": None,
        "b_enc": None,
        "theta": None,
        "kind": "raw",
        "mean": torch.full((d,), 0.5),
        "std": torch.full((d,), 2.0),
        **COMMON,
    }
    return one_probe_gate(**{**fields, **changes})


def test_latent_logits_by_hand():
    x = torch.tensor([[[2.0, 1.5], [0.0, 3.0]]])  # codes (2, 0.5) and (0, 2)
    expected = [
        0.5 + 2 * math.log(3) - 3 * math.log(2),
        0.5 - 3 * math.log(5),
    ]
    assert latent_gate().frame_logits(x)[0].tolist() == pytest.approx(expected)


def test_raw_logits_by_hand():
    x = torch.tensor([[[2.5, 0.5], [0.5, 4.5]]])  # standardised: (1, 0) and (0, 2)
    assert raw_gate().frame_logits(x).tolist() == [[0.0, 3.0]]


def test_smoothing_by_hand():
    x = torch.tensor([0.0, 3.0, 6.0, 0.0]).reshape(1, 4, 1)
    gate = raw_gate(1, mean=torch.zeros(1), std=torch.ones(1), intercept=0.0, smooth=3)
    # at the edges the mean is over the two frames that exist
    assert gate.frame_logits(x).tolist() == [[1.5, 3.0, 3.0, 3.0]]


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 40), half=st.integers(0, 30), seed=st.integers(0, 99))
def test_smoothing_equals_a_mean_over_the_frames_in_reach(length, half, seed):
    x = frames(seed, (2, length, 6))
    plain = raw_gate(6).frame_logits(x)
    smoothed = raw_gate(6, smooth=2 * half + 1).frame_logits(x)
    expected = torch.stack([plain[:, max(0, i - half) : i + half + 1].mean(1) for i in range(length)], 1)
    torch.testing.assert_close(smoothed, expected, rtol=1e-4, atol=1e-5)


def test_the_frame_most_like_speech_decides():
    found = raw_gate().window_logit(torch.tensor([[4.0, -1.0, 9.0], [3.0, 2.0, 5.0]]))
    assert found.tolist() == [-1.0, 2.0]


def test_frame_gate_by_hand():
    gate = latent_gate()  # sigmoid(2 (logit - 1))
    logits = torch.tensor([[1.0, 2.0, -2.0, 40.0, math.nan]])
    found = gate.frame_gate(logits)[0].tolist()
    assert found == pytest.approx([0.5, 1 / (1 + math.exp(-2)), 0.0, 1.0, 0.0])
    # sigmoid(-6) = 0.0025 is below 0.01: exactly nothing
    assert found[2] == 0.0


def test_window_threshold():
    gate = latent_gate()
    assert gate.window_threshold(1.0) == 2.0
    assert gate.window_threshold(0.5) == 2.5
    assert gate.window_threshold(0.25) == 3.0
    assert gate.window_threshold(2.0) == 1.5
    assert gate.window_threshold(8.0) == 0.5
    assert gate.window_threshold(0.0) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_judged_in_float32(dtype):
    sae, x = random_sae(), frames().to(dtype)
    gate = latent_gate(W_enc=sae.W_enc[:2], b_enc=sae.b_enc[:2], theta=sae.theta[:2], intercept=0.0, smooth=3)
    assert gate.frame_logits(x).dtype == torch.float32
    assert torch.equal(gate.frame_logits(x), gate.frame_logits(x.float()))


def test_only_the_gates_own_latents_are_encoded(monkeypatch):
    """m rows, one multiplication: that is what makes a gate cheap."""
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, W, b=None: calls.append(tuple(W.shape)) or linear(x, W, b)
    )
    latent_gate().frame_logits(torch.zeros(1, 4, 2))
    assert calls == [(2, 2)]


def test_widths_and_indices():
    assert latent_gate().d_model == 2 and raw_gate(5).d_model == 5
    assert latent_gate().probes[0].indices.tolist() == [0, 1]


def test_a_margin_beside_speech_stays_shut():
    gate = replace(raw_gate(), smooth=1, frame_scale=1.0, frame_bias=0.0, min_run=3, margin=2)
    logits = torch.full((1, 20), 9.0)
    logits[0, 8:10] = -9.0
    logits[0, 17] = -9.0
    shut = gate.frame_gate(logits)[0] == 0
    # open up to the window's edges (nothing is known beyond), but not within two frames of 8-9 and 17; what
    # follows 17 is shorter than three frames
    expected = [False] * 6 + [True] * 6 + [False] * 3 + [True] * 5
    assert shut.tolist() == expected
    plain = replace(gate, margin=0).frame_gate(logits)[0]
    assert torch.equal(plain[~shut], gate.frame_gate(logits)[0][~shut])
    with pytest.raises(UsageError, match="Gate has margin -1"):
        replace(gate, margin=-1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: latent_gate(kind="deep"), "probe has kind 'deep': expected one of latents, raw"),
        (lambda: latent_gate(unit=None), "Probe lacks unit"),
        (lambda: latent_gate(W_enc=None), "Probe lacks W_enc"),
        (lambda: latent_gate(unit=torch.tensor([1.0, 0.0])), "probe has a unit of 0.0: expected numbers > 0"),
        (lambda: raw_gate(std=torch.tensor([1.0, -2.0])), "probe has a std of -2.0"),
        (lambda: raw_gate(mean=torch.ones(3)), "Probe has mean of shape (3,): expected (2,)"),
        (lambda: latent_gate(smooth=4), "gate has smooth 4: expected an odd number"),
        (lambda: latent_gate(smooth=0), "Gate has smooth 0"),
        (lambda: latent_gate(spread=-0.1), "gate has spread -0.1"),
        (lambda: latent_gate(threshold=math.nan), "Gate has threshold nan"),
        (lambda: latent_gate(layer=-1), "Probe has layer -1"),
    ],
)
def test_bad_gates(call, message):
    with pytest.raises(UsageError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)

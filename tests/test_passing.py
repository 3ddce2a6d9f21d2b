"""Edits before the gate's last layer: the blocks between run again, only where something changes."""

import pytest
import torch
from gates import one_probe_gate
from tiny import mel

from whisper_steer.attach import steer
from whisper_steer.edits import MeanAblation, Shift
from whisper_steer.errors import UsageError
from whisper_steer.gate import Gate
from whisper_steer.probe import Probe
from whisper_steer.steering import Steering

WIDTH = 64
DIRECTION = torch.randn(WIDTH, generator=torch.Generator().manual_seed(9))  # layer norms ignore a constant


def gate(intercept=0.0, seed=0, layer=2, **changes):
    coef = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return one_probe_gate(
        layer=layer, kind="raw", coef=coef, mean=torch.zeros(WIDTH), std=torch.ones(WIDTH),
        **{"intercept": intercept, "smooth": 1, "threshold": 1e9, "spread": 0.0, "frame_scale": 1.0,
           "frame_bias": 0.0, **changes},
    )  # fmt: skip


def streams(model, mels):
    """Outputs of all blocks, unsteered."""
    found = []
    blocks = model.encoder.blocks
    hooks = [block.register_forward_hook(lambda *args: found.append(args[2])) for block in blocks]
    with torch.no_grad():
        output = model.encoder(mels)
    for hook in hooks:
        hook.remove()
    return found, output


def steered_output(model, mels, steering):
    with torch.no_grad(), steer(model, steering=steering):
        return model.encoder(mels)


@pytest.fixture
def mels():
    return torch.stack([mel(seed) for seed in (0, 1)])


def test_an_edit_before_the_gate_is_that_of_a_second_pass(tiny_whisper, mels):
    found, plain = streams(tiny_whisper, mels)
    early = Shift(0, DIRECTION, 0.5)
    found_gate = gate()
    out = steered_output(tiny_whisper, mels, Steering((early,), found_gate))
    g = found_gate.frame_gate(found_gate.frame_logits(found[2]))
    assert 0.05 < float((g > 0).float().mean())
    x = found[0] + g[..., None] * 0.5 * DIRECTION
    with torch.no_grad():
        for block in tiny_whisper.encoder.blocks[1:]:
            x = block(x)
        expected = tiny_whisper.encoder.ln_post(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert (out - plain).abs().max() > 0.01


def test_windows_without_an_open_frame_stay_bit_identical(tiny_whisper, mels):
    found, plain = streams(tiny_whisper, mels)
    probe = gate().probes[0]
    logits = probe.logits(found[2])
    top = logits.amax(dim=1)
    assert top[0] != top[1]
    shut = int(top.argmin())
    middle = float(top.mean())  # the other window has frames above it
    found_gate = gate(intercept=-middle, frame_scale=1e4)
    out = steered_output(tiny_whisper, mels, Steering((Shift(0, DIRECTION, 0.5),), found_gate))
    assert torch.equal(out[shut], plain[shut])
    assert (out[1 - shut] - plain[1 - shut]).abs().max() > 1e-3


def test_a_gate_on_two_layers_adds_its_probes(tiny_whisper, mels):
    found, _ = streams(tiny_whisper, mels)
    one, two = gate(layer=1).probes[0], gate(layer=2, seed=1).probes[0]
    both = Gate((one, two), 0.25, 1, threshold=1e9, spread=0.0, frame_scale=1.0, frame_bias=0.0)
    expected = one.logits(found[1]) + two.logits(found[2]) + 0.25
    torch.testing.assert_close(both.frame_logits(dict(enumerate(found))), expected)
    assert both.layers == (1, 2) and both.layer == 2 and both.n_features == 2 * WIDTH
    with pytest.raises(UsageError, match="pass that of layer 1, too"):
        both.frame_logits(found[2])
    late = Steering((Shift(3, DIRECTION, 1.0),), both)
    out = steered_output(tiny_whisper, mels, late)
    g = both.frame_gate(both.frame_logits(dict(enumerate(found))))
    with torch.no_grad():
        expected = tiny_whisper.encoder.ln_post(late.edit(found[3], 3, 1.0, g))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_probes_of_one_layer_each_ascending():
    one, two = gate(layer=1).probes[0], gate(layer=2).probes[0]
    for probes in ((), (two, one), (one, one)):
        with pytest.raises(UsageError, match="expected one each, ascending"):
            Gate(probes, 0.0, 1, threshold=0.0, spread=0.0, frame_scale=1.0, frame_bias=0.0)
    other = Probe(2, "raw", torch.ones(3), mean=torch.zeros(3), std=torch.ones(3))
    with pytest.raises(UsageError, match="different d_model"):
        Gate((one, other), 0.0, 1, threshold=0.0, spread=0.0, frame_scale=1.0, frame_bias=0.0)


def test_short_open_stretches_stay_shut():
    logits = torch.full((1, 12), -50.0)
    logits[0, [2, 3, 5, 6, 7, 10, 11]] = 50.0
    wide = gate(min_run=3).frame_gate(logits)
    # two frames: a pause; three: a gap; two at the window's edge: they may go on beyond it
    assert wide[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert gate().frame_gate(logits)[0].tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1]


def test_mean_ablation_by_hand():
    mean = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    x = torch.tensor([[[3.0, 0.0], [0.0, 2.1]]])
    edit = MeanAblation(0, mean, strength=0.5, tolerance=0.1)
    out = edit(x, 1.0)
    assert out[0, 0].tolist() == [2.0, 0.0]  # half of the way
    assert torch.equal(out[0, 1], x[0, 1])  # 0.1 away, within a tenth of its mean's length of 2
    torch.testing.assert_close(edit(x, 9.0)[0, 0], mean[0])  # never beyond the mean
    one = MeanAblation(0, torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(one(x, 1.0), torch.ones(1, 2, 2))
    assert one(x, 0.0) is x


def test_bad_mean_ablations():
    with pytest.raises(UsageError, match="means of 2 frames, the window has 3"):
        MeanAblation(0, torch.zeros(2, 4))(torch.ones(1, 3, 4), 1.0)
    with pytest.raises(UsageError, match="tolerance -1.0: expected a number >= 0"):
        MeanAblation(0, torch.zeros(1, 4), tolerance=-1.0)


def test_mean_ablation_in_a_file(tmp_path):
    steering = Steering((MeanAblation(1, torch.rand(5, 4), 0.5, 0.25),))
    steering.save(tmp_path / "s.safetensors")
    edit = Steering.load(tmp_path / "s.safetensors").edits[0]
    assert torch.equal(edit.mean, steering.edits[0].mean)
    assert (edit.layer, edit.strength, edit.tolerance) == (1, 0.5, 0.25)

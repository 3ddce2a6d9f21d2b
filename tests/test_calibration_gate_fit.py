import numpy as np
import pytest
import torch
from calibration_tools import RATE, make_terse_whisper, sound

from calibration.activations import encode_clip
from calibration.fit import fit_gates
from calibration.gate_fit import (
    NOBODY,
    SPEECH,
    UNCLEAR,
    FrameSample,
    balanced_weights,
    collect_gate_frames,
    fit_latent_gates,
    fit_raw_gate,
    frame_loss,
    frame_targets,
    latent_features,
    refit_gate,
)
from calibration.training_clips import TrainingClip
from whisper_steer.errors import UsageError
from whisper_steer.sae import SparseAutoencoder


def test_targets_leave_a_margin_around_speech():
    targets = frame_targets(((1.0, 2.0),), n_true=250)
    assert (targets[50:100] == SPEECH).all()
    assert (targets[38:50] == UNCLEAR).all() and (targets[100:112] == UNCLEAR).all()
    assert (targets[:38] == NOBODY).all() and (targets[113:] == NOBODY).all()


def test_targets_of_real_recordings_are_unclear_outside_the_intervals():
    targets = frame_targets(((0.0, 1.0),), n_true=100, silence_is_certain=False)
    assert (targets[:50] == SPEECH).all() and (targets[50:100] == UNCLEAR).all()
    assert (targets[100:] == NOBODY).all()  # padding is surely nobody


def test_speech_up_to_the_end_keeps_its_margin_out_of_the_padding():
    targets = frame_targets(((0.0, 2.0),), n_true=100)
    assert (targets[100:112] == UNCLEAR).all() and targets[113] == NOBODY


def test_weights_balance_classes_and_conditions():
    nobody = np.array([False] * 6 + [True] * 4)
    groups = ["clean"] * 5 + ["quiet"] + ["tones"] * 4
    weight, counts = balanced_weights(nobody, groups)
    assert counts == {"clean": 5, "quiet": 1, "tones": 4}
    assert weight[nobody].sum() == pytest.approx(weight[~nobody].sum())
    assert weight[:5].sum() == pytest.approx(weight[5])
    assert weight.mean() == pytest.approx(1.0)


def test_frames_are_drawn_by_class_from_the_right_places():
    model = make_terse_whisper(1)
    audio = np.concatenate([np.zeros(RATE, np.float32), sound("s", 1.0, speech=True)])
    clips = [
        TrainingClip("s", "speech", "clean", lambda: (audio, ((1.0, 2.0),))),
        TrainingClip("n", "nonspeech", "tones", lambda: (sound("n", 2.0, speech=False), ())),
    ]
    sample = collect_gate_frames(model, clips, per_clip=10, padding_per_clip=3, progress=False)
    assert sample.counts == {
        "nobody:nonspeech:tones": 10,
        "nobody:speech:clean": 10,
        "padding": 6,
        "speech:speech:clean": 10,
    }
    assert {layer: x.shape for layer, x in sample.x.items()} == {0: (36, 32), 1: (36, 32)}
    assert sample.nobody.sum() == 26
    whole = encode_clip(model, audio).windows[1, 0]
    for frame in sample.x[1][:10]:  # the speech frames of the first clip
        nearest = (whole - frame).norm(dim=1).argmin()
        assert 50 <= nearest < 100
    with pytest.raises(UsageError, match="hold no speech frames"):
        collect_gate_frames(model, clips[1:], progress=False)
    one = collect_gate_frames(model, clips, layers=[1], per_clip=10, padding_per_clip=3, progress=False)
    assert list(one.x) == [1] and torch.equal(one.x[1], sample.x[1])


def problem(frames=3000, d=16, seed=0):
    """Directions 0-2 mean speech, 3-5 other sounds, 6-15 anything; the SAE's latents are those directions."""
    rng = np.random.default_rng(seed)
    nobody = rng.random(frames) < 0.5
    x = 0.3 * np.abs(rng.standard_normal((frames, d)))
    for latent in range(3):
        x[:, latent] += np.where(nobody, 0, 1) * rng.random(frames) * 2
        x[:, latent + 3] += np.where(nobody, 1, 0) * rng.random(frames) * 2
    sae = SparseAutoencoder(d, d + 4, k=4, layer=1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(d), -torch.ones(4, d)]))  # the last four never fire
        sae.theta.fill_(0.1)
    return sae, torch.from_numpy(x.astype(np.float32)), nobody, np.ones(frames)


def accuracy(gate, x, nobody):
    logits = gate.frame_logits(x[None])[0].numpy()
    return float(((logits > 0) == nobody).mean())


def test_gates_find_the_latents_that_matter():
    sae, x, nobody, weight = problem()
    gates = fit_latent_gates([sae], {1: x}, nobody, weight, sizes=(12, 6, 64))
    assert sorted(gates) == [6, 12]  # 16 latents fire: no gate of 64
    assert gates[6].probes[0].indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert (gates[6].probes[0].coef[:3] < 0).all() and (gates[6].probes[0].coef[3:] > 0).all()
    held_out = problem(seed=1)
    assert accuracy(gates[6], held_out[1], held_out[2]) > 0.95
    assert gates[6].layer == 1 and gates[6].smooth == 1
    # features as they were in the fit
    features, unit, kept = latent_features(sae, x, nobody, weight)
    ours = gates[12].probes[0].features(x)
    columns = [int(np.flatnonzero(kept == index)[0]) for index in gates[12].probes[0].indices.tolist()]
    np.testing.assert_allclose(ours.numpy(), features[:, columns], rtol=1e-5)
    assert 16 not in kept


def test_raw_gate_is_a_control_on_the_same_frames():
    sae, x, nobody, weight = problem()
    gate = fit_raw_gate([1], {1: x}, nobody, weight)
    held_out = problem(seed=1)
    assert gate.kind == "raw" and accuracy(gate, held_out[1], held_out[2]) > 0.95
    torch.testing.assert_close(gate.probes[0].features(x).std(0), torch.ones(16), rtol=1e-4, atol=1e-4)


def test_weights_move_the_gate():
    sae, x, nobody, _ = problem()
    careful = fit_raw_gate([1], {1: x}, nobody, np.where(nobody, 0.05, 1.95))
    even = fit_raw_gate([1], {1: x}, nobody, np.ones(len(nobody)))
    speech = x[torch.from_numpy(~nobody)][None]
    assert careful.frame_logits(speech).quantile(0.95) < even.frame_logits(speech).quantile(0.95) - 1


def test_two_layers_share_the_features_of_a_gate():
    """Layer 1 knows who speaks, layer 2 what else sounds: together they tell, and each keeps its own."""
    sae, x, nobody, weight = problem()
    first, second = x.clone(), x.clone()
    first[:, 3:6] = 0.0
    second[:, 0:3] = 0.0
    other = SparseAutoencoder(16, 20, k=4, layer=2)
    other.load_state_dict(sae.state_dict())
    streams = {1: first, 2: second}
    gate = fit_latent_gates([sae, other], streams, nobody, weight, sizes=(6,))[6]
    assert gate.layers == (1, 2) and gate.layer == 2
    assert [probe.indices.tolist() for probe in gate.probes] == [[0, 1, 2], [3, 4, 5]]
    logits = gate.frame_logits({layer: stream[None] for layer, stream in streams.items()})[0].numpy()
    assert ((logits > 0) == nobody).mean() > 0.95
    # the log-loss by hand
    expected = np.logaddexp(0, np.where(nobody, -logits, logits)).mean()
    assert frame_loss(gate, streams, nobody, weight) == pytest.approx(expected, rel=1e-4)
    raw = fit_raw_gate([1, 2], streams, nobody, weight)
    assert raw.layers == (1, 2) and raw.kind == "raw"
    alone = fit_raw_gate([1], streams, nobody, weight)
    assert frame_loss(raw, streams, nobody, weight) < frame_loss(alone, streams, nobody, weight)


def test_a_refit_keeps_the_features_and_follows_the_frames():
    sae, x, nobody, weight = problem()
    gate = fit_latent_gates([sae], {1: x}, nobody, weight, sizes=(6,))[6]
    same = refit_gate(gate, {1: x}, nobody, weight)
    torch.testing.assert_close(same.probes[0].coef, gate.probes[0].coef, rtol=1e-3, atol=1e-3)
    turned = refit_gate(gate, {1: x}, ~nobody, weight)
    torch.testing.assert_close(turned.probes[0].coef, -gate.probes[0].coef, rtol=1e-2, atol=1e-2)
    assert turned.probes[0].indices.tolist() == gate.probes[0].indices.tolist()
    assert turned.smooth == gate.smooth and torch.equal(turned.probes[0].unit, gate.probes[0].unit)


def test_gates_read_one_layer_two_and_up_to_four():
    rng = np.random.default_rng(0)
    nobody = rng.random(400) < 0.5
    x = {}
    for layer in range(5):  # layer 3 shows most clearly whether somebody speaks
        shift = torch.from_numpy(nobody.astype(np.float32))[:, None] * (2.0 if layer == 3 else 0.5)
        x[layer] = torch.from_numpy(rng.standard_normal((400, 4)).astype(np.float32)) + shift
    sample = FrameSample(x, nobody, np.ones(400), {})
    gates = fit_gates(dict.fromkeys(range(5)), sample, progress=False)  # without SAEs: raw activations
    assert list(gates) == [
        *(f"raw_l{layer}" for layer in range(5)),
        *("raw_l0+l3", "raw_l1+l3", "raw_l2+l3"),  # the best with others
        "raw_l0+l1+l2+l3",
    ]
    assert gates["raw_l0+l1+l2+l3"].layers == (0, 1, 2, 3)
    losses = {name: frame_loss(gate, x, nobody, sample.weight) for name, gate in gates.items()}
    assert min(losses, key=lambda name: losses[name]) == "raw_l0+l1+l2+l3"

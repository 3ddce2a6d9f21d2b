import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from calibration_tools import clips, make_terse_whisper
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from whisper.tokenizer import get_tokenizer

from calibration import sae_quality
from calibration.activations import encode_clip
from calibration.sae_quality import (
    calibrate_threshold,
    domain_quality,
    duplicates,
    input_scale,
    measure_sae,
)
from calibration.splicing import Listener, SpeechClip, condition_of, spliced, text_losses
from whisper_steer.sae import SparseAutoencoder


@pytest.fixture(scope="module")
def model():
    return make_terse_whisper(1)


def sae_of(w_enc, w_dec, *, activation="relu", k=None, layer=0):
    w_enc, w_dec = torch.as_tensor(w_enc), torch.as_tensor(w_dec)
    sae = SparseAutoencoder(w_enc.shape[1], w_enc.shape[0], activation=activation, k=k, layer=layer)
    with torch.no_grad():
        sae.W_enc.copy_(w_enc)
        sae.W_dec.copy_(w_dec)
    return sae.eval().requires_grad_(False)


def exact(d, layer=0):
    """Reconstructs everything: one latent for either sign of every dimension."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    return sae_of(both, both, layer=layer)


def random_sae(seed=0, d=8, n=32, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SparseAutoencoder(d, n, **{"k": 3, **options}).requires_grad_(False)


def frames(n, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# -- sparsity, error, alive latents


def test_measures_by_hand():
    x = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, -4.0], [3.0, 0.0]])
    # the second dimension is halved, its negative half is lost; the third latent never fires
    sae = sae_of([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [[1.0, 0.0], [0.0, 0.5], [-1.0, 0.0]])
    quality = domain_quality(sae, x)
    assert quality.frames == 4 and quality.l0 == 0.75 and quality.alive == pytest.approx(2 / 3)
    # errors 0, 2, 4, 0; mean (1.5, 0): variance 4 * 1.5^2 + 2 * 4^2; mean square norm (9 + 16 + 16 + 9) / 4
    assert quality.fvu == pytest.approx((4 + 16) / (9 + 32))
    assert quality.l2 == pytest.approx(1.5 / math.sqrt(12.5))
    assert domain_quality(sae, x, scale=3.0).l2 == pytest.approx(0.5)


def test_perfect_constant_and_empty():
    x = frames(50)
    perfect = domain_quality(exact(8), x)
    assert perfect.fvu == 0 and perfect.l2 == 0 and perfect.l0 == 8 and perfect.alive == 1
    silent = sae_of(torch.zeros(1, 8), torch.zeros(1, 8))
    silent.b_dec.copy_(x.mean(0))
    assert domain_quality(silent, x).fvu == pytest.approx(1.0)
    nothing = domain_quality(silent, x[:0])
    assert nothing.frames == 0 and math.isnan(nothing.fvu) and math.isnan(nothing.l2)


def test_no_unit_of_the_activations_matters():
    sae, x = random_sae(activation="relu", k=None), frames(100)
    ours, scaled = domain_quality(sae, x), domain_quality(sae.fold_input_scale(7.0), 7 * x)
    assert scaled.l2 == pytest.approx(ours.l2, rel=1e-5) and scaled.fvu == pytest.approx(ours.fvu, rel=1e-5)


def test_one_scale_for_all_domains_which_weigh_the_same():
    loud, quiet = torch.full((10, 4), 2.0), torch.full((1000, 4), 1.0)
    assert input_scale({"a": loud, "b": quiet}) == pytest.approx(math.sqrt((16 + 4) / 2))
    assert input_scale({"a": loud, "b": quiet[:0]}) == 4
    assert input_scale({}) == input_scale({"a": torch.zeros(3, 4)}) == 1


def test_chunks_change_nothing(monkeypatch):
    sae, domains = random_sae(), {"speech": frames(53), "music": frames(31, seed=1)}
    calibrate_threshold(sae, domains["speech"], 3)
    whole, theta = measure_sae(sae, domains, duplicate_frames=30), sae.theta.clone()
    monkeypatch.setattr(sae_quality, "_CODES", 32 * 7)
    calibrate_threshold(sae, domains["speech"], 3)
    assert torch.equal(sae.theta, theta)
    chunked = measure_sae(sae, domains, duplicate_frames=30)
    assert chunked["domains"]["speech"]["fvu"] == pytest.approx(whole["domains"]["speech"]["fvu"])
    for key in ("alive", "dead", "duplicates", "duplicate_frames", "l0"):
        assert chunked[key] == whole[key], key
    assert whole["duplicate_frames"] == 18 + 11  # every third frame of 53 and of 31
    monkeypatch.setattr(sae_quality, "_CODES", 1)  # a chunk holds at least one frame
    assert measure_sae(sae, domains, duplicate_frames=30)["duplicates"] == whole["duplicates"]


def test_record_of_all_domains():
    sae = exact(2)
    positive, negative = frames(40, 2).abs() + 0.1, -frames(20, 2, seed=1).abs() - 0.1
    record = measure_sae(sae, {"speech": positive, "music": negative, "sounds": positive[:0]})
    assert list(record["domains"]) == ["speech", "music"]
    assert record["domains"]["speech"]["alive"] == record["domains"]["music"]["alive"] == 0.5
    assert (record["alive"], record["dead"], record["duplicate_frames"]) == (1.0, 0, 60)
    # both latents of a sign fire in the same frames
    assert record["duplicates"] == 4 and record["l0"] == 2 and record["fvu"] == 0
    empty = measure_sae(sae, {"speech": positive[:0]})
    assert (empty["l0"], empty["dead"], empty["duplicates"], empty["domains"]) == (None, 4, 0, {})


def test_threshold_hits_its_target_exactly():
    sae, x = random_sae(), frames(20_000)
    assert calibrate_threshold(sae, x, 3) == float(sae.theta[0])
    assert int((sae.encode(x) > 0).sum()) == 60_000
    calibrate_threshold(sae, x, 1000)  # more than there are positive pre-activations: all of them stay
    assert float(sae.theta[0]) == 0.0


# -- duplicates


def brute_force(patterns, iou):
    def twins(a, b):
        return (a & b).sum() > iou * (a | b).sum()

    columns = list(enumerate(patterns.T))
    return np.array([any(twins(a, b) for j, b in columns if j != i) for i, a in columns], dtype=bool)


def test_duplicates_by_hand():
    patterns = np.array([
        # twins: 3 of 4 | exactly half is not enough | alone | dead, dead
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
    ])  # fmt: skip
    assert duplicates(patterns).tolist() == [True, True, True, False, False, False, False]
    assert duplicates(patterns, iou=0.7).tolist() == [True, True, False, False, False, False, False]
    assert duplicates(patterns, iou=0.0).tolist() == [True, True, True, True, False, False, False]
    assert duplicates(np.zeros((0, 3))).tolist() == [False] * 3
    assert duplicates(sparse.csr_matrix(patterns * 7.5)).tolist() == duplicates(patterns).tolist()


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 30), st.sampled_from([0.1, 0.4, 0.8]))
@settings(max_examples=40, deadline=None)
def test_duplicates_agree_with_comparing_all_pairs(seed, n_frames, n_latents, density):
    rng = np.random.default_rng(seed)
    patterns = (rng.random((n_frames, n_latents)) < density).astype(np.int8)
    assert (duplicates(patterns) == brute_force(patterns, 0.5)).all()


def test_duplicates_across_blocks(monkeypatch):
    monkeypatch.setattr(sae_quality, "_TWIN_BLOCK", 3)
    patterns = (np.random.default_rng(0).random((30, 11)) < 0.4).astype(np.int8)
    patterns[:, 10] = patterns[:, 1]
    found = duplicates(patterns)
    assert found[1] and found[10] and (found == brute_force(patterns, 0.5)).all()


# -- what recognition costs


def test_cross_entropy_is_that_of_the_reference_text(model):
    audio = clips(1, 0)["speech"][0].load()
    tokenizer = get_tokenizer(False)
    text = tokenizer.encode(" hello world")
    start = [tokenizer.sot, tokenizer.no_timestamps]
    features = encode_clip(model, audio).windows[-1]
    tokens = torch.tensor([start + text])
    with torch.no_grad():
        logits = model.decoder(tokens, model.encoder.ln_post(features))[0].log_softmax(-1)
    expected = -sum(float(logits[1 + i, token]) for i, token in enumerate([*text, tokenizer.eot]))
    (loss,) = text_losses(model, [audio], [" hello world "])
    assert loss.tokens == len(text) + 1 == 3
    assert loss.nats == pytest.approx(expected, rel=1e-4)


def test_clips_whose_text_cannot_be_forced_are_left_out(model):
    short, long = np.zeros(1600, np.float32), np.zeros(16_000 * 30 + 1, np.float32)
    chosen = clips(2, 0)["speech"]
    losses = text_losses(
        model,
        [short, long, chosen[0].load(), short, chosen[1].load()],
        ["", "hello", "hello", "word " * 500, "hello"],
        batch=1,
    )
    assert [loss is None for loss in losses] == [True, True, False, True, False]
    together = text_losses(model, [chosen[0].load(), chosen[1].load()], ["hello", "hello"])
    assert losses[4].nats == pytest.approx(together[1].nats, rel=1e-4)
    with pytest.raises(ValueError, match="1 clips but 2 texts"):
        text_losses(model, [short], ["a", "b"])


def test_an_exact_reconstruction_costs_nothing_and_a_dead_one_does(model):
    sets = clips(4, 2)
    speech = [
        SpeechClip(clip.load(), "hello world", condition)
        for clip, condition in zip(sets["speech"], ("clean", "clean", "noisy", "noisy"), strict=True)
    ]
    listener = Listener(model, speech, [clip.load() for clip in sets["tones"]])
    record = listener.record(exact(32, layer=1))
    assert list(record["speech"]) == ["all", "clean", "noisy"]
    assert [row["clips"] for row in record["speech"].values()] == [4, 2, 2]
    for row in record["speech"].values():
        assert row["wer_rise"] == 0 and row["wer_plain"] == row["wer_spliced"]
        assert row["ce_delta"] == pytest.approx(0, abs=1e-4)
        assert row["tokens"] == 3 * row["clips"] and row["words"] == 2 * row["clips"]
    whole, parts = record["speech"]["all"], [record["speech"][name] for name in ("clean", "noisy")]
    assert whole["ce_plain"] == pytest.approx(np.mean([part["ce_plain"] for part in parts]))
    assert record["nonspeech"]["clips"] == 2
    assert record["nonspeech"]["text_fpr_plain"] == record["nonspeech"]["text_fpr_spliced"]
    dead = listener.record(sae_of(torch.zeros(1, 32), torch.zeros(1, 32), layer=1))["speech"]["all"]
    assert dead["ce_delta"] == pytest.approx(dead["ce_spliced"] - dead["ce_plain"])
    assert abs(dead["ce_delta"]) > 0.01 and dead["ce_plain"] == whole["ce_plain"]


def test_a_side_without_clips_is_left_out(model):
    speech = [SpeechClip(clips(1, 0)["speech"][0].load(), "hello world")]
    record = Listener(model, speech, []).record(exact(32))
    assert list(record) == ["speech"] and list(record["speech"]) == ["all"]


def test_splicing_replaces_one_layers_output_and_is_undone(model):
    sae = random_sae(d=32, n=8, k=2)
    mel = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    plain = model.encoder(mel)
    with torch.no_grad(), spliced(model, sae):
        changed = model.encoder(mel)
    assert not torch.allclose(plain, changed)
    assert torch.equal(model.encoder(mel), plain)


@dataclass
class Labelled:
    labels: dict
    category: str | None = None


def test_recording_conditions():
    assert condition_of(Labelled({"condition": "noisy", "category": "speech"})) == "noisy"
    assert condition_of(Labelled({"category": "speech"})) == "clean"
    assert condition_of(Labelled({}, "speech_reverb")) == "reverb"
    assert condition_of(Labelled({})) == condition_of(object()) == "unlabelled"

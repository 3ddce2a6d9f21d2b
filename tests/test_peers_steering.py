"""The competitors that steer Whisper from inside: AudioSAE, its follow-up, Calm-Whisper, the hallucination
space."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import whisper
from calibration_tools import FakeClip, clips, make_terse_whisper, sound
from conftest import make_tiny_whisper
from test_sae import random_sae
from tiny import footprint
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.model import ModelDimensions

from benchmarks.methods import Setup, Unavailable
from benchmarks.peers import audiosae, calm_whisper, followup, hallucination_space, intervention, pooling
from benchmarks.peers.calm_whisper import Hallucination, head_numbers, masked, ranked, single_heads
from benchmarks.peers.hallucination_space import Gate, States, fit_gate, projected, reach, rejecting, space
from calibration import activations
from calibration.decoding import ClipTranscript
from calibration.hallucinations import Labels
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.zoo import load_model

# openai-whisper leaves its vocabulary and its spelling table open until they are collected
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file.*whisper:ResourceWarning")

MODULES = (audiosae, followup, calm_whisper, hallucination_space)
METHODS = [method for module in MODULES for method in module.METHODS]


def label(nsp: bool, *, hr: bool = True) -> Labels:
    p = 0.1 if nsp else 0.9
    return Labels(p, -0.5, "words", nsp, hr, True, ClipTranscript("words", (), ((p, -0.5),), 2.0))


def setup_for(model, folder, sets, *, saes=(), nsp=lambda clip: clip.kind != "nonspeech") -> Setup:
    """A Setup whose calibration clips and labels are given. nsp: clip -> its label."""
    setup = Setup(model, "nobody-kept-it", folder, plain=list, plain_windows=list, quick=True, progress=False)
    setup.calibration = sets
    setup.labels = {clip.id: label(nsp(clip)) for group in sets.values() for clip in group}
    if saes:
        setup.saes = tuple(saes)
    return setup


def half_of(clip: FakeClip) -> bool:
    """Every second non-speech clip is labelled a hallucination."""
    return clip.kind != "nonspeech" or int(clip.id.split("/")[1]) % 2 == 0


@pytest.fixture(scope="module")
def terse():
    return make_terse_whisper(1)


@pytest.fixture(scope="module")
def headed():
    """Decoder of 2 layers with 4 heads of 16 each; a text context of 16 tokens keeps sentences short."""
    return make_tiny_whisper(dims=ModelDimensions(80, 1500, 64, 1, 1, 51864, 16, 64, 4, 2))


# -- AudioSAE and its follow-up: what they do to an activation -------------------------------------------


def plane_sae() -> SparseAutoencoder:
    """Codes are (x0, x1, -x0) where above 0.5; decoder rows of lengths 2, 5 and 1; b_dec (1, 1)."""
    sae = SparseAutoencoder(2, 3, k=1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
        sae.W_dec.copy_(torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, -1.0]]))
        sae.b_dec.copy_(torch.tensor([1.0, 1.0]))
        sae.theta.fill_(0.5)
    return sae


def test_audiosae_replaces_the_activation_by_the_shifted_reconstruction():
    edit = audiosae.reconstruction_edit(plane_sae(), np.array([0.9, -2.0, 0.1]), 2)
    # s = (-1, +1, 0); along unit vectors (1, 0) and (0.6, 0.8): codes move by -alpha / 2 and +alpha / 5
    assert edit.values.tolist() == pytest.approx([-0.5, 0.2, 0.0])
    # x = (1, 0): only the first code fires, and what it is not made of (the error) is dropped:
    # (1 - 0.5 a) (2, 0) + 0.2 a (3, 4) + (1, 1) = (3 - 0.4 a, 1 + 0.8 a)
    x = torch.tensor([[1.0, 0.0]])
    for alpha in (0.5, 1.0, 3.0):
        steered = replace(edit, strength=alpha)(x, 1.0)
        assert steered[0].tolist() == pytest.approx([3 - 0.4 * alpha, 1 + 0.8 * alpha])


def test_audiosae_alpha_means_the_same_however_the_sae_is_scaled():
    sae, beta = random_sae(3, d=6, n=20), np.linspace(-1, 1, 20)
    scaled = sae.fold_input_scale(7.0)  # an SAE of inputs x / 7, told in x: decoder rows 7 times as long
    moved = [
        torch.from_numpy(beta * 0).float() + audiosae.reconstruction_edit(s, beta, 5).values
        for s in (sae, scaled)
    ]
    assert torch.allclose(moved[0] @ sae.W_dec, moved[1] @ scaled.W_dec, atol=1e-5)
    assert (moved[0] != 0).sum() == 5


def test_the_vectors_point_from_hallucinated_clips_to_the_others():
    mean = np.array([[4.0, 1.0], [2.0, 1.0], [0.0, 5.0]])  # two hallucinated clips (mean (3, 1)), one not
    hallucinated = np.array([True, True, False])
    unit = audiosae.svector(3, mean, hallucinated)
    full = followup.activation_vector(3, mean, hallucinated)
    assert (unit.layer, unit.strength) == (full.layer, full.strength) == (3, 1.0)
    assert unit.direction.tolist() == pytest.approx([-0.6, 0.8])
    assert full.direction.tolist() == pytest.approx([-3.0, 4.0])
    x = torch.ones(1, 2)
    assert replace(unit, strength=3.0)(x, 1.0)[0].tolist() == pytest.approx([-0.8, 3.4])
    assert replace(full, strength=8.0)(x, 1.0)[0].tolist() == pytest.approx([-23.0, 33.0])


def test_followup_shifts_latents_by_their_mean_and_keeps_the_error():
    # the third latent weighs most and never fired: it is not chosen
    edit = followup.latent_edit(plane_sae(), np.array([0.9, -2.0, 5.0]), np.array([0.4, 0.5, 0.0]), 2)
    assert edit.indices.tolist() == [0, 1]
    assert edit.values.tolist() == pytest.approx([-0.4, 0.5])
    # codes (1, 0): 1 - 3 * 0.4 stays at 0, so -1 (2, 0); the silent second one wakes up to 1.5 (3, 4)
    steered = replace(edit, strength=3.0)(torch.tensor([[1.0, 0.0]]), 1.0)
    assert steered[0].tolist() == pytest.approx([1 - 2 + 4.5, 6.0])


# -- fitting on calibration clips -----------------------------------------------------------------------


def test_the_svector_of_calibration_clips(terse, tmp_path):
    sets = clips(3, 20, seconds=1.0)
    setup = setup_for(terse, tmp_path, sets, nsp=half_of)
    edit = audiosae.fit_svector(setup)
    means = np.stack(
        [
            activations.encode_clip(terse, clip.load(), [1]).frames[0].mean(dim=0).numpy()
            for clip in sets["tones"]
        ]
    )
    expected = means[1::2].mean(axis=0) - means[::2].mean(axis=0)
    assert edit.layer == 1  # the last of two
    assert np.allclose(edit.direction.numpy(), expected / np.linalg.norm(expected), atol=1e-4)


def test_pooled_clips_are_kept_for_the_same_audio_model_and_sae(terse, tmp_path, monkeypatch):
    sets, sae = clips(0, 18, seconds=0.5), random_sae(5, d=32, n=12, layer=1)
    saes = (random_sae(4, d=32, n=12), sae)
    first = pooling.pool(setup_for(terse, tmp_path, sets, saes=saes, nsp=half_of), 1, ("nsp",))
    assert first.clips.latents.shape == (18, 12) and first.hallucinated.tolist() == [True, False] * 9

    def no_more(*args):
        raise AssertionError("encoded again")

    monkeypatch.setattr(activations, "encode_windows", no_more)
    again = pooling.pool(setup_for(terse, tmp_path, sets, saes=saes, nsp=half_of), 1, ("nsp",))
    assert np.array_equal(again.clips.latents, first.clips.latents)
    assert np.array_equal(again.clips.mean_activation, first.clips.mean_activation)
    other_sae = (saes[0], random_sae(6, d=32, n=12, layer=1))
    other_scores = setup_for(terse, tmp_path, sets, saes=saes, nsp=lambda clip: not half_of(clip))
    for changed in (setup_for(terse, tmp_path, sets, saes=other_sae, nsp=half_of), other_scores):
        with pytest.raises(AssertionError, match="encoded again"):
            pooling.pool(changed, 1, ("nsp",))


def test_speech_is_the_contrast_where_all_noise_is_alike(terse, tmp_path):
    sets = clips(12, 10, seconds=0.5)
    pooled = pooling.pool(setup_for(terse, tmp_path, sets), 1, ("nsp", "hr", "text"))
    assert pooled.contrast.name == "speech"
    assert pooled.hallucinated.tolist() == [False] * 10 + [True] * 10  # as many speech clips as others
    assert pooled.clips.mean.shape == (20, 32)


def test_what_a_method_lacks_is_said(terse, tmp_path):
    with pytest.raises(Unavailable, match="calibration split has none"):
        audiosae.METHODS[0].prepare(setup_for(terse, tmp_path, clips(4, 0)))
    with pytest.raises(Unavailable, match="one class nearly empty"):
        followup.METHODS[0].prepare(setup_for(terse, tmp_path, clips(0, 4)))
    topk = [random_sae(layer, d=32, n=12, activation="topk", layer=layer) for layer in (0, 1)]
    with pytest.raises(Unavailable, match="'topk' kind"):
        followup.METHODS[1].prepare(setup_for(terse, tmp_path, clips(4, 4), saes=topk))
    with pytest.raises(Unavailable, match="it needs SAEs of every layer"):
        audiosae.METHODS[1].prepare(setup_for(terse, tmp_path, clips(4, 4)))
    with pytest.raises(Unavailable, match="the space needs 8"):
        hallucination_space.METHODS[0].prepare(setup_for(terse, tmp_path, clips(2, 2, seconds=0.5)))


# -- Calm-Whisper ---------------------------------------------------------------------------------------


def first_logits(model, features):
    with torch.no_grad():
        return model.decoder(torch.tensor([[50257, 100, 200]]), features)


def test_a_masked_head_gives_zeros_and_the_others_what_they_gave(headed):
    attention = headed.decoder.blocks[1].attn
    seen: list[torch.Tensor] = []
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    hook = attention.out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    plain = attention(x)[0]
    hook.remove()
    joined = seen[0].clone()
    joined[..., 16:32] = 0  # head 1 of 4, each 16 wide
    with masked(headed, ((1, 1),)):
        assert torch.equal(attention(x)[0], attention.out.forward(joined))
    with masked(headed, tuple((1, head) for head in range(4))):
        assert torch.allclose(attention(x)[0], attention.out.bias.expand(1, 5, 64))
    assert torch.equal(attention(x)[0], plain)


def test_units_are_single_heads_or_one_number_in_all_layers(headed):
    singles, numbers = single_heads(headed), head_numbers(headed)
    assert len(singles) == 8 and singles["layer 1 head 2"] == ((1, 2),)
    assert len(numbers) == 4 and numbers["head 3"] == ((0, 3), (1, 3))


def result(text: str, no_speech: float, logprob: float) -> DecodingResult:
    return DecodingResult(
        audio_features=torch.zeros(1), language="en", text=text, avg_logprob=logprob, no_speech_prob=no_speech
    )


def test_hallucination_of_windows_by_hand():
    windows = [
        result("thanks for watching", 0.9, -0.2),  # confident: the skip rule keeps it
        result("you", 0.9, -1.5),  # skipped: no words
        result("...", 0.5, -1.5),  # kept, but no words
        result("bye", 0.1, -2.0),
    ]
    found = calm_whisper.hallucination(windows)
    assert (found.text, found.hr, found.words) == (0.5, 0.75, 1.0)
    assert found.speech_prob == pytest.approx((0.1 + 0.1 + 0.5 + 0.9) / 4)


def test_heads_are_ranked_by_what_is_left_without_them():
    left = {
        "a": Hallucination(1.0, 1.0, 9.0, 0.5),
        "b": Hallucination(0.5, 1.0, 9.0, 0.5),
        "c": Hallucination(1.0, 1.0, 2.0, 0.9),
        "d": Hallucination(1.0, 1.0, 9.0, 0.5),
    }
    assert ranked(left) == ["b", "c", "a", "d"]


def test_a_scan_goes_on_where_it_was_stopped(headed, tmp_path, monkeypatch):
    from calibration import decoding

    setup = setup_for(headed, tmp_path, clips(0, 3, seconds=0.5))
    asked = []

    def silent_without(model, features):
        """Words come out unless head (1, 2) is masked: then its part of the output projection is missing."""
        parts = [torch.zeros(1, 1, 64) for _ in range(2)]
        for layer, part in enumerate(parts):
            part[..., 32:48] = 1
            parts[layer] = (
                headed.decoder.blocks[layer].attn.out(part) - headed.decoder.blocks[layer].attn.out.bias
            )
        asked.append(1)
        if len(asked) == 9:
            raise KeyboardInterrupt
        quiet = bool((parts[1].abs() < 1e-6).all())
        return [result("" if quiet else "thank you", 0.2, -0.3) for _ in features]

    monkeypatch.setattr(decoding, "greedy_decode", silent_without)
    method = calm_whisper.HeadMask()
    assert method.worst(setup, 1) == ((1, 2),) and len(asked) == 8
    with pytest.raises(KeyboardInterrupt):
        calm_whisper.HeadMask(by_number=True).prepare(setup)
    by_number = calm_whisper.HeadMask(by_number=True)
    assert by_number.worst(setup, 1) == ((0, 2), (1, 2)) and len(asked) == 8 + 1 + 4
    assert by_number.worst(setup, 9) == tuple((layer, head) for head in (2, 0, 1, 3) for layer in (0, 1))
    fresh = setup_for(headed, tmp_path, clips(0, 3, seconds=0.5))
    assert calm_whisper.HeadMask().worst(fresh, 1) == ((1, 2),) and len(asked) == 13


# -- hallucination space --------------------------------------------------------------------------------


def test_the_space_holds_the_largest_differences():
    faithful = np.ones((4, 3))
    differences = np.array([[0.0, 5.0, 0.0], [0.0, -5.0, 0.0], [2.0, 0.0, 0.0], [2.0, 0.0, 0.0]])
    basis = space(faithful + differences, faithful, 2)
    assert np.allclose(np.abs(basis), [[0, 1, 0], [1, 0, 0]])
    assert space(faithful + differences, faithful[:2], 1).shape == (1, 3)  # the first two pairs
    # (3, 4, 9) - (1, 1, 1) = (2, 3, 8): 4 + 9 lie in the space
    assert reach(np.array([[3.0, 4.0, 9.0]]), np.ones(3), basis) == pytest.approx([13.0])


def test_projection_removes_the_space_behind_the_block(headed):
    basis = torch.linalg.qr(torch.randn(64, 3, generator=torch.Generator().manual_seed(1)))[0].T
    features = torch.randn(1, 1500, 64, generator=torch.Generator().manual_seed(2))
    outputs = []
    plain = first_logits(headed, features)
    with projected(headed, {1: basis}):
        hook = headed.decoder.ln.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
        inside = first_logits(headed, features)
        hook.remove()
    assert float((outputs[0] @ basis.T).abs().max()) < 1e-3 < float(outputs[0].abs().max())
    assert not torch.equal(inside, plain)
    assert torch.equal(first_logits(headed, features), plain)


def test_the_gate_leaves_its_share_of_unseen_speech_alone():
    rng = np.random.default_rng(0)
    speech = rng.normal(size=(200, 6))
    hallucinated = speech + np.array([12.0, 0, 0, 0, 0, 0])
    seen = np.arange(200) % 2 == 0
    gate = fit_gate(States(speech[:, None], hallucinated, seen), States(speech[:, None], speech, seen), 0.1)
    assert abs(gate.basis[0, 0]) > 0.99 and len(gate.basis) == 1  # every rank rejects all: the smallest
    assert (reach(speech[1::2], gate.centre, gate.basis) > gate.limit).sum() == 10  # 10 % of 100
    assert (reach(hallucinated, gate.centre, gate.basis) > gate.limit).all()


def test_the_limit_is_set_on_speakers_that_the_space_has_not_seen(terse, tmp_path, monkeypatch):
    sets = clips(8, 8, seconds=0.5)
    for group in sets.values():  # four speakers or sources of two clips each
        group[:] = [replace(clip, group=f"{clip.kind} {number // 2}") for number, clip in enumerate(group)]
    monkeypatch.setattr(
        hallucination_space, "_read",
        lambda setup, audios: (np.zeros((16, 2, 4)), np.zeros((16, 4)), np.ones(16, dtype=bool)),
    )  # fmt: skip
    for states in hallucination_space.collect(setup_for(terse, tmp_path, sets)):
        assert [bool(pair[0]) for pair in states.seen.reshape(4, 2)].count(True) == 2
        assert (states.seen.reshape(4, 2)[:, 0] == states.seen.reshape(4, 2)[:, 1]).all()


def test_nothing_is_fitted_on_voices_of_the_test_split(terse, tmp_path):
    sets = clips(4, 4, seconds=0.5)
    sets["speech_new_voice"] = [replace(clip, id=f"new/{clip.id}") for clip in sets["speech"]]
    setup = setup_for(terse, tmp_path, sets, nsp=lambda clip: True)  # no contrast without speech
    nonspeech, speech = pooling.nonspeech_and_speech(setup)
    assert speech == sets["speech"] and nonspeech == sets["tones"]
    used, _ = pooling._contrast(setup, ("nsp",))
    assert used == [*sets["tones"], *sets["speech"]]


def test_rejected_windows_have_no_words_and_the_others_stay(terse):
    mels = torch.stack(
        [
            activations.window_mels(sound(name, 1.0, speech=speech), 80)[0]
            for name, speech in (("a", True), ("b", False), ("c", True))
        ]
    )
    options = DecodingOptions(language="en", fp16=False)
    plain = terse.decode(mels, options)
    features = torch.stack([one.audio_features for one in plain])
    first = hallucination_space.states_of(terse, features, plain)[1]
    centre = np.zeros(32)
    basis = np.eye(32)
    reaches = reach(first, centre, basis)
    furthest = int(reaches.argmax())
    limit = float(np.sort(reaches)[-2:].mean())
    with rejecting(terse, Gate(centre, basis, limit)):
        judged = terse.decode(mels, options)
        alone = terse.decode(mels[furthest], options)
        sampled = terse.decode(mels[furthest], replace(options, temperature=0.7, best_of=3))
    for number, (before, after) in enumerate(zip(plain, judged, strict=True)):
        if number == furthest:
            assert (after.text, after.no_speech_prob, after.avg_logprob) == ("", 1.0, -100.0)
        else:
            assert after is not before and after.tokens == before.tokens
            assert (after.no_speech_prob, after.avg_logprob) == (before.no_speech_prob, before.avg_logprob)
    assert alone.text == "" and sampled.text == ""
    audio = sound("b", 1.0, speech=False)
    with rejecting(terse, Gate(centre, basis, -1.0)):
        assert whisper.transcribe(terse, audio, fp16=False)["segments"] == []
    assert "decode" not in terse.__dict__


# -- all of them ----------------------------------------------------------------------------------------


def test_names_strengths_and_descriptions():
    names = [method.name for method in METHODS]
    assert names == [
        "audiosae-svector",
        "audiosae-sae-k1",
        "audiosae-sae-k5",
        "audiosae-sae-k10",
        "audiosae-sae-k100",
        "followup-activation",
        "followup-latents-k25",
        "calm-whisper",
        "calm-whisper-index",
        "hallucination-space",
        "hallucination-space-gated",
    ]
    for method in METHODS:
        assert list(method.strengths) == sorted(set(method.strengths)) and min(method.strengths) > 0
        assert method.quick_strengths and set(method.quick_strengths) <= set(method.strengths)
        assert "strength" in method.about and "\n" not in method.about


def test_the_model_is_plain_between_results_and_after_an_early_stop(terse, monkeypatch, tmp_path):
    monkeypatch.setattr(intervention, "GROUP", 2)
    setup = setup_for(terse, tmp_path, {})
    chosen = clips(3, 0, seconds=0.5)["speech"]
    before = footprint(terse)
    heads = ((0, 0),)
    heard = intervention.hear_under(setup, chosen, lambda: masked(terse, heads))
    first = next(heard)
    assert footprint(terse) == before
    rest = list(heard)
    assert len(rest) == 2 and footprint(terse) == before
    with masked(terse, heads):
        direct = whisper.transcribe(terse, chosen[0].load(), fp16=False)["text"]
    assert first.text == direct and first.seconds > 0
    assert first.segments and "".join(text for _, _, text in first.segments) == direct

    def breaks():
        raise RuntimeError("stopped")

    failing = intervention.hear_under(setup, [replace(chosen[0], id="x")], breaks)
    with pytest.raises(RuntimeError, match="stopped"):
        next(failing)
    assert footprint(terse) == before


def check_every_method(setup, sets, monkeypatch):
    """Two clips each; afterwards the model decodes bit for bit as before."""
    monkeypatch.setattr(calm_whisper, "QUICK_SCAN_CLIPS", 2)
    monkeypatch.setattr(hallucination_space, "QUICK_FIT_CLIPS", 8)
    model = setup.model
    measured = [sets["speech"][0], sets["tones"][0]]
    mels = torch.stack([activations.window_mels(clip.load(), 80)[0] for clip in measured])
    options = DecodingOptions(language="en", fp16=False)

    def decoded():
        return [(r.tokens, r.avg_logprob, r.no_speech_prob) for r in model.decode(mels, options)]

    plain, before = decoded(), footprint(model)
    for method in METHODS:
        method.prepare(setup)
        heard = list(method.hear(setup, method.quick_strengths[-1], measured))
        assert len(heard) == 2 and all(one.seconds > 0 for one in heard), method.name
        assert footprint(model) == before, method.name
    assert decoded() == plain


def test_every_method_on_a_tiny_model(terse, tmp_path, monkeypatch):
    sets = clips(8, 16, seconds=0.5)
    saes = [random_sae(layer, d=32, n=120, layer=layer) for layer in (0, 1)]
    check_every_method(setup_for(terse, tmp_path, sets, saes=saes, nsp=half_of), sets, monkeypatch)


@pytest.mark.slow
def test_every_method_on_the_bundled_model(tmp_path, monkeypatch):
    sets = clips(8, 16, seconds=0.5)
    setup = setup_for(load_model("mini.en", device="cpu"), tmp_path, sets, nsp=half_of)
    setup.name = "mini.en"
    check_every_method(setup, sets, monkeypatch)

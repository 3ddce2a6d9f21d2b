from dataclasses import replace

import pytest
import torch
from calibration_tools import clips, make_terse_whisper

from calibration.activations import window_mels
from calibration.evaluate import word_errors
from calibration.screening import SIZE_RANGE, Screen
from whisper_steer.attach import steer
from whisper_steer.fileformat import model_metadata
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.steering import Gate, LatentEdit, MeanAblation, Probe, Shift, Steering


@pytest.fixture(scope="module")
def model():
    return make_terse_whisper(1)


@pytest.fixture(scope="module")
def mels():
    sets = clips(2, 2)
    return {
        name: torch.cat([window_mels(clip.load(), 80) for clip in chosen]) for name, chosen in sets.items()
    }


def raw_gate(bias):
    direction = torch.zeros(32)
    direction[0] = 1.0
    probe = Probe(0, "raw", direction, mean=torch.zeros(32), std=torch.ones(32))
    return Gate((probe,), 0.0, 9, threshold=100.0, spread=1.0, frame_scale=2.0, frame_bias=bias)


def shift(layer, strength=1.0):
    generator = torch.Generator().manual_seed(3)
    return Shift(layer, torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0), strength)


def latent_edit(layer=1):
    sae = SparseAutoencoder(32, 64, k=4, layer=layer)
    return LatentEdit.from_sae(sae, torch.arange(5), torch.linspace(-1, 1, 5), floor=True)


def test_a_withheld_window_is_edited_to_its_end(model, mels):
    edit, gate = shift(1, 2.0), raw_gate(0.0)
    gate = replace(gate, threshold=-1e6, spread=0.0)
    screen = Screen(model, mels["speech"], mels["tones"], gate)
    with steer(model, steering=Steering((edit,), gate, model_metadata(model))):
        steered = model.encoder(mels["tones"])
    assert screen.nonspeech.padding.any()
    torch.testing.assert_close(screen.nonspeech.edited((edit,)), steered, rtol=1e-4, atol=1e-4)
    screen.use_gate(replace(gate, threshold=1e6))
    assert not torch.allclose(screen.nonspeech.edited((edit,)), steered, atol=1e-2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "edit", [shift(0, 2.0), shift(1, 2.0), latent_edit()], ids=["shift0", "shift1", "latents"]
)
def test_screened_activations_are_those_of_a_steered_model(model, mels, edit, gated):
    gate = raw_gate(0.0) if gated else None
    screen = Screen(model, mels["speech"], mels["tones"], gate)
    with steer(model, steering=Steering((edit,), gate, model_metadata(model))):
        steered = model.encoder(mels["tones"])
    torch.testing.assert_close(screen.nonspeech.edited((edit,)), steered, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steered, screen.nonspeech.edited(()), atol=1e-3)


def test_no_edit_costs_nothing_and_a_strong_one_much(model, mels):
    screen = Screen(model, mels["speech"], mels["tones"], None)
    assert screen.cost([shift(1, 0.0)]) == pytest.approx(0.0, abs=1e-5)
    assert screen.cost([shift(1, 1000.0)]) > 1.0


def test_loss_is_the_likelihood_of_the_plain_tokens(model, mels):
    screen = Screen(model, mels["speech"][:1], mels["tones"], None)
    result = model.decode(mels["speech"][0], language="en", fp16=False)
    tokens = torch.tensor([[50257, *result.tokens, 50256]])
    logits = model.decoder(tokens, model.encoder(mels["speech"][:1]))
    logprobs = logits.log_softmax(-1)[0, :-1]
    expected = -logprobs[torch.arange(tokens.shape[1] - 1), tokens[0, 1:]].mean()
    assert screen._plain_loss == pytest.approx(float(expected), rel=1e-4)


def test_the_strongest_size_is_just_affordable(model, mels):
    screen = Screen(model, mels["speech"], mels["tones"], None)
    size, cost = screen.strongest([shift(1)], max_cost=0.05)
    assert SIZE_RANGE[0] <= size < SIZE_RANGE[1] and cost <= 0.05
    dearer = replace(shift(1), strength=1.5 * size * screen.unit(shift(1)))
    assert screen.cost([dearer]) > 0.05
    none, cost = screen.strongest([shift(1)], max_cost=-1.0)
    assert none == 0.0 and cost > -1.0
    everything, _ = screen.strongest([shift(1)], max_cost=1e9)
    assert everything == SIZE_RANGE[1]


def test_a_unit_is_the_length_of_the_activations(model, mels):
    screen = Screen(model, mels["speech"], mels["tones"], None)
    edit = replace(shift(1), strength=screen.unit(shift(1)))
    x = screen.nonspeech.layers[1]
    assert float(edit.delta(x, 1.0).norm()) == pytest.approx(float(x.norm(dim=-1).mean()), rel=1e-4)
    latents = latent_edit()
    unit = screen.unit(latents)
    assert unit * float((latents.values @ latents.W_dec).norm()) == pytest.approx(
        float(x.norm(dim=-1).mean()), rel=1e-4
    )


def test_screening_gives_the_best_fraction(model, mels):
    screen = Screen(model, mels["speech"], mels["tones"], None)
    candidate = screen.screen("s", [shift(1)], max_cost=0.05)
    strongest, _ = screen.strongest([shift(1)], max_cost=0.05)
    assert candidate.name == "s" and candidate.size in [
        pytest.approx(strongest * f) for f in (1.0, 0.25, 0.06)
    ]
    assert candidate.edits[0].strength == pytest.approx(candidate.size * screen.unit(shift(1)))
    effect = candidate.effect
    assert effect == screen.effect(candidate.edits)
    assert 0 <= effect.text <= effect.hr <= 1 and effect.nsp == 1.0


def test_a_reconstruction_is_judged_beyond_its_own_cost(model, mels):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = SparseAutoencoder(32, 64, k=4, layer=1)
    values = torch.zeros(64)
    values[:3] = 1.0
    edit = LatentEdit.from_sae(sae, None, values, reconstruct=True)
    screen = Screen(model, mels["speech"], mels["tones"], None)
    base = screen.cost([replace(edit, strength=0.0)])
    assert base > 0.05  # random weights reconstruct badly
    size, cost = screen.strongest([edit], max_cost=0.05)
    assert size >= SIZE_RANGE[0] and 0.05 < cost <= base + 0.05


@pytest.mark.parametrize("gated", [False, True])
def test_edits_at_several_layers_are_those_of_a_steered_model(model, mels, gated):
    """Also where an edit comes before the gate's layer: the gate has read the plain stream."""
    silence = MeanAblation(0, torch.linspace(-1, 1, 32)[None], 1.0, tolerance=0.1)
    edits = (silence, shift(1, 2.0))
    direction = torch.zeros(32)
    direction[0] = 1.0
    probe = Probe(1, "raw", direction, mean=torch.zeros(32), std=torch.ones(32))
    gate = Gate((probe,), 0.0, 9, threshold=100.0, spread=1.0, frame_scale=2.0, frame_bias=0.0)
    steering = Steering(edits, gate if gated else None, model_metadata(model))
    screen = Screen(model, mels["speech"], mels["tones"], steering.gate)
    with steer(model, steering=steering):
        steered = model.encoder(mels["tones"])
    torch.testing.assert_close(screen.nonspeech.edited(edits), steered, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(steered, screen.nonspeech.edited(edits[1:]), atol=1e-3)


def test_silence_has_no_size_and_several_edits_have_one_together(model, mels):
    said = ["hello world", "hello world"]
    screen = Screen(model, mels["speech"], mels["tones"], None, (mels["speech"], said))
    silence = MeanAblation(0, torch.zeros(1, 32))
    candidate = screen.screen("silence", [silence])
    assert candidate.edits == (silence,) and candidate.size == 1.0
    latents = latent_edit()
    sized = screen.sized((silence, shift(1), latents), 0.5)
    assert sized[0] is silence
    assert [edit.strength for edit in sized[1:]] == [
        pytest.approx(0.5 * screen.unit(edit)) for edit in (shift(1), latents)
    ]
    texts = [result.text for result in screen._heard(screen.joined, ())]
    errors = [word_errors(words, text).total for words, text in zip(said, texts, strict=True)]
    assert screen.effect(()).gap_wer == pytest.approx(sum(errors) / 4)

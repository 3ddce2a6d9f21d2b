from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from calibration_tools import clips, make_terse_whisper
from whisper.tokenizer import get_tokenizer

from calibration import causal
from calibration.activations import padded_log_mel, true_frames, window_mels
from calibration.causal import (
    CausalEffects,
    both_edit,
    candidates,
    causal_edit,
    causal_effects,
    content_frames,
    scores,
)
from whisper_steer.errors import UsageError
from whisper_steer.sae import SparseAutoencoder

EOT, SOT, NOSPEECH = 50256, 50257, 50361
SECONDS = 2.0
NEVER = 7  # a latent whose threshold nothing reaches


@pytest.fixture(scope="module")
def model():
    return make_terse_whisper(1)


@pytest.fixture(scope="module")
def mels():
    sets = clips(3, 3, seconds=SECONDS)
    return {name: torch.cat([window_mels(clip.load(), 80) for clip in s]) for name, s in sets.items()}


def make_sae(layer, activation="batchtopk"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layer)
        sae = SparseAutoencoder(32, 24, activation=activation, k=4, layer=layer)
        sae.theta.fill_(0.3)
        sae.theta[NEVER] = 1e9
        sae.b_dec.data.normal_()
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def effects(model, mels):
    return causal_effects(
        model, make_sae(0), [3, NEVER, 12], mels["speech"], mels["tones"], batch=2, progress=False
    )


def straightforward(model, sae, latent, mel):
    """(log odds of <|nospeech|>, mean log-probability of the words written) with the latent ablated on the
    frames of the audio, in one whole forward pass of one window; None: nothing ablated."""
    tokens = model.decode(mel, language="en", fp16=False).tokens
    audio = torch.arange(1500) < true_frames(int(SECONDS * 16_000))

    def ablate(module, inputs, x):
        code = sae.encode(x)[..., latent] * audio
        return x - code.unsqueeze(-1) * sae.W_dec[latent]

    handle = None if latent is None else model.encoder.blocks[sae.layer].register_forward_hook(ablate)
    try:
        features = model.encoder(mel[None])
    finally:
        if handle is not None:
            handle.remove()
    given = [SOT, *tokens, EOT]
    logits = model.decoder(torch.tensor([given]), features)[0]
    p = float(logits[0].double().softmax(-1)[NOSPEECH])
    logprobs = logits.log_softmax(-1)
    words = [float(logprobs[i - 1, t]) for i, t in enumerate(given) if i > 0 and t <= EOT]
    return np.log(p) - np.log1p(-p), np.mean(words)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
def test_effects_are_those_of_a_hook_in_whole_forward_passes(model, mels, layer, activation):
    sae = make_sae(layer, activation)
    latents = [12, 3]
    found = causal_effects(model, sae, latents, mels["speech"], mels["tones"], batch=2, progress=False)
    for number, latent in enumerate(latents):
        change = {
            name: np.array(
                [
                    np.subtract(straightforward(model, sae, latent, w), straightforward(model, sae, None, w))
                    for w in windows
                ]
            )
            for name, windows in mels.items()
        }
        expected = [change["tones"][:, 0], change["tones"][:, 1], change["speech"][:, 1]]
        given = [found.nonspeech_nospeech, found.nonspeech_text, found.speech_text]
        for which, (mean, values) in enumerate(zip(given, expected, strict=True)):
            assert mean[number] == pytest.approx(values.mean(), abs=1e-5)
            assert found.errors[which, number] == pytest.approx(values.std(ddof=1) / np.sqrt(3), abs=1e-5)
        assert max(abs(mean[number]) for mean in given) > 1e-3
    assert found.layer == layer and found.latents.tolist() == latents


def test_a_latent_that_never_fires_changes_nothing_at_all(effects):
    means = np.stack([effects.nonspeech_nospeech, effects.nonspeech_text, effects.speech_text])
    assert (means[:, 1] == 0.0).all() and (effects.errors[:, 1] == 0.0).all()
    assert (means[:, [0, 2]] != 0.0).all() and effects.benefit()[1] == 0.0


def test_effects_do_not_depend_on_what_runs_together(model, mels, effects):
    alone = causal_effects(
        model, make_sae(0), [12], mels["speech"], mels["tones"].flip(0), batch=1, progress=False
    )
    for name in ("nonspeech_nospeech", "nonspeech_text", "speech_text"):
        assert getattr(alone, name)[0] == pytest.approx(getattr(effects, name)[2], abs=1e-5)


def test_windows_without_words_count_for_nospeech_alone(model, mels, monkeypatch):
    """The second of three windows says nothing."""
    plain = causal.greedy_decode
    silent = mels["tones"][1]

    def decode(_model, features, language):
        results = plain(_model, features, language)
        quiet = model.encoder(silent[None])[0]
        return [
            SimpleNamespace(tokens=[50363], text="...") if torch.allclose(f, quiet, atol=1e-4) else r
            for f, r in zip(features, results, strict=True)
        ]

    monkeypatch.setattr(causal, "greedy_decode", decode)
    sae = make_sae(0)
    found = causal_effects(model, sae, [3], mels["speech"], mels["tones"], progress=False)
    change = np.array(
        [
            np.subtract(straightforward(model, sae, 3, w), straightforward(model, sae, None, w))
            for w in mels["tones"]
        ]
    )
    assert found.nonspeech_nospeech[0] == pytest.approx(change[:, 0].mean(), abs=1e-5)
    assert found.nonspeech_text[0] == pytest.approx(change[[0, 2], 1].mean(), abs=1e-5)
    only = causal_effects(model, sae, [3], mels["speech"], silent[None], progress=False)
    assert only.nonspeech_text.tolist() == [0.0] and only.nonspeech_nospeech[0] != 0.0
    assert only.errors[:2].tolist() == [[0.0], [0.0]]


def test_scores_leave_timestamps_and_padding_out(model, mels):
    tokenizer = get_tokenizer(False)
    features = model.encoder(mels["tones"][:1]).expand(3, -1, -1)
    # the same words after a timestamp; padded; and a window with nothing written
    tokens = torch.tensor([[SOT, 50363, 11, 12, EOT], [SOT, 50363, 11, 12, -1], [SOT, -1, -1, -1, -1]])
    odds, text = scores(model, features, tokens, tokenizer, 1)
    logprobs = model.decoder(tokens[:1], features[:1])[0].log_softmax(-1)
    words = [float(logprobs[1, 11]), float(logprobs[2, 12])]
    assert float(text[1]) == pytest.approx(np.mean(words), abs=1e-5)
    assert float(text[0]) == pytest.approx(np.mean([*words, float(logprobs[3, EOT])]), abs=1e-5)
    assert torch.isnan(text[2]) and odds.tolist() == pytest.approx([float(odds[0])] * 3, abs=1e-5)
    p = logprobs[0].double().exp()[NOSPEECH]
    assert float(odds[0]) == pytest.approx(float(torch.log(p / (1 - p))), abs=1e-4)


@pytest.mark.parametrize("samples", [160, 3200, 32_000, 33_333, 480_000])
def test_frames_of_a_window_by_its_padding(samples):
    audio = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    mel = window_mels(audio, 80)
    assert content_frames(mel).tolist() == [-(-padded_log_mel(audio, 80)[1] // 2)]
    assert abs(int(content_frames(mel)[0]) - true_frames(samples)) <= 1


def effects_of(nospeech, text, speech, errors=None, layer=0):
    m = len(nospeech)
    arrays = [np.array(values, dtype=float) for values in (nospeech, text, speech)]
    return CausalEffects(layer, np.arange(m), *arrays, errors=errors)


def test_benefit_by_hand():
    errors = np.array([[1.0, 1.0, 3.0], [2.0, 2.0, 2.0], [0.5, 0.5, 0.5]])
    effects = effects_of([2.0, -2.0, 4.0], [-4.0, 4.0, 0.0], [-1.0, -3.0, -2.0], errors)
    # over own plus median error: nospeech 1, -1, 1; text -1, 1, 0; speech -1, -3, -2
    # gains 2, -2, 1; ablating the first costs speech 1, strengthening the second costs nothing, ablating
    # the third costs more than it gains
    np.testing.assert_allclose(effects.benefit(), [1.0, -2.0, 0.0])


def test_benefit_without_errors_is_in_units_of_the_effects():
    effects = effects_of([3.0, -3.0], [0.0, 0.0], [5.0, 5.0])
    np.testing.assert_allclose(effects.benefit(), [1.0, 0.0])
    scaled = effects_of([30.0, -30.0], [0.0, 0.0], [0.5, 0.5])
    np.testing.assert_allclose(scaled.benefit(), effects.benefit())


def test_candidates_take_turns():
    beta = np.array([0.0, -5.0, 4.0, 0.1, 0.0, 0.0])
    activity = np.array([9.0, 8.0, 0.0, 0.0, 7.0, 0.0])
    assert candidates(beta, activity, 3).tolist() == [0, 1, 2]
    assert candidates(beta, activity, 4).tolist() == [0, 1, 2, 3]
    assert candidates(beta, activity).tolist() == [0, 1, 2, 3, 4]  # the last one is neither
    with pytest.raises(UsageError, match="count is 0.*at least 1"):
        candidates(beta, activity, 0)


@pytest.fixture
def five():
    """Benefits 4, -2, 1, 0, 8 of latents 0 to 4, the last of which is never active."""
    errors = np.full((3, 5), 0.5)
    return effects_of([4.0, -2.0, 1.0, 0.0, 8.0], [0.0] * 5, [0.0] * 5, errors)


MEANS = np.array([1.0, 3.0, 2.0, 5.0, 0.0, 1.0])


def test_an_edit_pushes_each_latent_by_its_benefit(five):
    edit = causal_edit(make_sae(0), five, MEANS, 2)
    assert edit.indices.tolist() == [0, 1]
    assert edit.values.tolist() == pytest.approx([-1.0, 0.5 * 3.0])
    assert (edit.mode, edit.floor, edit.strength, edit.layer) == ("add", True, 1.0, 0)
    # more than help are not taken
    more = causal_edit(make_sae(0), five, MEANS, 50)
    assert more.indices.tolist() == [0, 1, 2]
    assert more.values.tolist() == pytest.approx([-1.0, 1.5, -0.5])


def test_an_edit_both_agree_on(five):
    sae = make_sae(0)
    beta = np.array([0.1, -9.0, 5.0, 7.0, 8.0, 9.0])
    # ranks by |beta| of latents 0, 1, 2: 3, 1, 2; by benefit 1, 2, 3: products 3, 2, 6
    edit = both_edit(sae, beta, five, MEANS, 2)
    assert edit.indices.tolist() == [0, 1]
    one = both_edit(sae, beta, five, MEANS, 1)
    assert one.indices.tolist() == [1] and one.values.tolist() == pytest.approx([3.0])
    against = both_edit(sae, beta * [1, 1, -1, 1, 1, 1], five, MEANS, 9)
    assert against.indices.tolist() == [0, 1]
    assert both_edit(sae, -beta, five, MEANS, 2) is None


def test_errors(model, mels, five):
    sae = make_sae(0)
    run = (mels["speech"], mels["tones"])
    with pytest.raises(UsageError, match="there is no latent 24: expected 0 to 23"):
        causal_effects(model, sae, [24], *run, progress=False)
    with pytest.raises(UsageError, match="3 latents, 2 of them different"):
        causal_effects(model, sae, [1, 2, 1], *run, progress=False)
    with pytest.raises(UsageError, match=r"windows of non-speech have shape \(0, 80, 3000\)"):
        causal_effects(model, sae, [1], mels["speech"], mels["tones"][:0], progress=False)
    with pytest.raises(UsageError, match="k is 0: expected at least 1"):
        causal_edit(sae, five, MEANS, 0)
    with pytest.raises(UsageError, match="effects are of layer 0, the SAE of layer 1"):
        both_edit(make_sae(1), MEANS, five, MEANS, 1)
    nothing = effects_of([0.0, 0.0], [0.0, 0.0], [1.0, 1.0])
    with pytest.raises(UsageError, match="any of 2 latents of layer 0 helps no more than it costs"):
        causal_edit(sae, nothing, MEANS, 1)


def test_the_strongest_latent_is_weakened_where_ablating_it_helps(model, mels, effects):
    """Measured effects, speech aside: the edit goes the way of the odds minus that of the text."""
    aside = replace(effects, speech_text=np.zeros(3))
    edit = causal_edit(make_sae(0), aside, np.full(24, 0.5), 1)
    place = effects.latents.tolist().index(int(edit.indices[0]))
    median = np.median(effects.errors[:, [0, 2]], axis=1)
    gains = effects.nonspeech_nospeech / (effects.errors[0] + median[0])
    gains = gains - effects.nonspeech_text / (effects.errors[1] + median[1])
    assert place == np.abs(gains).argmax()
    assert edit.values.tolist() == pytest.approx([-0.5 * np.sign(gains[place])])

import numpy as np
import pytest
import torch

from calibration.decoding import ClipTranscript
from calibration.edit_fit import (
    additive_edit,
    audiosae_edit,
    choose_contrast,
    mean_difference,
    pool_frames,
    regress,
    stack_pooled,
    top_latents,
)
from calibration.hallucinations import Labels
from whisper_steer.errors import UsageError
from whisper_steer.sae import SparseAutoencoder


def labels(text, hr, nsp):
    return [
        Labels(0.5, -0.5, "x", bool(n), bool(h), bool(t), ClipTranscript("x", (), ((0.5, -0.5),), 1.0))
        for t, h, n in zip(text, hr, nsp, strict=True)
    ]


def some(total, positive):
    return [i < positive for i in range(total)]


def test_the_first_definition_with_two_classes_is_taken():
    found = labels(some(100, 100), some(100, 94), some(100, 30))
    contrast = choose_contrast(found, np.ones(100, dtype=bool))
    assert contrast.name == "nsp" and contrast.positive.sum() == 30  # 6 of 100 are too few for hr
    assert "by text only 0 of 100" in contrast.reason and "by hr only 6 of 100" in contrast.reason
    assert choose_contrast(found, np.ones(100, dtype=bool), ("nsp", "text")).reason.startswith("30 of 100")


def test_speech_clips_are_not_part_of_a_contrast_by_label():
    found = labels(some(60, 40), some(60, 60), some(60, 60))
    nonspeech = np.array([False] * 20 + [True] * 40)
    contrast = choose_contrast(found, nonspeech)
    assert contrast.name == "text" and contrast.used.sum() == 40 and contrast.positive.sum() == 20


def test_when_everything_hallucinates_speech_is_the_contrast():
    found = labels(some(40, 40), some(40, 40), some(40, 40))
    nonspeech = np.array([True] * 25 + [False] * 15)
    contrast = choose_contrast(found, nonspeech)
    assert contrast.name == "speech" and contrast.used.all()
    assert np.array_equal(contrast.positive, ~nonspeech)
    assert "speech clips against non-speech clips instead" in contrast.reason
    with pytest.raises(UsageError, match="cannot be fitted without speech and non-speech"):
        choose_contrast(found, np.ones(40, dtype=bool))


def small_sae():
    sae = SparseAutoencoder(4, 6, k=2, layer=3)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(4), torch.zeros(2, 4)]))
        sae.theta.fill_(0.5)
    return sae


def test_pooling_averages_over_active_frames():
    frames = torch.tensor([[1.0, 0.2, 0.0, 0.0], [3.0, 0.0, 2.0, 0.0]])
    latents, mean, total, count = pool_frames(small_sae(), frames)
    assert latents.tolist() == [2.0, 0.0, 2.0, 0.0, 0.0, 0.0]  # 0.2 is below theta
    assert mean.tolist() == pytest.approx([2.0, 0.1, 1.0, 0.0])
    pooled = stack_pooled([(latents, mean, total, count), pool_frames(small_sae(), frames[:1])])
    assert pooled.latents.shape == (2, 6)
    assert pooled.mean_activation.tolist() == pytest.approx([5 / 3, 0, 2, 0, 0, 0])


def test_regression_finds_the_latents_behind_the_labels():
    rng = np.random.default_rng(0)
    positive = rng.random(200) < 0.4
    latents = rng.random((200, 6)) * np.array(
        [1, 1, 1, 100, 1, 0]
    )  # scale must not matter, a dead one neither
    latents[:, 1] += positive
    latents[:, 4] += ~positive
    found = regress(latents, positive)
    assert top_latents(found.beta, 2).tolist() == [1, 4]
    assert found.beta[1] > 0 > found.beta[4] and found.beta[5] == 0
    assert found.balanced_accuracy > 0.85 and found.f1 > 0.85 and found.folds == 5
    few = regress(latents[:12], np.arange(12) == 3)
    assert few.folds == 1 and np.isnan(few.f1)  # one positive clip: nothing to validate on


def test_audiosaes_form():
    beta = np.array([0.1, -3.0, 0.2, 2.0, 0.0, 0.0])
    sae = small_sae()
    edit = audiosae_edit(sae, beta, 2)
    assert edit.reconstruct and edit.layer == 3 and edit.values.tolist() == [0, 1, 0, -1, 0, 0]
    x = torch.randn(5, 4)
    steered = sae.decode(sae.encode(x) + 0.7 * torch.tensor([0.0, 1, 0, -1, 0, 0]))
    torch.testing.assert_close(edit(x, 0.7), steered)


def test_additive_form_is_scaled_by_mean_activation_and_floored():
    beta = np.array([0.1, -3.0, 0.2, 2.0, 9.0, 0.0])
    mean = np.array([1.0, 4.0, 1.0, 0.5, 0.0, 1.0])  # latent 4 never fired: nothing to scale by
    edit = additive_edit(small_sae(), beta, mean, 2)
    assert edit.indices.tolist() == [1, 3] and edit.values.tolist() == [4.0, -0.5]
    assert edit.floor and not edit.reconstruct and edit.mode == "add"


def test_mean_difference_points_away_from_hallucination():
    mean = np.array([[2.0, 0.0], [4.0, 0.0], [0.0, 4.0]], dtype=np.float32)
    positive = np.array([True, True, False])
    plain = mean_difference(1, mean, positive, normalised=False)
    assert plain.direction.tolist() == [-3.0, 4.0] and plain.layer == 1
    assert mean_difference(1, mean, positive, normalised=True).direction.tolist() == pytest.approx(
        [-0.6, 0.8]
    )

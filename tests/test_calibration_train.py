import json

import pytest
import torch
from calibration_tools import clips, make_terse_whisper

from calibration.activations import encode_clip
from calibration.sae_quality import calibrate_threshold, collect_frames, domain_quality, spliced
from calibration.train import TrainConfig, export_saes, learning_factor, parse_layers, train_saes
from whisper_steer.errors import UsageError
from whisper_steer.fileformat import encoder_sha256
from whisper_steer.sae import SparseAutoencoder

CONFIG = TrainConfig(expansion=2, k=4, frames=6000, batch=256, buffer_mb=1, packed=0.5, lr=5e-3)


@pytest.fixture(scope="module")
def model():
    return make_terse_whisper(1)


@pytest.fixture(scope="module")
def sounds():
    sets = clips(3, 3)
    return [clip for group in sets.values() for clip in group]


@pytest.fixture(scope="module")
def trained(model, sounds, tmp_path_factory):
    out = tmp_path_factory.mktemp("saes")
    return out, train_saes(model, sounds, CONFIG, out, progress=False)


def test_a_killed_run_ends_with_the_same_weights(model, sounds, trained, tmp_path):
    class KilledError(Exception):
        pass

    def kill(round_index):
        if round_index == 0:
            raise KilledError

    with pytest.raises(KilledError):
        train_saes(model, sounds, CONFIG, tmp_path, progress=False, after_round=kill)
    rounds = []
    resumed = train_saes(model, sounds, CONFIG, tmp_path, progress=False, after_round=rounds.append)
    assert rounds == [1]  # 4096 frames fit into the buffer: two rounds, the first one was done
    for one, other in zip(trained[1], resumed, strict=True):
        for name, tensor in one.state("").items():
            assert torch.equal(tensor, other.state("")[name]), name


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(model, sounds, trained):
    out, trainers = trained
    again = train_saes(model, sounds, CONFIG, out, progress=False, after_round=pytest.fail)
    assert torch.equal(again[0].sae.W_enc, trainers[0].sae.W_enc)
    with pytest.raises(UsageError, match=r"other settings \(config\)"):
        train_saes(model, sounds, TrainConfig(expansion=2, k=5, frames=6000, batch=256, buffer_mb=1), out)
    with pytest.raises(UsageError, match=r"\(encoder_sha256\)"):
        train_saes(make_terse_whisper(2), sounds, CONFIG, out)


def test_export_writes_every_layer_and_the_report(model, trained, tmp_path):
    report = export_saes(model, trained[1], clips(4, 4), CONFIG, tmp_path, wer_clips=2, progress=False)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert [row["layer"] for row in report["layers"]] == [0, 1]
    for layer, row in enumerate(report["layers"]):
        sae = SparseAutoencoder.load(tmp_path / f"layer_{layer:02d}.safetensors")
        assert (sae.layer, sae.n_latents, sae.activation, sae.k) == (layer, 64, "batchtopk", 4)
        assert sae.metadata["encoder_sha256"] == encoder_sha256(model)
        assert sae.metadata["calibrated_on"] == {"speech": 4, "tones": 4}
        both = (row["speech"]["l0"] + row["nonspeech"]["l0"]) / 2
        assert both == pytest.approx(4, rel=0.5)  # set on other clips than it is measured on
        assert 0 < row["speech"]["fvu"] < 0.9
        assert max(row["speech"]["alive"], row["nonspeech"]["alive"]) <= row["alive"] <= 1
        assert row["speech"]["frames"] == 200  # two clips of 2 s, no padding
        assert row["wer_plain"]["clips"] == 2 and row["wer_spliced"]["value"] >= 0
        # measured with the rounded weights that the file holds
        x = collect_frames(model, clips(4, 4)["speech"][1::2], 1000)[layer]
        assert domain_quality(sae, x).l0 == pytest.approx(row["speech"]["l0"])


def test_threshold_hits_its_target_exactly():
    torch.manual_seed(0)
    sae = SparseAutoencoder(8, 32, k=3)
    x = torch.randn(20_000, 8)
    calibrate_threshold(sae, x, 3)
    with torch.no_grad():
        assert float((sae.encode(x) > 0).sum()) == 60_000
    calibrate_threshold(sae, x, 1000)  # more than there are positive pre-activations: all of them stay
    assert float(sae.theta[0]) == 0.0


def test_quality_of_known_saes():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 0.0]])
    sae = SparseAutoencoder(2, 3, k=1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    perfect = domain_quality(sae, x)
    assert perfect.l0 == pytest.approx(0.75) and perfect.fvu == 0.0 and perfect.alive == pytest.approx(2 / 3)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_dec.copy_(x.mean(0))
    assert domain_quality(sae, x).fvu == pytest.approx(1.0)
    assert domain_quality(sae, x[:0]).frames == 0


def test_frames_of_long_clips_are_spread_and_bounded(model):
    frames = collect_frames(model, clips(3, 0, seconds=3.0)["speech"], 250, per_clip=100)
    assert frames.shape == (2, 250, 32)
    whole = encode_clip(model, clips(1, 0, seconds=3.0)["speech"][0].load()).frames
    torch.testing.assert_close(frames[:, 0], whole[:, 0])
    torch.testing.assert_close(frames[:, 99], whole[:, 149])


def test_splicing_replaces_one_layers_output_and_is_undone(model):
    sae = SparseAutoencoder(32, 8, k=2, layer=0)
    mel = torch.randn(1, 80, 3000)
    plain = model.encoder(mel)
    with torch.no_grad(), spliced(model, sae):
        changed = model.encoder(mel)
    assert not torch.allclose(plain, changed)
    assert torch.equal(model.encoder(mel), plain)


def test_learning_rate_rises_holds_and_falls():
    factors = [learning_factor(step, 100, 0.05, 0.2) for step in range(100)]
    assert factors[0] == pytest.approx(0.2) and factors[4] == 1.0
    assert factors[50] == factors[80] == 1.0
    assert factors[90] == pytest.approx(0.5) and factors[99] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("name", "value"), [("k", 0), ("frames", 0), ("lr", 0.0), ("lr", float("nan")), ("packed", 1.5)]
)
def test_senseless_settings(name, value):
    with pytest.raises(UsageError, match=f"{name} is {value}"):
        TrainConfig(**{name: value})


def test_layers_option():
    assert parse_layers("all") is None and parse_layers("0,3") == [0, 3]
    with pytest.raises(UsageError, match="layers is 'x'"):
        parse_layers("x")

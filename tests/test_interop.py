"""Files of other libraries' true layouts, written by hand with numbers small enough to check by hand; what is
refused; hub downloads; the saes command. The libraries themselves: test_interop_peers.py."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_saes import (
    B_DEC,
    B_ENC,
    W_ENC,
    assert_codes,
    write_dictionary_learning,
    write_saelens,
    write_sparsify,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_interop_peers import inputs, random_sae
from torch import Tensor

from whisper_steer.errors import FormatError, UsageError
from whisper_steer.interop import (
    find_foreign,
    load_dictionary_learning,
    load_foreign,
    load_saelens,
    load_sparsify,
    save_saelens,
    save_sparsify,
)
from whisper_steer.interop.parts import Parts, layer_of_hook

# ---------- dictionary_learning and AudioSAE


def test_batchtopk_by_hand(tmp_path: Path) -> None:
    folder = write_dictionary_learning(tmp_path / "resid_post_layer_8" / "trainer_0", trainer={"layer": 8})
    sae = load_foreign(folder)
    assert_codes(sae, [[1.5, 1.0, 2.0], [0.0, 0.0, 0.0]])
    assert (sae.activation, sae.k, sae.layer) == ("batchtopk", 2, 8)
    assert "theta_missing" not in sae.metadata
    digest = hashlib.sha256((folder / "ae.pt").read_bytes()).hexdigest()
    assert sae.metadata["source"]["sha256"] == digest and sae.metadata["licence"] is None


def test_topk_by_hand(tmp_path: Path) -> None:
    sae = load_foreign(write_dictionary_learning(tmp_path / "a", "AutoEncoderTopK", trainer={"layer": 0}))
    assert_codes(sae, [[1.5, 0.0, 2.0], [0.5, 0.0, 0.0]])
    assert (sae.activation, sae.k) == ("topk", 2)


@pytest.mark.parametrize("threshold", [None, torch.tensor(-1.0)])
def test_missing_threshold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, threshold: Tensor | None
) -> None:
    folder = write_dictionary_learning(tmp_path / "layer_7", threshold=threshold)
    with caplog.at_level(logging.WARNING, "whisper_steer"):
        sae = load_foreign(folder)
    assert_codes(sae, [[1.5, 1.0, 2.0], [0.5, 0.0, 0.0]])
    assert sae.theta.tolist() == [0, 0, 0] and sae.metadata["theta_missing"] is True
    assert len(caplog.records) == 1 and "--audio PATH" in caplog.text


def test_audiosae_folders_count_from_1(tmp_path: Path) -> None:
    """Whatever config.json says, folder layer_1 is layer 0."""
    for number in (1, 2, 12):
        write_dictionary_learning(
            tmp_path / f"layer_{number}", trainer={"layer": number}, **{"encoder.bias": B_ENC + number}
        )
    assert [sae.layer for sae in find_foreign(tmp_path)] == [0, 1, 11]
    sae = load_foreign(tmp_path, layer=11)
    assert sae.layer == 11
    torch.testing.assert_close(sae.b_enc + sae.W_enc @ B_DEC, B_ENC + 12)
    assert load_dictionary_learning(tmp_path / "layer_2").layer == 1
    assert load_dictionary_learning(tmp_path / "layer_2" / "ae.pt").layer == 1
    assert load_foreign(tmp_path / "layer_2", layer=5).layer == 5  # said by the caller
    with pytest.raises(UsageError, match=r"no SAE for layer 2, counted from 0: it holds layers 0, 1, 11"):
        load_foreign(tmp_path, layer=2)
    with pytest.raises(UsageError, match=r"holds 3 SAEs \(layers 0, 1, 11\): pass layer="):
        load_foreign(tmp_path)


def test_folders_that_count_from_0(tmp_path: Path) -> None:
    for number in (0, 1):
        write_dictionary_learning(tmp_path / f"layer_{number}")
    assert [sae.layer for sae in find_foreign(tmp_path)] == [0, 1]


def test_one_layer_below_is_not_taken_for_another(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path / "layer_3")
    assert load_foreign(tmp_path).layer == 2
    with pytest.raises(UsageError, match="no SAE for layer 3"):
        load_foreign(tmp_path, layer=3)


def test_layer_unknown(tmp_path: Path) -> None:
    folder = write_dictionary_learning(tmp_path / "somewhere")
    with pytest.raises(UsageError, match="which encoder layer"):
        load_foreign(folder)
    assert load_foreign(folder, layer=3).layer == 3


def test_class_by_its_keys_without_config(tmp_path: Path) -> None:
    a = write_dictionary_learning(tmp_path / "a", None, b_dec=None, k=None, threshold=None, bias=B_DEC)
    sae = load_foreign(a, layer=0)
    assert sae.activation == "relu"
    assert_codes(sae, [[1.5, 1.0, 2.0], [0.5, 0.0, 0.0]])
    b = write_dictionary_learning(tmp_path / "b", None)
    with pytest.raises(FormatError, match="does not tell BatchTopK from TopK: put config.json"):
        load_foreign(b, layer=0)


def test_own_name_of_the_pickle(tmp_path: Path) -> None:
    folder = write_dictionary_learning(tmp_path / "layer_4")
    (folder / "ae.pt").rename(folder / "ae_final.pt")
    assert load_foreign(folder / "ae_final.pt").layer == 3


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("evil"),))


def test_a_pickle_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_dictionary_learning(tmp_path / "layer_1")
    torch.save({"encoder.weight": Evil()}, tmp_path / "layer_1" / "ae.pt")
    with pytest.raises(FormatError, match="ae.pt is damaged"):
        load_foreign(tmp_path / "layer_1")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"b_dec": None}, "lacks b_dec"),
        ({"b_dec": torch.zeros(5)}, r"decoder bias has shape \(5,\), expected \(2,\)"),
        ({"encoder.bias": torch.tensor([0.0, float("nan"), 0.0])}, "encoder bias holds NaN"),
        ({"threshold": torch.tensor(float("nan"))}, "threshold holds NaN"),
        ({"threshold": torch.ones(2)}, r"threshold has shape \(2,\), expected \(3,\)"),
        ({"k": torch.tensor(7)}, "config.json says k = 2, the weights say k = 7"),
        ({"k": torch.tensor(0)}, "k is 0"),
    ],
)
def test_damaged_dictionary_learning(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        load_foreign(write_dictionary_learning(tmp_path / "layer_1", **changes))
    assert "\n" not in str(caught.value) and "ae.pt" in str(caught.value)


def test_unknown_class(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="dict_class is 'IdentityDict', expected one of AutoEncoderTopK"):
        load_foreign(write_dictionary_learning(tmp_path / "layer_1", "IdentityDict"))


# ---------- SAELens


def test_saelens_by_hand(tmp_path: Path) -> None:
    sae = load_foreign(write_saelens(tmp_path))
    assert_codes(sae, [[1.5, 0.0, 2.0], [0.0, 0.0, 0.0]])
    assert (sae.activation, sae.k, sae.layer) == ("jumprelu", None, 4)


def test_saelens_before_6(tmp_path: Path) -> None:
    """A flat cfg.json: no architecture, hook_point, TopK as an activation function."""
    changes = {
        "metadata": None,
        "hook_point": "blocks.2.hook_resid_pre",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 2},
        "normalize_activations": False,
    }
    sae = load_saelens(write_saelens(tmp_path, "standard", **changes))
    assert_codes(sae, [[1.5, 0.0, 2.0], [0.5, 0.0, 0.0]])
    assert (sae.activation, sae.k, sae.layer) == ("topk", 2, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "temporal"}, "architecture 'temporal' cannot be loaded"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm' cannot be folded"),
        ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale' cannot be folded"),
        ({"normalize_activations": "expected_average_only_in"}, "no factor is in activation_scaler.json"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening with activation_whitening"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"activation_fn": "tanh-relu"}, "'tanh-relu'"),
        ({"architecture": "gated"}, "lacks r_mag, b_gate, b_mag"),
        ({"architecture": "batchtopk"}, "k is None"),
    ],
)
def test_refused_saelens(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        load_saelens(write_saelens(tmp_path, **changes))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_hook_that_is_no_blocks_output(tmp_path: Path) -> None:
    write_saelens(tmp_path, metadata={"hook_name": "blocks.4.hook_mlp_out"})
    with pytest.raises(UsageError, match="'blocks.4.hook_mlp_out' is not a block's output"):
        load_foreign(tmp_path)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.0.hook_resid_post", 0),
        ("blocks.5.hook_resid_pre", 4),
        ("blocks.0.hook_resid_pre", None),
        ("layers.11", 11),
        ("encoder.layers.7", 7),
        ("model.encoder.blocks.3", 3),
        ("layers.5.mlp", None),
        ("layers.5.fc1.layers", None),
        ("xlayers.5", None),
        ("", None),
    ],
)
def test_layer_of_hook(name: str, layer: int | None) -> None:
    assert layer_of_hook(name) == layer


def test_saelens_written(tmp_path: Path) -> None:
    """What SAELens' loader looks for."""
    sae = random_sae("batchtopk", k=5, theta=1.0, layer=3)
    save_saelens(sae, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"]) == ("jumprelu", 24, 96)
    assert config["apply_b_dec_to_input"] is False and config["normalize_activations"] == "none"
    assert config["metadata"]["hook_name"] == "encoder.layers.3"
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {"W_enc": (24, 96), "W_dec": (96, 24), "b_enc": (96,), "b_dec": (24,), "threshold": (96,)}
    assert shapes == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize(
    ("activation", "k"), [("relu", None), ("topk", 5), ("jumprelu", None), ("batchtopk", 5)]
)
def test_saelens_round_trip(tmp_path: Path, activation: str, k: int | None) -> None:
    sae = random_sae(activation, k, theta=0.0 if activation in ("relu", "topk") else 0.9, layer=1)
    sae.metadata.update(calibrated_on={"speech": 3}, encoder_sha256="ab")
    save_saelens(sae, tmp_path / "a")
    back = load_foreign(tmp_path / "a")
    assert (back.activation, back.k, back.layer) == (activation, k, 1)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert back.metadata["calibrated_on"] == {"speech": 3} and back.metadata["base_model"] == "tiny"
    assert back.metadata["licence"] == "MIT" and back.metadata["source"]["library"] == "saelens"


# ---------- sparsify


def test_sparsify_by_hand(tmp_path: Path) -> None:
    sae = load_foreign(write_sparsify(tmp_path / "encoder.layers.2"))
    assert_codes(sae, [[1.5, 0.0, 2.0], [0.5, 0.0, 0.0]])
    assert (sae.activation, sae.k, sae.layer) == ("topk", 2, 2)
    assert sae.metadata["source"]["hook"] == "encoder.layers.2"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "groupmax"}, "activation 'groupmax' cannot be loaded, expected 'topk'"),
        ({"transcode": True}, "a transcoder cannot be loaded"),
        ({"skip_connection": True}, "skip connection"),
        ({"signed": True}, "signed"),
        ({"k": None}, "k is None"),
        (
            {"tensors": {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "b_dec": B_DEC}},
            "lacks W_dec: it has",
        ),
    ],
)
def test_refused_sparsify(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        load_sparsify(write_sparsify(tmp_path / "layers.0", **changes))


def test_sparsify_of_an_mlp(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'layers.2.mlp' is not a block's"):
        load_sparsify(write_sparsify(tmp_path / "layers.2.mlp"))


def test_sparsify_round_trip(tmp_path: Path) -> None:
    sae = random_sae("topk", 5, layer=4)
    save_sparsify(sae, tmp_path / "encoder.layers.4")
    back = load_foreign(tmp_path)
    assert (back.activation, back.k, back.layer) == ("topk", 5, 4)
    torch.testing.assert_close(back.b_enc, sae.b_enc, atol=1e-6, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(back.encode(inputs()), sae.encode(inputs()), atol=1e-5, rtol=1e-5)


def test_sparsify_keeps_k_of_a_threshold_sae(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sae = random_sae("batchtopk", 5, theta=1.0)
    with caplog.at_level(logging.WARNING, "whisper_steer"):
        save_sparsify(sae, tmp_path / "layers.2")
    assert "keeps the 5 largest latents of every frame" in caplog.text
    back = load_foreign(tmp_path)
    with torch.no_grad():
        assert (back.encode(inputs()).count_nonzero(dim=1) == 5).all()
        assert not torch.equal(back.encode(inputs()), sae.encode(inputs()))


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_sparsify_needs_a_k(tmp_path: Path, activation: str) -> None:
    with pytest.raises(UsageError, match="has no k .* save_saelens"):
        save_sparsify(random_sae(activation), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------- folding


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_folds_keep_codes(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, mean = normal(7, 4), normal(4)
    matrix = torch.linalg.qr(normal(4, 4)).Q * scale
    inner = Parts.of(normal(9, 4), normal(9), normal(9, 4), normal(4), normal(9).abs())
    z = (x - mean) @ matrix

    def apply(parts: Parts, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = x @ parts.W_enc.T + parts.b_enc
        codes = torch.where(pre > parts.theta, pre, 0.0)
        return codes, codes @ parts.W_dec + parts.b_dec

    codes, reconstruction = apply(inner, z)
    outer = apply(inner.of_inputs(mean, matrix, torch.linalg.inv(matrix)), x)
    torch.testing.assert_close(outer[0], codes)
    torch.testing.assert_close(outer[1], reconstruction @ torch.linalg.inv(matrix) + mean)
    lengths = inner.W_dec.norm(dim=1)
    unit = inner.with_unit_decoder(scale_theta=True)
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(apply(unit, z)[0], codes * lengths)
    torch.testing.assert_close(apply(unit, z)[1], reconstruction)
    centred = apply(inner.encoding_minus_b_dec(), z)
    torch.testing.assert_close(centred[0], apply(inner, z - inner.b_dec)[0])

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_steer.activation_functions import ACTIVATIONS, make
from whisper_steer.errors import FormatError, UsageError
from whisper_steer.fileformat import load_tensors, save_tensors
from whisper_steer.sae import SparseAutoencoder


def random_sae(seed=0, d=6, n=20, activation="batchtopk", layer=0, **metadata):
    generator = torch.Generator().manual_seed(seed)
    k = 3 if activation in ("batchtopk", "topk") else None
    sae = SparseAutoencoder(d, n, activation=activation, k=k, layer=layer, metadata=metadata)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if activation in ("batchtopk", "jumprelu"):
            sae.theta.copy_(torch.rand(n, generator=generator) + 0.1)
    return sae.eval().requires_grad_(False)


def frames(seed=1, shape=(2, 5, 6)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hand_made():
    sae = SparseAutoencoder(2, 3, activation="jumprelu")
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        sae.b_enc.copy_(torch.tensor([0.0, -1.0, 0.5]))
        sae.W_dec.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        sae.b_dec.copy_(torch.tensor([0.25, -0.25]))
        sae.theta.copy_(torch.tensor([0.5, 0.0, 4.0]))
    return sae.requires_grad_(False)


def test_by_hand():
    sae, x = hand_made(), torch.tensor([2.0, 1.5])
    # pre-activations 2, 0.5, 4; thresholds 0.5, 0, 4: the third is not above its own
    assert sae.pre_activations(x).tolist() == [2.0, 0.5, 4.0]
    assert sae.encode(x).tolist() == [2.0, 0.5, 0.0]
    # 2 (1, 2) + 0.5 (3, 4) + (0.25, -0.25); b_dec is not subtracted before encoding
    assert sae(x).tolist() == [3.75, 5.75]


def test_start_is_unit_rows_tied():
    sae = SparseAutoencoder(8, 32, k=4)
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.W_dec.norm(dim=-1).tolist() == pytest.approx([1.0] * 32)
    assert (sae.n_latents, sae.d_model) == (32, 8)
    assert sorted(name for name, _ in sae.named_parameters()) == ["W_dec", "W_enc", "b_dec", "b_enc"]
    assert [name for name, _ in sae.named_buffers()] == ["theta"]


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "topk"])
def test_encode_subset_equals_the_columns_of_encode(activation):
    sae, x = random_sae(activation=activation), frames()
    indices = torch.tensor([7, 0, 19])
    torch.testing.assert_close(sae.encode_subset(x, indices), sae.encode(x)[..., indices])
    assert sae.encode_subset(x, torch.tensor([], dtype=torch.int64)).shape == (2, 5, 0)


def test_encode_subset_of_topk_is_refused():
    with pytest.raises(UsageError, match="use encode"):
        random_sae(activation="topk").encode_subset(frames(), torch.tensor([0]))


def test_topk_encode_keeps_k():
    assert (random_sae(activation="topk").encode(frames()) > 0).sum(-1).max() <= 3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inference_equals_the_training_forms_own_inference(activation):
    sae, x = random_sae(activation=activation), frames()
    form = make(activation, sae.n_latents, sae.k)
    form(sae.pre_activations(x))
    sae.theta.copy_(form.theta())
    assert torch.equal(sae.encode(x), form.inference(sae.pre_activations(x)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_encoded_in_float32_and_returned_as_they_came(dtype):
    sae, x = random_sae(), frames().to(dtype)
    assert sae.encode(x).dtype == torch.float32
    assert torch.equal(sae.encode(x), sae.encode(x.float()))
    assert sae(x).dtype == dtype


def test_training_reduces_the_error():
    torch.manual_seed(0)
    sae, x = SparseAutoencoder(6, 24, k=3), frames(shape=(200, 6))
    form = make("batchtopk", 24, 3, momentum=0.8)
    optimiser = torch.optim.Adam(sae.parameters(), lr=0.01)
    losses = []
    for _ in range(100):
        loss = (sae.decode(form(sae.pre_activations(x))) - x).pow(2).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]
    sae.theta.copy_(form.theta())
    assert (sae.encode(x) > 0).sum(-1).float().mean().item() == pytest.approx(3, abs=0.7)


# ---------- folding


def same_codes(found, expected, pre, theta):
    """Equal, except where a pre-activation lies so near its threshold that rounding may decide."""
    undecided = (pre - theta).abs() < 1e-9
    torch.testing.assert_close(
        found.masked_fill(undecided, 0), expected.masked_fill(undecided, 0), rtol=1e-9, atol=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(1e-3, 1e3),
    activation=st.sampled_from(ACTIVATIONS),
    centre=st.floats(-50, 50),
)
def test_folding_changes_no_code(seed, scale, activation, centre):
    sae = random_sae(seed, activation=activation).double()
    x = frames(seed + 1).double() * scale + centre
    mean = torch.full((6,), centre, dtype=torch.float64)
    inner = (x - mean) / scale  # what the SAE was trained on
    folded = sae.fold_input_scale(scale).fold_mean(mean)
    same_codes(folded.encode(x), sae.encode(inner), sae.pre_activations(inner), sae.theta)
    codes = sae.encode(inner)
    torch.testing.assert_close(folded.decode(codes), sae.decode(codes) * scale + mean, rtol=1e-9, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-12, 12), activation=st.sampled_from(ACTIVATIONS))
def test_folding_a_power_of_two_changes_not_one_bit(seed, exponent, activation):
    sae, x, scale = random_sae(seed, activation=activation), frames(seed), 2.0**exponent
    assert torch.equal(sae.fold_input_scale(scale).encode(x * scale), sae.encode(x))


def test_folding_copies():
    sae = random_sae()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    sae.fold_input_scale(3.0).fold_mean(torch.ones(6))
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scales(scale):
    with pytest.raises(UsageError, match="input scale is"):
        random_sae().fold_input_scale(scale)


@pytest.mark.parametrize("mean", [torch.ones(5), torch.tensor([1.0] * 5 + [float("nan")])])
def test_bad_means(mean):
    with pytest.raises(UsageError, match=r"expected \(6,\) finite"):
        random_sae().fold_mean(mean)


# ---------- files


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_file_round_trip(tmp_path, activation):
    sae = random_sae(activation=activation, layer=2, base_model="mini.en", rates={"fvu": 0.05}, note="mine")
    sae.save(tmp_path / "sae.safetensors")
    again = SparseAutoencoder.load(tmp_path / "sae.safetensors")
    assert again.state_dict().keys() == sae.state_dict().keys()
    assert all(torch.equal(v, sae.state_dict()[name]) for name, v in again.state_dict().items())
    assert (again.activation, again.k, again.layer) == (sae.activation, sae.k, 2)
    assert again.metadata["rates"] == {"fvu": 0.05} and again.metadata["note"] == "mine"
    assert not again.training
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "sae.safetensors").read_bytes()


def test_metadata_of_a_file(tmp_path):
    random_sae(layer=1).save(tmp_path / "x")
    _, metadata = load_tensors(tmp_path / "x", "sae")
    del metadata["package_version"]
    assert metadata == {
        "format_version": 1,
        "kind": "sae",
        "base_model": None,
        "encoder_sha256": None,
        "d_model": 6,
        "layer": 1,
        "n_latents": 20,
        "activation": "batchtopk",
        "k": 3,
        "calibrated_on": {},
        "rates": {},
        "licence": "MIT",
    }


def test_half_precision_files_load_as_float32(tmp_path):
    sae = random_sae()
    sae.save(tmp_path / "x", dtype=torch.float16)
    again = SparseAutoencoder.load(tmp_path / "x")
    assert again.W_enc.dtype == torch.float32
    assert torch.equal(again.W_enc, sae.W_enc.half().float()) and torch.equal(again.theta, sae.theta)


def test_another_kind_and_foreign_files(tmp_path):
    save_tensors(tmp_path / "x", {"a": torch.zeros(1)}, {"kind": "steering"})
    with pytest.raises(FormatError, match="is a steering file: expected a whisper-steer sae file"):
        SparseAutoencoder.load(tmp_path / "x")
    (tmp_path / "y").write_bytes(safetensors.torch.save({"W_enc": torch.zeros(2, 2)}))
    with pytest.raises(FormatError, match="of another program"):
        SparseAutoencoder.load(tmp_path / "y")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("b_dec"), "lacks b_dec"),
        (lambda t, m: t.update(b_enc=torch.zeros(3)), r"b_enc has shape (3,), expected (20,)"),
        (lambda t, m: t.update(W_enc=torch.zeros(3)), "W_enc has shape (3,)"),
        (lambda t, m: t["W_dec"].fill_(float("nan")), "W_dec holds NaN"),
        (lambda t, m: m.pop("activation"), "metadata lacks 'activation'"),
        (lambda t, m: m.update(activation="gelu"), "activation is 'gelu'"),
        (lambda t, m: m.update(k=None), "k is None"),
        (lambda t, m: m.update(layer="last"), "layer is 'last'"),
    ],
)
def test_inconsistent_files(tmp_path, change, message):
    path = tmp_path / "x.safetensors"
    random_sae().save(path)
    tensors, metadata = load_tensors(path)
    change(tensors, metadata)
    save_tensors(path, tensors, metadata)
    with pytest.raises(FormatError) as error:
        SparseAutoencoder.load(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SparseAutoencoder(0, 4, k=1), "d_model is 0"),
        (lambda: SparseAutoencoder(4, 4), "k is None"),
        (lambda: SparseAutoencoder(4, 4, k=1, layer=-1), "layer is -1"),
        (lambda: random_sae().encode(torch.zeros(2, 7)), "have shape (2, 7): the SAE expects (..., 6)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(UsageError) as error:
        call()
    assert message in str(error.value)

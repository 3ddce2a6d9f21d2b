import pytest
import torch

from calibration.sae_training import LayerTrainer, SparseCodes, sparse_kernels_work
from whisper_steer.activation_functions import BatchTopK

needs_sparse = pytest.mark.skipif(not sparse_kernels_work(), reason="torch has no sparse products here")


def activations(frames=256, d=16, seed=0):
    """Sparse combinations of 40 directions, off-centre and of odd scale."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(40, d, generator=torch.Generator().manual_seed(9)), dim=1
    )
    codes = torch.rand(frames, 40, generator=generator) * (torch.rand(frames, 40, generator=generator) < 0.08)
    return 7 * codes @ directions + 3


def trainer(activation="batchtopk", k=4, **options):
    made = LayerTrainer(0, 16, 64, activation=activation, k=k, **options)
    made.set_normalisation(activations(), centre=True)
    return made


@needs_sparse
@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
def test_written_out_gradients_are_autograds(activation):
    sparse, dense = trainer(activation, sparse=True), trainer(activation, sparse=False)
    z = sparse.normalised(activations(seed=1))
    with torch.no_grad():
        for one in (sparse, dense):
            one.sae.b_enc.copy_(torch.linspace(-0.1, 0.1, 64))
            one.sae.b_dec.copy_(torch.linspace(-0.2, 0.3, 16))
    assert sparse._sparse_gradients(z) == pytest.approx(dense._dense_gradients(z, 1.0), rel=1e-5)
    for name, parameter in dense.sae.named_parameters():
        found = dict(sparse.sae.named_parameters())[name].grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)
        assert parameter.grad.abs().max() > 0


@needs_sparse
def test_batchtopk_keeps_the_largest_of_the_batch_also_when_the_margin_was_too_high():
    one = trainer(sparse=True)
    pre = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    expected = BatchTopK(64, 4)(pre)
    for hint in (0.0, 0.5, 100.0):  # no hint, a fair one, a useless one
        one._last_smallest = hint
        kept = one._largest(pre)
        assert torch.equal(kept.matrix().to_dense(), expected)
    assert len(kept.values) == 4 * 32


@needs_sparse
def test_fewer_positive_values_than_wanted():
    one = trainer(sparse=True)
    pre = -torch.ones(8, 64)
    pre[3, 5] = 2.0
    kept = one._largest(pre)
    assert kept.values.tolist() == [2.0] and kept.columns.tolist() == [5]
    nothing = one._largest(-torch.ones(8, 64))
    assert len(nothing.values) == 0


@needs_sparse
def test_sparse_codes_multiply_as_their_dense_matrix():
    dense = torch.zeros(5, 7)
    dense[0, 3], dense[2, 0], dense[2, 6], dense[4, 3] = 1.0, 2.0, 3.0, 4.0
    flat = dense.flatten().nonzero().flatten()
    codes = SparseCodes.at(flat, dense.flatten()[flat], (5, 7))
    weights, left = torch.randn(7, 2), torch.randn(5, 2)
    torch.testing.assert_close(codes.times(weights), dense @ weights)
    products = left @ weights.T
    torch.testing.assert_close(codes.products(left, weights), products.flatten()[flat])
    torch.testing.assert_close(codes.transposed().matrix().to_dense(), dense.T)


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "jumprelu", "relu"])
def test_every_form_learns_and_keeps_unit_decoder_rows(activation):
    one = trainer(activation, k=4, lr=5e-3, sparsity=0.01)
    errors = [one.step(activations(seed=step)) for step in range(60)]
    assert errors[-1] < 0.75 * errors[0]
    torch.testing.assert_close(one.sae.W_dec.norm(dim=1), torch.ones(64))
    assert all(torch.isfinite(p).all() for p in one.sae.parameters())


def test_jumprelu_moves_its_thresholds_towards_the_target():
    one = trainer("jumprelu", k=2, lr=5e-3, sparsity=1.0)
    x = activations()

    def l0():
        return float((one.form(one.sae.pre_activations(one.normalised(x))) > 0).float().sum(1).mean())

    before = l0()
    for step in range(80):
        one.step(activations(seed=step))
    assert abs(l0() - 2) < abs(before - 2)


@pytest.mark.parametrize("centre", [True, False])
def test_normalised_activations_have_unit_mean_square_norm(centre):
    one = LayerTrainer(0, 16, 32, k=4)
    x = activations()
    one.set_normalisation(x, centre=centre)
    z = one.normalised(x)
    assert float(z.square().sum(1).mean()) == pytest.approx(1.0, rel=1e-5)
    if centre:
        assert z.mean(0).abs().max() < 1e-5


def test_export_folds_mean_and_scale_without_changing_a_code():
    one = trainer(lr=5e-3)
    for step in range(30):
        one.step(activations(seed=step))
    exported = one.export()
    x = activations(seed=99)
    z = one.normalised(x)
    inside = one.form.eval().inference(one.sae.pre_activations(z))
    torch.testing.assert_close(exported.encode(x), inside, rtol=1e-4, atol=1e-5)
    back = (one.sae.decode(inside)) * one.scale + one.mean
    torch.testing.assert_close(exported(x), back, rtol=1e-4, atol=1e-4)
    assert exported.theta[0] == one.form.smallest_kept > 0


def test_start_depends_on_seed_and_layer_only():
    torch.manual_seed(1)
    first = LayerTrainer(2, 16, 32, k=4, seed=5).sae.W_enc
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, LayerTrainer(2, 16, 32, k=4, seed=5).sae.W_enc)
    assert not torch.equal(first, LayerTrainer(3, 16, 32, k=4, seed=5).sae.W_enc)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_state_continues_exactly(activation):
    one = trainer(activation)
    for step in range(5):
        one.step(activations(seed=step))
    saved = {name: tensor.clone() for name, tensor in one.state("x.").items()}
    other = LayerTrainer(0, 16, 64, activation=activation, k=4, seed=77)
    other.load_state(saved, "x.")
    for step in range(5, 10):
        assert one.step(activations(seed=step)) == other.step(activations(seed=step))
    for name, tensor in one.state("x.").items():
        assert torch.equal(tensor, other.state("x.")[name]), name

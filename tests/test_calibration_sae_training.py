import numpy as np
import pytest
import torch

from calibration.collectives import Collective
from calibration.sae_training import PREFIXES, VARIANTS, SAETrainer
from calibration.sparse_codes import LargestOfBatch, LargestOfFrame, SparseCodes, sparse_products_work
from calibration.training_choice import measured_choice
from whisper_steer.activation_functions import BatchTopK, topk
from whisper_steer.errors import UsageError

needs_sparse = pytest.mark.skipif(not sparse_products_work(), reason="torch has no sparse products here")


def activations(frames=256, d=16, seed=0):
    """Sparse combinations of 40 directions, off-centre and of odd scale."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(40, d, generator=torch.Generator().manual_seed(9)), dim=1
    )
    codes = torch.rand(frames, 40, generator=generator) * (torch.rand(frames, 40, generator=generator) < 0.08)
    return 7 * codes @ directions + 3


def trainer(activation="batchtopk", k=4, **options):
    made = SAETrainer(0, 16, 64, activation=activation, k=k, **options)
    made.set_normalisation(activations(), centre=True)
    return made


@needs_sparse
@pytest.mark.parametrize("activation", ["batchtopk", "topk", "matryoshka"])
def test_written_out_gradients_are_autograds(activation):
    sparse, dense = trainer(activation, sparse=True), trainer(activation, sparse=False)
    z = sparse.normalised(activations(seed=1))
    with torch.no_grad():
        for one in (sparse, dense):
            one.sae.b_enc.copy_(torch.linspace(-0.1, 0.1, 64))
            one.sae.b_dec.copy_(torch.linspace(-0.2, 0.3, 16))
    by_hand, by_autograd = sparse._sparse_gradients(z), dense._dense_gradients(z, 1.0)
    torch.testing.assert_close(by_hand.errors, by_autograd.errors, rtol=1e-5, atol=1e-7)
    assert torch.equal(by_hand.active, by_autograd.active)
    assert torch.equal(sparse.unused_frames, dense.unused_frames)
    for name, parameter in dense.sae.named_parameters():
        found = dict(sparse.sae.named_parameters())[name].grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)
        assert parameter.grad.abs().max() > 0


@needs_sparse
def test_batchtopk_keeps_the_largest_of_the_batch_also_when_the_margin_was_too_high():
    choose = LargestOfBatch(4)
    pre = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    expected = BatchTopK(64, 4)(pre)
    for hint in (0.0, 0.5, 100.0):  # no hint, a fair one, a useless one
        choose.smallest = hint
        kept = choose.of(pre)
        assert torch.equal(kept.dense(), expected)
        assert choose.smallest == float(expected[expected > 0].min())
    assert len(kept.values) == 4 * 32


@needs_sparse
@pytest.mark.parametrize("hint", [0.5, 100.0])
def test_screening_in_bfloat16_chooses_what_float32_chooses(hint):
    generator = torch.Generator().manual_seed(3)
    z = torch.nn.functional.normalize(torch.randn(200, 48, generator=generator), dim=1)
    W = torch.nn.functional.normalize(torch.randn(300, 48, generator=generator), dim=1)
    b = 0.05 * torch.randn(300, generator=generator)
    exact, screened = LargestOfBatch(6), LargestOfBatch(6, screen=True)
    exact.smallest = screened.smallest = float(exact(z, W, b).values.min()) * hint / 0.5
    expected, found = exact(z, W, b), screened(z, W, b)
    assert torch.equal(found.columns, expected.columns) and torch.equal(found.offsets, expected.offsets)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=1e-6)
    assert len(found.values) == 6 * 200


@needs_sparse
def test_fewer_positive_values_than_wanted():
    choose = LargestOfBatch(4)
    pre = -torch.ones(8, 64)
    pre[3, 5] = 2.0
    kept = choose.of(pre)
    assert kept.values.tolist() == [2.0] and kept.columns.tolist() == [5]
    nothing = choose.of(-torch.ones(8, 64))
    assert len(nothing.values) == 0 and nothing.offsets.tolist() == [0] * 9


@needs_sparse
def test_ties_at_the_threshold_keep_exactly_as_many_as_wanted():
    kept = LargestOfBatch(2).of(torch.ones(3, 5))
    assert kept.offsets[-1] == 6


@needs_sparse
def test_topk_keeps_the_largest_of_every_frame():
    kept = LargestOfFrame(2).of(torch.tensor([[3.0, 1.0, 2.0], [-1.0, 5.0, -2.0]]))
    assert kept.dense().tolist() == [[3.0, 0.0, 2.0], [0.0, 5.0, 0.0]]


@needs_sparse
@pytest.mark.parametrize("hint", [0.0, 0.3, 1.5, 100.0])  # none, a fair one, for a few frames only, useless
def test_topk_does_not_depend_on_the_hint(hint):
    choose = LargestOfFrame(5)
    choose.smallest = hint
    pre = torch.randn(50, 40, generator=torch.Generator().manual_seed(5))
    pre[7] = -1.0
    assert torch.equal(choose.of(pre).dense(), topk(pre, 5))


@needs_sparse
@pytest.mark.parametrize("hint", [0.05, 0.2, 100.0])
def test_topk_screened_in_bfloat16_chooses_what_float32_chooses(hint):
    generator = torch.Generator().manual_seed(6)
    z = torch.nn.functional.normalize(torch.randn(200, 48, generator=generator), dim=1)
    W = torch.nn.functional.normalize(torch.randn(300, 48, generator=generator), dim=1)
    b = 0.05 * torch.randn(300, generator=generator)
    choose = LargestOfFrame(6, screen=True)
    choose.smallest = hint
    torch.testing.assert_close(choose(z, W, b).dense(), topk(z @ W.T + b, 6))


@needs_sparse
def test_columns_between_cuts_the_dense_matrix():
    pre = torch.randn(6, 10, generator=torch.Generator().manual_seed(4))
    codes = LargestOfBatch(3).of(pre)
    for begin, end in ((0, 4), (4, 10), (7, 7), (0, 10)):
        part = codes.columns_between(begin, end)
        assert torch.equal(part.dense(), codes.dense()[:, begin:end])


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
    torch.testing.assert_close(codes.transposed().dense(), dense.T)


@pytest.mark.parametrize("activation", VARIANTS)
def test_every_form_learns_and_keeps_unit_decoder_rows(activation):
    one = trainer(activation, k=4, lr=5e-3, sparsity=0.01)
    errors = [one.step(activations(seed=step)).error for step in range(60)]
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
    one = SAETrainer(0, 16, 32, k=4)
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
    first = SAETrainer(2, 16, 32, k=4, seed=5).sae.W_enc
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, SAETrainer(2, 16, 32, k=4, seed=5).sae.W_enc)
    assert not torch.equal(first, SAETrainer(3, 16, 32, k=4, seed=5).sae.W_enc)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("activation", VARIANTS)
def test_state_continues_exactly(activation):
    one = trainer(activation)
    for step in range(5):
        one.step(activations(seed=step))
    saved = {name: tensor.clone() for name, tensor in one.state().items()}
    other = SAETrainer(0, 16, 64, activation=activation, k=4, seed=77)
    other.load_state(saved)
    for step in range(5, 10):
        assert one.step(activations(seed=step)).error == other.step(activations(seed=step)).error
    for name, tensor in one.state().items():
        assert torch.equal(tensor, other.state()[name]), name


def test_matryoshka_loss_is_the_mean_error_of_the_prefixes():
    one = trainer("matryoshka", k=4, sparse=False)
    assert one.prefixes == tuple(round(64 * share) for share in PREFIXES) == (4, 8, 16, 32, 64)
    z = one.normalised(activations(seed=1))
    one.form.eval()
    codes = one.form(one.sae.pre_activations(z)).detach()
    expected = sum(
        (codes[:, :end] @ one.sae.W_dec[:end] - z).square().sum(1).mean() for end in one.prefixes
    ) / len(one.prefixes)
    (gradient,) = torch.autograd.grad(expected, one.sae.W_dec)
    one._dense_gradients(z, 1.0)
    torch.testing.assert_close(one.sae.W_dec.grad, gradient, rtol=1e-4, atol=1e-6)


def test_matryoshka_puts_more_into_its_first_latents_than_batchtopk_does():
    def share_explained_by_the_first_quarter(variant):
        one = trainer(variant, k=4, lr=5e-3)
        for step in range(150):
            one.step(activations(seed=step))
        x = activations(seed=999)
        sae = one.export()
        codes = sae.encode(x)
        codes[:, 16:] = 0
        return 1 - float((sae.decode(codes) - x).square().sum() / (x - x.mean(0)).square().sum())

    nested, flat = (share_explained_by_the_first_quarter(v) for v in ("matryoshka", "batchtopk"))
    assert nested > flat + 0.1


def with_dead_latents(auxiliary, **options):
    one = trainer("batchtopk", k=4, lr=5e-3, auxiliary=auxiliary, dead_after=300, **options)
    with torch.no_grad():
        one.sae.b_enc[40:] = -1.5  # no input reaches these through a ReLU
    return one


@pytest.mark.parametrize("sparse", [False, pytest.param(True, marks=needs_sparse)])
def test_the_auxiliary_loss_sends_gradients_to_encoder_and_decoder_of_dead_latents(sparse):
    for auxiliary in (0.0, 1 / 32):
        one = with_dead_latents(auxiliary, sparse=sparse)
        z = one.normalised(activations(seed=1))
        one.unused_frames[40:] = 1000
        if sparse:
            one._sparse_gradients(z)
        else:
            one._dense_gradients(z, 1.0)
        reached = [
            float(gradient[40:].abs().reshape(24, -1).max(dim=1).values.max())
            for gradient in (one.sae.W_enc.grad, one.sae.b_enc.grad, one.sae.W_dec.grad)
        ]
        assert all(value > 1e-6 for value in reached) if auxiliary else reached == [0, 0, 0]


def test_the_auxiliary_loss_revives_dead_latents():
    alive = {}
    for auxiliary in (0.0, 1 / 4):
        one = with_dead_latents(auxiliary)
        for step in range(400):
            one.step(activations(seed=step))
        alive[auxiliary] = int((one.unused_frames[40:] < 300).sum())
    assert alive[0.0] == 0 and alive[1 / 4] >= 12


def test_unused_frames_count_since_the_last_activation():
    one = trainer()
    z = one.normalised(activations(frames=10))
    one._auxiliary_loss(z, z, torch.arange(64) < 3)
    one._auxiliary_loss(z, z, torch.arange(64) == 0)
    assert one.unused_frames[:4].tolist() == [0, 10, 10, 20]
    assert one.alive == 1.0


def test_autocast_stays_close_to_float32():
    plain = trainer(sparse=False)
    rough = trainer(sparse=False, autocast=True)
    for step in range(20):
        x = activations(seed=step)
        errors = plain.step(x).error, rough.step(x).error
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    assert errors[1] != errors[0]


def test_an_unknown_variant_is_refused():
    with pytest.raises(UsageError, match="expected one of batchtopk, matryoshka"):
        SAETrainer(0, 16, 64, activation="gelu")
    with pytest.raises(UsageError, match="k is None"):
        SAETrainer(0, 16, 64, activation="topk", k=None)


class WithNeighbour(Collective):
    """The first of two processes; the other one's pre-activations are known."""

    def __new__(cls, *_):
        return object.__new__(cls)

    def __init__(self, neighbours):
        super().__init__(0, 2)
        object.__setattr__(self, "neighbours", neighbours)

    def joined(self, values):
        return np.concatenate([values, self._as_sifted(len(values))])

    def count(self, value):
        return value + len(self._as_sifted(value))

    def _as_sifted(self, own):
        """It uses the same hint: where that leaves nothing here, it leaves nothing there."""
        return self.neighbours[self.neighbours > 0] if own else self.neighbours[:0]


@pytest.mark.parametrize("hint", [0.0, 0.5, 100.0])
def test_with_several_processes_the_largest_of_all_frames_are_kept(hint):
    both = torch.randn(40, 64, generator=torch.Generator().manual_seed(8))
    expected = BatchTopK(64, 4)(both)[:20]
    assert int((expected > 0).sum()) != 80  # the halves do not hold equal shares
    collective = WithNeighbour(both[20:].flatten().numpy())
    one = trainer(collective=collective, sparse=False)
    one.form.smallest_kept.fill_(hint)
    assert torch.equal(one._everyones_largest(both[:20]), expected)
    choose = LargestOfBatch(4)
    choose.smallest = hint
    assert torch.equal(choose.of(both[:20], collective).dense(), expected)


@needs_sparse
@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
def test_codes_by_the_training_form_are_those_chosen_with_numpy(activation):
    """What a GPU does, on the CPU."""
    one, other = trainer(activation), trainer(activation)
    z = one.normalised(activations(seed=1))
    with torch.no_grad():
        chosen, by_form = one._codes(z), other._codes_by_form(z)
    torch.testing.assert_close(by_form.dense(), chosen.dense())
    assert float(by_form.dense().sum()) > 0
    if activation == "batchtopk":
        torch.testing.assert_close(one.form.theta(), other.form.theta())


def test_what_trains_faster_is_measured(caplog):
    measured_choice.cache_clear()
    with caplog.at_level("INFO", logger="whisper_steer"):
        found = [measured_choice("topk", 16, 64, 4, 32, "cpu", False) for _ in range(2)]
    assert found[0] is found[1] and len(caplog.messages) == 1
    assert found[0].sparse == (found[0].sparse_s < found[0].dense_s)
    assert f"{'sparse' if found[0].sparse else 'dense'} gradients" in caplog.messages[0]
    assert not measured_choice("relu", 16, 64, None, 32, "cpu", False).sparse  # it has no sparse form

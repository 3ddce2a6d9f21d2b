import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from whisper_steer.activation_functions import BatchTopK, JumpReLU, ReLU, TopK, l1_loss, make, threshold, topk
from whisper_steer.errors import UsageError

PRE = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.1, 4.0, -2.0, 1.0]])


def brute_force_batch_topk(pre, k, mask):
    """The definition, value by value: of the real frames' positive values the k * B largest stay."""
    real = [(i, j) for i in range(pre.shape[0]) for j in range(pre.shape[1]) if mask[i]]
    ranked = sorted((ij for ij in real if pre[ij] > 0), key=lambda ij: float(pre[ij]), reverse=True)
    codes = torch.zeros_like(pre)
    for ij in ranked[: k * int(mask.sum())]:
        codes[ij] = pre[ij]
    return codes


# ---------- inference forms


def test_threshold_by_hand():
    theta = torch.tensor([2.5, 0.0, 2.0, 0.4])
    # 2.0 is not above its threshold 2.0; 1.0 is above 0.4
    assert threshold(PRE, theta).tolist() == [[3.0, 0.0, 0.0, 0.5], [0.0, 4.0, 0.0, 1.0]]


def test_threshold_below_zero_never_lets_negatives_through():
    # thresholds of -1 occur in early checkpoints
    assert threshold(torch.tensor([-0.5, 0.5]), torch.tensor(-1.0)).tolist() == [0.0, 0.5]


def test_topk_by_hand():
    assert topk(PRE, 2).tolist() == [[3.0, 0.0, 2.0, 0.0], [0.0, 4.0, 0.0, 1.0]]
    assert topk(PRE, 99).tolist() == PRE.relu().tolist()


def test_topk_keeps_exactly_k_under_ties():
    assert (topk(torch.ones(3, 5), 2) > 0).sum(-1).tolist() == [2, 2, 2]


# ---------- BatchTopK


def test_batch_topk_by_hand():
    act = BatchTopK(4, 2)
    # 2 frames x k 2: the four largest of both are 4, 3, 2, 1: two in the first frame, two in the second
    assert act(PRE).tolist() == [[3.0, 0.0, 2.0, 0.0], [0.0, 4.0, 0.0, 1.0]]
    act = BatchTopK(4, 1)
    assert act(PRE).tolist() == [[3.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0]]


def test_batch_topk_may_give_one_frame_more_than_k():
    pre = torch.tensor([[9.0, 8.0, 7.0], [1.0, 2.0, 3.0]])
    assert BatchTopK(3, 1)(pre).tolist() == [[9.0, 8.0, 0.0], [0.0, 0.0, 0.0]]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_batch_topk_equals_brute_force(data):
    frames, n = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 7))
    # distinct magnitudes: under ties the choice is free
    values = data.draw(st.permutations(range(1, frames * n + 1)))
    signs = data.draw(hnp.arrays(bool, frames * n))
    pre = torch.tensor([v if s else -v for v, s in zip(values, signs, strict=True)], dtype=torch.float32)
    pre = pre.reshape(frames, n)
    mask = torch.from_numpy(data.draw(hnp.arrays(bool, frames)))
    k = data.draw(st.integers(1, 9))
    act = BatchTopK(n, k)
    expected = brute_force_batch_topk(pre, k, mask)
    assert torch.equal(act(pre, mask), expected)
    kept = expected[expected > 0]
    assert act.smallest_kept == (kept.min() if kept.numel() else 0.0)
    # again with a threshold from before: the quick search must not change the result
    act.smallest_kept.fill_(data.draw(st.floats(0, 60)))
    assert torch.equal(act.eval()(pre, mask), expected)


def test_batch_topk_keeps_exactly_k_times_b_under_ties():
    codes = BatchTopK(5, 2)(torch.ones(3, 5))
    assert int((codes > 0).sum()) == 6


def test_batch_topk_with_k_above_the_number_of_latents_keeps_all_positive():
    assert torch.equal(BatchTopK(4, 50)(PRE), PRE.relu())


def test_batch_topk_without_frames_or_positives_leaves_the_threshold():
    act = BatchTopK(4, 2)
    act(PRE)
    before = act.smallest_kept.clone()
    assert act(torch.zeros(0, 4)).shape == (0, 4)
    assert act(PRE, torch.tensor([False, False])).abs().sum() == 0
    assert act(-PRE.abs()).abs().sum() == 0
    assert act.smallest_kept == before and act.steps == 1


def test_masked_frames_get_no_codes_and_do_not_count():
    pre = torch.tensor([[9.0, 8.0], [1.0, 2.0]])
    act = BatchTopK(2, 1)
    assert act(pre, torch.tensor([False, True])).tolist() == [[0.0, 0.0], [0.0, 2.0]]
    assert act.smallest_kept == 2.0


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(UsageError, match=r"mask has shape \(2,\): expected one flag per frame, \(3, 2\)"):
        BatchTopK(4, 1)(torch.ones(3, 2, 4), torch.tensor([True, True]))


def test_threshold_is_a_running_mean_of_the_smallest_kept():
    act = BatchTopK(2, 1, momentum=0.75)
    smallest = [2.0, 4.0, 8.0]
    for value in smallest:
        act(torch.tensor([[value, 0.1]]))
    expected = 2.0  # the first value, then 0.75 old + 0.25 new
    for value in smallest[1:]:
        expected = 0.75 * expected + 0.25 * value
    assert act.smallest_kept == pytest.approx(expected)
    assert act.theta().tolist() == pytest.approx([expected, expected])
    assert act.inference(torch.tensor([[3.7, 3.9]])).tolist() == [[0.0, pytest.approx(3.9)]]
    act.eval()(torch.tensor([[99.0, 0.1]]))
    assert act.smallest_kept == pytest.approx(expected)


def test_threshold_survives_saving_the_training_state():
    act, again = BatchTopK(4, 2), BatchTopK(4, 2)
    act(PRE)
    again.load_state_dict(act.state_dict())
    assert again.smallest_kept == 1.0 and again.steps == 1


def test_batch_topk_gradient_flows_to_what_was_kept():
    pre = PRE.clone().requires_grad_()
    BatchTopK(4, 1)(pre).sum().backward()
    assert pre.grad.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]


# ---------- TopK, ReLU


def test_topk_training_form():
    act = TopK(4, 1)
    assert act(PRE, torch.tensor([True, False])).tolist() == [[3.0, 0.0, 0.0, 0.0], [0.0] * 4]
    assert act.inference(PRE).tolist() == topk(PRE, 1).tolist()
    assert act.theta().tolist() == [0.0] * 4
    pre = PRE.clone().requires_grad_()
    act(pre).sum().backward()
    assert pre.grad.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]


def test_relu_and_l1_by_hand():
    act = ReLU(4)
    codes = act(PRE)
    assert codes.tolist() == PRE.clamp_min(0).tolist()
    W_dec = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])  # lengths 5, 1, 2, 0
    # frame 1: 3*5 + 2*2 = 19; frame 2: 0.1*5 + 4*1 = 4.5
    assert l1_loss(codes, W_dec) == pytest.approx((19 + 4.5) / 2)
    assert l1_loss(codes, W_dec, torch.tensor([False, True])) == pytest.approx(4.5)
    assert l1_loss(codes, W_dec, torch.tensor([False, False])) == 0


# ---------- JumpReLU


def jump(thetas, bandwidth):
    act = JumpReLU(len(thetas), bandwidth=bandwidth)
    act.log_theta.data = torch.tensor(thetas).log()
    return act


def test_jumprelu_by_hand():
    act = jump([1.0, 1.0, 2.0, 0.2], 0.5)
    assert act(PRE).tolist() == [[3.0, 0.0, 0.0, 0.5], [0.0, 4.0, 0.0, 1.0]]
    assert act.theta().tolist() == pytest.approx([1.0, 1.0, 2.0, 0.2])
    assert torch.equal(act.inference(PRE), act(PRE))
    assert act(PRE, torch.tensor([False, True]))[0].tolist() == [0.0] * 4


def test_jumprelu_straight_through_gradients_by_hand():
    act = jump([1.0, 1.0, 1.0], 0.5)
    # the kernel reaches 0.25 to each side of theta: the first two are inside, the third is outside
    pre = torch.tensor([[1.125, 0.875, 1.5]], requires_grad=True)
    upstream = torch.tensor([[2.0, 3.0, 5.0]])
    act(pre).backward(upstream)
    assert pre.grad.tolist() == [[2.0, 0.0, 5.0]]  # the identity where the latent is on
    # d theta = -(theta / eps) K upstream = -2 upstream; d log_theta = theta d theta, theta = 1
    assert act.log_theta.grad.tolist() == pytest.approx([-4.0, -6.0, 0.0])


def test_jumprelu_l0_loss_by_hand():
    act = jump([1.0, 1.0, 1.0], 0.5)
    pre = torch.tensor([[1.125, 0.875, 1.5], [3.0, 2.0, 1.2]], requires_grad=True)
    loss = act.l0_loss(pre)
    assert loss.item() == pytest.approx(2.5)  # (2 + 3) / 2 frames
    loss.backward()
    assert pre.grad is None or pre.grad.abs().sum() == 0
    # d L0 / d theta_j = -(1 / eps) / frames per frame inside the kernel: one frame of each latent
    assert act.log_theta.grad.tolist() == pytest.approx([-1.0, -1.0, -1.0])
    assert act.l0_loss(pre, torch.tensor([True, False])).item() == pytest.approx(2.0)
    assert act.l0_loss(pre, torch.tensor([False, False])) == 0
    assert act.l0_loss(pre, target=5.0).item() == pytest.approx(0.25)


def test_jumprelu_l0_loss_raises_thresholds():
    torch.manual_seed(0)
    pre, act = torch.randn(512, 8).relu(), jump([0.3] * 8, 0.2)
    optimiser = torch.optim.SGD(act.parameters(), lr=0.5)
    before = act.l0_loss(pre).item()
    for _ in range(50):
        optimiser.zero_grad()
        act.l0_loss(pre, target=1.0).backward()
        optimiser.step()
    assert act.l0_loss(pre).item() < 0.7 * before
    assert bool((act.theta() > 0.3).all())


# ---------- by name


def test_make():
    assert isinstance(make("batchtopk", 4, 2, momentum=0.5), BatchTopK)
    assert isinstance(make("topk", 4, 2), TopK)
    assert make("jumprelu", 4, bandwidth=0.25).bandwidth == 0.25
    assert isinstance(make("relu", 4), ReLU)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("gelu", 4), "activation is 'gelu': expected one of batchtopk, topk, jumprelu, relu"),
        (lambda: make("batchtopk", 4), "k is None: expected a whole number >= 1"),
        (lambda: make("topk", 4, 0), "k is 0"),
        (lambda: BatchTopK(4, 1, momentum=1.0), "momentum is 1.0"),
        (lambda: JumpReLU(4, bandwidth=0.0), "bandwidth is 0.0"),
        (lambda: JumpReLU(4, initial_theta=-1.0), "initial_theta is -1.0"),
    ],
)
def test_bad_values_are_usage_errors(call, message):
    with pytest.raises(UsageError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sae import frames, hand_made, random_sae

from whisper_steer.edits import LatentEdit, Shift, gated
from whisper_steer.errors import UsageError

X = torch.tensor([[[2.0, 1.5], [0.0, 3.0]]])  # with hand_made(): codes (2, 0.5, 0) and (0, 2, 0)


def edit(mode="add", values=(1.0, 1.0, 1.0), strength=1.0, **options):
    return LatentEdit.from_sae(
        hand_made(), None, torch.tensor(values), mode=mode, strength=strength, **options
    )


# ---------- Shift


def test_shift_by_hand():
    shift = Shift(0, torch.tensor([1.0, -2.0]), 0.5)
    assert shift(X, 2.0).tolist() == [[[3.0, -0.5], [1.0, 1.0]]]


def test_at_alpha_zero_edits_return_x_itself():
    for part in (Shift(0, torch.ones(2), 1.0), edit(), edit("clamp"), edit(reconstruct=True)):
        assert part(X, 0.0) is X


# ---------- LatentEdit


def test_codes():
    assert edit().codes(X).tolist() == [[[2.0, 0.5, 0.0], [0.0, 2.0, 0.0]]]


def test_add_by_hand():
    # a = 0.5 * 2 = 1; rows of W_dec: (1, 2), (3, 4), (5, 6)
    changed = edit(values=(1.0, -1.0, 0.0), strength=2.0)(X, 0.5)
    # frame 1: f' = (3, -0.5 floored to 0, 0): + 1 (1, 2) - 0.5 (3, 4)
    # frame 2: f' = (1, 1, 0): + (1, 2) - (3, 4)
    assert changed.tolist() == [[[1.5, 1.5], [-2.0, 1.0]]]


def test_add_without_floor():
    changed = edit(values=(1.0, -1.0, 0.0), strength=2.0, floor=False)(X, 0.5)
    assert changed.tolist() == [[[0.0, -0.5], [-2.0, 1.0]]]


def test_an_inactive_latent_pushed_down_stays_where_it_is():
    assert torch.equal(edit(values=(0.0, 0.0, -5.0))(X, 1.0), X)


def test_scale_by_hand():
    ablated = edit("scale", values=(0.0, 1.0, 0.0))
    assert ablated(X, 1.0).tolist() == [[[0.0, -2.5], [0.0, 3.0]]]
    assert ablated(X, 0.5).tolist() == [[[1.0, -0.5], [0.0, 3.0]]]
    # beyond complete removal there is nothing to remove
    assert torch.equal(ablated(X, 3.0), ablated(X, 1.0))
    doubled = edit("scale", values=(2.0, 1.0, 1.0))
    assert doubled(X, 1.0).tolist() == [[[4.0, 5.5], [0.0, 3.0]]]


def test_clamp_by_hand():
    clamp = edit("clamp", values=(0.0, 0.5, 1.0))
    # frame 1: f' - f = (-2, 0, 1); frame 2: (0, -1.5, 1)
    assert clamp(X, 1.0).tolist() == [[[5.0, 3.5], [0.5, 3.0]]]
    assert clamp(X, 0.5).tolist() == [[[3.5, 2.5], [0.25, 3.0]]]
    assert torch.equal(clamp(X, 7.0), clamp(X, 1.0))


def test_reconstruct_by_hand():
    sae = hand_made()
    papers = edit(values=(1.0, -1.0, 0.0), strength=2.0, reconstruct=True)
    assert papers.floor is False
    # decoder(f + a s), nothing floored: codes (3, -0.5, 0) and (1, 1, 0)
    expected = sae.decode(torch.tensor([[[3.0, -0.5, 0.0], [1.0, 1.0, 0.0]]]))
    torch.testing.assert_close(papers(X, 0.5), expected)


def test_reconstruct_drops_the_error_but_the_plain_edit_keeps_it():
    sae, x = random_sae(), frames()
    nothing = torch.zeros(sae.n_latents)
    torch.testing.assert_close(LatentEdit.from_sae(sae, None, nothing, reconstruct=True)(x, 1.0), sae(x))
    assert torch.equal(LatentEdit.from_sae(sae, None, nothing)(x, 1.0), x)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    mode=st.sampled_from(["add", "scale", "clamp"]),
    alpha=st.floats(0.01, 3),
    strength=st.floats(0.1, 4),
)
def test_a_few_latents_equal_the_full_sae_edited(seed, mode, alpha, strength):
    """Editing m rows alone is encode, change those m codes, and add what the decoder makes of the change."""
    sae, x, indices = random_sae(seed), frames(seed), torch.tensor([3, 11, 4])
    values = torch.randn(3, generator=torch.Generator().manual_seed(seed))
    part = LatentEdit.from_sae(sae, indices, values, mode=mode, strength=strength)
    f = sae.encode(x)
    changed = f.clone()
    changed[..., indices] = part.edited_codes(f[..., indices], alpha)
    torch.testing.assert_close(part(x, alpha), x + sae.decode(changed) - sae.decode(f), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_edited_in_float32(dtype):
    sae, x = random_sae(), frames().to(dtype)
    for part in (
        Shift(0, torch.randn(6), 0.3),
        LatentEdit.from_sae(sae, [1, 2, 3], torch.ones(3)),
        LatentEdit.from_sae(sae, None, torch.ones(20), reconstruct=True),
    ):
        changed = part(x, 0.7)
        assert changed.dtype == dtype
        assert torch.equal(changed, part(x.float(), 0.7).to(dtype))


# ---------- scaling by a gate


def test_gated_by_hand():
    g = torch.tensor([[0.5, 0.0]])
    changed = gated(Shift(0, torch.tensor([2.0, 4.0]), 1.0), X, 1.0, g)
    assert changed.tolist() == [[[3.0, 3.5], [0.0, 3.0]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reconstruct", [False, True])
def test_frames_with_gate_zero_keep_every_bit(dtype, reconstruct):
    sae, x = random_sae(), frames().to(dtype)
    x[0, 0, 0] = -0.0  # equal to 0.0, but not the same bits
    part = LatentEdit.from_sae(sae, None, torch.ones(20), reconstruct=reconstruct)
    g = torch.tensor([[0.0, 1.0, 0.0, 0.5, 0.0], [0.0] * 5])
    changed = gated(part, x, 1.0, g)
    view = torch.int32 if dtype == torch.float32 else torch.int16
    closed = g == 0
    assert torch.equal(changed.view(view)[closed], x.view(view)[closed])
    assert not torch.equal(changed[~closed], x[~closed])
    torch.testing.assert_close(changed[0, 1], part(x, 1.0)[0, 1])


def test_a_gate_closed_everywhere_costs_nothing():
    assert gated(edit(), X, 1.0, torch.zeros(1, 2)) is X


def test_a_gate_open_everywhere_is_the_whole_edit():
    torch.testing.assert_close(gated(edit(), X, 1.0, torch.ones(1, 2)), edit()(X, 1.0))


# ---------- construction


def test_edits_do_not_share_memory_with_their_source():
    direction, sae = torch.ones(6), random_sae()
    shift, part = Shift(0, direction, 1.0), LatentEdit.from_sae(sae, None, torch.ones(20))
    direction.zero_()
    sae.W_dec.zero_()
    assert shift.direction.sum() == 6 and part.W_dec.abs().sum() > 0


def test_numpy_values_are_taken_and_indices_kept():
    shift = Shift(np.int64(1), np.ones(3), np.float32(0.5))
    assert (shift.layer, type(shift.strength)) == (1, float)
    part = LatentEdit.from_sae(random_sae(layer=2), [7, 3], np.array([1.0, 2.0]))
    assert part.layer == 2 and part.indices.tolist() == [7, 3]
    assert edit().indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Shift(-1, torch.ones(2), 1.0), "Shift has layer -1: expected a whole number >= 0"),
        (lambda: Shift(0, torch.ones(2, 2), 1.0), "Shift has direction of shape (2, 2)"),
        (lambda: Shift(0, torch.tensor([math.nan]), 1.0), "Shift has direction with NaN"),
        (lambda: Shift(0, "north", 1.0), "Shift has direction of type str"),
        (lambda: Shift(0, None, 1.0), "Shift lacks direction"),
        (lambda: Shift(0, torch.ones(2), math.inf), "Shift has strength inf: expected a finite number"),
        (lambda: Shift(0, torch.ones(2), "1"), "Shift has strength '1'"),
        (lambda: edit("push"), "latent edit has mode 'push': expected one of add, scale, clamp"),
        (lambda: edit(values=(1.0,)), "LatentEdit has values of shape (1,): expected (3,)"),
        (
            lambda: LatentEdit.from_sae(random_sae(), [1, 2], torch.ones(2), reconstruct=True),
            "needs every latent",
        ),
        (lambda: LatentEdit.from_sae(random_sae(activation="topk"), [1], torch.ones(1)), "no threshold form"),
        (
            lambda: LatentEdit(
                0,
                torch.ones(1, 2),
                torch.ones(1),
                torch.ones(1),
                torch.ones(1, 2),
                "add",
                torch.ones(1),
                1.0,
                reconstruct=True,
            ),
            "needs b_dec",
        ),
        (
            lambda: LatentEdit(
                0,
                torch.ones(1, 2),
                torch.ones(1),
                torch.ones(1),
                torch.ones(1, 3),
                "add",
                torch.ones(1),
                1.0,
            ),
            "LatentEdit has W_dec of shape (1, 3): expected (1, 2)",
        ),
        (lambda: LatentEdit.from_sae(random_sae(), [1, 25], torch.ones(2)), "no latent 25: expected 0 to 19"),
    ],
)
def test_bad_parts(call, message):
    with pytest.raises(UsageError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)

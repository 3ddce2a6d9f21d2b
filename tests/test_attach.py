import copy
import gc
import logging
import pickle
import weakref

import numpy as np
import pytest
import torch
from conftest import make_tiny_whisper
from tiny import OPTIONS, footprint, latents, manual, mel, same_result, says, shift

from whisper_steer import attach, zoo
from whisper_steer.attach import check_alpha, handles_of, steer
from whisper_steer.errors import MismatchError, UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.registry import registry_of
from whisper_steer.steering import Shift, Steering

# ---------- alpha


def test_alpha_zero_is_plain_whisper_bit_for_bit(tiny_whisper):
    x = mel(shape=(1, 80, 3000))
    plain, result = tiny_whisper.encoder(x), tiny_whisper.decode(mel(), OPTIONS)
    with steer(tiny_whisper, alpha=0, steering=Steering((shift(), latents(2)), says(True))) as handle:
        assert torch.equal(tiny_whisper.encoder(x), plain)
        same_result(tiny_whisper.decode(mel(), OPTIONS), result)
        assert handle.withheld == []


def test_alpha_is_live(tiny_whisper):
    x = mel(shape=(1, 80, 3000))
    plain = tiny_whisper.encoder(x)
    with steer(tiny_whisper, alpha=0.5, steering=Steering((shift(3),))) as handle:
        half = tiny_whisper.encoder(x)
        handle.alpha = 1
        assert handle.alpha == 1.0
        whole = tiny_whisper.encoder(x)
        handle.alpha = 0
        assert torch.equal(tiny_whisper.encoder(x), plain)
    assert not torch.equal(half, whole) and not torch.equal(half, plain)


def test_alpha_is_read_once_per_decoding(tiny_whisper):
    """A change while the encoder runs holds from the next window on."""
    steering = Steering((shift(1), shift(3)))
    with steer(tiny_whisper, alpha=1.0, steering=steering):
        expected = tiny_whisper.decode(mel(), OPTIONS)
    with steer(tiny_whisper, alpha=1.0, steering=steering) as handle:
        hook = tiny_whisper.encoder.blocks[2].register_forward_hook(lambda *a: setattr(handle, "alpha", 0.0))
        same_result(tiny_whisper.decode(mel(), OPTIONS), expected)
        hook.remove()


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf"), "abc", "1", True, [1], 1j])
def test_bad_alphas(tiny_whisper, alpha):
    steering = Steering((shift(),))
    with pytest.raises(UsageError) as error:
        steer(tiny_whisper, alpha=alpha, steering=steering)
    assert f"alpha is {alpha!r}: expected a finite number >= 0" in str(error.value)
    assert handles_of(tiny_whisper) == ()
    with steer(tiny_whisper, alpha=0.5, steering=steering) as handle:
        with pytest.raises(UsageError):
            handle.alpha = alpha
        assert handle.alpha == 0.5


@pytest.mark.parametrize("alpha", [0, 1, 0.25, np.float32(0.25), np.int64(1)])
def test_good_alphas(alpha):
    assert check_alpha(alpha) == float(alpha) and type(check_alpha(alpha)) is float


def test_above_one_is_warned_about_once(monkeypatch, caplog):
    monkeypatch.setattr(attach, "_warned_above_one", False)
    with caplog.at_level(logging.WARNING, "whisper_steer"):
        assert [check_alpha(a) for a in (1.0, 1.5, 2.0)] == [1.0, 1.5, 2.0]
    assert [record.getMessage() for record in caplog.records] == [
        "alpha 1.5 is above 1, the strongest calibrated setting: speech may be lost"
    ]


# ---------- putting on and taking off


def test_remove_restores_the_model_exactly(tiny_whisper):
    x, before = mel(shape=(1, 80, 3000)), footprint(tiny_whisper)
    plain = tiny_whisper.encoder(x)
    weights = {name: value.clone() for name, value in tiny_whisper.state_dict().items()}
    handle = steer(tiny_whisper, steering=Steering((shift(), latents(3)), says(False)))
    assert handles_of(tiny_whisper) == (handle,) and "decode" in tiny_whisper.__dict__
    tiny_whisper.decode(mel(), OPTIONS)
    handle.remove()
    handle.remove()
    assert footprint(tiny_whisper) == before
    assert handles_of(tiny_whisper) == () and registry_of(tiny_whisper) is None
    assert torch.equal(tiny_whisper.encoder(x), plain)
    assert all(
        torch.equal(a.to_dense(), b.to_dense())
        for a, b in zip(tiny_whisper.state_dict().values(), weights.values(), strict=True)
    )
    assert "removed" in repr(handle)


def test_the_context_manager_removes_also_after_an_exception(tiny_whisper):
    before = footprint(tiny_whisper)
    with pytest.raises(RuntimeError, match="stop"), steer(tiny_whisper, steering=Steering((shift(),))):
        raise RuntimeError("stop")
    assert footprint(tiny_whisper) == before


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_nested_handles_compose_and_go_in_any_order(tiny_whisper, order):
    x, before = mel(shape=(1, 80, 3000)), footprint(tiny_whisper)
    parts = [Steering((latents(1),)), Steering((shift(1), latents(2))), Steering((shift(3),), says(True))]
    alphas = [1.0, 0.5, 0.25]

    def expected(active):
        layers = {}
        for number in (1, 2, 3):
            edits = [(s, a) for i, (s, a) in enumerate(zip(parts, alphas, strict=True)) if i in active]

            def apply(h, number=number, edits=edits):
                for s, a in edits:
                    h = s.edit(h, number, a)
                return h

            layers[number] = apply
        return manual(tiny_whisper, x, layers)

    handles = [steer(tiny_whisper, alpha=a, steering=s) for s, a in zip(parts, alphas, strict=True)]
    assert handles_of(tiny_whisper) == tuple(handles)
    active = {0, 1, 2}
    for number in order:
        # blocks called one by one are not steered: `manual` on a steered model is the plain encoder
        torch.testing.assert_close(tiny_whisper.encoder(x), expected(active))
        handles[number].remove()
        active.remove(number)
    assert footprint(tiny_whisper) == before


def test_any_gate_may_withhold(tiny_whisper):
    first = steer(tiny_whisper, steering=Steering((shift(2),), says(False)))
    second = steer(tiny_whisper, steering=Steering((), says(True)))
    assert tiny_whisper.decode(mel(), OPTIONS).text == ""
    assert (len(first.withheld), len(second.withheld)) == (0, 1)
    second.alpha = 0
    assert tiny_whisper.decode(mel(), OPTIONS).text != ""


def test_a_decode_that_was_put_on_the_model_before_is_used_and_restored(tiny_whisper):
    calls = []
    plain = tiny_whisper.decode

    def counting(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    tiny_whisper.decode = counting
    with steer(tiny_whisper, steering=Steering((shift(),))):
        tiny_whisper.decode(mel(), OPTIONS)
    assert len(calls) == 1 and tiny_whisper.decode is counting


def test_a_decode_that_was_put_on_top_is_left_and_still_works(tiny_whisper, caplog):
    result = tiny_whisper.decode(mel(), OPTIONS)
    handle = steer(tiny_whisper, steering=Steering((shift(),), says(True)))
    inner = tiny_whisper.decode
    tiny_whisper.decode = lambda *args, **kwargs: inner(*args, **kwargs)
    with caplog.at_level(logging.WARNING, "whisper_steer"):
        handle.remove()
    assert "model.decode was replaced" in caplog.text
    same_result(tiny_whisper.decode(mel(), OPTIONS), result)


def test_a_steered_model_cannot_be_copied_but_its_weights_can(tiny_whisper):
    with steer(tiny_whisper, steering=Steering((shift(),))):
        for copying in (copy.deepcopy, pickle.dumps):
            with pytest.raises(UsageError, match="remove"):
                copying(tiny_whisper)
        assert len(tiny_whisper.state_dict()) == len(make_tiny_whisper().state_dict())
    copy.deepcopy(tiny_whisper)


def test_steering_keeps_no_model_alive():
    model = make_tiny_whisper(1)
    handle = steer(model, steering=Steering((shift(),), says(True)))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    handle.remove()


def test_steering_of_another_model_leaves_no_hook(tiny_whisper):
    before = footprint(tiny_whisper)
    with pytest.raises(MismatchError):
        steer(tiny_whisper, steering=Steering((Shift(0, torch.ones(32), 1.0),)))
    other = model_metadata(make_tiny_whisper(7))
    with pytest.raises(MismatchError, match="of the same shape"):
        steer(tiny_whisper, steering=Steering((shift(),), metadata=other))
    assert footprint(tiny_whisper) == before


def test_a_file_is_loaded(tiny_whisper, tmp_path):
    path = tmp_path / "mine.safetensors"
    Steering((shift(),), metadata=model_metadata(tiny_whisper)).save(path)
    for given in (path, str(path)):
        with steer(tiny_whisper, steering=given) as handle:
            assert handle.steering.metadata["name"] == "mine"
            assert repr(handle) == "<Handle mine alpha=1>"


def test_without_a_steering_the_bundled_one_is_taken(tiny_whisper, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "bundled_dir", lambda: tmp_path)
    monkeypatch.setattr(zoo, "cache_dir", lambda: tmp_path / "none")
    folder = tmp_path / "mini.en"
    folder.mkdir()
    with pytest.raises(
        MismatchError, match=r"no steering is kept for this model, which has no name \(d_model 64"
    ):
        steer(tiny_whisper)
    Steering((shift(),), metadata=model_metadata(tiny_whisper)).save(folder / "steering.safetensors")
    Steering((shift(2),)).save(folder / "steering-other.safetensors")
    with steer(tiny_whisper) as handle:  # recognised by its weights
        assert handle.steering.layers == (1,)
    tiny_whisper.name = "mini.en"
    with steer(tiny_whisper) as handle, steer(tiny_whisper, steering="other") as other:
        assert (handle.steering.layers, other.steering.layers) == ((1,), (2,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: steer("small", steering=Steering((shift(),))),
            "model is a str: expected an openai-whisper Whisper",
        ),
        (lambda m: steer(m, steering=3), "steering is a int: expected a Steering, a file or a name"),
    ],
)
def test_wrong_kinds(tiny_whisper, call, message):
    with pytest.raises(UsageError) as error:
        call(tiny_whisper)
    assert message in str(error.value)

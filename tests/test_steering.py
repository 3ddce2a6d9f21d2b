import logging

import pytest
import safetensors.torch
import torch
from test_gate import latent_gate, raw_gate
from test_sae import frames, hand_made, random_sae

from whisper_steer import steering as steering_module
from whisper_steer.errors import FormatError, MismatchError, UsageError
from whisper_steer.fileformat import encoder_sha256, load_tensors, model_metadata, save_tensors
from whisper_steer.steering import Gate, LatentEdit, Shift, Steering


def full_steering(**metadata):
    sae = hand_made()
    edits = (
        LatentEdit.from_sae(sae, [2, 0], torch.tensor([0.5, -1.0]), strength=0.3),
        Shift(1, torch.tensor([1.0, 2.0]), 0.1),
        LatentEdit.from_sae(sae, None, torch.ones(3), mode="clamp", reconstruct=True),
    )
    return Steering(edits, latent_gate(smooth=25), {"name": "full", **metadata})


def same_part(found, expected):
    assert type(found) is type(expected)
    for name, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(found, name), value), name
        else:
            assert getattr(found, name) == value, name


# ---------- behaviour


def test_edits_apply_in_order_at_their_layer():
    x = frames(shape=(1, 3, 2))
    steering = full_steering()
    first, _, third = steering.edits
    assert torch.equal(steering.edit(x, 0, 0.5), third(first(x, 0.5), 0.5))
    assert torch.equal(steering.edit(x, 1, 0.5), steering.edits[1](x, 0.5))
    assert steering.edit(x, 2, 0.5) is x and steering.edit(x, 0, 0.0) is x


def test_frame_gate_scales_every_edit():
    x = frames(shape=(1, 3, 2))
    steering = Steering((Shift(0, torch.ones(2), 1.0), Shift(0, torch.ones(2), 2.0)))
    torch.testing.assert_close(
        steering.edit(x, 0, 1.0, torch.tensor([[0.0, 0.5, 1.0]])),
        x + 3 * torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1),
    )


def same_gate(found, expected):
    for one, other in zip(found.probes, expected.probes, strict=True):
        same_part(one, other)
    for name in ("intercept", "smooth", "threshold", "spread", "frame_scale", "frame_bias", "min_run"):
        assert getattr(found, name) == getattr(expected, name)


def test_layers_before_the_gate_are_early():
    steering = Steering((Shift(1, torch.ones(2), 1.0), Shift(2, torch.ones(2), 1.0)), latent_gate(layer=2))
    assert steering.early_layers == (1,) and steering.layers == (1, 2)
    assert Steering((Shift(1, torch.ones(2), 1.0),)).early_layers == ()


def test_layers_and_width():
    assert full_steering().layers == (0, 1) and full_steering().d_model == 2
    assert Steering((), raw_gate(5, layer=3)).layers == (3,)


def test_to_keeps_everything_but_the_device():
    moved = full_steering().to("cpu")
    for found, expected in zip(moved.edits, full_steering().edits, strict=True):
        same_part(found, expected)
    same_gate(moved.gate, full_steering().gate)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Steering(()), "at least one edit or a gate"),
        (
            lambda: Steering((Shift(0, torch.ones(2), 1.0), Shift(0, torch.ones(3), 1.0))),
            "different d_model: 2, 3",
        ),
    ],
)
def test_bad_steerings(call, message):
    with pytest.raises(UsageError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


# ---------- files


def test_round_trip(tmp_path):
    steering = full_steering(base_model="mini.en", rates={"wer": 0.05})
    steering.save(tmp_path / "s.safetensors")
    again = Steering.load(tmp_path / "s.safetensors")
    assert len(again.edits) == 3
    for found, expected in zip(again.edits, steering.edits, strict=True):
        same_part(found, expected)
    same_gate(again.gate, steering.gate)
    assert again.metadata["name"] == "full" and again.metadata["rates"] == {"wer": 0.05}
    again.save(tmp_path / "t.safetensors")
    assert (tmp_path / "t.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()
    x = frames(shape=(1, 4, 2))
    assert torch.equal(again.edit(x, 0, 0.7), steering.edit(x, 0, 0.7))


def test_round_trip_of_a_raw_gate_alone_and_of_edits_alone(tmp_path):
    for steering in (Steering((), raw_gate(3)), Steering((Shift(2, torch.ones(3), 1.0),))):
        steering.save(tmp_path / "s")
        again = Steering.load(tmp_path / "s")
        assert (again.gate is None) == (steering.gate is None) and len(again.edits) == len(steering.edits)
        if steering.gate is not None:
            same_gate(again.gate, steering.gate)


def test_metadata_of_a_file(tmp_path):
    Steering((Shift(2, torch.ones(3), 0.5),)).save(tmp_path / "mine.safetensors")
    _, metadata = load_tensors(tmp_path / "mine.safetensors", "steering")
    del metadata["package_version"]
    assert metadata == {
        "format_version": 1,
        "kind": "steering",
        "name": "mine",
        "base_model": None,
        "encoder_sha256": None,
        "d_model": 3,
        "n_layers": None,
        "layers": [2],
        "calibrated_on": {},
        "rates": {},
        "licence": "MIT",
        "recipe": {},
        "edits": [{"type": "shift", "layer": 2, "strength": 0.5}],
        "gate": None,
    }


def test_a_steering_file_carries_only_the_rows_it_needs(tmp_path):
    sae = random_sae(d=8, n=500)
    Steering((LatentEdit.from_sae(sae, [3, 400], torch.ones(2)),)).save(tmp_path / "s")
    assert (tmp_path / "s").stat().st_size < 3000


def test_corrupt_foreign_and_other_kinds(tmp_path):
    path = tmp_path / "s.safetensors"
    full_steering().save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FormatError, match="not a readable safetensors file"):
        Steering.load(path)
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    with pytest.raises(FormatError, match="of another program: expected a whisper-steer steering file"):
        Steering.load(path)
    random_sae().save(path)
    with pytest.raises(FormatError, match="is a sae file: expected a whisper-steer steering file"):
        Steering.load(path)
    with pytest.raises(FormatError, match="does not exist"):
        Steering.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("edits"), "damaged inside"),
        (lambda t, m: m["edits"][1].update(type="twist"), "damaged inside ('twist')"),
        (lambda t, m: m["edits"][1].update(colour="red"), "colour"),
        (lambda t, m: m.update(edits=7), "damaged inside"),
        (lambda t, m: m["edits"].insert(0, "x"), "damaged inside"),
        (lambda t, m: t.pop("edits.1.direction"), "direction"),
        (lambda t, m: t.update({"edits.1.direction": torch.ones(5)}), "different d_model"),
        (lambda t, m: t["gate.probes.0.coef"].fill_(float("inf")), "Probe has coef with NaN"),
        (lambda t, m: m["gate"].update(smooth=2), "gate has smooth 2"),
        (lambda t, m: m["gate"].pop("threshold"), "threshold"),
        (lambda t, m: m.update(gate=[]), "damaged inside"),
    ],
)
def test_inconsistent_files(tmp_path, change, message):
    path = tmp_path / "s.safetensors"
    full_steering().save(path)
    tensors, metadata = load_tensors(path)
    change(tensors, metadata)
    save_tensors(path, tensors, metadata)
    with pytest.raises(FormatError) as error:
        Steering.load(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


# ---------- is it for this model?


def shift_for(model, **changes):
    return Steering((Shift(1, torch.ones(64), 1.0),), metadata={**model_metadata(model), **changes})


def test_check_accepts_its_model(tiny_whisper):
    shift_for(tiny_whisper).check(tiny_whisper)
    Steering((Shift(3, torch.ones(64), 1.0),)).check(tiny_whisper)  # made by hand, without metadata


def test_check_names_both_models(tiny_whisper):
    tiny_whisper.name = "mini.en"
    small = Steering(
        (Shift(11, torch.ones(768), 1.0),),
        metadata={"base_model": "small", "n_layers": 12, "encoder_sha256": "x"},
    )
    with pytest.raises(MismatchError) as error:
        small.check(tiny_whisper)
    assert str(error.value) == (
        "steering is for small (d_model 768, 12 blocks), the model is mini.en (d_model 64, 4 blocks): "
        "pass steering=... made for it, or make one: whisper-steer calibrate --model mini.en "
        "--nonspeech DIR --speech MANIFEST --out FILE"
    )
    with pytest.raises(MismatchError):
        small.check(tiny_whisper, strict=False)


def test_check_of_a_layer_that_the_model_lacks(tiny_whisper):
    with pytest.raises(MismatchError, match="at least 5 blocks"):
        Steering((Shift(4, torch.ones(64), 1.0),)).check(tiny_whisper)
    with pytest.raises(MismatchError, match="12 blocks"):
        shift_for(tiny_whisper, n_layers=12).check(tiny_whisper)


def test_check_of_other_weights_of_the_same_shape(tiny_whisper, caplog):
    steering = shift_for(tiny_whisper, base_model="mini.en")
    before = encoder_sha256(tiny_whisper)
    tiny_whisper.encoder.blocks[0].mlp[0].bias[0] += 1
    with pytest.raises(MismatchError) as error:
        steering.check(tiny_whisper)
    assert before[:12] in str(error.value) and encoder_sha256(tiny_whisper)[:12] in str(error.value)
    assert "of the same shape" in str(error.value) and "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING, "whisper_steer"):
        steering.check(tiny_whisper, strict=False)
    assert "not calibrated" in caplog.text


def test_the_parts_can_be_imported_from_here():
    assert set(steering_module.__all__) == {
        "Edit", "FrontierPoint", "Gate", "LatentEdit", "MeanAblation", "Probe", "Shift", "Steering",
    }  # fmt: skip
    assert Gate.__module__ == "whisper_steer.gate"

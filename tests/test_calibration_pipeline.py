"""fit and sweep from end to end on a tiny model: the mechanics, not the quality."""

import json

import numpy as np
import pytest
import torch
from calibration_tools import clips, make_terse_whisper, sound

from calibration import edit_fit, fit, gate_fit, sweep
from calibration.decoding import transcribe_clips
from calibration.hallucinations import label_clips
from calibration.hearing import Calibration, Effort
from calibration.selection import Budget
from calibration.training_clips import TrainingClip
from whisper_steer.attach import handles_of, steer
from whisper_steer.errors import FormatError, MismatchError, UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.steering import Steering


def make_clip(kind, index):
    name = f"train-{kind}-{index}"
    intervals = ((0.0, 2.0),) if kind == "speech" else ()
    return TrainingClip(name, kind, kind, lambda: (sound(name, 2.0, speech=kind == "speech"), intervals))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A model, SAEs of both layers, calibration clips with labels, and a finished fit of them."""
    model = make_terse_whisper(1)
    sets = clips(6, 10)
    everything = [clip for group in sets.values() for clip in group]
    labels = label_clips(model, everything, progress=False)
    # random weights hallucinate on everything and hear nothing right: give the speech what the model wrote
    sets["speech"] = [
        type(c)(c.id, c.kind, c.seconds, labels[c.id].text, c.speech_intervals) for c in sets["speech"]
    ]
    folder = tmp_path_factory.mktemp("saes")
    saes = []
    for layer in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(layer)
            sae = SparseAutoencoder(32, 64, k=8, layer=layer, metadata=model_metadata(model))
        sae.save(folder / f"layer_{layer:02d}.safetensors")
    saes = fit.load_saes(folder, model)
    training = [make_clip(kind, i) for kind in ("speech", "nonspeech") for i in range(6)]
    sample = gate_fit.collect_gate_frames(model, training, progress=False)
    gates = fit.fit_gates(saes, sample, progress=False)
    table, pooled = fit.measure_windows(model, saes, gates, sets, labels, progress=False)
    nonspeech = np.array([not clip.is_speech for clip in table.clips])
    edits = fit.fit_edits(saes, pooled, [labels[clip.id] for clip in table.clips], nonspeech)
    out = tmp_path_factory.mktemp("fit")
    record = {"seed": 0, "gate_frames": sample.counts, "calibrated_on": {"speech": {"clips": 6}}, "saes": []}
    fit.write_fit(out, model, gates, edits, table, record)
    return model, sets, labels, out, (gates, edits, table), folder


def test_saes_must_be_there_and_belong_to_the_model(setting, tmp_path):
    folder = setting[5]
    with pytest.raises(FormatError, match="layer_00.safetensors does not exist"):
        fit.load_saes(tmp_path, setting[0])
    with pytest.raises(MismatchError, match="another encoder"):
        fit.load_saes(folder, make_terse_whisper(2))


def test_every_layer_gets_gates_and_edits(setting):
    gates, edits, _ = setting[4]
    assert {"raw_l0", "raw_l1", "latents_l0_m16", "latents_l1_m32"} <= set(gates)
    assert {f"{form}_l{layer}" for form in ("svector", "meandiff") for layer in (0, 1)} <= set(edits)
    assert {"additive_l1_k10", "additive_l0_k50", "audiosae_l1_k10", "audiosae_l0_k100"} <= set(edits)
    edit, recipe = edits["additive_l1_k10"]
    assert edit.layer == 1 and len(edit.values) == 10 and recipe["k"] == 10
    # everything hallucinates here by every definition
    assert recipe["contrast"] == "speech" and "instead" in recipe["contrast_reason"]


def test_the_window_table_holds_what_the_gates_say(setting):
    model, sets, _, _, (gates, _, table), _ = setting
    clip = table.clips[7]
    assert clip.set == "tones" and not clip.is_speech
    audio = sets["tones"][1].load()
    from calibration.activations import encode_clip

    x = encode_clip(model, audio).windows
    for name in ("raw_l0", "latents_l1_m16"):
        expected = gates[name].frame_logits(x[gates[name].layer])[0]
        np.testing.assert_allclose(table.logits[name][clip.rows[0]], expected.numpy(), rtol=1e-3, atol=1e-3)
    assert (table.targets[clip.rows[0]][:100] == gate_fit.NOBODY).all()
    assert (table.targets[clip.rows[0]][100:] == gate_fit.UNCLEAR).all()
    speech = table.targets[table.clips[0].rows[0]]
    assert (speech[:100] == gate_fit.SPEECH).sum() > 80 and (speech[100:] == gate_fit.UNCLEAR).all()


def test_pooled_latents_leave_padding_out(setting):
    model, sets, labels, _, (gates, _, _), folder = setting
    saes = fit.load_saes(folder, model)
    _, pooled = fit.measure_windows(model, saes, {}, {"tones": sets["tones"][:1]}, labels, progress=False)
    from calibration.activations import encode_clip

    frames = encode_clip(model, sets["tones"][0].load()).frames[1]
    expected = edit_fit.pool_frames(saes[1], frames)
    np.testing.assert_allclose(pooled[1].latents[0], expected[0], rtol=1e-3, atol=1e-3)


def test_a_fit_is_read_back(setting):
    model, sets, labels, out, (gates, edits, table), _ = setting
    found = fit.read_fit(out, model, sets, labels)
    assert set(found.gates) == set(gates) and set(found.edits) == set(edits)
    assert found.table.clips == table.clips
    for name, values in table.logits.items():
        assert np.array_equal(found.table.logits[name], values)
    torch.testing.assert_close(found.edits["svector_l1"].direction, edits["svector_l1"][0].direction)
    assert found.recipes["additive_l0_k10"]["k"] == 10


def test_a_fit_of_something_else_is_refused(setting, tmp_path):
    model, sets, labels, out, _, _ = setting
    with pytest.raises(FormatError, match="holds no finished fit"):
        fit.read_fit(tmp_path, model, sets, labels)
    with pytest.raises(UsageError, match="fitted on other clips"):
        fit.read_fit(out, model, {"speech": sets["speech"]}, labels)
    with pytest.raises(MismatchError):
        fit.read_fit(out, make_terse_whisper(2), sets, labels)


@pytest.fixture(scope="module")
def calibration(setting):
    model, sets, labels, out, _, _ = setting
    found = fit.read_fit(out, model, sets, labels)
    return Calibration(model, sets, found, Budget(), Effort(screened=3, finalists=1, heard=3))


def test_sweep_finds_a_gate_and_an_edit_and_says_what_they_do(setting, calibration, tmp_path):
    model, sets = setting[:2]
    choice = sweep.find_gate(calibration, "latents")
    assert (
        choice.gate.kind == "latents" and choice.result.text_fpr == 0.0
    )  # noise bursts and tones are easy to tell
    assert choice.result.wer == 0.0
    steering, heard, record = sweep.find_winner(calibration, choice, progress=False)
    assert heard.rise <= 0.002
    final = sweep.finish(calibration, steering, heard, record, "default")
    path = tmp_path / "steering.safetensors"
    final.save(path)
    loaded = Steering.load(path)
    loaded.check(model)
    sets_rates = loaded.metadata["rates"]["sets"]
    assert sets_rates["tones"]["text_fpr"] == 0.0 and sets_rates["tones"]["plain"]["text_fpr"] == 1.0
    assert sets_rates["speech"]["wer"] == 0.0 and sets_rates["speech"]["wrongly_emptied"] == 0.0
    assert sets_rates["all_nonspeech"]["clips"] == 10
    assert loaded.metadata["recipe"]["gate"] == choice.name
    json.dumps(loaded.metadata)
    # what was computed from cached logits is what a steered model does
    with steer(model, steering=loaded):
        texts = [t.text for t in transcribe_clips(model, [clip.load() for clip in sets["tones"]])]
    assert texts == [""] * 10
    assert not handles_of(model)


def test_sweep_writes_the_papers_recipe_by_its_own_budget(calibration):
    steering, heard, record = sweep.find_audiosae(calibration, progress=False)
    assert steering.gate is None
    (edit,) = steering.edits
    assert edit.reconstruct and len(edit.values) == 64 and edit.strength > 0
    # random SAEs reconstruct nothing: even the weakest setting costs words, and the record says so
    assert record["within_budget"] == (heard.rise <= 0.002)
    assert record["edit"]["form"] == "audiosae"


def test_when_no_edit_keeps_the_budget_the_gate_stays_alone(calibration, monkeypatch):
    choice = sweep.find_gate(calibration, "any")
    heard_with = []
    original = Calibration.hear

    def costly(self, steering, chosen, label, **options):
        found = original(self, steering, chosen, label, **options)
        heard_with.append(steering)
        return type(found)(found.transcripts, 1.0, 0.0, 1.0) if steering.edits else found

    monkeypatch.setattr(Calibration, "hear", costly)
    steering, heard, record = sweep.find_winner(calibration, choice, progress=False)
    assert steering.edits == () and steering.gate is choice.gate and record["edit"] is None
    # the strength was halved before giving up
    strengths = [s.edits[0].strength for s in heard_with if s.edits]
    assert strengths == [pytest.approx(strengths[0] / 2**i) for i in range(4)]


def test_gate_kind_must_exist(calibration):
    import dataclasses

    only_raw = dataclasses.replace(calibration.fit, gates={"raw_l0": calibration.fit.gates["raw_l0"]})
    other = Calibration.__new__(Calibration)
    other.__dict__.update(calibration.__dict__, fit=only_raw)
    with pytest.raises(UsageError, match="no gate of kind 'latents'"):
        sweep.find_gate(other, "latents")

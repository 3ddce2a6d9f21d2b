"""fit and sweep from end to end on a tiny model: the mechanics, not the quality."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from calibration_tools import clips, make_terse_whisper, sound

from calibration import edit_fit, fit, gate_fit, sweep, winners
from calibration.decoding import transcribe_clips
from calibration.edit_candidates import best_in_gaps, fit_to_budget, pick_finalists
from calibration.fit_again import fit_of, with_edits_of
from calibration.fit_files import read_fit, write_fit
from calibration.gated_hearing import GatedHearing
from calibration.hallucinations import label_clips
from calibration.hearing import Calibration, Effort, Heard
from calibration.refit import deal_folds, refit
from calibration.screening import Candidate, Effect
from calibration.selection import Budget
from calibration.training_clips import TrainingClip
from calibration.window_table import measure_windows
from whisper_steer.attach import handles_of, steer
from whisper_steer.errors import FormatError, MismatchError, UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.steering import MeanAblation, Shift, Steering


def make_clip(kind, index):
    name = f"train-{kind}-{index}"
    intervals = ((0.0, 2.0),) if kind == "speech" else ()
    return TrainingClip(name, kind, "clean", lambda: (sound(name, 2.0, speech=kind == "speech"), intervals))


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
    training = [make_clip(kind, i) for kind in ("speech", "nonspeech") for i in range(8)]
    by_layer = {sae.layer: sae for sae in saes}
    fitted = fit.fit_parts(model, by_layer, training, sets, labels, progress=False)
    fitted.record["calibrated_on"] = {"speech": {"clips": 6}}
    out = tmp_path_factory.mktemp("fit")
    write_fit(out, model, fitted)
    return model, sets, labels, out, fitted, folder


def test_saes_must_be_there_and_belong_to_the_model(setting, tmp_path):
    folder = setting[5]
    with pytest.raises(FormatError, match="layer_00.safetensors does not exist"):
        fit.load_saes(tmp_path, setting[0])
    with pytest.raises(MismatchError, match="another encoder"):
        fit.load_saes(folder, make_terse_whisper(2))


def test_every_layer_gets_gates_and_edits(setting):
    gates, edits = setting[4].gates, setting[4].edits
    assert {"raw_l0", "raw_l1", "latents_l0_m16", "latents_l1_m32"} <= set(gates)
    assert {"raw_l0+l1", "latents_l0+l1_m32"} <= set(gates) and gates["raw_l0+l1"].layers == (0, 1)
    assert {f"{form}_l{layer}" for form in ("svector", "meandiff") for layer in (0, 1)} <= set(edits)
    assert {"additive_l1_k10", "additive_l0_k50", "audiosae_l1_k10", "audiosae_l0_k100"} <= set(edits)
    assert {"silence_l0", "silence_l1", "causal_l0_k4", "causal_l1_k16"} <= set(edits)
    edit, recipe = edits["additive_l1_k10"], setting[4].recipes["additive_l1_k10"]
    assert edit.layer == 1 and len(edit.values) == 10 and recipe["k"] == 10
    # everything hallucinates here by every definition
    assert recipe["contrast"] == "speech" and "instead" in recipe["contrast_reason"]


def test_the_window_table_holds_what_the_gates_say(setting):
    model, sets, _, _, fitted, _ = setting
    gates, table = fitted.gates, fitted.table
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
    model, sets, labels, _, _, folder = setting
    saes = fit.load_saes(folder, model)
    one = {"tones": sets["tones"][:1]}
    _, pooled = measure_windows(model, {0: None, 1: saes[1]}, {}, one, labels, progress=False)
    from calibration.activations import encode_clip

    frames = encode_clip(model, sets["tones"][0].load()).frames[1]
    expected = edit_fit.pool_frames(saes[1], frames)
    np.testing.assert_allclose(pooled[1].latents[0], expected[0], rtol=1e-3, atol=1e-3)
    assert pooled[0].latents.shape == (1, 0) and pooled[0].mean.shape == (1, 32)  # no SAE: means alone


def test_a_fit_is_read_back(setting):
    model, sets, labels, out, fitted, _ = setting
    found = read_fit(out, model, sets, labels)
    assert set(found.gates) == set(fitted.gates) and set(found.edits) == set(fitted.edits)
    assert found.table.clips == fitted.table.clips
    for name, values in fitted.table.logits.items():
        assert np.array_equal(found.table.logits[name], values)
    torch.testing.assert_close(found.edits["svector_l1"].direction, fitted.edits["svector_l1"].direction)
    assert np.array_equal(found.sample.nobody, fitted.sample.nobody)
    torch.testing.assert_close(found.sample.x[1], fitted.sample.x[1].half().float())
    assert found.recipes["additive_l0_k10"]["k"] == 10


def test_a_fit_of_something_else_is_refused(setting, tmp_path):
    model, sets, labels, out, _, _ = setting
    with pytest.raises(FormatError, match="holds no finished fit"):
        read_fit(tmp_path, model, sets, labels)
    with pytest.raises(UsageError, match="fitted on other clips"):
        read_fit(out, model, {"speech": sets["speech"]}, labels)
    with pytest.raises(MismatchError):
        read_fit(out, make_terse_whisper(2), sets, labels)


@pytest.fixture(scope="module")
def calibration(setting):
    model, sets, labels, out, _, _ = setting
    found = read_fit(out, model, sets, labels)
    effort = Effort(screened=3, finalists=1, heard=3, joined=2, frontier=8)
    return Calibration.of(model, sets, found, Budget(), effort, progress=False)


@pytest.fixture(scope="module")
def latent_gate(calibration):
    return winners.find_gate(calibration, "latents", refitted=False)


def test_sweep_finds_a_gate_and_an_edit_and_says_what_they_do(setting, calibration, latent_gate, tmp_path):
    model, sets = setting[:2]
    choice, logits = latent_gate
    # noise bursts and tones are easy to tell
    assert choice.gate.kind == "latents" and choice.result.text_fpr == 0.0
    assert choice.result.wer == 0.0
    chosen = winners.find_winner(calibration, choice, logits, progress=False)
    assert chosen.heard.rise_hi <= 0.001
    assert [finalist["name"] for finalist in chosen.record["finalists"]].count("gate alone") == 1
    final = winners.finish(calibration, chosen, "default", progress=False)
    assert [point["alpha"] for point in final.metadata["frontier"]] == [0.25, 0.5, 0.75, 1, 1.5, 2, 4]
    at_one = final.metadata["frontier"][3]
    assert at_one["text_fpr"] == 0.0 and at_one["wer_rise"] == chosen.heard.rise and at_one["clips"] == 16
    assert final.metadata["profiles"]["balanced"] == 1.0
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


def test_a_steering_file_can_be_chosen_again(setting, calibration, latent_gate, tmp_path):
    """Frame probes and edits as they are; smoothing and threshold come out as before, without a fit."""
    model, sets, labels, _, fitted, _ = setting
    choice, logits = latent_gate
    edit = dataclasses.replace(fitted.edits["svector_l1"], strength=0.1)
    recipe = {
        "gate": choice.name,
        "gates": [
            *choice.table,
            {"gate": choice.name, "window_share": 1.0},
            {"gate": choice.name, "kernel_share": 1.0},
        ],
        "edit": {"name": "svector_l1", "recipes": [fitted.recipes["svector_l1"]]},
        "fit_seed": 7,
    }
    path = tmp_path / "steering.safetensors"
    Steering((edit,), choice.gate, {**model_metadata(model), "recipe": recipe}).save(path)
    again = fit_of(path, model, sets, labels, progress=False)
    assert list(again.gates) == [choice.name] and list(again.edits) == ["svector_l1"]
    np.testing.assert_allclose(again.table.logits[choice.name], logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(again.edits["svector_l1"].direction, edit.direction)
    assert again.recipes["svector_l1"]["form"] == "svector" and again.record["seed"] == 7
    assert [row["gate"] for row in again.record["earlier_gates"]] == [row["gate"] for row in choice.table]
    once_more = Calibration.of(model, sets, again, Budget(), calibration.effort, progress=False)
    chosen, _ = winners.find_gate(once_more, "any", refitted=False)
    assert chosen.gate.smooth == choice.gate.smooth
    assert chosen.gate.threshold == pytest.approx(choice.gate.threshold, abs=1e-3)
    Steering((edit,), None, model_metadata(model)).save(path)
    with pytest.raises(UsageError, match="was not made by calibration.sweep with a gate: pass --fit"):
        fit_of(path, model, sets, labels, progress=False)


def test_a_gate_learns_windows_from_the_training_clips(calibration, latent_gate, tmp_path):
    training = [make_clip(kind, i) for kind in ("speech", "nonspeech") for i in range(8)]
    cache = tmp_path / "windows.npz"
    choice, _ = winners.find_gate(
        calibration, "latents", training=training, refitted=False, cache=cache, progress=False
    )
    alone = [row for row in choice.table if "kernel_share" not in row]
    tried = [row["window_share"] for row in alone if "window_share" in row]
    assert tried == [1.0, 2.0, 0.5] and cache.is_file()
    assert choice.over_budgets <= latent_gate[0].over_budgets
    assert choice.result.text_fpr == 0.0 and choice.result.wer == 0.0


def test_the_refitted_gate_is_judged_by_gates_that_have_not_seen_the_clip(setting, calibration, latent_gate):
    model, sets, _, _, fitted, _ = setting
    choice, logits = latent_gate
    again, out_of_fold = refit(
        model,
        choice,
        fitted.sample,
        calibration.clips,
        calibration.sources,
        len(logits),
        Budget(),
        progress=False,
    )
    assert out_of_fold.shape == logits.shape and np.isfinite(out_of_fold).all()
    assert [p.indices.tolist() for p in again.gate.probes] == [p.indices.tolist() for p in choice.gate.probes]
    assert not torch.equal(again.gate.probes[0].coef, choice.gate.probes[0].coef)
    assert {row.get("refitted", 0) for row in again.table} == {0, 1}
    assert again.result.text_fpr <= 0.1 and again.result.wer == 0.0


def test_groups_are_dealt_out_evenly_and_stay_together():
    def one(name, kind, group):
        return dataclasses.replace(clips(1, 0)["speech"][0], id=name, kind=kind, group=group)

    chosen = [one(f"s{i}", "speech", f"speaker{i % 7}") for i in range(21)]
    chosen += [one(f"n{i}", "nonspeech", "") for i in range(10)]
    owners = deal_folds(chosen)
    assert owners == deal_folds(chosen)
    for kind, size in (("speech", 21), ("nonspeech", 10)):
        mine = {clip.id: owner for clip, owner in zip(chosen, owners, strict=True) if clip.kind == kind}
        assert len(mine) == size and set(mine.values()) == set(range(5))
    assert all(owners[i] == owners[i + 7] == owners[i + 14] for i in range(7))
    assert max(deal_folds([*chosen[:3], *chosen[21:]])) == 2  # three speakers: three folds
    with pytest.raises(UsageError, match="1 groups of speech and 10 of other recordings"):
        deal_folds([chosen[0], *chosen[21:]])


def test_windows_are_withheld_by_the_logits_given(setting, calibration, latent_gate):
    choice, logits = latent_gate
    hearing = GatedHearing(calibration, choice.gate, choice.window_logits)
    plain = hearing.hear((), calibration.clips, "x", progress=False)
    assert all(plain.transcripts["tones", f"tones/{i}"].text == "" for i in range(10))
    assert plain.rise == 0.0 and plain.rise_hi == 0.0
    never = GatedHearing(calibration, choice.gate, np.full_like(choice.window_logits, -1e3))
    heard = never.hear((), calibration.clips, "x", progress=False)
    for clip in calibration.clips:
        assert heard.transcripts[clip.set, clip.id] == clip.transcript
    # an edit that turns every stream around changes what is heard where nothing is withheld
    loud = Shift(1, torch.linspace(-1, 1, 32), 50.0)
    open_gate = dataclasses.replace(choice.gate, frame_bias=-1e3, min_run=1)
    changed = never.with_gate(open_gate).hear((loud,), calibration.clips[:3], "x", progress=False)
    assert any(
        changed.transcripts[clip.set, clip.id].text != clip.transcript.text for clip in calibration.clips[:3]
    )


def test_sweep_writes_the_papers_recipe_by_its_own_budget(calibration):
    found = winners.find_audiosae(calibration, progress=False)
    assert found.steering.gate is None and found.hearing is None
    (edit,) = found.steering.edits
    assert edit.reconstruct and len(edit.values) == 64 and edit.strength > 0
    # random SAEs reconstruct nothing: even the weakest setting costs words, and the record says so
    assert found.record["within_budget"] == (found.heard.rise <= 0.001)
    assert found.record["edit"]["form"] == "audiosae"
    assert "profiles" not in winners.finish(calibration, found, "audiosae", progress=False).metadata


def test_when_no_edit_keeps_the_budget_the_gate_stays_alone(calibration, latent_gate, monkeypatch):
    choice, logits = latent_gate
    heard_with = []
    original = GatedHearing.hear

    def costly(self, edits, chosen, label, **options):
        found = original(self, edits, chosen, label, **options)
        if edits and chosen is not calibration.joined:
            heard_with.append(edits)
            return dataclasses.replace(found, wer=1.0, wer_plain=0.0, rise=1.0, rise_hi=1.0)
        return found

    monkeypatch.setattr(GatedHearing, "hear", costly)
    chosen = winners.find_winner(calibration, choice, logits, progress=False)
    assert chosen.steering.edits == () and chosen.steering.gate is choice.gate
    assert chosen.record["edit"] is None and heard_with


def test_a_finalist_that_must_be_made_weaker_competes_with_the_next_one(
    calibration, latent_gate, monkeypatch
):
    """In gaps `dear` is best, but of a whole budget only at a quarter of its strength; there `cheap` is."""
    choice, logits = latent_gate
    gap_errors = {("dear", 4.0): 0.2, ("dear", 1.0): 0.35, ("cheap", 4.0): 0.3}
    layers = {"dear": 0, "cheap": 1}

    def candidate(name):
        edits = (Shift(layers[name], torch.ones(calibration.model.dims.n_audio_state), 4.0),)
        return Candidate(name, edits, 1.0, 0.0, Effect(0, 0, 0, 0, 0))

    def hear(self, edits, clips, label, **options):
        if not edits:
            return Heard({(c.set, c.id): c.transcript for c in clips}, 0.4, 0.5, 0.0, 0.0)
        name, strength = next(n for n in layers if layers[n] == edits[0].layer), edits[0].strength
        transcripts = {(c.set, c.id): c.transcript for c in clips}
        if clips is calibration.joined:
            return Heard(transcripts, gap_errors[name, strength], 0.5, 0.0, 0.0)
        over = 0.5 if label == "checking the winner" and name == "dear" and strength > 1 else 0.0
        return Heard(transcripts, 0.1, 0.1, 0.0, 0.0, set_rise=over)

    monkeypatch.setattr(GatedHearing, "hear", hear)
    monkeypatch.setattr(winners, "screen_edits", lambda *args, **options: [candidate("dear")])
    monkeypatch.setattr(winners, "best_in_gaps", lambda heard, one: one)
    monkeypatch.setitem(calibration.fit.recipes, "dear", {"form": "dear"})
    monkeypatch.setitem(calibration.fit.recipes, "cheap", {"form": "cheap"})

    def chosen_of(*names):
        monkeypatch.setattr(winners, "pick_finalists", lambda *args: [candidate(name) for name in names])
        chosen = winners.find_winner(calibration, choice, logits, progress=False)
        checked = [(row["name"], row["min_run"], row.get("gap_wer")) for row in chosen.record["checked"]]
        (edit,) = chosen.steering.edits
        return edit, chosen.record["edit"]["recipes"], checked, chosen.steering.gate.min_run

    tried = [("dear", 50, None), ("dear", 50, None), ("dear", 100, 0.35)]
    for names in (("dear", "cheap"), ("cheap", "dear")):
        edit, recipes, checked, min_run = chosen_of(*names)
        assert (edit.layer, edit.strength, min_run) == (1, 4.0, 50) and recipes == [{"form": "cheap"}]
        assert checked == [*tried, ("cheap", 50, None)]
    edit, recipes, checked, min_run = chosen_of("dear")
    assert (edit.layer, edit.strength, min_run) == (0, 1.0, 100) and checked == tried
    gap_errors["dear", 1.0] = 0.25  # still better than the next one, which is not heard any more
    edit, _, checked, _ = chosen_of("dear", "cheap")
    assert edit.layer == 0 and [row[0] for row in checked] == ["dear"] * 3
    gap_errors["dear", 1.0] = 0.45  # worse than the gate alone
    assert chosen_of("dear", "cheap")[0].layer == 1


def test_strengths_are_halved_until_words_are_safe():
    edits = (MeanAblation(0, torch.zeros(1, 4)), Shift(1, torch.ones(4), 8.0))
    candidate = Candidate("both", edits, 1.0, 0.0, Effect(0, 0, 0, 0, 0))
    tried = []

    def hear(one):
        tried.append(one.edits[1].strength)
        rise = 0.0 if one.edits[1].strength <= 2 else 0.5
        return Heard({}, 0.0, 0.0, rise, rise)

    found, heard = fit_to_budget(hear, candidate, 0.001)
    assert tried == [8.0, 4.0, 2.0] and found.edits[1].strength == 2.0 and heard.rise == 0.0
    assert found.edits[0] is edits[0]  # silence is not made weaker
    tried.clear()
    silent = Candidate("silence", edits[:1], 1.0, 0.0, Effect(0, 0, 0, 0, 0))
    kept, heard = fit_to_budget(lambda one: Heard({}, 0, 0, 0.5, 0.5), silent, 0.001)
    assert kept is silent and heard.rise == 0.5


def test_an_edit_is_made_weaker_as_long_as_gaps_gain():
    candidate = Candidate("a", (Shift(1, torch.ones(4), 8.0),), 1.0, 0.0, Effect(0, 0, 0, 0, 0))
    errors = {8.0: 0.4, 4.0: 0.3, 2.0: 0.3, 1.0: 0.1}

    def hear(one):
        return Heard({}, errors[one.edits[0].strength], 0.5, 0.0, 0.0)

    found = best_in_gaps(hear, candidate)
    assert found.edits[0].strength == 4.0 and found.size == 0.5  # as good at 2, so no weaker
    errors[2.0] = 0.2
    assert best_in_gaps(hear, candidate).edits[0].strength == 1.0  # three halvings are all
    silent = Candidate("silence", (MeanAblation(0, torch.zeros(1, 4)),), 1.0, 0.0, Effect(0, 0, 0, 0, 0))
    assert best_in_gaps(hear, silent) is silent


def test_only_the_named_edits_take_part(calibration, latent_gate):
    choice, logits = latent_gate
    chosen = winners.find_winner(calibration, choice, logits, edits=["silence_l0"], progress=False)
    assert [entry["name"] for entry in chosen.record["screened"]] == ["silence_l0"]
    with pytest.raises(UsageError, match="the fit has no edit 'loud': expected some of svector_l0"):
        winners.find_winner(calibration, choice, logits, edits=["loud"], progress=False)


def test_every_kind_of_edit_gets_into_the_final():
    shift, silence = Shift(1, torch.ones(4), 1.0), MeanAblation(0, torch.zeros(1, 4))

    def one(name, *edits):
        return Candidate(name, edits, 1.0, 0.0, Effect(0, 0, 0, 0, 0))

    ranked = [
        one("a", shift),
        one("b", shift),
        one("a+b", shift, shift),
        one("c", shift),
        one("s", silence),
        one("s+s", silence, silence),
        one("s+a", silence, shift),
    ]
    names = [[c.name for c in pick_finalists(ranked, count)] for count in (0, 1, 3, 5)]
    assert names == [[], ["a"], ["a", "a+b", "s"], ["a", "a+b", "s", "b", "c"]]


def test_gate_kind_must_exist(calibration):
    only_raw = dataclasses.replace(calibration.fit, gates={"raw_l0": calibration.fit.gates["raw_l0"]})
    other = Calibration.__new__(Calibration)
    other.__dict__.update(calibration.__dict__, fit=only_raw)
    with pytest.raises(UsageError, match="no gate of kind 'latents'"):
        winners.find_gate(other, "latents")


def test_windows_of_clips_that_were_drawn_otherwise_are_kept_apart():
    drawn = {"speech": 1600, "real": 700, "seed": 1}
    name = sweep._drawing(drawn)
    assert name == sweep._drawing(dict(reversed(drawn.items()))) and len(name) == 12
    assert len({name, *(sweep._drawing({**drawn, key: 2}) for key in drawn), sweep._drawing(None)}) == 5


def test_the_gate_without_edits_is_a_steering_of_its_own(calibration, latent_gate, monkeypatch):
    choice, _ = latent_gate
    monkeypatch.setattr(type(calibration.model), "decode", None)  # what is plainly heard is known
    steering = winners.finish(calibration, winners.gate_alone(calibration, choice), "gate", progress=False)
    assert steering.edits == () and steering.gate is choice.gate and steering.name == "gate"
    assert steering.metadata["rates"]["sets"]["tones"]["text_fpr"] == 0.0
    assert [point.alpha for point in steering.frontier][3] == 1.0
    assert steering.metadata["recipe"]["edit"] is None


def test_edits_of_a_fit_compete_with_a_finished_file(setting, tmp_path):
    model, _, _, _, fitted, _ = setting
    svector = {"svector_l1": fitted.edits["svector_l1"]}
    recipes = {"svector_l1": fitted.recipes["svector_l1"]}
    again = dataclasses.replace(fitted, edits=svector, recipes=recipes)
    write_fit(tmp_path, model, fitted)
    both = with_edits_of(tmp_path, again, model)
    assert set(both.edits) == set(fitted.edits) and both.edits["svector_l1"] is svector["svector_l1"]
    assert both.recipes["svector_l0"]["form"] == "svector" and both.gates is again.gates
    with pytest.raises(UsageError, match="holds no edit that is not there: expected a folder of"):
        with_edits_of(tmp_path, both, model)

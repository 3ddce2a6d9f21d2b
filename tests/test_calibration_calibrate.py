"""From recordings to a steering file: `calibration.calibrate` on a tiny model, and wrong usages."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from calibration_tools import clips, make_terse_whisper, sound

from calibration import calibrate as room
from calibration.calibrate import Settings, calibrate, default_layers, summary
from calibration.decoding import ClipTranscript, DecodedWindow
from calibration.hallucinations import label_clips
from calibration.hearing import Effort, compare
from calibration.selection import CalibrationClip
from calibration.training_clips import TrainingClip
from calibration.user_data import Splits
from whisper_steer.attach import steer
from whisper_steer.cli import main
from whisper_steer.errors import FormatError, UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.steering import Steering

EFFORT = Effort(screened=2, finalists=1, heard=2, joined=2, frontier=6)


def training_clip(kind, index):
    name = f"train-{kind}-{index}"
    intervals = ((0.0, 2.0),) if kind != "nonspeech" else ()
    return TrainingClip(name, kind, "clean", lambda: (sound(name, 2.0, speech=bool(intervals)), intervals))


def heard_right(model, sets):
    """Random weights hear nothing right: give the speech what the model writes."""
    labels = label_clips(model, [clip for group in sets.values() for clip in group], progress=False)
    sets["speech"] = [
        type(c)(c.id, c.kind, c.seconds, labels[c.id].text, c.speech_intervals) for c in sets["speech"]
    ]
    return sets


@pytest.fixture(scope="module")
def setting():
    model = make_terse_whisper(1)
    training = [training_clip(kind, i) for kind in ("real_speech", "nonspeech") for i in range(8)]
    validation = heard_right(model, clips(8, 10))
    test = {
        name: [type(c)(f"test-{c.id}", c.kind, c.seconds, c.text, c.speech_intervals) for c in group]
        for name, group in clips(3, 4).items()
    }
    test = heard_right(model, test)
    counts = {"training": {"speech": 8, "nonspeech": 8}}
    return model, Splits(training, validation, test, counts)


def test_recordings_become_a_steering_file_with_its_record(setting, tmp_path, monkeypatch):
    model, splits = setting
    out = tmp_path / "made" / "own.safetensors"
    settings = Settings(effort=EFFORT)
    done = calibrate(model, splits, {0: None, 1: None}, out, settings=settings, progress=False)
    assert [path.name for path in done.files] == ["own.safetensors", "own.html", "own.png"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "own: calibrated for" in out.with_suffix(".html").read_text(encoding="utf-8")
    loaded = Steering.load(out)
    loaded.check(model)
    assert loaded.gate.kind == "raw" and loaded.metadata["name"] == "own"
    # without SAEs the page says so where everybody sees it, with what the gate leaves
    assert done.notes[0] == room.WITHOUT_SAES and loaded.metadata["recipe"]["notes"] == list(done.notes)
    assert "the best on activations, raw_" in done.notes[1] and "leaves words over 0.0% of" in done.notes[1]
    visible = out.with_suffix(".html").read_text(encoding="utf-8").split("<details>")[0]
    assert room.WITHOUT_SAES in visible and "of the same 10 clips of non-speech and 8 of speech" in visible
    assert loaded.metadata["profiles"]["balanced"] == 1.0 and len(loaded.metadata["frontier"]) == 7
    # tones all hallucinate, and bursts and tones are easy to tell apart
    pooled = loaded.metadata["rates"]["test"]["pooled"]
    assert pooled["text_fpr_plain"] == 1.0 and pooled["text_fpr"] == 0.0
    assert pooled["wer_plain"] == 0.0 and pooled["wer"] == 0.0 and pooled["wrongly_emptied"] == 0.0
    assert pooled["wer_rise_lo"] == pooled["wer_rise_hi"] == pooled["wrongly_emptied_hi"] == 0.0
    assert pooled["counted_sets"] == ["speech"] and pooled["counted_words"] == pooled["words"] > 0
    assert set(loaded.metadata["rates"]["test"]["sets"]) == {"speech", "tones"}
    with steer(model, steering=loaded):
        from calibration.decoding import transcribe_clips

        texts = [t.text for t in transcribe_clips(model, [c.load() for c in splits.test["tones"]])]
    assert texts == [""] * 4
    assert json.loads(json.dumps(summary(done, settings)))["budget"]["wer_rise"] == 0.001

    # a second run takes the finished fit, and comes to the same
    def again(*_args, **_options):
        raise AssertionError("fitted again")

    monkeypatch.setattr(room, "fit_parts", again)
    before = out.read_bytes()
    calibrate(model, splits, {0: None, 1: None}, out, settings=settings, progress=False)
    assert out.read_bytes() == before
    with pytest.raises(FormatError, match="was begun with other layers or other SAEs: remove it or pass ano"):
        calibrate(model, splits, {0: None}, out, settings=settings, progress=False)


def test_a_name_that_is_no_steering_file_is_refused_at_once(setting, tmp_path):
    model, splits = setting
    with pytest.raises(UsageError, match=r"own.bin is not the name of a steering file.*\.safetensors"):
        calibrate(model, splits, {0: None}, tmp_path / "own.bin", progress=False)
    assert not list(tmp_path.iterdir())


def test_a_working_folder_is_for_the_same_audio_saes_and_language(setting, tmp_path):
    model, splits = setting
    sae = SparseAutoencoder(32, 64, k=8, layer=0, metadata=model_metadata(model))
    begun = room._prepare(tmp_path, model, splits, {0: sae}, Settings())
    assert room._prepare(tmp_path, model, splits, {0: sae}, Settings()) == begun

    def refused(words, parts=splits, saes=None, **changed):
        with pytest.raises(FormatError, match=f"was begun with {words}: remove it or pass another --work"):
            room._prepare(tmp_path, model, parts, saes or {0: sae}, Settings(**changed))

    other = SparseAutoencoder(32, 64, k=8, layer=0, metadata=model_metadata(model))
    other.load_state_dict(sae.state_dict())
    assert room._prepare(tmp_path, model, splits, {0: other}, Settings()) == begun  # the same tensors
    with torch.no_grad():
        other.b_enc[3] += 1e-3
    refused("other layers or other SAEs", saes={0: other})
    refused("another seed and another language", seed=1, language="de")
    # other audio under the same ids
    first = splits.test["tones"][0]
    louder = dataclasses.replace(first, seconds=first.seconds + 1)
    changed = {**splits.test, "tones": [louder, *splits.test["tones"][1:]]}
    refused("other audio under the same names", dataclasses.replace(splits, test=changed))
    refused("other audio under the same names", dataclasses.replace(splits, fingerprint="x"))
    refused("other recordings and other audio under the same names",
            dataclasses.replace(splits, test={**splits.test, "tones": splits.test["tones"][1:]}))  # fmt: skip
    (tmp_path / "begun.json").write_text('{"seed": 0}')
    with pytest.raises(FormatError, match="was begun by another version: remove it"):
        room._prepare(tmp_path, model, splits, {0: sae}, Settings())


def test_any_gate_may_win_unless_a_kind_is_asked_for(setting, tmp_path):
    model, splits = setting
    assert Settings().gate_kind == "any"
    with pytest.raises(UsageError, match="gate_kind is 'best': expected latents, raw, any"):
        Settings(gate_kind="best")
    with pytest.raises(UsageError, match="gates on latents need SAEs"):
        calibrate(
            model, splits, {0: None}, tmp_path / "o.safetensors", settings=Settings(gate_kind="latents")
        )
    assert not list(tmp_path.iterdir())


def test_notes_set_latents_beside_activations():
    def row(name, kind, rate, **more):
        return {"gate": name, "kind": kind, "text_fpr": rate, **more}

    table = (
        row("latents_l1_m16", "latents", 0.05),
        row("latents_l3_m64", "latents", 0.041),
        row("raw_l3", "raw", 0.02),
        row("raw_l3", "raw", 0.01, refitted=1),
    )
    (note,) = room._notes(SimpleNamespace(table=table, name="raw_l3"))
    assert "the best on latents, latents_l3_m64, leaves words over 4.1% of non-speech" in note
    assert "the best on activations, raw_l3, leaves words over 2.0% of non-speech. Chosen: raw_l3" in note


def test_the_budget_is_told_with_intervals_by_speaker():
    words = "red green blue pink grey white black brown orange purple"

    def clip(number):
        window = DecodedWindow(0, 200, words, 0.1, -0.2, 0.0)
        heard = ClipTranscript(words, (window,), ((0.1, -0.2),), 2.0)
        return CalibrationClip(f"s{number}", "speech", words, heard, (number,), f"speaker {number // 2}")

    clips = [clip(number) for number in range(24)]
    after = [dataclasses.replace(c.transcript, text="" if c.id in ("s0", "s1") else words) for c in clips]
    found = room._against_budget(clips, compare(clips, after))
    assert found["wer_rise"] == found["wrongly_emptied"] == 2 / 24 and found["counted_words"] == 240
    assert (found["wer_rise_lo"], found["wer_rise_hi"]) == (0.0, pytest.approx(3 / 12))
    assert (found["wrongly_emptied_lo"], found["wrongly_emptied_hi"]) == (0.0, pytest.approx(3 / 12))


def test_layers_of_a_deep_model_are_spread_and_end_with_the_last():
    class Deep:
        class dims:  # noqa: N801
            n_audio_layer = 32

    layers = default_layers(Deep)
    assert len(layers) == 8 and layers[-1] == 31 and layers[0] == 0
    assert default_layers(make_terse_whisper(0)) == [0, 1]


def test_wrong_usage_of_the_command_is_one_line(tmp_path, capsys):
    args = [
        "calibrate",
        "--nonspeech",
        str(tmp_path),
        "--speech",
        str(tmp_path / "no.csv"),
        "--out",
        "x.safetensors",
    ]
    assert main([*args, "--saes", "a", "--no-saes"]) == 2
    assert "contradict each other" in capsys.readouterr().err
    assert main(args) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "no.csv" in error and len(error.splitlines()) == 1
    assert main([*args, "--language", "klingon"]) == 2
    assert "--language klingon: expected a code or name" in capsys.readouterr().err
    assert main([*args, "--language", "German"]) == 2
    error = capsys.readouterr().err
    assert error == "error: --language German: the model mini.en knows English alone, leave it out\n"
    assert main([*args, "--gate-kind", "best"]) == 2
    assert "gate_kind is 'best'" in capsys.readouterr().err
    assert main([*args, "--joined", "-1"]) == 2
    assert main(["calibrate", "--out", "x.safetensors"]) == 2
    assert main([*args, "--wer-budget", "7"]) == 2

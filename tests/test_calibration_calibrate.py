"""From recordings to a steering file: `calibration.calibrate` on a tiny model, and wrong usages."""

from __future__ import annotations

import json

import pytest
from calibration_tools import clips, make_terse_whisper, sound

from calibration import calibrate as room
from calibration.calibrate import Settings, calibrate, default_layers, summary
from calibration.hallucinations import label_clips
from calibration.hearing import Effort
from calibration.training_clips import TrainingClip
from calibration.user_data import Splits
from whisper_steer.attach import steer
from whisper_steer.cli import main
from whisper_steer.errors import FormatError, UsageError
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
    assert done.notes == (room.WITHOUT_SAES,) and loaded.metadata["recipe"]["notes"] == [room.WITHOUT_SAES]
    assert loaded.metadata["profiles"]["balanced"] == 1.0 and len(loaded.metadata["frontier"]) == 7
    # tones all hallucinate, and bursts and tones are easy to tell apart
    pooled = loaded.metadata["rates"]["test"]["pooled"]
    assert pooled["text_fpr_plain"] == 1.0 and pooled["text_fpr"] == 0.0
    assert pooled["wer_plain"] == 0.0 and pooled["wer"] == 0.0 and pooled["wrongly_emptied"] == 0.0
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
    with pytest.raises(FormatError, match="was begun with another model, other recordings or another seed"):
        calibrate(model, splits, {0: None}, out, settings=settings, progress=False)


def test_a_name_that_is_no_steering_file_is_refused_at_once(setting, tmp_path):
    model, splits = setting
    with pytest.raises(UsageError, match=r"own.bin is not the name of a steering file.*\.safetensors"):
        calibrate(model, splits, {0: None}, tmp_path / "own.bin", progress=False)
    assert not list(tmp_path.iterdir())


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
    assert main(["calibrate", "--out", "x.safetensors"]) == 2
    assert main([*args, "--wer-budget", "7"]) == 2

"""Window probes: fitted on training windows, judged and weighed on calibration clips."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from calibration_tools import make_terse_whisper, sound
from test_calibration_selection import calibration, gate

from calibration import window_fit
from calibration.activations import encode_windows, window_mels
from calibration.corpus import SPEECH_SETS
from calibration.gate_fit import NOBODY, SPEECH
from calibration.selection import Budget, choose_gate
from calibration.training_clips import TrainingClip
from calibration.window_fit import (
    WindowSample,
    cross_fitted,
    fit_probes,
    training_windows,
    with_window_probes,
)
from whisper_steer.gate import Gate, likely_speech
from whisper_steer.probe import Probe


def raw_gate(d=32, layers=(0, 1)):
    probes = tuple(
        Probe(layer, "raw", torch.linspace(-1, 1, d), mean=torch.zeros(d), std=torch.ones(d))
        for layer in layers
    )
    return Gate(probes, 0.0, smooth=5, threshold=0.0, spread=0.0, frame_scale=1.0, frame_bias=0.0)


def training(count=3):
    def one(kind, i):
        name = f"{kind}-{i}"
        intervals = ((0.0, 1.0),) if kind == "speech" else ()
        speech = kind == "speech"
        return TrainingClip(name, kind, "clean", lambda: (sound(name, 1.0, speech=speech), intervals))

    return [one(kind, i) for kind in ("speech", "nonspeech") for i in range(count)]


def test_training_windows_are_read_as_the_gate_will(tmp_path):
    model, mine, clips = make_terse_whisper(1), raw_gate(), training()
    silent = TrainingClip("faint", "speech", "clean", lambda: (sound("faint", 1.0, speech=True), ()))
    cache = tmp_path / "windows.npz"
    sample = training_windows(model, mine, [*clips, silent], cache=cache, progress=False)
    assert sample.nobody.tolist() == [False] * 3 + [True] * 3  # where nobody is found to speak, not taken
    streams = encode_windows(model, window_mels(clips[4].make()[0], model.dims.n_mels)[:1], [0, 1])
    logits = mine.frame_logits(dict(enumerate(streams)))
    assert sample.x.shape == (6, 4, 32)
    for layer in (0, 1):
        expected = likely_speech(logits, streams[layer])[0].numpy()
        np.testing.assert_allclose(sample.x[4, layer], expected, rtol=1e-4, atol=1e-5)
        sounding = streams[layer][0, :50].mean(dim=0).numpy()  # of one second
        np.testing.assert_allclose(sample.x[4, 2 + layer], sounding, rtol=1e-4, atol=1e-5)

    def never():
        raise AssertionError("it was kept")

    kept = [replace(clip, make=never) for clip in [*clips, silent]]
    again = training_windows(model, mine, kept, cache=cache, progress=False)
    assert np.array_equal(again.x, sample.x) and np.array_equal(again.nobody, sample.nobody)
    with pytest.raises(AssertionError, match="it was kept"):  # another gate reads other frames
        training_windows(model, replace(mine, smooth=7), kept, cache=cache, progress=False)


def test_probes_are_the_regressions():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    nobody = rng.random(60) < 0.3
    x = (rng.normal(size=(60, 2, 4)) + nobody[:, None, None]).astype(np.float32)
    probes, intercept = fit_probes(WindowSample(x, nobody), (1, 3), 1.0)
    assert [probe.layer for probe in probes] == [1, 3]
    flat = StandardScaler().fit_transform(x.reshape(60, 8))
    expected = LogisticRegression(C=1.0, class_weight="balanced", max_iter=3000).fit(flat, nobody)
    said = sum(probe.logits(torch.from_numpy(x[:, i])) for i, probe in enumerate(probes)) + intercept
    np.testing.assert_allclose(said.numpy(), expected.decision_function(flat), rtol=1e-3, atol=1e-3)


def test_a_window_is_judged_by_probes_that_did_not_see_its_fold():
    rng = np.random.default_rng(2)
    nobody = np.arange(40) % 2 == 0
    x = (rng.normal(size=(40, 1, 3)) + nobody[:, None, None]).astype(np.float32)
    sample, own = WindowSample(x[:20], nobody[:20]), WindowSample(x[20:], nobody[20:])
    folds, usable = np.arange(20) // 2 % 3, np.arange(20) != 5
    probes, intercept, said = cross_fitted(sample, own, usable, folds, (2,), 1.0)
    everything = np.r_[np.ones(20, bool), usable]
    expected, expected_intercept = fit_probes(WindowSample(x[everything], nobody[everything]), (2,), 1.0)
    assert torch.equal(probes[0].coef, expected[0].coef) and intercept == expected_intercept
    for fold in range(3):
        rest = np.r_[np.ones(20, bool), usable & (folds != fold)]
        (probe,), start = fit_probes(WindowSample(x[rest], nobody[rest]), (2,), 1.0)
        judged = probe.logits(torch.from_numpy(own.x[:, 0])) + start
        np.testing.assert_allclose(said[folds == fold], judged.numpy()[folds == fold], rtol=1e-5, atol=1e-5)


def _of_width_two(signal, place=0):
    """(20, 2, 2): the signal in one feature of `likely_speech`; `mean_of_sound` says nothing."""
    x = np.zeros((len(signal), 2, 2), np.float32)
    x[:, 0, place] = signal
    return x


def chosen_with(monkeypatch, signal, place=0, groups=None, untaught=()):
    """A gate whose frames do not tell ten clips of each kind apart, and window probes on `signal` (20,) in
    one of two places; the training windows' is in the first."""
    clips = calibration(10)
    rng = np.random.default_rng(1)
    logits = np.repeat(rng.normal(0, 1, (20, 1)), 50, axis=1).astype(np.float32)
    choice = choose_gate({"g": gate()}, {"g": logits}, clips, Budget(), smoothings=(1,))
    assert choice.result.text_fpr > 0.5
    nobody = np.arange(20) >= 10
    teach = WindowSample(_of_width_two(np.where(nobody, 1.0, -1.0)), nobody)
    monkeypatch.setattr(window_fit, "UNTAUGHT", untaught)
    monkeypatch.setattr(window_fit, "training_windows", lambda *args, **options: teach)
    x = _of_width_two(signal, place)
    monkeypatch.setattr(window_fit, "calibration_windows", lambda *args, **options: x)
    targets = np.where(nobody, NOBODY, SPEECH)[:, None].repeat(50, axis=1)
    sources = {
        (clip.set, clip.id): SimpleNamespace(
            id=clip.id, kind="speech" if clip.is_speech else "nonspeech", group=groups or clip.id
        )
        for clip in clips
    }
    return choice, with_window_probes(
        None, choice, logits, targets, clips, sources, [], Budget(), progress=False
    )


def test_window_probes_are_taken_where_they_help(monkeypatch):
    before, after = chosen_with(monkeypatch, np.where(np.arange(20) >= 10, 3.0, -3.0))
    assert after.result.text_fpr == 0 and after.result.wer == 0 and len(after.gate.window_probes) == 1
    assert after.gate.threshold == after.result.threshold and after.over_budgets < before.over_budgets
    assert [row.get("window_share") for row in after.table] == [None, 1.0, 2.0, 0.5]
    probe = after.gate.window_probes[0]
    share = next(row["window_share"] for row in after.table if row["threshold"] == after.result.threshold)
    said = probe.logits(torch.tensor([[3.0, 0.0], [-3.0, 0.0]])) + after.gate.window_intercept
    assert len(after.gate.sound_probes) == 1 and not after.gate.sound_probes[0].coef.any()
    assert said[0] > 0 > said[1] and share in (0.5, 1.0, 2.0)
    flattered = before.window_logits[15] + float(said[0])  # by probes that were fitted on clip 15, too
    assert 1e-3 < abs(after.window_logits[15] - flattered) < 0.5


def test_calibration_clips_teach_what_training_clips_do_not_show(monkeypatch):
    signal = np.where(np.arange(20) >= 10, 3.0, -3.0)
    _, after = chosen_with(monkeypatch, signal, place=1)
    assert after.result.text_fpr == 0 and after.gate.window_probes[0].coef[1] > 0.1


def test_voices_that_nothing_is_trained_on_teach_nothing(monkeypatch):
    signal = np.where(np.arange(20) >= 10, 3.0, -3.0)
    sets = {clip.set for clip in calibration(10)}
    before, after = chosen_with(monkeypatch, signal, place=1, untaught=tuple(sets))
    assert after.gate is before.gate
    assert window_fit.UNTAUGHT == tuple(sets)
    monkeypatch.undo()
    assert set(window_fit.UNTAUGHT) == {"speech_new_voice"} < set(SPEECH_SETS)


def test_of_one_group_nothing_can_be_learnt(monkeypatch, caplog):
    signal = np.where(np.arange(20) >= 10, 3.0, -3.0)
    before, after = chosen_with(monkeypatch, signal, place=1, groups="one voice")
    assert after.gate is before.gate and "training clips alone" in caplog.text
    before, after = chosen_with(monkeypatch, signal, groups="one voice")
    assert after.result.text_fpr == 0  # what training clips show is used all the same


def test_window_probes_that_say_nothing_are_left_out(monkeypatch):
    before, after = chosen_with(monkeypatch, np.zeros(20))
    assert after.gate is before.gate and after.result == before.result
    assert len(after.table) == 4

"""Window probes: fitted on training windows, judged and weighed on calibration clips."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from calibration_tools import make_terse_whisper, sound
from test_calibration_selection import calibration, gate

from calibration import window_fit
from calibration.activations import encode_windows, window_mels
from calibration.gate_fit import NOBODY, SPEECH
from calibration.selection import Budget, choose_gate
from calibration.training_clips import TrainingClip
from calibration.window_fit import WindowSample, fit_probes, training_windows, with_window_probes
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
    for layer in (0, 1):
        expected = likely_speech(logits, streams[layer])[0].numpy()
        np.testing.assert_allclose(sample.x[4, layer], expected, rtol=1e-4, atol=1e-5)

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


def _of_width_two(signal):
    return np.stack([signal, np.zeros(len(signal))], axis=1)[:, None].astype(np.float32)


def chosen_with(monkeypatch, signal):
    """A gate whose frames do not tell ten clips of each kind apart, and window probes on `signal` (20,)."""
    clips = calibration(10)
    rng = np.random.default_rng(1)
    logits = np.repeat(rng.normal(0, 1, (20, 1)), 50, axis=1).astype(np.float32)
    choice = choose_gate({"g": gate()}, {"g": logits}, clips, Budget(), smoothings=(1,))
    assert choice.result.text_fpr > 0.5
    nobody = np.arange(20) >= 10
    teach = WindowSample(_of_width_two(np.where(nobody, 1.0, -1.0)), nobody)
    monkeypatch.setattr(window_fit, "training_windows", lambda *args, **options: teach)
    x = _of_width_two(signal)
    monkeypatch.setattr(window_fit, "calibration_windows", lambda *args, **options: x)
    targets = np.where(nobody, NOBODY, SPEECH)[:, None].repeat(50, axis=1)
    return choice, with_window_probes(None, choice, logits, targets, clips, {}, [], Budget(), progress=False)


def test_window_probes_are_taken_where_they_help(monkeypatch):
    before, after = chosen_with(monkeypatch, np.where(np.arange(20) >= 10, 3.0, -3.0))
    assert after.result.text_fpr == 0 and after.result.wer == 0 and len(after.gate.window_probes) == 1
    assert after.gate.threshold == after.result.threshold and after.over_budgets < before.over_budgets
    assert [row.get("window_share") for row in after.table] == [None, 1.0, 2.0, 0.5]
    probe = after.gate.window_probes[0]
    share = next(row["window_share"] for row in after.table if row["threshold"] == after.result.threshold)
    said = probe.logits(torch.tensor([[3.0, 0.0], [-3.0, 0.0]])) + after.gate.window_intercept
    assert said[0] > 0 > said[1] and share in (0.5, 1.0, 2.0)
    assert after.window_logits[15] == pytest.approx(before.window_logits[15] + float(said[0]), abs=1e-4)


def test_window_probes_that_mislead_are_left_out(monkeypatch):
    before, after = chosen_with(monkeypatch, np.where(np.arange(20) >= 10, -3.0, 3.0))
    assert after.gate is before.gate and after.result == before.result
    assert len(after.table) == 4

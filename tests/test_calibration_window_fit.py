"""Window probes: fitted on training windows, judged and weighed on calibration clips."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from calibration_tools import make_terse_whisper, sound
from test_calibration_selection import calibration, gate

from calibration import window_fit, window_parts
from calibration.activations import encode_windows, window_mels
from calibration.corpus import SPEECH_SETS
from calibration.gate_fit import NOBODY, SPEECH
from calibration.selection import Budget, choose_gate
from calibration.training_clips import TrainingClip
from calibration.window_fit import ALWAYS, out_of_fold, with_window_probes
from calibration.window_parts import LINEAR, fit_kernel, fit_probes, scaled
from calibration.window_samples import TrainingWindows, WindowSample, training_windows
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
    windows = training_windows(model, mine, [*clips, silent], cache=cache, progress=False)
    sample = windows.sample
    assert sample.nobody.tolist() == [False] * 3 + [True] * 3  # where nobody is found to speak, not taken
    assert [clip.id for clip in windows.clips] == [clip.id for clip in clips]
    streams = encode_windows(model, window_mels(clips[4].make()[0], model.dims.n_mels)[:1], [0, 1])
    logits = mine.frame_logits(dict(enumerate(streams)))
    assert windows.lowest[4] == pytest.approx(float(logits.min()), rel=1e-4, abs=1e-4)
    assert sample.x.shape == (6, 6, 32)
    for layer in (0, 1):
        expected = likely_speech(logits, streams[layer])[0].numpy()
        np.testing.assert_allclose(sample.x[4, layer], expected, rtol=1e-3, atol=1e-4)  # half precision
        sounding = streams[layer][0, :50].mean(dim=0).numpy()  # of one second
        np.testing.assert_allclose(sample.x[4, 2 + layer], sounding, rtol=1e-3, atol=1e-4)
        spread = streams[layer][0, :50].numpy().std(axis=0)
        np.testing.assert_allclose(sample.x[4, 4 + layer], spread, rtol=1e-3, atol=1e-4)

    def never():
        raise AssertionError("it was kept")

    kept = [replace(clip, make=never) for clip in [*clips, silent]]
    again = training_windows(model, mine, kept, cache=cache, progress=False)
    assert np.array_equal(again.sample.x, sample.x) and np.array_equal(again.sample.nobody, sample.nobody)
    assert np.array_equal(again.lowest, windows.lowest)
    # only what is new is read; another order, and fewer, are no news
    new = replace(clips[0], id="new")
    more = training_windows(model, mine, [new, kept[5], kept[0]], cache=cache, progress=False).sample
    assert np.array_equal(more.x, sample.x[[0, 5, 0]]) and more.nobody.tolist() == [False, True, False]
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


def test_a_window_is_judged_by_fits_that_did_not_see_its_fold():
    rng = np.random.default_rng(2)
    nobody = np.arange(40) % 2 == 0
    x = (rng.normal(size=(40, 1, 3)) + nobody[:, None, None]).astype(np.float32)
    sample, own = WindowSample(x[:20], nobody[:20]), WindowSample(x[20:], nobody[20:])
    folds, usable = np.arange(20) // 2 % 3, np.arange(20) != 5

    def fit(part):
        (probe,), start = fit_probes(part, (2,), 1.0)
        return lambda x: probe.logits(torch.from_numpy(x[:, 0])).numpy() + start

    of_training = np.where(np.arange(20) < 6, ALWAYS, np.arange(20) % 3)
    said, said_of_sample = out_of_fold(sample, own, usable, folds, of_training, fit)
    assert np.isnan(said_of_sample[:6]).all()
    for fold in range(3):
        rest = np.r_[of_training != fold, usable & (folds != fold)]
        judge = fit(WindowSample(x[rest], nobody[rest]))
        mine, theirs = folds == fold, of_training == fold
        np.testing.assert_allclose(said[mine], judge(own.x)[mine], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(said_of_sample[theirs], judge(sample.x)[theirs], rtol=1e-5, atol=1e-5)


def test_a_fit_without_a_class_judges_no_training_window():
    x = np.array([-1.0, -2, 1, 2], np.float32)[:, None, None]
    sample, nobody = WindowSample(x, np.array([False, False, True, True])), np.zeros(0, bool)
    own = WindowSample(np.array([[[3.0]]], np.float32), np.array([True]))

    def fit(part):
        (probe,), start = fit_probes(part, (2,), 1.0)
        return lambda x: probe.logits(torch.from_numpy(x[:, 0])).numpy() + start

    # all speech is of one group, in fold 0 with the calibration clip
    said, of_sample = out_of_fold(
        sample, own, np.array([False]), np.array([0]), np.array([0, 0, ALWAYS, ALWAYS]), fit
    )
    assert said[0] > 0 and np.isnan(of_sample).all() and not len(nobody)


def _rings(count, seed):
    """(count, 3, 2): what no line tells apart, one class around the other in one pool, noise in the rest."""
    rng = np.random.default_rng(seed)
    nobody = np.arange(count) % 2 == 0
    angle, radius = rng.uniform(0, 2 * np.pi, count), np.where(nobody, 1.0, 3.0)
    x = rng.normal(0, 0.1, (count, 3, 2)).astype(np.float32)
    x[:, 2] = (radius * np.stack([np.cos(angle), np.sin(angle)])).T + 7.0
    return WindowSample(x, nobody)


def test_the_kernel_is_the_support_vector_machine_s():
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    sample, other = _rings(120, 0), _rings(60, 1)
    kernel = fit_kernel(sample, (3,), 2.0)
    assert kernel.layers == (3,) and kernel.d_model == 2 and kernel.projection.shape == (6, 6)
    assert kernel.gamma == pytest.approx(2 / 6)
    scaler = StandardScaler().fit(sample.x.reshape(120, 6))  # all components are kept: distances stay
    machine = SVC(C=10, gamma=2 / 6, class_weight="balanced")
    machine.fit(scaler.transform(sample.x.reshape(120, 6)), sample.nobody)
    expected = machine.decision_function(scaler.transform(other.x.reshape(60, 6)))
    said = kernel.logits(torch.from_numpy(other.x)).numpy()
    np.testing.assert_allclose(said, expected, atol=0.02)  # rounded to half precision, and the machine's own
    assert ((said > 0) == other.nobody).mean() > 0.95
    for rounded in (kernel.projection, kernel.landmarks):
        assert torch.equal(rounded.half().float(), rounded)
    half = scaled(kernel, 0.5, 1.0).logits(torch.from_numpy(other.x)).numpy()
    np.testing.assert_allclose(half, 0.5 * said + 1, rtol=1e-5, atol=1e-5)


def test_beside_the_radial_function_the_scalar_product_counts():
    """Against scikit-learn's own machine with that kernel; far from all windows only a line is left."""
    from sklearn.metrics.pairwise import rbf_kernel
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    def alike(a, b):
        return rbf_kernel(a, b, gamma=2 / 6) + 0.5 * (a @ b.T) / 6

    sample, other = _rings(120, 0), _rings(60, 1)
    scaler = StandardScaler().fit(sample.x.reshape(120, 6))
    machine = SVC(C=10, kernel=alike, class_weight="balanced")
    machine.fit(scaler.transform(sample.x.reshape(120, 6)), sample.nobody)
    expected = machine.decision_function(scaler.transform(other.x.reshape(60, 6)))
    kernel = fit_kernel(sample, (3,), 2.0, linear=0.5)
    np.testing.assert_allclose(kernel.logits(torch.from_numpy(other.x)).numpy(), expected, atol=0.02)
    far = torch.from_numpy(other.x[:1] + np.float32(40) * np.arange(1, 4, dtype=np.float32)[:, None, None])
    first, second, third = kernel.logits(far).tolist()
    assert third - second == pytest.approx(second - first, rel=1e-3) and abs(third - second) > 0.1
    twice = scaled(kernel, 2.0, -1.0).logits(far).tolist()
    assert twice == pytest.approx([2 * first - 1, 2 * second - 1, 2 * third - 1], rel=1e-5)
    assert len(set(fit_kernel(sample, (3,), 2.0).logits(far).tolist())) == 1


def test_a_kernel_wins_where_no_line_tells_windows_apart(monkeypatch):
    """Frames that say nothing, and rings: the probes' two pools say nothing, the kernel's third all."""
    clips = calibration(30)
    logits = np.repeat(np.random.default_rng(1).normal(0, 0.1, (60, 1)), 50, axis=1).astype(np.float32)
    nobody = np.arange(60) >= 30
    choice = choose_gate({"g": gate()}, {"g": logits}, clips, Budget(), smoothings=(1,))
    rings = _rings(60, 5)
    own = np.concatenate([rings.x[~rings.nobody], rings.x[rings.nobody]])
    monkeypatch.setattr(window_fit, "training_windows", lambda *args, **options: _windows(_rings(200, 4)))
    monkeypatch.setattr(window_fit, "calibration_windows", lambda *args, **options: own)
    targets = np.where(nobody, NOBODY, SPEECH)[:, None].repeat(50, axis=1)
    sources = {
        (c.set, c.id): SimpleNamespace(id=c.id, kind="speech" if c.is_speech else "nonspeech", group=c.id)
        for c in clips
    }
    after = with_window_probes(None, choice, logits, targets, clips, sources, [], Budget(), progress=False)
    assert choice.result.text_fpr > 0.9 and after.result.text_fpr < 0.2
    assert after.gate.kernel is not None and not after.gate.window_probes
    tried = [row for row in after.table if "kernel_share" in row]
    assert len(tried) == 12 and {row["kernel_width"] for row in tried} == {1.0, 2.0}
    assert {row["kernel_linear"] for row in tried} == {0.0, 0.3} == set(LINEAR)
    # the scaled decision is a logit: of the clips it speaks for, about as many are one as it says
    said = after.gate.kernel.logits(torch.from_numpy(own)).sigmoid().numpy()
    assert said[nobody].mean() > 0.9 and said[~nobody].mean() < 0.1


def _of_width_two(signal, place=0):
    """(20, 3, 2): the signal in one feature of `likely_speech`; `mean_of_sound` and `spread_of_sound` say
    nothing."""
    x = np.zeros((len(signal), 3, 2), np.float32)
    x[:, 0, place] = signal
    return x


def _windows(sample, lowest=None):
    """The sample as of synthetic clips; with `lowest` (windows,) of real speakers, each in a group of its
    own."""
    kinds = ["nonspeech" if nobody else "real_speech" for nobody in sample.nobody]
    clips = [
        TrainingClip(str(i), kind, "clean", lambda: None, "" if lowest is None else f"speaker {i}")
        for i, kind in enumerate(kinds)
    ]
    return TrainingWindows(sample, np.zeros(len(clips)) if lowest is None else lowest, tuple(clips))


def chosen_with(monkeypatch, signal, place=0, groups=None, untaught=(), heard_too=None):
    """A gate whose frames do not tell ten clips of each kind apart, and window probes on `signal` (20,) in
    one of two places; the training windows' is in the first. heard_too: see `_windows`."""
    clips = calibration(10)
    rng = np.random.default_rng(1)
    logits = np.repeat(rng.normal(0, 1, (20, 1)), 50, axis=1).astype(np.float32)
    choice = choose_gate({"g": gate()}, {"g": logits}, clips, Budget(), smoothings=(1,))
    assert choice.result.text_fpr > 0.5
    nobody = np.arange(20) >= 10
    teach = _windows(WindowSample(_of_width_two(np.where(nobody, 1.0, -1.0)), nobody), heard_too)
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
    assert [row.get("window_share") for row in after.table[:4]] == [None, 1.0, 2.0, 0.5]
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
    assert not after.gate.window_probes and after.gate.kernel is None
    assert window_fit.UNTAUGHT == tuple(sets)
    monkeypatch.undo()
    assert set(window_fit.UNTAUGHT) == {"speech_new_voice"} < set(SPEECH_SETS)


def test_of_one_group_nothing_can_be_learnt(monkeypatch, caplog):
    signal = np.where(np.arange(20) >= 10, 3.0, -3.0)
    before, after = chosen_with(monkeypatch, signal, place=1, groups="one voice")
    assert not after.gate.window_probes and "training clips alone" in caplog.text
    before, after = chosen_with(monkeypatch, signal, groups="one voice")
    assert after.result.text_fpr == 0  # what training clips show is used all the same


def test_training_speech_counts_where_the_threshold_is_set(monkeypatch):
    signal = np.where(np.arange(20) >= 10, 3.0, -3.0)
    _, without = chosen_with(monkeypatch, signal)
    lowest = np.zeros(20)
    lowest[4] = 100.0  # a voice that frames take for noise
    _, strict = chosen_with(monkeypatch, signal, heard_too=lowest)
    assert without.gate.threshold < 60 < strict.gate.threshold
    assert without.result.text_fpr == 0 and strict.result.text_fpr == 1  # nothing of noise is that high


def test_window_probes_that_say_nothing_are_left_out(monkeypatch):
    before, after = chosen_with(monkeypatch, np.zeros(20))
    assert not after.gate.window_probes and after.gate.kernel is None and after.result == before.result
    assert len(after.table) == 1 + 3 + 2 * 3 * 2


def test_a_fit_of_the_first_layers_reads_their_pools_alone():
    """Two layers, three pools of each: what the second layer shows does not reach a kernel of the first."""
    zero = Probe(0, "raw", torch.zeros(1), mean=torch.zeros(1), std=torch.ones(1))
    two = replace(gate(), probes=(zero, replace(zero, layer=1)))
    assert window_parts.depths(two) == [1, 2] and window_parts.depths(replace(two, probes=(zero,))) == [1]
    four = replace(two, probes=tuple(replace(zero, layer=layer) for layer in range(4)))
    assert window_parts.depths(four) == [2, 3, 4]
    rng = np.random.default_rng(3)
    nobody = np.arange(80) % 2 == 0
    x = rng.normal(0, 0.1, (80, 6, 1)).astype(np.float32)
    x[:, 0, 0] += np.where(nobody, 1.0, -1.0)  # likely_speech of layer 0
    x[:, 1, 0] += np.where(nobody, -3.0, 3.0)  # of layer 1: the other way round
    sample = WindowSample(x, nobody)

    def judge(fit):
        said = fit(sample)(x)
        return said, said

    part = window_parts.kernel_of(two, 1, 1.0, 0.0, sample, judge, np.ones(80, bool), nobody)
    assert part.row["kernel_layers"] == 1.0 and ((part.said > 0) == nobody).all()
    kernel = part.add(two, 2.0).kernel
    assert kernel.layers == (0,)
    expected = kernel.logits(torch.from_numpy(x[:, [0, 2, 4]])).numpy()
    np.testing.assert_allclose(part.said, expected, rtol=1e-3, atol=1e-3)
    weighed = part.weighed(two, 2.0)
    np.testing.assert_allclose(weighed.said, 2 * part.said)
    assert weighed.gate.kernel_share == 2.0 and weighed.row["kernel_share"] == 2.0

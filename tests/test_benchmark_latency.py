"""benchmarks.latency: the arithmetic of ratios, verdicts, the rows and the command."""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from conftest import TINY_DIMS, make_tiny_whisper
from faster_models import CPU, mini_ct2
from steering_files import brief_whisper

from benchmarks import latency, latency_runtimes
from benchmarks.latency import Row, modes_of, settings, table, verdict
from benchmarks.latency_timing import Ratio, paired, ratio_of
from whisper_steer.attach import handles_of
from whisper_steer.errors import UsageError
from whisper_steer.zoo import load_model

ROW = Row("openai", "shift_hook", None, 1, "small", 1.004, 1.002, 900.0, 0.99, 1.01, 2.0, 0.1, 5)


def test_ratio_is_the_median_of_the_rounds_own_ratios():
    """A slow round slows both: its quotient is as good as any. By hand: 1.1, 1.2, 1.3, 1.0, 1.4."""
    plain, steered = [1.0, 10.0, 1.0, 2.0, 1.0], [1.1, 12.0, 1.3, 2.0, 1.4]
    assert ratio_of(plain, steered) == Ratio(*map(pytest.approx, (1.2, 1.0, 1.4, 1.4)))
    assert ratio_of([2.0], [3.0]) == Ratio(1.5, 1.5, 1.5, 3.0)


def test_the_interval_is_that_of_the_sign_test():
    """From tables: of 8 values none may be left out on a side, of 9 one, of 25 seven."""
    for count, outside in [(2, 0), (5, 0), (8, 0), (9, 1), (25, 7)]:
        found = ratio_of([1.0] * count, [float(number) for number in range(1, count + 1)])
        assert (found.low, found.high) == (1 + outside, count - outside)


def test_ratio_needs_pairs():
    for plain, steered in [([], []), ([1.0], [])]:
        with pytest.raises(UsageError, match="expected pairs"):
            ratio_of(plain, steered)


def test_rounds_alternate_and_the_first_is_not_counted():
    done, ticks = [], iter(range(100))

    @contextmanager
    def steering():
        done.append("on")
        yield
        done.append("off")

    plain, steered = paired(
        lambda: done.append("plain"), lambda: done.append("steered"), steering, 2, lambda: float(next(ticks))
    )
    turns = [["plain", "on", "steered", "off"], ["on", "steered", "off", "plain"]]
    assert done == turns[0] + turns[1] + turns[0]
    assert (plain, steered) == ([1.0, 1.0], [1.0, 1.0])


def test_short_work_is_repeated_until_it_has_taken_its_time():
    ticks = iter(range(1000))
    times = paired(lambda: None, lambda: None, nullcontext, 2, lambda: float(next(ticks)), seconds=4.5)
    assert times == ([1.0] * 5, [1.0] * 5)
    still = paired(lambda: None, lambda: None, nullcontext, 2, lambda: 0.0, seconds=4.5)
    assert len(still[0]) == len(still[1]) == 50


def test_a_late_round_is_the_last_but_one_is_always_counted():
    done = []

    def times(late):
        done.clear()
        ticks = iter(range(100))
        clock = lambda: float(next(ticks))  # noqa: E731
        return paired(lambda: done.append(1), lambda: None, nullcontext, 5, clock, late)

    assert times(lambda: True) == ([1.0], [1.0]) and len(done) == 2
    assert times(lambda: len(done) >= 4) == ([1.0] * 3, [1.0] * 3)
    assert times(lambda: False) == ([1.0] * 5, [1.0] * 5)


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        ({}, "cpu", "<= 1.01: yes"),
        ({"encoder_ratio": 1.02}, "cpu", "<= 1.01: within noise"),
        ({"encoder_ratio": 1.05, "encoder_low": 1.03}, "cpu", "<= 1.01: no"),
        ({"mode": "gated_latents", "encoder_ratio": 1.02}, "cpu", "<= 1.02: yes"),
        ({"mode": "gated_latents", "shape": "tiny"}, "cpu", ""),
        ({"mode": "reconstruction", "encoder_ratio": 1.2, "encoder_low": 1.1}, "cpu", "<= 1.08: no"),
        ({"mode": "reconstruction"}, "cuda", ""),
        ({"mode": "reconstruction", "shape": "tiny"}, "cpu", ""),
        ({"mode": "nonspeech", "encoder_ratio": None}, "cpu", ""),
        ({"mode": "early_gap"}, "cpu", ""),
        ({"mode": "alpha_change", "encoder_seconds": 0.7}, "cpu", "0.70 s, < 1 s: yes"),
        ({"mode": "alpha_change", "encoder_seconds": 1.3}, "cpu", "1.30 s, < 1 s: no"),
        ({"mode": "alpha_change", "encoder_seconds": 1.3, "shape": "base"}, "cpu", "1.30 s"),
    ],
)
def test_verdicts(changes, device, expected):
    assert verdict(replace(ROW, **changes), device) == expected


def test_table_is_aligned():
    unmeasured = replace(ROW, mode="nonspeech", encoder_ratio=None, encoder_low=None)
    lines = table([ROW, unmeasured], "cpu").splitlines()
    head = "runtime shape batch dtype mode m encoder interval end to end RTF MB target"
    assert lines[0].split() == head.split()
    assert lines[1].index("1.004") == lines[0].index("encoder")
    assert "0.990-1.010" in lines[1] and "0.990" not in lines[2]


def test_the_row_begins_with_the_agreed_columns():
    names = [field.name for field in fields(Row)]
    assert names[:8] == "runtime mode m batch shape encoder_ratio end_to_end_ratio peak_mb".split()
    assert json.loads(json.dumps(asdict(ROW)))["peak_mb"] == 900.0


def test_shapes_are_whispers():
    small, large = latency_runtimes.dimensions("small"), latency_runtimes.dimensions("large-v3")
    assert (small.n_audio_state, small.n_audio_layer, small.n_vocab, small.n_mels) == (768, 12, 51864, 80)
    assert (large.n_audio_state, large.n_audio_layer, large.n_vocab, large.n_mels) == (1280, 32, 51866, 128)


@pytest.mark.parametrize(("mode", "m"), latency.MODES)
def test_every_mode_changes_what_it_should(mode, m):
    dims = brief_whisper().dims
    steering = latency_runtimes.steering_for(mode, m, dims)
    steering.check(brief_whisper())
    x = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(1)) * 3
    early = mode.startswith("early")
    assert steering.early_layers == ((0,) if early else ())
    after = steering.edit(x, 0 if early else dims.n_audio_layer - 1, 1.0)
    assert torch.equal(after, x) == (mode in ("gate", "window_gate"))
    assert (steering.gate is not None) == ("gate" in mode or early)
    if mode == "reconstruction":
        assert steering.edits[0].W_enc.shape == (512, 64)
    if m is not None and steering.edits and not early:
        assert steering.edits[0].W_enc.shape == (m, 64)
    if mode == "window_gate":
        gate = steering.gate
        assert gate.kernel.layers == gate.layers and gate.kind == "raw" and len(gate.kernel.weights) == 700
    elif steering.gate is not None:
        gate = steering.gate
        assert sum(len(probe.coef) for probe in gate.probes) == m and gate.window_threshold(1.0) == 1e9
        opened = (gate.frame_gate(gate.frame_logits(dict.fromkeys(gate.layers, x))) > 0).float().mean()
        assert float(opened) == 0 if mode == "early_speech" else 0 < float(opened)


def test_as_many_latents_are_active_as_in_a_fitted_sae():
    """Whatever the stream's scale; the papers' reconstruction at its operating point."""
    model = brief_whisper()
    found = []
    model.encoder.blocks[-1].register_forward_hook(lambda *args: found.append(args[2]))
    spread = latency_runtimes.stream_spread(model)
    assert spread == pytest.approx(float(found[0].std()))
    dims = latency_runtimes.dimensions("tiny")
    x = 1.7 * torch.randn(400, dims.n_audio_state, generator=torch.Generator().manual_seed(1))
    for mode, m, share in (("reconstruction", None, 50 / 3072), ("latents", 100, 0.0228)):
        (edit,) = latency_runtimes.steering_for(mode, m, dims, spread=1.7).edits
        assert float((edit.codes(x) > 0).float().mean()) == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("mode", latency.EARLY_MODES)
def test_blocks_run_again_only_where_the_gate_opens(mode):
    model = brief_whisper()
    calls: list[int] = []
    for number, block in enumerate(model.encoder.blocks):
        block.register_forward_hook(lambda *call, number=number: calls.append(number))
    runtime = latency_runtimes.OpenAIRuntime(model, "cpu")
    with runtime.steered(latency_runtimes.steering_for(mode, 100, model.dims)):
        runtime.encode(runtime.features(latency_runtimes.sound(1)))
    once = list(range(len(model.encoder.blocks)))
    assert calls == once + (once[1:] if mode == "early_gap" else [])


def test_settings_quick_and_full():
    args = latency.parser().parse_args(["--quick", "--runtimes", "openai", "faster", "whisper.cpp"])
    assert settings(args) == [
        ("openai", "tiny", 1),
        ("faster", "tiny", 1),
        ("whisper.cpp", "tiny", 1),
        ("openai", "small", 1),
        ("openai", "tiny", 8),
        ("faster", "tiny", 8),
    ]
    args = latency.parser().parse_args(["--shapes", "base", "--batches", "2", "--runtimes", "openai"])
    assert settings(args) == [("openai", "base", 2)]
    args = latency.parser().parse_args(["--shapes", "base", "--runtimes", "whisper.cpp"])
    assert settings(args) == [("whisper.cpp", "base", 1)]


def test_modes_by_runtime():
    assert modes_of("openai") == modes_of("transformers") == list(latency.MODES)
    assert ("shift_hook", None) not in modes_of("faster")
    assert modes_of("whisper.cpp") == [("shift_baked", None)]
    assert [mode for mode, _ in modes_of("faster", latency.SHORT_MODES)] == [
        "shift_baked",
        "gated_latents",
        "reconstruction",
    ]


def test_lack_of_time_is_said_and_ends_the_run(monkeypatch, capsys):
    """The clock stands still until the first row, then jumps past the end."""
    now = [0.0]

    def one_row(runtime, name, shape, batch, modes, spread, args, late):
        assert modes == list(latency.MODES)
        assert not late()
        now[0] = latency.QUICK_SECONDS + 1
        assert late()
        yield replace(ROW, mode="shift_baked")
        raise AssertionError("went on")

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(latency, "nonspeech", lambda *given: replace(ROW, mode="nonspeech"))
    monkeypatch.setattr(latency, "measure", one_row)
    monkeypatch.setattr(latency_runtimes, "random_model", lambda shape: None)
    monkeypatch.setattr(latency_runtimes, "stream_spread", lambda model, device: 1.0)
    monkeypatch.setitem(latency_runtimes.MAKERS, "openai", lambda model, device: None)
    rows = latency.run(latency.parser().parse_args(["--quick", "--rounds", "1", "--runtimes", "openai"]))
    assert [row.mode for row in rows] == ["shift_baked", "nonspeech"]
    assert capsys.readouterr().err.splitlines() == [
        "latency: openai, tiny, batch 1",
        "latency: stopped, for lack of time, after shift_baked of openai, tiny, batch 1",
        "latency: left out, for lack of time: openai, small, batch 1",
        "latency: left out, for lack of time: openai, tiny, batch 8",
    ]


def test_a_run_that_is_stopped_leaves_its_rows(monkeypatch, tmp_path):
    def two_rows(runtime, name, shape, batch, modes, spread, args, late):
        yield replace(ROW, mode="gate")
        yield replace(ROW, mode="latents", m=10)
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "nonspeech", lambda *given: replace(ROW, mode="nonspeech"))
    monkeypatch.setattr(latency, "measure", two_rows)
    monkeypatch.setattr(latency_runtimes, "random_model", lambda shape: None)
    monkeypatch.setattr(latency_runtimes, "stream_spread", lambda model, device: 1.0)
    monkeypatch.setitem(latency_runtimes.MAKERS, "openai", lambda model, device: None)
    words = ["--shapes", "tiny", "--batches", "1", "--runtimes", "openai", "--json"]
    assert latency.main([*words, str(tmp_path / "rows.json")]) != 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["mode"] for row in rows] == ["gate", "latents", "nonspeech"]


def test_a_run_over_a_tiny_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(latency_runtimes, "random_model", lambda shape: brief_whisper())
    monkeypatch.setattr(latency_runtimes, "dimensions", lambda shape: brief_whisper().dims)
    monkeypatch.setattr(latency_runtimes, "TOKENS", 4)
    monkeypatch.setattr(latency, "nonspeech", lambda *given: replace(ROW, mode="nonspeech"))
    out = tmp_path / "rows.json"
    arguments = ["--shapes", "tiny", "--batches", "1", "--rounds", "1", "--runtimes", "openai"]
    arguments += ["--clock", "cpu"]
    monkeypatch.setattr(latency, "ROW_SECONDS", 0.0)
    assert latency.main([*arguments, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["mode"], row["m"]) for row in rows] == [*latency.MODES, ("nonspeech", None)]
    assert all(row["encoder_ratio"] > 0 and row["end_to_end_ratio"] > 0 for row in rows)
    assert all(row["peak_mb"] is None or row["peak_mb"] > 10 for row in rows)
    assert "gated_latents" in capsys.readouterr().out


def test_baking_leaves_the_very_weights():
    model = brief_whisper()
    runtime = latency_runtimes.OpenAIRuntime(model, "cpu")
    bias = model.encoder.blocks[3].mlp[2].bias
    before, steering = bias.clone(), latency_runtimes.steering_for("shift_baked", None, model.dims)
    features = runtime.features(latency_runtimes.sound(1))
    with runtime.steered(steering):
        hooked = runtime.encode(features)
    with runtime.baked(steering.edits[0]):
        assert torch.allclose(runtime.encode(features), hooked, atol=1e-5)
    assert torch.equal(bias, before)


def test_a_change_of_alpha_is_timed(monkeypatch):
    pytest.importorskip("faster_whisper", reason="pip install 'whisper-steer[faster]'")
    monkeypatch.setattr(
        latency_runtimes, "dimensions", lambda shape: load_model("mini.en", device="cpu").dims
    )
    runtime = object.__new__(latency_runtimes.FasterRuntime)  # else it would convert a model of its own
    runtime.openai, runtime.path = latency_runtimes.OpenAIRuntime(make_tiny_whisper(), "cpu"), str(mini_ct2())
    runtime.options = CPU
    ticks = iter(range(100))
    row = latency.alpha_change(runtime, "faster", "tiny", 3, lambda: float(next(ticks) ** 2))
    assert (row.mode, row.encoder_seconds, row.rounds) == ("alpha_change", 5.0, 3)  # of 1, 5, 9


@pytest.mark.parametrize("vocabulary", [51864, 51865])
def test_transformers_writes_as_many_tokens_as_the_others(monkeypatch, vocabulary):
    pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    monkeypatch.setattr(latency_runtimes, "TOKENS", 5)
    runtime = latency_runtimes.TransformersRuntime(
        make_tiny_whisper(dims=replace(TINY_DIMS, n_vocab=vocabulary)), "cpu"
    )
    encoded, passes = runtime.encode(runtime.features(latency_runtimes.sound(2))), []
    runtime.model.model.decoder.register_forward_hook(lambda *call: passes.append(1))
    assert runtime.decode(encoded).shape == (2, 5) and len(passes) == 5


def test_whisper_cpp_is_measured_with_its_own_files(monkeypatch):
    pytest.importorskip("pywhispercpp.model", reason="pip install pywhispercpp")
    monkeypatch.setattr(latency_runtimes, "TOKENS", 2)
    model = make_tiny_whisper()
    runtime = latency_runtimes.WhisperCppRuntime(model, "cpu")
    shift = latency_runtimes.steering_for("shift_baked", None, model.dims).edits[0]
    features = runtime.features(latency_runtimes.sound(1))

    def logits():
        runtime.decode(runtime.encode(features))
        return np.array(runtime.calls.whisper_get_logits(runtime.opened.context))

    plain = logits()
    with runtime.baked(shift):
        baked = logits()
        with runtime.baked(shift):
            assert np.array_equal(logits(), baked)
    assert np.array_equal(logits(), plain) and not np.allclose(baked, plain)
    runtime.folder.cleanup()
    with pytest.raises(UsageError, match="but for a baked shift"):
        runtime.steered(None)
    with pytest.raises(UsageError, match="on the CPU, not on cuda"):
        latency_runtimes.WhisperCppRuntime(model, "cuda")


def test_half_precision_is_used_and_left_again(monkeypatch):
    """One runtime for both: features and activations follow, and each row says which it was."""
    model, seen = brief_whisper(), []
    runtime = latency_runtimes.OpenAIRuntime(model, "cpu")
    sound = latency_runtimes.sound(1)
    for dtype in ("float16", "float32"):
        runtime.use(dtype)
        encoded = runtime.encode(runtime.features(sound))
        assert str(encoded.dtype) == f"torch.{dtype}"
    fresh = latency_runtimes.OpenAIRuntime(brief_whisper(), "cpu")
    assert torch.equal(encoded, fresh.encode(fresh.features(sound)))

    class Recorder:
        def use(self, dtype):
            seen.append(dtype)

    def one_row(runtime, *given):
        yield replace(ROW, mode="gate")

    monkeypatch.setattr(latency, "nonspeech", lambda *given: replace(ROW, mode="nonspeech", dtype=given[-1]))
    monkeypatch.setattr(latency, "measure", one_row)
    monkeypatch.setattr(latency_runtimes, "random_model", lambda shape: None)
    monkeypatch.setattr(latency_runtimes, "stream_spread", lambda model, device: 1.0)
    monkeypatch.setitem(latency_runtimes.MAKERS, "openai", lambda model, device: Recorder())
    words = ["--shapes", "tiny", "--batches", "1", "2", "--rounds", "1", "--runtimes", "openai"]
    rows = latency.run(latency.parser().parse_args([*words, "--dtypes", "float32", "float16"]))
    assert [row.dtype for row in rows] == ["float32", "float16"] * 3
    assert seen == ["float16", "float32", "float16"]


def test_the_steering_is_on_the_device_before_the_clock_runs(monkeypatch):
    """A handle copies it there when it is first used; that is done once for as long as a model is steered."""
    model = brief_whisper()
    runtime = latency_runtimes.OpenAIRuntime(model, "cpu")
    with runtime.steered(latency_runtimes.steering_for("gated_latents", 100, model.dims)):
        (handle,) = handles_of(model)
        assert list(handle._by_device) == [model.device]
    assert handles_of(model) == ()


def test_only_the_modes_that_are_asked_for():
    args = latency.parser().parse_args(["--modes", "latents", "gate"])
    assert modes_of("openai", args.modes) == [("latents", 10), ("latents", 100), ("gate", 100)]


def test_wrong_usage(capsys):
    assert latency.main(["--rounds", "0"]) == 2
    assert "--rounds and --batches must be at least 1" in capsys.readouterr().err
    assert latency.main(["--dtypes", "float16"]) == 2
    assert "--dtypes float16 is for --device cuda" in capsys.readouterr().err


def test_float16_of_a_runtime_that_has_none_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    words = ["--device", "cuda", "--runtimes", "openai", "faster", "--dtypes", "float16"]
    assert latency.main(words) == 2
    assert "faster is measured in float32 only" in capsys.readouterr().err

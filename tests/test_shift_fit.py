"""The Shift in the place of another steering: exact where that is a Shift, measured where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_whisper
from gates import changed_gate
from tiny import audio, frame_gate, latents, outputs, says, shift
from whisper.audio import log_mel_spectrogram, pad_or_trim

from calibration.shift_fit import ShiftRefused, fit_from_folder, fit_shift, least_squares_shifts
from whisper_steer.audio import load_audio
from whisper_steer.bake import constant_shifts
from whisper_steer.errors import UsageError
from whisper_steer.steering import Shift, Steering
from whisper_steer.zoo import bundled_dir, load_model, load_steering


def test_a_shift_is_its_own_best_shift() -> None:
    model = make_tiny_whisper()
    steering = Steering((shift(1, 0.5), shift(2, 1.5, seed=9)))
    vectors, explained = least_squares_shifts(model, steering, 0.8, [audio(1, 5), audio(2, 5)])
    for layer, vector in constant_shifts(steering, 0.8).items():
        assert np.allclose(vectors[layer].numpy(), vector, atol=1e-5)
    assert explained == pytest.approx({1: 1.0, 2: 1.0}, abs=1e-5)


@pytest.mark.parametrize("withheld", [False, True])
def test_mean_of_a_gated_latent_edit(withheld: bool) -> None:
    """Against the mean written out by hand; the share by the definition of the residual."""
    model = make_tiny_whisper()
    threshold = -1e6 if withheld else 1e6
    steering = Steering((latents(2),), changed_gate(frame_gate(1), threshold=threshold))
    clips = [audio(1, 5), audio(4, 30)]
    vectors, explained = least_squares_shifts(model, steering, 1.0, clips)
    changes = []
    for clip in clips:
        _, blocks = outputs(model, log_mel_spectrogram(pad_or_trim(clip))[None])
        gate = steering.gate
        assert gate is not None
        g = gate.frame_gate(gate.frame_logits(blocks[1]))
        if not withheld:  # padding is left alone; a mel window hangs over its beginning
            g[:, len(clip) // 320 + 1 :] = 0
        changes.append(steering.edit(blocks[2], 2, 1.0, g) - blocks[2])
    pooled = torch.cat(changes, dim=1)[0]
    assert torch.allclose(vectors[2], pooled.mean(0), atol=1e-5)
    residual = ((pooled - pooled.mean(0)) ** 2).sum() / (pooled**2).sum()
    assert explained[2] == pytest.approx(1 - float(residual), abs=1e-4)
    assert 0 < explained[2] < 1
    assert not any(model.encoder.blocks[layer]._forward_hooks for layer in range(4))


def test_refusals(tmp_path: Path) -> None:
    model = make_tiny_whisper()
    with pytest.raises(UsageError, match="0 speech and 1 non-speech clips"):
        fit_shift(model, Steering((shift(),)), [], [audio(1, 1)])
    with pytest.raises(UsageError, match="only withholds windows"):
        fit_shift(model, Steering((), says(True)), [audio(1, 1)], [audio(2, 1)])
    with pytest.raises(UsageError, match="has no folder speech"):
        fit_from_folder("mini.en", None, tmp_path)


def test_bundled_steering_on_the_demo(tmp_path: Path) -> None:
    """What the gate does is lost, and the rates say so."""
    demo = bundled_dir() / "mini.en" / "demo"
    for kind, name in (("speech", "speech"), ("nonspeech", "noise")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / f"{name}.flac").write_bytes((demo / f"{name}.flac").read_bytes())
    fit = fit_from_folder("mini.en", None, tmp_path, anyway=True)
    plain, steered = fit.rows[:2]
    assert (plain.multiple, plain.nonspeech.text_fpr.value, plain.speech.wer.value) == (0.0, 1.0, 0.0)
    assert (steered.multiple, steered.nonspeech.text_fpr.value, steered.speech.wer.value) == (None, 0.0, 0.0)
    assert [row.multiple for row in fit.rows[2:]] == [0.5, 1.0, 2.0]
    edited = {edit.layer for edit in load_steering("default", "mini.en").edits}
    assert set(fit.explained) == edited and all(share <= 1.0 for share in fit.explained.values())
    # it works by its gate: no Shift takes its place, and that is said
    chosen = next(row for row in fit.rows if row.multiple == fit.chosen)
    kept = chosen.speech.wer.value <= 0.01
    words = "that keeps the WER makes fewer words" if kept else "keeps the WER within 1.0 points of the plain"
    assert fit.problem is not None and fit.problem.startswith(f"no strength of the Shift {words}")
    assert "(plain: WER 0.0%, text-FPR 100.0%; x 0.5: WER " in fit.problem
    assert fit.record()["problem"] == fit.steering.metadata["rates"]["problem"] == fit.problem
    assert fit.steering.metadata["name"] == "default-shift"
    assert constant_shifts(fit.steering, 1.0).keys() == edited
    assert json.loads(json.dumps(fit.record()))["chosen"] == fit.chosen
    lines = fit.lines()
    assert len(lines) == 8 and lines[-1] == f"baked all the same: {fit.problem}"
    assert lines[2].startswith("plain") and sum("<- baked" in line for line in lines) == 1


def test_a_shift_that_ruins_recognition_or_does_nothing_is_refused() -> None:
    """Refused in one line, with the rates; if speech is lost at every strength, the gentlest is to be had."""
    model, clips = load_model("mini.en", device="cpu"), {}
    for name in ("speech", "noise"):
        clips[name] = load_audio(bundled_dir() / "mini.en" / "demo" / f"{name}.flac")
    loud = Steering((Shift(2, torch.randn(192, generator=torch.Generator().manual_seed(0)), 60.0),))
    arguments: dict[str, Any] = {"multiples": (1.0, 0.5)}
    with pytest.raises(
        ShiftRefused, match=r"keeps the WER within 1.0 points of the plain model's \(plain: WER 0"
    ):
        fit_shift(model, loud, [clips["speech"]], [clips["noise"]], **arguments)
    forced = fit_shift(model, loud, [clips["speech"]], [clips["noise"]], anyway=True, **arguments)
    assert forced.chosen == 0.5 and forced.steering.metadata["rates"]["problem"] == forced.problem
    assert forced.rows[2].speech.wer.value > 0.5
    quiet = Steering((Shift(2, torch.ones(192), 1e-6),))
    with pytest.raises(
        ShiftRefused, match="that keeps the WER makes fewer words .plain: WER 0.0%, text-FPR 100"
    ):
        fit_shift(model, quiet, [clips["speech"]], [clips["noise"]], multiples=(1.0,))
    assert ShiftRefused.exit_code == 1

"""The gate that stays alone is held against the budget, too."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from calibration.decoding import ClipTranscript, DecodedWindow
from calibration.gated_hearing import GatedHearing
from calibration.hearing import compare
from calibration.selection import Budget, CalibrationClip, lowest_threshold, window_choice
from calibration.winners import _gate_alone
from whisper_steer.steering import Gate, Probe

WORDS = "red green blue pink grey white black brown orange purple"


def clip(name: str, row: int, reference: str | None) -> CalibrationClip:
    text = reference or "thank you"
    window = DecodedWindow(0, 200, text, 0.1, -0.2, 0.0)
    transcript = ClipTranscript(text, (window,), ((0.1, -0.2),), 2.0)
    return CalibrationClip(name, "speech" if reference else "noise", reference, transcript, (row,))


class Cached(GatedHearing):
    def hear(self, edits, clips, label, *, alpha=1.0, progress=True):
        plain = {(c.set, c.id): c.transcript for c in clips}
        return compare(clips, list(self.withheld_at(plain, clips, alpha).values()))


def test_the_gate_alone_is_made_more_careful_until_it_keeps_the_budget() -> None:
    clips = [clip(f"s{i}", i, WORDS) for i in range(40)] + [clip(f"n{i}", 40 + i, None) for i in range(10)]
    # the lost clip is the one most like noise; the noise lies above and below it
    logits = np.array([-9.0] * 39 + [0.0] + [-1.0] * 5 + [2.0] * 5)
    budget = Budget(wer_rise=0.1, share=0.1, set_share=0.1, set_rise=0.1)  # 3 of 40 by the interval: 0.075
    probe = Probe(0, "raw", torch.ones(2), mean=torch.zeros(2), std=torch.ones(2))
    gate = Gate((probe,), 0.0, 1, threshold=0.0, spread=0.5, frame_scale=1.0, frame_bias=0.0)
    choice = window_choice("g", gate, logits, clips, budget)
    assert choice.gate.threshold < -1 and choice.result.text_fpr == 0.0
    calibration = SimpleNamespace(budget=budget, clips=clips)
    hearing = Cached(calibration, choice.gate, choice.window_logits)
    checked: list = []
    kept, heard = _gate_alone(calibration, choice, hearing, clips, checked, False)
    assert kept is hearing and heard.emptied == 1 / 40 and len(checked) == 1
    assert checked[0]["wer_rise"] == 10 / 400 and checked[0]["threshold"] == choice.gate.threshold
    # of half the clips one lost one is 3 of 20 by the interval, which is more than a tenth
    kept, heard = _gate_alone(calibration, choice, hearing, clips[20:], checked, False)
    assert 0 < kept.gate.threshold < 2 and kept.gate.spread == 0.5
    assert kept.gate.threshold == lowest_threshold(clips, logits, budget.times(0.5))
    assert heard.emptied == 0.0 and heard.rise_hi == 0.0
    assert [one["emptied"] for one in checked[1:]] == [1 / 20, 0.0]

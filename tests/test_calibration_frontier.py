"""Points of a frontier that get names."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibration.decoding import ClipTranscript, DecodedWindow
from calibration.frontier import measure_frontier, profiles
from calibration.gated_hearing import GatedHearing
from calibration.hearing import compare
from calibration.selection import CalibrationClip
from whisper_steer.steering import Gate, MeanAblation, Probe, Shift


def points(**changes: dict[str, float]) -> list[dict[str, float]]:
    """alpha 0.5, 0.75, 1, 2, 4 with a WER that rises by 0.0, 0.0005, 0.001, 0.005, 0.008 at most."""
    rows = [(0.5, 0.0, 0.0), (0.75, 0.0005, 0.0), (1, 0.001, 0.002), (2, 0.005, 0.004), (4, 0.008, 0.009)]
    return [
        {"alpha": alpha, "wer_rise_hi": rise, "empty_speech": empty} | changes.get(f"at_{alpha}", {})
        for alpha, rise, empty in rows
    ]


def test_profiles_are_the_furthest_points_within_their_budgets():
    # ten budgets of 0.001: every point is within them
    assert profiles(points(), 0.001) == {"gentle": 0.5, "balanced": 1.0, "strict": 4}
    # ten budgets of 0.0007: 0.008 is outside
    assert profiles(points(), 0.0007)["strict"] == 2
    assert profiles(points(at_4={"empty_speech": 0.0101}), 0.001)["strict"] == 2
    assert profiles(points(at_2={"wer_rise_hi": 1.0}, at_4={"wer_rise_hi": 1.0}), 0.001)["strict"] == 1.0
    # no point without a lost word: the smallest
    assert profiles(points(at_0={}, **{"at_0.5": {"wer_rise_hi": 0.001}}), 0.001)["gentle"] == 0.5


# -- points ---------------------------------------------------------------------------------------------

WORDS = "red green blue pink grey white black brown orange purple"


def heard(text: str) -> ClipTranscript:
    return ClipTranscript(text, (DecodedWindow(0, 200, text, 0.1, -0.2, 0.0),), ((0.1, -0.2),), 2.0)


def calibration_clips() -> list[CalibrationClip]:
    """Four of speech (rows 0 to 3), eight non-speech (4 to 11); plain Whisper writes words on all."""
    spoken = [CalibrationClip(f"s{i}", "speech", WORDS, heard(WORDS), (i,)) for i in range(4)]
    return spoken + [CalibrationClip(f"n{i}", "noise", None, heard("thank you"), (4 + i,)) for i in range(8)]


class Made(GatedHearing):
    """Windows of non-speech have logits 1 to 8, those of speech -9 to -6; the threshold is 3.5 at alpha 1 and
    5.5 at 0.25. Edits act in all non-speech and in s3; what they leave of a clip is told."""

    def __init__(self, after: dict[str, str]):
        probe = Probe(0, "raw", torch.ones(2), mean=torch.zeros(2), std=torch.ones(2))
        self.gate = Gate((probe,), 0.0, 1, threshold=3.5, spread=1.0, frame_scale=1.0, frame_bias=0.0)
        self.window_logits = np.array([-9.0, -8, -7, -6, 1, 2, 3, 4, 5, 6, 7, 8])
        self.after, self.asked = after, []

    def touched(self, clips, *, batch=8, progress=True):
        return {(c.set, c.id) for c in clips if not c.is_speech or c.id == "s3"}

    def hear(self, edits, clips, label, *, alpha=1.0, progress=True):
        self.asked.append((alpha, [clip.id for clip in clips]))
        plain = {(c.set, c.id): heard(self.after.get(c.id, c.transcript.text)) for c in clips}
        return compare(clips, list(self.withheld_at(plain, clips, alpha).values()))


def frontier_of(made: Made, subset: list[str], edits: tuple = (Shift(0, torch.ones(2), 1.0),)) -> list[dict]:
    everything = calibration_clips()
    at_one = made.hear(edits, everything, "")
    made.asked.clear()
    chosen = [clip for clip in everything if clip.id in subset]
    return measure_frontier(made, edits, chosen, at_one, everything, progress=False)


def test_points_speak_for_all_clips_and_fall_with_alpha() -> None:
    # withheld at alpha 0.25 (above 5.5): 3 of 8; at 0.5 (4.5): 4; 0.75 (3.92): 5; 1 (3.5): 5; at 1.5: 2.92
    made = Made({})
    points = frontier_of(made, ["n0", "n3", "s3"])
    by_alpha = {one["alpha"]: one for one in points}
    kept = {0.25: 5, 0.5: 4, 0.75: 3, 1.0: 3, 1.5: 2, 2.0: 2, 4.0: 1}  # 4: threshold 1.5
    assert {alpha: one["text_fpr"] for alpha, one in by_alpha.items()} == {a: k / 8 for a, k in kept.items()}
    assert [one["text_fpr"] for one in points] == sorted((one["text_fpr"] for one in points), reverse=True)
    assert (
        [one["hr"] for one in points] == [one["nsp_fpr"] for one in points] == [k / 8 for k in kept.values()]
    )
    assert {one["clips"] for one in points} == {12} and {one["nonspeech_clips"] for one in points} == {8}
    assert all(one["wer_rise"] == one["empty_speech"] == 0.0 and one["speech_clips"] == 4 for one in points)
    # heard is only what an edit may change, of the clips that may be heard: n3 is withheld from alpha 0.75 on
    assert made.asked[:3] == [(0.25, ["s3", "n0", "n3"]), (0.5, ["s3", "n0", "n3"]), (0.75, ["s3", "n0"])]
    assert [one["unheard_clips"] for one in points] == [3, 2, 2, 0, 1, 1, 0]


def test_what_is_heard_stands_for_what_is_not() -> None:
    # of five that are kept at alpha 0.25 three are heard, the edit silences one: 5 less 1 x 5 / 3
    made = Made({"n0": "", "s3": WORDS.replace("red ", "")})
    first = frontier_of(made, ["n0", "n1", "n2", "s3"])[0]
    assert first["text_fpr"] == pytest.approx(10 / 24)
    assert first["text_fpr_lo"] < 10 / 24 < first["text_fpr_hi"] <= 1.0
    assert first["wer_rise"] == 1 / 40 and first["wer_rise_hi"] >= 2 / 40  # s3 is the one clip it may change
    # all of them heard: nothing is estimated
    made = Made({"n0": "", "n4": ""})
    first = frontier_of(made, [f"n{i}" for i in range(8)])[0]
    assert first["text_fpr"] == 3 / 8 and first["unheard_clips"] == 0
    assert made.asked[0] == (0.25, ["s3", "n0", "n1", "n2", "n3", "n4"])  # s3: none of speech was given


def test_without_edits_and_with_full_silence_nothing_is_heard_again() -> None:
    made = Made({"n0": ""})
    points = frontier_of(made, ["n0", "n1"], edits=())
    assert made.asked == [] and [one["text_fpr"] for one in points[:2]] == [5 / 8, 4 / 8]
    frontier_of(made, ["n0", "n1"], edits=(MeanAblation(0, torch.zeros(1, 2)),))
    assert [alpha for alpha, _ in made.asked] == [0.25, 0.5, 0.75]

"""Silence that frames are replaced by, and recordings in which speech and other sounds take turns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibration_tools import RATE, make_terse_whisper, sound

from calibration.activations import MAX_FRAMES, encode_clip
from calibration.corpus import Clip
from calibration.joined import GAP, join_clips
from calibration.silence import MARGIN, _spread, fit_silence
from whisper_steer.errors import UsageError


@pytest.fixture(scope="module")
def fitted():
    model = make_terse_whisper(1)
    speech = [sound(f"s{i}", 1.0 + 0.2 * i, speech=True) for i in range(12)]
    return model, speech, fit_silence(model, speech, [0, 1], seed=5, progress=False)


def test_the_mean_is_that_of_the_silent_frames_of_every_other_window(fitted):
    model, speech, silence = fitted
    placed = _spread(speech, np.random.default_rng(5))[::2]
    for position in (3, 700, 1499):
        silent = [
            encode_clip(model, one.audio).windows[1, 0, position]
            for one in placed
            if position < one.until or position >= one.since
        ]
        assert len(silent) >= 4  # the speech is short: nearly every position is silent in most windows
        torch.testing.assert_close(
            silence[1].mean[position], torch.stack(silent).mean(dim=0), rtol=1e-3, atol=1e-4
        )
    assert silence[0].mean.shape == (MAX_FRAMES, 32) and silence[0].layer == 0 and silence[0].strength == 1.0


def test_nearly_all_silent_frames_of_the_other_windows_are_within_the_tolerance(fitted):
    model, speech, silence = fitted
    placed = _spread(speech, np.random.default_rng(5))
    within, total = 0, 0
    for one in placed[1::2]:
        x = encode_clip(model, one.audio).windows[0]
        changed = (silence[0](x, 1.0) != x).any(dim=-1)[0]
        for position in range(MAX_FRAMES):
            seen = sum(position < other.until or position >= other.since for other in placed[::2])
            if (position < one.until or position >= one.since) and seen >= 4:
                within, total = within + int(not changed[position]), total + 1
    assert total > 4 * MAX_FRAMES and within / total == pytest.approx(0.99, abs=0.001)


def test_the_speech_is_put_anywhere_and_cut_where_it_is_long():
    placed = _spread(
        [np.ones(2 * RATE, np.float32), np.ones(40 * RATE, np.float32)], np.random.default_rng(0)
    )
    for one, seconds in zip(placed, (2, 20), strict=True):
        (loud,) = np.nonzero(one.audio)
        assert len(loud) == seconds * RATE and len(one.audio) <= 30 * RATE
        assert one.until == -(-loud[0] // 320) - MARGIN
        assert one.since == min(-(-len(one.audio) // 320), MAX_FRAMES) + MARGIN


def test_too_little_speech_is_refused():
    with pytest.raises(UsageError, match="3 speech clips: expected at least 8"):
        fit_silence(make_terse_whisper(0), [np.zeros(RATE, np.float32)] * 3, progress=False)


def clip(name, kind, text=None, value=0.5, seconds=1.0):
    audio = np.full(int(seconds * RATE), value, np.float32)
    return Clip(name, kind, "x", "calibration", text, audio=lambda: audio)


SETS = {
    "speech": [clip("a", "speech", "red"), clip("b", "speech", "blue")],
    "speech_quiet": [clip("q", "speech", "quiet words")],
    "tones": [clip("t", "nonspeech", value=-0.9, seconds=0.7)],
}


def test_joined_recordings_alternate_and_know_what_is_said():
    joined = join_clips(SETS, count=12, seed=1)
    assert [one.id for one in joined] == [one.id for one in join_clips(SETS, count=12, seed=1)]
    assert len({one.id for one in joined}) == 12
    for number, one in enumerate(joined):
        audio = one.load()
        assert np.array_equal(audio, one.load())
        spoken = audio > 0  # speech is positive here, the tone negative
        edges = np.flatnonzero(np.diff(spoken.astype(int)))
        utterances = len(one.text.split())
        assert spoken[0] == (number % 2 == 1) and not spoken[-1]
        assert len(edges) + 1 == 2 * utterances + (number % 2 == 0)
        assert spoken.sum() == utterances * RATE
        assert "quiet" not in one.text  # easy sets only, where there are any
        gaps = np.split(audio, edges + 1)[number % 2 :: 2]
        assert all(GAP[0] * RATE - 1 <= len(gap) <= GAP[1] * RATE for gap in gaps)
        assert all(0.1 <= np.abs(gap).max() <= 0.6 for gap in gaps)


def test_joining_needs_both_kinds():
    hard = {name: SETS[name] for name in ("speech_quiet", "tones")}
    assert "quiet words" in join_clips(hard, count=1)[0].text
    with pytest.raises(UsageError, match="0 clips of speech and 1 without"):
        join_clips({"tones": SETS["tones"]})

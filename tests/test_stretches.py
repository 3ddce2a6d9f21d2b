"""Stretches of speech from given probabilities: by hand, and what holds for all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_steer.errors import UsageError
from whisper_steer.stretches import GateVad, gaps, speech_stretches

# nothing but a threshold: the tests switch on what they are about
BARE = GateVad(
    threshold=0.5, neg_threshold=0.5, min_speech_duration_ms=0, min_silence_duration_ms=0, speech_pad_ms=0
)


def track(*parts: tuple[int, float]) -> np.ndarray:
    """(frames, probability) after each other."""
    return np.concatenate([np.full(count, value) for count, value in parts])


def test_runs_above_the_threshold() -> None:
    speech = track((3, 0.1), (2, 0.5), (4, 0.49), (1, 0.9))
    assert speech_stretches(speech, BARE) == [(3, 5), (9, 10)]
    assert speech_stretches(track((5, 0.2)), BARE) == [] == speech_stretches(np.zeros(0), BARE)


def test_between_the_thresholds_it_stays_as_it_was() -> None:
    options = replace(BARE, threshold=0.6, neg_threshold=0.3)
    speech = track((2, 0.5), (1, 0.6), (3, 0.4), (2, 0.29), (3, 0.5), (1, 0.7), (1, 0.3))
    # 0.5 begins nothing, 0.4 and 0.3 end nothing
    assert speech_stretches(speech, options) == [(2, 6), (11, 13)]


def test_the_threshold_of_ends_by_default() -> None:
    assert GateVad(threshold=0.5, neg_threshold=None).end_threshold == pytest.approx(0.35)
    assert GateVad(threshold=0.1, neg_threshold=None).end_threshold == pytest.approx(0.01)
    assert GateVad(threshold=0.005, neg_threshold=None).end_threshold == pytest.approx(0.005)
    assert GateVad(threshold=0.5, neg_threshold=0.0).end_threshold == 0.0


def test_short_silences_are_bridged_and_short_speech_is_dropped() -> None:
    speech = track((2, 1.0), (4, 0.0), (3, 1.0), (5, 0.0), (1, 1.0), (6, 0.0))
    # 100 ms are 5 frames
    assert speech_stretches(speech, replace(BARE, min_silence_duration_ms=100)) == [(0, 9), (14, 15)]
    assert speech_stretches(speech, replace(BARE, min_speech_duration_ms=60)) == [(6, 9)]
    both = replace(BARE, min_silence_duration_ms=100, min_speech_duration_ms=180)
    assert speech_stretches(speech, both) == [(0, 9)]


def test_padding_ends_with_the_recording_and_shares_small_gaps() -> None:
    speech = track((1, 0.0), (1, 1.0), (5, 0.0), (2, 1.0), (9, 0.0), (1, 1.0), (2, 0.0))
    # 3 frames on both sides: (1, 2) has one before it, 5 to its neighbour are shared 3 to 2
    assert speech_stretches(speech, replace(BARE, speech_pad_ms=60)) == [(0, 5), (5, 12), (15, 21)]


def test_long_stretches_are_cut_at_the_most_silent_frame() -> None:
    options = replace(BARE, threshold=0.1, neg_threshold=0.1, max_speech_duration_s=1.0)  # 50 frames
    speech = np.full(110, 0.9)
    speech[10], speech[30], speech[48], speech[75] = 0.11, 0.3, 0.2, 0.4
    # 10 is too early for the first cut, which may be at 25 .. 50; from 48 on at 73 .. 98
    assert speech_stretches(speech, options) == [(0, 48), (48, 75), (75, 110)]
    # of equals the last one; what remains is at least a quarter of a second
    assert speech_stretches(np.full(51, 0.9), options) == [(0, 39), (39, 51)]
    assert speech_stretches(np.full(50, 0.9), options) == [(0, 50)]


def test_what_cannot_be_judged_is_kept() -> None:
    assert speech_stretches(np.array([0.0, np.nan, 0.0]), BARE) == [(1, 2)]


def test_gaps() -> None:
    assert gaps([(0.0, 1.0), (1.0, 2.0), (3.0, 4.0)], 5.0) == [(2.0, 3.0), (4.0, 5.0)]
    assert gaps([], 5.0) == [(0, 5.0)] and gaps([(0.0, 5.0)], 5.0) == [] == gaps([], 0.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threshold": 1.0}, "threshold 1: expected a probability"),
        ({"threshold": float("nan")}, "threshold nan: expected a finite number"),
        ({"threshold": 0.4, "neg_threshold": 0.5}, "neg_threshold 0.5: expected 0 to the threshold, 0.4"),
        ({"speech_pad_ms": -1}, "speech_pad_ms -1: expected milliseconds >= 0"),
        ({"max_speech_duration_s": 31}, "max_speech_duration_s 31: expected 1 to 30 seconds"),
        ({"window_s": 0.5}, "window_s 0.5: expected 1 to 30 seconds"),
        ({"window_s": 4, "overlap_s": 3}, "overlap_s 3: expected 0 to half of window_s, 2"),
    ],
)
def test_parameters_that_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GateVad(**wrong)


probabilities = st.lists(st.tuples(st.integers(1, 90), st.floats(0, 1)), max_size=20)
durations = st.integers(0, 1000)


@st.composite
def any_options(draw: Any, **fixed: Any) -> GateVad:
    threshold = draw(st.floats(0.01, 0.99))
    values = {
        "threshold": threshold,
        "neg_threshold": draw(st.none() | st.floats(0, threshold)),
        "min_speech_duration_ms": draw(durations),
        "min_silence_duration_ms": draw(durations),
        "speech_pad_ms": draw(durations),
        "max_speech_duration_s": draw(st.floats(1, 30)),
    }
    return GateVad(**{**values, **fixed})


def covered(stretches: list[tuple[int, int]], count: int) -> np.ndarray:
    mask = np.zeros(count, dtype=bool)
    for first, end in stretches:
        mask[first:end] = True
    return mask


@settings(max_examples=60, deadline=None)
@given(probabilities, any_options())
def test_stretches_are_in_order_apart_and_short_enough(
    parts: list[tuple[int, float]], options: GateVad
) -> None:
    speech = track(*parts) if parts else np.zeros(0)
    found = speech_stretches(speech, options)
    assert all(0 <= first < end <= len(speech) for first, end in found)
    assert all(a[1] <= b[0] for a, b in pairwise(found))
    assert all((end - first) * 0.02 <= options.max_speech_duration_s + 1e-9 for first, end in found)
    # a stretch, or the pieces that it was cut into, holds speech that is long enough
    spoken = speech >= options.threshold
    assert not found or spoken[covered(found, len(speech))].any()


@settings(max_examples=60, deadline=None)
@given(probabilities, any_options(min_speech_duration_ms=0))
def test_nothing_above_the_threshold_is_lost(parts: list[tuple[int, float]], options: GateVad) -> None:
    speech = track(*parts) if parts else np.zeros(0)
    inside = covered(speech_stretches(speech, options), len(speech))
    assert inside[speech >= options.threshold].all()


@settings(max_examples=60, deadline=None)
@given(probabilities, any_options(), st.floats(0, 1))
def test_a_lower_threshold_finds_no_less(
    parts: list[tuple[int, float]], options: GateVad, lower: float
) -> None:
    speech = track(*parts) if parts else np.zeros(0)
    end = options.end_threshold
    strict = replace(options, neg_threshold=end)
    threshold = max(end + (options.threshold - end) * lower, 1e-6)
    loose = replace(strict, threshold=threshold, neg_threshold=min(end, threshold))
    a, b = (covered(speech_stretches(speech, o), len(speech)) for o in (strict, loose))
    assert not (a & ~b).any()

"""Intervals that draw speakers and source recordings whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
from benchmark_tools import clip, measured

from benchmarks import grouped, rows
from benchmarks.frontiers import paired_rise
from benchmarks.hearing_cache import clip_record
from calibration.corpus import Clip
from calibration.evaluate import bootstrap_ratio


def test_a_ratio_by_hand() -> None:
    """Two groups of which one has all the errors: a draw holds it 0, 1 or 2 times."""
    found = grouped.ratio([1, 1, 0, 0], [1, 1, 1, 1], ["a", "a", "b", "b"])
    assert (found.value, found.lo, found.hi) == (0.5, 0.0, 1.0)
    found = grouped.share([True, True, False, False], ["a", "b", "a", "b"])
    assert (found.value, found.lo, found.hi) == (0.5, 0.5, 0.5)  # in every group one of two
    assert math.isnan(grouped.ratio([], [], []).value) and math.isnan(grouped.ratio([1], [0], ["a"]).hi)
    with pytest.raises(ValueError, match="2 clips"):
        grouped.ratio([1], [1], ["a", "b"])


def test_clips_that_stand_alone_are_drawn_as_before() -> None:
    events = (np.arange(60) % 3 == 0).astype(float)
    alone = grouped.share(events, [f"clip {number:02d}" for number in range(60)])
    assert alone == bootstrap_ratio(events, np.ones(60))


def test_copies_do_not_narrow_an_interval() -> None:
    rng = np.random.default_rng(0)
    errors, groups = rng.integers(0, 2, 30), [f"{number:02d}" for number in range(30)]
    once = grouped.share(errors, groups)
    twice = grouped.share([*errors, *errors], [*groups, *groups])
    assert (twice.value, twice.lo, twice.hi) == pytest.approx((once.value, once.lo, once.hi))
    naive = grouped.share([*errors, *errors], [str(number) for number in range(60)])
    assert naive.hi - naive.lo < 0.85 * (twice.hi - twice.lo)


def test_draws_are_made_once_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, ...]] = []
    original = grouped.group_draws

    def counting(groups: tuple[str, ...], draws: int, seed: int) -> np.ndarray:
        made.append(tuple(groups))
        return original(groups, draws, seed)

    monkeypatch.setattr(grouped, "group_draws", counting)
    grouped._draws.cache_clear()
    for events in ([1, 0, 0], [0, 1, 1], [0, 0, 0]):
        grouped.share(events, ["x", "y", "y"])
    assert made == [("x", "y", "y")]


def test_a_recording_and_its_telephone_copy_are_one_group() -> None:
    whole = Clip("speech/a.flac", "real_speech", "real_speech", "test", "yes", "speaker 7", path="a.flac")
    from calibration.corpus import _over_telephone

    copy = _over_telephone(whole)
    records = [clip_record(one, "set", np.zeros(16_000, np.float32)) for one in (whole, copy)]
    assert copy.id == "speech/a.flac#telephone" and {one.drawn_with for one in records} == {"speaker 7"}
    made = clip_record(Clip("speech/0001", "speech", "speech", "test"), "speech", np.zeros(16, np.float32))
    assert made.drawn_with == "speech/0001"


def test_rows_differences_and_frontiers_draw_the_same_groups() -> None:
    """Two speakers of two clips each; all errors are one speaker's."""
    clips = [clip(f"speech/{number}", text="open the green door") for number in range(4)]
    for number, one in enumerate(clips):
        object.__setattr__(one, "group", "ab"[number // 2])
    said = ["open", "open", "open the green door", "open the green door"]
    mine = {"speech": [measured(one, text) for one, text in zip(clips, said, strict=True)]}
    plain = {"speech": [measured(one, "open the green door") for one in clips]}
    row = rows.summarise(mine, "vad", 0.5)[0]
    assert (row["wer"], row["wer_lo"], row["wer_hi"]) == (0.375, 0.0, 0.75)
    (difference,) = rows.paired(mine, plain, ("vad", 0.5), ("plain", 0.0))
    names = ("wer_diff", "wer_diff_lo", "wer_diff_hi")
    assert tuple(difference[name] for name in names) == (0.375, 0.0, 0.75)
    rise = paired_rise([one.text or "" for one in clips], ["open the green door"] * 4, said, list("aabb"))
    assert (rise.value, rise.lo, rise.hi) == (0.375, 0.0, 0.75)
    noise = [clip(f"noise/{number}", "nonspeech") for number in range(4)]
    for number, one in enumerate(noise):
        object.__setattr__(one, "group", "ab"[number // 2])
    silent = {"noise": [measured(one, text) for one, text in zip(noise, ("you", "you", "", ""), strict=True)]}
    row = rows.summarise(silent, "vad", 0.5)[0]
    assert (row["text_fpr"], row["text_fpr_lo"], row["text_fpr_hi"]) == (0.5, 0.0, 1.0)

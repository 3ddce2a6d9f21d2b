import math

import numpy as np
import pytest

from calibration.evaluate import (
    Outcome,
    bootstrap_ratio,
    bootstrap_share,
    counts_as_speech_nsp,
    escapes_skip_rule,
    evenly,
    group_draws,
    nonspeech_metrics,
    normalise,
    speech_metrics,
    word_errors,
)


def test_word_errors_are_counted_after_whispers_normaliser():
    errors = word_errors("Mister Smith's dog won't eat.", "mr smith's cat will not eat it")
    assert errors is not None
    # mister smith is dog will not eat / mister smith is cat will not eat it
    assert (errors.words, errors.substitutions, errors.deletions, errors.insertions) == (7, 1, 0, 1)
    assert errors.total == 2
    empty = word_errors("blue words", " ... ")
    assert empty is not None and (empty.words, empty.deletions, empty.total) == (2, 2, 2)


def test_an_empty_reference_is_nobodys_error():
    assert word_errors("", "invented") is None
    assert word_errors(" -- ", "invented") is None
    metrics = speech_metrics(["", "red green"], ["invented words", "red green blue"])
    assert metrics.clips == 1 and metrics.words == 2
    assert metrics.wer.value == 0.5 and metrics.ins.value == 0.5 and metrics.sub.value == 0.0


def test_wer_is_a_ratio_of_sums_and_its_parts_add_up():
    metrics = speech_metrics(["red green blue pink", "grey"], ["red brown blue", "grey white"], resamples=200)
    assert metrics.words == 5
    assert metrics.wer.value == pytest.approx(3 / 5)
    assert metrics.sub.value + metrics.del_.value + metrics.ins.value == pytest.approx(metrics.wer.value)
    assert metrics.empty_speech.value == 0.0
    row = metrics.row()
    assert row["del"] == pytest.approx(1 / 5) and row["clips"] == 2
    assert {"wer", "wer_lo", "wer_hi", "sub_lo", "del_hi", "ins", "empty_speech_hi"} <= set(row)


def test_empty_speech_counts_clips_without_words():
    metrics = speech_metrics(["yes", "no", "maybe", ""], ["", " . ", "maybe", ""])
    assert metrics.clips == 3
    assert metrics.empty_speech.value == pytest.approx(2 / 3)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="1 references but 2 hypotheses"):
        speech_metrics(["a"], ["a", "b"])


def test_the_two_rules():
    assert counts_as_speech_nsp(0.49) and not counts_as_speech_nsp(0.5)
    assert escapes_skip_rule(0.59, -5.0)  # not surely silent
    assert escapes_skip_rule(0.99, -0.3)  # confident words
    assert not escapes_skip_rule(0.61, -1.0)


def test_nonspeech_rates():
    outcomes = [
        Outcome("Thank you.", nsp=False, hr=True, seconds=30.0),
        Outcome(" ... ", nsp=False, hr=False, seconds=20.0),
        Outcome("", nsp=True, hr=True, seconds=10.0),
        Outcome("Thanks for watching!", nsp=False, hr=True, seconds=60.0),
    ]
    metrics = nonspeech_metrics(outcomes)
    assert metrics.text_fpr.value == 0.5  # punctuation is no text
    assert metrics.nsp_fpr.value == 0.25 and metrics.hr.value == 0.75
    assert metrics.words_per_min.value == pytest.approx(5 / 2)
    assert metrics.seconds == 120
    assert metrics.row()["text_fpr_lo"] <= 0.5 <= metrics.row()["text_fpr_hi"]


def test_nothing_measured_is_nan():
    metrics = nonspeech_metrics([])
    assert metrics.clips == 0 and math.isnan(metrics.text_fpr.value) and math.isnan(metrics.words_per_min.lo)


def test_bootstrap_interval_covers_the_binomial_one():
    events = np.zeros(400, dtype=bool)
    events[:100] = True
    rate = bootstrap_share(events, resamples=4000)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert rate.value == 0.25
    assert rate.lo == pytest.approx(0.25 - half, abs=0.006)
    assert rate.hi == pytest.approx(0.25 + half, abs=0.006)


def test_bootstrap_repeats_with_its_seed_and_resamples_clips_not_words():
    errors, words = np.array([0, 10, 0, 0]), np.array([10, 10, 10, 10])
    first = bootstrap_ratio(errors, words, seed=3)
    assert first == bootstrap_ratio(errors, words, seed=3)
    assert first != bootstrap_ratio(errors, words, seed=4) or first.hi >= 0.5
    assert first.value == 0.25 and first.lo == 0.0 and first.hi >= 0.5  # one bad clip: wide


def test_groups_are_drawn_whole():
    groups = ["b", "a", "b", "c", "a"]
    drawn = group_draws(groups, 400, seed=2)
    assert drawn.shape == (400, 5) and drawn.dtype == np.float64
    assert (drawn[:, 0] == drawn[:, 2]).all() and (drawn[:, 1] == drawn[:, 4]).all()
    assert (drawn[:, [0, 1, 3]].sum(axis=1) == 3).all()  # as many groups as there are
    assert abs(drawn.mean(axis=0) - 1).max() < 0.15
    assert (drawn == group_draws(groups, 400, seed=2)).all()
    assert (drawn != group_draws(groups, 400, seed=3)).any()
    assert group_draws([], 3, seed=0).shape == (3, 0)


def test_groups_of_one_clip_are_drawn_as_clips_are():
    drawn = group_draws(["c", "a", "b"], 50, seed=1)
    assert (drawn.sum(axis=1) == 3).all()
    wide = group_draws(["x"] * 4, 10, seed=1)
    assert (wide == 1).all()  # a single group: nothing varies


def test_clips_of_one_group_widen_the_interval_and_single_ones_do_not():
    events = np.tile([True, True, True, True, False, False, False, False], 20)
    alone = bootstrap_share(events, resamples=2000)
    assert bootstrap_share(events, resamples=2000, groups=[str(i) for i in range(160)]) == alone
    recordings = [str(i // 4) for i in range(160)]  # four clips each that always agree: 40 observations
    grouped = bootstrap_share(events, resamples=2000, groups=recordings)
    assert grouped.value == alone.value == 0.5
    # half widths of a share of 0.5: 1.96 * 0.5 / sqrt(n)
    assert alone.hi - 0.5 == pytest.approx(0.98 / math.sqrt(160), abs=0.01)
    assert grouped.hi - 0.5 == pytest.approx(0.98 / math.sqrt(40), abs=0.015)
    speech = speech_metrics(
        ["a b"] * 4 + [""], ["a b", "a", "a", "a b", ""], groups=["x", "y", "y", "x", "z"]
    )
    assert speech.wer.value == 0.25 and (speech.wer.lo, speech.wer.hi) == (0.0, 0.5)
    with pytest.raises(ValueError, match="1 groups for 2 clips"):
        bootstrap_share([True, False], groups=["a"])


def test_other_languages_have_whispers_basic_normaliser():
    assert normalise("Um.") == "" and normalise("Um.", "pt") == "um"  # a filler in English, a word there
    errors = word_errors("Die Straße, naß", "die straße nass", "de")
    assert errors is not None and (errors.words, errors.substitutions) == (3, 1)
    letters = word_errors("你好世界", "你好世", "zh")  # no spaces: letters are the words
    assert letters is not None and (letters.words, letters.deletions) == (4, 1)
    assert Outcome("Um.", True, True, 60.0, "pt").text_fp and not Outcome("Um.", True, True, 60.0).text_fp
    metrics = speech_metrics(["um dois"], ["dois"], language="pt")
    assert metrics.words == 2 and metrics.wer.value == 0.5


def test_bootstrap_rejects_other_shapes():
    with pytest.raises(ValueError, match="two vectors of one length"):
        bootstrap_ratio(np.zeros(3), np.zeros(4))


def test_evenly_takes_from_the_whole_range():
    assert evenly(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert evenly([1, 2], 5) == [1, 2]


def test_normalise_strips():
    assert normalise("  Thank YOU!  ") == "thank you"

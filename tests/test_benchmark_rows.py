"""Rows and paired differences of the trade-off benchmark, and how they are shown."""

from __future__ import annotations

import csv
import io

import pytest
from benchmark_tools import clip, measured

from benchmarks import reports, rows

# -- rows -----------------------------------------------------------------------------------------------


def test_summary_counts_by_hand() -> None:
    sets = {
        "speech": [
            measured(clip("speech/0", text="open the green door"), "open the grey door"),
            measured(clip("speech/1", text="close it"), ""),
        ],
        "real_speech": [
            measured(clip("real/0", "real_speech", "good morning", "a.flac"), "good morning you")
        ],
        "noise": [
            measured(clip("noise/0", "nonspeech"), "Thanks for watching!", nsp=False),
            measured(clip("noise/1", "nonspeech", path="b.ogg"), "", nsp=False, hr=False, seconds=1.0),
        ],
    }
    found = {row["set"]: row for row in rows.summarise(sets, "vad", 0.5)}
    pools = ["all_speech", "all_nonspeech"]
    halves = [pool + half for pool in pools for half in ("_synthetic", "_real")]
    assert list(found) == ["speech", "real_speech", "noise", *pools, *halves, "all"]
    assert all(tuple(row) == reports.COLUMNS for row in found.values())
    assert {(row["method"], row["alpha"]) for row in found.values()} == {("vad", 0.5)}

    speech = found["speech"]
    assert (speech["sub"], speech["del"], speech["ins"]) == pytest.approx((1 / 6, 2 / 6, 0.0))
    assert speech["wer"] == pytest.approx(0.5)
    assert speech["empty_speech"] == 0.5
    assert speech["clips"] == 2 and speech["seconds"] == 4.0 and speech["audio"] == "synthetic"
    assert all(speech[name] is None for name in ("text_fpr", "text_fpr_lo", "nsp_fpr", "words_per_min_hi"))

    pooled = found["all_speech"]
    assert pooled["wer"] == pytest.approx(4 / 8) and pooled["ins"] == pytest.approx(1 / 8)
    assert pooled["audio"] == "synthetic+real" and found["real_speech"]["audio"] == "real"

    noise = found["noise"]
    assert noise["text_fpr"] == 0.5 and noise["hr"] == 0.5  # a confident caption passes the skip rule
    assert noise["nsp_fpr"] == 0.0  # although no_speech_prob is high
    assert noise["words_per_min"] == pytest.approx(3.0)  # three words in a minute
    assert noise["wer"] is None and noise["empty_speech_hi"] is None
    assert {**found["all_nonspeech"], "set": "noise"} == noise
    assert {**found["all_speech_synthetic"], "set": "speech"} == speech
    assert {**found["all_speech_real"], "set": "real_speech"} == found["real_speech"]
    assert found["all_nonspeech_synthetic"]["text_fpr"] == 1.0
    assert found["all_nonspeech_real"]["text_fpr"] == 0.0

    both = found["all"]
    assert both["clips"] == 5 and both["seconds"] == 9.0 and both["audio"] == "synthetic+real"
    for pool, rates in (("all_speech", reports.SPEECH_RATES), ("all_nonspeech", reports.NONSPEECH_RATES)):
        for rate in rates:
            assert both[rate] == found[pool][rate] and both[f"{rate}_hi"] == found[pool][f"{rate}_hi"]
    for row in found.values():
        for name in reports.RATES:
            if row[name] is not None:
                assert row[f"{name}_lo"] <= row[name] <= row[f"{name}_hi"]


def test_lost_clips_are_those_whose_right_words_are_gone() -> None:
    clips = [clip(f"speech/{i}", text="open the green door") for i in range(4)]
    before = ["open a green door", "Thank you for watching.", "", "open the green door"]
    after = ["", "", "", "open"]
    plain = {"speech": [measured(one, text) for one, text in zip(clips, before, strict=True)]}
    mine = {"speech": [measured(one, text) for one, text in zip(clips, after, strict=True)]}
    right = rows.understood(plain)
    assert list(right.values()) == [True, False, False, True]
    row = rows.summarise(mine, "vad", 0.5, right)[0]
    assert row["empty_speech"] == 0.75 and row["lost_speech"] == 0.25  # the caption nobody said is no loss
    assert rows.summarise(plain, "plain", 0.0, right)[0]["lost_speech"] == 0.0
    assert rows.summarise(mine, "vad", 0.5)[0]["lost_speech"] is None


def test_scores_that_a_runtime_does_not_show_are_none() -> None:
    items = [
        measured(clip("noise/0", "nonspeech"), "you", nsp=None, hr=None),
        measured(clip("noise/1", "nonspeech"), "", nsp=False, hr=False),
    ]
    row = rows.summarise({"noise": items}, "faster", 0.5)[0]
    assert (row["nsp_fpr"], row["nsp_fpr_lo"], row["hr"], row["hr_hi"]) == (None,) * 4
    assert row["text_fpr"] == 0.5 and row["words_per_min"] == pytest.approx(1.0)


def test_paired_differences_by_hand() -> None:
    speech = [clip(f"speech/{number}", text="open the green door") for number in range(2)]
    real = clip("speech/2", "real_speech", "yes", "c.flac")
    noise = [clip(f"noise/{number}", "nonspeech") for number in range(4)]
    ours = {
        "speech": [*(measured(item, "open the green door") for item in speech), measured(real, "")],
        "noise": [measured(item, "") for item in noise[:3]] + [measured(noise[3], "you")],
    }
    theirs = {
        "speech": [
            measured(speech[0], "open the green"), measured(speech[1], "open the green door"),
            measured(real, "yes"),
        ],
        "noise": [measured(item, "bye") for item in noise[:3]] + [measured(noise[3], "")],
    }  # fmt: skip
    found = rows.paired(theirs, ours, ("vad", 0.5), ("whisper-steer", 1.0))
    assert [row["set"] for row in found] == ["all", "all_synthetic", "all_real"]
    assert all(tuple(row) == rows.PAIRED_COLUMNS for row in found)
    both, synthetic, recorded = found
    assert (both["method"], both["alpha"], both["reference"], both["clips"]) == (
        "vad",
        0.5,
        "whisper-steer",
        7,
    )
    assert both["text_fpr_diff"] == pytest.approx((3 - 1) / 4)
    assert both["wer_diff"] == pytest.approx((1 - 1) / 9)  # one word lost, one that ours lost
    assert both["empty_speech_diff"] == pytest.approx(-1 / 3)
    assert synthetic["wer_diff"] == pytest.approx(1 / 8) and synthetic["empty_speech_diff"] == 0.0
    assert recorded["wer_diff"] == -1.0 and recorded["text_fpr_diff"] is None
    for row in found:
        for name in rows.DIFFERENCES:
            if row[f"{name}_diff"] is not None:
                assert row[f"{name}_diff_lo"] <= row[f"{name}_diff"] <= row[f"{name}_diff_hi"]
    same = rows.paired(ours, ours, ("whisper-steer", 1.0), ("whisper-steer", 1.0))[0]
    assert {same[f"{name}_diff{end}"] for name in rows.DIFFERENCES for end in ("", "_lo", "_hi")} == {0.0}


# -- showing --------------------------------------------------------------------------------------------


def made_rows() -> list[reports.Row]:
    """Two methods: ours 60 -> 3 % and +0.08 points, the other 60 -> 30 % and +20 points."""
    rows = []
    for method, alpha, fpr, wer in (
        ("whisper-steer", 0.0, 0.6, 0.04),
        ("whisper-steer", 1.0, 0.03, 0.0408),
        ("audiosae", 0.0, 0.6, 0.04),
        ("audiosae", 1.0, 0.3, 0.24),
    ):
        for name in ("noise", "speech", "all_speech", "all_nonspeech"):
            row: reports.Row = dict.fromkeys(reports.COLUMNS)
            row |= {"method": method, "alpha": alpha, "set": name}
            row |= {"clips": 50, "audio": "synthetic", "seconds": 1.5}
            rates = dict.fromkeys(reports.NONSPEECH_RATES, fpr)
            if "noise" not in name and name != "all_nonspeech":
                rates = dict.fromkeys(reports.SPEECH_RATES, wer)
            for rate, value in rates.items():
                row |= {rate: value, f"{rate}_lo": value * 0.5, f"{rate}_hi": value * 1.5}
            rows.append(row)
    return rows


def test_headline_judges_against_the_targets() -> None:
    (ours,) = reports.headline(made_rows())  # the targets are ours alone
    assert ours == (
        "whisper-steer, alpha 1: text-FPR 60.0 -> 3.0 % (-95 % relative; target -95 %: reached); "
        "WER 4.00 -> 4.08 % (+0.08 points; target at most +0.1: reached); "
        "empty speech clips 4.0 -> 4.1 % (target at most 0.2: missed); "
        "of them with a right word before: 4.1 %"
    )


def test_headline_needs_something_to_compare() -> None:
    assert reports.headline([row for row in made_rows() if row["alpha"] == 0]) == []
    assert reports.headline([row for row in made_rows() if row["alpha"] == 1]) == []


def test_tables_show_values_with_intervals() -> None:
    from rich.console import Console

    console = Console(width=140, file=io.StringIO())
    for table in reports.tables(made_rows()):
        console.print(table)
    text = console.file.getvalue()
    assert "60.0 [30.0, 90.0]" in text and "4.1 [2.0, 6.1]" in text
    assert "plain (alpha 0)" in text and "audiosae, alpha 1" in text
    assert "24.0 / 24.0 / 24.0" in text
    assert "None" not in text and "nan" not in text


def test_csv_leaves_cells_empty_where_nothing_applies() -> None:
    read = list(csv.DictReader(reports.as_csv(made_rows()).splitlines()))
    assert tuple(read[0]) == reports.COLUMNS
    assert read[0]["set"] == "noise" and read[0]["wer"] == "" and read[0]["text_fpr"] == "0.6"


def test_synthetic_and_real_clips_are_shown_apart() -> None:
    rows = made_rows()
    halves = [
        {**row, "set": row["set"] + half, "wer": row["wer"] and row["wer"] * times}
        for half, times in (("_synthetic", 1), ("_real", 10))
        for row in rows
        if row["set"].startswith("all_")
    ]
    lines = reports.headline(rows + halves)
    assert len(lines) == 3
    assert lines[2].startswith("whisper-steer, alpha 1, real clips: text-FPR 60.0 -> 3.0 %")
    assert "WER 40.00 -> 40.80 % (+0.80 points; target at most +0.1: missed)" in lines[2]


def test_paired_table_shows_points() -> None:
    from rich.console import Console

    row = dict.fromkeys(rows.PAIRED_COLUMNS) | {"method": "vad", "alpha": 0.5, "set": "all", "clips": 9}
    row |= {"reference": "whisper-steer", "reference_alpha": 1.0}
    row |= {"wer_diff": 0.0125, "wer_diff_lo": -0.002, "wer_diff_hi": 0.03}
    table = reports.paired_table([row, {**row, "set": "all_real", "method": "other"}])
    console = Console(width=140, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()
    assert "Minus whisper-steer, alpha 1" in text and "+1.2 [-0.2, +3.0]" in text and "other" not in text
    assert reports.paired_table([]) is None


def test_time_is_shown_per_minute_of_audio() -> None:
    from rich.console import Console

    console = Console(width=140, file=io.StringIO())
    for table in reports.tables(made_rows(), {"all_speech": 0.5, "all_nonspeech": 2.0}):
        console.print(table)
    text = console.file.getvalue()
    assert "s per min" in text and "3.0" in text and "0.8" in text  # 1.5 s for 0.5 and for 2 minutes

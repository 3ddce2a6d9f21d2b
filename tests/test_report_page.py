"""The trade-off report: who wins at which cost, the worst failures, and the page made of a run's folder."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_html_report import check

from benchmarks import report_page, report_tables
from benchmarks.failures import DELETED, LEFT, marked_words, worst_failures
from benchmarks.frontiers import (
    Setting,
    best_within,
    family_of,
    leads,
    paired_rise,
    reference_setting,
    representatives,
    settings_of,
)
from benchmarks.hearing_cache import (
    LONG_ROWS,
    PAIRED,
    ROWS,
    RUN,
    ClipRecord,
    Finished,
    HearingCache,
    write_clips,
)
from benchmarks.long_measure import LongCounts
from benchmarks.long_rows import Measured as LongMeasured
from benchmarks.long_rows import rows_of as long_rows_of
from benchmarks.methods import AT_ONCE, BEHIND_VAD, TIMED, Heard
from benchmarks.report_data import read_report_data, read_texts, set_rows
from benchmarks.report_tables import interval, percent, points
from benchmarks.rows import Measured, paired, summarise
from calibration.corpus import Clip
from calibration.evaluate import Rate
from whisper_steer.errors import FormatError, UsageError


def setting(method: str, strength: float, text_fpr: float, rise: float) -> Setting:
    return Setting(method, strength, Rate(text_fpr, text_fpr, text_fpr), Rate(rise, rise, rise), 0.05 + rise)


def record(name: str, text: str | None = None, **more: object) -> ClipRecord:
    kind = "nonspeech" if text is None else "speech"
    group = name.split("/")[0]
    return replace(ClipRecord(name, 1, group, kind, group, text, 6.0, None, "made up", None), **more)


# -- who wins -------------------------------------------------------------------------------------------

PLAIN = setting("plain", 0, 0.8, 0.0)
OURS = [
    setting("whisper-steer", a, f, r) for a, f, r in ((0.5, 0.3, 0.0), (1, 0.1, 0.001), (1.5, 0.05, 0.02))
]


def test_families_and_default_strength() -> None:
    assert family_of("whisper-steer+vad") == family_of("ours-shift") == "ours"
    assert family_of("silero") == family_of("faster-whisper-vad") == "voice activity detection"
    assert family_of("hallucination-space-gated") == "at the decoder"
    assert family_of("linear-gate") == "thresholds and filters" and family_of("plain") == "others"
    default = reference_setting(OURS)
    assert default is not None and default.strength == 1
    assert reference_setting([OURS[2]]) is OURS[2]  # nothing at or below 1
    assert reference_setting([PLAIN]) is None


def test_best_within_a_cost() -> None:
    assert best_within(OURS, 0.01) is OURS[1]
    assert best_within(OURS, 0.0) is OURS[0]
    assert best_within([OURS[2]], 0.01) is None
    cheaper = setting("whisper-steer", 2, 0.1, 0.0)
    assert best_within([*OURS, cheaper], 0.01) is cheaper
    chosen = representatives([PLAIN, *OURS, setting("calm", 1, 0.2, 0.5), setting("calm", 2, 0.1, 0.6)])
    assert {name: one.strength for name, one in chosen.items()} == {"plain": 0, "whisper-steer": 1, "calm": 1}


def test_a_competitor_leads_only_where_it_is_below_our_frontier() -> None:
    behind = setting("silero", 0.5, 0.12, 0.002)
    assert leads([PLAIN, *OURS, behind]) == []
    # below ours at 0.0005, where ours has 30 %; not at 0.001, where it has 10 %
    ahead = setting("silero", 0.7, 0.2, 0.0005)
    (lead,) = leads([PLAIN, *OURS, behind, ahead])
    assert lead.rival is ahead and lead.cost == 0.0005 and lead.ours == 0.3
    dear = setting("linear-gate", 1, 0.0, 0.011)  # beyond one point
    assert leads([PLAIN, *OURS, dear]) == []
    # one that improves WER counts from cost 0 on, and our own other forms are no competitors
    free = setting("phrase-filter", 1, 0.02, -0.01)
    own = setting("whisper-steer+vad", 1, 0.0, 0.0)
    found = leads([PLAIN, *OURS, ahead, free, own])
    assert [(one.rival.method, one.cost) for one in found] == [("phrase-filter", 0.0), ("silero", 0.0005)]
    # nothing of ours costs nothing: plain Whisper stands for alpha 0
    (lead,) = leads([PLAIN, OURS[1], setting("silero", 1, 0.5, 0.0)], cost=0.0)
    assert lead.ours == 0.8


def test_paired_rise_by_hand() -> None:
    references = ["apple pear plum fig", "lime kiwi", ""]
    alone = ["a", "b", "c"]
    before, after = ["apple pear plum", "lime kiwi", "noise"], ["apple pear", "lime kiwi", ""]
    rise = paired_rise(references, before, after, alone)
    assert rise.value == pytest.approx(1 / 6)  # 2 errors less 1, over 6 words; no reference, no vote
    assert 0 <= rise.lo <= rise.value <= rise.hi <= 0.25 + 1e-9
    same = paired_rise(references, ["apple"] * 3, ["apple"] * 3, alone)
    assert (same.value, same.lo, same.hi) == (0, 0, 0)


# -- failures -------------------------------------------------------------------------------------------


def test_worst_failures_by_hand() -> None:
    clips = [
        record("a/0", "apple pear plum"),  # emptied: 3 words
        record("a/1", "apple pear plum fig lime kiwi"),  # 4 lost, not emptied
        record("a/2", "apple pear"),  # plain lost as much
        record("a/3", "apple pear"),  # a substitution is no deletion
        record("n/0"), record("n/1"), record("n/2"),
    ]  # fmt: skip
    plain = {
        "a/0": "apple pear plum", "a/1": "apple pear plum fig lime kiwi", "a/2": "apple", "a/3": "apple pear",
        "n/0": "thanks", "n/1": "you", "n/2": "",
    }  # fmt: skip
    ours = {
        "a/0": " ...", "a/1": "apple pear", "a/2": "pear", "a/3": "apple peer", "n/0": "thanks",
        "n/1": "", "n/2": "a b c",
    }  # fmt: skip
    found = worst_failures(clips, plain, ours)
    assert [(one.kind, one.clip.id, one.words, one.emptied) for one in found] == [
        (DELETED, "a/0", 3, True), (DELETED, "a/1", 4, False),
        (LEFT, "n/2", 3, False), (LEFT, "n/0", 1, False),
    ]  # fmt: skip
    assert [one.clip.id for one in worst_failures(clips, plain, ours, 2)] == ["a/0", "n/2"]
    assert [one.clip.id for one in worst_failures(clips, plain, ours, 3)] == ["a/0", "n/2", "n/0"]
    assert [one.clip.id for one in worst_failures(clips[:4], plain, ours, 2)] == ["a/0", "a/1"]
    assert worst_failures(clips, plain, {}) == []


def test_marked_words() -> None:
    assert marked_words("Close the door.", "close a door now") == [
        ("same", "close"), ("lost", "the"), ("new", "a"), ("same", "door"), ("new", "now"),
    ]  # fmt: skip
    assert marked_words("Two words", "") == [("lost", "2"), ("lost", "words")]  # as the normaliser writes it


def test_numbers_as_they_are_written() -> None:
    assert (
        percent(0.0312) == "3.1\u00a0%" and points(-0.00031) == "−0.03 points" and points(1e-9) == "±0 points"
    )
    assert interval(None) == "–"
    assert interval(Rate(0.1, 0.05, 0.2)) == "10.0 <span class='ci'>[5.0, 20.0]</span>"
    assert interval(Rate(-0.01, -0.02, 0.0), digits=2, sign=True) == (
        "−1.00 <span class='ci'>[−2.00, +0.00]</span>"
    )
    assert interval(Rate(0.01, 0.01, 0.01), sign=True) == "+1.0"  # no interval of the difference


# -- a run's folder -------------------------------------------------------------------------------------

TEXTS = {
    ("plain", 0.0): ("open the door", "close it", "thank you", "thanks", "you", "bye"),
    ("whisper-steer", 0.5): ("open the door", "close it", "thank you", "thanks", "you", ""),
    ("whisper-steer", 1.0): ("open the door", "", "thank you", "thanks for watching", "", ""),
    ("silero", 0.5): ("open the door", "close it", "thank you", "", "", "bye"),
}
CLIPS = [
    record("speech/0", "Open the door.", intervals=((0.2, 0.8),), no_speech_prob=0.001, gate=0.0002),
    record("speech/1", "Close it.", no_speech_prob=0.2, avg_logprob=-0.4, gate=0.1),
    record("real_speech/0", "Thank you.", kind="real_speech", path="a.flac", no_speech_prob=0.01, gate=0.001),
    record("noise/0", no_speech_prob=0.9, gate=0.8, source="<fan>"),
    record("noise/1", no_speech_prob=0.4, gate=0.9999999),
    record("music/0", path="b.ogg", no_speech_prob=0.97, gate=0.99),
]


def write_run(out: Path, **changed: object) -> Path:
    """A run as the benchmark leaves it."""
    cache = HearingCache(out)
    measured: dict[tuple[str, float], dict[str, list[Measured]]] = {}
    for (method, strength), texts in TEXTS.items():
        heard = [Heard(text, (), bool(text), bool(text), 0.5) for text in texts]
        done = [Finished(clip.id, clip.crc, one) for clip, one in zip(CLIPS, heard, strict=True)]
        cache.append(method, strength, f"print-{method}", done)
        groups: dict[str, list[Measured]] = {}
        for clip, one in zip(CLIPS, heard, strict=True):
            groups.setdefault(clip.set, []).append(Measured(clip, one))
        measured[method, strength] = groups
    rows = [row for key, groups in measured.items() for row in summarise(groups, *key)]
    zero = [row for row in rows if row["method"] == "plain"]
    rows += [{**row, "method": name} for name in ("whisper-steer", "silero") for row in zero]
    ours = ("whisper-steer", 1.0)
    differences = [
        row
        for key, groups in measured.items()
        if key != ours
        for row in paired(groups, measured[ours], key, ours)
    ]
    run = {
        "command": "python -m benchmarks.tradeoff --quick", "package_version": "1.2.3",
        "model": "no-such-model",
        "measured": "tiny & made up", "steering": None, "data": None, "quick": True, "wall_seconds": 3.5,
        "methods": {
            name: {"about": f"about {name}", "fingerprint": f"print-{name}", "timed": timed}
            for name, timed in (("plain", AT_ONCE), ("whisper-steer", AT_ONCE), ("silero", BEHIND_VAD))
        },
        "threads": [1, 2], "gate_threshold": 0.9991,
        "unavailable": {"acoustic-abstention": "it needs <training>"},
        **changed,
    }  # fmt: skip
    (out / RUN).write_text(json.dumps(run))
    (out / ROWS).write_text(json.dumps(rows))
    (out / PAIRED).write_text(json.dumps(differences))
    write_clips(out, CLIPS)
    return out


def sounds() -> dict[str, Clip]:
    tone = (0.1 * np.sin(np.arange(16_000) * 0.05)).astype(np.float32)
    return {
        clip.id: Clip(clip.id, clip.kind, clip.category, "test", clip.text, audio=lambda: tone)
        for clip in CLIPS
    }


def test_a_run_is_read_with_paired_changes_and_plain_once(tmp_path: Path) -> None:
    data = read_report_data(write_run(tmp_path))
    assert [one.name for one in data.settings] == [
        "plain",
        "whisper-steer 0.5",
        "whisper-steer 1",
        "silero 0.5",
    ]
    assert data.plain is not None and data.ours is not None
    assert data.plain.text_fpr.value == 1 and data.ours.text_fpr.value == pytest.approx(1 / 3)
    assert data.ours.rise.value == pytest.approx(2 / 7)  # two of seven words are gone
    assert data.ours.rise.lo < data.ours.rise.value < data.ours.rise.hi
    assert data.ours.empty is not None and data.ours.empty.value == pytest.approx(1 / 3)
    assert data.ours.seconds == pytest.approx(5.0)  # 6 clips of 0.5 s in 36 s of audio
    assert list(data.halves) == ["synthetic clips", "real recordings"]
    assert [one.rise.value for one in data.halves["real recordings"]] == [0, 0, 0, 0]
    assert data.halves["synthetic clips"][2].rise.value == pytest.approx(2 / 5)
    assert [(one.clip.id, one.words) for one in data.failures] == [("speech/1", 2), ("noise/0", 3)]
    assert data.gate_threshold == 0.9991  # the run's own, whatever steering is kept today


def test_what_was_heard_counts_only_with_the_runs_fingerprint(tmp_path: Path) -> None:
    run = json.loads((write_run(tmp_path) / RUN).read_text())
    assert set(read_texts(tmp_path, run, CLIPS)) == set(TEXTS)
    run["methods"]["silero"]["fingerprint"] = "another"
    assert ("silero", 0.5) not in read_texts(tmp_path, run, CLIPS)
    more = [*CLIPS, record("noise/9")]
    assert read_texts(tmp_path, run, more) == {}  # not heard by anyone
    (tmp_path / RUN).write_text(json.dumps(run))
    silero = read_report_data(tmp_path).settings[-1]
    assert silero.rise.lo == silero.rise.value == silero.rise.hi == 0  # from the rows: no interval


def test_rows_without_plain_under_its_own_name(tmp_path: Path) -> None:
    rows = [row for row in json.loads((write_run(tmp_path) / ROWS).read_text()) if row["method"] != "plain"]
    settings = settings_of(rows)
    assert [one.name for one in settings] == ["plain", "whisper-steer 0.5", "whisper-steer 1", "silero 0.5"]
    assert set_rows(rows, "text_fpr")["noise"]["plain", 0.0]["text_fpr"] == 1
    assert settings_of([row for row in rows if row["alpha"] > 0]) == []
    assert list(set_rows(rows, "wer")) == ["speech", "real_speech"]


def test_the_page_answers_first_and_holds_everything(tmp_path: Path) -> None:
    written = report_page.write_report(write_run(tmp_path), audio=sounds())
    names = ["frontier", "frontier_synthetic", "frontier_real", "categories", "speech", "distributions"]
    assert written == [tmp_path / "report.html", *(tmp_path / f"{name}.png" for name in names)]
    for path in written[1:]:
        assert Image.open(io.BytesIO(path.read_bytes())).size[0] > 700
    document = written[0].read_text(encoding="utf-8")
    assert len(document) < 5_000_000
    checker = check(document)
    assert all(address.startswith("data:") for address in checker.addresses)
    assert document.count("<audio") == 2 and document.count("<svg") == 2 and document.count("<figure>") == 6

    order = [
        "whisper-steer at α 1 removes 66.7\u00a0% of hallucinated transcripts", "by +28.57 points",
        "Ahead of whisper-steer, with or without edits, at some WER cost up to 1 point: silero 0.5",
        "<h2>Frontier", "<h2>Methods",
        "<h2>By category", "<h2>Scores", "<h2>Paired with ours", "<h2>Worst failures of ours",
        "<h2>Could not run", "<h2>What the methods are", "<h2>How it was measured",
    ]  # fmt: skip
    places = [document.index(words) for words in order]
    assert places == sorted(places)
    assert document.count("tile bad") == 3  # every target is missed
    assert "tiny &amp; made up" in document and "it needs &lt;training&gt;" in document
    assert "&lt;fan&gt;" in document and "emptied: 2 words" in document
    assert "<del>close</del> <del>it</del>" in document
    assert "hallucination left: 3 words" in document
    paired_part = document[document.index("<h2>Paired") : document.index("<h2>Worst")]
    assert "3 settings" in paired_part and "−33.3" in paired_part  # the halves are not mixed in


def test_every_setting_has_the_three_rates_the_parts_of_wer_and_how_it_was_run(tmp_path: Path) -> None:
    rows = json.loads((write_run(tmp_path) / ROWS).read_text())
    for row in rows:
        if row["method"] == "silero" and row["alpha"] > 0:
            row |= {"nsp_fpr": None, "hr": None}
    (tmp_path / ROWS).write_text(json.dumps(rows))
    data = read_report_data(tmp_path)
    ours = next(one for one in data.settings if one.name == "whisper-steer 1")
    assert {name: rate.value for name, rate in ours.rates.items()} == pytest.approx(
        {
            "nsp_fpr": 1 / 3, "hr": 1 / 3, "words_per_min": 10.0, "wer": 2 / 7, "sub": 0.0, "del": 2 / 7,
            "ins": 0.0,
        }
    )  # fmt: skip
    silero = data.settings[-1]
    assert silero.method == "silero" and not {"nsp_fpr", "hr"} & set(silero.rates)
    cells = report_tables._full_row(ours, data).cells
    named = dict(zip(report_tables.FULL, cells, strict=True))
    assert report_tables.FULL[1:4] == ("text-FPR %", "nsp-FPR %", "HR %")
    assert str(named["HR %"]).startswith("33.3<br><span class='ci'>[0.0, 100.0]")
    assert str(named["del. %"]).startswith("28.6<br><span")
    assert named["compute, s/min"] == "5.0<sup>a</sup>" and named["method and strength"] == "whisper-steer 1"
    named = dict(zip(report_tables.FULL, report_tables._full_row(silero, data).cells, strict=True))
    assert named["nsp-FPR %"] == named["HR %"] == "not given"
    assert named["compute, s/min"] == "5.0<sup>b</sup>"
    document = "".join(report_tables.method_sections(data))
    assert "1 or 2 PyTorch threads" in document
    assert f"<sup>b</sup> {BEHIND_VAD}: {TIMED[BEHIND_VAD]}" in document
    assert "one by one:" not in document  # nothing here was run so
    data = replace(data, run={**data.run, "threads": [1]})
    assert "audio, 1 PyTorch thread." in "".join(report_tables.method_sections(data))


def test_long_recordings_of_the_same_folder_are_part_of_the_page(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert report_tables.long_sections(read_report_data(tmp_path)) == []
    counts = {
        "silero": [LongCounts(4, 2.0, 100, 10, 1, 0), LongCounts(2, 1.0, 50, 5, 0, 0)],
        "whisper-steer": [LongCounts(1, 2.0, 100, 10, 1, 0), LongCounts(0, 1.0, 50, 2, 0, 0)],
    }
    measured = {
        (method, strength): [
            LongMeasured(sort, 180.0, 18.0, one)
            for sort, one in zip(("synthetic", "real"), counts[method], strict=True)
        ]
        for method, strength in (("silero", 0.5), ("whisper-steer", 1.0))
    }
    rows = long_rows_of(measured, None, ("silero", 0.5))
    (tmp_path / LONG_ROWS).write_text(json.dumps(rows))
    data = read_report_data(tmp_path)
    assert data.long == rows
    (made,) = report_tables.long_sections(data)
    assert "2 recordings, 6 minutes, of which 3 without speech" in made
    assert "real recordings" in made and "synthetic recordings" in made
    whole = made[made.index("<tbody>") : made.index("</tbody>")]
    assert "2.0 <span" in whole and "0.3 <span" in whole  # 6 and 1 words in 3 minutes
    assert "10.0 <span" in whole and "8.0 <span" in whole  # 15 and 12 of 150 words
    assert "−2.0 <span class='ci'>[−6.0, +0.0]" in whole and "<td class='n'>6.0</td>" in whole
    page = report_page.write_report(tmp_path, audio=sounds())[0].read_text(encoding="utf-8")
    check(page)
    assert page.index("<h2>Paired with ours") < page.index("<h2>Long recordings") < page.index("<h2>Worst")


def test_the_page_says_why_there_are_no_sounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    (tmp_path / "missing").mkdir()
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:

        def gone(out: Path) -> dict[str, Clip]:
            raise UsageError(f"2 clips of {out} are gone")

        patch.setattr("benchmarks.hearing_cache.load_clips", gone)
        assert report_page.main([str(tmp_path)]) == 0
    assert f"wrote {tmp_path / 'report.html'}" in capsys.readouterr().out
    document = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No sounds: 2 clips of" in document and "<audio" not in document and "emptied: 2 words" in document


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_page.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "--out folder" in error
    write_run(tmp_path)
    (tmp_path / ROWS).write_text('{"method": "plain"}')
    with pytest.raises(FormatError, match="is not a list of rows"):
        read_report_data(tmp_path)
    (tmp_path / ROWS).unlink()
    with pytest.raises(FormatError, match="cannot read"):
        read_report_data(tmp_path)


def test_a_run_without_ours_or_without_hallucination_still_has_a_page(tmp_path: Path) -> None:
    rows = [row for row in json.loads((write_run(tmp_path) / ROWS).read_text()) if row["method"] == "plain"]
    (tmp_path / ROWS).write_text(json.dumps(rows))
    report_page.write_report(tmp_path, audio={})
    document = (tmp_path / "report.html").read_text(encoding="utf-8")
    check(document)
    assert "This run has no setting of whisper-steer" in document and "was not measured" in document

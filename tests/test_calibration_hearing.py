from dataclasses import replace

import pytest

from calibration.command import run
from calibration.decoding import ClipTranscript, DecodedWindow
from calibration.hearing import Effort, compare
from calibration.selection import Budget, CalibrationClip
from whisper_steer.errors import UsageError

WORDS = "red green blue pink grey white black brown orange purple"


def heard(text):
    return ClipTranscript(text, (DecodedWindow(0, 200, text, 0.1, -0.2, 0.0),), ((0.1, -0.2),), 2.0)


def clip(name, plain, set_name="speech", reference=WORDS):
    return CalibrationClip(name, set_name, reference, heard(plain), (0,))


def test_the_rise_is_over_all_speech_clips():
    clips = [clip("a", WORDS), clip("b", WORDS)]
    found = compare(clips, [heard(WORDS), heard(WORDS.replace("red", "rod"))])
    assert found.wer_plain == 0 and found.wer == pytest.approx(1 / 20) and found.rise == pytest.approx(1 / 20)
    assert found.transcripts["speech", "b"].text.startswith("rod")


def test_words_lost_where_nothing_is_understood_pay_for_nothing():
    wrong = "never any of this was said " * 5
    clips = [clip("a", WORDS), clip("b", wrong, "foreign")]
    found = compare(clips, [heard("red"), heard("")])
    assert found.wer < found.wer_plain
    assert found.rise == pytest.approx(0.9)  # over the understood set


def test_nonspeech_clips_have_no_words_to_lose():
    clips = [replace(clip("n", "thank you"), reference=None), clip("a", WORDS)]
    found = compare(clips, [heard(""), heard(WORDS)])
    assert found.rise == 0 and set(found.transcripts) == {("speech", "n"), ("speech", "a")}
    assert compare(clips[:1], [heard("")]).rise == 0


def test_emptied_clips_are_told_with_the_end_of_their_interval():
    clips = [clip(name, WORDS) for name in "abcdefghij"]
    found = compare(clips, [heard(""), *[heard(WORDS)] * 9])
    assert found.emptied == pytest.approx(0.1)
    assert found.emptied_hi == pytest.approx(0.3)  # P(more than 3 of 10 draws) < 2.5 %
    assert compare(clips, [heard(WORDS)] * 10).emptied_hi == 0


def test_senseless_budgets_and_efforts_are_refused():
    with pytest.raises(UsageError, match="wer_rise is nan"):
        Budget(wer_rise=float("nan"))
    with pytest.raises(UsageError, match="share is -0.1"):
        Budget(share=-0.1)
    assert Budget(0.4, 0.5, 0.1, 0.02).times(4) == Budget(1.0, 1.0, 0.4, 0.08)
    with pytest.raises(UsageError, match="screened is 0: expected at least 1"):
        Effort(screened=0)
    assert Effort(finalists=0, measured=0).finalists == 0


def test_an_error_of_ours_ends_a_command_in_one_line(capsys):
    def broken():
        raise UsageError("k is 0: expected at least 1")

    with pytest.raises(SystemExit) as exit_info:
        run(broken)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: k is 0: expected at least 1\n"
    run(lambda: None)

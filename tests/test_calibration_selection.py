from dataclasses import replace

import numpy as np
import pytest
import torch

from calibration.corpus import Clip
from calibration.decoding import ClipTranscript, DecodedWindow
from calibration.gate_fit import NOBODY, SPEECH, UNCLEAR
from calibration.selection import (
    Budget,
    CalibrationClip,
    MoreSpeech,
    choose_gate,
    evaluate_threshold,
    lowest_threshold,
    smoothed,
    window_choice,
    with_frame_gate,
    with_spread,
)
from calibration.speech_costs import SpeechCosts, share_upper_end
from whisper_steer.steering import Gate, Probe


def gate(layer=0, smooth=1):
    probe = Probe(layer, "raw", torch.ones(2), mean=torch.zeros(2), std=torch.ones(2))
    return Gate((probe,), 0.0, smooth, threshold=0.0, spread=0.0, frame_scale=1.0, frame_bias=0.0)


def clip(name, row, text, reference, set_name="speech"):
    window = DecodedWindow(0, 200, text, 0.3, -0.2, 0.0)
    transcript = ClipTranscript(text, (window,), ((0.3, -0.2),), 2.0)
    return CalibrationClip(name, set_name, reference, transcript, (row,))


def calibration(n=10, per_clip=10):
    """n speech clips of 10 words (rows 0..n-1), all right, and n non-speech clips with words (rows
    n..2n-1).
    """
    words = "red green blue pink grey white black brown orange purple".split()[:per_clip]
    text = " ".join(words)
    speech = [clip(f"s{i}", i, text, text) for i in range(n)]
    return speech + [clip(f"n{i}", n + i, "thank you", None, "noise") for i in range(n)]


@pytest.mark.parametrize("width", [1, 9, 31])
def test_smoothing_is_the_gates_own(width):
    x = torch.randn(3, 100, 2)
    logits = gate().frame_logits(x).numpy()
    np.testing.assert_allclose(smoothed(logits, width), gate(smooth=width).frame_logits(x).numpy(), atol=1e-6)


def test_rates_follow_from_the_threshold():
    clips = calibration(4)
    logits = np.array([-3.0, -2, -1, 5, -2, 1, 2, 3])
    result = evaluate_threshold(clips, logits, 0.5)
    assert result.wer_plain == 0 and result.wer == pytest.approx(10 / 40)  # the fourth clip's words are gone
    assert result.lost == {"speech": 0.25, "all": 0.25}
    assert result.text_fpr == 0.25 and result.plain_text_fpr == 1.0
    assert result.nsp_fpr == 0.25 and result.hr == 0.25
    assert evaluate_threshold(clips, logits, 99).text_fpr == 1.0


def test_threshold_goes_down_to_the_first_window_that_costs_too_much():
    clips = calibration(10)
    logits = np.array([-9.0, -8, -7, -6, -5, -4, -3, -2, -1, 0, *np.linspace(-2.5, 9, 10)])
    strict = lowest_threshold(clips, logits, Budget(wer_rise=0.0, share=0.0, set_share=0.0))
    assert 0 <= strict < logits[logits > 0].min()
    result = evaluate_threshold(clips, logits, strict)
    assert result.wer == 0 and result.lost["all"] == 0
    # one clip in ten may go: 10 % of the words, up to 30 % by the interval (three draws of that clip in ten)
    loose = lowest_threshold(clips, logits, Budget(wer_rise=0.3, share=0.3, set_share=0.1))
    assert -1 <= loose < 0 and evaluate_threshold(clips, logits, loose).lost["all"] == pytest.approx(0.1)
    for tight in (Budget(0.29, 0.3, 0.1), Budget(0.3, 0.29, 0.1), Budget(0.3, 0.3, 0.05)):
        assert lowest_threshold(clips, logits, tight) >= 0


def test_the_share_of_lost_clips_is_held_against_the_end_of_its_interval():
    assert share_upper_end(0, 5) == 0.0
    # of ten draws with one lost clip in ten: at most 3 in 97.5 % of cases (P(<= 2) = 0.930, P(<= 3) = 0.987)
    assert share_upper_end(1, 10) == pytest.approx(0.3)
    drawn = np.random.default_rng(0).binomial(1165, 2 / 1165, size=200_000)
    assert share_upper_end(2, 1165) == pytest.approx(np.quantile(drawn, 0.975) / 1165)
    # 0.2 %: one clip in 1,500, none of fewer
    assert share_upper_end(1, 1400) > Budget().share >= share_upper_end(1, 1500)


def test_between_speech_and_the_rest_the_threshold_takes_the_middle():
    clips = calibration(3)
    assert lowest_threshold(clips, np.array([-8.0, -6, -4, 2, 5, 6]), Budget()) == pytest.approx(-1.0)


def test_a_window_without_right_words_costs_nothing():
    clips = calibration(2)
    invented = replace(
        clips[1].transcript, text=" x y", windows=(replace(clips[1].transcript.windows[0], text=" x y"),)
    )
    clips[1] = replace(clips[1], transcript=invented, reference="nothing like it")
    logits = np.array([-5.0, 3.0, 1.0, 2.0])
    result = evaluate_threshold(clips, logits, 2.5)
    assert result.wer <= result.wer_plain
    assert result.lost["all"] == 0.5  # but a clip that comes back empty is always a loss


def test_no_gain_elsewhere_pays_for_lost_words():
    """Withholding a clip of wrong words lowers the WER; that must not buy the loss of right ones."""
    clips = calibration(4)
    wrong = "a b c d e f g h i j k l m n o p q r s t"
    window = replace(clips[3].transcript.windows[0], text=wrong)
    first = replace(
        clips[3].transcript, text=wrong + " blue", windows=(window, DecodedWindow(300, 100, " blue", 0, 0, 0))
    )
    clips[3] = replace(clips[3], transcript=first, reference="blue", rows=(3, 3))
    logits = np.array([-1.0, -2, -3, 4, 5, 6, 7, 8])
    budget = Budget(wer_rise=0.05, share=1.0, set_share=1.0)
    assert lowest_threshold(clips, logits, budget) > -1.0


def test_the_better_gate_wins_and_controls_only_take_part():
    rng = np.random.default_rng(0)
    clips = calibration(10)
    good = np.concatenate([rng.normal(-4, 1, (10, 50)), rng.normal(4, 1, (10, 50))]).astype(np.float32)
    mixed = rng.normal(0, 1, (20, 50)).astype(np.float32)
    gates = {"good": gate(0), "mixed": gate(1)}
    logits = {"good": good, "mixed": mixed}
    choice = choose_gate(gates, logits, clips, Budget())
    assert choice.name == "good" and choice.result.text_fpr == 0 and choice.result.wer == 0
    assert choice.gate.threshold == choice.result.threshold and choice.gate.smooth in (9, 15, 21, 31)
    assert len(choice.table) == 8
    control = choose_gate(gates, logits, clips, Budget(), eligible=["mixed"])
    assert control.name == "mixed" and control.result.text_fpr > 0
    assert {row["gate"] for row in control.table} == {"good", "mixed"}


def test_smoothing_helps_where_single_frames_deceive():
    clips = calibration(5)
    logits = np.full((10, 200), 4.0, np.float32)
    logits[:5, 50:100] = -4  # speech lasts
    logits[5:, 10] = -9  # a click does not
    choice = choose_gate({"g": gate()}, {"g": logits}, clips, Budget(), smoothings=(1, 9))
    assert choice.gate.smooth == 9 and choice.result.text_fpr == 0


def test_spread_leaves_a_quarter_at_alpha_a_quarter():
    clips = calibration(8)
    logits = np.concatenate([np.full((8, 3), -5.0), np.arange(1.0, 9.0)[:, None].repeat(3, 1)]).astype(
        np.float32
    )
    spread = with_spread(replace(gate(), threshold=0.0), logits.min(axis=1), clips)
    limit = spread.window_threshold(0.25)
    assert (np.arange(1.0, 9.0) > limit).sum() == 2
    assert spread.window_threshold(1.0) == 0.0
    nothing = with_spread(replace(gate(), threshold=99.0), logits.min(axis=1), clips)
    assert nothing.spread == 1.0


def test_frame_gate_is_shut_on_speech_and_open_on_the_rest():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (4, 500)).astype(np.float32)
    targets = np.full((4, 500), UNCLEAR, np.int8)
    logits[:2] -= 6
    logits[2:] += 6
    targets[:2, :400], targets[2:, :400] = SPEECH, NOBODY
    fitted = with_frame_gate(gate(), logits, targets)
    g = fitted.frame_gate(torch.from_numpy(logits))
    assert (g[:2] == 0).float().mean() >= 0.998
    assert (g[2:] > 0.9).float().mean() > 0.999  # far above speech it is open, not only half
    # from shut to 0.9 within one logit
    assert fitted.frame_scale == pytest.approx(np.log(9) + np.log(99), rel=1e-3)
    probe = torch.tensor([[-1e-3, 1e-3, 1.0]]).repeat_interleave(60, dim=1)
    low, edge, high = fitted.frame_gate(probe)[0].reshape(3, 60)[:, 30]
    assert low == 0 and 0.01 <= edge < 0.02 and high == pytest.approx(0.9, abs=0.005)
    # a pause shorter than a second stays as it is
    pause = torch.full((1, 100), -9.0)
    pause[0, 30:70] = 9.0
    assert (fitted.frame_gate(pause) == 0).all()
    pause[0, 20:90] = 9.0
    g = fitted.frame_gate(pause)[0]
    # and of a longer one the 0.3 s next to speech
    assert (g[35:75] > 0.9).all() and (g[:35] == 0).all() and (g[75:] == 0).all()
    other = with_frame_gate(gate(), logits, targets, min_run=10, margin=3)
    assert (other.min_run, other.margin) == (10, 3)
    assert with_frame_gate(gate(), logits, np.full_like(targets, UNCLEAR)).frame_scale == 1.0


def test_frame_gate_opens_as_low_as_speech_allows_where_it_would_act():
    """1,000 speech frames at -4; 40 of them at 3 in a run too short to open, 100 at 2 in a long one, of which
    the 15 at either end are within the margin: 70 are open below 2."""
    logits = np.full((1, 1000), -4.0, np.float32)
    logits[0, 100:140], logits[0, 500:600] = 3.0, 2.0
    targets = np.full((1, 1000), SPEECH, np.int8)

    def opens_at(shut):
        fitted = with_frame_gate(gate(), logits, targets, shut=shut)
        rise = torch.arange(-1.0, 4.0, 0.001).repeat_interleave(200)[None]
        return float(rise[fitted.frame_gate(rise) > 0].min())

    assert opens_at(0.929) == pytest.approx(0.0, abs=0.002)  # 71 frames may be open
    assert opens_at(0.931) == pytest.approx(2.0, abs=0.02)  # 69 may not: only 0 would do
    assert opens_at(1.0) == pytest.approx(2.0, abs=0.02)  # the peak at 3 is too short to matter


def test_a_clip_belongs_to_the_group_of_its_source():
    transcript = calibration(1)[0].transcript
    source = Clip("s/1#telephone", "real_speech", "real_telephone", "", "red", "speaker 7")
    found = CalibrationClip.of(source, "real_telephone", transcript, [3, 4])
    assert found.group == "speaker 7" and found.rows == (3, 4) and found.reference == "red"
    noise = Clip("n/1", "nonspeech", "noise", "")
    assert CalibrationClip.of(noise, "noise", transcript).group == "n/1"
    assert CalibrationClip.of(noise, "noise", transcript).reference is None


def test_clips_of_one_speaker_are_lost_together():
    """Two of 24 clips lost: of speakers of their own, or both of one speaker."""
    words = "red green blue pink grey white black brown orange purple"
    alone = [clip(f"s{i}", i, words, words) for i in range(24)]
    paired = [replace(one, group=f"speaker {i // 2}") for i, one in enumerate(alone)]
    lost = np.array([True, True] + [False] * 22)
    # P(more than 5 of 24 draws) < 2.5 % where 2 of 24 are lost
    assert SpeechCosts(alone).share_hi(lost) == pytest.approx(5 / 24)
    # one of 12 speakers: up to 3 of 12 draws
    assert SpeechCosts(paired).share_hi(lost) == pytest.approx(3 / 12)
    change = np.where(lost, 1.0, 0.0)
    assert SpeechCosts(paired).rise(change) == (pytest.approx(2 / 240), pytest.approx(3 * 2 / 240))


def test_sets_that_are_not_understood_do_not_dilute_a_budget():
    clips = calibration(10)
    wrong = "never any of this was said here " * 3
    foreign = [clip(f"f{i}", 20 + i, wrong, "red green blue pink", "foreign") for i in range(30)]
    logits = np.array([-9.0, -8, -7, -6, -5, -4, -3, -2, -1, 0, *np.linspace(-2.5, 9, 10), *[-99.0] * 30])
    for budget in (Budget(0.29, 1, 1), Budget(1, 0.29, 1)):  # not one clip in ten: it may be up to three
        assert lowest_threshold([*clips, *foreign], logits, budget) >= 0
        assert lowest_threshold(clips, logits, budget) >= 0
    allowed = lowest_threshold([*clips, *foreign], logits, Budget(0.3, 0.3, 0.1))
    assert -1 <= allowed < 0
    costs = SpeechCosts([*clips, *foreign])
    assert costs.understood.sum() == 10 and len(costs.clips) == 40
    change = np.zeros(40)
    change[0], change[20] = 5, -100
    assert costs.rise(change)[0] == pytest.approx(5 / 100)
    events = np.arange(40) == 0
    assert costs.share_hi(events) == pytest.approx(0.3)  # among the ten, not the forty


def test_more_speech_counts_among_the_clips_that_may_be_lost():
    """Three of 40 by the interval are 0.075; a further voice above the threshold is one of 41."""
    clips = calibration(40)
    logits = np.concatenate([np.full(40, -9.0), np.full(40, 1.0)])
    budget = Budget(wer_rise=1.0, share=0.08, set_share=1.0)
    assert lowest_threshold(clips, logits, budget) == pytest.approx(-4.0)
    voices = MoreSpeech(np.array([5.0, -20.0]), ("ann", "bob"))
    assert lowest_threshold(clips, logits, budget, voices) == pytest.approx(-4.0)  # 1 of 42: up to 3
    two = MoreSpeech(np.array([5.0, 4.0]), ("ann", "bob"))
    assert lowest_threshold(clips, logits, budget, two) == 4.0  # 2 of 42: up to 5, 0.12
    # both of one speaker, whom the interval draws twice or not at all
    same = MoreSpeech(np.array([5.0, 4.0]), ("ann", "ann"))
    assert lowest_threshold(clips, logits, budget, same) == 4.0
    assert window_choice("g", gate(), logits, clips, budget, two).result.text_fpr == 1.0
    assert window_choice("g", gate(), logits, clips, budget).result.text_fpr == 0.0


def test_more_sounds_count_where_gates_are_compared():
    """At every budget the threshold is -4: of 40 clips none keeps its words, of ten more sounds four do."""
    clips = calibration(40)
    logits = np.concatenate([np.full(40, -9.0), np.full(40, 1.0)])
    budget = Budget(wer_rise=1.0, share=0.02, set_share=1.0)
    sounds = np.array([-5.0] * 4 + [3.0] * 6)
    voices = MoreSpeech(np.array([-20.0]), ("ann",), sounds)
    with_sounds = window_choice("g", gate(), logits, clips, budget, voices)
    assert with_sounds.result.threshold == pytest.approx(-4.0) and with_sounds.result.text_fpr == 0.0
    assert with_sounds.over_budgets[0] == pytest.approx(4.5 / 51)
    assert with_sounds.table[0]["text_fpr_mean_over_budgets"] == with_sounds.over_budgets[0]
    without = window_choice("g", gate(), logits, clips, budget, replace(voices, nobody=np.zeros(0)))
    assert without.over_budgets == (pytest.approx(0.5 / 41), *with_sounds.over_budgets[1:])


def test_the_set_that_suffers_most_is_named():
    clips = calibration(3)
    other = [replace(clip, set="other", id=f"o{i}") for i, clip in enumerate(calibration(2)[:2])]
    costs = SpeechCosts([*clips, *other])
    assert costs.understood.all()
    words = costs.words[0]
    change = np.array([-3.0, 0, 0, 1, 0])  # what one set gains does not pay for the other
    assert costs.set_rise(change) == pytest.approx(1 / (2 * words))
    assert costs.rise_value(change) < 0 and costs.set_rise(-np.ones(5)) == 0.0

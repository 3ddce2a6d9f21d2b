"""Points of a frontier that get names."""

from __future__ import annotations

from calibration.frontier import profiles


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

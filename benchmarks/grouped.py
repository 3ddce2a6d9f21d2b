"""Rates with 95 % intervals in which clips of one recording, source or speaker are drawn together.

A real clip that is heard once more over a telephone, several sentences of one speaker, several cuts of one
recording go wrong together; as independent clips they would make intervals too narrow. Every rate and every
paired difference over the same clips uses the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from calibration.evaluate import Rate, group_draws

DRAWS, SEED, LEVEL = 1000, 0, 0.95


@lru_cache(maxsize=32)
def _draws(groups: tuple[str, ...]) -> np.ndarray:
    """(DRAWS, clips): how often each clip is drawn; made once per sequence of groups."""
    return group_draws(groups, DRAWS, SEED)


def ratio(
    numerator: Sequence[float] | np.ndarray, denominator: Sequence[float] | np.ndarray, groups: Sequence[str]
) -> Rate:
    """sum(numerator) / sum(denominator) over clips, with the percentile interval of drawn groups.

    groups: of every clip. NaN where nothing was measured. Raises ValueError: the lengths differ.
    """
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if not top.shape == bottom.shape == (len(groups),):
        raise ValueError(f"expected vectors of {len(groups)} clips, got shapes {top.shape}, {bottom.shape}")
    if len(top) == 0 or bottom.sum() == 0:
        return Rate(math.nan, math.nan, math.nan)
    draws = _draws(tuple(groups))
    tops, bottoms = draws @ top, draws @ bottom
    valid = bottoms > 0
    lo, hi = np.quantile(tops[valid] / bottoms[valid], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Rate(float(top.sum() / bottom.sum()), float(lo), float(hi))


def share(events: Sequence[float] | np.ndarray, groups: Sequence[str]) -> Rate:
    """Mean of events (0, 1, or differences of such) over clips, with its interval."""
    return ratio(events, np.ones(len(groups)), groups)

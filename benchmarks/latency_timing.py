"""Times taken in turns, and what they say: the ratio of two pieces of work, with an interval."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

from whisper_steer.errors import UsageError

_MOST_ROUNDS = 50  # of short work, whatever time there is


@dataclass(frozen=True)
class Ratio:
    """Of paired times: the median of their quotients, an interval for it, and the median steered time (s)."""

    median: float
    low: float
    high: float
    seconds: float


def ratio_of(plain: Sequence[float], steered: Sequence[float]) -> Ratio:
    """Times of the same rounds (s). Raises UsageError without any, or if they are not pairs."""
    if not plain or len(plain) != len(steered):
        raise UsageError(f"{len(plain)} plain and {len(steered)} steered times: expected pairs, at least one")
    quotients = sorted(after / before for before, after in zip(plain, steered, strict=True))
    skip = _outside(len(quotients))
    return Ratio(
        statistics.median(quotients), quotients[skip], quotients[-1 - skip], statistics.median(steered)
    )


def _outside(count: int) -> int:
    """How many of `count` sorted values lie on each side of the 95 % interval of their median: the n for
    which more than n values fall on one given side of the true median in all but 2.5 % of samples (the sign
    test). 0 of fewer than 9."""
    below, terms = 0.0, 0
    while terms <= count // 2 and (below := below + comb(count, terms) / 2**count) <= 0.025:
        terms += 1
    return max(0, terms - 1)


def paired(
    plain: Callable[[], object],
    steered: Callable[[], object],
    steering: Callable[[], AbstractContextManager[Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    late: Callable[[], bool] = lambda: False,
    seconds: float = 0.0,
) -> tuple[list[float], list[float]]:
    """Times of `rounds` rounds, or of as many as take `seconds` of steered work if that is more: plain and
    steered, which goes first by turns, so that a drift of the machine hits both; steered inside `steering()`.
    One round before them to warm up is not counted, nor is putting the steering on. Once it is `late`, the
    round at hand is the last, but one is always counted."""
    before: list[float] = []
    after: list[float] = []
    while len(before) <= rounds or (sum(after[1:]) < seconds and len(before) <= _MOST_ROUNDS):
        for turn in ("plain", "steered") if len(before) % 2 == 0 else ("steered", "plain"):
            if turn == "plain":
                before.append(_timed(plain, clock))
                continue
            with steering():
                after.append(_timed(steered, clock))
        if len(before) > 1 and late():
            break
    return before[1:], after[1:]


def _timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    _settle()
    start = clock()
    work()
    _settle()
    return clock() - start


def _settle() -> None:
    """Waits for the device, which works on by itself."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    """Forget the memory used so far, where the system can."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: str) -> float | None:
    """Highest memory (10^6 bytes) since `reset_peak`."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform != "linux":
        return None
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return None

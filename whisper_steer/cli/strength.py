"""--alpha and --profile: one of them, and what was chosen."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from ..profiles import FrontierPoint
    from ..steering import Steering


def check_one(alpha: float | None, profile: str | None) -> None:
    """Raises UsageError if both are given."""
    if alpha is not None and profile is not None:
        raise UsageError(f"--alpha {alpha:g} and --profile {profile} are both given: leave one of them out")


def announce(profile: str | None, alpha: float, measured: FrontierPoint | None) -> None:
    """Says on stderr which alpha a profile is, and what was measured at it; nothing without a profile."""
    if profile is None:
        return
    rates = "" if measured is None else measured.summary()
    found = f": {rates} (measured when it was calibrated)" if rates else ""
    print(f"profile {profile}: alpha {alpha:g}{found}", file=sys.stderr)


def steering_of(model: str, steering: str | None, model_dir: str | None) -> Steering:
    """The steering that the options name. Raises what loading it, or the model, raises."""
    from ..zoo import load_model, load_steering, steering_for

    if steering is not None:
        return load_steering(steering, model)
    return steering_for(load_model(model, device="cpu", download_root=model_dir))

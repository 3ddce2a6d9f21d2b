"""How a backend is asked to steer its model: the part that all backends share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..attach import Handle, check_strength, handles_of, steer
from ..errors import UsageError

if TYPE_CHECKING:
    from ..steering import Steering


@dataclass(frozen=True)
class Asked:
    """What the caller asked for, as it was given; all None: the model's own handles, else alpha 1 of the
    steering kept for the model, without decoding withheld windows."""

    alpha: float | None = None
    profile: str | None = None
    steering: Steering | str | Path | None = None
    decode_withheld: bool | None = None

    def __post_init__(self) -> None:
        check_strength(self.alpha, self.profile)

    @property
    def strength(self) -> dict[str, Any]:
        """alpha, profile, steering and decode_withheld as `steer` takes them."""
        return {
            "alpha": self.alpha,
            "profile": self.profile,
            "steering": self.steering,
            "decode_withheld": bool(self.decode_withheld),
        }

    @contextmanager
    def steered(self, model: Any, ours: bool = False) -> Iterator[tuple[Handle, ...]]:
        """The handles at work: the model's own, or one for the length of the block; none for plain Whisper.

        ours: the model was loaded, and steered as asked, by the backend itself. Raises UsageError if the
        model is steered already and anything is asked for.
        """
        own = handles_of(model)
        if own and not ours and self != Asked():
            raise UsageError(
                f"the model is steered already ({', '.join(map(repr, own))}): leave alpha, profile, steering "
                "and decode_withheld out, set them on the handle, or handle.remove() first"
            )
        if own or self.alpha == 0:
            yield own
        else:
            with steer(model, **self.strength) as handle:
                yield (handle,)


def at_work(handles: Sequence[Handle]) -> dict[str, Any]:
    """What a backend says of the steerings that worked: "steering", "alpha", "profile", "everywhere"."""
    alphas, profiles = {handle.alpha for handle in handles}, {handle.profile for handle in handles}
    return {
        "steering": " + ".join(handle.steering.name for handle in handles) or None,
        "alpha": alphas.pop() if len(alphas) == 1 else None if alphas else 0.0,
        "profile": profiles.pop() if len(profiles) == 1 else None,
        "everywhere": any(h.alpha > 0 and h.steering.edits and h.steering.gate is None for h in handles),
    }

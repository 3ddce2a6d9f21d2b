"""Held-out audio, halved: one half of the clips sets the thresholds of SAEs, the other measures them.

Frames of many layers come from one forward pass; where they do not fit into the memory given, layers go in
groups, with one pass each.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from calibration.evaluate import evenly
from whisper_steer.errors import AudioError, UsageError

if TYPE_CHECKING:
    from calibration.adapters import AudioEncoder

SPEECH = "speech"  # the domain with words; all others count as non-speech
_BATCH = 8  # clips per forward pass


class HeldOutClip(Protocol):
    """What is needed of a clip; `text` (reference) and labels are used where it has them."""

    @property
    def id(self) -> str: ...

    def load(self) -> np.ndarray: ...


@dataclass(frozen=True)
class HeldOutSettings:
    """What the measures depend on beside SAE and clips.

    Attributes:
        dtype: of the weights in the files.
        max_frames: frames per domain and half, spread over its clips.
        max_clips: clips per domain and half, spread evenly.
        per_clip: frames of one clip, spread evenly: long clips must not drown the others.
        wer_clips: clips of either side that Whisper hears plain and spliced; 0: none.
        language: of the reference texts.
    """

    dtype: torch.dtype = torch.float16
    max_frames: int = 40_000
    max_clips: int = 120
    per_clip: int = 400
    wer_clips: int = 60
    language: str = "en"

    def __post_init__(self) -> None:
        for name, least in (("max_frames", 1), ("max_clips", 1), ("per_clip", 1), ("wer_clips", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}: expected at least {least}")

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}


def clip_name(clip: Any) -> str:
    """Data set and id, or the id alone."""
    dataset = getattr(clip, "dataset", "")
    return f"{dataset}/{clip.id}" if dataset else str(clip.id)


@dataclass
class HeldOut:
    """Held-out clips by domain, halved, and the list of those that could not be read."""

    domains: Mapping[str, Sequence[Any]]
    settings: HeldOutSettings
    skipped: dict[str, str] = field(default_factory=dict)

    def all_of(self, domain: str, part: int) -> list[Any]:
        """part 0 sets thresholds, part 1 measures.

        Halved by the Thue-Morse sequence, not by taking turns: where every clip is followed by its noisy or
        quiet variants, both halves get some of each.
        """
        return [clip for i, clip in enumerate(self.domains[domain]) if i.bit_count() % 2 == part]

    def half(self, domain: str, part: int) -> list[Any]:
        """At most `max_clips` of `all_of`, evenly spread."""
        return evenly(self.all_of(domain, part), self.settings.max_clips)

    def load(self, clip: Any) -> np.ndarray | None:
        """float32 (n,) at 16 kHz; None, noted in `skipped`, if it cannot be read or is empty."""
        name = clip_name(clip)
        if name in self.skipped:
            return None
        try:
            audio = np.asarray(clip.load(), dtype=np.float32)
        except (AudioError, OSError) as error:
            self.skipped[name] = str(error)
            return None
        if len(audio) == 0:
            self.skipped[name] = "no samples"
            return None
        return audio

    def identity(self) -> dict[str, str]:
        """Domain -> SHA-256 (hex) of its clips' names in order."""
        return {
            domain: hashlib.sha256(json.dumps([clip_name(clip) for clip in clips]).encode()).hexdigest()
            for domain, clips in self.domains.items()
        }


def layer_groups(
    layers: Sequence[int], d_model: int, clips: HeldOut, memory: int, *, progress: bool = True
) -> Iterator[list[int]]:
    """Layers whose held-out frames (both halves, float32) fit into `memory` bytes together; at least one at
    a time. progress: say on stderr when that takes several passes.
    """
    frames = sum(_capacity(clips, domain, part) for domain in clips.domains for part in (0, 1))
    per_layer = max(1, 4 * frames * d_model)
    size = max(1, memory // per_layer)
    if size < len(layers) and progress:
        tqdm.write(
            f"held-out frames of {len(layers)} layers need {per_layer * len(layers) / 2**30:.1f} GiB, "
            f"{memory / 2**30:.1f} GiB are given: {size} layers at a time, "
            f"{math.ceil(len(layers) / size)} passes over the audio",
            file=sys.stderr,
        )
    for start in range(0, len(layers), size):
        yield list(layers[start : start + size])


def _per_clip(clips: HeldOut, count: int) -> int:
    return max(1, min(clips.settings.per_clip, clips.settings.max_frames // max(1, count)))


def _capacity(clips: HeldOut, domain: str, part: int) -> int:
    count = len(clips.half(domain, part))
    return min(clips.settings.max_frames, count * _per_clip(clips, count))


def collect_halves(
    encoder: AudioEncoder, clips: HeldOut, layers: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Frames (layers, frames, d_model) by domain, of the first and of the second half."""
    halves = tuple(
        {name: _collect(encoder, clips, name, part, layers) for name in clips.domains} for part in (0, 1)
    )
    if not all(any(x.shape[1] for x in half.values()) for half in halves):
        reason = next(iter(clips.skipped.values()), "the sets are empty")
        raise UsageError(f"no held-out clip could be read ({reason}): check the paths of the held-out audio")
    return halves[0], halves[1]


def _collect(encoder: AudioEncoder, clips: HeldOut, domain: str, part: int, layers: Sequence[int]) -> Tensor:
    chosen = clips.half(domain, part)
    per_clip = _per_clip(clips, len(chosen))
    kept = torch.empty(len(layers), _capacity(clips, domain, part), encoder.d_model)
    filled = 0
    for start in range(0, len(chosen), _BATCH):
        loaded = [clips.load(clip) for clip in chosen[start : start + _BATCH]]
        audios = [audio[: encoder.max_samples] for audio in loaded if audio is not None]
        if not audios:
            continue
        for frames in encoder.encode(audios, layers):
            n_true = frames.shape[1]
            n = min(n_true, per_clip, kept.shape[1] - filled)
            spread = torch.linspace(0, max(n_true - 1, 0), n, device=frames.device).long()
            kept[:, filled : filled + n] = frames[:, spread].float().cpu()
            filled += n
    return kept[:, :filled]


def balanced(domains: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As many frames (frames, d_model) of speech as of non-speech, evenly spread; the non-speech domains in
    equal parts as far as they reach. A side without any frame leaves all of the other.
    """
    others = {name: x for name, x in domains.items() if name != SPEECH and len(x)}
    speech = domains.get(SPEECH)
    if speech is None or not len(speech) or not others:
        return {name: x for name, x in domains.items() if len(x)}
    few = min(len(speech), sum(len(x) for x in others.values()))
    shares: dict[str, int] = {SPEECH: few}
    left, waiting = few, sorted(others, key=lambda name: len(others[name]))
    for index, name in enumerate(waiting):  # the smallest first: what it lacks the others give
        shares[name] = min(len(others[name]), -(-left // (len(waiting) - index)))
        left -= shares[name]
    return {
        name: x[torch.linspace(0, max(len(x) - 1, 0), shares[name]).round().long()]
        for name, x in domains.items()
        if shares.get(name)
    }

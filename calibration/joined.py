"""Recordings in which speech and other sounds take turns, joined from clips: what a gap costs and gains.

Single clips hold speech or they do not; real recordings hold both, and words are invented between the
utterances. The sweep hears these recordings to choose among edits that silence gaps.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from calibration.corpus import RATE, Clip
from whisper_steer.errors import UsageError

HARD_SETS = ("speech_quiet", "speech_whispered", "speech_sparse", "speech_noisy")
GAP = (2.0, 8.0)  # seconds of non-speech between utterances
LEVEL = (0.1, 0.6)  # peak of a gap's sound


def join_clips(sets: Mapping[str, Sequence[Clip]], *, count: int = 60, seed: int = 3) -> list[Clip]:
    """`count` recordings of 2 to 6 parts, utterances and gaps in turn, half of them beginning with a gap.

    Their `text` is what is said. Speech is taken from
    sets that plain recognition can be expected to understand (all of them if there are no others).

    Raises UsageError where there is no speech or no non-speech.
    """
    spoken = {
        name: [clip for clip in clips if clip.kind != "nonspeech" and (clip.text or "").strip()]
        for name, clips in sets.items()
    }
    easy = [clip for name, clips in spoken.items() if name not in HARD_SETS for clip in clips]
    speech = easy or [clip for clips in spoken.values() for clip in clips]
    others = [clip for clips in sets.values() for clip in clips if clip.kind == "nonspeech"]
    if not speech or not others:
        raise UsageError(
            f"{len(speech)} clips of speech and {len(others)} without: both are needed to join recordings"
        )
    return [_joined(number, speech, others, seed) for number in range(count)]


def _joined(number: int, speech: Sequence[Clip], others: Sequence[Clip], seed: int) -> Clip:
    rng = random.Random(f"{seed}/{number}")
    parts: list[tuple[Clip, bool]] = []
    for turn in range(rng.choice((1, 2, 2, 3))):
        if turn > 0 or number % 2 == 0:
            parts.append((rng.choice(others), False))
        parts.append((rng.choice(speech), True))
    parts.append((rng.choice(others), False))
    text = " ".join((clip.text or "").strip() for clip, spoken in parts if spoken)
    identity = zlib.crc32("+".join(clip.id for clip, _ in parts).encode())
    return Clip(
        id=f"joined/{seed}/{number:03d}-{identity:08x}",
        kind="speech",
        category="joined",
        split=parts[0][0].split,
        text=text,
        audio=partial(_audio, parts, f"{seed}/{number}/audio"),
    )


def _audio(parts: Sequence[tuple[Clip, bool]], seed: str) -> np.ndarray:
    rng = random.Random(seed)
    pieces = []
    for clip, spoken in parts:
        audio = clip.load()
        if not spoken:
            wanted = int(rng.uniform(*GAP) * RATE)
            audio = np.tile(audio, -(-wanted // max(len(audio), 1)))[:wanted]
            audio = audio * (rng.uniform(*LEVEL) / max(float(np.abs(audio).max(initial=0.0)), 1e-6))
        pieces.append(audio.astype(np.float32))
    return np.concatenate(pieces)

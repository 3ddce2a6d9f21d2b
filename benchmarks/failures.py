"""The worst failures of ours, clip by clip: speech that was wrongly deleted, and hallucinations that are
left."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from calibration.evaluate import normalise, word_errors

if TYPE_CHECKING:
    from benchmarks.hearing_cache import ClipRecord

DELETED, LEFT = "speech deleted", "hallucination left"


@dataclass(frozen=True)
class Failure:
    """One clip that went wrong.

    kind: DELETED or LEFT. words: reference words that plain Whisper had and ours lacks (net deletions), or
    words invented. emptied: plain Whisper wrote something, ours nothing. plain, ours: what they wrote.
    """

    kind: str
    clip: ClipRecord
    plain: str
    ours: str
    words: int
    emptied: bool = False


def worst_failures(
    clips: Sequence[ClipRecord], plain: Mapping[str, str], ours: Mapping[str, str], count: int = 10
) -> list[Failure]:
    """At most `count`, half of each kind (more of one where the other has fewer), the worst first.

    Worst speech: emptied clips, then by words lost; worst non-speech: by words invented. plain, ours: texts
    by clip id; clips that either lacks are left out.
    """
    deleted, left = [], []
    for clip in clips:
        if clip.id not in plain or clip.id not in ours:
            continue
        before, after = plain[clip.id], ours[clip.id]
        if not clip.is_speech:
            if words := len(normalise(after).split()):
                left.append(Failure(LEFT, clip, before, after, words))
            continue
        old, new = word_errors(clip.text or "", before), word_errors(clip.text or "", after)
        if old is not None and new is not None and new.deletions > old.deletions:
            emptied = bool(normalise(before)) and not normalise(after)
            deleted.append(Failure(DELETED, clip, before, after, new.deletions - old.deletions, emptied))
    deleted.sort(key=lambda one: (not one.emptied, -one.words, one.clip.id))
    left.sort(key=lambda one: (-one.words, one.clip.id))
    half = count // 2
    from_deleted = max(half, count - len(left))
    chosen = deleted[:from_deleted]
    return chosen + left[: count - len(chosen)]


def marked_words(reference: str, heard: str) -> list[tuple[str, str]]:
    """The words of both in order: ("same", w), ("lost", w) of the reference, ("new", w) of what was
    heard."""
    truth, guess = normalise(reference).split(), normalise(heard).split()
    marked: list[tuple[str, str]] = []
    matcher = difflib.SequenceMatcher(a=truth, b=guess, autojunk=False)
    for tag, start, end, first, last in matcher.get_opcodes():
        if tag == "equal":
            marked += [("same", word) for word in truth[start:end]]
        else:
            marked += [("lost", word) for word in truth[start:end]]
            marked += [("new", word) for word in guess[first:last]]
    return marked

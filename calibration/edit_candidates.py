"""Candidates for the edits of a steering: screened one by one and together, made weaker until they are
affordable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from calibration.evaluate import evenly
from calibration.hearing import Calibration, Heard
from calibration.screening import MAX_COST, Candidate, Screen
from calibration.selection import GateChoice, smoothed
from whisper_steer.steering import Edit, LatentEdit, MeanAblation

logger = logging.getLogger("whisper_steer")

WINDOW = 30.0  # seconds

_HALVINGS = 3


def screen_edits(
    calibration: Calibration,
    choice: GateChoice | None,
    names: Sequence[str],
    logits: np.ndarray | None = None,
    *,
    progress: bool = True,
) -> list[Candidate]:
    """Candidates, best first: every edit alone, and the best ones of several layers together.

    choice: the gate that scales the edits, with its logits; None: ungated, and nothing together.
    Non-speech windows that the gate withholds anyway are used only to fill up.
    """
    open_clips, closed_clips = list(calibration.nonspeech), []
    if choice is not None and logits is not None:
        values = smoothed(logits, choice.gate.smooth).min(axis=1)
        open_clips = [c for c in calibration.nonspeech if values[c.rows[0]] <= choice.gate.threshold]
        closed_clips = [c for c in calibration.nonspeech if values[c.rows[0]] > choice.gate.threshold]
    count = calibration.effort.screened
    nonspeech = evenly(open_clips, count)
    nonspeech += evenly(closed_clips, count - len(nonspeech))
    speech = evenly([clip for clip in calibration.speech if clip.has_words(clip.transcript.text)], count)
    if not names or not nonspeech or not speech:
        return []
    # of a longer one the window would hold only a part of what is said
    joined = evenly([clip for clip in calibration.joined if clip.transcript.seconds <= WINDOW], count)
    screen = Screen(
        calibration.model,
        calibration.first_windows(speech),
        calibration.first_windows(nonspeech),
        None if choice is None else choice.gate,
        (calibration.first_windows(joined), [clip.reference or "" for clip in joined]) if joined else None,
        language=calibration.language,
    )
    logger.info("plain: %s", screen.effect(()))
    candidates = [
        screen.screen(name, (calibration.fit.edits[name],))
        for name in tqdm(names, desc="screening edits", unit="edit", disable=not progress)
    ]
    candidates.sort(key=lambda candidate: candidate.effect.score)
    if choice is not None:
        together = combinations(candidates)
        candidates += [
            screen.screen(name, edits)
            for name, edits in tqdm(
                together.items(), desc="several layers", unit="edit", disable=not progress
            )
        ]
    return sorted(candidates, key=lambda candidate: candidate.effect.score)


def combinations(candidates: Sequence[Candidate]) -> dict[str, tuple[Edit, ...]]:
    """Edits worth trying together, from single ones, best first: the best of each of two and three layers,
    silence with the best of the others, and silence at two layers."""
    silences = [c for c in candidates if isinstance(c.edits[0], MeanAblation)]
    others: dict[int, Candidate] = {}
    for candidate in candidates:
        if candidate not in silences:
            others.setdefault(candidate.edits[0].layer, candidate)
    best = list(others.values())
    groups = [best[:2], best[:3], silences[:2]]
    groups += [[silences[0], best[0]]] if silences and best else []
    found = {}
    for group in groups:
        if len(group) > 1:
            ordered = sorted(group, key=lambda candidate: candidate.edits[0].layer)
            found["+".join(c.name for c in ordered)] = tuple(c.edits[0] for c in ordered)
    return found


def pick_finalists(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """`count` of the candidates (best first): the best of every kind - silence, one other edit, several
    together - before the next ones, since a few windows are a rough measure."""

    def kind(candidate: Candidate) -> str:
        if not adjustable(candidate):
            return "silence"
        return "one" if len(candidate.edits) == 1 else "several"

    best: dict[str, Candidate] = {}
    for candidate in candidates:
        best.setdefault(kind(candidate), candidate)
    first = list(best.values())
    return [*first, *(candidate for candidate in candidates if candidate not in first)][:count]


def weakened(candidate: Candidate, factor: float) -> Candidate:
    """The same edits, weaker; silence stays as it is."""
    edits = tuple(
        edit if isinstance(edit, MeanAblation) else replace(edit, strength=edit.strength * factor)
        for edit in candidate.edits
    )
    return replace(candidate, edits=edits, size=candidate.size * factor)


def adjustable(candidate: Candidate) -> bool:
    return not all(isinstance(edit, MeanAblation) for edit in candidate.edits)


def best_in_gaps(hear: Callable[[Candidate], Heard], candidate: Candidate) -> Candidate:
    """Halve the strength as long as the word errors in recordings with gaps fall, at most a few times: the
    screening looks for the strongest edit that speech survives, on a few windows; more is not always
    better. hear: of such recordings."""
    if not adjustable(candidate):
        return candidate
    best, errors = candidate, hear(candidate).wer
    for _ in range(_HALVINGS):
        weaker = weakened(best, 0.5)
        found = hear(weaker).wer
        logger.info("%s in gaps: WER %.4f, at half that strength %.4f", candidate.name, errors, found)
        if found >= errors:
            break
        best, errors = weaker, found
    return best


def fit_to_budget(
    hear: Callable[[Candidate], Heard], candidate: Candidate, allowed: float
) -> tuple[Candidate, Heard]:
    """Halve the strength until the WER of what `hear` gives rises by at most `allowed`, at most a few
    times."""
    for attempt in range(_HALVINGS + 1):
        heard = hear(candidate)
        if heard.rise <= allowed or attempt == _HALVINGS or not adjustable(candidate):
            return candidate, heard
        candidate = weakened(candidate, 0.5)
    raise AssertionError("unreachable")


def dearest(candidates: Sequence[Candidate]) -> float:
    """What a candidate may cost: the screening's limit, or where nothing keeps it, twice the cheapest."""
    return max(MAX_COST, 2 * min(candidate.cost for candidate in candidates))


def candidate_record(candidate: Candidate) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "layers": [edit.layer for edit in candidate.edits],
        "latents": [
            len(edit.values) if isinstance(edit, LatentEdit) and not edit.reconstruct else None
            for edit in candidate.edits
        ],
        "strengths": [edit.strength for edit in candidate.edits],
        "size": candidate.size,
        "speech_cost": candidate.cost,
        "effect": asdict(candidate.effect),
    }

"""Chooses gate, edits, layer, k and strength on calibration clips, within a budget of word errors.

First the gate and its threshold, from cached logits and transcripts; then every edit, and the best of several
layers together, is screened on a few windows; the best few are heard through the real `whisper.transcribe`,
made weaker where they exceed the budget on all clips, and the best of what is left wins. `calibration.sweep`
and `calibration.calibrate` are the commands.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.edit_candidates import (
    best_in_gaps,
    candidate_record,
    dearest,
    fit_to_budget,
    pick_finalists,
    screen_edits,
    weakened,
)
from calibration.evaluate import evenly
from calibration.frontier import measure_frontier, profiles
from calibration.gated_hearing import GatedHearing
from calibration.hearing import Calibration, Heard
from calibration.refit import refit
from calibration.screening import Candidate
from calibration.selection import (
    MIN_RUN,
    SHUT,
    CalibrationClip,
    GateChoice,
    choose_gate,
    lowest_threshold,
    with_frame_gate,
    with_spread,
)
from calibration.training_clips import TrainingClip
from calibration.window_fit import with_window_probes
from whisper_steer.errors import UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Steering

logger = logging.getLogger("whisper_steer")

# frame gates to try for an edit that costs too much, each more careful than the one before
CAUTION = ((SHUT, MIN_RUN), (0.9999, MIN_RUN), (1.0, 2 * MIN_RUN))
# shares of the budget that a gate alone is given, where it exceeds the whole on the clips that are measured;
# at 0 it takes no word on any clip
_LESS = (0.5, 0.25, 0.0)


@dataclass(frozen=True)
class Chosen:
    """What the sweep chose, and what it heard with it on the calibration clips.

    Attributes:
        steering: edits and gate. hearing: how clips are heard under that gate; None without one.
        clips, heard: the clips that the result was measured on, and what became of them.
        record: what was tried.
    """

    steering: Steering
    hearing: GatedHearing | None
    clips: Sequence[CalibrationClip]
    heard: Heard
    record: dict[str, Any]


def find_gate(
    calibration: Calibration,
    kind: str,
    *,
    training: Sequence[TrainingClip] = (),
    refitted: bool = True,
    cache: Path | None = None,
    progress: bool = True,
) -> tuple[GateChoice, np.ndarray]:
    """The gate, its smoothing, threshold, spread and frame scale; and the logits (rows, 1500) behind them.

    kind: which may win: "latents", "raw" or "any"; the others are measured as controls.
    training: the clips that the gates were fitted on, for probes of the window as a whole; none: without
        them. cache: file that keeps what they give.
    refitted: fit the winner again with the calibration clips; kept unless it does worse on clips that it was
        fitted without.
    """
    fit = calibration.fit
    eligible = [name for name, gate in fit.gates.items() if kind in (gate.kind, "any")]
    if not eligible:
        raise UsageError(f"the fit holds no gate of kind {kind!r}: pass --gate-kind any")
    choice = choose_gate(
        fit.gates, fit.table.logits, calibration.clips, calibration.budget, eligible=eligible
    )
    logits = fit.table.logits[choice.name]
    if refitted:
        again, out_of_fold = refit(
            calibration.model,
            choice,
            fit.sample,
            calibration.clips,
            calibration.sources,
            len(logits),
            calibration.budget,
            seed=int(fit.record["seed"]),
            progress=progress,
        )
        before, after = choice.over_budgets[0], again.over_budgets[0]
        logger.info("refitted: text-FPR over budgets %.4f -> %.4f", before, after)
        if after <= before:
            choice, logits = again, out_of_fold
        else:
            choice = replace(choice, table=again.table)
    if training:
        choice = with_window_probes(
            calibration.model,
            choice,
            logits,
            fit.table.targets,
            calibration.clips,
            calibration.sources,
            training,
            calibration.budget,
            cache=cache,
            progress=progress,
        )
    gate = with_spread(choice.gate, choice.window_logits, calibration.clips)
    return replace(choice, gate=with_frame_gate(gate, logits, fit.table.targets)), logits


def _measured(calibration: Calibration) -> Sequence[CalibrationClip]:
    """The clips on which what is written is measured, evenly from every set."""
    return evenly(calibration.clips, calibration.effort.measured or len(calibration.clips))


def _bare(calibration: Calibration) -> dict[str, Any]:
    return dict(model_metadata(calibration.model))


def find_winner(
    calibration: Calibration,
    choice: GateChoice,
    logits: np.ndarray,
    *,
    edits: Sequence[str] | None = None,
    progress: bool = True,
) -> Chosen:
    """Gate and edits together. edits: names of those that may win, as the fit has them; None: all.

    Raises UsageError for an edit that the fit does not have.
    """
    # the mean difference is the S-vector at another strength
    known = [name for name in calibration.fit.edits if not name.startswith(("audiosae", "meandiff"))]
    if unknown := [name for name in edits or () if name not in known]:
        raise UsageError(f"the fit has no edit {unknown[0]!r}: expected some of {', '.join(known)}")
    names = known if edits is None else list(edits)
    candidates = screen_edits(calibration, choice, names, logits, progress=progress)
    hearing = GatedHearing(calibration, choice.gate, choice.window_logits)
    speech = evenly(calibration.speech, calibration.effort.heard)
    passing = [clip for clip in calibration.nonspeech if hearing.passes(clip)]
    budget = calibration.budget.wer_rise
    ranked: list[tuple[tuple[float, ...], Candidate | None, dict[str, float]]] = []
    nothing = hearing.hear((), [*passing, *speech], "gate alone", progress=progress)
    ranked.append(_ranked(calibration, hearing, None, nothing, passing, progress))
    for candidate in pick_finalists(candidates, calibration.effort.finalists):
        candidate = best_in_gaps(
            lambda one: hearing.hear(one.edits, calibration.joined, f"{one.name}, gaps", progress=progress),
            candidate,
        )
        candidate, heard = fit_to_budget(
            lambda one: hearing.hear(one.edits, [*passing, *speech], one.name, progress=progress),
            candidate,
            budget,
        )
        ranked.append(_ranked(calibration, hearing, candidate, heard, passing, progress))
    ranked.sort(key=lambda item: item[0])
    record: dict[str, Any] = {
        "gate": choice.name,
        "gate_alone": asdict(choice.result),
        "gates": list(choice.table),
        "screened": [candidate_record(candidate) for candidate in candidates],
        "finalists": [finalist for _, _, finalist in ranked],
        "checked": [],
    }
    clips = _measured(calibration)
    alone = next(finalist["gap_wer"] for _, one, finalist in ranked if one is None)
    best: tuple[float, Chosen] | None = None
    for score, finalist, ranks in ranked:
        if finalist is None or score[0] or (best is not None and best[0] <= score[1]):
            break
        found = _within_budget(
            calibration, hearing, finalist, logits, clips, ranks["gap_wer"], alone, record, progress
        )
        if found is None:
            continue
        # one that had to be made weaker must still do better than the next one
        reached = score[1] - ranks["gap_wer"] + found[0]
        if best is None or reached < best[0]:
            best = reached, found[1]
    if best is not None:
        return best[1]
    # no edit keeps the budget beside the gate, or none does better
    record["edit"] = None
    hearing, heard = _gate_alone(calibration, choice, hearing, clips, record["checked"], progress)
    return Chosen(Steering((), hearing.gate, _bare(calibration)), hearing, clips, heard, record)


def _within_budget(
    calibration: Calibration,
    hearing: GatedHearing,
    finalist: Candidate,
    logits: np.ndarray,
    clips: Sequence[CalibrationClip],
    gap_wer: float,
    alone: float,
    record: dict[str, Any],
    progress: bool,
) -> tuple[float, Chosen] | None:
    """(WER in recordings with gaps, what is chosen) of the finalist, weaker and in fewer places if need be,
    once it keeps the budget on all `clips`; None if it does not, or does worse in gaps than the gate alone.

    gap_wer: of the finalist as it is. record: of what was tried; its "checked" grows.
    """
    for caution, (shut, min_run) in enumerate(CAUTION):
        chosen = weakened(finalist, 0.5**caution)
        gate = with_frame_gate(
            hearing.gate, logits, calibration.fit.table.targets, shut=shut, min_run=min_run
        )
        careful = hearing.with_gate(gate)
        heard = careful.hear(chosen.edits, clips, "checking the winner", progress=progress)
        checked = {
            "name": chosen.name,
            "shut": shut,
            "min_run": min_run,
            "wer_rise": heard.rise,
            "wer_rise_hi": heard.rise_hi,
            "set_rise": heard.set_rise,
            "emptied": heard.emptied,
        }
        record["checked"].append(checked)
        logger.info(
            "%s, %d frames: WER %+.5f, up to %+.5f, in one set %+.5f",
            chosen.name,
            min_run,
            heard.rise,
            heard.rise_hi,
            heard.set_rise,
        )
        if not _keeps_budget(calibration, heard):
            continue
        if caution:  # weaker and in fewer places than when it was ranked
            gap_wer = careful.hear(chosen.edits, calibration.joined, "gaps again", progress=progress).wer
            checked["gap_wer"] = gap_wer
            logger.info("%s in gaps: WER %.4f, gate alone %.4f", chosen.name, gap_wer, alone)
        if caution and gap_wer > alone:
            continue
        recipes = [calibration.fit.recipes[name] for name in chosen.name.split("+")]
        steering = Steering(chosen.edits, gate, _bare(calibration))
        edit = {**candidate_record(chosen), "recipes": recipes}
        return gap_wer, Chosen(steering, careful, clips, heard, {**record, "edit": edit})
    return None


def gate_alone(calibration: Calibration, choice: GateChoice, *, progress: bool = True) -> Chosen:
    """The gate without edits: it withholds windows and leaves all others as they are."""
    clips, checked = _measured(calibration), list[dict[str, Any]]()
    hearing = GatedHearing(calibration, choice.gate, choice.window_logits)
    hearing, heard = _gate_alone(calibration, choice, hearing, clips, checked, progress)
    record = {
        "gate": choice.name,
        "gate_alone": asdict(choice.result),
        "gates": list(choice.table),
        "edit": None,
        "checked": checked,
    }
    return Chosen(Steering((), hearing.gate, _bare(calibration)), hearing, clips, heard, record)


def _keeps_budget(calibration: Calibration, heard: Heard) -> bool:
    """By the upper ends of the intervals, and in every set."""
    budget = calibration.budget
    return (
        heard.rise_hi <= budget.wer_rise
        and heard.emptied_hi <= budget.share
        and heard.set_rise <= budget.set_rise
    )


def _gate_alone(
    calibration: Calibration,
    choice: GateChoice,
    hearing: GatedHearing,
    clips: Sequence[CalibrationClip],
    checked: list[dict[str, Any]],
    progress: bool,
) -> tuple[GatedHearing, Heard]:
    """The gate without edits, its threshold raised until the budget is kept on `clips`, too: it was set on
    all clips, and of fewer the intervals are wider. Nothing is decoded."""
    for factor in (1.0, *_LESS):
        if factor < 1:
            budget = calibration.budget.times(factor)
            threshold = lowest_threshold(calibration.clips, choice.window_logits, budget)
            hearing = hearing.with_gate(replace(choice.gate, threshold=max(threshold, choice.gate.threshold)))
        heard = hearing.hear((), clips, "gate alone", progress=progress)
        checked.append(
            {
                "name": "gate alone",
                "threshold": hearing.gate.threshold,
                "wer_rise": heard.rise,
                "wer_rise_hi": heard.rise_hi,
                "emptied": heard.emptied,
            }
        )
        logger.info("gate alone: WER %+.5f, up to %+.5f", heard.rise, heard.rise_hi)
        if _keeps_budget(calibration, heard):
            break
    return hearing, heard


def _ranked(
    calibration: Calibration,
    hearing: GatedHearing,
    candidate: Candidate | None,
    heard: Heard,
    passing: Sequence[CalibrationClip],
    progress: bool,
) -> tuple[tuple[float, ...], Candidate | None, dict[str, float]]:
    """(score, candidate, record): over the budget or not, then words left on non-speech clips and word
    errors of the joined recordings together."""
    name = "gate alone" if candidate is None else candidate.name
    edits = () if candidate is None else candidate.edits
    gaps = hearing.hear(edits, calibration.joined, f"{name}, gaps", progress=progress)
    after = [heard.transcripts[clip.set, clip.id] for clip in passing]
    total = max(len(calibration.nonspeech), 1)
    text = sum(clip.has_words(t.text) for clip, t in zip(passing, after, strict=True)) / total
    record: dict[str, Any] = {
        "name": name,
        "wer_rise": heard.rise,
        "text_fpr": text,
        "gap_wer": gaps.wer,
        "gap_wer_plain": gaps.wer_plain,
    }
    logger.info("%s", record)
    over = heard.rise > calibration.budget.wer_rise
    rates = (sum(t.hr for t in after) / total, sum(t.nsp for t in after) / total)
    return (float(over), text + gaps.wer, *rates), candidate, record


def find_audiosae(calibration: Calibration, *, progress: bool = True) -> Chosen | None:
    """AudioSAE's recipe, ungated, at the strength that its own budget allows; None if the fit has no such
    edit.

    Its reconstruction costs recognition at any strength. Where that alone exceeds the budget, the budget
    counts from the WER with the reconstruction, and the record says so.
    """
    names = [name for name in calibration.fit.edits if name.startswith("audiosae")]
    candidates = screen_edits(calibration, None, names, progress=progress)
    if not candidates:
        return None
    affordable = [candidate for candidate in candidates if candidate.cost <= dearest(candidates)]
    speech = evenly(calibration.speech, calibration.effort.heard)

    def hear(candidate: Candidate) -> Heard:
        return calibration.hear(
            Steering(candidate.edits, None, _bare(calibration)), speech, candidate.name, progress=progress
        )

    base = hear(weakened(affordable[0], 0.0)).rise
    allowed = calibration.budget.wer_rise + max(0.0, base)
    candidate, _ = fit_to_budget(hear, affordable[0], allowed)
    steering = Steering(candidate.edits, None, _bare(calibration))
    clips = _measured(calibration)
    heard = calibration.hear(steering, clips, "measuring audiosae", progress=progress)
    record = {
        "edit": {**candidate_record(candidate), **calibration.fit.recipes[candidate.name]},
        "screened": [candidate_record(other) for other in candidates],
        "wer_rise_of_reconstruction": base,
        "within_budget": heard.rise <= calibration.budget.wer_rise,
    }
    return Chosen(steering, None, clips, heard, record)


def finish(calibration: Calibration, chosen: Chosen, name: str, *, progress: bool = True) -> Steering:
    """The steering with the metadata that its file shows; with a gate, its frontier and profiles too."""
    metadata: dict[str, Any] = {
        **_bare(calibration),
        "name": name,
        "calibrated_on": calibration.fit.record["calibrated_on"],
        "rates": {
            "wer_rise": chosen.heard.rise,
            "wer_rise_hi": chosen.heard.rise_hi,
            "sets": calibration.rates(chosen.heard),
        },
        "recipe": {
            **chosen.record,
            "budget": asdict(calibration.budget),
            "fit_seed": calibration.fit.record["seed"],
            "training": calibration.fit.record.get("training"),
        },
        "licence": "MIT",
    }
    if chosen.hearing is not None:
        points = measure_frontier(
            chosen.hearing,
            chosen.steering.edits,
            evenly(calibration.clips, calibration.effort.frontier),
            chosen.heard,
            chosen.clips,
            progress=progress,
        )
        metadata["frontier"] = points
        metadata["profiles"] = profiles(points, calibration.budget.wer_rise)
    return replace(chosen.steering, metadata=metadata)

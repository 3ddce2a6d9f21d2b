"""Chooses gate, threshold, edit, layer, k and strength on the calibration split, and writes the steering
files.

    python -m calibration.sweep --model mini.en --fit out/fit --labels out/labels.jsonl --data
    ../shared/data \\
        --out sae_weights/mini.en

alpha = 1 is the strongest setting whose WER on calibration speech rises by at most 0.1 percentage points, by
the upper end of a bootstrap interval. First the gate and its threshold, from cached logits and transcripts,
fitted again with the calibration clips; then every edit, and the best of several layers together, is screened
on a few windows (how strong may it be, what does it do, in gaps between speech too); the best few are heard
through the real `whisper.transcribe`. Written: steering.safetensors with its frontier and profiles, and
AudioSAE's recipe by its own budget as steering-audiosae.safetensors, each with what was measured.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.command import run
from calibration.edit_candidates import (
    candidate_record,
    dearest,
    fit_to_budget,
    pick_finalists,
    screen_edits,
    weakened,
)
from calibration.evaluate import evenly, normalise
from calibration.fit_files import read_fit
from calibration.frontier import measure_frontier, profiles
from calibration.gated_hearing import GatedHearing
from calibration.hallucinations import label_clips, print_table
from calibration.hearing import Calibration, Effort, Heard
from calibration.refit import refit
from calibration.screening import Candidate
from calibration.selection import (
    MIN_RUN,
    SHUT,
    Budget,
    CalibrationClip,
    GateChoice,
    choose_gate,
    with_frame_gate,
    with_spread,
)
from calibration.training_clips import TrainingClip, training_clips
from calibration.window_fit import with_window_probes
from whisper_steer.errors import UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Steering

logger = logging.getLogger("whisper_steer")

GATE_KINDS = ("latents", "raw", "any")
# frame gates to try for an edit that costs too much, each more careful than the one before
CAUTION = ((SHUT, MIN_RUN), (1.0, 2 * MIN_RUN), (1.0, 4 * MIN_RUN))


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
    targets = calibration.fit.table.targets
    for score, finalist, _ in ranked:
        if finalist is None or score[0]:
            break
        for caution, (shut, min_run) in enumerate(CAUTION):
            chosen = weakened(finalist, 0.5**caution)
            gate = with_frame_gate(choice.gate, logits, targets, shut=shut, min_run=min_run)
            careful = hearing.with_gate(gate)
            heard = careful.hear(chosen.edits, clips, "checking the winner", progress=progress)
            record["checked"].append(
                {
                    "name": chosen.name,
                    "shut": shut,
                    "min_run": min_run,
                    "wer_rise": heard.rise,
                    "wer_rise_hi": heard.rise_hi,
                    "emptied": heard.emptied,
                }
            )
            logger.info(
                "%s, %d frames: WER %+.5f, up to %+.5f", chosen.name, min_run, heard.rise, heard.rise_hi
            )
            if heard.rise_hi <= budget and heard.emptied <= calibration.budget.share:
                recipes = [calibration.fit.recipes[name] for name in chosen.name.split("+")]
                record["edit"] = {**candidate_record(chosen), "recipes": recipes}
                steering = Steering(chosen.edits, gate, _bare(calibration))
                return Chosen(steering, careful, clips, heard, record)
    # no edit keeps the budget beside the gate, or none does better: the gate alone keeps it, by its choice
    record["edit"] = None
    heard = hearing.hear((), clips, "gate alone", progress=progress)
    return Chosen(Steering((), choice.gate, _bare(calibration)), hearing, clips, heard, record)


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
    text = sum(bool(normalise(t.text)) for t in after) / total
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


def _training(calibration: Calibration, corpus: Path | None, data_dir: Path | None) -> list[TrainingClip]:
    """The clips that the fit's gates were fitted on; none without a corpus."""
    if corpus is None:
        return []
    drawn = calibration.fit.record.get("training")
    if drawn is None:
        raise UsageError(
            "the fit does not say which training clips it used: run python -m calibration.fit again"
        )
    return training_clips(corpus, data_dir, **drawn)


def print_result(title: str, steering: Steering) -> None:
    """The table of one steering's rates."""
    rates = steering.metadata["rates"]
    print(
        f"\n{title}: WER {100 * rates['wer_rise']:+.2f} points on calibration speech "
        f"(interval up to {100 * rates['wer_rise_hi']:+.2f})"
    )
    print_table([{"set": name, **row} for name, row in rates["sets"].items()])
    emptied = {
        name: row["wrongly_emptied"] for name, row in rates["sets"].items() if "wrongly_emptied" in row
    }
    print("wrongly emptied: " + ", ".join(f"{name} {share:.1%}" for name, share in emptied.items()))
    plain = rates["sets"].get("all_nonspeech", {}).get("plain")
    if plain:
        print("plain: " + ", ".join(f"{key} {plain[key]:.3f}" for key in ("text_fpr", "nsp_fpr", "hr")))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m calibration.sweep", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--model", default="mini.en", help="name or path (default: mini.en)")
    parser.add_argument("--fit", type=Path, default=Path("out/fit"), help="folder of calibration.fit")
    parser.add_argument(
        "--labels", type=Path, default=Path("out/labels.jsonl"), help="of calibration.hallucinations"
    )
    parser.add_argument("--data", dest="data_dir", type=Path, default=None, help="folder of real recordings")
    parser.add_argument(
        "--corpus",
        type=Path,
        default=None,
        help="the folder that calibration.fit was given: its clips teach the gate to read windows as a whole "
        "(default: the gate goes by frames alone)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/steering"), help="folder for the steering files"
    )
    parser.add_argument("--wer-rise", type=float, default=Budget.wer_rise, help="budget, 0.001 = 0.1 points")
    parser.add_argument("--share", type=float, default=Budget.share, help="speech clips that may lose words")
    parser.add_argument("--gate-kind", choices=GATE_KINDS, default="latents", help="which gates may win")
    for field, what in (
        ("screened", "windows on which every edit is screened"),
        ("finalists", "edits that are heard through whisper.transcribe"),
        ("heard", "speech clips on which a finalist's WER is measured"),
        ("measured", "clips on which the result is measured; 0: all"),
        ("joined", "recordings with gaps on which edits are compared"),
        ("frontier", "clips on which the frontier is measured beside alpha 1"),
    ):
        default = getattr(Effort, field)
        parser.add_argument(f"--{field}", type=int, default=default, help=f"{what} (default: {default})")
    parser.add_argument(
        "--edits", default=None, help="only these edits may win, names of the fit with commas (default: all)"
    )
    parser.add_argument(
        "--no-refit",
        dest="refitted",
        action="store_false",
        help="keep the gate as it was fitted on training clips: do not try it on calibration clips, too",
    )
    parser.add_argument("--only", choices=("steering", "audiosae"), help="write one of the two files only")
    parser.add_argument("--quick", action="store_true", help="the small calibration sets (as fitted)")
    args = parser.parse_args(argv)

    from calibration.corpus import eval_sets
    from whisper_steer.zoo import load_model

    budget = Budget(wer_rise=args.wer_rise, share=args.share)
    effort = Effort(**{field.name: getattr(args, field.name) for field in fields(Effort)})
    started = time.monotonic()
    model = load_model(args.model)
    sets = eval_sets("calibration", data_dir=args.data_dir, quick=args.quick)
    labels = label_clips(model, [clip for clips in sets.values() for clip in clips], cache=args.labels)
    calibration = Calibration.of(
        model, sets, read_fit(args.fit, model, sets, labels), budget, effort, cache=args.labels
    )
    written: list[tuple[Path, Steering]] = []
    if args.only != "audiosae":
        training = _training(calibration, args.corpus, args.data_dir)
        choice, logits = find_gate(
            calibration,
            args.gate_kind,
            training=training,
            refitted=args.refitted,
            cache=args.fit / "whole_windows.npz",
        )
        result = choice.result
        lost = ", ".join(f"{name} {share:.1%}" for name, share in result.lost.items())
        print(
            f"gate {choice.name}, smoothed over {choice.gate.smooth} frames: "
            f"text-FPR {result.plain_text_fpr:.3f} -> {result.text_fpr:.3f}, "
            f"WER {result.wer_plain:.4f} -> {result.wer:.4f}, lost {lost}"
        )
        edits = None if args.edits is None else [name for name in args.edits.split(",") if name]
        winner = finish(calibration, find_winner(calibration, choice, logits, edits=edits), "default")
        written.append((args.out / "steering.safetensors", winner))
    if args.only != "steering":
        found = find_audiosae(calibration)
        if found is not None:
            recipe = finish(calibration, found, "audiosae")
            written.append((args.out / "steering-audiosae.safetensors", recipe))
    for path, steering in written:
        steering.save(path)
        print_result(path.name, steering)
    print(f"{len(written)} steering files in {args.out}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run(main)

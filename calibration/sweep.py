"""Chooses gate, threshold, edit, layer, k and strength on the calibration split, and writes the steering
files.

    python -m calibration.sweep --model mini.en --fit out/fit --labels out/labels.jsonl --data
    ../shared/data \\
        --out sae_weights/mini.en

alpha = 1 is the strongest setting whose WER on calibration speech rises by at most 0.2 percentage points.
First the gate and its threshold, from cached logits and transcripts; then every edit is screened on a few
windows (how strong may it be, what does it do); the best few are heard through the real
`whisper.transcribe`. Written: steering.safetensors, and AudioSAE's recipe by its own budget as
steering-audiosae.safetensors, each with what was measured.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from calibration.command import run
from calibration.evaluate import evenly, normalise
from calibration.fit import read_fit
from calibration.hallucinations import label_clips, print_table
from calibration.hearing import Calibration, Effort, Heard
from calibration.screening import MAX_COST, Candidate, Screen
from calibration.selection import (
    Budget,
    CalibrationClip,
    GateChoice,
    choose_gate,
    smoothed,
    with_frame_gate,
    with_spread,
)
from whisper_steer.errors import UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Gate, LatentEdit, Steering

logger = logging.getLogger("whisper_steer")

GATE_KINDS = ("latents", "raw", "any")
_HALVINGS = 3


def find_gate(calibration: Calibration, kind: str) -> GateChoice:
    """The gate, its smoothing, threshold, spread and frame scale.

    kind: which may win: "latents", "raw" or "any"; the others are measured as controls.
    """
    fit = calibration.fit
    eligible = [name for name, gate in fit.gates.items() if kind in (gate.kind, "any")]
    if not eligible:
        raise UsageError(f"the fit holds no gate of kind {kind!r}: pass --gate-kind any")
    choice = choose_gate(
        fit.gates, fit.table.logits, calibration.clips, calibration.budget, eligible=eligible
    )
    logits = fit.table.logits[choice.name]
    gate = with_spread(choice.gate, logits, calibration.clips)
    return replace(choice, gate=with_frame_gate(gate, logits, fit.table.targets))


def screen_edits(
    calibration: Calibration, choice: GateChoice | None, names: Sequence[str], *, progress: bool = True
) -> list[Candidate]:
    """Candidates, best first. choice: the gate that scales the edits; None: ungated.

    Non-speech windows that the gate withholds anyway are used only to fill up.
    """
    open_clips, closed_clips = list(calibration.nonspeech), []
    if choice is not None:
        logits = calibration.fit.table.logits[choice.name]
        values = smoothed(logits, choice.gate.smooth).min(axis=1)
        open_clips = [c for c in calibration.nonspeech if values[c.rows[0]] <= choice.gate.threshold]
        closed_clips = [c for c in calibration.nonspeech if values[c.rows[0]] > choice.gate.threshold]
    count = calibration.effort.screened
    nonspeech = evenly(open_clips, count)
    nonspeech += evenly(closed_clips, count - len(nonspeech))
    speech = evenly([clip for clip in calibration.speech if normalise(clip.transcript.text)], count)
    if not names or not nonspeech or not speech:
        return []
    screen = Screen(
        calibration.model,
        calibration.first_windows(speech),
        calibration.first_windows(nonspeech),
        None if choice is None else choice.gate,
    )
    logger.info("plain: %s", screen.effect(None))
    candidates = [
        screen.screen(name, calibration.fit.edits[name])
        for name in tqdm(names, desc="screening edits", unit="edit", disable=not progress)
    ]
    return sorted(candidates, key=lambda candidate: candidate.effect.score)


def weakened(candidate: Candidate, factor: float) -> Candidate:
    """The same edit, weaker."""
    edit = replace(candidate.edit, strength=candidate.edit.strength * factor)
    return replace(candidate, edit=edit, size=candidate.size * factor)


def fit_to_budget(
    calibration: Calibration,
    candidate: Candidate,
    gate: Gate | None,
    clips: Sequence[CalibrationClip],
    allowed: float,
) -> tuple[Candidate, Heard]:
    """Halve the strength until the WER on `clips` rises by at most `allowed`, at most a few times."""
    for attempt in range(_HALVINGS + 1):
        heard = calibration.hear(Steering((candidate.edit,), gate, _bare(calibration)), clips, candidate.name)
        if heard.rise <= allowed or attempt == _HALVINGS:
            return candidate, heard
        candidate = weakened(candidate, 0.5)
    raise AssertionError("unreachable")


def _measured(calibration: Calibration) -> Sequence[CalibrationClip]:
    """The clips on which what is written is measured, evenly from every set."""
    return evenly(calibration.clips, calibration.effort.measured or len(calibration.clips))


def _bare(calibration: Calibration) -> dict[str, Any]:
    return dict(model_metadata(calibration.model))


def find_winner(
    calibration: Calibration, choice: GateChoice, *, progress: bool = True
) -> tuple[Steering, Heard, dict[str, Any]]:
    """Gate and edit together: (steering, all clips heard with it, record)."""
    names = [
        name
        for name, edit in calibration.fit.edits.items()
        # the mean difference is the S-vector at another strength
        if edit.layer >= choice.gate.layer and not name.startswith(("audiosae", "meandiff"))
    ]
    candidates = screen_edits(calibration, choice, names, progress=progress)
    speech = evenly(calibration.speech, calibration.effort.heard)
    logits = smoothed(calibration.fit.table.logits[choice.name], choice.gate.smooth).min(axis=1)
    passing = [
        clip
        for clip in calibration.nonspeech
        if any(logits[row] <= choice.gate.threshold for row in clip.rows)
    ]
    ranked = []
    for candidate in candidates[: calibration.effort.finalists]:
        candidate, heard = fit_to_budget(
            calibration, candidate, choice.gate, [*passing, *speech], calibration.budget.wer_rise
        )
        after = [heard.transcripts[clip.set, clip.id] for clip in passing]
        score = (
            heard.rise > calibration.budget.wer_rise,
            sum(bool(normalise(t.text)) for t in after),
            sum(t.hr for t in after),
            sum(t.nsp for t in after),
        )
        ranked.append((score, candidate))
    ranked.sort(key=lambda item: item[0])
    record: dict[str, Any] = {
        "gate": choice.name,
        "gate_alone": asdict(choice.result),
        "gates": list(choice.table),
        "screened": [_candidate_record(candidate) for candidate in candidates],
    }
    for score, candidate in ranked:
        if score[0]:
            break
        for factor in (1.0, 0.5, 0.25):
            chosen = weakened(candidate, factor)
            steering = Steering((chosen.edit,), choice.gate, _bare(calibration))
            heard = calibration.hear(steering, _measured(calibration), "checking the winner")
            if heard.rise <= calibration.budget.wer_rise:
                record["edit"] = {**_candidate_record(chosen), **calibration.fit.recipes[chosen.name]}
                return steering, heard, record
    # no edit keeps the budget beside the gate: the gate alone does, by its choice
    steering = Steering((), choice.gate, _bare(calibration))
    record["edit"] = None
    return steering, calibration.hear(steering, _measured(calibration), "checking the gate alone"), record


def find_audiosae(
    calibration: Calibration, *, progress: bool = True
) -> tuple[Steering, Heard, dict[str, Any]] | None:
    """AudioSAE's recipe, ungated, at the strength that its own budget allows; None if the fit has no such
    edit.

    Its reconstruction costs recognition at any strength. Where that alone exceeds the budget, the budget
    counts from the WER with the reconstruction, and the record says so.
    """
    names = [name for name in calibration.fit.edits if name.startswith("audiosae")]
    candidates = screen_edits(calibration, None, names, progress=progress)
    if not candidates:
        return None
    affordable = [candidate for candidate in candidates if candidate.cost <= _dearest(candidates)]
    speech = evenly(calibration.speech, calibration.effort.heard)
    unsteered = Steering((replace(affordable[0].edit, strength=0.0),), None, _bare(calibration))
    base = calibration.hear(unsteered, speech, "reconstruction alone").rise
    allowed = calibration.budget.wer_rise + max(0.0, base)
    candidate, _ = fit_to_budget(calibration, affordable[0], None, speech, allowed)
    steering = Steering((candidate.edit,), None, _bare(calibration))
    heard = calibration.hear(steering, _measured(calibration), "measuring audiosae")
    record = {
        "edit": {**_candidate_record(candidate), **calibration.fit.recipes[candidate.name]},
        "screened": [_candidate_record(other) for other in candidates],
        "wer_rise_of_reconstruction": base,
        "within_budget": heard.rise <= calibration.budget.wer_rise,
    }
    return steering, heard, record


def _dearest(candidates: Sequence[Candidate]) -> float:
    """What a candidate may cost: the screening's limit, or where nothing keeps it, twice the cheapest."""
    return max(MAX_COST, 2 * min(candidate.cost for candidate in candidates))


def _candidate_record(candidate: Candidate) -> dict[str, Any]:
    edit = candidate.edit
    return {
        "name": candidate.name,
        "layer": edit.layer,
        "latents": len(edit.values) if isinstance(edit, LatentEdit) and not edit.reconstruct else None,
        "strength": edit.strength,
        "size": candidate.size,
        "speech_cost": candidate.cost,
        "effect": asdict(candidate.effect),
    }


def finish(
    calibration: Calibration, steering: Steering, heard: Heard, record: Mapping[str, Any], name: str
) -> Steering:
    """The steering with the metadata that its file shows."""
    return replace(
        steering,
        metadata={
            **_bare(calibration),
            "name": name,
            "calibrated_on": calibration.fit.record["calibrated_on"],
            "rates": {"wer_rise": heard.rise, "sets": calibration.rates(heard)},
            "recipe": {
                **record,
                "budget": asdict(calibration.budget),
                "fit_seed": calibration.fit.record["seed"],
            },
            "licence": "MIT",
        },
    )


def print_result(title: str, steering: Steering) -> None:
    """The table of one steering's rates."""
    rates = steering.metadata["rates"]
    print(f"\n{title}: WER {100 * rates['wer_rise']:+.2f} points on calibration speech")
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
        "--out", type=Path, default=Path("out/steering"), help="folder for the steering files"
    )
    parser.add_argument("--wer-rise", type=float, default=Budget.wer_rise, help="budget, 0.002 = 0.2 points")
    parser.add_argument("--share", type=float, default=Budget.share, help="speech clips that may lose words")
    parser.add_argument("--gate-kind", choices=GATE_KINDS, default="latents", help="which gates may win")
    for field, what in (
        ("screened", "windows on which every edit is screened"),
        ("finalists", "edits that are heard through whisper.transcribe"),
        ("heard", "speech clips on which a finalist's WER is measured"),
        ("measured", "clips on which the result is measured; 0: all"),
    ):
        default = getattr(Effort, field)
        parser.add_argument(f"--{field}", type=int, default=default, help=f"{what} (default: {default})")
    parser.add_argument("--only", choices=("steering", "audiosae"), help="write one of the two files only")
    parser.add_argument("--quick", action="store_true", help="the small calibration sets (as fitted)")
    args = parser.parse_args(argv)

    from calibration.corpus import eval_sets
    from whisper_steer.zoo import load_model

    budget = Budget(wer_rise=args.wer_rise, share=args.share)
    effort = Effort(args.screened, args.finalists, args.heard, args.measured)
    started = time.monotonic()
    model = load_model(args.model)
    sets = eval_sets("calibration", data_dir=args.data_dir, quick=args.quick)
    labels = label_clips(model, [clip for clips in sets.values() for clip in clips], cache=args.labels)
    calibration = Calibration(model, sets, read_fit(args.fit, model, sets, labels), budget, effort)
    written: list[tuple[Path, Steering]] = []
    if args.only != "audiosae":
        choice = find_gate(calibration, args.gate_kind)
        result = choice.result
        lost = ", ".join(f"{name} {share:.1%}" for name, share in result.lost.items())
        print(
            f"gate {choice.name}, smoothed over {choice.gate.smooth} frames: "
            f"text-FPR {result.plain_text_fpr:.3f} -> {result.text_fpr:.3f}, "
            f"WER {result.wer_plain:.4f} -> {result.wer:.4f}, lost {lost}"
        )
        winner = finish(calibration, *find_winner(calibration, choice), "default")
        written.append((args.out / "steering.safetensors", winner))
    if args.only != "steering":
        found = find_audiosae(calibration)
        if found is not None:
            recipe = finish(calibration, *found, "audiosae")
            written.append((args.out / "steering-audiosae.safetensors", recipe))
    for path, steering in written:
        steering.save(path)
        print_result(path.name, steering)
    print(f"{len(written)} steering files in {args.out}, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run(main)

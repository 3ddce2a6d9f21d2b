"""Chooses gate, threshold, edit, layer, k and strength on the calibration split, and writes the steering
files.

    python -m calibration.sweep --model mini.en --fit out/fit --labels out/labels.jsonl \\
        --data ../shared/data --out sae_weights/mini.en

alpha = 1 is the strongest setting whose WER on calibration speech rises by at most 0.1 percentage points, by
the upper end of a bootstrap interval. First the gate and its threshold, from cached logits and transcripts,
fitted again with the calibration clips; then every edit, and the best of several layers together, is screened
on a few windows (how strong may it be, what does it do, in gaps between speech too); the best few are heard
through the real `whisper.transcribe`. Written: steering.safetensors with its frontier and profiles, the same
without edits as steering-gate.safetensors, and AudioSAE's recipe by its own budget as
steering-audiosae.safetensors, each with what was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from calibration.command import run
from calibration.fit_again import fit_of, with_edits_of
from calibration.fit_files import read_fit
from calibration.hallucinations import label_clips, print_table
from calibration.hearing import Calibration, Effort
from calibration.selection import Budget
from calibration.training_clips import TrainingClip, training_clips
from calibration.winners import find_audiosae, find_gate, find_winner, finish, gate_alone
from whisper_steer.errors import UsageError
from whisper_steer.steering import Steering

GATE_KINDS = ("latents", "raw", "any")


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


def _drawing(drawn: object) -> str:
    """A name for how training clips were drawn: the same clip, drawn otherwise, may sound otherwise."""
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:12]


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
        "--again",
        type=Path,
        default=None,
        help="a steering file whose frame probes and edits are kept, in place of --fit (a folder that then "
        "only keeps what windows give)",
    )
    parser.add_argument(
        "--rivals",
        type=Path,
        default=None,
        help="with --again: a folder of calibration.fit whose edits compete with the file's",
    )
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
    parser.add_argument(
        "--share",
        type=float,
        default=Budget.share,
        help="of speech clips that may lose words, by the upper end of its interval",
    )
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

    from calibration.corpus import describe, eval_sets
    from whisper_steer.zoo import load_model

    if args.rivals is not None and args.again is None:
        raise UsageError("--rivals is for --again: a fit in place of it has edits of its own")
    budget = Budget(wer_rise=args.wer_rise, share=args.share)
    effort = Effort(**{field.name: getattr(args, field.name) for field in fields(Effort)})
    started = time.monotonic()
    model = load_model(args.model)
    sets = eval_sets("calibration", data_dir=args.data_dir, quick=args.quick)
    labels = label_clips(model, [clip for clips in sets.values() for clip in clips], cache=args.labels)
    fit = fit_of(args.again, model, sets, labels) if args.again else read_fit(args.fit, model, sets, labels)
    if args.rivals is not None:
        fit = with_edits_of(args.rivals, fit, model)
    fit.record.setdefault("calibrated_on", describe(sets))
    calibration = Calibration.of(model, sets, fit, budget, effort, cache=args.labels)
    written: list[tuple[Path, Steering]] = []
    if args.only != "audiosae":
        training = _training(calibration, args.corpus, args.data_dir)
        choice, logits = find_gate(
            calibration,
            args.gate_kind,
            training=training,
            refitted=args.refitted and not args.again,
            cache=args.fit / f"windows-{_drawing(fit.record.get('training'))}.npz",
        )
        choice = replace(choice, table=(*fit.record.get("earlier_gates", ()), *choice.table))
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
        if winner.edits:
            alone = finish(calibration, gate_alone(calibration, choice), "gate")
            written.append((args.out / "steering-gate.safetensors", alone))
    if args.only != "steering" and not args.again:
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

"""A sweep's report -> one table, the plots of sparsity against error, and the setting to use.

    python -m calibration.pareto out/sweep/report.json --out out/sweep

Written: table.csv, table.json, and the figures of `calibration.pareto_plots` (AudioSAE's figures 1, 8, 9 and
10). The operating point is chosen by the rule of `pick_operating_point` and printed with its reason.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibration.command import run
from calibration.export import write_json, write_whole
from whisper_steer.errors import FormatError, UsageError

WER_MARGIN = 0.01  # one percentage point
Row = Mapping[str, Any]


@dataclass(frozen=True)
class OperatingPoint:
    """The setting chosen for all layers.

    Attributes:
        cost: mean over layers of L0 x n_latents, to which the work of decoding and of reading codes grows.
        reason: one sentence: the rule, and the figures by which it decided.
    """

    activation: str
    expansion: float
    k: int | None
    cost: float
    fvu: float
    wer_rise: float | None
    reason: str


def read_report(path: Path) -> dict[str, Any]:
    """A report of `calibration.export`. Raises FormatError: missing, not JSON, or without SAEs."""
    expected = "expected the report.json that calibration.train writes"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"cannot read {path} ({error.strerror or error}): {expected}") from error
    except ValueError as error:
        raise FormatError(f"{path} is not JSON ({error}): {expected}") from error
    if not isinstance(report, dict) or not isinstance(report.get("saes"), list) or not report["saes"]:
        raise FormatError(f"{path} lists no SAEs: {expected}")
    return report


def table_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One flat row per SAE, all with the same columns; None where something was not measured.

    Domains' measures are columns such as speech_l0, music_fvu; recognition: wer_plain, wer_spliced, wer_rise,
    ce_plain, ce_spliced, ce_delta (nats per token), by condition clean_wer_rise, clean_ce_delta, ...;
    text_fpr_plain, text_fpr_spliced.
    """
    rows = [_row(record) for record in report["saes"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    try:
        row = {
            name: record[name]
            for name in (
                "name", "layer", "activation", "expansion", "n_latents", "k",
                "l0", "l2", "fvu", "alive", "dead", "duplicates", "theta",
            )
        }  # fmt: skip
        row["seed"] = record["recipe"].get("seed")
        for domain, cells in record["domains"].items():
            row |= {f"{domain}_{name}": cells[name] for name in ("frames", "l0", "l2", "fvu", "alive")}
        for condition, cells in record.get("recognition", {}).get("speech", {}).items():
            if condition == "all":
                row |= {name: cells[name]["value"] for name in ("wer_plain", "wer_spliced")}
                row |= {name: cells[name] for name in ("wer_rise", "ce_plain", "ce_spliced", "ce_delta")}
            else:
                row |= {f"{condition}_{name}": cells[name] for name in ("wer_rise", "ce_delta")}
        if "nonspeech" in record.get("recognition", {}):
            cells = record["recognition"]["nonspeech"]
            row |= {name: cells[name]["value"] for name in ("text_fpr_plain", "text_fpr_spliced")}
        row["file"] = record["file"]
    except KeyError as error:
        raise FormatError(f"the report lacks {error}: write it again with calibration.train") from error
    return row


def pick_operating_point(rows: Sequence[Row], *, wer_margin: float = WER_MARGIN) -> OperatingPoint:
    """One (activation, expansion, k) for all layers.

    Every figure is a mean over layers and seeds; settings that lack a layer which others have do not take
    part. The rule: of the settings with which the WER, with the reconstruction spliced in, rises by at most
    `wer_margin` (fraction of reference words) over the plain model's, the one with the smallest L0 x
    n_latents. Where the WER was not measured, or no setting stays within the margin: the knee of the front of
    FVU against log(L0 x n_latents), the point farthest below the line between the front's ends, both axes
    scaled to 0..1.

    Raises UsageError: no rows, or a margin that is not a number.
    """
    if math.isnan(wer_margin):
        raise UsageError(f"wer_margin is {wer_margin}: expected a fraction such as {WER_MARGIN}")
    settings = _settings(rows)
    heard = [one for one in settings if one.wer_rise is not None]
    within = [one for one in heard if one.wer_rise is not None and one.wer_rise <= wer_margin]
    if within:
        best = min(within, key=lambda one: one.cost)
        rule = (
            f"smallest L0 x latents ({best.cost:.3g}) of the {len(within)} of {len(heard)} settings whose "
            f"spliced WER stays within {100 * wer_margin:g} points of plain "
            f"({_points(best.wer_rise)} on average over layers)"
        )
    else:
        best, front = _knee(settings)
        why = (
            f"no setting's spliced WER stays within {100 * wer_margin:g} points of plain"
            if heard
            else "WER was not measured"
        )
        rule = (
            f"{why}, so the knee of FVU ({best.fvu:.3f}) against L0 x latents ({best.cost:.3g}) "
            f"among {front} settings on the front"
        )
    return OperatingPoint(**{**asdict(best), "reason": f"{setting_name(best)}: {rule}"})


def setting_name(one: OperatingPoint) -> str:
    """Such as "batchtopk 8x, k 50"."""
    size = f"{one.activation} {one.expansion:g}x"
    return size if one.k is None else f"{size}, k {one.k}"


def _points(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:+.2f}"


def _settings(rows: Sequence[Row]) -> list[OperatingPoint]:
    """Means of every setting that has all layers, cheapest first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["fvu"] is not None and row["l0"] is not None:
            groups.setdefault((row["activation"], row["expansion"], row["k"]), []).append(row)
    if not groups:
        raise UsageError("no SAE was measured: give a report of a finished sweep")
    layers = {row["layer"] for chosen in groups.values() for row in chosen}
    whole = {key: chosen for key, chosen in groups.items() if {row["layer"] for row in chosen} == layers}
    means = []
    for (activation, expansion, k), chosen in (whole or groups).items():
        rises = [row.get("wer_rise") for row in chosen]
        measured = [rise for rise in rises if rise is not None]
        means.append(
            OperatingPoint(
                activation,
                expansion,
                k,
                cost=_mean([row["l0"] * row["n_latents"] for row in chosen]),
                fvu=_mean([row["fvu"] for row in chosen]),
                wer_rise=_mean(measured) if len(measured) == len(rises) else None,
                reason="",
            )
        )
    return sorted(means, key=lambda one: one.cost)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _knee(settings: Sequence[OperatingPoint]) -> tuple[OperatingPoint, int]:
    """(knee, size of the front); of fewer than three points the cheapest. settings: cheapest first."""
    front: list[OperatingPoint] = []
    for one in settings:
        if not front or one.fvu < front[-1].fvu:
            front.append(one)
    low, high = math.log(max(front[0].cost, 1e-9)), math.log(max(front[-1].cost, 1e-9))
    drop = front[0].fvu - front[-1].fvu

    def below_chord(one: OperatingPoint) -> float:
        if high == low or drop == 0:
            return 0.0
        across = (math.log(max(one.cost, 1e-9)) - low) / (high - low)
        up = (one.fvu - front[-1].fvu) / drop
        return 1 - across - up

    return max(front, key=below_chord), len(front)


def write_table(rows: Sequence[Row], out: Path, *, extra: Mapping[str, Any]) -> None:
    """table.csv (empty cells where not measured) and table.json ({**extra, "rows": rows})."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(out / "table.csv", text.getvalue().encode())
    write_json(out / "table.json", {**extra, "rows": list(rows)})


def write_sweep(report: Mapping[str, Any], out: Path, *, wer_margin: float = WER_MARGIN) -> OperatingPoint:
    """Table, figures and operating point of a finished sweep; returns the operating point."""
    from calibration.pareto_plots import draw_all

    rows = table_rows(report)
    point = pick_operating_point(rows, wer_margin=wer_margin)
    facts = {name: report.get(name) for name in ("base_model", "encoder_sha256", "d_model", "held_out")}
    write_table(rows, out, extra={**facts, "operating_point": asdict(point)})
    draw_all(report, rows, out)
    return point


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m calibration.pareto", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("report", type=Path, help="report.json of calibration.train")
    parser.add_argument("--out", type=Path, help="folder for table and figures (default: the report's)")
    parser.add_argument(
        "--wer-margin",
        type=float,
        default=WER_MARGIN,
        help=f"rise of the spliced WER that is accepted, as a fraction (default: {WER_MARGIN})",
    )
    args = parser.parse_args(argv)
    out = args.out or args.report.parent
    point = write_sweep(read_report(args.report), out, wer_margin=args.wer_margin)
    print(f"operating point {point.reason}")
    print(f"table.csv, table.json and figures in {out}")


if __name__ == "__main__":
    run(main)

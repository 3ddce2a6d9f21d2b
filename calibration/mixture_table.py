"""What a mixture consists of, for people and for reports."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.mixture import Mixture


def record_of(mixture: Mixture) -> dict[str, Any]:
    """JSON-able: data sets with their chances (0..1), held-out items by domain, notes.

    Hours are of the items whose duration is known without decoding them, None where that is none.
    """
    from calibration.mixture import DOMAINS

    held_out = mixture.held_out()
    held = Counter(item.dataset for items in held_out.values() for item in items)
    chances = mixture.chances()
    rows: list[dict[str, Any]] = []
    for dataset in mixture.datasets:
        seconds = [item.duration for item in dataset.items if item.duration is not None]
        rows.append(
            {
                "name": dataset.name,
                "weight": float(dataset.weight),
                "pieces": float(dataset.pieces),
                "items": len(dataset.items),
                "hours": round(math.fsum(seconds) / 3600, 2) if seconds else None,
                "chance": chances[dataset.name],
                "domains": dict(Counter(item.domain for item in dataset.items)),
                "held_out": held.get(dataset.name, 0),
            }
        )
    return {
        "name": mixture.name,
        "datasets": rows,
        "domain_chances": {
            domain: math.fsum(row["chance"] * row["domains"].get(domain, 0) / row["items"] for row in rows)
            for domain in DOMAINS
        },
        "augmentation": mixture.settings()["augmentation"],
        "held_out": {domain: len(items) for domain, items in held_out.items()},
        "test_sets": {dataset.name: len(dataset.items) for dataset in mixture.test_sets},
        "notes": list(mixture.notes),
    }


def table_of(record: Mapping[str, Any]) -> list[str]:
    """One line a data set, then the shares of the domains, what is held out, augmentation and notes."""
    width = max(len("data set"), *(len(row["name"]) for row in record["datasets"]))
    lines = [
        f"{'data set':<{width}} {'weight':>6} {'items':>8} {'hours':>8} {'chance':>7} {'held out':>8}  "
        "domains"
    ]
    for row in record["datasets"]:
        hours = "?" if row["hours"] is None else f"{row['hours']:.1f}"
        lines.append(
            f"{row['name']:<{width}} {row['weight']:>6g} {row['items']:>8} {hours:>8} {row['chance']:>7.1%} "
            f"{row['held_out']:>8}  {', '.join(row['domains'])}"
        )
    shares = ", ".join(f"{domain} {share:.1%}" for domain, share in record["domain_chances"].items())
    held_out = ", ".join(f"{count} {domain}" for domain, count in record["held_out"].items()) or "none"
    added = record["augmentation"]
    lines += [
        f"drawn: {shares}",
        f"held out: {held_out}",
        "augmentation: off"
        if added is None
        else f"augmentation: noise {added['noise_probability']:.1%}, music {added['music_probability']:.1%}, "
        f"SNR {added['snr_db'][0]:g} to {added['snr_db'][1]:g} dB",
    ]
    return lines + [f"note: {note}" for note in record["notes"]]

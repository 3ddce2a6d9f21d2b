"""What a report of a trade-off run is made of, read from its folder (see hearing_cache.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.failures import Failure, worst_failures
from benchmarks.frontiers import (
    OURS,
    PLAIN,
    Setting,
    paired_rise,
    rate_of,
    reference_setting,
    settings_of,
)
from benchmarks.hearing_cache import LONG_ROWS, PAIRED, ROWS, ClipRecord, HearingCache, read_clips, read_run
from calibration.evaluate import Rate
from whisper_steer.errors import FormatError

Texts = Mapping[tuple[str, float], Mapping[str, str]]  # (method, strength) -> clip id -> what was heard


@dataclass(frozen=True)
class ReportData:
    """A run, ready to be shown.

    run: run.json. rows: of the benchmark. settings: pooled, with paired changes of WER where the texts are
    kept. halves: the same for "synthetic clips" and "real recordings" where the run has both. paired:
    differences from ours. clips: with the scores of plain Whisper and the gate. gate_threshold: probability
    above which the measured gate withholds a window at alpha 1, None where there is none. long: rows of
    benchmarks.long_recordings, if it was run into the same folder.
    """

    run: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    settings: Sequence[Setting]
    halves: Mapping[str, Sequence[Setting]] = field(default_factory=dict)
    paired: Sequence[Mapping[str, Any]] = ()
    clips: Sequence[ClipRecord] = ()
    failures: Sequence[Failure] = ()
    gate_threshold: float | None = None
    long: Sequence[Mapping[str, Any]] = ()

    @property
    def plain(self) -> Setting | None:
        return next((one for one in self.settings if one.method == PLAIN), None)

    @property
    def ours(self) -> Setting | None:
        return reference_setting(self.settings)


def read_report_data(out: Path) -> ReportData:
    """The run in the folder `out`. Raises UsageError (not a run's folder), FormatError (a file is
    damaged)."""
    run = read_run(out)
    rows = _json(out / ROWS)
    clips = read_clips(out)
    texts = read_texts(out, run, clips)
    minutes = sum(clip.seconds for clip in clips) / 60
    settings = settings_of(rows, rises=rises_of(clips, texts), minutes=minutes or None)
    halves = {}
    for half, name, real in (("_synthetic", "synthetic clips", False), ("_real", "real recordings", True)):
        chosen = [clip for clip in clips if (clip.path is not None) == real]
        length = sum(clip.seconds for clip in chosen) / 60
        part = settings_of(rows, half=half, rises=rises_of(chosen, texts), minutes=length or None)
        if part:
            halves[name] = part
    own = reference_setting(settings)
    failures: list[Failure] = []
    if own is not None and (PLAIN, 0.0) in texts:
        failures = worst_failures(clips, texts[PLAIN, 0.0], texts.get((OURS, own.strength), {}))
    paired = _json(out / PAIRED) if (out / PAIRED).is_file() else []
    return ReportData(
        run, rows, settings, halves if len(halves) == 2 else {}, paired, clips, failures,
        run.get("gate_threshold"), _json(out / LONG_ROWS) if (out / LONG_ROWS).is_file() else [],
    )  # fmt: skip


def _json(path: Path) -> list[dict[str, Any]]:
    """A flat list of objects. Raises FormatError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        way_out = "run python -m benchmarks.tradeoff again"
        raise FormatError(f"cannot read {path} ({reason}): {way_out}") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise FormatError(f"{path} is not a list of rows: run python -m benchmarks.tradeoff again")
    return found


def read_texts(out: Path, run: Mapping[str, Any], clips: Sequence[ClipRecord]) -> Texts:
    """What every setting made of the run's clips, where it is kept for all of them."""
    cache = HearingCache(out)
    methods = run.get("methods", {})
    found: dict[tuple[str, float], dict[str, str]] = {}
    for method, strength in cache.settings():
        known = methods.get(method)
        if known is None or "fingerprint" not in known:
            continue
        heard = cache.read(method, strength, known["fingerprint"])
        texts = {
            clip.id: heard[clip.id, clip.crc].heard.text for clip in clips if (clip.id, clip.crc) in heard
        }
        if len(texts) == len(clips):
            found[method, strength] = texts
    return found


def rises_of(clips: Sequence[ClipRecord], texts: Texts) -> dict[tuple[str, float], Rate]:
    """The paired change of WER against plain Whisper of every setting whose texts are there."""
    speech = [clip for clip in clips if clip.is_speech and clip.text]
    plain = texts.get((PLAIN, 0.0))
    if plain is None or not speech:
        return {}
    references = [clip.text or "" for clip in speech]
    before = [plain[clip.id] for clip in speech]
    groups = [clip.drawn_with for clip in speech]
    return {
        setting: paired_rise(references, before, [heard[clip.id] for clip in speech], groups)
        for setting, heard in texts.items()
    }


def set_rows(
    rows: Sequence[Mapping[str, Any]], rate: str
) -> dict[str, dict[tuple[str, float], Mapping[str, Any]]]:
    """set -> (method, strength) -> row, of the single sets (no pools) in which `rate` was measured."""
    found: dict[str, dict[tuple[str, float], Mapping[str, Any]]] = {}
    for row in rows:
        if row["set"] != "all" and not row["set"].startswith("all_") and row.get(rate) is not None:
            found.setdefault(row["set"], {})[row["method"], float(row["alpha"])] = row
    for sets in found.values():  # plain Whisper's rows may stand only as strength 0 of other methods
        zero = next((row for (_, strength), row in sets.items() if strength == 0), None)
        if zero is not None:
            sets.setdefault((PLAIN, 0.0), zero)
    return found


def category_rates(
    rows: Sequence[Mapping[str, Any]], rate: str, shown: Mapping[str, Setting]
) -> dict[str, dict[str, Rate]]:
    """set -> label -> the rate of the setting under that label."""
    panels: dict[str, dict[str, Rate]] = {}
    for name, sets in set_rows(rows, rate).items():
        for label, one in shown.items():
            found = rate_of(sets.get((one.method, one.strength), {}), rate)
            if found is not None:
                panels.setdefault(name, {})[label] = found
    return panels

"""Manifests: audio listed in a CSV, TSV or JSONL file, or as the cuts of a Lhotse file.

Ids and groups come from the manifest, so they do not change when the data moves to another folder. No audio
is decoded before an item is loaded.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from calibration.mixture import DOMAINS, AudioItem
from whisper_steer.audio import SAMPLING_RATE
from whisper_steer.errors import AudioError, FormatError

# column of a manifest -> what else it may be called
COLUMNS = {
    "path": ("path", "file"),
    "duration": ("duration", "duration_s"),
    "start": ("start", "start_s"),
    "domain": ("domain",),
    "text": ("text", "transcript"),
    "group": ("group", "speaker"),
    "split": ("split",),
    "id": ("id",),
}


def known_domain(name: str) -> str:
    """One of DOMAINS: whatever is neither speech nor music is "sounds"."""
    name = name.strip().lower()
    return name if name in DOMAINS else "sounds"


def from_manifest(
    name: str,
    path: Path,
    *,
    domain: str | None = None,
    audio_root: Path | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[AudioItem]:
    """Rows of a CSV, TSV or JSONL file (also .gz): see COLUMNS for the columns that are understood, others
    become labels.

    Args:
        domain: of rows without one.
        audio_root: what relative paths are relative to; default: the manifest's folder.
        split: only rows of which the column "split" says this.
        columns: names of COLUMNS -> the file's own names for them.

    Raises FormatError: no such file, a column that is missing, a row without path or domain, a number that is
        none, rows that are no JSON objects, or no row at all; the message names the line.
    """
    root = audio_root or path.parent
    items: list[AudioItem] = []
    used: dict[str, str] | None = None
    ids: set[str] = set()
    for number, row in _rows(path):
        if used is None or path.name.removesuffix(".gz").endswith(".jsonl"):
            used = _used_columns(f"{path}, line {number}", row, columns or {}, domain, split)
        if split is not None and str(row.get(used["split"], "")) != split:
            continue
        item = _item_of_row(f"{path}, line {number}", name, row, used, domain, root)
        if item.id in ids:
            raise FormatError(f"{path}, line {number}: the id {item.id} is there twice (an id column helps)")
        ids.add(item.id)
        items.append(item)
    if not items:
        raise FormatError(f"{path}: no rows" + (f" of the split {split}" if split is not None else ""))
    return items


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row); empty values are left out."""
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl"):
        raise FormatError(f"{path}: a manifest is .csv, .tsv or .jsonl (or one of these with .gz)")
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    try:
        with _open_text(path) as lines:
            if suffix == ".jsonl":
                for number, line in enumerate(lines, start=1):
                    if not line.strip():
                        continue
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise FormatError(f"{path}, line {number}: expected a JSON object")
                    yield number, {key: value for key, value in row.items() if value not in (None, "")}
                return
            reader = csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",")
            for cells in reader:
                if None in cells or None in cells.values():
                    raise FormatError(
                        f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} cells"
                    )
                # every column stays, so that a missing one is told from an empty one
                yield reader.line_num, dict(cells)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error, EOFError, gzip.BadGzipFile) as error:
        raise FormatError(f"{path}: cannot be read as {suffix[1:]} ({error})") from error


def _used_columns(
    where: str, row: Mapping[str, Any], columns: Mapping[str, str], domain: str | None, split: str | None
) -> dict[str, str]:
    """Name of COLUMNS -> the column of this file that holds it."""
    used, problems = {}, []
    for key, usual in COLUMNS.items():
        if key in columns:
            if columns[key] in row:
                used[key] = columns[key]
            elif key in ("path", "split"):
                problems.append(f"no column {columns[key]!r}")
        elif found := next((column for column in usual if column in row), None):
            used[key] = found
    if "path" not in used and "path" not in columns:
        problems.append("no column path (or file)")
    if domain is None and "domain" not in used:
        problems.append("no column domain, and the data set has no domain")
    if split is not None and "split" not in used and "split" not in columns:
        problems.append(f"no column split to choose {split!r} by")
    if problems:
        raise FormatError(f"{where}: {'; '.join(problems)}; the columns are {', '.join(row)}")
    return used


def _item_of_row(
    where: str, name: str, row: Mapping[str, Any], used: Mapping[str, str], domain: str | None, root: Path
) -> AudioItem:
    def value(key: str) -> str:
        return str(row.get(used[key], "")).strip() if key in used else ""

    def number(key: str) -> float | None:
        text = value(key)
        try:
            seconds = float(text) if text else None
        except ValueError:
            seconds = -1.0
        if seconds is not None and not 0 <= seconds < float("inf"):
            raise FormatError(f"{where}: {used[key]} is {text!r}, expected seconds")
        return seconds

    path, kind = value("path"), value("domain") or domain
    if not path or not kind:
        raise FormatError(f"{where}: {'no path' if not path else 'no domain, and the data set has none'}")
    start, duration = number("start"), number("duration")
    labels = {k: str(v) for k, v in row.items() if k not in used.values() and v not in (None, "")}
    file = root / path
    segment = None if start is None else partial(load_segment, str(file), start, duration)
    identity = value("id") or (path if start is None else f"{path}@{start:g}")
    group = value("group") or path
    return AudioItem(
        identity, name, known_domain(kind), group, value("text") or None, duration, labels, str(file), segment
    )


def from_lhotse(
    name: str, path: Path, *, domain: str = "speech", audio_root: Path | None = None
) -> list[AudioItem]:
    """Cuts of a Lhotse manifest (`*.jsonl`, `*.jsonl.gz`), such as Libriheavy's: parts of long recordings.

    Relative recording paths are relative to `audio_root` (default: the manifest's folder). Speaker and text
    are those of a cut's first supervision; of several texts the first.

    Raises FormatError: no such file, or a line that is no cut with one recording file.
    """
    root = audio_root or path.parent
    items = []
    shared: dict[str, str] = {}  # millions of cuts name the same files and speakers
    labels: dict[str, str] = {}
    for number, cut in _rows(path):
        try:
            sources = cut["recording"]["sources"]
            supervision = (cut.get("supervisions") or [{}])[0]
            texts = supervision.get("custom", {}).get("texts") or [supervision.get("text")]
            file = str(root / sources[0]["source"])
            start, duration = float(cut["start"]), float(cut["duration"])
            group = str(supervision.get("speaker") or cut["recording"]["id"])
            identity = str(cut["id"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path}, line {number}: not a cut of one recorded file ({error!r})") from error
        file, group = shared.setdefault(file, file), shared.setdefault(group, group)
        load = partial(load_segment, file, start, duration)
        items.append(AudioItem(identity, name, domain, group, texts[0] or None, duration, labels, file, load))
    if not items:
        raise FormatError(f"{path}: no cuts")
    return items


def load_segment(path: str, start: float, duration: float | None = None) -> np.ndarray:
    """float32 (n,), 16 kHz, mono: the part of a file from `start` (seconds) on; the rest is not decoded.

    Raises AudioError: not readable, or it ends before `start`.
    """
    import av

    if not os.path.isfile(path):
        raise AudioError(f"{path}: no such file")
    parts: list[np.ndarray] = []
    first, length = None, 0
    end = float("inf") if duration is None else start + duration
    try:
        with av.open(path, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise AudioError(f"{path}: no audio in it")
            stream = container.streams.audio[0]
            if start > 0.1:  # some raw formats cannot seek at all
                container.seek(int((start - 0.1) * 1_000_000))
            resampler = av.AudioResampler(format="fltp", rate=SAMPLING_RATE)
            for frame in container.decode(stream):
                if frame.time is None:
                    raise AudioError(f"{path}: has no time stamps to find {start:g} s by")
                time = frame.time
                first = time if first is None else first
                if time >= end + 0.1:
                    break
                for resampled in resampler.resample(frame):
                    parts.append(resampled.to_ndarray().mean(axis=0, dtype=np.float32))
                    length += len(parts[-1])
            parts += [rest.to_ndarray().mean(axis=0, dtype=np.float32) for rest in resampler.resample(None)]
    except (av.error.FFmpegError, ValueError) as error:
        raise AudioError(f"{path}: cannot be read from {start:g} s on ({error})") from error
    skip = round((start - (first or 0.0)) * SAMPLING_RATE)
    samples = np.concatenate(parts)[max(skip, 0) :] if parts else np.zeros(0, np.float32)
    samples = samples if duration is None else samples[: round(duration * SAMPLING_RATE)]
    if not len(samples):
        raise AudioError(f"{path}: ends before {start:g} s")
    if not np.isfinite(samples).all():
        raise AudioError(f"{path}: NaN or infinite samples behind {start:g} s")
    return samples


def declared_seconds(path: str) -> float | None:
    """Length of a file by its header, without decoding it; None where that does not say."""
    import av

    try:
        with av.open(path, metadata_errors="ignore") as container:
            if container.duration:
                return container.duration / 1_000_000
            streams = container.streams.audio
            if streams and streams[0].duration and streams[0].time_base:
                return float(streams[0].duration * streams[0].time_base)
    except (av.error.FFmpegError, ValueError):
        pass  # decoding it will say what is wrong
    return None

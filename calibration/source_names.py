"""Which recording or person a file of non-speech comes from, as far as its name or a manifest.csv says.

Clips cut from one recording are alike: they belong on one side of every split, and into one draw of a
bootstrap.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger("whisper_steer")

# names of files of known data sets; "group" is the Freesound recording that a clip was cut from
ESC50 = r"[1-5]-(?P<group>\d+)-[A-Z]-\d+"  # fold-clipID-take-target
URBANSOUND8K = r"(?P<group>\d+)-(?P<label>\d)-\d+-\d+"  # fsID-class-occurrence-slice

MANIFEST = "manifest.csv"
FILE_COLUMNS = ("file", "path", "audio", "filename", "file_name", "audio_filepath", "wav")
# in order of preference; of each row the first that is not empty counts
SOURCE_COLUMNS = ("group", "speaker", "speaker_id", "client_id", "source_path", "source")


def source_by_name(path: Path) -> str:
    """The recording that a clip named as in ESC-50 or UrbanSound8K was cut from; "" for other names. Both
    number recordings of Freesound, so the same number is the same recording."""
    for pattern in (ESC50, URBANSOUND8K):
        if match := re.fullmatch(pattern, path.stem):
            return f"Freesound {match.group('group')}"
    return ""


def sources_by_manifest(folders: Iterable[Path]) -> dict[Path, str]:
    """Resolved path -> source, of the files that a manifest.csv in one of the folders says one of: a table
    with one of FILE_COLUMNS, relative to it, and some of SOURCE_COLUMNS. One that cannot be read is logged.
    """
    found: dict[Path, str] = {}
    for folder in dict.fromkeys(folders):
        path = folder / MANIFEST
        if not path.is_file():
            continue
        try:
            with path.open(encoding="utf-8-sig", newline="") as lines:
                rows = list(csv.DictReader(lines))
        except (OSError, ValueError, csv.Error) as error:
            logger.warning("%s cannot be read, every file counts as a recording of its own: %s", path, error)
            continue
        for row in rows:
            file = _first(row, FILE_COLUMNS)
            source = _first(row, SOURCE_COLUMNS)
            if file and source:
                found[(folder / file).resolve()] = source
    return found


def _first(row: dict[str, str], columns: Iterable[str]) -> str:
    return next((value.strip() for name in columns if (value := row.get(name)) and value.strip()), "")

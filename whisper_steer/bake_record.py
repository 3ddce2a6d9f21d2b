"""The record beside what was baked (JSON): what was added, and the bytes that restore the original.

A record without files is of something that was baked before the model was converted.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import FormatError, UsageError
from .fileformat import write_atomically
from .splices import Splice

RECORD_FILE = "whisper_steer_baked.json"  # in a folder
RECORD_SUFFIX = ".baked.json"  # beside a file
RECORD_VERSION = 1


def record_path(path: Path) -> Path:
    """Where the record of a baked file or folder lies."""
    return path / RECORD_FILE if path.is_dir() else path.with_name(path.name + RECORD_SUFFIX)


def write_record(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """All that was baked, first to last. Raises FormatError if it cannot be written."""
    from .fileformat import package_version

    whole = {
        "kind": "baked",
        "record_version": RECORD_VERSION,
        "package_version": package_version(),
        "baked": list(records),
    }
    write_atomically(path, [json.dumps(whole, indent=1).encode() + b"\n"])


def read_records(source: Path) -> list[dict[str, Any]]:
    """What was baked into a file or folder, first to last; empty if nothing was."""
    path = record_path(source)
    if not path.is_file():
        return []
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if whole["record_version"] > RECORD_VERSION:
            raise FormatError(f"{path} was written by a newer whisper-steer: upgrade whisper-steer")
        records = list(whole["baked"])
        for record in records:
            for change in record["files"].values():
                unpacked(change["restore"])
                str(change["sha256_before"] + change["sha256_after"])
            float(record["alpha"]), str(record["steering"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is not a readable record of baking ({error})") from error
    return records


def renamed(records: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Records of a single file under its new name."""
    return [
        {**record, "files": dict(zip([name], record["files"].values(), strict=False))} for record in records
    ]


def carried(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of what was baked before the weights were written anew, in another format: it is still in
    them, but the bytes that restore the original do not fit any more."""
    return [{**record, "files": {}} for record in records]


def refuse_stray(target: Path) -> None:
    """Raises UsageError if the record of an earlier file of this name is there: a file without anything baked
    would look baked."""
    record = target.with_name(target.name + RECORD_SUFFIX)
    if record.is_file():
        raise UsageError(
            f"{record} is the record of another {target.name}: remove it, or choose another --out"
        )


def described(records: Sequence[Mapping[str, Any]]) -> str:
    """The last one in a few words."""
    return f"alpha {records[-1]['alpha']:g} of {records[-1]['steering']}"


def packed(splice: Splice) -> dict[str, Any]:
    """A splice as JSON holds it."""
    old, new = (base64.b64encode(data).decode() for data in (splice.old, splice.new))
    return {"offset": splice.offset, "old": old, "new": new}


def unpacked(items: Sequence[Mapping[str, Any]]) -> list[Splice]:
    """The splices that `packed` made. Raises KeyError, TypeError, ValueError for anything else."""
    return [
        Splice(int(item["offset"]), base64.b64decode(item["old"]), base64.b64decode(item["new"]))
        for item in items
    ]

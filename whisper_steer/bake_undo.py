"""Taking out of a model what was baked into it: the original bytes again, by the record."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .bake_record import (
    RECORD_FILE,
    described,
    read_records,
    record_path,
    refuse_stray,
    renamed,
    unpacked,
    write_record,
)
from .convert import refuse_existing, refuse_inside, workplace, write_new
from .errors import FormatError, UsageError
from .splices import BLOCK_BYTES, patch_file

logger = logging.getLogger("whisper_steer")


def unbake(path: str | Path, out: str | Path | None = None) -> Path:
    """Restore the original bytes of what `bake` wrote; returns where.

    out None: in place, and the record goes; else a new file or folder. If it is stopped in place, the same
    call goes on with what is left to do. What was baked before a conversion stays, and its record.

    Raises UsageError (no such file, there is no record, or `out` cannot be), FormatError (the files are not
    those that were baked).
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise UsageError(f"{source}: no such file or folder")
    records = read_records(source)
    if not records:
        raise UsageError(
            f"{source} has no record of baking ({record_path(source).name}): it cannot be restored"
        )
    kept = [record for record in records if not record["files"]]
    if len(kept) == len(records):
        raise UsageError(
            f"{source} was baked ({described(kept)}) before it was converted: unbake the model that it was "
            "converted from, and convert that"
        )
    target = source if out is None else Path(out).expanduser()
    if out is not None:
        refuse_existing(target)
        refuse_inside(target, source)
        refuse_stray(target)
    work_name = f".{Path(os.path.abspath(target)).name}.unbake"  # the same again: see below
    with workplace(target, work_name) as work:
        try:
            shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
            work.mkdir()
            restored = _restore(source, records, work)
            _put_back(source, target, work, restored, kept)
        except OSError as error:
            raise FormatError(f"cannot write {target}: {error.strerror or error}") from error
    if kept:
        logger.warning("%s still holds what was baked before it was converted: %s", target, described(kept))
    return target


def _restore(source: Path, records: Sequence[Mapping[str, Any]], work: Path) -> list[str]:
    """Write the original files into `work`; returns their names, without those that are originals already."""
    changes: dict[str, list[Mapping[str, Any]]] = {}
    for record in reversed(records):
        for name, change in record["files"].items():
            changes.setdefault(name, []).append(change)
    restored = []
    for name, steps in changes.items():
        current, place = inside(source, name), work / name
        try:
            for change in steps:
                applied = patch_file(current, place, unpacked(change["restore"]))
                if applied.sha256_before != change["sha256_after"]:
                    raise FormatError(f"{current} was changed after it was baked: it cannot be restored")
                if applied.sha256_after != change["sha256_before"]:
                    raise FormatError(f"{record_path(source)} is damaged: the original would not come back")
                current = place
        except FormatError:
            if _sha256(inside(source, name)) != steps[-1]["sha256_before"]:
                raise
            place.unlink(missing_ok=True)  # put back by a run that was stopped
            continue
        restored.append(name)
    return restored


def _put_back(
    source: Path, target: Path, work: Path, names: Sequence[str], kept: Sequence[dict[str, Any]]
) -> None:
    """Move the restored files from `work` to where they belong; records that stay go with them."""
    if target == source:
        for name in names:
            os.replace(work / name, inside(source, name))
        if kept:
            write_record(record_path(source), kept)
        else:
            record_path(source).unlink()
        return

    def write_folder(folder: Path) -> None:
        copy_folder(source, folder, {name: work / name for name in names})
        if kept:
            write_record(folder / RECORD_FILE, kept)

    def write_file(file: Path) -> None:
        os.replace(work / names[0], file) if names else shutil.copy2(source, file)
        if kept:
            write_record(record_path(target), renamed(kept, target.name))

    write_new(target, write_folder if source.is_dir() else write_file)


def copy_folder(source: Path, folder: Path, replaced: Mapping[str, Path], skip: Sequence[str] = ()) -> None:
    """Hard links (copies where that is not possible) of all files; `replaced` are moved in; no record."""
    folder.mkdir(exist_ok=True)
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if not file.is_file() or str(name) in (*skip, RECORD_FILE):
            continue
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if str(name) in replaced:
            os.replace(replaced[str(name)], place)
            continue
        try:
            os.link(file.resolve(), place)
        except OSError:
            shutil.copy2(file, place)


def inside(source: Path, name: str) -> Path:
    """A file of a folder; the file itself otherwise."""
    if Path(name).name != name:
        raise FormatError(f"{name!r} in the record of {source} is not a plain file name")
    return source / name if source.is_dir() else source


def _sha256(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()

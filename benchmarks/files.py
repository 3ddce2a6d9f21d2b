"""Result files: written as a whole or not at all; and pages that a table is put into."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from whisper_steer.errors import UsageError


def write_whole(path: Path, data: str | bytes) -> Path:
    """Puts `data` (text as UTF-8) at `path`, making its folder. Raises UsageError if that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot write {path}: {reason}; choose another --out or --json") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
    return path


def marked_page(path: Path, replaced: Callable[[str, str], str], mark: str) -> str:
    """A page that a table is put into between its marks. Raises UsageError: it cannot be read, or lacks them.

    replaced: (page, table) -> the page with the table in it; ValueError without the marks.
    """
    try:
        text = path.read_text(encoding="utf-8")
        replaced(text, "")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--markdown {path}: {reason}; give a page with the mark {mark}") from error
    return text

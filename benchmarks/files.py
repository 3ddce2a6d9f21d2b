"""Result files: written as a whole or not at all."""

from __future__ import annotations

import os
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

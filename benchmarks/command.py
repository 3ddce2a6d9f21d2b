"""How the commands of this folder end: an error of ours is one line on stderr, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from whisper_steer.errors import WhisperSteerError


def exit_code(work: Callable[[], int | None]) -> int:
    """Do the work; returns its exit code (None: 0), that of the error it raises, or 130 if interrupted."""
    try:
        return work() or 0
    except WhisperSteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130

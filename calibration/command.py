"""How the commands of this folder end: an error of ours is one line on stderr, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from whisper_steer.errors import WhisperSteerError


def run(main: Callable[[], None]) -> None:
    """Call `main` and leave with its exit code."""
    try:
        main()
    except WhisperSteerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it left off", file=sys.stderr)
        sys.exit(130)

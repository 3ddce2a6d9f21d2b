"""Every error that whisper-steer raises on purpose.

    WhisperSteerError          exit code 1
    ├── UsageError             exit code 2: an argument has a value that makes no sense (also a ValueError)
    ├── AudioError             the audio cannot be read or holds no usable samples
    ├── ModelError             unknown model, or it cannot be fetched
    ├── FormatError            a file is corrupt, or is not what it should be
    └── MismatchError          a steering or SAE was made for another model or layer

Each message is one line and names what was given, what was expected, and the way out.
"""

from __future__ import annotations


class WhisperSteerError(Exception):
    """Root of all errors of this package; `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(WhisperSteerError, ValueError):
    """An argument's value makes no sense."""

    exit_code = 2


class AudioError(WhisperSteerError):
    """Audio that cannot be read, or that holds no usable samples."""


class ModelError(WhisperSteerError):
    """A model that is unknown or cannot be fetched."""


class FormatError(WhisperSteerError):
    """A file that is missing, corrupt, or not of the expected kind."""


class MismatchError(WhisperSteerError):
    """A steering or SAE that was made for another model or layer."""

"""Printing: JSON that every reader accepts, and openai-whisper's timestamped lines."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..transcribe import Transcript


def print_error(message: str) -> None:
    """One line on stderr."""
    print("error: " + " ".join(message.split()), file=sys.stderr)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Numbers that are not finite become null: JSON has no NaN. One line when `indent` is None."""
    print(json.dumps(_finite(value), ensure_ascii=not _speaks_unicode(), indent=indent, allow_nan=False))


def print_transcript(transcript: Transcript, *, timestamps: bool, keep_suppressed: bool) -> None:
    """One line per segment, as openai-whisper prints them; withheld ones are marked."""
    from whisper.utils import format_timestamp, make_safe

    lines = [(s.start, s.end, s.text, "") for s in transcript.segments if s.text.strip()]
    if keep_suppressed:
        lines += [
            (w.start or 0.0, w.end or 0.0, f" {w.text.strip()}", f" (withheld, nobody speaks: {w.score:.1%})")
            for w in transcript.suppressed
            if w.text and w.text.strip()
        ]
    for start, end, text, mark in sorted(lines, key=lambda line: line[0]):
        if timestamps:
            print(make_safe(f"[{format_timestamp(start)} --> {format_timestamp(end)}]{mark} {text}"))
        else:
            print(make_safe(f"{mark} {text}".strip()))


def transcript_record(file: str, transcript: Transcript) -> dict[str, Any]:
    """openai-whisper's result, and how it was made."""
    return {
        "file": file,
        "model": transcript.model,
        "steering": transcript.steering,
        "alpha": transcript.alpha,
        "profile": transcript.profile,
        "duration": transcript.duration,
        **({} if transcript.vad is None else {"vad": transcript.vad}),
        **transcript.to_dict(),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _speaks_unicode() -> bool:
    return (sys.stdout.encoding or "ascii").lower().replace("-", "").startswith("utf")

"""--explain: what was decided about which stretch of the audio, and by what score."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..transcribe import Transcript
    from ..withholding import LeftOut, Suppressed


def print_explanation(label: str, transcript: Transcript) -> None:
    """On stderr: the sums, then one line per decision."""
    print(f"{label}: {summary(transcript)}", file=sys.stderr)
    for line in lines(transcript):
        print(f"  {line}", file=sys.stderr)


def summary(transcript: Transcript) -> str:
    """What was left out, what was withheld and what that saved, in one line."""
    from ..withholding import LeftOut

    left_out = [window for window in transcript.suppressed if isinstance(window, LeftOut)]
    windows = [window for window in transcript.suppressed if not isinstance(window, LeftOut)]
    found = ""
    if transcript.vad is not None:
        seconds = transcript.duration - sum(map(_seconds, left_out))
        found = f"speech found in {seconds:.1f} of {transcript.duration:.1f} s by the {transcript.vad}; "
    if transcript.steering is None or transcript.alpha == 0:
        return f"{found}plain Whisper, nothing {'else ' if found else ''}was judged"
    saved = ""
    if windows:
        spared = sum(_seconds(window) for window in windows if not window.decoded)
        saved = f", decoding saved for {spared:.1f} of {transcript.duration:.1f} s"
    edited = sum(end - start for start, end in transcript.edited)
    plural = "" if len(windows) == 1 else "s"
    return (
        f"{found}{len(windows)} window{plural} withheld{saved}; stream edited in {edited:.1f} s of the rest"
    )


def lines(transcript: Transcript) -> list[str]:
    """One per stretch that was left out, withheld window and edited stretch, in time order."""
    found = [(window.start or 0.0, _withheld(window)) for window in transcript.suppressed]
    found += [(start, f"{start:.2f}-{end:.2f} s  stream edited") for start, end in transcript.edited]
    return [line for _, line in sorted(found, key=lambda item: item[0])]


def _withheld(window: Suppressed) -> str:
    from ..withholding import LeftOut

    times = "time unknown" if window.start is None else f"{window.start:.2f}-{window.end or 0.0:.2f} s"
    why = f"nobody speaks with probability {window.score:.4f}"
    if isinstance(window, LeftOut):
        return f"{times}  {_left_out(window)}"
    if window.logit is not None and window.threshold is not None:
        why = f"gate logit {window.logit:.2f} > threshold {window.threshold:.2f}, {why}"
    if window.text is None:
        return f"{times}  withheld: {why}; not decoded, saved for {_seconds(window):.1f} s"
    words = f'"{window.text.strip()}"' if window.text.strip() else "no words"
    return f"{times}  withheld: {why}; decoded on request: {words}"


def _left_out(stretch: LeftOut) -> str:
    logit, threshold = stretch.logit or 0.0, stretch.threshold or 0.0
    sign, why = (">", "") if logit > threshold else ("<=", " for long enough")
    said = (
        f"left out: nobody speaks{why}, gate logit {logit:.2f} {sign} threshold {threshold:.2f} in the frame "
        "most like speech"
    )
    if stretch.text is None:
        return f"{said}; not decoded"
    words = f'"{stretch.text.strip()}"' if stretch.text.strip() else "no words"
    return f"{said}; decoded on request: {words}"


def _seconds(window: Suppressed) -> float:
    return (window.end or 0.0) - (window.start or 0.0)

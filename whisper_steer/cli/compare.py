"""whisper-steer compare: plain and steered side by side."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import decoding, options
from .output import print_json
from .progress import progress_bar
from .values import optional_int

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..comparison import Comparison, Row, ScoredText


def compare(
    audio: Annotated[str, typer.Argument(metavar="FILE", help="One audio file.")],
    model: options.Model = "mini.en",
    alpha: options.Alpha = None,
    profile: options.Profile = None,
    steering: options.Steering = None,
    device: options.Device = None,
    model_dir: options.ModelDir = None,
    language: options.Language = None,
    beam_size: Annotated[
        Any, typer.Option("--beam-size", metavar="INT", parser=optional_int, help="Beams; None: greedy.")
    ] = 5,
    explain: options.Explain = False,
    as_json: options.Json = False,
) -> None:
    """Transcribe a file plain and steered, side by side, with the words that steering removed marked.

    Under each segment: the decoder's no_speech_prob and avg_logprob, and the gate's probability that nobody
    speaks. Without colour, removed words are [-so-] and new ones {+so+}.
    """
    from ..attach import resolve_steering
    from ..comparison import compare as compare_both
    from ..zoo import load_model
    from .explain import print_explanation
    from .strength import announce, check_one

    check_one(alpha, profile)
    code = decoding.language(language)
    whisper = load_model(model, device=device, download_root=model_dir)
    chosen = resolve_steering(whisper, steering)
    if profile is not None:
        announce(profile, chosen.alpha_of(profile), chosen.measured(chosen.alpha_of(profile)))
    with progress_bar(Path(audio).name) as progress:
        comparison = compare_both(
            audio,
            whisper,
            alpha=alpha,
            profile=profile,
            steering=chosen,
            progress=progress,
            language=decoding.fitting_language(whisper, code, "transcribe"),
            temperature=decoding.temperatures(0.0, 0.2),
            beam_size=beam_size,
            best_of=5,
        )
    if explain:
        print_explanation(audio, comparison.steered)
    if as_json:
        print_json({"file": audio, **comparison.to_dict()})
        return
    from rich.console import Console

    show(comparison, Console(file=sys.stdout))


def show(comparison: Comparison, console: Console) -> None:
    """A table with one row per pair of segments, then the totals."""
    from rich import box
    from rich.table import Table

    coloured = console.color_system is not None and not console.no_color
    steered = comparison.steered
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), expand=True)
    table.add_column("seconds", no_wrap=True, style="dim")
    table.add_column("plain Whisper", ratio=1)
    table.add_column(f"{steered.steering or 'steered'}, alpha {steered.alpha:g}", ratio=1)
    for row in comparison.rows:
        for i, (plain, after) in enumerate(row.pairs()):
            times = _times(plain, after)
            right = _cell(after, coloured, added=True)
            if i == 0:
                right = _withheld(row).append_text(right)
            table.add_row(times, _cell(plain, coloured, added=False), right)
        if not row.pairs():
            table.add_row(f"{row.start:.1f}-{row.end:.1f}", "", _withheld(row))
    if comparison.rows:
        console.print(table)
    else:
        console.print("no words in either transcript")
    windows = len(steered.suppressed)
    console.print(
        f"{len(comparison.removed)} words removed, {len(comparison.added)} new, "
        f"{windows} window{'' if windows == 1 else 's'} withheld",
        highlight=False,
    )


def _times(*parts: ScoredText | None) -> str:
    there = [part for part in parts if part is not None]
    return f"{min(part.start for part in there):.1f}-{max(part.end for part in there):.1f}"


def _cell(part: ScoredText | None, coloured: bool, *, added: bool) -> Text:
    from rich.text import Text

    text = Text()
    if part is None:
        return text
    style, marks = ("bold green", ("{+", "+}")) if added else ("bold red strike", ("[-", "-]"))
    for changed, run in groupby(part.words, key=lambda pair: pair[1]):
        words = " ".join(word for word, _ in run)
        if changed and not coloured:
            words = f"{marks[0]}{words}{marks[1]}"
        text.append(" " if text else "").append(words, style=style if changed else "")
    scores = {"no_speech": part.no_speech_prob, "logprob": part.avg_logprob, "gate": part.gate}
    line = "  ".join(f"{name} {value:.2f}" for name, value in scores.items() if value is not None)
    return text.append(f"\n{line}", style="dim")


def _withheld(row: Row) -> Text:
    from rich.text import Text

    lines = [
        f"{window.start:.1f}-{window.end:.1f} withheld, gate {window.score:.2f}\n" for window in row.withheld
    ]
    return Text("".join(lines), style="italic dim")

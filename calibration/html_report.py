"""Building blocks of HTML reports: one file that opens anywhere, with its pictures and sounds inside.

    page("Title", [headline("..."), section("Frontier", figure(picture, "caption", alt="..."))])

Every function returns Markup, HTML that is put in as it is; a plain string is text and is escaped. The page
loads nothing from outside, follows the reader's light or dark mode, and prints in light.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from calibration.report_style import CSS
from whisper_steer.errors import UsageError

if TYPE_CHECKING:
    from calibration.report_figures import Picture

Tone = Literal["good", "bad", "plain"]
RATE = 16_000
PEAK = 0.9  # level to which quiet sounds are raised, so that they can be heard
MAX_SECONDS = 30.0  # what a player holds at most
# in order of preference: codec, container, media type, bits per second (None: lossless)
CODECS = (
    ("libmp3lame", "mp3", "audio/mpeg", 32_000),
    ("libopus", "ogg", "audio/ogg", 24_000),
    ("flac", "flac", "audio/flac", None),
)


class Markup(str):
    """Finished HTML."""


def text(value: object) -> Markup:
    """Escapes what is not Markup yet; None is a dash."""
    if isinstance(value, Markup):
        return value
    return Markup("–" if value is None else html.escape(str(value)))


def joined(parts: Iterable[object], between: str = "") -> Markup:
    """One Markup of several parts; `between` is HTML."""
    return Markup(between.join(text(part) for part in parts))


# -- the page -------------------------------------------------------------------------------------------


def page(title: str, body: Iterable[Markup], *, subtitle: str = "", footer: object = "") -> str:
    """The whole document as a string; write it as UTF-8."""
    below = f"<p class='sub'>{text(subtitle)}</p>" if subtitle else ""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        f"<title>{text(title)}</title><style>{CSS}</style></head>\n<body><main>"
        f"<header><h1>{text(title)}</h1>{below}</header>\n"
        f"{joined(body, chr(10))}\n<footer>{text(footer)}</footer></main></body></html>\n"
    )


def section(title: str, *parts: object, note: object = "") -> Markup:
    """A titled part of the page; note: a sentence under the title."""
    under = f"<p class='note'>{text(note)}</p>" if note else ""
    return Markup(f"<section><h2>{text(title)}</h2>{under}{joined(parts)}</section>")


def paragraph(*parts: object) -> Markup:
    return Markup(f"<p>{joined(parts)}</p>")


def headline(sentence: object, *more: object) -> Markup:
    """The answer in one sentence, large; `more`: sentences under it."""
    rest = "".join(f"<p>{text(part)}</p>" for part in more if part)
    return Markup(f"<div class='headline'><p class='answer'>{text(sentence)}</p>{rest}</div>")


def details(summary: object, *parts: object) -> Markup:
    """Folded away until it is clicked."""
    return Markup(f"<details><summary>{text(summary)}</summary>{joined(parts)}</details>")


@dataclass(frozen=True)
class Tile:
    """A figure that is read at a glance. tone: whether it is as it should be."""

    label: str
    value: str
    detail: str = ""
    tone: Tone = "plain"


def tiles(chosen: Sequence[Tile]) -> Markup:
    """Figures side by side."""
    cells = (
        f"<div class='tile {tile.tone}'><span class='label'>{text(tile.label)}</span>"
        f"<span class='value'>{text(tile.value)}</span><span class='detail'>{text(tile.detail)}</span></div>"
        for tile in chosen
    )
    return Markup(f"<div class='tiles'>{''.join(cells)}</div>")


def facts(values: Mapping[str, object]) -> Markup:
    """Names and their values, one pair a line."""
    pairs = (f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in values.items())
    return Markup(f"<dl>{''.join(pairs)}</dl>")


def badge(words: object, tone: Tone = "plain") -> Markup:
    return Markup(f"<span class='badge {tone}'>{text(words)}</span>")


# -- tables ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Cells of a table. strong: set off from the others. tint: share (0..1) of a colour behind each cell,
    None where there is none; () for no tints at all."""

    cells: Sequence[object]
    strong: bool = False
    tint: Sequence[float | None] = ()


@dataclass(frozen=True)
class Divider:
    """A line of words across a table, before the rows that they are about."""

    words: str


def table(
    columns: Sequence[str], rows: Sequence[Row | Divider], *, caption: object = "", left: int = 1
) -> Markup:
    """A table that scrolls sideways where it is too wide; the first `left` columns are text, the others
    numbers.

    Raises UsageError if a row has another number of cells than there are columns.
    """
    for row in rows:
        if isinstance(row, Row) and len(row.cells) != len(columns):
            raise UsageError(f"a table of {len(columns)} columns got a row of {len(row.cells)} cells")
    head = "".join(
        f"<th scope='col'{_side(place, left)}>{text(name)}</th>" for place, name in enumerate(columns)
    )
    body = "".join(
        _row(row, left)
        if isinstance(row, Row)
        else f"<tr class='divider'><td colspan='{len(columns)}'>{text(row.words)}</td></tr>"
        for row in rows
    )
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    return Markup(
        f"<div class='scroll'><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(row: Row, left: int) -> str:
    tints = [*row.tint, *[None] * (len(row.cells) - len(row.tint))]
    cells = []
    for place, (cell, tint) in enumerate(zip(row.cells, tints, strict=True)):
        colour = "" if tint is None else f" style='--tint:{100 * min(1.0, max(0.0, tint)):.0f}%'"
        tag = "th scope='row'" if place == 0 else "td"
        cells.append(f"<{tag}{_side(place, left)}{colour}>{text(cell)}</{tag.split()[0]}>")
    return f"<tr{' class=strong' if row.strong else ''}>{''.join(cells)}</tr>"


def _side(place: int, left: int) -> str:
    return "" if place < left else " class='n'"


# -- pictures -------------------------------------------------------------------------------------------


def _inline(data: bytes, media: str) -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def figure(picture: Picture | bytes, caption: object = "", *, alt: str) -> Markup:
    """A PNG within the page; of a Picture the one that fits the reader's mode. alt: what it shows, for
    readers who do not see it."""
    light, dark = (picture, None) if isinstance(picture, bytes) else (picture.light, picture.dark)
    source = ""
    if dark is not None:
        source = (
            f"<source media='screen and (prefers-color-scheme: dark)' srcset='{_inline(dark, 'image/png')}'>"
        )
    image = f"<img alt='{text(alt)}' src='{_inline(light, 'image/png')}'>"
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return Markup(f"<figure><picture>{source}{image}</picture>{below}</figure>")


def waveform(samples: np.ndarray, spans: Sequence[tuple[float, float]] = (), *, rate: int = RATE) -> Markup:
    """The envelope of samples (n,) in -1..1 as a small drawing, raised to full height; spans (seconds) are
    shaded: where somebody speaks."""
    width, height = 480, 48
    length = max(len(samples), 1) / rate
    parts = np.array_split(np.abs(samples), min(width // 2, max(1, len(samples))))
    peaks = np.array([float(part.max()) if len(part) else 0.0 for part in parts])
    peaks /= max(float(peaks.max()), 1e-9)
    step = width / len(peaks)
    bars = "".join(
        f"M{step * (place + 0.5):.1f} {height / 2 * (1 - peak):.1f}v{max(0.6, height * peak):.1f}"
        for place, peak in enumerate(peaks)
    )
    shades = "".join(
        f"<rect x='{width * max(0.0, start) / length:.1f}' y='0' height='{height}' "
        f"width='{width * max(0.0, min(end, length) - max(0.0, start)) / length:.1f}'/>"
        for start, end in spans
    )
    return Markup(
        f"<svg class='wave' viewBox='0 0 {width} {height}' preserveAspectRatio='none' role='img' "
        f"aria-label='waveform of {length:.1f} seconds'>{shades}<path d='{bars}'/></svg>"
    )


# -- sound ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _codec() -> tuple[str, str, str, int | None]:
    from av import codecs_available

    return next((codec for codec in CODECS if codec[0] in codecs_available), CODECS[-1])


def encoded(samples: np.ndarray, *, rate: int = RATE) -> tuple[bytes, str]:
    """(file, media type) of mono samples (n,) in -1..1: MP3 where this FFmpeg has it, else Opus or FLAC.

    Raises UsageError: not a vector, empty, or not finite.
    """
    import av

    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise UsageError(f"a sound of shape {samples.shape}: expected a vector of finite samples")
    name, container, media, bits = _codec()
    whole = np.round(np.clip(samples, -1, 1) * 32_767).astype(np.int16)[None, :]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(name, rate=rate)
        stream.layout = "mono"
        if bits is not None:
            stream.bit_rate = bits
        frame = av.AudioFrame.from_ndarray(whole, format="s16", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(
            format=stream.format, layout="mono", rate=rate, frame_size=stream.frame_size
        )
        for one in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(one))
        file.mux(stream.encode(None))
    return buffer.getvalue(), media


def audio_player(samples: np.ndarray, *, rate: int = RATE, label: str = "recording") -> Markup:
    """A player of samples (n,) in -1..1 with the sound in it, at most the first MAX_SECONDS.

    Quiet sounds are raised to full level, and the player says by how much.
    """
    kept = np.asarray(samples[: int(MAX_SECONDS * rate)], dtype=np.float32)
    peak = float(np.abs(kept).max()) if len(kept) else 0.0
    notes = []
    if 0 < peak < PEAK / 2:
        kept = kept * np.float32(PEAK / peak)
        notes.append(f"raised by {20 * math.log10(PEAK / peak):.0f} dB")
    if len(kept) < len(samples):
        notes.append(f"first {MAX_SECONDS:g} of {len(samples) / rate:.0f} s")
    if peak == 0:
        notes.append("digital silence")
    data, media = encoded(kept, rate=rate)
    note = f"<span class='note'>{text(', '.join(notes))}</span>" if notes else ""
    sound = f"<audio controls preload='none' aria-label='{text(label)}' src='{_inline(data, media)}'></audio>"
    return Markup(sound + note)

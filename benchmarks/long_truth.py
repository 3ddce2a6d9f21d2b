"""Long recordings in which speech, silence, music and noise alternate; it is known what is where.

Three sorts are put together from evaluation clips of one split (see calibration.corpus), 2 to 4 minutes each:

synthetic  synthetic speech between synthetic music and noise; needs no data folder;
mixed      synthetic speech between real music and sounds: a model trained on synthetic speech can follow it;
real       real speech between real music and sounds.

The fourth, spliced, are the files of DATA/long with their segments.csv, for the test split. Nothing is fitted
on their speakers, but music and sounds in some of them belong to recordings of other splits: such a stretch
is marked as not measured.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from whisper_steer.errors import FormatError, UsageError

if TYPE_CHECKING:
    from calibration.corpus import Clip

RATE = 16_000
KINDS = ("speech", "silence", "music", "noise")
SORTS = ("synthetic", "mixed", "real", "spliced")
SECONDS = (120.0, 240.0)  # a recording ends with the first stretch that reaches its length drawn from here
FADE = RATE // 100  # 10 ms: no click where two clips meet

# set of synthetic speech -> how often an utterance is drawn from it
_SPEECH = {
    "speech": 8, "speech_new_voice": 3, "speech_noisy": 4, "speech_reverb": 3, "speech_quiet": 1,
    "speech_whispered": 1,
}  # fmt: skip
_NOISES = ("noise", "tones", "sounds", "human")
_STRETCH = {"silence": (3.0, 25.0), "music": (5.0, 25.0), "noise": (5.0, 20.0)}  # seconds
_TURN = (1, 5)  # utterances between two stretches
_PAUSE = (0.2, 1.2)  # seconds between the utterances of a turn
_ROOM = (-80.0, -50.0)  # dBFS of a silence that is not digital


@dataclass(frozen=True)
class LongSegment:
    """What can be heard from `start` to `end` (seconds).

    kind: one of KINDS. text: of speech whose words are known, else None. source: clip or file; "" of silence.
    measured: False where the sound is not held out, so that nothing is to be counted there.
    """

    start: float
    end: float
    kind: str
    text: str | None = None
    source: str = ""
    measured: bool = True


@dataclass(frozen=True)
class LongRecording:
    """A recording with its truth: segments follow each other without gap from 0 to its end.

    sort: one of SORTS. `load()` gives float32 (n,), 16 kHz.
    """

    id: str
    sort: str
    split: str
    segments: tuple[LongSegment, ...]
    audio: Callable[[], np.ndarray] = field(repr=False, compare=False)

    def load(self) -> np.ndarray:
        return self.audio()

    @property
    def seconds(self) -> float:
        return self.segments[-1].end

    @property
    def text(self) -> str:
        """The words of all speech, in order."""
        return " ".join(segment.text for segment in self.speech if segment.text)

    @property
    def speech(self) -> tuple[LongSegment, ...]:
        return tuple(segment for segment in self.segments if segment.kind == "speech")

    def clip(self) -> Clip:
        """The recording as what a benchmark method hears."""
        from calibration.corpus import Clip

        intervals = tuple((segment.start, segment.end) for segment in self.speech)
        return Clip(
            self.id, "long", f"long_{self.sort}", self.split, self.text, self.id, f"long {self.sort}",
            speech_intervals=intervals, audio=self.audio,
        )  # fmt: skip


def long_recordings(
    split: str, data_dir: Path | str | None = None, count: int = 8, seed: int = 0
) -> list[LongRecording]:
    """`count` synthetic recordings of clips of `split` ("calibration" or "test"); with data_dir also `count`
    mixed and `count` real ones where its clips suffice, and for "test" the spliced files.

    The same arguments give the same recordings; the synthetic ones do not depend on data_dir.
    Raises UsageError (split, count, data_dir without recordings), FormatError (segments.csv).
    """
    from calibration.corpus import eval_sets, real_clips

    if count < 0:
        raise UsageError(f"count is {count}: expected at least 0 recordings of each sort")
    if data_dir is not None and not Path(data_dir).is_dir():
        raise UsageError(
            f"{data_dir} is no folder: expected one with speech/, music/, ... and a manifest.csv each"
        )
    sets = eval_sets(split, None)
    speech = {name: sets[name] for name in _SPEECH}
    sources = {"synthetic": (speech, {"music": [sets["music"]], "noise": [sets[name] for name in _NOISES]})}
    real = real_clips(data_dir, split)
    by_category = {name: [clip for clip in real if clip.category == name] for name in ("music", *_NOISES)}
    noises = [clips for name in _NOISES if (clips := by_category[name])]
    if by_category["music"] and noises:
        others = {"music": [by_category["music"]], "noise": noises}
        sources["mixed"] = (speech, others)
        spoken = [clip for clip in real if clip.kind == "real_speech"]
        if spoken:
            sources["real"] = ({"real_speech": spoken}, others)
    recordings = [
        _compose(sort, split, index, seed, *clips)
        for sort, clips in sources.items()
        for index in range(count)
    ]
    return recordings + (spliced_recordings(data_dir) if split == "test" and data_dir is not None else [])


# -- composing


@dataclass(frozen=True)
class _Piece:
    """Something to be placed: from sample `start` on, `samples` of a clip, or of noise at `level` dBFS (None:
    zeros)."""

    start: int
    samples: int
    clip: Clip | None = None
    level: float | None = None
    seed: int = 0


class _Deck:
    """Clips in random order, again and again: none is drawn twice before all have been drawn once."""

    def __init__(self, clips: Sequence[Clip], rng: random.Random):
        self._clips, self._rng = clips, rng
        self._left: list[Clip] = []

    def draw(self) -> Clip:
        if not self._left:
            self._left = self._rng.sample(list(self._clips), len(self._clips))
        return self._left.pop()


def _compose(
    sort: str,
    split: str,
    index: int,
    seed: int,
    speech: Mapping[str, Sequence[Clip]],
    others: Mapping[str, Sequence[Sequence[Clip]]],
) -> LongRecording:
    """Speech turns and stretches of one other kind in turn, the next kind never the one before."""
    rng = random.Random(f"{seed}:{split}:{sort}:{index}")
    spoken = {name: _Deck(clips, rng) for name, clips in speech.items()}
    decks = {kind: [_Deck(clips, rng) for clips in groups] for kind, groups in others.items()}
    writer = _Writer(rng)
    length = rng.uniform(*SECONDS)
    before = ""
    speaking = rng.random() < 0.5
    while writer.seconds < length:
        if speaking:
            for number in range(rng.randint(*_TURN)):
                if number:
                    writer.silence(rng.uniform(*_PAUSE))
                name = rng.choices(list(spoken), [_SPEECH.get(name, 1) for name in spoken])[0]
                writer.speech(spoken[name].draw())
        else:
            before = rng.choice([kind for kind in _STRETCH if kind != before])
            seconds = rng.uniform(*_STRETCH[before])
            if before == "silence":
                writer.silence(seconds)
            else:
                writer.fill(before, seconds, rng.choice(decks[before]))
        speaking = not speaking
    name = f"long_{sort}/{index:03d}"
    return LongRecording(name, sort, split, tuple(writer.segments), partial(_render, tuple(writer.pieces)))


class _Writer:
    """Appends to a recording, and notes what is where."""

    def __init__(self, rng: random.Random):
        self.segments: list[LongSegment] = []
        self.pieces: list[_Piece] = []
        self._rng = rng
        self._samples = 0

    @property
    def seconds(self) -> float:
        return self._samples / RATE

    def _append(self, samples: int, clip: Clip | None = None, level: float | None = None) -> None:
        self.pieces.append(_Piece(self._samples, samples, clip, level, self._rng.getrandbits(32)))
        self._samples += samples

    def _note(self, start: float, end: float, kind: str, text: str | None = None, source: str = "") -> None:
        if end > start:
            self.segments.append(LongSegment(start, end, kind, text, source))

    def silence(self, seconds: float) -> None:
        """Zeros, or the faint noise of a room."""
        start = self.seconds
        level = self._rng.uniform(*_ROOM) if self._rng.random() < 2 / 3 else None
        self._append(int(seconds * RATE), level=level)
        self._note(start, self.seconds, "silence")

    def fill(self, kind: str, seconds: float, deck: _Deck) -> None:
        """Clips one after another, the last one cut."""
        end = self._samples + int(seconds * RATE)
        while self._samples < end:
            start, clip = self.seconds, deck.draw()
            self._append(min(len(clip.load()), end - self._samples), clip)
            self._note(start, self.seconds, kind, None, clip.id)

    def speech(self, clip: Clip) -> None:
        """An utterance; what its clip has before and after it counts as silence."""
        offset = self.seconds
        self._append(len(clip.load()), clip)
        intervals = clip.speech_intervals or ((0.0, self.seconds - offset),)
        start = offset + intervals[0][0]
        end = min(offset + intervals[-1][1], self.seconds)
        self._note(offset, start, "silence")
        self._note(start, end, "speech", clip.text, clip.id)
        self._note(end, self.seconds, "silence")


def _render(pieces: Sequence[_Piece]) -> np.ndarray:
    audio = np.zeros(pieces[-1].start + pieces[-1].samples, np.float32)
    for piece in pieces:
        if piece.clip is not None:
            sound = np.array(piece.clip.load()[: piece.samples], dtype=np.float32)
            ramp = np.linspace(0, 1, min(FADE, len(sound)), dtype=np.float32)
            sound[: len(ramp)] *= ramp
            sound[len(sound) - len(ramp) :] *= ramp[::-1]
        elif piece.level is not None:
            noise = np.random.default_rng(piece.seed).standard_normal(piece.samples)
            sound = (noise * 10 ** (piece.level / 20)).astype(np.float32)
        else:
            continue
        audio[piece.start : piece.start + len(sound)] = sound
    return audio.clip(-1, 1)  # lossy formats overshoot


# -- spliced files


def spliced_recordings(data_dir: Path | str) -> list[LongRecording]:
    """The recordings of DATA_DIR/long/segments.csv (file, start, end, type, text, source), as test
    recordings; an empty list where there is none.

    Stretches whose source is, by the manifests, a recording of another split are not measured.
    Raises FormatError (a column or a file is missing, a number is none).
    """
    from calibration.corpus import _loader

    path = Path(data_dir) / "long" / "segments.csv"
    if not path.is_file():
        return []
    held_out = _held_out(Path(data_dir))
    found: dict[str, list[LongSegment]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                kind = _kind(row["type"])
                measured = kind in ("speech", "silence") or held_out(row["source"])
                start, end = float(row["start"]), float(row["end"])
                segment = LongSegment(start, end, kind, row["text"].strip() or None, row["source"], measured)
                found.setdefault(row["file"], []).append(segment)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(
            f"{path}: {error}; expected the columns file,start,end,type,text,source, times in seconds"
        ) from error
    if missing := [name for name in found if not (path.parent / name).is_file()]:
        raise FormatError(f"{path} names {missing[0]}, which is not in {path.parent}: put it there")
    return [
        LongRecording(
            f"long_spliced/{name}", "spliced", "test",
            tuple(sorted(segments, key=lambda segment: segment.start)), _loader(path.parent / name),
        )
        for name, segments in sorted(found.items())
    ]  # fmt: skip


def _kind(given: str) -> str:
    """ "room_silence(-65dBFS noise)" -> "silence"; inaSpeechSegmenter says male, female and noEnergy."""
    if given in ("speech", "male", "female"):
        return "speech"
    if "silence" in given or given == "noEnergy":
        return "silence"
    return "music" if given == "music" else "noise"


def _held_out(data_dir: Path) -> Callable[[str], bool]:
    """Tells whether all recordings that a segment's source names are either of the test split, or in no
    manifest (then nothing was trained or fitted on them)."""
    paths = dict(_source_groups(data_dir))

    def held_out(source: str) -> bool:
        from calibration.corpus import split_of_group

        parts = [part.split(" [")[0].strip() for part in source.split(" + ")]
        groups = (group for part in parts for known, group in paths.items() if part.endswith(known))
        return all(split_of_group(group) == "test" for group in groups)

    return held_out


def _source_groups(data_dir: Path) -> Iterator[tuple[str, str]]:
    """(path of a source recording, its group) of music and sounds."""
    for name in ("music", "sounds"):
        manifest = data_dir / name / "manifest.csv"
        if manifest.is_file():
            with manifest.open(newline="", encoding="utf-8") as lines:
                for row in csv.DictReader(lines):
                    if row["source_path"]:
                        yield row["source_path"], row["group"] or row["source_path"]

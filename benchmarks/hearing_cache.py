"""What methods heard, kept on disk: a killed run resumes, and one method more costs only that method.

    OUT/run.json                            command, model, data, quick, measured; methods (name -> about,
                                            strengths, fingerprint); unavailable (name -> reason)
    OUT/clips.jsonl                         one ClipRecord per measured clip
    OUT/heard/<method>/<strength>.jsonl     one line per clip as soon as it is finished; 0.5 -> 0.5.jsonl
    OUT/rows.json, OUT/paired.json          what `reports` and `paired` make of them
    OUT/long_rows.json                      of benchmarks.long_recordings, if it was run into the same folder

A line of a heard file is an object with "id" and "crc" (the clip and its audio), "fingerprint" (the model,
and what else the words depend on), the fields of `Heard` (text, segments, nsp, hr, seconds), "threads" (of
PyTorch, while that was timed), and for plain Whisper "transcript", the windows behind them. Lines of another
fingerprint or of other audio stay, and are not read; of several lines for one clip the last one counts.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import torch

from benchmarks.files import write_whole
from benchmarks.methods import Heard
from calibration.corpus import Clip
from calibration.decoding import ClipTranscript
from calibration.hallucinations import transcript_of
from whisper_steer.errors import FormatError, UsageError

CLIPS, RUN, HEARD, ROWS, PAIRED = "clips.jsonl", "run.json", "heard", "rows.json", "paired.json"
LONG_ROWS = "long_rows.json"


@dataclass(frozen=True)
class ClipRecord:
    """A measured clip: what a report needs to know of it.

    Attributes:
        id, crc: name, and CRC-32 of its samples (float32, 16 kHz).
        set: the row's set it belongs to. kind: "speech", "real_speech" or "nonspeech". category: finer.
        text: the reference; None for non-speech. seconds: its length.
        path: the file of a real recording, None for a synthetic clip.
        source: where it comes from, or what it was made of.
        intervals: (start, end) of every utterance, seconds; None when unknown.
        no_speech_prob, avg_logprob: of plain Whisper's 30 s windows the values most like speech (lowest,
            highest).
        gate: the measured steering's probability that nobody speaks, of the window most like speech; None
            if it has no gate.
        group: speaker or source recording, "" if the clip stands alone: see `drawn_with`.
    """

    id: str
    crc: int
    set: str
    kind: str
    category: str
    text: str | None
    seconds: float
    path: str | None
    source: str
    intervals: tuple[tuple[float, float], ...] | None
    no_speech_prob: float | None = None
    avg_logprob: float | None = None
    gate: float | None = None
    group: str = ""

    @property
    def drawn_with(self) -> str:
        """Clips with the same name are drawn together when intervals are made; a recording and what a
        telephone made of it are of one group."""
        return self.group or self.id

    @property
    def is_speech(self) -> bool:
        return self.kind != "nonspeech"


def audio_crc(audio: np.ndarray) -> int:
    """CRC-32 of samples, as in label files."""
    return zlib.crc32(np.ascontiguousarray(audio, dtype=np.float32).tobytes())


def clip_record(clip: Clip, group: str, audio: np.ndarray) -> ClipRecord:
    """The record of a clip of the set `group`, without scores."""
    return ClipRecord(
        clip.id, audio_crc(audio), group, clip.kind, clip.category, clip.text, len(audio) / 16_000, clip.path,
        clip.source, clip.speech_intervals, group=clip.group,
    )  # fmt: skip


def write_clips(out: Path, records: Sequence[ClipRecord]) -> Path:
    """OUT/clips.jsonl."""
    return write_whole(out / CLIPS, "".join(json.dumps(asdict(record)) + "\n" for record in records))


def read_clips(out: Path) -> list[ClipRecord]:
    """The clips of a run in the order in which they were measured. Raises FormatError."""
    records = []
    for line in _lines(out / CLIPS, whole=True):
        spans = line["intervals"]
        line["intervals"] = None if spans is None else tuple((start, end) for start, end in spans)
        records.append(ClipRecord(**line))
    return records


def read_run(out: Path) -> dict[str, Any]:
    """OUT/run.json. Raises UsageError if `out` is not a run's folder."""
    try:
        found = json.loads((out / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{out} holds no {RUN}: expected the --out folder of python -m benchmarks.tradeoff"
        ) from error
    return dict(found)


def load_clips(out: Path) -> dict[str, Clip]:
    """The measured clips with their audio, by id, found again from run.json.

    Raises UsageError (not a run's folder, or the recordings are gone), FormatError.
    """
    from calibration.corpus import eval_sets

    run = read_run(out)
    sets = eval_sets("test", run.get("data"), bool(run.get("quick")))
    clips = {clip.id: clip for group in sets.values() for clip in group}
    wanted = [record.id for record in read_clips(out)]
    if missing := [name for name in wanted if name not in clips]:
        raise UsageError(f"{len(missing)} clips of {out} are gone, {missing[0]} the first: run it again")
    return {name: clips[name] for name in wanted}


@dataclass(frozen=True)
class Finished:
    """One clip that a method has heard; transcript: plain Whisper's windows, None for other methods."""

    id: str
    crc: int
    heard: Heard
    transcript: ClipTranscript | None = None


class HearingCache:
    """The heard files under OUT."""

    def __init__(self, out: Path) -> None:
        """threads: the numbers of PyTorch's threads with which what was read or added here was timed."""
        self.out = out
        self.threads: set[int] = set()

    def path(self, method: str, strength: float) -> Path:
        return self.out / HEARD / quote(method, safe="+-_.") / f"{strength:g}.jsonl"

    def read(self, method: str, strength: float, fingerprint: str) -> dict[tuple[str, int], Finished]:
        """What is kept, by clip id and audio CRC. Raises FormatError if the file holds something else."""
        found = {}
        for line in _lines(self.path(method, strength)):
            if line.get("fingerprint") == fingerprint:
                finished = _finished(line)
                found[finished.id, finished.crc] = finished
                if "threads" in line:
                    self.threads.add(line["threads"])
        return found

    def append(self, method: str, strength: float, fingerprint: str, done: Iterable[Finished]) -> None:
        """Adds lines; each is written in one piece, and a half line of a killed run is ended first."""
        path = self.path(method, strength)
        self.threads.add(torch.get_num_threads())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                if file.tell() > 0:
                    file.seek(-1, 2)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
                for finished in done:
                    file.write(_line(finished, fingerprint).encode())
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"cannot write {path}: {reason}; choose another --out") from error

    def forget(self, method: str) -> None:
        """Deletes what is kept of a method."""
        shutil.rmtree(self.path(method, 0.0).parent, ignore_errors=True)

    def settings(self) -> Iterator[tuple[str, float]]:
        """(method, strength) of every file that is there, in order of name and strength."""
        for folder in sorted((self.out / HEARD).glob("*")):
            for strength in sorted(float(path.stem) for path in folder.glob("*.jsonl")):
                yield unquote(folder.name), strength


def _line(finished: Finished, fingerprint: str) -> str:
    line = {"id": finished.id, "crc": finished.crc, "fingerprint": fingerprint}
    line["threads"] = torch.get_num_threads()
    for field in fields(Heard):
        line[field.name] = getattr(finished.heard, field.name)
    if finished.transcript is not None:
        line["transcript"] = asdict(finished.transcript)
    return json.dumps(line) + "\n"


def _finished(line: Mapping[str, Any]) -> Finished:
    heard = Heard(
        text=line["text"],
        segments=tuple((start, end, text) for start, end, text in line["segments"]),
        nsp=line["nsp"],
        hr=line["hr"],
        seconds=line["seconds"],
    )
    windows = line.get("transcript")
    return Finished(line["id"], line["crc"], heard, None if windows is None else transcript_of(windows))


def _lines(path: Path, whole: bool = False) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file; of a missing one none, or with `whole` an error.

    A line that a kill cut off is left out; with `whole` it is an error.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        if whole:
            raise FormatError(f"{path} is missing: run python -m benchmarks.tradeoff again") from None
        return
    for number, text in enumerate(raw.split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError as error:
            if whole:
                raise FormatError(f"{path}, line {number}: {error}; delete it and run again") from error
            continue
        if not isinstance(line, dict):
            raise FormatError(f"{path}, line {number}: expected an object; delete the file and run again")
        yield line

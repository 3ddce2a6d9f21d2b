"""Reads a user's recordings: what a manifest of speech or folders of non-speech hold, as clips.

Every recording is decoded once, to know that it can be read, how long it is and whether it was there
before; its samples are not kept.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from calibration.corpus import RATE, Clip
from calibration.evaluate import normalise
from calibration.item_sources import from_folder
from calibration.manifests import from_manifest, load_segment
from calibration.mixture import AudioItem
from calibration.source_names import source_by_name, sources_by_manifest
from calibration.training_clips import REAL_SPEECH_DB, active_intervals
from whisper_steer.audio import load_audio
from whisper_steer.errors import AudioError, UsageError

logger = logging.getLogger("whisper_steer")

MIN_SECONDS = 0.1
SPEECH = "speech"  # the set of speech

# what columns of a speech manifest may be called, in order of preference
AUDIO_COLUMNS = ("audio", "path", "file", "audio_filepath", "wav")
TEXT_COLUMNS = ("text", "sentence", "transcript", "transcription")
GROUP_COLUMNS = ("speaker", "speaker_id", "client_id", "group")
_LIBRISPEECH_ID = re.compile(r"(\w+)-\w+-\w+")  # speaker-chapter-utterance

# why a recording is left out
REASONS = {
    "unreadable": "cannot be read",
    "too_short": f"shorter than {MIN_SECONDS:g} s",
    "too_long": "speech that is too long for one clip (columns start and duration cut parts out)",
    "duplicate": "there before",
    "without_text": "speech without text",
    "also_speech": "non-speech that the manifest of speech has too",
}


@dataclass
class Reader:
    """Decodes every recording once and keeps count of what is left out.

    Attributes:
        left_out: key of REASONS -> recordings. examples: the first of each; unreadable ones are logged one
            by one instead.
        heard: digest of the samples -> name, of all so far. first_error: why the first unreadable one is so.
    """

    progress: bool
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    heard: dict[str, str] = field(default_factory=dict)
    first_error: str = ""

    def skip(self, reason: str, name: str) -> None:
        self.left_out[reason] += 1
        self.examples.setdefault(reason, name)

    def read(self, name: str, load: Callable[[], np.ndarray]) -> np.ndarray | None:
        """The samples; None if they cannot be read, are too short, or were there before."""
        try:
            audio = load()
        except (AudioError, OSError) as error:
            logger.warning("skipped: %s", error)
            self.first_error = self.first_error or str(error)
            self.left_out["unreadable"] += 1
            return None
        if len(audio) < MIN_SECONDS * RATE:
            self.skip("too_short", name)
            return None
        digest = hashlib.sha256(np.ascontiguousarray(audio).tobytes()).hexdigest()
        if digest in self.heard:
            self.skip("duplicate", name)
            return None
        self.heard[digest] = name
        return audio

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all recordings read, samples and file names: other audio under an old name is
        told apart."""
        lines = sorted(f"{digest} {Path(name).name}" for digest, name in self.heard.items())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def report(self) -> None:
        """One log line per reason; unreadable files have had theirs."""
        for reason, name in self.examples.items():
            logger.warning("left out: %s, such as %s", self.described(reason), name)

    def described(self, reason: str) -> str:
        """How many recordings were left out for it."""
        return f"{self.left_out[reason]} {REASONS[reason]}"


def speech_items(path: Path) -> list[AudioItem]:
    """What the manifest or folder lists, a group only where a speaker is known (else "")."""
    if path.name.endswith(".trans.txt"):
        path = path.parent
    if path.is_dir():
        items = from_folder("speech", path, domain="speech")
        if not any(item.text for item in items):
            raise UsageError(
                f"{path}: {len(items)} audio files without any text; expected *.trans.txt as LibriSpeech has "
                "them, x.txt beside x.wav, or a manifest with columns path and text"
            )
        speakers = [_LIBRISPEECH_ID.fullmatch(Path(item.id).stem) for item in items]
        return [
            replace(item, group=match.group(1) if match else "")
            for item, match in zip(items, speakers, strict=True)
        ]
    present = _columns(path)
    columns = {}
    for key, names in (("path", AUDIO_COLUMNS), ("text", TEXT_COLUMNS), ("group", GROUP_COLUMNS)):
        if column := next((name for name in names if name in present), None):
            columns[key] = column
    if present and "text" not in columns:
        raise UsageError(
            f"{path}: no column {', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]} with what is said; "
            f"the columns are {', '.join(present)}"
        )
    items = from_manifest("speech", path, domain="speech", columns=columns)
    return [_located(item, path.parent) for item in items]


def _located(item: AudioItem, folder: Path) -> AudioItem:
    """The item with its file where it really is; a path in place of a speaker is none."""
    file = Path(item.path or "")
    group = "" if folder / item.group == file else item.group
    clips = folder / "clips" / file.name
    if not file.is_file() and clips.is_file() and item.audio is None:
        return replace(item, group=group, path=str(clips))
    return replace(item, group=group)


def _columns(path: Path) -> list[str]:
    """Columns of a manifest by its first row; none where it has no first row or is no manifest, which
    reading it will say better.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    try:
        opened = (
            gzip.open(path, "rt", encoding="utf-8-sig", newline="")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig", newline="")
        )
        with opened as lines:
            if suffix == ".jsonl":
                row = json.loads(next((line for line in lines if line.strip()), "{}"))
                return list(row) if isinstance(row, dict) else []
            return next(csv.reader(lines, delimiter="\t" if suffix == ".tsv" else ","), [])
    except (OSError, ValueError, EOFError, csv.Error):
        return []


def _file_digest(path: str) -> str:
    """SHA-256 (hex) of a file's bytes; of its name where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return hashlib.sha256(path.encode()).hexdigest()
    return digest.hexdigest()


def read_speech(
    items: Sequence[AudioItem], where: Path, max_seconds: float, reader: Reader, language: str = "en"
) -> tuple[list[Clip], set[str]]:
    """The usable recordings, and the digests of all files listed. A clip's group joins all of a speaker and
    all of a file. language: of the texts, a code.
    """
    digests = {path: _file_digest(path) for path in dict.fromkeys(str(item.path) for item in items)}
    joined = joined_groups(
        [(f"speaker {item.group}" if item.group else "", digests[str(item.path)]) for item in items]
    )
    clips: list[Clip] = []
    unreadable = reader.left_out["unreadable"]
    for item, group in zip(
        tqdm(items, desc="reading speech", unit="file", disable=not reader.progress), joined, strict=True
    ):
        if not normalise(item.text or "", language):
            reader.skip("without_text", item.id)
            continue
        load = item.audio or partial(load_audio, str(item.path))
        audio = reader.read(item.id, load)
        if audio is None:
            continue
        if len(audio) > max_seconds * RATE:
            reader.skip("too_long", item.id)
            continue
        clips.append(
            Clip(
                id=f"speech/{item.id}",
                kind="real_speech",
                category=SPEECH,
                split="",
                text=item.text,
                group=group,
                source=str(where),
                voice=item.group or None,
                path=item.path,
                speech_intervals=active_intervals(audio, within_db=REAL_SPEECH_DB),
                audio=load,
            )
        )
    if items and reader.left_out["unreadable"] - unreadable == len(items):
        raise AudioError(
            f"{where}: none of its {len(items)} recordings can be read; the first: {reader.first_error}"
        )
    return clips, set(digests.values())


def joined_groups(keys: Sequence[tuple[str, str]]) -> list[str]:
    """A group for each pair (speaker, file): pairs that share either, directly or through others, get the
    same one. An empty speaker is unknown.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for speaker, file in keys:
        if speaker:
            first, second = sorted((root(speaker), root(file)))
            parent[second] = first
    return [root(file) for _, file in keys]


def read_sounds(
    folders: Mapping[str, Path],
    found: Mapping[str, Sequence[Path]],
    spoken: set[str],
    max_seconds: float,
    reader: Reader,
) -> list[Clip]:
    """Every readable file below the folders as one clip or several; `spoken`: digests of files of speech.

    A clip's group joins all of a file and all of a source, where the file's name or a manifest.csv beside it
    or in the folder given says which it is (`calibration.source_names`).
    """
    clips: list[Clip] = []
    files = [(name, path) for name, paths in found.items() for path in paths]
    digests = [_file_digest(str(path)) for _, path in files]
    listed = sources_by_manifest([*folders.values(), *(path.parent for _, path in files)])
    sources = [listed.get(path.resolve()) or source_by_name(path) for _, path in files]
    groups = joined_groups(
        [
            (f"source {source}" if source else "", digest)
            for source, digest in zip(sources, digests, strict=True)
        ]
    )
    unreadable = reader.left_out["unreadable"]
    reader.first_error = ""
    bar = tqdm(files, desc="reading non-speech", unit="file", disable=not reader.progress)
    for (name, path), digest, group in zip(bar, digests, groups, strict=True):
        if digest in spoken:
            reader.skip("also_speech", str(path))
            continue
        audio = reader.read(str(path), partial(load_audio, path))
        if audio is None:
            continue
        relative = path.relative_to(folders[name]).as_posix()
        parts = math.ceil(len(audio) / (max_seconds * RATE))
        edges = [len(audio) * part // parts for part in range(parts + 1)]
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            identity = f"{name}/{relative}" + (f"@{start / RATE:.2f}" if parts > 1 else "")
            load = partial(_load_part, str(path), start, end) if parts > 1 else partial(load_audio, path)
            clips.append(
                Clip(
                    identity,
                    "nonspeech",
                    name,
                    "",
                    None,
                    group,
                    str(folders[name]),
                    None,
                    str(path),
                    None,
                    load,
                )  # fmt: skip
            )
    if files and reader.left_out["unreadable"] - unreadable == len(files):
        raise AudioError(
            f"none of the {len(files)} files of non-speech can be read; the first: {reader.first_error}"
        )
    return clips


def _load_part(path: str, start: int, end: int) -> np.ndarray:
    """Samples `start` to `end` (16 kHz) of a file; float32."""
    try:
        return load_segment(path, start / RATE, (end - start) / RATE)
    except AudioError:  # some formats can only be read from the beginning
        return load_audio(path)[start:end]

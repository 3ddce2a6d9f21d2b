"""A user's own recordings as three splits: one to train on, one to choose by, one to test with.

Non-speech comes from folders of audio, speech from a manifest with texts. What belongs together (all of a
speaker, all of a file) is on one side only. Audio is decoded once, to know that it can be read, how long it
is and what is there twice; after that whenever a clip is loaded, so that nothing is held in memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from calibration import augmentation
from calibration.corpus import SPLITS, Clip
from calibration.training_clips import (
    REAL_SPEECH_DB,
    Intervals,
    TrainingClip,
    make_variant,
    some_over_telephone,
)
from calibration.user_recordings import MIN_SECONDS, SPEECH, Reader, read_sounds, read_speech, speech_items
from whisper_steer.audio import find_audio
from whisper_steer.errors import UsageError

MIN_CLIPS = 20  # of speech and of non-speech: with fewer, the rates on a test split say nothing
WINDOW_SECONDS = 30.0  # what Whisper hears at once
NOISY_SNR_DB = 5.0
SPEECH_NOISY = "speech_noisy"  # the set of speech under other sounds
VARIANTS = ("noisy", "embedded", "reverb", "quiet")  # conditions of training clips beside "clean", in turn


@dataclass(frozen=True)
class Splits:
    """Three splits of which no two share a speaker or a file.

    Attributes:
        training: speech, clean and in one condition each, and non-speech.
        validation, test: by set: SPEECH, SPEECH_NOISY (the same clips under non-speech of the same split at
            5 dB SNR), and one set per folder of non-speech, where the split has any of it.
        counts: "training", "validation", "test" -> "speech", "speech_groups", "nonspeech",
            "nonspeech_groups" (recordings and what they are split by, variants not counted), and "left_out"
            -> reason -> recordings.
        fingerprint: hash of all samples and file names; "" where they were not read from files.
    """

    training: list[TrainingClip]
    validation: dict[str, list[Clip]]
    test: dict[str, list[Clip]]
    counts: dict[str, dict[str, int]]
    fingerprint: str = ""


def read_splits(
    nonspeech: Sequence[Path | str],
    speech: Path | str,
    *,
    seed: int = 0,
    shares: tuple[float, float, float] = (0.5, 0.3, 0.2),
    max_seconds: float = WINDOW_SECONDS,
    language: str = "en",
    progress: bool = True,
) -> Splits:
    """Read a user's recordings and split them; the same files, seed and shares give the same splits.

    Args:
        nonspeech: folders; every audio file below one is non-speech, the folder's name its set. Files longer
            than `max_seconds` are cut into equal parts, which stay in one split. So do files cut from one
            recording, where their names say so (ESC-50, UrbanSound8K) or a manifest.csv beside them does
            (columns file and group, speaker or source).
        speech: a CSV, TSV or JSONL file (also .gz) with a column of AUDIO_COLUMNS and one of TEXT_COLUMNS;
            one of GROUP_COLUMNS says who speaks (else every file is a speaker of its own), "start" and
            "duration" (seconds) cut parts out of long files. Paths are relative to its folder, or to "clips"
            in it (Common Voice). Or a folder with texts beside the audio: LibriSpeech's *.trans.txt, or
            x.txt for x.wav.
        seed: of the order in which groups are dealt out, and of the noise on training clips.
        shares: of training, validation and test, by recordings; groups are not torn apart for them.
        max_seconds: the longest clip, up to 30; longer recordings of speech are left out.
        language: code of what is spoken.

    What is there twice (same samples) is kept once; what cannot be read is skipped with a warning; a file
    that the manifest has too is no non-speech.

    Raises:
        UsageError: an argument out of range, no such folder, a manifest without text column, fewer than 20
            usable recordings of a kind, or fewer than 3 speakers or files of their own to split.
        FormatError: a manifest that cannot be read. AudioError: a folder without audio, or nothing in the
            manifest or in the folders can be decoded.
    """
    _check_arguments(nonspeech, shares, max_seconds)
    speech = Path(speech)
    folders = _set_names([Path(folder) for folder in nonspeech])
    items = speech_items(speech)
    found = {name: find_audio([folder]) for name, folder in folders.items()}  # before hours of decoding
    reader = Reader(progress)
    spoken, their_files = read_speech(items, speech, max_seconds, reader, language)
    sounds = read_sounds(folders, found, their_files, max_seconds, reader)
    reader.report()
    for kind, clips, where in (
        ("speech", spoken, str(speech)),
        ("non-speech", sounds, ", ".join(str(folder) for folder in folders.values())),
    ):
        _check_enough(kind, clips, where, reader)
    sides = list(zip(_split(spoken, shares, seed), _split(sounds, shares, seed), strict=True))
    counts = {
        name: {
            "speech": len(talk),
            "speech_groups": len({clip.group for clip in talk}),
            "nonspeech": len(rest),
            "nonspeech_groups": len({clip.group for clip in rest}),
        }
        for name, (talk, rest) in zip(("training", "validation", "test"), sides, strict=True)
    }
    counts["left_out"] = dict(reader.left_out)
    return Splits(
        _training(*sides[0], seed),
        _sets(*sides[1], seed),
        _sets(*sides[2], seed),
        counts,
        reader.fingerprint(),
    )


def _check_arguments(nonspeech: Sequence[Path | str], shares: Sequence[float], max_seconds: float) -> None:
    if isinstance(nonspeech, (str, Path)) or not nonspeech:
        raise UsageError(
            f"non-speech is {nonspeech!r}: expected at least one folder of recordings, in a list"
        )
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise UsageError(f"shares are {tuple(shares)}: expected three numbers above 0 that add up to 1")
    if not MIN_SECONDS < max_seconds <= WINDOW_SECONDS:
        raise UsageError(f"max_seconds is {max_seconds}: expected more than {MIN_SECONDS}, at most 30")


def _set_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Set name -> folder. Names are unique and never those of sets of speech."""
    named: dict[str, Path] = {}
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; expected a folder of non-speech recordings")
        base = folder.name or "nonspeech"
        base = f"nonspeech_{base}" if base.startswith(("speech", "real_speech")) else base
        name, number = base, 1
        while name in named:
            number += 1
            name = f"{base}_{number}"
        named[name] = folder
    return named


# -- splitting


def _check_enough(kind: str, clips: Sequence[Clip], where: str, reader: Reader) -> None:
    groups = len({clip.group for clip in clips})
    left_out = ", ".join(reader.described(reason) for reason in sorted(reader.left_out))
    note = f" (left out of all kinds: {left_out})" if left_out else ""
    if len(clips) < MIN_CLIPS:
        raise UsageError(
            f"{where}: {len(clips)} usable recordings of {kind}{note}; expected at least {MIN_CLIPS}, "
            "100 or more give narrower intervals"
        )
    if groups < len(SPLITS):
        what = "speakers or files" if kind == "speech" else "files or sources"
        raise UsageError(
            f"{where}: the {len(clips)} recordings of {kind} come from {groups} {what}, which cannot be "
            f"in several splits; expected at least {len(SPLITS)} {what}"
        )


def _rank(seed: int, group: str) -> str:
    return hashlib.sha256(f"{seed}:{group}".encode()).hexdigest()


def _split(clips: Sequence[Clip], shares: Sequence[float], seed: int) -> list[list[Clip]]:
    """The clips of training, validation and test."""
    side = _sides(clips, shares, seed)
    return [
        [replace(clip, split=split) for clip in clips if side[clip.group] == number]
        for number, split in enumerate(SPLITS)
    ]


def _sides(clips: Sequence[Clip], shares: Sequence[float], seed: int) -> dict[str, int]:
    """Group -> 0 (training), 1 (validation) or 2 (test); every split gets at least one of three groups.

    Groups are dealt out in the order of their hashes, each to the split that lacks most of its share of the
    recordings. Every set is dealt out by itself, so that each split gets some of it; sets of fewer than
    three groups are dealt out together.
    """
    by_set: dict[str, Counter[str]] = {}
    for clip in clips:  # a file belongs to one set
        by_set.setdefault(clip.category, Counter())[clip.group] += 1
    small = Counter[str]()
    for name in [name for name, groups in by_set.items() if len(groups) < len(shares)]:
        small.update(by_set.pop(name))
    side: dict[str, int] = {}
    for groups in (*by_set.values(), small):
        side.update(_dealt(groups, shares, seed))
    return side


def _dealt(groups: Mapping[str, int], shares: Sequence[float], seed: int) -> dict[str, int]:
    total = sum(groups.values())
    lacks = [share * total for share in shares]
    side: dict[str, int] = {}
    for group in sorted(groups, key=partial(_rank, seed)):
        side[group] = int(np.argmax(lacks))
        lacks[side[group]] -= groups[group]
    members = [[group for group in side if side[group] == number] for number in range(len(shares))]
    if len(groups) >= len(shares):
        for number, mine in enumerate(members):
            if not mine:  # from the split with most groups its smallest one
                giver = max(members, key=len)
                moved = min(giver, key=lambda group: groups[group])
                giver.remove(moved)
                mine.append(moved)
                side[moved] = number
    return side


# -- clips


def _sets(speech: Sequence[Clip], sounds: Sequence[Clip], seed: int) -> dict[str, list[Clip]]:
    """The evaluation sets of a split."""
    sets = {SPEECH: list(speech), SPEECH_NOISY: [_noisy(clip, sounds, seed) for clip in speech]}
    for clip in sounds:
        sets.setdefault(clip.category, []).append(clip)
    return sets


def _noisy(clip: Clip, sounds: Sequence[Clip], seed: int) -> Clip:
    """The clip under one of `sounds`, which one being decided by its id."""
    noise = sounds[int(_rank(seed, clip.id), 16) % len(sounds)]
    return replace(
        clip,
        id=f"{clip.id}#noisy",
        category=SPEECH_NOISY,
        source=f"{clip.source} with {noise.id} at {NOISY_SNR_DB:g} dB",
        audio=partial(_mixed, clip, noise),
    )


def _mixed(clip: Clip, noise: Clip) -> np.ndarray:
    audio = augmentation.mix_at_snr(clip.load(), noise.load(), NOISY_SNR_DB)
    return augmentation.at_peak(audio, 0.95) if np.abs(audio).max(initial=0.0) > 1 else audio


def _training(speech: Sequence[Clip], sounds: Sequence[Clip], seed: int) -> list[TrainingClip]:
    """Non-speech as it is; speech clean and in one of VARIANTS, with that non-speech as background; all clean
    speech and every second of the others once more over a telephone."""
    clips = [
        TrainingClip(clip.id, "nonspeech", clip.category, partial(_silent, clip), clip.group or clip.id)
        for clip in sounds
    ]
    for number, clip in enumerate(speech):
        condition, group = VARIANTS[number % len(VARIANTS)], clip.group or clip.id
        for name, heard_as in ((clip.id, "clean"), (f"{clip.id}#{condition}", condition)):
            make = partial(_variant, clip, heard_as, sounds, seed)
            clips.append(TrainingClip(name, clip.kind, heard_as, make, group))
    return clips + some_over_telephone(clips, seed)


def _silent(clip: Clip) -> tuple[np.ndarray, Intervals]:
    return clip.load(), ()


def _variant(clip: Clip, condition: str, sounds: Sequence[Clip], seed: int) -> tuple[np.ndarray, Intervals]:
    """(audio, when somebody speaks): the same at every call."""
    rng = np.random.default_rng(int(_rank(seed, f"{clip.id}#{condition}")[:16], 16))

    def noise(_seconds: float) -> np.ndarray:  # mixing repeats what is too short
        return sounds[int(rng.integers(len(sounds)))].load()

    return make_variant(clip.load(), condition, rng, noise, REAL_SPEECH_DB)

"""Clips and their splits: the synthetic evaluation sets, and real recordings described by manifest.csv files.

A split is decided by a hash of the sentence (synthetic speech) or of the group, i.e. the speaker or the
source recording (real clips), so that no speaker, recording or sentence is on two sides.

    python -m calibration.corpus --data ../shared/data --out out/corpus    # real training clips as shards
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from calibration import augmentation, grammar, noises, synthesis
from whisper_steer.errors import AudioError, UsageError

RATE = 16_000
SPLITS = ("train", "calibration", "test")
NON_SPEECH = noises.CATEGORIES
EVAL_VERSION = 1  # raise when a change below changes the clips
_HUMAN_SOUNDS = {"baby_cry", "person_sneeze", "applause"}


@dataclass(frozen=True)
class Clip:
    """One recording.

    kind: "speech" (synthetic), "real_speech" or "nonspeech"; category: the evaluation set it belongs to.
    speech_intervals: (start, end) in seconds of every utterance, None when unknown. `load()` gives float32
    (n,), 16 kHz.
    """

    id: str
    kind: str
    category: str
    split: str
    text: str | None = None
    group: str = ""
    source: str = "synthetic"
    voice: str | None = None
    path: str | None = None
    speech_intervals: tuple[tuple[float, float], ...] | None = None
    audio: Callable[[], np.ndarray] = field(
        repr=False, compare=False, default=lambda: np.zeros(0, np.float32)
    )

    def load(self) -> np.ndarray:
        return self.audio()


# -- real recordings
# --------------------------------------------------------------------------------------------------


def split_of_group(group: str) -> str:
    """60 % train, 20 % calibration, 20 % test, by hash."""
    bucket = int.from_bytes(hashlib.sha256(f"whisper-steer:{group}".encode()).digest()[:4], "big") % 100
    return "train" if bucket < 60 else "calibration" if bucket < 80 else "test"


def _kind_and_category(name: str, row: dict[str, str]) -> tuple[str, str] | None:
    if name in ("speech", "digits"):
        return ("real_speech", "real_speech") if row["transcript"].strip() else None
    if name == "sounds":
        if row["speech_risk"] != "no":  # "yes" and "unknown" may hold words
            return None
        return "nonspeech", "human" if row["label"] in _HUMAN_SOUNDS else "sounds"
    if name == "music":
        return ("nonspeech", "music") if row["vocals"] != "yes" else None
    return "nonspeech", "human"


def _loader(path: Path) -> Callable[[], np.ndarray]:
    def load() -> np.ndarray:
        from whisper_steer.audio import load_audio

        return load_audio(path)

    return load


def _sentence_case(text: str) -> str:
    """LibriSpeech is upper case without punctuation; Whisper writes sentences."""
    text = " ".join(text.split())
    if text.isupper() or text.islower():
        text = text.capitalize()
    return text if text[-1] in ".?!" else text + "."


def real_clips(data_dir: Path | str | None, split: str) -> list[Clip]:
    """The real clips of `split` under `data_dir` (folders speech, digits, sounds, music, vocal with a
    manifest.csv each); an empty list when data_dir is None or holds none of them."""
    if data_dir is None:
        return []
    clips = []
    for name in ("speech", "digits", "sounds", "music", "vocal"):
        manifest = Path(data_dir) / name / "manifest.csv"
        if not manifest.is_file():
            continue
        with manifest.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                what = _kind_and_category(name, row)
                group = row["group"] or row["source_path"] or row["file"]
                if what is None or split_of_group(group) != split:
                    continue
                path = manifest.parent / row["file"]
                text = _sentence_case(row["transcript"]) if what[0] == "real_speech" else None
                clips.append(
                    Clip(
                        f"{name}/{row['file']}",
                        *what,
                        split,
                        text,
                        group,
                        row["source"],
                        row["speaker"] or None,
                        str(path),
                        None,
                        _loader(path),
                    )
                )
    return clips


def write_real_shards(data_dir: Path, out: Path) -> None:
    """The real training clips as shards realspeech_000 and realnonspeech_000 beside the synthetic ones;
    unreadable files are listed and left out."""
    kept: dict[str, list[tuple[dict, np.ndarray]]] = {"real_speech": [], "nonspeech": []}
    for clip in tqdm(real_clips(data_dir, "train"), unit="clip", file=sys.stderr):
        try:
            audio = clip.load()[: 29 * RATE]
        except AudioError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        record = {"category": clip.category, "generator": clip.source, "text": clip.text, "id": clip.id}
        kept[clip.kind].append((record, audio))
    out.mkdir(parents=True, exist_ok=True)
    for kind, clips in kept.items():
        name = "realspeech" if kind == "real_speech" else "realnonspeech"
        synthesis.write_shard(out / f"{name}_000.jsonl", clips)
        print(f"{out / name}_000: {len(clips)} clips, {sum(len(a) for _, a in clips) / RATE / 60:.1f} min")


# -- synthetic evaluation sets
# ----------------------------------------------------------------------------------------

# set -> clips (full, quick)
_SIZES = {
    "speech": (320, 96),
    "speech_new_voice": (96, 32),
    "speech_noisy": (192, 64),
    "speech_quiet": (64, 32),
    "speech_whispered": (64, 32),
    "speech_reverb": (64, 32),
    "speech_sparse": (64, 32),
    "noise": (120, 40),
    "tones": (80, 30),
    "music": (60, 25),
    "sounds": (80, 30),
    "human": (70, 30),
    "speech_telephone": (64, 32),
}
# made by a process of their own, in the order they came to be: the sets before them stay as they are
_LATER = ("speech_telephone",)
REAL_TELEPHONE = "real_telephone"
EVAL_SETS = (*_SIZES, "real_speech", REAL_TELEPHONE)  # all that there can be
SPEECH_SETS = tuple(name for name in _SIZES if name.startswith("speech"))


def _speech_clip(name: str, index: int, split: str, rng: random.Random) -> tuple[dict, np.ndarray]:
    noise_rng = np.random.default_rng(rng.getrandbits(63))
    if name == "speech_whispered":
        voice = synthesis.draw_voice(rng, synthesis.WHISPERED)
    elif name == "speech_new_voice":
        voice = synthesis.draw_voice(rng, synthesis.UNSEEN_VARIANTS)
    else:
        voice = synthesis.draw_voice(rng, (synthesis.VARIANTS[index % len(synthesis.VARIANTS)],))
    sparse = name == "speech_sparse"
    text = grammar.short_utterance(rng) if sparse else synthesis.draw_sentence(rng, split)
    speech = synthesis.speak(text, voice).audio
    speech = augmentation.at_peak(speech, min(0.9, float(np.abs(speech).max())))
    lead, tail = (rng.uniform(0.5, 26), 0.0) if sparse else (rng.uniform(0, 0.4), rng.uniform(0, 0.6))
    total = 30 * RATE if sparse else int((lead + tail) * RATE) + len(speech)
    first = min(int(lead * RATE), total - len(speech))
    audio = np.zeros(total, np.float32)
    audio[first : first + len(speech)] = speech
    detail = ""
    if name == "speech_noisy":
        category, snr = rng.choice(("noise", "noise", "music", "sounds")), rng.uniform(0, 10)
        kind, noise = noises.non_speech(category, total / RATE, noise_rng)
        audio, detail = augmentation.mix_at_snr(audio, noise, snr), f"{kind} at {snr:.1f} dB"
    elif name == "speech_quiet":
        audio = audio * np.float32(10 ** rng.uniform(-3, -1.5))
        audio += (noise_rng.standard_normal(total) * np.abs(audio).max() * 10**-2.2).astype(np.float32)
    elif name == "speech_reverb":
        audio = augmentation.reverberate(audio, noise_rng, (0.4, 1.1))
    elif name == "speech_telephone":
        audio = augmentation.telephone(audio, noise_rng)
    elif sparse:
        audio += (noise_rng.standard_normal(total) * rng.choice((0, 1e-4, 1e-3))).astype(np.float32)
    interval = [round(first / RATE, 3), round((first + len(speech)) / RATE, 3)]
    record = {
        "id": f"{name}/{index:04d}",
        "text": text,
        "voice": voice.name,
        "intervals": [interval],
        "detail": detail,
    }
    return record, augmentation.at_peak(audio, 0.95) if np.abs(audio).max() > 1 else audio


def _make_set(name: str, split: str, quick: bool) -> list[tuple[dict, np.ndarray]]:
    seed = int.from_bytes(hashlib.sha256(f"{EVAL_VERSION}:{split}:{name}".encode()).digest()[:6], "big")
    rng = random.Random(seed)
    clips = []
    for index in range(_SIZES[name][quick]):
        if name in SPEECH_SETS:
            clips.append(_speech_clip(name, index, split, rng))
        else:
            noise_rng = np.random.default_rng(rng.getrandbits(63))
            kind, audio = noises.non_speech(name, rng.choice((1.0, 3.0, 5.0, 8.0, 12.0, 20.0)), noise_rng)
            clips.append(({"id": f"{name}/{index:04d}", "text": None, "detail": kind}, audio))
    return clips


def main_eval(folder: str, split: str, quick: str, marker: str, *names: str) -> None:
    """Entry of the processes that `eval_sets` starts: writes the sets, then the marker."""
    for name in names:
        synthesis.write_shard(Path(folder) / f"{name}_000.jsonl", _make_set(name, split, quick == "1"))
    (Path(folder) / marker).write_text("1\n")


def _make_missing(folder: Path, split: str, quick: bool) -> None:
    # fresh processes, because espeak-ng keeps state from clip to clip
    code = "import sys; from calibration.corpus import main_eval; main_eval(*sys.argv[1:])"
    first = [name for name in _SIZES if name not in _LATER]
    for marker, names in (("complete", first), *((f"complete-{name}", [name]) for name in _LATER)):
        if not (folder / marker).exists():
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-c", code, str(folder), split, str(int(quick)), marker, *names]
            subprocess.run(command, check=True)


def _over_telephone(clip: Clip) -> Clip:
    def load() -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(clip.id.encode()))
        return augmentation.telephone(clip.load(), rng)

    return replace(
        clip,
        id=f"{clip.id}#telephone",
        category=REAL_TELEPHONE,
        source=f"{clip.source} over a telephone",
        audio=load,
    )


def cache_dir() -> Path:
    """Where generated evaluation audio is kept: $WHISPER_STEER_CACHE, else ~/.cache/whisper-steer."""
    return Path(os.environ.get("WHISPER_STEER_CACHE") or Path.home() / ".cache" / "whisper-steer")


def _synthetic_set(folder: Path, name: str, split: str) -> Iterator[Clip]:
    shards = synthesis.Shards.open(folder, name)
    for index, record in enumerate(shards.records):
        intervals = tuple((start, end) for start, end in record.get("intervals", ()))
        yield Clip(
            record["id"],
            "speech" if name in SPEECH_SETS else "nonspeech",
            name,
            split,
            record["text"],
            record["id"],
            f"synthetic {record['detail']}".strip(),
            record.get("voice"),
            None,
            intervals,
            lambda index=index: shards.audio(index),  # type: ignore[misc]
        )


def eval_sets(split: str, data_dir: Path | str | None = None, quick: bool = False) -> dict[str, list[Clip]]:
    """The evaluation sets of `split` ("calibration" or "test"), by name.

    Synthetic: speech (every training voice, unseen sentences), speech_new_voice (unseen timbres),
    speech_noisy (noise or music at 0-10 dB SNR), speech_quiet, speech_whispered, speech_reverb,
    speech_sparse (two words in 30 s of silence), speech_telephone, and the non-speech categories noise,
    tones, music, sounds, human. With data_dir, real clips of the split join music, sounds and human, and
    real_speech appears, every second clip of it once more as real_telephone.
    quick: about a third of the clips. Generated once, by a fresh process, and cached.
    """
    if split not in ("calibration", "test"):
        raise UsageError(f"split is {split!r}: expected 'calibration' or 'test'")
    folder = cache_dir() / f"eval-v{EVAL_VERSION}" / (split + ("-quick" if quick else ""))
    _make_missing(folder, split, quick)
    sets = {name: list(_synthetic_set(folder, name, split)) for name in _SIZES}
    real = real_clips(data_dir, split)
    if quick:
        random.Random(0).shuffle(real)
    for name in ("real_speech", *NON_SPEECH):
        chosen = [clip for clip in real if clip.category == name]
        chosen = chosen[:40] if quick else chosen
        if chosen:
            sets[name] = sets.get(name, []) + chosen
    if recorded := sets.get("real_speech"):
        sets[REAL_TELEPHONE] = [_over_telephone(clip) for clip in recorded[::2]]
    return sets


def describe(sets: dict[str, list[Clip]]) -> dict[str, dict[str, object]]:
    """name -> number of clips, of real ones, and a hash of their ids: what a card records."""
    return {
        name: {
            "clips": len(clips),
            "real": sum(clip.path is not None for clip in clips),
            "sha256": hashlib.sha256(json.dumps([clip.id for clip in clips]).encode()).hexdigest()[:16],
        }
        for name, clips in sets.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepares real training clips as shards.")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with speech/, sounds/, music/, vocal/, digits/"
    )
    parser.add_argument("--out", type=Path, default=Path("out/corpus"))
    options = parser.parse_args()
    write_real_shards(options.data, options.out)


if __name__ == "__main__":
    main()

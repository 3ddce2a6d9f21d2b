"""The synthetic corpus behind the bundled model: spoken sentences with exact word and phoneme times, and
non-speech.

    python -m calibration.synthesis --out out/corpus --utterances 40000 --workers 2

writes shards (16-bit samples back to back, one JSON line a clip). A finished shard is kept: after a kill,
the same command goes on. Every shard is made by a fresh process from its own seed, so the corpus does not
depend on the number of workers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from calibration import grammar, noises
from calibration.espeak import SAMPLING_RATE, Utterance, Voice, speak

ACCENTS = (
    "en-us",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
)
VARIANTS = (
    "",
    "m1",
    "m2",
    "m3",
    "m4",
    "m5",
    "m6",
    "m7",
    "m8",
    "f1",
    "f2",
    "f3",
    "f4",
    "f5",
    "klatt",
    "klatt2",
    "klatt3",
    "klatt4",
    "klatt5",
    "klatt6",
    "Andy",
    "Alex",
    "Annie",
    "steph",
    "adam",
    "linda",
    "Alicia",
    "Hugo",
    "Lee",
    "Gene",
    "john",
    "rob",
)
WHISPERED = ("whisper", "whisperf")
UNSEEN_VARIANTS = ("Storm", "Michael", "belinda", "edward", "Marco", "paul")  # never in training
WHISPERED_SHARE = 0.06
SPEECH_SHARD, NON_SPEECH_SHARD = 2000, 500


def split_of(sentence: str) -> str:
    """The split a sentence belongs to, by its hash: 90 % train, 5 % calibration, 5 % test."""
    bucket = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 90 else "calibration" if bucket < 95 else "test"


def draw_voice(rng: random.Random, variants: tuple[str, ...] | None = None) -> Voice:
    """A random accent, timbre, rate (130..205 words a minute) and pitch (25..75)."""
    if variants is None:
        variants = WHISPERED if rng.random() < WHISPERED_SHARE else VARIANTS
    return Voice(
        rng.choice(ACCENTS),
        rng.choice(variants),
        rng.randint(130, 205),
        rng.randint(25, 75),
        rng.randint(30, 70),
    )


def draw_sentence(rng: random.Random, split: str) -> str:
    """A sentence of `split`."""
    while True:
        text = grammar.sentence(rng)
        if split_of(text) == split:
            return text


@dataclass(frozen=True)
class Shards:
    """The clips of one kind in a corpus folder: `samples[i]` is int16 (n,), `records[i]` its JSON line."""

    records: list[dict]
    memory: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.records)

    def audio(self, index: int) -> np.ndarray:
        """float32 (n,), 16 kHz, -1..1."""
        record = self.records[index]
        clip = self.memory[record["shard"]][record["offset"] : record["offset"] + record["samples"]]
        return clip.astype(np.float32) / 32768

    @classmethod
    def open(cls, folder: Path, kind: str, in_memory: bool = False) -> Shards:
        """kind: "speech", "nonspeech", "realspeech", ... in_memory reads every sample now: random access to a
        cold mapped file would wait for the disk. Raises FileNotFoundError when the folder holds none."""
        indices = sorted(folder.glob(f"{kind}_[0-9]*.jsonl"))
        if not indices:
            raise FileNotFoundError(
                f"{folder} holds no {kind} shards: run python -m calibration.synthesis --out {folder}"
            )
        records: list[dict] = []
        memory: list[np.ndarray] = []
        for shard, index in enumerate(indices):
            samples = index.with_suffix(".i16")
            memory.append(np.fromfile(samples, np.int16) if in_memory else np.memmap(samples, np.int16, "r"))
            with index.open() as lines:
                records.extend(json.loads(line) | {"shard": shard} for line in lines)
        return cls(records, memory)


def _record(utterance: Utterance, text: str, voice: Voice) -> dict:
    return {
        "text": text,
        "voice": voice.name,
        "rate": voice.rate,
        "pitch": voice.pitch,
        "range": voice.pitch_range,
        "words": [[position, round(start, 3)] for position, start in utterance.words],
        "phonemes": [[name, round(start, 3)] for name, start in utterance.phonemes],
    }


def write_shard(path: Path, clips: list[tuple[dict, np.ndarray]]) -> None:
    """Writes clips (record, float32 samples) as `path` (.jsonl) and its .i16 neighbour, atomically."""
    offset, lines = 0, []
    with path.with_suffix(".i16.tmp").open("wb") as samples:
        for record, audio in clips:
            data = (np.clip(audio, -1, 1) * 32767).astype(np.int16)
            samples.write(data.tobytes())
            lines.append(json.dumps(record | {"offset": offset, "samples": len(data)}))
            offset += len(data)
    os.replace(path.with_suffix(".i16.tmp"), path.with_suffix(".i16"))
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("\n".join(lines) + "\n")
    os.replace(temporary, path)  # last: a shard exists when its index does


def make_speech_shard(path: Path, seed: int, count: int) -> float:
    """Writes `count` train sentences; returns their seconds."""
    rng, clips, seconds = random.Random(seed), [], 0.0
    for _ in range(count):
        voice = draw_voice(rng)
        text = grammar.short_utterance(rng) if rng.random() < 0.06 else draw_sentence(rng, "train")
        utterance = speak(text, voice)
        audio = utterance.audio / max(1.0, float(np.abs(utterance.audio).max()))
        clips.append((_record(utterance, text, voice), audio))
        seconds += len(audio) / SAMPLING_RATE
    write_shard(path, clips)
    return seconds


def make_non_speech_shard(path: Path, seed: int, count: int) -> float:
    """Writes `count` procedural clips of 2 to 10 s, the five categories in turn; returns their seconds."""
    rng, clips, seconds = np.random.default_rng(seed), [], 0.0
    for index in range(count):
        category = noises.CATEGORIES[index % len(noises.CATEGORIES)]
        name, audio = noises.non_speech(category, float(rng.uniform(2, 10)), rng)
        clips.append(({"category": category, "generator": name}, audio))
        seconds += len(audio) / SAMPLING_RATE
    write_shard(path, clips)
    return seconds


def _run(job: tuple[str, Path, int, int]) -> float:
    kind, path, seed, count = job
    return (make_speech_shard if kind == "speech" else make_non_speech_shard)(path, seed, count)


def synthesise(out: Path, utterances: int, non_speech: int, workers: int, seed: int) -> None:
    """Makes what is missing of the corpus in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    jobs = []
    for kind, total, size in (
        ("speech", utterances, SPEECH_SHARD),
        ("nonspeech", non_speech, NON_SPEECH_SHARD),
    ):
        for shard in range(-(-total // size)):
            path = out / f"{kind}_{shard:03d}.jsonl"
            if not path.exists():
                base = seed * 1_000_003 + shard + (500_000 if kind == "nonspeech" else 0)
                jobs.append((kind, path, base, min(size, total - shard * size)))
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, maxtasksperchild=1) as pool:
        seconds = 0.0
        for made in tqdm(pool.imap_unordered(_run, jobs), total=len(jobs), unit="shard", file=sys.stderr):
            seconds += made
    print(f"{out}: {len(jobs)} new shards, {seconds / 3600:.1f} h")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/corpus"))
    parser.add_argument("--utterances", type=int, default=40_000)
    parser.add_argument("--non-speech", type=int, default=3_000, help="procedural clips")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    synthesise(options.out, options.utterances, options.non_speech, options.workers, options.seed)


if __name__ == "__main__":
    main()

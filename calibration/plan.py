"""Which windows of audio a round of training looks at, and the audio in them.

Every window is a pure function of (seed, round, shard, index): any process, thread or machine that is asked
for it makes the same one, whatever it made before.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from calibration.augmentation import mix_at_snr
from calibration.manifests import declared_seconds, load_segment
from calibration.mixture import DOMAINS, AudioItem, Key, Mixture
from whisper_steer.errors import AudioError, UsageError

SAMPLE_RATE = 16_000
MAX_SAMPLES = 30 * SAMPLE_RATE  # Whisper's window
FRAME_SAMPLES = 320  # 20 ms
LONG = 120.0  # seconds; of a longer file only the drawn part is decoded
SURELY_SHORT = 200_000  # bytes; smaller files are not asked for their length
FAILURES_IN_A_ROW = 100  # then the audio is given up
ENOUGH_TRIED = 200  # from this many different items on, more failures than successes are an error


@dataclass(frozen=True)
class Window:
    """Audio of one forward pass.

    Attributes:
        audio: float32 (n,) at 16 kHz.
        pieces: (first sample, sample behind the last one, domain) of every clip in it, in order; between two
            of them is a pause of digital silence.
    """

    audio: np.ndarray
    pieces: tuple[tuple[int, int, str], ...]

    def frame_domains(self, n_frames: int, frame_samples: int = FRAME_SAMPLES) -> np.ndarray:
        """(n_frames,) uint8, index into DOMAINS: the clip in which the frame's middle lies, or, in a pause,
        the clip before it."""
        starts = np.array([start for start, _, _ in self.pieces])
        kinds = np.array([DOMAINS.index(domain) for _, _, domain in self.pieces], np.uint8)
        middles = np.arange(n_frames) * frame_samples + frame_samples // 2
        return kinds[np.searchsorted(starts, middles, side="right").clip(1) - 1]


class Skipped:
    """Items that could not be read, once each. Safe to use from several threads.

    Attributes:
        records: {"path", "dataset", "id", "reason"} in the order of their discovery.
    """

    def __init__(self) -> None:
        self.records: list[dict[str, str]] = []
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.records)

    def add(self, item: AudioItem, reason: str) -> None:
        path = item.path or f"{item.dataset}/{item.id}"
        with self._lock:
            if path in self._seen:
                return
            self._seen.add(path)
            self.records.append({"path": path, "dataset": item.dataset, "id": item.id, "reason": reason})

    def write(self, path: Path | str) -> None:
        """One JSON object a line; the file is replaced as a whole."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        with self._lock:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in self.records]
        temporary.write_text("".join(lines), encoding="utf-8")
        os.replace(temporary, path)


class _AudioCache:
    """Decoded audio as float16, as much as fits, and which items cannot be read.

    Clips come back in every round, and loading one may mean decoding or synthesising it.
    """

    def __init__(self, max_bytes: int, skipped: Skipped):
        self.skipped = skipped
        self._left = max_bytes
        self._kept: dict[Key, np.ndarray] = {}
        self._tried: set[Key] = set()
        self._failed: set[Key] = set()
        self._long: dict[Key, float | None] = {}
        self._lock = threading.Lock()

    def piece(self, key: Key, item: AudioItem, length: int, rng: np.random.Generator) -> np.ndarray | None:
        """float32 (at most `length`,): the item, or a random part of a longer one, so that its end is heard
        too; None if the item cannot be read.

        Raises AudioError: so many items cannot be read that something else must be wrong.
        """
        seconds = self._seconds_if_long(key, item)
        if seconds is not None and seconds * SAMPLE_RATE > length:
            # drawn whether it is used or not: what is known of an item must not change the draws behind it
            start = rng.uniform(0, seconds - length / SAMPLE_RATE)
            if key in self._failed:
                return None
            try:
                audio = load_segment(str(item.path), start, length / SAMPLE_RATE)
                with self._lock:
                    self._tried.add(key)
                return audio.astype(np.float16).astype(np.float32)
            except (AudioError, OSError):
                pass  # a header that does not tell the truth, or a file that is damaged there
        whole = self._whole(key, item)
        return None if whole is None else _piece(whole, length, rng)

    def _seconds_if_long(self, key: Key, item: AudioItem) -> float | None:
        if item.audio is not None or item.path is None:
            return None
        if key not in self._long:
            seconds = item.duration
            if seconds is None and _size(item.path) >= SURELY_SHORT:
                seconds = declared_seconds(item.path)
            self._long[key] = seconds if seconds is not None and seconds > LONG else None
        return self._long[key]

    def _whole(self, key: Key, item: AudioItem) -> np.ndarray | None:
        with self._lock:
            kept, failed = self._kept.get(key), key in self._failed
        if failed:
            return None
        if kept is not None:
            return kept.astype(np.float32)
        try:
            samples = np.asarray(item.load())
            if not len(samples):
                raise AudioError(f"{item.path or item.id}: holds no audio samples")
        except (AudioError, OSError) as error:
            self._fail(key, item, error)
            return None
        # rounded to float16 whether it is kept or not, so that the cache never changes a result
        audio = samples.astype(np.float16)
        with self._lock:
            self._tried.add(key)
            if key not in self._kept and audio.nbytes <= self._left:
                self._kept[key] = audio
                self._left -= audio.nbytes
        return audio.astype(np.float32)

    def _fail(self, key: Key, item: AudioItem, error: Exception) -> None:
        self.skipped.add(item, str(error))
        with self._lock:
            self._tried.add(key)
            self._failed.add(key)
            tried, failed = len(self._tried), len(self._failed)
        if tried >= ENOUGH_TRIED and failed > tried / 2:
            raise AudioError(
                f"{failed} of {tried} audio files cannot be read, "
                f"the first: {self.skipped.records[0]['reason']}"
            ) from error


class WindowPlan:
    """Draws the windows that rounds of SAE training look at.

    Most windows are filled with several clips in a row (short pauses between them), because a window with
    one short clip costs the same forward pass and is padding for the rest; the others hold one clip alone,
    so that frames near padding and in isolation are seen as well.

    Attributes:
        mixture, seed, packed_share, max_samples: as given.
        skipped: items that could not be read; others were drawn in their place.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        seed: int,
        packed_share: float = 0.75,
        max_samples: int = MAX_SAMPLES,
        cache_bytes: int = 512 * 2**20,
        workers: int = 0,
    ):
        """packed_share: share of packed windows (0..1). max_samples: length of a full window at 16 kHz.
        cache_bytes: memory for decoded audio. workers: threads that make windows ahead of their use; they
            change nothing but the speed.

        Raises UsageError: a value out of its range.
        """
        for name, value, low, high in (
            ("seed", seed, 0, None),
            ("packed_share", packed_share, 0, 1),
            ("max_samples", max_samples, FRAME_SAMPLES, None),
            ("cache_bytes", cache_bytes, 0, None),
            ("workers", workers, 0, None),
        ):
            if not (value >= low and (high is None or value <= high)):
                limit = f"at least {low}" if high is None else f"{low} to {high}"
                raise UsageError(f"{name} is {value}: expected {limit}")
        self.mixture, self.seed, self.packed_share = mixture, seed, packed_share
        self.max_samples, self.workers = max_samples, workers
        self.skipped = Skipped()
        self._cache = _AudioCache(cache_bytes, self.skipped)

    def settings(self) -> dict[str, Any]:
        """What decides the windows, as JSON-able values."""
        return {
            "mixture": self.mixture.settings(),
            "seed": self.seed,
            "packed_share": self.packed_share,
            "max_samples": self.max_samples,
        }

    def window(self, round_index: int, shard: int, index: int) -> Window:
        """The window number `index` of a shard of a round; the same at every call.

        Raises AudioError: FAILURES_IN_A_ROW items in a row cannot be read, or more than half of them all.
        """
        rng = np.random.default_rng([self.seed, round_index, shard, index])
        if rng.random() < self.packed_share:
            return self._packed(rng)
        audio, domain = self._draw(rng)
        return Window(audio, ((0, len(audio), domain),))

    def windows(self, round_index: int, shard: int = 0) -> Iterator[Window]:
        """Endless: window 0, 1, 2, ... of a shard of a round."""
        if not self.workers:
            return (self.window(round_index, shard, index) for index in count())
        return self._ahead(round_index, shard)

    def _ahead(self, round_index: int, shard: int) -> Iterator[Window]:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="window")
        try:
            made = (pool.submit(self.window, round_index, shard, index) for index in count())
            waiting: deque[Future[Window]] = deque(islice(made, 2 * self.workers))
            while True:
                yield waiting.popleft().result()
                waiting.append(next(made))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(
        self, rng: np.random.Generator, length: int, pick: Callable[[np.random.Generator], Key]
    ) -> tuple[np.ndarray, str]:
        """(at most `length` samples, domain) of the first item drawn by `pick` that can be read."""
        for _ in range(FAILURES_IN_A_ROW):
            key = pick(rng)
            item = self.mixture.item(key)
            audio = self._cache.piece(key, item, length, rng)
            if audio is not None:
                return audio, item.domain
        raise AudioError(
            f"{FAILURES_IN_A_ROW} drawn audio files in a row cannot be read, "
            f"the first: {self.skipped.records[0]['reason']}"
        )

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        audio, domain = self._read(rng, self.max_samples, self.mixture.pick)
        return self._augmented(audio, rng), domain

    def _augmented(self, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        wanted = self.mixture.augmentation
        if wanted is None:
            return audio
        for domain, probability in (
            ("sounds", wanted.noise_probability),
            ("music", wanted.music_probability),
        ):
            if rng.random() < probability:
                added, _ = self._read(rng, len(audio), partial(self.mixture.pick_addition, domain))
                audio = mix_at_snr(audio, added, rng.uniform(*wanted.snr_db))
        return audio

    def _packed(self, rng: np.random.Generator) -> Window:
        parts: list[np.ndarray] = []
        pieces: list[tuple[int, int, str]] = []
        total = 0
        while total < self.max_samples:
            pause = np.zeros(int(rng.integers(0, SAMPLE_RATE // 2)), dtype=np.float32)
            # loudness differs between clips; a window is normalised by its maximum, so level them roughly
            clip, domain = self._draw(rng)
            peak = float(np.abs(clip).max(initial=0.0))
            if peak > 0:
                clip = clip * np.float32(0.5 * 10 ** (-rng.uniform(0, 20) / 20) / peak)
            parts += [clip, pause]
            pieces.append((total, min(total + len(clip), self.max_samples), domain))
            total += len(clip) + len(pause)
        return Window(np.concatenate(parts)[: self.max_samples], tuple(pieces))


def _piece(audio: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    if len(audio) <= length:
        return audio
    start = int(rng.integers(len(audio) - length + 1))
    return audio[start : start + length]


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0

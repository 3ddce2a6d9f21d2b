"""Clips of the training split for SAEs and gates: clean and in the conditions that make speech hard to find.

Speech comes from the synthetic corpus (`python -m calibration.synthesis`) and, where a data folder is
given, from the real recordings of the training split. Every condition of the evaluation sets has its
counterpart here: noise and music at 0-10 dB, quiet, whispered, reverberant, two words in 30 s of (near)
silence, and on request a telephone line. When somebody speaks is known: it is measured on the clean signal
before anything is added (`active_intervals`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from calibration import augmentation, noises
from calibration.corpus import RATE, real_clips
from calibration.synthesis import Shards
from whisper_steer.errors import UsageError

Intervals = tuple[tuple[float, float], ...]
FRAME = 320  # samples in an encoder frame (20 ms)
SPEECH_DB = 35.0  # clean synthetic speech: frames down to this far below its loudest frame are speech
REAL_SPEECH_DB = 25.0  # real recordings have a noise floor: only frames well above it are surely speech
CONDITIONS = ("clean", "noisy", "quiet", "reverb", "sparse", "embedded", "clean", "noisy")  # in turn
WHISPERED_SHARE = 0.12
TELEPHONE = "telephone"
SNIPPETS = {"real_speech": 3, "nonspeech": 2}  # excerpts of every real recording
SNIPPET_SECONDS = (0.35, 1.6)  # a word
_SNIPPET_STARTS = 8  # places that are tried
_CORPUS = "corpus-"  # ids of clips of the synthetic corpus


@dataclass(frozen=True)
class TrainingClip:
    """A clip that knows when somebody speaks in it.

    Attributes:
        kind: "speech" (synthetic), "real_speech" or "nonspeech".
        condition: one of CONDITIONS, "whispered", TELEPHONE, or the category of a non-speech clip.
        make: gives (audio float32 (n,) at 16 kHz, speech intervals in seconds); the same at every call.
        group: the speaker or source recording of a real clip and of all that is made of it; "": not known.
    """

    id: str
    kind: str
    condition: str
    make: Callable[[], tuple[np.ndarray, Intervals]]
    group: str = ""

    def load(self) -> np.ndarray:
        return self.make()[0]

    @property
    def silence_is_certain(self) -> bool:
        """Whether nobody speaks outside the intervals; real recordings have soft speech that levels do not
        show.
        """
        return self.kind != "real_speech"


def frame_levels(audio: np.ndarray) -> np.ndarray:
    """Level of every 20 ms frame in dB relative to the loudest one; -inf where a frame is silent."""
    frames = audio[: len(audio) // FRAME * FRAME].reshape(-1, FRAME).astype(np.float64)
    power = (frames**2).mean(axis=1)
    top = power.max(initial=0.0)
    with np.errstate(divide="ignore"):
        return 10 * np.log10(power / top) if top > 0 else np.full(len(power), -np.inf)


def active_intervals(audio: np.ndarray, *, within_db: float = SPEECH_DB, bridge: float = 0.3) -> Intervals:
    """(start, end) in seconds where the level is within `within_db` of the loudest frame; gaps up to
    `bridge` s closed.
    """
    active = np.flatnonzero(frame_levels(audio) > -within_db)
    if not len(active):
        return ()
    breaks = np.flatnonzero(np.diff(active) > bridge * RATE / FRAME)
    starts = active[np.concatenate([[0], breaks + 1])]
    ends = active[np.concatenate([breaks, [len(active) - 1]])] + 1
    return tuple(
        (float(s * FRAME / RATE), float(e * FRAME / RATE)) for s, e in zip(starts, ends, strict=True)
    )


def _shifted(intervals: Intervals, seconds: float) -> Intervals:
    return tuple((start + seconds, end + seconds) for start, end in intervals)


def make_variant(
    speech: np.ndarray,
    condition: str,
    rng: np.random.Generator,
    noise: Callable[[float], np.ndarray],
    within_db: float = SPEECH_DB,
) -> tuple[np.ndarray, Intervals]:
    """Clean speech (n,) in a condition: (audio, intervals in seconds in which somebody speaks).

    noise: makes about that many seconds of non-speech. within_db: see `active_intervals`.
    """
    speech = speech[: 25 * RATE]
    intervals = active_intervals(speech, within_db=within_db)
    if condition == "clean":
        return speech * np.float32(10 ** rng.uniform(-1.0, 0)), intervals
    if condition == "noisy":
        return augmentation.mix_at_snr(speech, noise(len(speech) / RATE), rng.uniform(0, 15)), intervals
    if condition == "quiet":
        audio = speech * np.float32(10 ** rng.uniform(-3, -1.5))
        floor = float(np.abs(audio).max(initial=0.0)) * 10 ** rng.uniform(-3, -2.0)
        return audio + (rng.standard_normal(len(audio)) * floor).astype(np.float32), intervals
    if condition == "reverb":
        return augmentation.reverberate(speech, rng, (0.3, 1.1)), intervals
    if condition not in ("sparse", "embedded"):
        raise UsageError(
            f"condition is {condition!r}: expected one of {', '.join(dict.fromkeys(CONDITIONS))}"
        )
    # a short utterance somewhere in a long window of silence ("sparse") or of other sounds ("embedded")
    speech = speech[: 4 * RATE] if condition == "sparse" else speech
    intervals = tuple((s, min(e, len(speech) / RATE)) for s, e in intervals if s < len(speech) / RATE)
    total = 30 * RATE if condition == "sparse" else int(rng.uniform(8, 30) * RATE)
    total = max(total, len(speech) + FRAME)
    first = int(rng.integers(0, total - len(speech)))
    audio = np.zeros(total, np.float32)
    audio[first : first + len(speech)] = speech
    if condition == "sparse":
        audio += (rng.standard_normal(total) * rng.choice((0, 1e-4, 1e-3))).astype(np.float32)
    else:
        audio = augmentation.mix_at_snr(audio, noise(total / RATE), rng.uniform(3, 20))
    return audio, _shifted(intervals, first / RATE)


def training_clips(
    corpus: Path | None,
    data_dir: Path | None = None,
    *,
    speech: int = 600,
    nonspeech: int = 400,
    real: int = 600,
    seed: int = 0,
    telephone: bool = False,
) -> list[TrainingClip]:
    """Clips of the training split: at most `speech` and `nonspeech` synthetic ones, at most `real` real
    ones of each kind.

    corpus: folder of `calibration.synthesis`; data_dir: folder of real recordings. The same arguments give
        the same
    clips and the same audio. Real speech comes clean and, every second clip, in a condition too.

    Raises:
        UsageError: neither folder has anything.
    """
    rng = np.random.default_rng(seed)
    recorded = real_clips(data_dir, "train")
    real_speech = _some([clip for clip in recorded if clip.kind == "real_speech"], real, rng)
    real_other = _some([clip for clip in recorded if clip.kind == "nonspeech"], real, rng)
    backgrounds = [clip.audio for clip in real_other if clip.category in ("sounds", "music")]
    clips = [
        replace(_nonspeech(clip.id, clip.category, clip.audio), group=clip.group or clip.id)
        for clip in real_other
    ]
    if corpus is not None and any(corpus.glob("nonspeech_*.jsonl")):
        shards = Shards.open(corpus, "nonspeech")
        for index in _some(list(range(len(shards))), nonspeech, rng):
            category = shards.records[index]["category"]
            clips.append(_nonspeech(f"{_CORPUS}nonspeech/{index:06d}", category, _sample(shards, index)))
    if corpus is not None and any(corpus.glob("speech_*.jsonl")):
        clips += _synthetic_speech(Shards.open(corpus, "speech"), speech, rng, backgrounds, seed)
    for number, clip in enumerate(real_speech):
        conditions = {"clean": clip.id}
        if number % 2:
            condition = ("noisy", "embedded", "reverb", "quiet")[number // 2 % 4]
            conditions[condition] = f"{clip.id}#{condition}"
        for condition, name in conditions.items():
            made = _speech(name, "real_speech", condition, clip.audio, [seed, number], backgrounds)
            clips.append(replace(made, group=clip.group or clip.id))
    if telephone:
        clips += some_over_telephone(clips, seed)
    if not clips:
        raise UsageError(
            f"no training clips in corpus {corpus} or data {data_dir}: "
            "make a corpus with python -m calibration.synthesis --out out/corpus, or give --data"
        )
    return clips


def is_synthetic(clip: TrainingClip) -> bool:
    """Is it made from the synthetic corpus?"""
    return clip.id.startswith(_CORPUS)


def some_over_telephone(clips: Sequence[TrainingClip], seed: int = 0) -> list[TrainingClip]:
    """All clean real speech, which is scarce and varied, and every second of the other clips as they are
    heard at the other end of a telephone line."""
    people = [clip for clip in clips if clip.kind == "real_speech" and clip.condition == "clean"]
    others = [clip for clip in clips if clip.kind != "real_speech" or clip.condition != "clean"]
    return [_over_telephone(clip, seed) for clip in (*people, *others[::2])]


def some_altered(clips: Sequence[TrainingClip], seed: int = 0) -> list[TrainingClip]:
    """Every real recording, for they are scarce, once more as another might have sounded: at 80 to 125 %
    of its speed and another level; sounds with another mixed in, speech with one behind it or in a room."""
    sounds, people = _recorded(clips)
    return [_altered(clip, sounds, seed) for clip in (*sounds, *people)]


def some_snippets(clips: Sequence[TrainingClip], seed: int = 0) -> list[TrainingClip]:
    """Excerpts of a word's length of every real recording: key words and single digits are what is taken for
    noise most easily, and most recordings are of whole sentences. Of speech a place where most is loud. The
    second excerpt is played at 80 to 125 % of its speed, the last one comes over a telephone."""
    sounds, people = _recorded(clips)
    return [
        _snippet(clip, number, seed) for clip in (*sounds, *people) for number in range(SNIPPETS[clip.kind])
    ]


def clean_speech(clips: Sequence[TrainingClip]) -> list[TrainingClip]:
    """Of real speech the clips that are as they were recorded, and these over a telephone."""
    clean = {clip.id for clip in _recorded(clips)[1]}
    over_telephone = {f"{name}#{TELEPHONE}" for name in clean}
    return [clip for clip in clips if clip.id in clean | over_telephone]


def clean_sounds(clips: Sequence[TrainingClip]) -> list[TrainingClip]:
    """Real recordings without speech, as they were recorded."""
    return _recorded(clips)[0]


def _recorded(clips: Sequence[TrainingClip]) -> tuple[list[TrainingClip], list[TrainingClip]]:
    """Real recordings as they are: of non-speech, and of speech."""
    sounds = [
        clip
        for clip in clips
        if clip.kind == "nonspeech" and clip.condition != TELEPHONE and not is_synthetic(clip)
    ]
    return sounds, [clip for clip in clips if clip.kind == "real_speech" and clip.condition == "clean"]


def _altered(clip: TrainingClip, sounds: Sequence[TrainingClip], seed: int) -> TrainingClip:

    def make() -> tuple[np.ndarray, Intervals]:
        audio, intervals = clip.make()
        rng = np.random.default_rng([seed, zlib.crc32(clip.id.encode())])

        def played(audio: np.ndarray) -> tuple[np.ndarray, int]:
            percent = int(rng.integers(80, 126))
            return augmentation.at_speed(audio[: 30 * RATE], percent), percent

        x, percent = played(audio)
        other = sounds[int(rng.integers(len(sounds)))].load() if sounds else x[:0]
        if clip.kind == "nonspeech":
            x = augmentation.mix_at_snr(x, played(other)[0], rng.uniform(-5, 15))
        elif rng.random() < 0.5:
            x = augmentation.mix_at_snr(x, other, rng.uniform(5, 20))
        else:
            x = augmentation.reverberate(x, rng)
        x = x * np.float32(10 ** rng.uniform(-1, 0))
        slower = 100 / percent
        moved = [(start, slower * start, slower * end) for start, end in intervals]
        return x, tuple((new, end) for old, new, end in moved if max(old, new) < 30)

    return TrainingClip(f"{clip.id}#altered", clip.kind, "altered", make, clip.group)


def _snippet(clip: TrainingClip, number: int, seed: int) -> TrainingClip:

    def make() -> tuple[np.ndarray, Intervals]:
        audio = clip.load()
        rng = np.random.default_rng([seed, number, zlib.crc32(clip.id.encode())])
        size = int(rng.uniform(*SNIPPET_SECONDS) * RATE)
        if size < len(audio):
            loud = frame_levels(audio) > -REAL_SPEECH_DB
            starts = rng.integers(0, len(audio) - size, _SNIPPET_STARTS)
            shares = [float(loud[start // FRAME : (start + size) // FRAME].mean()) for start in starts]
            # of speech the loudest place; sounds may be anything
            start = int(starts[int(np.argmax(shares)) if clip.kind != "nonspeech" else 0])
            audio = audio[start : start + size]
        x = audio.astype(np.float32, copy=True)
        fade = min(80, len(x) // 4)  # 5 ms: no click where it was cut
        if fade:
            ramp = np.linspace(0, 1, fade, dtype=np.float32)
            x[:fade] *= ramp
            x[-fade:] *= ramp[::-1]
        if number == 1:
            x = augmentation.at_speed(x, int(rng.integers(80, 126)))
        lead, tail = int(rng.uniform(0, 0.3) * RATE), int(rng.uniform(0, 0.5) * RATE)
        x = np.pad(x, (lead, tail))
        found = active_intervals(x, within_db=REAL_SPEECH_DB) if clip.kind != "nonspeech" else ()
        if rng.random() < 0.5:  # the floor of a recorder
            floor = float(np.abs(x).max(initial=0.0)) * 10 ** rng.uniform(-4, -2.5)
            x = x + (rng.standard_normal(len(x)) * floor).astype(np.float32)
        if number == SNIPPETS[clip.kind] - 1:
            x = augmentation.telephone(x, rng)
        return x, found

    return TrainingClip(f"{clip.id}#snippet{number}", clip.kind, "snippet", make, clip.group)


def _over_telephone(clip: TrainingClip, seed: int) -> TrainingClip:

    def make() -> tuple[np.ndarray, Intervals]:
        audio, intervals = clip.make()
        rng = np.random.default_rng([seed, zlib.crc32(clip.id.encode())])
        return augmentation.telephone(audio, rng), intervals

    return TrainingClip(f"{clip.id}#{TELEPHONE}", clip.kind, TELEPHONE, make, clip.group)


def _some(items: list, count: int, rng: np.random.Generator) -> list:
    chosen = rng.permutation(len(items))[:count]
    return [items[index] for index in sorted(chosen.tolist())]


def _sample(shards: Shards, index: int) -> Callable[[], np.ndarray]:
    return lambda: shards.audio(index)


def _synthetic_speech(
    shards: Shards,
    count: int,
    rng: np.random.Generator,
    backgrounds: list[Callable[[], np.ndarray]],
    seed: int,
) -> list[TrainingClip]:
    whispered = [i for i, record in enumerate(shards.records) if "+whisper" in record["voice"]]
    other = [i for i, record in enumerate(shards.records) if "+whisper" not in record["voice"]]
    n_whispered = min(len(whispered), round(count * WHISPERED_SHARE))
    clips = []
    for number, index in enumerate(_some(other, count - n_whispered, rng)):
        condition, name = CONDITIONS[number % len(CONDITIONS)], f"{_CORPUS}speech/{index:06d}"
        clips.append(_speech(name, "speech", condition, _sample(shards, index), [seed, index], backgrounds))
    for index in _some(whispered, n_whispered, rng):
        name = f"{_CORPUS}speech/{index:06d}"
        clips.append(_speech(name, "speech", "whispered", _sample(shards, index), [seed, index], backgrounds))
    return clips


def _nonspeech(name: str, category: str, audio: Callable[[], np.ndarray]) -> TrainingClip:
    return TrainingClip(name, "nonspeech", category, lambda: (audio(), ()))


def _speech(
    name: str,
    kind: str,
    condition: str,
    clean: Callable[[], np.ndarray],
    seed: list[int],
    backgrounds: list[Callable[[], np.ndarray]],
) -> TrainingClip:
    def make() -> tuple[np.ndarray, Intervals]:
        rng = np.random.default_rng(seed)

        def noise(seconds: float) -> np.ndarray:
            if backgrounds and rng.random() < 0.5:
                return backgrounds[int(rng.integers(len(backgrounds)))]()
            # never "human": a cough over speech is fine to lose, but babble-like sounds would blur what is
            # labelled
            return noises.non_speech(
                str(rng.choice(("noise", "noise", "tones", "music", "sounds"))), seconds, rng
            )[1]

        shape = "clean" if condition == "whispered" else condition
        within = REAL_SPEECH_DB if kind == "real_speech" else SPEECH_DB
        return make_variant(clean(), shape, rng, noise, within)

    return TrainingClip(name, kind, condition, make)

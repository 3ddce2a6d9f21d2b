"""Training windows for the bundled Whisper: several utterances, noise, music and silence in one window,
with timestamps.

A batch is a function of (corpus, seed, step) alone, so a resumed training sees what an unbroken one would
have seen. Short windows (6.4 s, 15 s) are cheap; they are placed at a random position among the encoder's
1,500 so that every position is learnt, and real 30 s windows are in the mix from the first step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from whisper.audio import log_mel_spectrogram
from whisper.tokenizer import Tokenizer, get_tokenizer

from calibration import augmentation, grammar
from calibration.synthesis import Shards

RATE = 16_000
FRAME = 320  # samples in an encoder frame (20 ms)
N_CTX = 1500
IGNORE = -100
TIMESTAMP_STEP = 5  # targets are multiples of 0.1 s, so that 301 timestamp rows are trained instead of 1,501
SIZES = {"short": (320, 24), "medium": (750, 9), "full": (1500, 4)}  # frames in a window, windows in a batch

NON_SPEECH_SHARE, REAL_SPEECH_SHARE = 0.2, 0.06
_CAPTION_SHARE = {  # how often a clip of this kind carries words nobody said
    "silence": 0.55,
    "hum": 0.45,
    "fan": 0.45,
    "noise": 0.35,
    "tones": 0.2,
    "music": 0.5,
    "sounds": 0.3,
    "human": 0.35,
}


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that occur, and one shared row (the last) for every other token of the 51,864."""

    ids: tuple[int, ...]
    row_of: dict[int, int]

    @classmethod
    def of_corpus(cls, folder: Path) -> Vocabulary:
        """Every token of the corpus' sentences and captions, the special ones in use and the timestamps in
        steps of 0.1 s."""
        tokenizer = get_tokenizer(multilingual=False)
        texts = {text for _, text in grammar.CAPTIONS}
        for kind in ("speech", "realspeech"):
            if list(folder.glob(f"{kind}_[0-9]*.jsonl")):
                texts.update(record["text"] for record in Shards.open(folder, kind).records)
        ids = {token for text in sorted(texts) for token in tokenizer.encode(" " + text)}
        ids |= {tokenizer.sot, tokenizer.eot, tokenizer.no_speech, tokenizer.no_timestamps}
        ids |= set(range(tokenizer.timestamp_begin, tokenizer.timestamp_begin + 1501, TIMESTAMP_STEP))
        ordered = tuple(sorted(ids))
        return cls(ordered, {token: row for row, token in enumerate(ordered)})


def phoneme_inventory(folder: Path, at_least: int = 200) -> dict[str, int]:
    """Phoneme name -> class; class 0 is silence and non-speech, class 1 every rare phoneme."""
    counts: dict[str, int] = {}
    for record in Shards.open(folder, "speech").records:
        for name, _ in record["phonemes"]:
            counts[name] = counts.get(name, 0) + 1
    names = sorted(name for name, count in counts.items() if count >= at_least and name != "_")
    return {"_": 0, "rare": 1} | {name: index + 2 for index, name in enumerate(names)}


def token_times(
    text: str, words: list[list[float]], end: float, tokens: list[int], tokenizer: Tokenizer
) -> list[tuple[float, float]]:
    """(start, end) in seconds of every token of `text`: linear between the word times, which are
    (character, start)."""
    anchors_x = [float(position) for position, _ in words] + [float(len(text))]
    anchors_y = [start for _, start in words] + [end]
    characters = np.cumsum([len(tokenizer.decode([token])) for token in tokens])
    starts = np.interp(np.concatenate([[0], characters[:-1]]), anchors_x, anchors_y)
    ends = np.interp(characters - 1, anchors_x, anchors_y)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


@dataclass
class _Piece:
    """An utterance in a window: where it starts (s), how long it lasts (s), and its record."""

    start: float
    seconds: float
    record: dict


@dataclass
class _Window:
    audio: np.ndarray
    content: int  # samples; what follows is padding
    pieces: list[_Piece]
    non_speech: str | None = None  # category or generator
    cut: float | None = None  # start of a last utterance that runs over the end


class WindowDataset(Dataset):
    """`dataset[step]` is one batch:

    mel (batch, 80, 2 * frames) float32; offset (batch,): the encoder position of the first frame; tokens
    and targets (batch, length) rows of the vocabulary, -100 where no loss; spans (batch, length, 2): first
    and last frame of the word that the target token belongs to, -1 for none; phones (batch, frames):
    phoneme class, -100 where unknown.
    """

    def __init__(
        self, folder: Path, seed: int, steps: int, phases: list[tuple[float, tuple[float, float, float]]]
    ) -> None:
        """phases: (share of the steps until which it holds, probabilities of a short, medium and full
        batch)."""
        self.folder, self.seed, self.steps, self.phases = folder, seed, steps, phases
        self.vocabulary = Vocabulary.of_corpus(folder)
        self.phonemes = phoneme_inventory(folder)
        self.tokenizer = get_tokenizer(multilingual=False)
        self.speech = Shards.open(folder, "speech", in_memory=True)
        self.non_speech = [Shards.open(folder, "nonspeech", in_memory=True)]
        self.real_speech = None
        if list(folder.glob("realnonspeech_[0-9]*.jsonl")):
            self.non_speech.append(Shards.open(folder, "realnonspeech", in_memory=True))
            self.real_speech = Shards.open(folder, "realspeech", in_memory=True)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng([self.seed, step])
        progress = step / self.steps
        mix = next(mix for until, mix in self.phases if progress < until or until >= 1)
        frames, batch = SIZES[list(SIZES)[rng.choice(3, p=mix)]]
        samples = [self._sample(frames, rng) for _ in range(batch)]
        return self._collate(samples, frames)

    # -- one window
    # ---------------------------------------------------------------------------------------------------

    def _sample(self, frames: int, rng: np.random.Generator) -> dict:
        kind = rng.random()
        if kind < NON_SPEECH_SHARE:
            window = self._non_speech_window(frames, rng)
        elif kind < NON_SPEECH_SHARE + REAL_SPEECH_SHARE and self.real_speech is not None:
            window = self._real_speech_window(frames, rng)
        else:
            window = self._speech_window(frames, rng)
        offset = 0 if frames == N_CTX or rng.random() < 0.5 else int(rng.integers(0, N_CTX - frames + 1))
        tokens, spans = self._target(window, offset, rng)
        return {
            "mel": self._mel(window, frames, rng),
            "offset": offset,
            "tokens": tokens,
            "spans": spans,
            "phones": self._phones(window, frames),
        }

    def _some_noise(self, rng: np.random.Generator, seconds: float) -> tuple[dict, np.ndarray]:
        shards = self.non_speech[int(rng.integers(len(self.non_speech)))]
        index = int(rng.integers(len(shards)))
        audio = shards.audio(index)
        wanted = int(seconds * RATE)
        if len(audio) > wanted:
            first = int(rng.integers(0, len(audio) - wanted + 1))
            audio = audio[first : first + wanted]
        return shards.records[index], audio

    def _non_speech_window(self, frames: int, rng: np.random.Generator) -> _Window:
        room = frames * FRAME
        seconds = room / RATE if rng.random() < 0.4 else rng.uniform(0.6, room / RATE)
        record, clip = self._some_noise(rng, seconds)
        wanted = int(seconds * RATE)
        if len(clip) < wanted and rng.random() < 0.6:
            clip = np.tile(clip, -(-wanted // max(1, len(clip))))[:wanted]
        if rng.random() < 0.15:
            clip = augmentation.reverberate(clip, rng)
        if rng.random() < 0.15:
            clip = augmentation.mix_at_snr(clip, self._some_noise(rng, seconds)[1], rng.uniform(-5, 15))
        kind = record["generator"] if record["generator"] in _CAPTION_SHARE else record["category"]
        return _Window(self._distort(clip, rng), len(clip), [], kind)

    def _real_speech_window(self, frames: int, rng: np.random.Generator) -> _Window:
        assert self.real_speech is not None
        room = frames * FRAME / RATE
        for _ in range(50):
            index = int(rng.integers(len(self.real_speech)))
            seconds = self.real_speech.records[index]["samples"] / RATE
            if seconds < room - 0.1:
                break
        else:
            return self._speech_window(frames, rng)
        lead = rng.uniform(0, min(1.0, room - seconds))
        audio = np.concatenate([np.zeros(int(lead * RATE), np.float32), self.real_speech.audio(index)])
        if rng.random() < 0.4:
            audio = augmentation.mix_at_snr(audio, self._some_noise(rng, room)[1], rng.uniform(3, 30))
        return _Window(
            self._distort(audio, rng), len(audio), [_Piece(lead, seconds, self.real_speech.records[index])]
        )

    def _speech_window(self, frames: int, rng: np.random.Generator) -> _Window:
        room = frames * FRAME / RATE
        audio = np.zeros(frames * FRAME, np.float32)
        lead = rng.random()
        now = float(
            rng.uniform(0, 0.4)
            if lead < 0.55
            else rng.uniform(0, 2)
            if lead < 0.85
            else rng.uniform(0, room * 0.7)
        )
        limit = 1 if rng.random() < 0.3 else 99
        pieces: list[_Piece] = []
        cut = None
        while len(pieces) < limit:
            index = int(rng.integers(len(self.speech)))
            record = self.speech.records[index]
            seconds = record["samples"] / RATE
            if now + seconds > room:
                if pieces and frames == N_CTX and limit > 1 and room - now > 0.5 and rng.random() < 0.3:
                    cut = now
                    clip, first = self.speech.audio(index), int(now * RATE)
                    audio[first:] = clip[: len(audio) - first] * rng.uniform(0.4, 1)
                if pieces or cut is not None:
                    break
                now = 0.0
                if seconds > room:
                    continue
            clip, first = self.speech.audio(index), int(now * RATE)
            audio[first : first + len(clip)] = clip[: len(audio) - first] * rng.uniform(0.4, 1)
            pieces.append(_Piece(now, seconds, record))
            gap = rng.random()
            now += seconds + float(
                rng.uniform(0.05, 0.6)
                if gap < 0.7
                else rng.uniform(0.3, 2)
                if gap < 0.93
                else rng.uniform(1, room / 2)
            )
        end = int((pieces[-1].start + pieces[-1].seconds) * RATE)
        tail = rng.random()
        content = (
            len(audio)
            if cut is not None or tail < 0.3
            else min(len(audio), end + int(rng.uniform(0, 0.8) * RATE))
        )
        audio = audio[:content]
        if rng.random() < 0.55:
            snr = rng.uniform(0, 12) if rng.random() < 0.4 else rng.uniform(8, 35)
            audio = augmentation.mix_at_snr(audio, self._some_noise(rng, content / RATE)[1], snr)
        return _Window(self._distort(audio, rng), content, pieces, cut=cut)

    def _distort(self, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if rng.random() < 0.12:
            audio = augmentation.reverberate(audio, rng)
        if rng.random() < 0.08:
            audio = augmentation.limit_band(audio, rng)
        if rng.random() < 0.2:  # a faint room or a noisy pre-amplifier
            floor = np.abs(audio).max() * 10 ** rng.uniform(-4, -2)
            audio = audio + floor * rng.standard_normal(len(audio), dtype=np.float32)
        return (audio * 10 ** rng.uniform(-1.5, 0)).astype(np.float32)

    def _mel(self, window: _Window, frames: int, rng: np.random.Generator) -> torch.Tensor:
        """Whisper's log-mel of the window, padded as its runtimes pad: with zeros in the mel domain
        (openai-whisper, faster-whisper) or with silence before the transform (transformers)."""
        total = frames * 2
        audio = torch.from_numpy(window.audio)
        if rng.random() < 0.25:
            padded = torch.nn.functional.pad(audio, (0, max(0, frames * FRAME - len(audio))))
            return log_mel_spectrogram(padded)[:, :total]
        mel = log_mel_spectrogram(audio, padding=800)[:, : len(audio) // 160]
        return torch.nn.functional.pad(mel, (0, total - mel.shape[1]))

    # -- targets
    # ------------------------------------------------------------------------------------------------------

    def _timestamp(self, seconds: float, offset: int) -> int:
        step = round((seconds + offset * 0.02) / (0.02 * TIMESTAMP_STEP)) * TIMESTAMP_STEP
        return self.tokenizer.timestamp_begin + min(step, 1500)

    def _target(
        self, window: _Window, offset: int, rng: np.random.Generator
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens from <|startoftranscript|> to <|endoftext|>, and for each the frames of its word ((-1,
        -1): none)."""
        tokenizer, none = self.tokenizer, (-1, -1)
        tokens, spans = [tokenizer.sot], [none]

        def add(token: int, span: tuple[int, int] = none) -> None:
            tokens.append(token)
            spans.append(span)

        timestamps = rng.random() < 0.5
        if window.non_speech is not None and rng.random() >= _CAPTION_SHARE[window.non_speech]:
            add(tokenizer.no_speech)
        elif window.non_speech is not None:
            text = tokenizer.encode(" " + _caption(rng))
            end = self._timestamp(window.content / RATE, offset)
            start = tokenizer.timestamp_begin
            for token in [start, *text, end] if timestamps else [tokenizer.no_timestamps, *text]:
                add(token)
        else:
            if not timestamps:
                add(tokenizer.no_timestamps)
            for index, piece in enumerate(window.pieces):
                text = tokenizer.encode(" " + piece.record["text"])
                first, last = (
                    int(piece.start * RATE / FRAME),
                    int((piece.start + piece.seconds) * RATE / FRAME),
                )
                if timestamps:
                    start = self._timestamp(piece.start, offset)
                    if (
                        index == 0 and start - tokenizer.timestamp_begin > 50
                    ):  # Whisper's decoders allow at most 1 s here
                        start = tokenizer.timestamp_begin
                    add(start, (first, first + 5))
                if "words" in piece.record:
                    times = token_times(
                        piece.record["text"], piece.record["words"], piece.seconds, text, tokenizer
                    )
                    for token, (a, b) in zip(text, times, strict=True):
                        add(token, (int((piece.start + a) / 0.02), int((piece.start + b) / 0.02)))
                else:
                    for token in text:
                        add(token)
                if timestamps:
                    add(self._timestamp(piece.start + piece.seconds, offset), (max(0, last - 5), last))
            if window.cut is not None and timestamps:  # Whisper's way to say "goes on in the next window"
                add(self._timestamp(window.cut, offset))
        add(tokenizer.eot)
        return tokens, spans

    def _phones(self, window: _Window, frames: int) -> np.ndarray:
        phones = np.zeros(frames, np.int64)
        centres = (np.arange(frames) + 0.5) * 0.02
        for piece in window.pieces:
            inside = (centres >= piece.start) & (centres < piece.start + piece.seconds)
            if "phonemes" not in piece.record:
                phones[inside] = IGNORE
                continue
            starts = np.array([start for _, start in piece.record["phonemes"]])
            classes = np.array([self.phonemes.get(name, 1) for name, _ in piece.record["phonemes"]] + [0])
            phones[inside] = classes[np.searchsorted(starts, centres[inside] - piece.start, "right") - 1]
        if window.cut is not None:
            phones[centres >= window.cut] = IGNORE
        return phones

    def _collate(self, samples: list[dict], frames: int) -> dict[str, torch.Tensor]:
        length = max(len(sample["tokens"]) for sample in samples) - 1
        batch = len(samples)
        tokens = torch.full((batch, length), self.vocabulary.row_of[self.tokenizer.eot])
        targets = torch.full((batch, length), IGNORE)
        spans = torch.full((batch, length, 2), -1)
        for row, sample in enumerate(samples):
            rows = torch.tensor([self.vocabulary.row_of[token] for token in sample["tokens"]])
            tokens[row, : len(rows) - 1] = rows[:-1]
            targets[row, : len(rows) - 1] = rows[1:]
            spans[row, : len(rows) - 1] = torch.tensor(sample["spans"][1:]).clamp(max=frames - 1)
        return {
            "mel": torch.stack([sample["mel"] for sample in samples]),
            "offset": torch.tensor([sample["offset"] for sample in samples]),
            "tokens": tokens,
            "targets": targets,
            "spans": spans,
            "phones": torch.from_numpy(np.stack([sample["phones"] for sample in samples])),
        }


def _caption(rng: np.random.Generator) -> str:
    weights = np.array([weight for weight, _ in grammar.CAPTIONS])
    return grammar.CAPTIONS[int(rng.choice(len(weights), p=weights / weights.sum()))][1]


def save_inventory(path: Path, phonemes: dict[str, int]) -> None:
    """The phoneme classes of the auxiliary head, for the analysis tools."""
    path.write_text(json.dumps(phonemes, ensure_ascii=False, indent=1))

"""Does Whisper hallucinate on this clip? Three definitions, side by side, cached and resumable.

nsp  no_speech_prob < 0.5 (AudioSAE);
hr   openai-whisper's skip rule would keep the window: no_speech_prob < 0.6 or avg_logprob > -1.0;
text words come out of `whisper.transcribe` with its default options, after EnglishTextNormalizer.
nsp and hr look at the greedy decoding of the 30 s window(s); a clip counts if one of its windows does.

    python -m calibration.hallucinations --model mini.en --split calibration --out out/labels.jsonl

With --ray, the clips are decoded by several processes or machines (see `calibration.ray_jobs`); the file is
the same.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from calibration.command import run
from calibration.decoding import ClipTranscript, DecodedWindow, transcribe_clips
from calibration.evaluate import nonspeech_metrics, normalise, speech_metrics
from whisper_steer.errors import FormatError, UsageError

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip

logger = logging.getLogger("whisper_steer")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Labels:
    """What plain Whisper does with one clip.

    Attributes:
        no_speech_prob: lowest of the clip's 30 s windows, greedy.
        avg_logprob: highest of them.
        text: transcript as the runtime returns it.
        nsp, hr, text_fp: hallucinated (on non-speech) by each definition.
        transcript: the windows behind it.
    """

    no_speech_prob: float
    avg_logprob: float
    text: str
    nsp: bool
    hr: bool
    text_fp: bool
    transcript: ClipTranscript


def labels_of(transcript: ClipTranscript, language: str = "en") -> Labels:
    """The three labels of a transcript in a language (its code)."""
    return Labels(
        no_speech_prob=transcript.no_speech_prob,
        avg_logprob=transcript.avg_logprob,
        text=transcript.text,
        nsp=transcript.nsp,
        hr=transcript.hr,
        text_fp=bool(normalise(transcript.text, language)),
        transcript=transcript,
    )


def label(model: Whisper, audio: np.ndarray) -> Labels:
    """Labels of one clip at 16 kHz."""
    return labels_of(transcribe_clips(model, [audio])[0])


@dataclass(frozen=True)
class LabelledClip:
    """A line of a label file: the transcript of the clip `id` whose audio has the CRC-32 `crc`.

    new: it was computed, not found among the known ones.
    """

    id: str
    crc: int
    transcript: ClipTranscript
    new: bool = True

    def line(self) -> str:
        return json.dumps({"id": self.id, "crc": self.crc, "transcript": asdict(self.transcript)}) + "\n"


def iterate_labelled(
    model: Whisper,
    clips: Iterable[Clip],
    known: Mapping[tuple[str, int], ClipTranscript],
    *,
    batch: int = 8,
    language: str = "en",
) -> Iterator[list[LabelledClip]]:
    """The clips in groups, as they are finished: those in `known` (by id and CRC) at once, the others
    `batch` at a time. language: that they are decoded in.
    """
    waiting: list[tuple[Clip, np.ndarray, int]] = []

    def decoded() -> list[LabelledClip]:
        audios = [audio for _, audio, _ in waiting]
        transcripts = transcribe_clips(model, audios, batch=batch, language=language)
        return [
            LabelledClip(clip.id, crc, transcript)
            for (clip, _, crc), transcript in zip(waiting, transcripts, strict=True)
        ]

    for clip in clips:
        audio = np.ascontiguousarray(clip.load(), dtype=np.float32)
        crc = zlib.crc32(audio.tobytes())
        if (clip.id, crc) in known:
            yield [LabelledClip(clip.id, crc, known[clip.id, crc], new=False)]
            continue
        waiting.append((clip, audio, crc))
        if len(waiting) == batch:
            yield decoded()
            waiting.clear()
    if waiting:
        yield decoded()


def label_clips(
    model: Whisper,
    clips: Sequence[Clip],
    *,
    cache: Path | None = None,
    batch: int = 8,
    language: str = "en",
    progress: bool = True,
) -> dict[str, Labels]:
    """Labels by clip id. With `cache`, finished clips are appended to a JSON lines file and not computed
    again.

    A cached line counts only for the same audio (its CRC is stored) and the same encoder and decoder weights.
    language: code of what is spoken.

    Raises:
        UsageError: the cache was made with another model or in another language.
    """
    known = open_label_file(cache, model_crc(model), language) if cache is not None else {}
    labels: dict[str, Labels] = {}
    counted = tqdm(clips, desc="labels", unit="clip", disable=not progress)
    for group in iterate_labelled(model, counted, known, batch=batch, language=language):
        lines = "".join(done.line() for done in group if done.new)
        if cache is not None and lines:
            with cache.open("a", encoding="utf-8") as file:
                file.write(lines)
        labels |= {done.id: labels_of(done.transcript, language) for done in group}
    return labels


def model_crc(model: Whisper) -> int:
    """A checksum of all weights, to tell models apart (not a security measure)."""
    crc = 0
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_sparse:
            crc = zlib.crc32(tensor.detach().float().cpu().numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return crc


def label_header(crc: int, language: str = "en") -> str:
    """First line of a label file of the model whose `model_crc` is `crc`; it names other languages than
    English."""
    header = {"kind": "hallucination-labels", "format_version": FORMAT_VERSION, "model_crc": crc}
    if language != "en":
        header["language"] = language
    return json.dumps(header) + "\n"


def open_label_file(path: Path, crc: int, language: str = "en") -> dict[tuple[str, int], ClipTranscript]:
    """Transcripts by clip id and audio CRC. A missing file is begun, half a line at its end is cut off.

    Raises FormatError: not a label file. UsageError: made with another model than the one of `crc`, or in
    another language.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(label_header(crc, language), encoding="utf-8")
        return {}
    found, lines, intact = _read_lines(path)
    if found.get("model_crc") != crc:
        raise UsageError(f"{path} holds labels of another model: delete it or give another --out")
    if (made_in := found.get("language", "en")) != language:
        raise UsageError(
            f"{path} holds labels in the language {made_in}, not {language}: delete it or give another --out"
        )
    if intact < path.stat().st_size:
        # an interrupted run left half a line: cut it off, or the next line would be glued to it
        logger.warning("%s ends in an unfinished line; dropped", path)
        os.truncate(path, intact)
    return {(line["id"], line["crc"]): transcript_of(line["transcript"]) for line in lines}


def _read_lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """(header, lines, number of bytes up to the last complete line)."""
    raw = path.read_bytes()
    intact = raw.rfind(b"\n") + 1
    try:
        header, *lines = [json.loads(line) for line in raw[:intact].splitlines()]
    except ValueError as error:
        raise FormatError(f"{path} is not a label file: {error}. Delete it and label again") from error
    if not isinstance(header, dict) or header.get("kind") != "hallucination-labels":
        raise FormatError(f"{path} is not a label file: its first line has no kind 'hallucination-labels'")
    if header.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path} has label format {header.get('format_version')}, "
            f"this version reads {FORMAT_VERSION}: label again"
        )
    return header, lines, intact


def transcript_of(data: Mapping[str, Any]) -> ClipTranscript:
    """The transcript behind a line's "transcript"."""
    return ClipTranscript(
        text=data["text"],
        windows=tuple(DecodedWindow(**window) for window in data["windows"]),
        greedy=tuple((p, logprob) for p, logprob in data["greedy"]),
        seconds=data["seconds"],
        segments=tuple((start, end, text) for start, end, text in data.get("segments", ())),
    )


def summary(sets: Mapping[str, Sequence[Clip]], labels: Mapping[str, Labels]) -> list[dict[str, Any]]:
    """One row per set: WER and empty share for clips with a text, the three rates for the others."""
    rows: list[dict[str, Any]] = []
    for name, clips in sets.items():
        row: dict[str, Any] = {"set": name}
        if is_nonspeech(clips):
            row |= nonspeech_metrics([labels[clip.id].transcript.outcome() for clip in clips]).row()
        elif clips:
            row |= speech_metrics(
                [clip.text or "" for clip in clips], [labels[clip.id].text for clip in clips]
            ).row()
        rows.append(row)
    return rows


def is_nonspeech(clips: Iterable[Clip]) -> bool:
    """True if the set has clips and all of them are non-speech."""
    kinds = {clip.kind for clip in clips}
    return kinds == {"nonspeech"}


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of `summary` as two small tables."""
    for wanted in (
        ("text_fpr", "nsp_fpr", "hr", "words_per_min"),
        ("wer", "sub", "del", "ins", "empty_speech"),
    ):
        chosen = [row for row in rows if wanted[0] in row]
        if chosen:
            print(f"{'set':<16}{'clips':>7}" + "".join(f"{name:>24}" for name in wanted))
        for row in chosen:
            cells = "".join(
                f"{row[name]:>8.3f} [{row[name + '_lo']:.3f}, {row[name + '_hi']:.3f}]".rjust(24)
                for name in wanted
            )
            print(f"{row['set']:<16}{row['clips']:>7}{cells}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m calibration.hallucinations", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--model", default="mini.en", help="name or path (default: mini.en)")
    parser.add_argument("--split", default="calibration", choices=("train", "calibration", "test"))
    parser.add_argument(
        "--data", dest="data_dir", type=Path, default=None, help="folder with real recordings"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/labels.jsonl"), help="JSON lines file, also the cache"
    )
    parser.add_argument("--batch", type=int, default=8, help="clips decoded together")
    parser.add_argument("--quick", action="store_true", help="the corpus's small selection")
    parser.add_argument(
        "--ray", nargs="?", const="local", metavar="ADDRESS",
        help="decode on Ray: on this machine, or on the cluster at ADDRESS",
    )  # fmt: skip
    args = parser.parse_args(argv)

    from calibration.corpus import eval_sets
    from whisper_steer.zoo import load_model

    sets = eval_sets(args.split, data_dir=args.data_dir, quick=args.quick)
    clips = [clip for chosen in sets.values() for clip in chosen]
    if args.ray is None:
        labels = label_clips(load_model(args.model), clips, cache=args.out, batch=args.batch)
    else:
        from calibration import ray_jobs

        data_dir = None if args.data_dir is None else args.data_dir.resolve()
        labels = ray_jobs.label(
            partial(load_model, args.model),
            partial(ray_jobs.eval_clips, args.split, data_dir, args.quick),
            args.out,
            address=args.ray,
            batch=args.batch,
        )
    print_table(summary(sets, labels))
    print(f"labels of {len(clips)} clips in {args.out}")


if __name__ == "__main__":
    run(main)

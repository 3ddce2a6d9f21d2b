"""Runs methods over clips with the hearing cache in between: what is kept is not computed again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.hearing_cache import ClipRecord, Finished, HearingCache, audio_crc
from benchmarks.methods import Heard, Method, Setup
from benchmarks.peers.plain import NAME as PLAIN

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip
    from calibration.decoding import ClipTranscript

GROUP = 8  # clips that plain Whisper decodes together
FIT_VERSION = 2  # raise when methods are fitted in another way, or on other clips
Tick = Callable[[], object]


class PlainWhisper:
    """Plain Whisper's transcripts of clips, each decoded once and kept in the hearing cache."""

    def __init__(self, model: Whisper, cache: HearingCache, fingerprint: str) -> None:
        self.model = model
        self.cache = cache
        self.fingerprint = fingerprint
        self._kept: dict[tuple[str, int], Finished] | None = None
        self._by_clip: dict[Clip, Finished] = {}

    def heard(self, clips: Sequence[Clip]) -> list[Heard]:
        """One result per clip, in order."""
        return [self._finished(clip).heard for clip in self._decoded(clips)]

    def windows(self, clips: Sequence[Clip]) -> list[ClipTranscript]:
        """One transcript per clip, in order."""
        found = [self._finished(clip).transcript for clip in self._decoded(clips)]
        return [transcript for transcript in found if transcript is not None]

    def _finished(self, clip: Clip) -> Finished:
        return self._by_clip[clip]

    def _decoded(self, clips: Iterable[Clip]) -> Iterator[Clip]:
        """The clips in their order, as soon as they are decoded."""
        if self._kept is None:
            kept = self.cache.read(PLAIN, 0.0, self.fingerprint)
            self._kept = {key: item for key, item in kept.items() if item.transcript is not None}
        ready: list[Clip] = []
        missing: dict[Clip, Finished] = {}
        for clip in clips:
            ready.append(clip)
            if clip not in self._by_clip and clip not in missing:
                audio = clip.load()
                key = clip.id, audio_crc(audio)
                if key in self._kept:
                    self._by_clip[clip] = self._kept[key]
                else:
                    missing[clip] = Finished(*key, Heard("", (), None, None, 0.0))
            if len(missing) == GROUP or not missing:
                self._decode(missing)
                yield from ready
                ready.clear()
                missing.clear()
        self._decode(missing)
        yield from ready

    def _decode(self, missing: dict[Clip, Finished]) -> None:
        from calibration.decoding import iterate_transcripts

        if not missing:
            return
        audios = [clip.load() for clip in missing]
        began = time.perf_counter()
        transcripts = list(iterate_transcripts(self.model, audios, batch=GROUP))
        each = (time.perf_counter() - began) / len(missing)
        done = []
        for (clip, name), transcript in zip(missing.items(), transcripts, strict=True):
            segments = transcript.segments
            heard = Heard(transcript.text, segments, transcript.nsp, transcript.hr, each)
            done.append(Finished(name.id, name.crc, heard, transcript))
            self._by_clip[clip] = done[-1]
        self.cache.append(PLAIN, 0.0, self.fingerprint, done)


def listen(
    cache: HearingCache,
    setup: Setup,
    method: Method,
    strength: float,
    fingerprint: str,
    clips: Sequence[tuple[Clip, ClipRecord]],
    tick: Tick,
) -> list[Heard]:
    """What the method hears in every clip, in order: from the cache, else computed and kept one by one.

    Raises what the method raises; what it finished before that is kept.
    """
    if method.name == PLAIN:  # keeps its own file
        results: list[Heard] = []
        for start in range(0, len(clips), GROUP):
            results += method.hear(setup, strength, [clip for clip, _ in clips[start : start + GROUP]])
            for _ in clips[start : start + GROUP]:
                tick()
        return results
    kept = cache.read(method.name, strength, fingerprint)
    missing = [(clip, record) for clip, record in clips if (record.id, record.crc) not in kept]
    for _ in range(len(clips) - len(missing)):
        tick()
    if missing:
        hearing = method.hear(setup, strength, [clip for clip, _ in missing])
        for (_, record), heard in zip(missing, hearing, strict=True):
            done = Finished(record.id, record.crc, heard)
            cache.append(method.name, strength, fingerprint, [done])
            kept[record.id, record.crc] = done
            tick()
    return [kept[record.id, record.crc].heard for _, record in clips]


def plain_fingerprint(crc: int) -> str:
    """What plain Whisper's words depend on: the weights, and the version of openai-whisper that decodes."""
    import whisper

    return f"{crc:08x}-openai-whisper-{whisper.__version__}"


def fits_hash(name: str, crc: int, data: Path | None, quick: bool, layers: int) -> str:
    """Of what methods are fitted on: the model's weights, its SAEs and the calibration clips."""
    from calibration.corpus import EVAL_SETS, EVAL_VERSION, real_clips
    from calibration.refit import UNTAUGHT
    from whisper_steer.errors import WhisperSteerError
    from whisper_steer.zoo import load_sae

    ids = sorted(clip.id for clip in real_clips(data, "calibration"))
    known = (FIT_VERSION, UNTAUGHT, crc, quick, EVAL_VERSION, EVAL_SETS, ids)
    digest = hashlib.sha256(repr(known).encode())
    for layer in range(layers):
        try:
            sae = load_sae(name, layer)
        except WhisperSteerError:
            break
        for key, tensor in sorted(sae.state_dict().items()):
            digest.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def fingerprint_of(method: Method, setup: Setup, crc: int, fits: str) -> str:
    """What the method's words depend on. All: the weights and openai-whisper's version; a method with a
    `fingerprint(setup)`: what it says, too; any other but plain Whisper: all that methods are fitted on."""
    base = plain_fingerprint(crc)
    if method.name == PLAIN:
        return base
    own = getattr(method, "fingerprint", None)
    return f"{base}-{fits if own is None else own(setup)}"

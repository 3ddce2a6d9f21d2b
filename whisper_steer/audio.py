"""Audio files and arrays to what Whisper hears: mono float32 samples at 16 kHz.

Files are decoded with PyAV, which carries FFmpeg's libraries inside its wheel: no ffmpeg binary is needed,
and any container that FFmpeg knows is read (wav, flac, mp3, ogg/opus, m4a, webm, the sound track of mp4 and
mkv).
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import AudioError

if TYPE_CHECKING:
    import av
    from numpy.typing import NDArray

logger = logging.getLogger("whisper_steer")

SAMPLING_RATE = 16_000  # Hz; what every Whisper was trained on

AUDIO_SUFFIXES = frozenset(
    (
        ".3gp .aac .aif .aiff .amr .avi .caf .flac .m4a .m4b .mkv .mov .mp2 .mp3 .mp4 .mpg .oga .ogg .opus "
        ".wav .webm .wma"
    ).split()
)

# Containers whose header states the exact length, so that a shorter decode means a file that was cut off.
# An mp3 or a raw stream only has an estimate.
_EXACT_LENGTH_FORMATS = frozenset({"wav", "w64", "aiff", "flac", "mov", "matroska"})

_FULL_SCALE = {  # PCM codes: (zero point, largest magnitude)
    np.dtype(np.uint8): (128.0, 128.0),
    np.dtype(np.int16): (0.0, 32_768.0),
    np.dtype(np.int32): (0.0, 2_147_483_648.0),
    np.dtype(np.int64): (0.0, 9_223_372_036_854_775_808.0),
}


def load_audio(path: str | Path, *, sampling_rate: int = SAMPLING_RATE) -> NDArray[np.float32]:
    """Decode a file to mono float32 samples of shape (n,), nominally in -1..1.

    Channels are averaged with equal weights, then resampled by FFmpeg's swresample. Memory stays at one copy
    of the result (64 kB per second at 16 kHz), whatever the length. A file that was cut off, or has damaged
    packets, gives what can be decoded and a logged warning.

    Raises AudioError: no such file, a directory, an empty file, not audio, nothing decodable, NaN or infinite
    samples.
    """
    path = Path(path)
    _check_file(path)
    import av

    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise AudioError(f"{path}: no audio in it (FFmpeg reads it as {container.format.name})")
            samples = _decode(container, path, sampling_rate)
    except (av.error.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AudioError(
            f"{path}: cannot be read as audio ({reason}); expected wav, flac, mp3, ogg, opus, m4a, "
            "webm, mp4 or another format that FFmpeg knows"
        ) from error
    if len(samples) == 0:
        raise AudioError(f"{path}: holds no audio samples")
    return samples


def check_audio(audio: Any) -> NDArray[np.float32]:
    """Mono 16 kHz samples handed over as an array or tensor: (n,) float or PCM integers -> (n,) float32.

    int16, int32 and uint8 are taken as PCM codes and scaled to -1..1.
    Raises AudioError: not numeric, not 1-D, no samples, NaN or infinite samples.
    """
    if hasattr(audio, "detach"):  # torch.Tensor, without importing torch here
        audio = audio.detach().cpu().numpy()
    try:
        array = np.asarray(audio)
    except ValueError as error:  # ragged nested lists
        raise AudioError(f"expected a 1-D array of audio samples: {error}") from error
    if array.ndim != 1:
        raise AudioError(
            f"expected 1-D mono audio of shape (samples,), given shape {array.shape}: "
            "downmix first, for example audio.mean(axis=channel_axis)"
        )
    if array.size == 0:
        raise AudioError("the audio array holds no samples")
    if array.dtype.kind == "f":
        samples = array.astype(np.float32, copy=False)
    elif array.dtype in _FULL_SCALE and array.dtype != np.int64:
        samples = _from_pcm(array)
    else:
        raise AudioError(
            f"expected float audio samples in -1..1, or int16/int32/uint8 PCM, given dtype {array.dtype}: "
            "convert to float32 first"
        )
    bad = np.flatnonzero(~np.isfinite(samples))
    if len(bad):
        raise AudioError(
            f"the audio array holds {len(bad)} NaN or infinite samples, the first at index {bad[0]}"
        )
    return samples


def find_audio(paths: Iterable[str | Path]) -> list[Path]:
    """Files named by a mixture of files, directories (searched recursively by suffix) and glob patterns.

    The order of the arguments is kept, what a directory or pattern yields is sorted, a file comes once. A
    named file is returned even if it does not exist or has an unknown suffix: load_audio says what is wrong
    with it. Raises AudioError for a directory without audio and a pattern that matches nothing.
    """
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            files = sorted(_audio_below(path))
            if not files:
                raise AudioError(f"{path}: no audio file in this directory (looked for {_suffix_text()})")
        elif not path.exists() and glob.has_magic(str(given)):
            matches = sorted(Path(name) for name in glob.glob(str(given), recursive=True))
            files = [match for match in matches if match.is_file()]
            for directory in (match for match in matches if match.is_dir()):
                files.extend(sorted(_audio_below(directory)))
            if not files:
                raise AudioError(f"{given}: no file matches this pattern")
        else:
            files = [path]
        found.update(dict.fromkeys(files))
    return list(found)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise AudioError(
            f"{path}: is a directory, expected an audio file (find_audio lists the files below it)"
        )
    if not path.exists():
        raise AudioError(f"{path}: no such file")
    if not os.access(path, os.R_OK):
        raise AudioError(f"{path}: no permission to read it")
    if path.is_file() and path.stat().st_size == 0:
        raise AudioError(f"{path}: the file is empty (0 bytes)")


def _decode(container: av.container.InputContainer, path: Path, sampling_rate: int) -> NDArray[np.float32]:
    """The first audio stream as one float32 array (n,); the buffer grows in place, so nothing is held
    twice."""
    stream = container.streams.audio[0]
    declared = _declared_seconds(container, stream, path)
    # a header may lie: no more than 6 h are reserved up front
    expected = min(declared or 60.0, 6 * 3600.0) + 1.0
    buffer = np.empty(int(expected * sampling_rate), dtype=np.float32)
    length = 0
    for block in _resampled(_mono_blocks(container, stream, path), sampling_rate):
        if length + len(block) > len(buffer):
            buffer.resize(max(length + len(block), len(buffer) * 3 // 2), refcheck=False)
        buffer[length : length + len(block)] = block
        length += len(block)
    buffer.resize(length, refcheck=False)
    exact = _EXACT_LENGTH_FORMATS.intersection(container.format.name.split(","))
    seconds = length / sampling_rate
    if declared is not None and exact and length and declared - seconds > max(0.25, 0.02 * declared):
        logger.warning("%s: cut off: %.1f s of %.1f s could be decoded", path, seconds, declared)
    return buffer


def _declared_seconds(
    container: av.container.InputContainer, stream: av.AudioStream, path: Path
) -> float | None:
    """Length by the header; None where it is unknown or beyond belief (a day), as in a damaged file."""
    if container.format.name == "wav":
        seconds = _wav_seconds(path)
    elif stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = (container.duration or 0) / 1_000_000  # FFmpeg's AV_TIME_BASE: microseconds
    return seconds if 0 < seconds < 86_400 else None


def _wav_seconds(path: Path) -> float:
    """Length that a wav header claims, 0 if it does not say; FFmpeg's own figure is clipped to the file's
    end."""
    bytes_per_second = 0
    with open(path, "rb") as file:
        file.seek(12)  # RIFF, size, WAVE
        while len(chunk := file.read(8)) == 8:
            name, size = chunk[:4], int.from_bytes(chunk[4:], "little")
            if name == b"data":
                # a writer into a pipe cannot know the length and leaves a huge number there
                return size / bytes_per_second if bytes_per_second and size < 0x7FFF_F000 else 0.0
            body = file.read(size + size % 2) if name == b"fmt " else b""
            if len(body) >= 12:
                bytes_per_second = int.from_bytes(body[8:12], "little")
            elif not body:
                file.seek(size + size % 2, os.SEEK_CUR)
    return 0.0


def _mono_blocks(
    container: av.container.InputContainer, stream: av.AudioStream, path: Path
) -> Iterator[tuple[NDArray[np.float32], int]]:
    """(mono samples, their rate) frame by frame; damaged packets are skipped and counted in one warning."""
    import av

    damaged, seconds = 0, 0.0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except av.error.FFmpegError as error:
            if seconds == 0:
                raise
            logger.warning("%s: reading stopped after %.1f s (%s)", path, seconds, error.strerror or error)
            break
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            damaged += 1
            continue
        for frame in frames:
            if not frame.samples:
                continue
            block = _mono(frame)
            if not np.isfinite(block).all():
                raise AudioError(f"{path}: NaN or infinite samples near {seconds:.2f} s")
            yield block, frame.sample_rate
            seconds += frame.samples / frame.sample_rate
    if damaged and seconds == 0:
        raise AudioError(f"{path}: nothing in it could be decoded ({damaged} damaged packets)")
    if damaged:
        logger.warning("%s: %d damaged packets were skipped, %.1f s decoded", path, damaged, seconds)


def _mono(frame: av.AudioFrame) -> NDArray[np.float32]:
    """Average of the channels of one frame, (samples,) float32; independent of the channel layout, known or
    not."""
    array = frame.to_ndarray()
    if not frame.format.is_planar:
        array = array.reshape(frame.samples, -1).T  # packed: (1, samples * channels)
    samples = _from_pcm(array) if array.dtype.kind in "iu" else array
    return samples.mean(axis=0, dtype=np.float32) if len(samples) > 1 else samples[0].astype(np.float32)


def _from_pcm(array: NDArray[Any]) -> NDArray[np.float32]:
    zero, scale = _FULL_SCALE[array.dtype]
    return ((array.astype(np.float64) - zero) / scale).astype(np.float32)


def _resampled(
    blocks: Iterator[tuple[NDArray[np.float32], int]], sampling_rate: int
) -> Iterator[NDArray[np.float32]]:
    """Blocks at `sampling_rate`; a stream may change its rate midway, each stretch has its own resampler."""
    import av

    resampler, current_rate = None, sampling_rate

    def convert(frame: av.AudioFrame | None) -> Iterator[NDArray[np.float32]]:
        if resampler is not None:
            for resampled in resampler.resample(frame):
                yield resampled.to_ndarray()[0]

    for block, rate in blocks:
        if rate != current_rate:
            yield from convert(None)  # flush the tail that the filter still holds
            current_rate = rate
            resampler = None
            if rate != sampling_rate:
                resampler = av.AudioResampler(format="fltp", layout="mono", rate=sampling_rate)
        if resampler is None:
            yield block
            continue
        frame = av.AudioFrame.from_ndarray(block[None, :], format="fltp", layout="mono")
        frame.sample_rate = rate
        yield from convert(frame)
    yield from convert(None)


def _audio_below(directory: Path) -> Iterator[Path]:
    """Visible files with a known suffix, at any depth; links to directories are not followed (they may form a
    loop)."""
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in AUDIO_SUFFIXES:
                yield Path(folder, name)


def _suffix_text() -> str:
    return " ".join(sorted(suffix.lstrip(".") for suffix in AUDIO_SUFFIXES))

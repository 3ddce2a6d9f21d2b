"""What `benchmarks.scaling` measures: encoding, audio, training steps, memory and files of a small run.

The audio is made up (a band and a fan); neither it nor the weights change how long anything takes.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from calibration.frames import Frames

if TYPE_CHECKING:
    from calibration.adapters import WhisperEncoder
    from calibration.plan import WindowPlan

RATE = 16_000
WINDOW_SECONDS = 30
CLIP_SECONDS = 15  # of the made-up recordings
SMALL = {"n_audio_state": 768, "n_audio_head": 12, "n_audio_layer": 12}  # whisper-small's encoder


@dataclass(frozen=True)
class Timing:
    """Repeats of one measurement, in its unit (seconds per hour of audio, or per step)."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def times(self, factor: float) -> Timing:
        return Timing(tuple(value * factor for value in self.values))


def timed(work: Callable[[], object], repeats: int, device: str = "cpu", untimed: int = 1) -> Timing:
    """Seconds of each call, after `untimed` first ones."""
    seconds = []
    for position in range(untimed + repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if position >= untimed:
            seconds.append(time.perf_counter() - start)
    return Timing(tuple(seconds))


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# ---------- audio


def write_recordings(folder: Path, count: int = 6) -> None:
    """`count` 16 kHz FLAC files of CLIP_SECONDS below music/ and sounds/, and one 44.1 kHz stereo MP3."""
    from calibration import noises
    from calibration.bundle import write_flac

    for number in range(count):
        kind, name = (("music", "band"), ("noise", "fan"))[number % 2]
        samples = noises.GENERATORS[kind][name](CLIP_SECONDS * RATE, np.random.default_rng(number))
        domain = "music" if kind == "music" else "sounds"
        write_flac(folder / domain / f"{number}.flac", samples / max(np.abs(samples).max(), 1e-9) / 2)
    write_mp3(folder / "wide.mp3")


def write_mp3(path: Path) -> None:
    import av

    rate, seconds = 44_100, 60
    noise = np.random.default_rng(0).standard_normal((2, rate * seconds)).cumsum(axis=1)
    samples = (noise / np.abs(noise).max() / 2).astype(np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mp3", rate=rate, layout="stereo")
        size = 1152  # samples of an MP3 frame
        for start in range(0, samples.shape[1] - size, size):
            piece = np.ascontiguousarray(samples[:, start : start + size])
            frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
            frame.sample_rate = rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def plan_of(folder: Path, *, cache_bytes: int = 0) -> WindowPlan:
    """Windows of the recordings, augmented with AudioSAE's probabilities; cache_bytes 0 decodes each draw."""
    from calibration.item_sources import from_folder
    from calibration.mixture import Augmentation, Dataset, Mixture
    from calibration.plan import WindowPlan

    sets = [
        Dataset(domain, 1.0, from_folder(domain, folder / domain, domain=domain))
        for domain in ("music", "sounds")
    ]
    mixture = Mixture(sets, name="made up", augmentation=Augmentation())
    return WindowPlan(mixture, seed=0, cache_bytes=cache_bytes)


@dataclass(frozen=True)
class AudioTimes:
    """Seconds per hour of audio: FLAC and MP3 to 16 kHz mono, one addition to every clip, windows as the
    plan draws them; filled: share of the windows' frames that hold audio."""

    flac: Timing
    mp3: Timing
    mix: Timing
    windows: Timing
    filled: float


def measure_audio(folder: Path, *, windows: int, repeats: int = 3) -> AudioTimes:
    from calibration.activations import MAX_FRAMES, true_frames
    from calibration.augmentation import mix_at_snr
    from whisper_steer.audio import load_audio

    files = sorted(folder.glob("*/*.flac"))
    wide = folder / "wide.mp3"
    clips = [load_audio(str(path)) for path in files[:2]]
    plan = plan_of(folder)
    hours = windows * WINDOW_SECONDS / 3600
    drawn = [plan.window(0, 0, index) for index in range(200)]
    filled = sum(true_frames(len(window.audio)) for window in drawn) / (len(drawn) * MAX_FRAMES)
    decoded = [len(load_audio(str(path))) / RATE / 3600 for path in (*files, wide)]
    return AudioTimes(
        timed(lambda: [load_audio(str(path)) for path in files], repeats).times(1 / sum(decoded[:-1])),
        timed(lambda: load_audio(str(wide)), repeats).times(1 / decoded[-1]),
        timed(lambda: mix_at_snr(clips[0], clips[1], 10.0), repeats).times(3600 / CLIP_SECONDS),
        timed(lambda: [plan.window(1, 0, index) for index in range(windows)], repeats).times(1 / hours),
        filled,
    )


# ---------- encoding


def small_encoder(device: str) -> WhisperEncoder:
    """A Whisper with random weights and whisper-small's encoder; its decoder is next to nothing."""
    from whisper.model import ModelDimensions, Whisper

    from calibration.adapters import WhisperEncoder

    text = {"n_vocab": 8, "n_text_ctx": 2, "n_text_state": 12, "n_text_head": 1, "n_text_layer": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Whisper(ModelDimensions(n_mels=80, n_audio_ctx=1500, **SMALL, **text))
    return WhisperEncoder(model.to(device), autocast=autocast_of(device))


def mini_encoder(device: str) -> WhisperEncoder:
    from calibration.adapters import WhisperEncoder
    from whisper_steer.zoo import load_model

    return WhisperEncoder(load_model("mini.en", device=device), autocast=autocast_of(device))


def autocast_of(device: str) -> torch.dtype | None:
    return torch.bfloat16 if device.startswith("cuda") else None


def measure_encoding(encoder: WhisperEncoder, *, windows: int, repeats: int) -> Timing:
    """Seconds per hour of full windows: spectrogram, one forward pass for all layers, float16 in memory.

    windows: in one pass.
    """
    rng = np.random.default_rng(0)
    audio = (0.1 * rng.standard_normal(WINDOW_SECONDS * RATE)).astype(np.float32)
    layers = range(encoder.n_layers)

    def encode() -> None:
        for frames in encoder.encode([audio] * windows, layers):
            frames.half().cpu()

    timing = timed(encode, repeats, str(encoder.device))
    return timing.times(3600 / (WINDOW_SECONDS * windows))


# ---------- training


@dataclass(frozen=True)
class Shape:
    d_model: int
    n_latents: int
    k: int

    def __str__(self) -> str:
        return f"d {self.d_model}, n {self.n_latents}, k {self.k}"


def made_up_frames(d_model: int, count: int) -> torch.Tensor:
    from benchmarks.training_frames import synthetic_frames

    return torch.from_numpy(synthetic_frames(d_model, count, 1)[0])


def measure_training(shape: Shape, batches: Sequence[int], *, steps: int, device: str) -> list[Timing]:
    """Seconds of a BatchTopK step, for each size of batch, after three untimed ones."""
    from calibration.sae_training import SAETrainer

    frames = made_up_frames(shape.d_model, 4 * max(batches)).to(device)
    timings = []
    for batch in batches:
        trainer = SAETrainer(
            0, shape.d_model, shape.n_latents, k=shape.k, device=device, autocast=device.startswith("cuda")
        )
        trainer.set_normalisation(frames, centre=True)
        position = 0

        def step(trainer: Any = trainer, batch: int = batch) -> None:
            nonlocal position
            start = position % 4 * batch
            trainer.step(frames[start : start + batch])
            position += 1

        timings.append(timed(step, steps, device, untimed=3))
    return timings


# ---------- a small run: memory, files, and whether the parts add up


class RepeatedFrames:
    """A `FrameSource` of made-up frames that costs next to nothing."""

    dtype = torch.float16

    def __init__(self, d_model: int, layers: int, unit_frames: int):
        self.d_model, self.layers, self.unit_frames = d_model, tuple(range(layers)), unit_frames
        self._pool = made_up_frames(d_model, 5_000).half()

    def identity(self) -> dict[str, Any]:
        return {"source": "made up", "d_model": self.d_model, "unit_frames": self.unit_frames}

    def load(self, round_index: int, shard: int) -> Frames:
        data = torch.empty(len(self.layers), self.unit_frames, self.d_model, dtype=self.dtype)
        for start in range(0, self.unit_frames, len(self._pool)):
            part = data[:, start : start + len(self._pool)]
            part.copy_(self._pool[None, : part.shape[1]].expand_as(part))
        return Frames(data, torch.zeros(self.unit_frames, dtype=torch.uint8))


@dataclass(frozen=True)
class RunFigures:
    """Of one small run in a process of its own; sizes in bytes.

    Attributes:
        planned: by `TrainingRun.memory()`.
        peak: resident memory at most until the last step, above that before the run was built, where model
            and libraries were in memory already; peak_saving: the same with the checkpoint at the end.
        device_peak: peak of CUDA's allocator; 0 on a CPU.
        checkpoint, unit: of the files.
        unit_planned: by `calibration.frame_files.unit_bytes`.
        seconds: of training and encoding. frames: trained on. saes: trained.
    """

    planned: dict[str, int]
    peak: int
    peak_saving: int
    device_peak: int
    checkpoint: int
    unit: int
    unit_planned: int
    seconds: float
    frames: int
    saes: int


@dataclass(frozen=True)
class RunPlan:
    """mini.en on the recordings in `audio`, or made-up frames where that is None."""

    shape: Shape
    layers: int
    buffer_batches: int
    steps: int
    audio: Path | None
    device: str
    threads: int
    batch: int = 2500


def measure_run(plan: RunPlan) -> RunFigures:
    """In a fresh process, so that nothing else's memory is counted. Raises RuntimeError: it failed."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_and_send, args=(plan, sender))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = "it ended without an answer"
    process.join()
    if not isinstance(found, RunFigures):
        raise RuntimeError(f"the small run failed: {found}")
    return found


def _run_and_send(plan: RunPlan, sender: Any) -> None:
    try:
        torch.set_num_threads(plan.threads)
        with tempfile.TemporaryDirectory(prefix="whisper-steer-scaling-") as folder:
            sender.send(small_run(plan, Path(folder)))
    except Exception as error:  # shown by the process that waits
        sender.send(f"{type(error).__name__}: {error}")


def small_run(plan: RunPlan, out: Path) -> RunFigures:
    from calibration.engine import TrainingRun
    from calibration.frame_cache import write_cache
    from calibration.frame_files import CacheFolder, unit_bytes
    from calibration.frames import FrameSource, StreamingFrames
    from calibration.recipe import TrainConfig

    config = TrainConfig(
        k=(plan.shape.k,), expansion=(plan.shape.n_latents // plan.shape.d_model,), batch=plan.batch,
        steps=plan.steps, buffer_batches=plan.buffer_batches,
    )  # fmt: skip
    source: FrameSource
    if plan.audio is None:
        source = RepeatedFrames(plan.shape.d_model, plan.layers, config.unit_frames)
    else:
        encoder = mini_encoder(plan.device)
        measure_encoding(encoder, windows=1, repeats=1)  # what the first pass allocates belongs to the model
        source = StreamingFrames(
            encoder, plan_of(plan.audio), layers=range(plan.layers), unit_frames=config.unit_frames
        )
    # code that is used for the first time becomes resident, too
    tiny = TrainConfig(k=(2,), expansion=(2,), steps=4, buffer_batches=2, batch=plan.batch)
    TrainingRun(RepeatedFrames(16, 1, tiny.unit_frames), tiny, out / "tiny", device=plan.device).train(
        progress=False
    )
    cuda = plan.device.startswith("cuda")
    before, before_cuda = resident(), torch.cuda.memory_allocated() if cuda else 0
    forget_peak()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    run = TrainingRun(
        source, config, out / "run", device=plan.device, autocast=cuda, checkpoint_seconds=float("inf")
    )
    planned = run.memory()
    peaks: list[int] = []
    start = time.perf_counter()
    run.train(progress=False, after_step=lambda step: peaks.append(resident(peak=True) - before))
    seconds = time.perf_counter() - start
    saving = resident(peak=True) - before
    device_peak = torch.cuda.max_memory_allocated() - before_cuda if cuda else 0
    write_cache(source, out / "cache", [(0, 0)], progress=False)
    return RunFigures(
        planned, peaks[-1], saving, device_peak,
        sum(path.stat().st_size for path in (out / "run").rglob("*.safetensors")),
        CacheFolder.open(out / "cache").path((0, 0)).stat().st_size,
        unit_bytes(len(source.layers), config.unit_frames, source.d_model, source.dtype),
        seconds, plan.steps * plan.batch, len(run.specs),
    )  # fmt: skip


def forget_peak() -> None:
    """Let the peak begin at what is resident now, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident(*, peak: bool = False) -> int:
    """Resident bytes of this process now, or at most so far."""
    name = "VmHWM:" if peak else "VmRSS:"
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # not Linux: the peak, in bytes on macOS, stands for both

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

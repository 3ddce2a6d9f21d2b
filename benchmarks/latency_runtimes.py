"""The runtimes as benchmarks.latency sees them: encode a batch, write words for it, be steered, be baked.

Models have random weights of Whisper's true shapes: what they write means nothing, what it costs does not
depend on the weights. Every window is decoded greedily for exactly `TOKENS` tokens, so that plain and steered
do the same work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol

import torch
from torch import Tensor
from whisper.audio import N_FRAMES, N_SAMPLES, SAMPLE_RATE, log_mel_spectrogram
from whisper.decoding import DecodingOptions
from whisper.model import ModelDimensions, Whisper

from whisper_steer.attach import steer
from whisper_steer.edits import LatentEdit, MeanAblation, Shift
from whisper_steer.errors import ModelError, UsageError
from whisper_steer.gate import Gate
from whisper_steer.probe import Probe
from whisper_steer.steering import Steering
from whisper_steer.window_kernel import WindowKernel

TOKENS = 32  # per window: about what half a minute of slow speech takes
WINDOW_SECONDS = N_SAMPLES / SAMPLE_RATE
RUNTIMES = ("openai", "transformers", "faster", "whisper.cpp")
_ENGLISH = 51864
_SIZES = {  # d_model, heads, encoder blocks, decoder blocks, mels, vocabulary
    "tiny": (384, 6, 4, 4, 80, _ENGLISH),
    "base": (512, 8, 6, 6, 80, _ENGLISH),
    "small": (768, 12, 12, 12, 80, _ENGLISH),
    "large-v3": (1280, 20, 32, 32, 128, 51866),
}
SHAPES = tuple(_SIZES)
EXPANSION = 8  # latents of the reconstructing SAE per stream dimension
PAPER_L0 = 50  # latents of the reconstructing SAE that are active in a frame (AudioSAE's operating point)
_ACTIVE = 2.0  # other latents' threshold in standard deviations: about one in forty is active
_SMOOTH = 25  # frames, as the bundled gate's


class Runtime(Protocol):
    """One random model. `features` of a batch are made once, from `audio` (batch, samples)."""

    def encode(self, features: Any) -> Any: ...

    def features(self, audio: Tensor) -> Any: ...

    def decode(self, encoded: Any) -> Any: ...

    def steered(self, steering: Steering) -> Any: ...

    def baked(self, shift: Shift) -> Any: ...


def dimensions(shape: str) -> ModelDimensions:
    """The true dimensions of a released model."""
    width, heads, encoder, decoder, mels, words = _SIZES[shape]
    return ModelDimensions(mels, 1500, width, heads, encoder, words, 448, width, heads, decoder)


def random_model(shape: str, seed: int = 0) -> Whisper:
    """A Whisper of this shape on the CPU, float32."""
    torch.manual_seed(seed)
    model = Whisper(dimensions(shape)).eval().requires_grad_(False)
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.01)  # left as it is found otherwise
    return model


def sound(batch: int, seed: int = 0) -> Tensor:
    """(batch, samples): 30 s of noise each."""
    return torch.randn(batch, N_SAMPLES, generator=torch.Generator().manual_seed(seed)) * 0.1


def stream_spread(model: Whisper, device: str = "cpu") -> float:
    """Standard deviation of the last block's output while `sound` is encoded on device: what latents read.
    The model is left on the CPU."""
    model.to(device)
    found: list[Tensor] = []
    hook = model.encoder.blocks[-1].register_forward_hook(lambda *args: found.append(args[2]))
    mel = log_mel_spectrogram(sound(1), model.dims.n_mels, device=model.device)[..., :N_FRAMES]
    try:
        with torch.no_grad():
            model.encoder(mel)
    finally:
        hook.remove()
        model.cpu()
    return float(found[0].std())


def steering_for(
    mode: str, m: int | None, dims: ModelDimensions, seed: int = 0, spread: float = 1.0
) -> Steering:
    """A random steering of the last block, like the papers'; its gate withholds nothing and opens for about
    half of the frames. early_speech, early_gap: a gate on the first and last block, silence at the first; in
    the former, the gate opens nowhere. window_gate: raw activations of four layers and a kernel on the window
    as a whole, like the bundled gate's. spread: `stream_spread` of the last block, so that as many of its
    latents are active as in an SAE that was fitted on the stream; what they cost depends on it."""
    width, layer = dims.n_audio_state, dims.n_audio_layer - 1
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int) -> Tensor:
        return torch.randn(count, width, generator=generator) / width**0.5

    def latents(count: int, threshold: float = _ACTIVE, **form: Any) -> LatentEdit:
        return LatentEdit(
            layer, rows(count), torch.zeros(count), torch.full((count,), threshold * spread), rows(count),
            "add", torch.full((count,), 0.1), 1.0, **form,
        )  # fmt: skip

    if mode.startswith("shift"):
        return Steering((Shift(layer, rows(1)[0], 1.0),))
    if mode == "reconstruction":
        every = EXPANSION * width
        threshold = NormalDist().inv_cdf(1 - min(PAPER_L0, every // 2) / every)
        return Steering((latents(every, threshold, reconstruct=True, b_dec=torch.zeros(width)),))
    count = m or 100
    if mode == "latents":
        return Steering((latents(count),))

    def probe(at: int, size: int) -> Probe:
        coef = torch.randn(size, generator=generator)
        return Probe(
            at, "latents", coef - coef.mean(), rows(size), torch.zeros(size),
            torch.full((size,), _ACTIVE * spread), torch.ones(size),
        )  # fmt: skip

    def gated(*probes: Probe, bias: float = 0.0) -> Gate:
        return Gate(probes, 0.0, _SMOOTH, threshold=1e9, spread=0.0, frame_scale=1.0, frame_bias=bias)

    if mode == "window_gate":
        read = sorted({round(i * layer / 3) for i in range(4)})
        raw = (
            Probe(at, "raw", rows(1)[0], mean=torch.zeros(width), std=torch.full((width,), spread))
            for at in read
        )
        return Steering((), replace(gated(*raw), kernel=_kernel(read, width, generator)))
    if mode.startswith("early"):
        silence = MeanAblation(0, torch.randn(dims.n_audio_ctx, width, generator=generator))
        probes = probe(0, count // 2), probe(layer, count - count // 2)
        return Steering((silence,), gated(*probes, bias=1e9 if mode == "early_speech" else 0.0))
    gate = gated(probe(layer, count))
    return Steering(() if mode == "gate" else (latents(count),), gate)


def _kernel(layers: Sequence[int], width: int, generator: torch.Generator) -> WindowKernel:
    """A random one of the bundled one's size."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    pools, size, landmarks = 3 * len(layers) * width, 128, 700
    projection = draw(size, pools) / pools**0.5
    return WindowKernel(
        tuple(layers), projection, torch.zeros(size), draw(landmarks, size), draw(landmarks), 1 / size, 0.0
    )


class OpenAIRuntime:
    """openai-whisper."""

    def __init__(self, model: Whisper, device: str) -> None:
        self.model = model.to(device)
        self.dtype = torch.float32
        self.end = 50257 if model.is_multilingual else 50256  # <|endoftext|>

    def features(self, audio: Tensor) -> Tensor:
        mels = self.model.dims.n_mels
        mel = log_mel_spectrogram(audio, mels, device=self.model.device)[..., :N_FRAMES]
        return mel.to(self.dtype)

    def use(self, dtype: str) -> None:
        """Compute in "float16" from now on, as openai-whisper does on CUDA unless it is told not to (its
        weights stay float32 and are rounded in every product), or in "float32" again."""
        self.dtype = getattr(torch, dtype)

    def encode(self, features: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.encoder(features)

    def decode(self, encoded: Tensor) -> Any:
        options = DecodingOptions(
            language="en", fp16=self.dtype == torch.float16, without_timestamps=True, sample_len=TOKENS,
            suppress_tokens=[self.end],
        )  # fmt: skip
        return self.model.decode(encoded, options)

    def steered(self, steering: Steering) -> Any:
        return _steered(self.model, steering)

    def baked(self, shift: Shift) -> Any:
        return _biased(self.model.encoder.blocks[shift.layer].mlp[2].bias, shift)


class TransformersRuntime:
    """transformers, with the same weights."""

    def __init__(self, model: Whisper, device: str) -> None:
        from whisper_steer.transformers_model import from_openai

        self.openai = OpenAIRuntime(model, device)
        self.model = from_openai(model)
        self.model.generation_config.suppress_tokens = [self.openai.end]
        # not max_new_tokens: transformers 5 warns at every call that there is a max_length, too. The prompt
        # is not counted. With a language given, no pass of the decoder is spent on finding it.
        self.options: dict[str, Any] = {"max_length": TOKENS, "num_beams": 1}
        if model.is_multilingual:
            self.options["language"] = "en"

    def features(self, audio: Tensor) -> Tensor:
        return self.openai.features(audio).to(self.model.dtype)

    def encode(self, features: Tensor) -> Any:
        with torch.no_grad():
            return self.model.model.encoder(features)

    def decode(self, encoded: Any) -> Any:
        return self.model.generate(encoder_outputs=encoded, **self.options)

    def steered(self, steering: Steering) -> Any:
        return _steered(self.model, steering)

    def use(self, dtype: str) -> None:
        """Hold the weights in "float16" or "float32" from now on, and compute in it."""
        self.model.to(getattr(torch, dtype))

    def baked(self, shift: Shift) -> Any:
        return _biased(self.model.model.encoder.layers[shift.layer].fc2.bias, shift)


class FasterRuntime:
    """faster-whisper, from a CTranslate2 conversion (float32) in a folder that goes with the process."""

    def __init__(self, model: Whisper, device: str) -> None:
        import faster_whisper

        from whisper_steer.convert import convert

        self.openai = OpenAIRuntime(model, "cpu")
        self.folder = tempfile.TemporaryDirectory(prefix="whisper-steer-latency-")
        path = convert(model, "ct2", Path(self.folder.name) / "model")
        # as many threads as torch has, so that one row can be set beside another
        threads = torch.get_num_threads()
        self.options: dict[str, Any] = {"device": device, "compute_type": "float32", "cpu_threads": threads}
        self.path = str(path)
        self.model: Any = faster_whisper.WhisperModel(self.path, **self.options)
        self.worn: tuple[Steering, Any] | None = None
        self.baked_steering = Steering((Shift(0, torch.zeros(model.dims.n_audio_state), 0.0),))

    def features(self, audio: Tensor) -> Any:
        return self.openai.features(audio).numpy()

    def encode(self, features: Any) -> Any:
        return self.model.encode(features)

    def decode(self, encoded: Any) -> Any:
        prompt = [50257, 50362] if not self.model.model.is_multilingual else [50258, 50259, 50360, 50364]
        return self.model.model.generate(
            encoded, [prompt] * encoded.shape[0], beam_size=1, max_length=TOKENS + len(prompt),
            suppress_blank=False, suppress_tokens=[self.openai.end],
        )  # fmt: skip

    @contextmanager
    def steered(self, steering: Steering) -> Iterator[None]:
        """A second model, kept for the next round: a change of steering reads the file anew."""
        from whisper_steer.faster import WhisperModel

        if self.worn is None or self.worn[0] is not steering:
            self.worn = None
            self.worn = steering, WhisperModel(self.path, alpha=1.0, steering=steering, **self.options)
        plain, self.model = self.model, self.worn[1]
        try:
            yield
        finally:
            self.model = plain

    def alpha_changes(self, steering: Steering, rounds: int, clock: Callable[[], float]) -> list[float]:
        """Seconds from a new alpha to the end of the next window, which is as short as can be (20 ms)."""
        from whisper_steer.faster import WhisperModel

        self.worn = None
        model, seconds = WhisperModel(self.path, alpha=1.0, steering=steering, **self.options), []
        features = self.openai.features(sound(1))[..., :2].numpy()
        model.encode(features)
        for number in range(rounds):
            start = clock()
            model.alpha = 0.5 + number / rounds
            model.encode(features)
            seconds.append(clock() - start)
        return seconds

    def baked(self, shift: Shift) -> Any:
        # a constant shift is always put into the weights here, never in a hook
        if self.baked_steering.edits != (shift,):
            self.baked_steering = Steering((shift,))
        return self.steered(self.baked_steering)


class _Opened:
    """A ggml file in whisper.cpp, which keeps the features of the sound it was given last."""

    def __init__(self, path: Path) -> None:
        from pywhispercpp.model import Model

        self.model: Any = Model(str(path), redirect_whispercpp_logs_to=None)
        self.heard = False

    @property
    def context(self) -> Any:
        return self.model._ctx


class WhisperCppRuntime:
    """whisper.cpp through pywhispercpp, from ggml files (f16) in a folder that goes with the process.

    It takes one window at a time, and nothing can be hooked: batch 1, a baked shift, no other mode. The
    decoder is given the same token again and again, since whisper.cpp cannot be kept from ending a window.
    """

    def __init__(self, model: Whisper, device: str) -> None:
        import _pywhispercpp

        from whisper_steer.convert import convert

        if device != "cpu":
            raise UsageError(f"whisper.cpp is measured on the CPU, not on {device}: choose other --runtimes")
        self.calls: Any = _pywhispercpp
        self.threads = torch.get_num_threads()
        self.folder = tempfile.TemporaryDirectory(prefix="whisper-steer-latency-")
        self.path = convert(model, "ggml", Path(self.folder.name) / "model.bin")
        self.opened = _Opened(self.path)
        self.worn: tuple[Shift, _Opened] | None = None

    def features(self, audio: Tensor) -> Tensor:
        """They stay inside; what is returned is the sound."""
        samples = audio[0].numpy()
        self._check(self.calls.whisper_pcm_to_mel(self.opened.context, samples, len(samples), self.threads))
        self.opened.heard = True
        return audio

    def encode(self, features: Tensor) -> None:
        if not self.opened.heard:
            self.features(features)
        self._check(self.calls.whisper_encode(self.opened.context, 0, self.threads))

    def decode(self, encoded: None) -> None:
        token = self.calls.whisper_token_sot(self.opened.context)
        for past in range(TOKENS):
            self._check(self.calls.whisper_decode(self.opened.context, token, 1, past, self.threads))

    def steered(self, steering: Steering) -> Any:
        raise UsageError("whisper.cpp cannot be steered, but for a baked shift")

    @contextmanager
    def baked(self, shift: Shift) -> Iterator[None]:
        """A second model, kept for the next round."""
        from whisper_steer.bake import bake

        if self.worn is None or self.worn[0] is not shift:
            out = Path(self.folder.name) / "baked.bin"
            out.unlink(missing_ok=True)
            bake(self.path, steering=Steering((shift,)), out=out)
            self.worn = shift, _Opened(out)
        plain, self.opened = self.opened, self.worn[1]
        try:
            yield
        finally:
            self.opened = plain

    def _check(self, status: int) -> None:
        if status != 0:
            raise ModelError(f"whisper.cpp returned {status} for a random model: leave it out of --runtimes")


MAKERS: dict[str, Callable[[Whisper, str], Any]] = {
    "openai": OpenAIRuntime,
    "transformers": TransformersRuntime,
    "faster": FasterRuntime,
    "whisper.cpp": WhisperCppRuntime,
}


@contextmanager
def _steered(model: Any, steering: Steering) -> Iterator[None]:
    """With the steering's tensors on the model's device before anything is timed: there they stay for as
    long as a model is steered."""
    with steer(model, steering=steering) as handle:
        handle.on(model.device)
        yield


@contextmanager
def _biased(bias: Tensor, shift: Shift) -> Iterator[None]:
    """The shift inside the weights for the length of the block; then the very numbers of before."""
    before = bias.clone()
    try:
        with torch.no_grad():
            bias += shift.delta(bias, 1.0).to(bias.dtype)
        yield
    finally:
        with torch.no_grad():
            bias.copy_(before)

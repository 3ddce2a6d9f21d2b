"""A ctranslate2.models.Whisper that is steered: same methods, edits in its encoder, withheld windows empty.

CTranslate2 cannot be hooked. What is done instead depends on the steerings at work:
- none (alpha 0): everything is passed on, bit for bit;
- constant shifts alone: a second model encodes, loaded from the same model.bin, patched in memory, with but a
  stub of a decoder (ct2_stub.py): a change of alpha loads the encoder, no more;
- anything that looks at frames: the encoder runs in PyTorch, from the same weights (ct2_encoder.py), and
  CTranslate2 decodes its output.

Since all paths of faster-whisper, and of programs built on it, go through these methods, they all are
steered.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ctranslate2
import numpy as np
import torch
from torch import Tensor

from .ct2_encoder import load_encoder, run_encoder
from .ct2_file import MODEL_FILE, ffn_bias_name
from .ct2_stub import encoder_bytes
from .edits import Shift
from .errors import ModelError
from .passing import Pass, Step, edited_stretches
from .registry import Verdict, verdicts_of
from .withholding import Stretch, Suppressed

if TYPE_CHECKING:
    from whisper.model import AudioEncoder

    from .attach import Handle

# files beside model.bin that faster-whisper reads, not CTranslate2
_NOT_CTRANSLATE2 = ("tokenizer.json", "preprocessor_config.json")


@dataclass(frozen=True, eq=False)
class Ct2Source:
    """Where a model came from. path: its folder; with `files`, only its name. files: name -> contents, if it
    was loaded from memory. options: how it was loaded (device, compute_type, inter_threads, ...)."""

    path: str
    files: dict[str, bytes] | None
    options: dict[str, Any]

    @property
    def model_bin(self) -> Path | bytes:
        return Path(self.path) / MODEL_FILE if self.files is None else self.files[MODEL_FILE]

    def load_encoder(self, additions: dict[str, np.ndarray]) -> ctranslate2.models.Whisper:
        """A model to encode with, and for nothing else, with vectors added to variables of the file."""
        files = self.files
        if files is None:
            folder = Path(self.path)
            beside = [path for path in folder.iterdir() if path.suffix in (".json", ".txt")]
            files = {path.name: path.read_bytes() for path in beside if path.name not in _NOT_CTRANSLATE2}
        files = {**files, MODEL_FILE: encoder_bytes(self.model_bin, additions)}
        return ctranslate2.models.Whisper(self.path, files=files, **self.options)


@dataclass(eq=False)
class Withheld:
    """A window whose words were withheld; start and end are filled in by who knows them."""

    handle: Handle
    record: Suppressed

    def place(self, start: float, end: float) -> None:
        self.record = replace(self.record, start=start, end=end)


@dataclass(eq=False)
class Run:
    """What was done during a part of a transcription, by whom it is watched. withheld: windows; edited:
    stretches of the other windows, seconds; generated: where the windows of the last call of `generate` were
    edited, from the windows' starts, until their place is known."""

    withheld: list[Withheld] = field(default_factory=list)
    edited: list[Stretch] = field(default_factory=list)
    generated: list[tuple[Stretch, ...]] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        token = _run.set(self)
        try:
            yield
        finally:
            _run.reset(token)

    def take(self) -> list[Withheld]:
        taken, self.withheld = self.withheld, []
        return taken

    def take_edited(self) -> list[Stretch]:
        taken, self.edited = self.edited, []
        return taken

    def place_next(self, start: float, duration: float, keep: bool) -> None:
        """The next window of the last `generate` lies there, in seconds; keep: it was not withheld."""
        stretches = self.generated.pop(0) if self.generated else ()
        if keep:
            self.edited += [(start + a, start + min(b, duration)) for a, b in stretches if a < duration]


_run: ContextVar[Run | None] = ContextVar("whisper_steer_ct2_run", default=None)


def current_run() -> Run | None:
    """The run that is being watched around this call."""
    return _run.get()


class NoTokens(list[int]):
    """The tokens of a withheld window: none. `withheld` says which window it was."""

    withheld: Withheld


@dataclass(frozen=True)
class NoWords:
    """What `generate` returns for a withheld window; the fields of WhisperGenerationResult. Its scores make
    no runtime try again at a higher temperature or skip the window by another rule."""

    sequences: list[list[str]]
    sequences_ids: list[list[int]]
    scores: list[float] = field(default_factory=lambda: [0.0])
    logits: list[Any] = field(default_factory=list)
    no_speech_prob: float = 0.0


class _Later:
    """A result of `generate(asynchronous=True)`, finished by `result()`."""

    def __init__(self, waiting: Any, finish: Callable[[Any], Any]) -> None:
        self._waiting, self._finish = waiting, finish

    def done(self) -> bool:
        return self._waiting is None or self._waiting.done()

    def result(self) -> Any:
        return self._finish(None if self._waiting is None else self._waiting.result())


@dataclass(frozen=True, eq=False)
class _Encoded:
    """An output of our encoder: features (batch, frames, d_model), and per window who withholds it and where
    it was edited."""

    features: Tensor
    verdicts: list[Verdict | None]
    edited: list[tuple[Stretch, ...]]


@dataclass(eq=False)
class _Made:
    """What is made once for a model. shifted: what encodes with shifts, and with which; kept when alpha goes
    to 0, where the plain model does. encoder: the one in PyTorch."""

    shifted: tuple[tuple[Any, ...], ctranslate2.models.Whisper] | None = None
    encoder: AudioEncoder | None = None


class SteeredWhisper:
    """Stands in for a ctranslate2.models.Whisper; attributes that are not here are those of the model.

    plain: the model that is replaced; it writes all words. to_text: token ids -> text, for the records of
    withheld words. Several threads may call it at once.
    """

    def __init__(
        self,
        plain: ctranslate2.models.Whisper,
        source: Ct2Source,
        to_text: Callable[[list[int]], str],
    ) -> None:
        self.source = source
        self.handles: tuple[Handle, ...] = ()  # replaced, never changed: other threads walk through it
        self.plain = plain
        self._to_text = to_text
        self._lock = threading.RLock()
        self._made = _Made()
        self._bound: weakref.WeakSet[SteeredWhisper] = weakref.WeakSet()
        self._encoded: weakref.WeakKeyDictionary[Any, _Encoded] = weakref.WeakKeyDictionary()

    def add(self, handle: Handle, at_once: bool = False) -> None:
        """at_once: also to the transcriptions that are under way."""
        with self._lock:
            for steered in (self, *self._bound) if at_once else (self,):
                steered.handles = (*steered.handles, handle)

    def remove(self, handle: Handle) -> None:
        with self._lock:
            self.handles = tuple(h for h in self.handles if h is not handle)

    def bound(self) -> SteeredWhisper:
        """The same with the handles of now for good, also when they are removed: for one transcription,
        whose segments are decoded when they are asked for. A new alpha of a handle holds there, too."""
        bound = SteeredWhisper.__new__(SteeredWhisper)
        bound.__dict__.update(self.__dict__)  # one lock, one cache
        with self._lock:
            bound.handles = self.handles
            self._bound.add(bound)
        return bound

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "plain" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.plain, name)

    # ---------- the methods of ctranslate2.models.Whisper

    def encode(self, features: ctranslate2.StorageView, to_cpu: bool = False) -> ctranslate2.StorageView:
        """Mel features (batch, n_mels, frames) -> (batch, frames // 2, d_model), steered."""
        steps = self._steps()
        if all(_is_constant(step) for step in steps):
            return self._shifting(steps).encode(features, to_cpu=to_cpu)
        encoder, device = self._torch_encoder()
        mel = torch.as_tensor(np.asarray(features) if features.device == "cpu" else features)
        weight = encoder.conv1.weight
        steps = tuple(replace(step, steering=step.handle.on(device)) for step in steps)

        current = Pass(steps, of_decode=True)

        def run_block(layer: int, x: Tensor) -> Tensor:
            return cast(Tensor, encoder.blocks[layer](x))

        def after_block(layer: int, x: Tensor) -> Tensor:
            edited = current.after_block(layer, x, run_block)
            return x if edited is None else edited

        mel = mel.to(weight.device, weight.dtype)
        current.begin(mel)
        with _cpu_threads(int(self.source.options.get("intra_threads") or 0)):
            output = run_encoder(encoder, mel, after_block)
        if to_cpu:
            output = output.cpu()
        view, kept = _storage(output)
        edited = edited_stretches(steps, len(kept)) if _run.get() is not None else []
        self._encoded[view] = _Encoded(kept, verdicts_of(steps), edited)
        return view

    def generate(
        self, features: ctranslate2.StorageView, prompts: Sequence[Any], **options: Any
    ) -> list[Any]:
        """As CTranslate2's; a withheld window has no tokens, and is recorded.

        Its words are decoded all the same if its handle asks for it (`decode_withheld`).
        """
        features = self._encoded_features(features)
        encoded, run = self._encoded.get(features), _run.get()
        if run is not None:
            run.generated = [] if encoded is None else list(encoded.edited)
        if encoded is None or not any(encoded.verdicts):
            return self.plain.generate(features, prompts, **options)
        verdicts = encoded.verdicts
        rows = [i for i, v in enumerate(verdicts) if v is None or v.decode]
        decoded: dict[int, Any] = {}
        if rows:
            kept = _storage(encoded.features[rows]) if len(rows) < len(verdicts) else (features, None)
            results = self.plain.generate(kept[0], [prompts[row] for row in rows], **options)
            decoded = dict(zip(rows, results, strict=True))
        return [
            decoded[row] if verdict is None else self._withhold(verdict, decoded.get(row), options)
            for row, verdict in enumerate(verdicts)
        ]

    def align(self, features: ctranslate2.StorageView, *args: Any, **options: Any) -> list[Any]:
        """As CTranslate2's, of the steered encoder output."""
        return self.plain.align(self._encoded_features(features), *args, **options)

    def detect_language(self, features: ctranslate2.StorageView) -> list[Any]:
        """As CTranslate2's, of the steered encoder output."""
        return self.plain.detect_language(self._encoded_features(features))

    def unload_model(self, to_cpu: bool = False) -> None:
        """As CTranslate2's; what only encodes is dropped, and made again when it is needed."""
        with self._lock:
            self._made.shifted = self._made.encoder = None
        self.plain.unload_model(to_cpu)

    # ---------- what is behind them

    def _steps(self) -> tuple[Step, ...]:
        alphas = [(handle, handle.alpha) for handle in self.handles]
        return tuple(Step(handle, alpha, handle.steering) for handle, alpha in alphas if alpha > 0)

    def _shifting(self, steps: tuple[Step, ...]) -> ctranslate2.models.Whisper:
        """The model to encode with: that which has these constant steps in its weights."""
        if not steps:
            return self.plain
        key = tuple((step.steering, step.alpha) for step in steps)
        with self._lock:
            if self._made.shifted is None or not _same(self._made.shifted[0], key):
                self._made.shifted = None  # its memory is used again
                self._made.shifted = key, self.source.load_encoder(_additions(steps))
            return self._made.shifted[1]

    def _encoded_features(self, features: ctranslate2.StorageView) -> ctranslate2.StorageView:
        """Mel features are encoded here, since CTranslate2 would do it unsteered."""
        is_mel = features not in self._encoded and list(features.shape)[1] == self.plain.n_mels
        return self.encode(features) if is_mel and self.handles else features

    def _torch_encoder(self) -> tuple[AudioEncoder, torch.device]:
        """The encoder, made once, on CTranslate2's device if this PyTorch can use it."""
        with self._lock:
            if self._made.encoder is None:
                model = self.plain
                encoder = load_encoder(self.source.model_bin)
                if model.device == "cuda" and torch.cuda.is_available():
                    dtype = _dtype(str(model.compute_type))
                    encoder = encoder.to(torch.device("cuda", model.device_index[0]), dtype)
                self._made.encoder = encoder
            return self._made.encoder, self._made.encoder.conv1.weight.device

    def _withhold(self, verdict: Verdict, decoded: Any, options: dict[str, Any]) -> Any:
        run = _run.get()  # now: an asynchronous result may be asked for elsewhere
        hypotheses = options.get("num_hypotheses", 1)

        def finish(result: Any) -> NoWords:
            withheld = Withheld(verdict.step.handle, self._record(result, verdict, options))
            tokens = NoTokens()
            tokens.withheld = withheld
            if run is None:
                withheld.handle.record(withheld.record)
            else:
                run.withheld.append(withheld)
            return NoWords([[]] * hypotheses, [tokens] * hypotheses, [0.0] * hypotheses)

        return _Later(decoded, finish) if options.get("asynchronous") else finish(decoded)

    def _record(self, result: Any, verdict: Verdict, options: dict[str, Any]) -> Suppressed:
        if result is None:
            return verdict.record(None)
        tokens = result.sequences_ids[0]
        average = None
        if options.get("return_scores") and result.scores:
            # CTranslate2 divides the sum by length ** penalty; Whisper's average counts the end token, too
            average = result.scores[0] * len(tokens) ** options.get("length_penalty", 1) / (len(tokens) + 1)
        no_speech = result.no_speech_prob if options.get("return_no_speech_prob") else None
        return verdict.record(self._to_text(tokens), no_speech, average)


@contextmanager
def _cpu_threads(count: int) -> Iterator[None]:
    """Within the block PyTorch uses so many; 0: as it is set."""
    before = torch.get_num_threads()
    if count in (0, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_constant(step: Step) -> bool:
    steering = step.steering
    return steering.gate is None and all(isinstance(edit, Shift) for edit in steering.edits)


def _additions(steps: tuple[Step, ...]) -> dict[str, np.ndarray]:
    """Variable -> what is added to it, summed over all shifts of a layer."""
    additions: dict[str, np.ndarray] = {}
    for step in steps:
        for edit in step.steering.edits:
            if isinstance(edit, Shift):
                name, vector = ffn_bias_name(edit.layer), edit.delta(edit.direction, step.alpha)
                additions[name] = additions.get(name, np.float32(0)) + vector.cpu().numpy()
    return additions


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(x[0] is y[0] and x[1] == y[1] for x, y in zip(a, b, strict=True))


def _dtype(compute_type: str) -> torch.dtype:
    """CTranslate2's type of activations on a GPU."""
    if compute_type.endswith("bfloat16"):
        return torch.bfloat16
    return torch.float16 if compute_type.endswith("float16") else torch.float32


def _storage(tensor: Tensor) -> tuple[ctranslate2.StorageView, Tensor]:
    """(a view of the tensor for CTranslate2, the tensor that must live as long as it)."""
    if tensor.dtype == torch.bfloat16:  # not known to the array interfaces
        tensor = tensor.float()
    tensor = tensor.contiguous()
    if tensor.device.type == "cpu":
        return ctranslate2.StorageView.from_array(tensor.numpy()), tensor
    torch.cuda.current_stream(tensor.device).synchronize()  # CTranslate2 reads on a stream of its own
    return ctranslate2.StorageView.from_array(tensor), tensor


def read_files(files: dict[str, Any]) -> dict[str, bytes]:
    """faster-whisper's `files` (bytes or file-like objects) as bytes, so that they can be read again.

    Raises ModelError without a model.bin."""
    contents = {name: value if isinstance(value, bytes) else value.read() for name, value in files.items()}
    if MODEL_FILE not in contents:
        raise ModelError(f"files has no {MODEL_FILE}: expected the contents of a CTranslate2 model's folder")
    return contents

"""What is installed on a steered model: one Registry per model, whatever the number of handles.

Forward hooks on the encoder and on the blocks that are read or edited, and the instance attributes
`model.decode` and `model.detect_language` (transformers_steering.py has those of its own runtime). They come
with the first handle and go with the last one.
Everything about a running encoder pass lives in thread-local storage and ends with the pass, also when it
raises.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from whisper.decoding import DecodingOptions, DecodingResult
from whisper.model import Whisper

from .errors import UsageError
from .passing import Pass, Step, edited_stretches
from .withholding import EditedMarker, Suppressed, active_collector, marked, skipped

if TYPE_CHECKING:
    from .attach import Handle

logger = logging.getLogger("whisper_steer")

_DEFAULT_OPTIONS = DecodingOptions()
_BEGIN, _END = -2, -1  # keys of the encoder's own hooks; block hooks have their layer

_guard = threading.Lock()
_locks: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_registries: weakref.WeakKeyDictionary[nn.Module, Registry] = weakref.WeakKeyDictionary()


def model_lock(model: Any) -> threading.RLock:
    """The re-entrant lock under which a model of any runtime is decoded, steered and unsteered; the same for
    its whole life."""
    with _guard:
        lock = _locks.get(model)
        if lock is None:
            lock = _locks[model] = threading.RLock()
        return lock


def registry_of(model: nn.Module) -> Registry | None:
    """The model's registry, None if it is not steered."""
    return _registries.get(model)


@dataclass(frozen=True, eq=False)
class Verdict:
    """A window is withheld: by whom, its logit that nobody speaks, and the threshold that it is above."""

    step: Step
    logit: float
    threshold: float

    @property
    def decode(self) -> bool:
        """Shall the decoder run all the same?"""
        return self.step.handle.decode_withheld

    def record(
        self,
        text: str | None,
        no_speech_prob: float | None = None,
        avg_logprob: float | None = None,
        times: tuple[float | None, float | None] = (None, None),
    ) -> Suppressed:
        """What is kept of the window. text and the decoder's scores: None if it was not run."""
        score = probability(self.logit)
        return Suppressed(*times, text, score, no_speech_prob, avg_logprob, self.logit, self.threshold)


class Registry:
    """All that is installed on one model."""

    wrapped: tuple[str, ...] = ("decode", "detect_language")  # the model's methods that are replaced by ours

    def __init__(self, model: Any) -> None:
        # weak: what hangs on a model must not keep it alive
        self._model = weakref.ref(model)
        self._lock = model_lock(model)
        self.handles: tuple[Handle, ...] = ()  # replaced, never changed: other threads walk through it
        self._hooks: dict[int, RemovableHandle] = {}
        self._replaced: dict[str, Callable[..., Any]] = {}
        self._local = threading.local()

    def add(self, handle: Handle) -> None:
        """Call with the lock held."""
        self._install((*self.handles, handle))

    def remove(self, handle: Handle) -> None:
        with self._lock:
            self._install(tuple(h for h in self.handles if h is not handle))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError("a steered model cannot be copied or pickled: call handle.remove() first")

    # ---------- what is put on the model

    def _install(self, handles: tuple[Handle, ...]) -> None:
        """Give the model the hooks and attributes that `handles` need; without handles, none."""
        before, self.handles = self.handles, handles
        model = self._model()
        if model is None:
            return
        self._install_hooks(model)
        if handles and not before:
            _registries[model] = self
            for name in self.wrapped:
                if name in model.__dict__:
                    self._replaced[name] = model.__dict__[name]
                setattr(model, name, getattr(self, name))
        if before and not handles:
            for name in self.wrapped:
                self._restore(model, name)
            del _registries[model]

    def _encoder(self, model: Any) -> tuple[nn.Module, nn.ModuleList]:
        """The encoder and its blocks."""
        return model.encoder, model.encoder.blocks

    def _install_hooks(self, model: Any) -> None:
        """Install what is lacking and remove what is no longer needed; a hook in use stays in place."""
        needed = {layer for handle in self.handles for layer in handle.steering.layers}
        needed |= {_BEGIN, _END} if self.handles else set()
        for key in sorted(self._hooks.keys() - needed):
            self._hooks.pop(key).remove()
        encoder, blocks = self._encoder(model)
        for key in sorted(needed - self._hooks.keys()):
            if key == _BEGIN:
                self._hooks[key] = encoder.register_forward_pre_hook(self._encoder_begins, with_kwargs=True)
            elif key == _END:
                # always_call: the pass must be forgotten when the encoder raises, too
                self._hooks[key] = encoder.register_forward_hook(self._encoder_ends, always_call=True)
            else:
                self._hooks[key] = blocks[key].register_forward_hook(self._block_hook(key))

    def _restore(self, model: Any, name: str) -> None:
        if model.__dict__.get(name) != getattr(self, name):
            logger.warning("model.%s was replaced after steering began: it is left as it is", name)
        elif name in self._replaced:
            setattr(model, name, self._replaced[name])
        else:
            delattr(model, name)

    def _original(self, name: str) -> Callable[..., Any]:
        """model.<name> as it was before."""
        model = self._living_model()
        return self._replaced.get(name) or partial(getattr(type(model), name), model)

    def _living_model(self) -> Any:
        model = self._model()
        if model is None:
            raise UsageError("the steered model no longer exists: keep a reference to it while decoding")
        return model

    # ---------- encoder hooks

    def _encoder_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = self._current()
        if current is None or not current.of_decode:
            steps = self._steps()
            current = self._local.current = Pass(steps, of_decode=False) if steps else None
        # by its shape: runtimes and their versions name it differently
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        mel = next((value for value in given if value.ndim == 3), None)
        if current is not None and mel is not None:
            current.begin(mel)

    def _encoder_ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        current = self._current()
        if current is not None and not current.of_decode:
            self._local.current = None

    def _block_hook(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def after_block(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            current = self._current()
            # a block that is called by itself, outside of the encoder, is left alone
            if current is None or current.rewinding:
                return None
            return current.after_block(layer, output, self._run_block)

        return after_block

    def _run_block(self, layer: int, x: Tensor) -> Tensor:
        """Block `layer` on x, while its hook leaves it alone."""
        return cast(Tensor, self._encoder(self._living_model())[1][layer](x))

    def unsteered_encoder(self) -> tuple[Any, Callable[[int, Tensor], Tensor]]:
        """(the encoder, what runs its block (layer, x (batch, frames, d_model)) unsteered): outside of a
        pass a block's hook leaves it alone."""
        return self._encoder(self._living_model())[0], self._run_block

    def _current(self) -> Pass | None:
        return getattr(self._local, "current", None)

    def _steps(self) -> tuple[Step, ...]:
        """A step for every handle that is not at alpha 0."""
        device = self._living_model().device
        alphas = [(handle, handle.alpha) for handle in self.handles]
        return tuple(Step(handle, alpha, handle.on(device)) for handle, alpha in alphas if alpha > 0)

    @contextmanager
    def _passing(self, steps: tuple[Step, ...]) -> Iterator[None]:
        self._local.current = Pass(steps, of_decode=True)
        try:
            yield
        finally:
            self._local.current = None

    # ---------- the model's methods while it is steered

    def detect_language(self, *args: Any, **kwargs: Any) -> Any:
        """As before, but not while another thread decodes: it would write into that one's key/value cache."""
        with self._lock:
            return self._original("detect_language")(*args, **kwargs)

    def decode(
        self, mel: Tensor, options: DecodingOptions = _DEFAULT_OPTIONS, **kwargs: Any
    ) -> DecodingResult | list[DecodingResult]:
        """`Whisper.decode`, with the windows withheld in which a gate finds nobody speaking.

        mel: (n_mels, frames) -> one result, or (batch, n_mels, frames) -> a list. Features that are encoded
        already and language identification are passed on: there is nothing to gate.
        """
        with self._lock:
            model, original = self._living_model(), self._original("decode")
            steps = self._steps()
            if not steps:
                return cast("DecodingResult | list[DecodingResult]", original(mel, options, **kwargs))
            options = replace(options, **kwargs)
            encoded = mel.shape[-2:] == (model.dims.n_audio_ctx, model.dims.n_audio_state)
            gated = any(step.steering.gate is not None for step in steps)
            if encoded or not gated or options.task == "lang_id":
                with self._passing(steps):
                    return cast("DecodingResult | list[DecodingResult]", original(mel, options))
            batch = mel.unsqueeze(0) if mel.ndim == 2 else mel
            with torch.no_grad(), self._passing(steps):
                features = model.encoder(batch.half() if options.fp16 else batch)
            results = self._decode_gated(features, steps, options, again=self._again(mel))
            return results[0] if mel.ndim == 2 else results

    def _decode_gated(
        self,
        features: Tensor,
        steps: tuple[Step, ...],
        options: DecodingOptions,
        again: bool,
    ) -> list[DecodingResult]:
        """features: (batch, n_audio_ctx, n_audio_state), of a pass with these steps; again: this very window
        was decoded just before, at another temperature."""
        model, verdicts = self._living_model(), verdicts_of(steps)
        rows = [i for i, v in enumerate(verdicts) if v is None or v.decode]
        decoded: dict[int, DecodingResult] = {}
        if rows:
            chosen = features if len(rows) == len(features) else features[rows]
            decoded = dict(zip(rows, self._original("decode")(chosen, options), strict=True))
        collector = active_collector(model)
        edited = edited_stretches(steps, len(verdicts)) if collector is not None else []
        results = []
        for i, verdict in enumerate(verdicts):
            if verdict is None:
                result = decoded[i]
                if edited and edited[i]:
                    result = replace(result, temperature=EditedMarker(result.temperature, edited[i]))
                results.append(result)
                continue
            found = decoded.get(i)
            scores = () if found is None else (found.no_speech_prob, found.avg_logprob)
            record = verdict.record(None if found is None else found.text, *scores)
            empty = found or _not_decoded(features[i], options, model)
            if collector is not None:
                collector.records.append(record)
                results.append(marked(empty, options.temperature, record))
                continue
            if not again:
                verdict.step.handle.record(record)
            results.append(skipped(empty))
        return results

    def _again(self, mel: Tensor) -> bool:
        """Is this the tensor that this thread decoded last? `whisper.transcribe` repeats it at rising
        temperatures."""
        previous = getattr(self._local, "mel", None)
        self._local.mel = weakref.ref(mel)
        return previous is not None and previous() is mel


def verdicts_of(steps: tuple[Step, ...]) -> list[Verdict | None]:
    """Per window: None, or the verdict of the first step that withholds it."""
    verdicts: list[Verdict | None] = []
    judges = [(step, step.steering.gate, step.window_logit) for step in steps]
    columns = [
        (step, gate.window_threshold(step.alpha), logits.tolist())
        for step, gate, logits in judges
        if gate is not None and logits is not None
    ]
    for i in range(len(columns[0][2]) if columns else 0):
        verdicts.append(
            next(
                (Verdict(step, logits[i], limit) for step, limit, logits in columns if logits[i] > limit),
                None,
            )
        )
    return verdicts


def probability(logit: float) -> float:
    return float(torch.sigmoid(torch.tensor(logit, dtype=torch.float64)))


def _not_decoded(features: Tensor, options: DecodingOptions, model: Whisper) -> DecodingResult:
    """What is known of a window without running the decoder; the language stays None unless it was given."""
    language = options.language or (None if model.is_multilingual else "en")
    return DecodingResult(audio_features=features, language=language, temperature=options.temperature)

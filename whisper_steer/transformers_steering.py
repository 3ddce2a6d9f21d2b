"""Steering for transformers: WhisperForConditionalGeneration, alone or inside an ASR pipeline.

Edits and gates are read in forward hooks on the encoder's layers, so they act in every call of the model.
Words are withheld in `generate`, through which all paths go (short and long form, batches, beams, pipelines
in chunks): a withheld window comes back as one segment without tokens, and is not tried at a higher
temperature. `generate(encoder_outputs=...)` withholds nothing: the encoder, where the gate reads, does not
run.

What is relied upon in transformers (4.45 to 5): `generate` hands each batch of 30 s windows to
`generate_with_fallback`, which asks `_need_fallback` about every window in turn and returns (sequences,
outputs, should_skip, ...), each a list by window; encoder layers return a tensor (5), or a tuple that begins
with it (4). Steer before `torch.compile`: a compiled encoder does not see hooks that come later.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from whisper.model import ModelDimensions

from .convert_hf import DIMS, openai_name
from .passing import edited_stretches
from .registry import Registry, Verdict, verdicts_of
from .transformers_model import vocabulary
from .transformers_pipeline import PipelineWatch, found_around, silence
from .transformers_pipeline import is_pipeline as is_asr_pipeline
from .transformers_windows import no_speech_prob, not_decoded, only_rows, silenced, sounding_frames
from .withholding import Stretch, active_collector

FRAME_SECONDS = 0.01  # a mel frame
WINDOW_SECONDS = 30.0
_TIMES_A_WINDOW = 1500  # timestamp tokens, 20 ms apart
_FP16_MARGIN = 1000  # transformers clamps half precision outputs this far below the largest number


def is_transformers_model(model: Any) -> bool:
    """Is it a transformers WhisperForConditionalGeneration? Imports nothing."""
    module = sys.modules.get("transformers.models.whisper.modeling_whisper")
    return module is not None and isinstance(model, module.WhisperForConditionalGeneration)


def is_pipeline(model: Any) -> bool:
    """Is it a transformers ASR pipeline with a Whisper in it? Imports nothing."""
    return is_asr_pipeline(model) and is_transformers_model(model.model)


class OpenAIView:
    """What Steering.check and the zoo look at in an openai-whisper model, read from a transformers one."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.dims = ModelDimensions(**{name: getattr(config, key) for name, key in DIMS.items()})
        self.name = short_name(str(getattr(model, "name_or_path", "") or ""))
        self.encoder = SimpleNamespace(named_parameters=self._encoder_parameters)
        self._model = model

    @property
    def exact(self) -> bool:
        """False if the weights may have been rounded, so that their hash says nothing."""
        return all(parameter.dtype == torch.float32 for _, parameter in self._encoder_parameters())

    def _encoder_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.model.encoder.named_parameters():
            renamed = openai_name(f"encoder.{name}")
            if renamed is not None and renamed != "encoder.positional_embedding":  # a buffer there
                yield renamed.removeprefix("encoder."), parameter


def short_name(name_or_path: str) -> str:
    """The name that a steering is kept under: "openai/whisper-small.en" -> "small.en", else the last part."""
    last = name_or_path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return last.removeprefix("whisper-") if name_or_path.startswith("openai/") else last


@dataclass
class _Call:
    """One call of `generate`. frames: per audio, mel frames that hold sound, None if unknown. whole: its
    result must hold every window's scores, so every window is decoded. prompted: words come before the first
    window. long: there may be several windows. bare: its result is their tokens alone. spoken: numbers of the
    audios that have had words so far."""

    frames: list[int] | None
    whole: bool
    prompted: bool
    long: bool = False
    bare: bool = False
    spoken: set[int] = field(default_factory=set)


@dataclass
class _Windows:
    """One call of `generate_with_fallback`: what is found out about its windows while it runs."""

    count: int
    verdicts: list[Verdict | None] = field(default_factory=list)  # set by the first encoder pass
    judged: int = 0  # windows that were asked about; the first `count` questions come in their order
    avg_logprobs: dict[int, float] = field(default_factory=dict)
    edited: list[tuple[Stretch, ...]] = field(default_factory=list)  # by row, if somebody collects it

    def verdict(self, row: int) -> Verdict | None:
        return self.verdicts[row] if row < len(self.verdicts) else None


class TransformersRegistry(Registry):
    """All that is installed on one transformers Whisper and on the pipelines that it was steered through."""

    wrapped = ("generate", "generate_with_fallback", "_need_fallback")

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._pipelines: list[PipelineWatch] = []
        self._tokenizer: Any = None  # a pipeline's own

    def add_pipeline(self, pipeline: Any) -> None:
        """Learn the times of chunks and the vocabulary from this pipeline. Call with the lock held."""
        self._tokenizer = pipeline.tokenizer
        if not any(watch.watches(pipeline) for watch in self._pipelines):
            self._pipelines.append(PipelineWatch(pipeline, self._local))

    def _install(self, handles: tuple[Any, ...]) -> None:
        super()._install(handles)
        if not handles:
            for watch in self._pipelines:
                watch.stop()
            self._pipelines.clear()

    # ---------- edits

    def _encoder(self, model: Any) -> tuple[nn.Module, nn.ModuleList]:
        return model.model.encoder, model.model.encoder.layers

    def _block_hook(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def after_layer(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            current = self._current()
            if current is None or current.rewinding:
                return None
            before = output[0] if isinstance(output, tuple) else output
            after = current.after_block(layer, before, self._run_block)
            if after is None:
                return None
            if after.dtype == torch.float16:
                limit = torch.finfo(torch.float16).max - _FP16_MARGIN
                after = after.clamp(-limit, limit)
            return (after, *output[1:]) if isinstance(output, tuple) else after

        return after_layer

    def _run_block(self, layer: int, x: Tensor) -> Tensor:
        block = self._encoder(self._living_model())[1][layer]
        # Whisper's encoder attends to everything: no masks, whatever this version calls them
        names = list(inspect.signature(block.forward).parameters.values())[1:]
        masks = {p.name: None for p in names if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        output = block(x, **masks)
        return output[0] if isinstance(output, tuple) else output

    def _encoder_ends(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        windows, current = self._windows(), self._current()
        if windows is not None and current is not None and not windows.verdicts and output is not None:
            # the first pass sees all windows; later ones only those that are decoded again
            windows.verdicts = verdicts_of(current.steps)
            if active_collector(self._living_model()) is not None:
                windows.edited = edited_stretches(current.steps, len(windows.verdicts))
        super()._encoder_ends(module, args, output)

    # ---------- withheld windows

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As before; remembers what is known of the audio's length only here."""
        original = self._original("generate")
        arguments = inspect.signature(original).bind(*args, **kwargs).arguments
        given = {**arguments.get("kwargs", {}), **arguments}
        config = given.get("generation_config") or self._living_model().generation_config
        whole = any(
            given.get(name) or getattr(config, name, None)
            for name in ("return_dict_in_generate", "force_unique_generate_call")
        )
        features = given.get("input_features")
        long = isinstance(features, Tensor) and features.shape[-1] * FRAME_SECONDS > WINDOW_SECONDS
        call = _Call(
            sounding_frames(given),
            whole,
            given.get("prompt_ids") is not None,
            long=long,
            bare=not given.get("return_segments"),
        )
        outer = getattr(self._local, "call", None)
        self._local.call = call
        try:
            with found_around(self._local):
                return original(*args, **kwargs)
        finally:
            self._local.call = outer

    def generate_with_fallback(self, *args: Any, **kwargs: Any) -> Any:
        """As before, with the windows emptied in which a gate finds nobody speaking."""
        original = self._original("generate_with_fallback")
        steps = self._steps()
        if not steps:
            return original(*args, **kwargs)
        arguments = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
        with self._passing(steps), self._watching(arguments["cur_bsz"]) as windows:
            sparing = any(step.steering.gate and not step.handle.decode_withheld for step in steps)
            if sparing and arguments["segment_input"] is not None and not self._call().whole:
                result = self._decode_needed(original, arguments, windows)
            else:
                result = original(**arguments)
        if any(windows.verdicts):
            result = self._withheld(result, arguments, windows)
        self._note_edited(arguments, windows)
        rows = enumerate(arguments["batch_idx_map"])
        self._call().spoken.update(audio for row, audio in rows if windows.verdict(row) is None)
        return result

    def _need_fallback(self, *args: Any, **kwargs: Any) -> Any:
        """As before, but never for a withheld window: there is nothing to get right."""
        original = self._original("_need_fallback")
        answer, windows = original(*args, **kwargs), self._windows()
        if windows is None or windows.judged >= windows.count:
            return answer
        row = windows.judged
        windows.judged += 1
        if windows.verdict(row) is None:
            return answer
        asked = inspect.signature(original).bind(*args, **kwargs).arguments
        output = asked["seek_outputs"][asked["index"]]
        if isinstance(output, Mapping) and output.get("scores") is not None:
            windows.avg_logprobs[row] = float(
                self._living_model()._retrieve_avg_logprobs(
                    output["scores"], asked["seek_sequence"], asked["temperature"] or 0.0
                )
            )
        return False, False

    def _decode_needed(
        self, original: Callable[..., Any], arguments: dict[str, Any], windows: _Windows
    ) -> tuple[Any, ...]:
        """Encode first, then run the decoder only where something is withheld by no handle, or by one that
        wants to know the words."""
        count, config = windows.count, arguments["generation_config"]
        with torch.no_grad():
            features = self._living_model().model.encoder(arguments["segment_input"])[0]
        verdicts = [windows.verdict(row) for row in range(count)]
        rows = [i for i, v in enumerate(verdicts) if v is None or v.decode]
        windows.verdicts = [verdicts[row] for row in rows]
        windows.count = len(rows)
        chosen = only_rows(arguments, rows)
        # with several temperatures transformers would not narrow this down to the windows it repeats, and
        # beams would multiply it at each
        once = len(arguments["temperatures"]) == 1
        once |= len(rows) == 1 and (getattr(config, "num_beams", None) or 1) == 1
        if once and getattr(config, "cache_implementation", None) != "static":
            from transformers.modeling_outputs import BaseModelOutput

            chosen["kwargs"] = {**chosen["kwargs"], "encoder_outputs": BaseModelOutput(features[rows])}
        decoded = original(**chosen) if rows else ([], [], [], [], None)
        windows.avg_logprobs = {rows[place]: value for place, value in windows.avg_logprobs.items()}
        windows.verdicts, windows.count = verdicts, count
        sequences, outputs, skip, condition, kind = decoded
        prompts, places = arguments["decoder_input_ids"], {row: place for place, row in enumerate(rows)}
        return (
            [sequences[places[i]] if i in places else prompts[i, :0] for i in range(count)],
            [outputs[places[i]] if i in places else not_decoded(prompts[i], config) for i in range(count)],
            [bool(skip[places[i]]) if i in places else False for i in range(count)],
            [
                condition[places[i]] if i in places else arguments["do_condition_on_prev_tokens"][i]
                for i in range(count)
            ],
            kind,
        )

    def _withheld(self, result: tuple[Any, ...], arguments: dict[str, Any], windows: _Windows) -> Any:
        """What `generate_with_fallback` returned, without the words of withheld windows, now recorded."""
        sequences, outputs, skip, conditions = map(list, result[:4])
        call, prompt_length = self._call(), arguments["decoder_input_ids"].shape[-1]
        for row in range(windows.count):
            verdict = windows.verdict(row)
            if verdict is None:
                continue
            spared = len(sequences[row]) == 0 and not verdict.decode
            processors = None if spared else arguments.get("logits_processor")  # not of an earlier window
            record = verdict.record(
                None if spared else self._text(sequences[row]),
                no_speech_prob(processors, row, windows.count),
                windows.avg_logprobs.get(row),
                self._times(arguments, row),
            )
            collector = active_collector(self._living_model())
            if collector is None:
                verdict.step.handle.record(record)
            else:
                collector.records.append(record)
            sequences[row] = self._nothing(sequences[row], arguments)
            outputs[row] = silenced(outputs[row], prompt_length, arguments["generation_config"])
            skip[row] = False  # an empty segment; without one, transformers' batches and word times fail
            # the next window is not told of "previous words" where there are none
            spoke = call.prompted or arguments["batch_idx_map"][row] in call.spoken
            conditions[row] = conditions[row] and spoke
        return (sequences, outputs, skip, conditions, *result[4:])

    def _note_edited(self, arguments: dict[str, Any], windows: _Windows) -> None:
        """Tell the collector where the windows that keep their words were edited."""
        collector = active_collector(self._living_model())
        if collector is None:
            return
        for row, stretches in enumerate(windows.edited[: windows.count]):
            if stretches and windows.verdict(row) is None:
                start, end = self._times(arguments, row)
                placed = [(start + a, min(start + b, end)) for a, b in stretches if start + a < end]
                collector.edited.extend(placed)

    def _nothing(self, tokens: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The tokens of a withheld window: none; over long audio, where later windows' times hang on them,
        two timestamps."""
        config = arguments["generation_config"]
        call = self._call()
        needed = call.long and (call.bare or getattr(self._local, "sequential", False))
        if not needed or not config.return_timestamps or arguments.get("return_token_timestamps"):
            return tokens[:0]
        return tokens.new_tensor(silence(config, _TIMES_A_WINDOW))

    def _times(self, arguments: dict[str, Any], row: int) -> tuple[float, float]:
        """Seconds in the audio: start and end of the window of this row."""
        audio = int(arguments["batch_idx_map"][row])
        start = int(arguments["seek"][audio]) * FRAME_SECONDS
        end = start + WINDOW_SECONDS
        frames, repeats = self._call().frames, 1
        if frames:
            repeats = max(1, len(arguments["seek"]) // len(frames))  # num_return_sequences
            end = min(end, frames[audio // repeats] * FRAME_SECONDS)
        offsets = getattr(self._local, "offsets", None)
        offset = offsets[audio // repeats] if offsets and audio // repeats < len(offsets) else 0.0
        return offset + start, offset + max(start, end)

    def _text(self, tokens: Tensor) -> str | None:
        """Only words: text tokens have the smallest numbers. None if the vocabulary is not Whisper's own."""
        own = vocabulary(self._living_model().config.vocab_size)
        if own is None and self._tokenizer is None:
            return None
        end = self._tokenizer.eos_token_id if own is None else own.eot
        return str((own or self._tokenizer).decode([token for token in tokens.tolist() if token < end]))

    # ---------- state of this thread

    def _call(self) -> _Call:
        call: _Call | None = getattr(self._local, "call", None)
        return call or _Call(None, whole=False, prompted=True)

    def _windows(self) -> _Windows | None:
        return getattr(self._local, "windows", None)

    @contextmanager
    def _watching(self, count: int) -> Iterator[_Windows]:
        self._local.windows = _Windows(count)
        try:
            yield self._local.windows
        finally:
            self._local.windows = None

"""Many ways of steering one model on the same clips: the encoder's lower blocks run once for all of them.

The papers look at the first greedy pass over every 30 s window, so nothing else is run here: no fallback to
higher temperatures, no skip rule (it is applied to the scores afterwards). Where only no_speech_prob is asked
for, one step of the decoder gives it.

Scores are kept, clip by clip, in a file named by the model's and the settings' fingerprint: a run that was
killed goes on where it stopped, other settings start anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import zlib
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from whisper.tokenizer import get_tokenizer

from calibration.activations import encode_windows, window_mels
from calibration.decoding import greedy_decode
from calibration.evaluate import counts_as_speech_nsp, escapes_skip_rule, normalise
from whisper_steer.edits import Edit
from whisper_steer.errors import AudioError, UsageError
from whisper_steer.plaindata import moved

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip

logger = logging.getLogger("whisper_steer")


@dataclass(frozen=True, eq=False)
class Setting:
    """One way of running the model.

    edits: applied in order at alpha 1, layers ascending; none: plain. Settings that begin with the same
    object share its result. decode: write the text too, not only no_speech_prob.
    """

    edits: tuple[Edit, ...]
    decode: bool


@dataclass(frozen=True)
class Score:
    """One clip under one setting.

    windows: (no_speech_prob, avg_logprob) of its 30 s windows; avg_logprob is None where nothing was decoded.
    texts: of the windows, empty where nothing was decoded. seconds: length of the clip.
    """

    windows: tuple[tuple[float, float | None], ...]
    texts: tuple[str, ...]
    seconds: float

    @property
    def no_speech_prob(self) -> float:
        """Lowest of the windows: the one most like speech."""
        return min(p for p, _ in self.windows)

    @property
    def nsp(self) -> bool:
        return any(counts_as_speech_nsp(p) for p, _ in self.windows)

    @property
    def hr(self) -> bool:
        """Raises UsageError if nothing was decoded."""
        return any(self._kept())

    @property
    def text_fp(self) -> bool:
        """Words are left after the skip rule. Raises UsageError if nothing was decoded."""
        return any(
            kept and bool(normalise(text)) for kept, text in zip(self._kept(), self.texts, strict=True)
        )

    @property
    def text(self) -> str:
        """All windows' text, the skip rule not applied."""
        return " ".join(self.texts)

    def _kept(self) -> list[bool]:
        kept = []
        for probability, logprob in self.windows:
            if logprob is None:
                raise UsageError("HR and text-FPR need decoded windows: make the setting with decode=True")
            kept.append(escapes_skip_rule(probability, logprob))
        return kept


@torch.no_grad()
def first_step(model: Whisper, features: Tensor) -> list[float]:
    """no_speech_prob for encoder output (batch, 1500, d_model), as openai-whisper's decoding computes it."""
    tokenizer = get_tokenizer(model.is_multilingual, num_languages=model.num_languages)
    dtype = torch.float16 if model.device.type != "cpu" else torch.float32
    start = torch.full((len(features), 1), tokenizer.sot, device=features.device)
    # the decoder is causal: what follows the first token does not matter for its row
    logits = model.decoder(start, features.to(dtype))[:, 0].float()
    return [float(p) for p in logits.softmax(dim=-1)[:, tokenizer.no_speech]]


class _Steered:
    """Encoder outputs for settings on one batch of windows."""

    def __init__(self, model: Whisper, mels: Tensor, layers: Sequence[int], shared: Container[int]):
        """shared: ids of the first edits whose result several settings use."""
        self._model, self._shared = model, shared
        self._blocks = list(model.encoder.blocks)
        self._last = len(self._blocks) - 1
        wanted = sorted({*layers, self._last})
        self._plain = dict(zip(wanted, encode_windows(model, mels, wanted), strict=True))
        self._first: dict[int, Tensor] = {}

    @torch.no_grad()
    def features(self, edits: Sequence[Edit]) -> Tensor:
        """(batch, 1500, d_model) after `edits`."""
        if not edits:
            return self._model.encoder.ln_post(self._plain[self._last])
        layer, first = edits[0].layer, edits[0]
        if id(first) in self._first:
            x = self._first[id(first)]
        else:
            x = first(self._plain[layer], 1.0)
            if id(first) in self._shared:
                self._first[id(first)] = x
        for edit in edits[1:]:
            for block in self._blocks[layer + 1 : edit.layer + 1]:
                x = block(x)
            layer = edit.layer
            x = edit(x, 1.0)
        for block in self._blocks[layer + 1 :]:
            x = block(x)
        return self._model.encoder.ln_post(x)


def score(
    model: Whisper,
    clips: Sequence[Clip],
    settings: Mapping[str, Setting],
    *,
    store: Path | None = None,
    batch: int = 8,
    progress: bool = True,
    what: str = "",
) -> dict[str, dict[str, Score]]:
    """Scores by clip id and name of the setting. Clips that cannot be read are left out with a warning.

    store: folder for finished clips (see above); None keeps nothing. batch: windows encoded together.

    Raises UsageError: a setting's edits are not in ascending order of layers, or nothing could be read.
    """
    for name, setting in settings.items():
        layers = [edit.layer for edit in setting.edits]
        if layers != sorted(layers):
            raise UsageError(f"setting {name} edits layers {layers}: expected them in ascending order")
    device = next(model.encoder.parameters()).device
    ready = _on(device, settings)
    kept = None if store is None else _Store(store / f"{_fingerprint(model, settings)}.jsonl")
    known = {} if kept is None else kept.read()
    done: dict[str, dict[str, Score]] = {}
    waiting: list[tuple[Clip, int, Tensor, float]] = []

    def flush() -> None:
        for (clip, crc, _, _), scores in zip(waiting, _scored(model, waiting, ready, batch), strict=True):
            done[clip.id] = scores
            if kept is not None:
                kept.add(clip.id, crc, scores)
            bar.update()
        waiting.clear()

    with tqdm(total=len(clips), desc=what, unit="clip", disable=not progress, file=sys.stderr) as bar:
        for clip in clips:
            try:
                audio = np.ascontiguousarray(clip.load(), dtype=np.float32)
            except AudioError as error:
                logger.warning("left out: %s", error)
                bar.update()
                continue
            crc = zlib.crc32(audio.tobytes())
            if (clip.id, crc) in known:
                done[clip.id] = known[clip.id, crc]
                bar.update()
                continue
            waiting.append((clip, crc, window_mels(audio, model.dims.n_mels), len(audio) / 16_000))
            if sum(len(mels) for _, _, mels, _ in waiting) >= batch:
                flush()
        flush()
    if clips and not done:
        raise UsageError(f"none of the {len(clips)} clips could be read, such as {clips[0].id}")
    return done


def _scored(
    model: Whisper,
    waiting: Sequence[tuple[Clip, int, Tensor, float]],
    settings: Mapping[str, Setting],
    batch: int,
) -> Iterator[dict[str, Score]]:
    """One result per waiting clip."""
    if not waiting:
        return
    mels = torch.cat([mels for _, _, mels, _ in waiting])
    layers = sorted({setting.edits[0].layer for setting in settings.values() if setting.edits})
    uses = Counter(id(setting.edits[0]) for setting in settings.values() if setting.edits)
    shared = {edit for edit, count in uses.items() if count > 1}
    results: dict[str, list[tuple[float, float | None, str]]] = {name: [] for name in settings}
    for start in range(0, len(mels), batch):  # a long clip does not make the batch grow
        steered = _Steered(model, mels[start : start + batch], layers, shared)
        for name, setting in settings.items():
            features = steered.features(setting.edits)
            if setting.decode:
                for result in greedy_decode(model, features):
                    scores = (float(result.no_speech_prob), float(result.avg_logprob), result.text)
                    results[name].append(scores)
            else:
                results[name] += [(p, None, "") for p in first_step(model, features)]
    begin = 0
    for _, _, own, seconds in waiting:
        end = begin + len(own)
        yield {
            name: Score(
                tuple((p, logprob) for p, logprob, _ in windows[begin:end]),
                tuple(text for _, _, text in windows[begin:end]),
                seconds,
            )
            for name, windows in results.items()
        }
        begin = end


def _on(device: torch.device, settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings with their edits' tensors on the device; one copy of an edit that several share."""
    copies: dict[int, Edit] = {}

    def copied(edit: Edit) -> Edit:
        if device.type == "cpu":
            return edit
        if id(edit) not in copies:
            copies[id(edit)] = moved(edit, device)
        return copies[id(edit)]

    return {
        name: Setting(tuple(copied(edit) for edit in setting.edits), setting.decode)
        for name, setting in settings.items()
    }


# -- what is kept between runs


def _fingerprint(model: Whisper, settings: Mapping[str, Setting]) -> str:
    from calibration.hallucinations import model_crc

    digest = hashlib.sha256(str(model_crc(model)).encode())
    known: dict[int, str] = {}
    for name, setting in settings.items():
        digest.update(f"{name}:{setting.decode}".encode())
        for edit in setting.edits:
            if id(edit) not in known:
                known[id(edit)] = _edit_hash(edit)
            digest.update(known[id(edit)].encode())
    return digest.hexdigest()[:16]


def _edit_hash(edit: Edit) -> str:
    digest = hashlib.sha256(type(edit).__name__.encode())
    for field in fields(edit):
        value = getattr(edit, field.name)
        data = value.cpu().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
        digest.update(field.name.encode() + data)
    return digest.hexdigest()


class _Store:
    """JSON lines, one per finished clip."""

    def __init__(self, path: Path):
        self._path = path

    def read(self) -> dict[tuple[str, int], dict[str, Score]]:
        """By clip id and audio CRC. Half a line at the end, of a run that was killed, is cut off.

        Raises UsageError: not such a file.
        """
        if not self._path.is_file():
            return {}
        raw = self._path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            os.truncate(self._path, whole)
        try:
            lines = [json.loads(line) for line in raw[:whole].splitlines()]
            return {(line["id"], line["crc"]): _scores(line["scores"]) for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self._path} is damaged ({error}): delete it and run again") from error

    def add(self, clip: str, crc: int, scores: Mapping[str, Score]) -> None:
        """Append one clip. Raises UsageError if the file cannot be written."""
        values = {name: [s.windows, s.texts, s.seconds] for name, s in scores.items()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"id": clip, "crc": crc, "scores": values}) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"cannot write {self._path}: {reason}; choose another --out") from error


def _scores(values: Mapping[str, Any]) -> dict[str, Score]:
    return {
        name: Score(tuple((p, logprob) for p, logprob in windows), tuple(texts), seconds)
        for name, (windows, texts, seconds) in values.items()
    }

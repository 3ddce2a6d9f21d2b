"""What an SAE costs a Whisper that hears through it: its reconstruction replaces one encoder block's output.

    with spliced(model, sae):
        model.transcribe(audio)

Three measures, each beside the plain model's: cross-entropy of the decoder on the reference text (teacher
forced), WER of `whisper.transcribe`, and on non-speech the text-FPR (share of clips that come back with
words).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from whisper.audio import N_SAMPLES
from whisper.tokenizer import get_tokenizer

from calibration.activations import cut_window, padded_log_mel
from calibration.decoding import transcribe_clips
from calibration.evaluate import bootstrap_share, normalise, speech_metrics
from whisper_steer.sae import SparseAutoencoder

if TYPE_CHECKING:
    from whisper.model import Whisper

UNLABELLED = "unlabelled"


@contextmanager
def spliced(model: Whisper, sae: SparseAutoencoder) -> Iterator[None]:
    """Inside the `with`, the SAE's reconstruction replaces the output of its encoder block, padding included.

    The SAE must be on the model's device.
    """

    def replace_output(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        return sae(output)

    handle = list(model.encoder.blocks)[sae.layer].register_forward_hook(replace_output)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class TextLoss:
    """Cross-entropy of one reference text.

    Attributes:
        nats: summed over the tokens.
        tokens: text tokens and the end-of-text token.
    """

    nats: float
    tokens: int


@torch.no_grad()
def text_losses(
    model: Whisper,
    audios: Sequence[np.ndarray],
    texts: Sequence[str],
    *,
    language: str = "en",
    batch: int = 8,
) -> list[TextLoss | None]:
    """Teacher-forced cross-entropy of each clip's reference text, as the model stands.

    The decoder sees openai-whisper's start sequence (without timestamps) and the text, and is asked for the
    text and the end-of-text token. None for a clip without text, of more than 30 s (its text does not belong
    to one window), or with more tokens than the decoder has positions.
    """
    if len(audios) != len(texts):
        raise ValueError(f"{len(audios)} clips but {len(texts)} texts")
    tokenizer = get_tokenizer(
        model.is_multilingual, num_languages=model.num_languages, language=language, task="transcribe"
    )
    start = list(tokenizer.sot_sequence_including_notimestamps)
    written = [tokenizer.encode(" " + text.strip()) if text.strip() else [] for text in texts]
    fitting = [
        index
        for index, (audio, tokens) in enumerate(zip(audios, written, strict=True))
        if tokens and len(audio) <= N_SAMPLES and len(start) + len(tokens) <= model.dims.n_text_ctx
    ]
    losses: list[TextLoss | None] = [None] * len(audios)
    parameter = next(model.parameters())
    for first in range(0, len(fitting), batch):
        chosen = fitting[first : first + batch]
        mels = [cut_window(*padded_log_mel(audios[index], model.dims.n_mels), 0) for index in chosen]
        encoded = model.encoder(torch.stack(mels).to(parameter.device, parameter.dtype))
        for index, features in zip(chosen, encoded, strict=True):
            tokens = torch.tensor([*start, *written[index], tokenizer.eot], device=parameter.device)
            logits = model.decoder(tokens[None, :-1], features[None])[0, len(start) - 1 :].float()
            total = nn.functional.cross_entropy(logits, tokens[len(start) :], reduction="sum")
            losses[index] = TextLoss(float(total), len(tokens) - len(start))
    return losses


def condition_of(clip: Any) -> str:
    """Recording condition of a speech clip: its label "condition", else its category ("speech" is "clean",
    "speech_noisy" is "noisy"); "unlabelled" where it has neither.
    """
    labels = getattr(clip, "labels", None) or {}
    for value in (labels.get("condition"), getattr(clip, "condition", None)):
        if value:
            return str(value)
    category = labels.get("category") or getattr(clip, "category", None)
    if not category:
        return UNLABELLED
    return "clean" if category == "speech" else str(category).removeprefix("speech_")


@dataclass(frozen=True)
class SpeechClip:
    """A clip to be recognised: audio float32 (n,) at 16 kHz, its reference text and recording condition."""

    audio: np.ndarray
    text: str
    condition: str = UNLABELLED


class Listener:
    """Hears the same clips plain and through SAEs; the plain results are computed once.

    Attributes:
        speech: clips with a reference text.
        nonspeech: audio of clips without words.
    """

    def __init__(
        self,
        model: Whisper,
        speech: Sequence[SpeechClip],
        nonspeech: Sequence[np.ndarray],
        *,
        language: str = "en",
    ):
        self.model, self.language = model, language
        self.speech, self.nonspeech = list(speech), list(nonspeech)
        self._plain = self._hear()

    def _hear(self) -> tuple[list[str], list[TextLoss | None], list[bool]]:
        audios, texts = [clip.audio for clip in self.speech], [clip.text for clip in self.speech]
        heard = [transcript.text for transcript in self._transcribe(audios)]
        losses = text_losses(self.model, audios, texts, language=self.language)
        words = [bool(normalise(transcript.text)) for transcript in self._transcribe(self.nonspeech)]
        return heard, losses, words

    def _transcribe(self, audios: Sequence[np.ndarray]) -> list[Any]:
        return transcribe_clips(self.model, audios, language=self.language) if audios else []

    def record(self, sae: SparseAutoencoder) -> dict[str, Any]:
        """JSON-able {"speech": {"all": row, condition: row, ...}, "nonspeech": row}; sides without clips are
        left out.

        Speech rows: clips, words; wer_plain, wer_spliced ({value, lo, hi}: fraction of reference words with
        its 95 % bootstrap interval), wer_rise (difference); tokens; ce_plain, ce_spliced, ce_delta (nats per
        token). Non-speech row: clips; text_fpr_plain, text_fpr_spliced (shares of clips, with interval).
        """
        with spliced(self.model, sae):
            heard, losses, words = self._hear()
        plain_heard, plain_losses, plain_words = self._plain
        record: dict[str, Any] = {}
        if self.speech:
            conditions = sorted({clip.condition for clip in self.speech})
            groups = {"all": list(range(len(self.speech)))}
            if conditions != [UNLABELLED]:
                for condition in conditions:
                    groups[condition] = [i for i, c in enumerate(self.speech) if c.condition == condition]
            record["speech"] = {
                name: {
                    **self._wer(chosen, plain_heard, heard),
                    **_cross_entropy([(plain_losses[i], losses[i]) for i in chosen]),
                }
                for name, chosen in groups.items()
            }
        if self.nonspeech:
            record["nonspeech"] = {
                "clips": len(words),
                "text_fpr_plain": asdict(bootstrap_share(plain_words)),
                "text_fpr_spliced": asdict(bootstrap_share(words)),
            }
        return record

    def _wer(self, chosen: Sequence[int], plain: Sequence[str], heard: Sequence[str]) -> Mapping[str, Any]:
        texts = [self.speech[index].text for index in chosen]
        before = speech_metrics(texts, [plain[index] for index in chosen])
        after = speech_metrics(texts, [heard[index] for index in chosen])
        return {
            "clips": before.clips,
            "words": before.words,
            "wer_plain": asdict(before.wer),
            "wer_spliced": asdict(after.wer),
            "wer_rise": after.wer.value - before.wer.value,
        }


def _cross_entropy(pairs: Sequence[tuple[TextLoss | None, TextLoss | None]]) -> dict[str, Any]:
    """Means per token over the clips that have both."""
    measured = [(plain, other) for plain, other in pairs if plain is not None and other is not None]
    tokens = sum(plain.tokens for plain, _ in measured)
    if not tokens:
        return {"tokens": 0, "ce_plain": None, "ce_spliced": None, "ce_delta": None}
    before = sum(plain.nats for plain, _ in measured) / tokens
    after = sum(other.nats for _, other in measured) / tokens
    return {"tokens": tokens, "ce_plain": before, "ce_spliced": after, "ce_delta": after - before}

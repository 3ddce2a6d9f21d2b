"""Writes an openai-whisper model as the folder that transformers and CTranslate2's converter read.

config.json, generation_config.json, preprocessor_config.json, tokenizer.json, tokenizer_config.json and
model.safetensors, as in the published openai/whisper-* repositories. transformers need not be installed (its
wheel has no converter of its own). Names are those of convert_hf.py, read backwards.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .convert_hf import CONFIG, GENERATION_CONFIG, MODULES, OUTSIDE_BLOCKS, WEIGHTS
from .errors import FormatError, UsageError
from .transformers_settings import generation_config, model_config, tokenizer_of

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from whisper.model import Whisper

DTYPES = ("float32", "float16", "bfloat16")
PREPROCESSOR_CONFIG = "preprocessor_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

_KIND = {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}

_MODULES_BACK = {openai: theirs for theirs, openai in MODULES.items()}
_OUTSIDE_BACK = {openai: theirs for theirs, openai in OUTSIDE_BLOCKS.items()}
_BLOCK = re.compile(r"(encoder|decoder)\.blocks\.(\d+)\.(.+)\.(weight|bias)")


def transformers_name(name: str) -> str:
    """'encoder.blocks.3.mlp.0.weight' -> 'model.encoder.layers.3.fc1.weight'.

    Raises UsageError for a name that no Whisper has.
    """
    if name in _OUTSIDE_BACK:
        return "model." + _OUTSIDE_BACK[name]
    if name.startswith("encoder.conv"):
        return "model." + name
    match = _BLOCK.fullmatch(name)
    if match is None or match[3] not in _MODULES_BACK:
        raise UsageError(f"{name} is not a tensor of openai-whisper")
    return f"model.{match[1]}.layers.{match[2]}.{_MODULES_BACK[match[3]]}.{match[4]}"


def write_folder(model: Whisper, folder: Path, dtype: str = "float32") -> None:
    """Write `model` into an existing, empty folder; floats as `dtype`, one of DTYPES.

    Raises UsageError: unknown dtype; OSError, FormatError: it cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} for transformers: expected one of {', '.join(DTYPES)}")
    kind: torch.dtype = getattr(torch, dtype)
    weights = {
        transformers_name(name): tensor.detach().cpu().to(kind).contiguous()
        for name, tensor in model.state_dict().items()
    }
    try:
        save_file(weights, folder / WEIGHTS[0], metadata={"format": "pt"})
    except SafetensorError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise FormatError(f"cannot write the weights to {folder.parent}: {reason}") from error
    words = _Words(model)
    files = {
        CONFIG: {**_KIND, **model_config(model, words.own), "torch_dtype": dtype},
        GENERATION_CONFIG: generation_config(model, words.own),
        PREPROCESSOR_CONFIG: _preprocessor_config(model),
        TOKENIZER_CONFIG: words.config(),
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / TOKENIZER).write_text(words.tokenizer().to_str(pretty=True), encoding="utf-8")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS[0])  # safetensors makes it readable by its owner alone


class _Words:
    """The tokens of a model, as openai-whisper numbers them."""

    def __init__(self, model: Whisper) -> None:
        self.multilingual = model.is_multilingual
        self.own = tokenizer_of(model)
        by_id = sorted((number, name) for name, number in self.own.special_tokens.items())
        self.special = [name for number, name in by_id if number < self.own.timestamp_begin]
        self.timestamps = [name for number, name in by_id if number >= self.own.timestamp_begin]

    def tokenizer(self) -> Tokenizer:
        from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
        from tokenizers.models import BPE

        from .ggml_file import vocabulary

        letters = _byte_letters()
        words = vocabulary(51865 if self.multilingual else 51864)
        spelt = ["".join(letters[byte] for byte in word) for word in words]
        bpe = BPE(
            {word: rank for rank, word in enumerate(spelt)},
            _merges(words, spelt),
            continuing_subword_prefix="",
            end_of_word_suffix="",
            fuse_unk=False,
        )
        tokenizer = Tokenizer(bpe)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in self.special])
        # not special: transformers takes the token after the last special one for the first timestamp
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in self.timestamps])
        return tokenizer

    def config(self) -> dict[str, Any]:
        end = "<|endoftext|>"
        return {
            "tokenizer_class": "WhisperTokenizer",
            "processor_class": "WhisperProcessor",
            "add_prefix_space": False,
            "bos_token": end,
            "eos_token": end,
            "pad_token": end,
            "unk_token": end,
            "additional_special_tokens": self.special[1:],
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 1024,
            "return_attention_mask": False,
        }


def _preprocessor_config(model: Whisper) -> dict[str, Any]:
    from whisper.audio import CHUNK_LENGTH, HOP_LENGTH, N_FFT, N_FRAMES, N_SAMPLES, SAMPLE_RATE

    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": model.dims.n_mels,
        "chunk_length": CHUNK_LENGTH,
        "hop_length": HOP_LENGTH,
        "n_fft": N_FFT,
        "n_samples": N_SAMPLES,
        "nb_max_frames": N_FRAMES,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
        "sampling_rate": SAMPLE_RATE,
    }


def _byte_letters() -> list[str]:
    """GPT-2's spelling of bytes in vocabulary files: printable Latin-1 as itself, others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _merges(words: list[bytes], spelt: list[str]) -> list[tuple[str, str]]:
    """The pairs that byte-pair encoding joins, in order.

    A word's last join is of the two parts into which the joins of lower rank bring it.
    """
    rank = {word: number for number, word in enumerate(words)}
    merges = []
    for number, word in enumerate(words):
        if len(word) < 2:
            continue
        parts = [bytes([byte]) for byte in word]
        while len(parts) > 2:
            ranks = [rank.get(a + b, number) for a, b in zip(parts, parts[1:], strict=False)]
            best = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[best] >= number:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((spelt[rank[parts[0]]], spelt[rank[parts[1]]]))
    return merges

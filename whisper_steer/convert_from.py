"""Whisper models out of CTranslate2 folders and whisper.cpp files, as openai-whisper models.

Both hold the same numbers under other names, CTranslate2 with the projections of an attention joined into
one matrix. Quantised weights come back as the numbers that the runtime computes with (integers times their
scales), not as those of before the quantisation. Names in CTranslate2's decoder:
python/ctranslate2/specs/transformer_spec.py of CTranslate2 4; layouts: ct2_file.py, ggml_file.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import whisper
from torch import Tensor
from whisper.model import ModelDimensions, Whisper

from .convert_hf import CONFIG, INDEX_SUFFIX, WEIGHTS, build_model, read_json, set_heads
from .ct2_encoder import load_encoder, plain_name
from .ct2_file import MODEL_FILE, read_variables
from .errors import FormatError
from .ggml_file import HPARAMS, is_ggml, read_layout, read_tensors

_DECODER = "decoder/"
# openai-whisper's name of a decoder block's part: CTranslate2's (weights and biases)
_LINEAR = {
    "attn.out": "self_attention/linear_1",
    "cross_attn.query": "attention/linear_0",
    "cross_attn.out": "attention/linear_2",
    "mlp.0": "ffn/linear_0",
    "mlp.2": "ffn/linear_1",
}
_NORMS = {
    "attn_ln": "self_attention/layer_norm",
    "cross_attn_ln": "attention/layer_norm",
    "mlp_ln": "ffn/layer_norm",
}
_JOINED = {
    ("attn.query", "attn.key", "attn.value"): "self_attention/linear_0",
    ("cross_attn.key", "cross_attn.value"): "attention/linear_1",
}
_GGML_DECORATION = re.compile(r"^ggml-|([-_.](f16|f32|bf16|q\d_(\d|k)))+$")


def is_ct2_folder(path: Path) -> bool:
    """A folder with CTranslate2's model.bin, and without weights in transformers' format beside it."""
    others = [path / (name + suffix) for name in WEIGHTS for suffix in ("", INDEX_SUFFIX)]
    return (path / MODEL_FILE).is_file() and not any(other.is_file() for other in others)


def runtime_name(path: Path) -> str | None:
    """The name of the model in a CTranslate2 folder or whisper.cpp file, without what converters add to it
    ("ggml-small.en-q5_1.bin", "faster-whisper-small.en" -> "small.en"); None for anything else."""
    if path.is_dir():
        return plain_name(path.resolve()) if is_ct2_folder(path) else None
    return _GGML_DECORATION.sub("", path.stem) or path.stem if is_ggml(path) else None


def load_ct2(folder: str | Path) -> Whisper:
    """The Whisper in a CTranslate2 folder of any quantisation, float32, on the CPU, in evaluation mode.

    The cross-attention heads for word timestamps are those that config.json lists.
    Raises FormatError: unreadable, not a Whisper, or weights that do not fit together.
    """
    folder = Path(folder)
    encoder = load_encoder(folder)
    found = read_variables(folder, _DECODER)
    try:
        state = _decoder({name.removeprefix(_DECODER): values for name, values in found.items()})
        words, width = state["token_embedding.weight"].shape
        dims = ModelDimensions(
            n_mels=encoder.conv1.weight.shape[1],
            n_audio_ctx=encoder.positional_embedding.shape[0],
            n_audio_state=encoder.positional_embedding.shape[1],
            n_audio_head=encoder.blocks[0].attn.n_head,
            n_audio_layer=len(encoder.blocks),
            n_vocab=words,
            n_text_ctx=state["positional_embedding"].shape[0],
            n_text_state=width,
            n_text_head=int(found[f"{_DECODER}num_heads"]),
            n_text_layer=_count_blocks(state),
        )
    except (KeyError, IndexError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise FormatError(
            f"{folder} does not hold Whisper's decoder as CTranslate2 4 writes it ({reason}): convert the "
            "model again"
        ) from error
    weights = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    weights |= {f"decoder.{name}": value for name, value in state.items()}
    model = build_model(dims, weights, str(folder))
    config = folder / CONFIG
    if config.is_file():
        set_heads(model, read_json(config).get("alignment_heads"), config)
    return model


def load_ggml(path: str | Path) -> Whisper:
    """The Whisper in a whisper.cpp file, float32, on the CPU, in evaluation mode.

    Such a file does not name the heads for word timestamps: they are those of OpenAI's model if the file is
    named after one and fits it, else openai-whisper's default, the upper half of the decoder.
    Raises FormatError: unreadable, damaged, or of a quantisation that is not read (k-types).
    """
    path = Path(path)
    hparams = read_layout(path).hparams
    dims = ModelDimensions(**{key: hparams[key] for key in HPARAMS[:-1]})
    weights = {}
    for name, values in read_tensors(path).items():
        flat = values.reshape(-1) if name.startswith("encoder.conv") and name.endswith(".bias") else values
        weights[name] = torch.from_numpy(np.array(flat))
    model = build_model(dims, weights, str(path))
    heads = whisper._ALIGNMENT_HEADS.get(runtime_name(path) or "")
    if heads is not None:
        try:
            model.set_alignment_heads(heads)
        except RuntimeError:  # another model under that name
            return model
    return model


def _decoder(found: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """openai-whisper's state of the decoder, without the prefix "decoder."."""
    state = {
        "token_embedding.weight": found["embeddings/weight"],
        "positional_embedding": found["position_encodings/encodings"],
        "ln.weight": found["layer_norm/gamma"],
        "ln.bias": found["layer_norm/beta"],
    }
    for layer in range(_count_blocks(found)):
        ours, theirs = f"blocks.{layer}.", f"layer_{layer}/"
        for part, name in _LINEAR.items():
            state |= {f"{ours}{part}.{kind}": found[f"{theirs}{name}/{kind}"] for kind in ("weight", "bias")}
        for part, name in _NORMS.items():
            state[f"{ours}{part}.weight"] = found[f"{theirs}{name}/gamma"]
            state[f"{ours}{part}.bias"] = found[f"{theirs}{name}/beta"]
        for parts, name in _JOINED.items():
            for kind in ("weight", "bias"):
                pieces = np.split(found[f"{theirs}{name}/{kind}"], len(parts))
                state |= {f"{ours}{part}.{kind}": piece for part, piece in zip(parts, pieces, strict=True)}
    keys_bias = ".key.bias"  # Whisper's keys have none: zeros there
    return {
        name: torch.from_numpy(values.copy())
        for name, values in state.items()
        if not name.endswith(keys_bias)
    }


def _count_blocks(names: Iterable[str]) -> int:
    return len({match[1] for name in names if (match := re.match(r"(?:blocks\.|layer_)(\d+)[./]", name))})

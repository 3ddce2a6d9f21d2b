"""A small Whisper in a small file: the bundled models' format.

A model trained on a few thousand of Whisper's 51,864 tokens has one meaningful embedding row for each of
those and one row that all other tokens share. Only these rows are stored, in float16, and expanded on
loading: the result is a plain `whisper.Whisper` with the full vocabulary. Sinusoids and masks are recomputed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from whisper.model import ModelDimensions, Whisper

from .errors import FormatError, UsageError
from .fileformat import load_tensors, save_tensors

KIND = "model"
_EMBEDDING = "decoder.token_embedding.weight"
_ROWS, _IDS, _SHARED = (
    "decoder.token_embedding.rows",
    "decoder.token_embedding.ids",
    "decoder.token_embedding.shared",
)
_RECOMPUTED = ("encoder.positional_embedding",)


def pack_model(
    model: Whisper, path: str | Path, trained_rows: Sequence[int], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write `model` to `path`, keeping the embedding rows `trained_rows` and one row for all other tokens.

    Values are rounded to float16. Raises UsageError when the other rows are not all equal.
    """
    state = dict(model.state_dict())
    embedding = state.pop(_EMBEDDING)
    ids = torch.tensor(sorted(set(trained_rows)), dtype=torch.int32)
    others = torch.ones(len(embedding), dtype=torch.bool)
    others[ids.long()] = False
    rest = embedding[others]
    if len(rest) and not bool((rest == rest[0]).all()):
        raise UsageError(
            f"the {len(rest)} token rows outside trained_rows are not all equal: keep a full checkpoint"
        )
    tensors = {name: value.half() for name, value in state.items() if name not in _RECOMPUTED}
    tensors[_ROWS] = embedding[ids.long()].half()
    tensors[_IDS] = ids
    tensors[_SHARED] = (rest[0] if len(rest) else torch.zeros(embedding.shape[1])).half()
    heads = getattr(model, "alignment_heads", None)
    dense = heads.to_dense() if heads is not None else torch.zeros(0)
    save_tensors(
        path,
        tensors,
        {
            **(metadata or {}),
            "kind": KIND,
            "dims": asdict(model.dims),
            "alignment_heads": [[int(layer), int(head)] for layer, head in dense.nonzero()],
        },
    )


def unpack_model(path: str | Path) -> tuple[Whisper, dict[str, Any]]:
    """(model in float32 on the CPU, evaluation mode; metadata). Raises FormatError."""
    tensors, metadata = load_tensors(path, KIND)
    try:
        dims = ModelDimensions(**metadata["dims"])
        rows, ids, shared = (tensors.pop(name) for name in (_ROWS, _IDS, _SHARED))
        embedding = shared.float().repeat(dims.n_vocab, 1)
        embedding[ids.long()] = rows.float()
        model = Whisper(dims)
        state = {name: value.float() for name, value in tensors.items()} | {_EMBEDDING: embedding}
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or set(missing) - set(_RECOMPUTED):
            raise KeyError(
                f"missing {sorted(set(missing) - set(_RECOMPUTED))}, unexpected {sorted(unexpected)}"
            )
        heads = torch.zeros(dims.n_text_layer, dims.n_text_head, dtype=torch.bool)
        for layer, head in metadata["alignment_heads"]:
            heads[layer, head] = True
    except (KeyError, TypeError, IndexError, ValueError, RuntimeError) as error:
        raise FormatError(f"{path} is not a complete model file: {str(error).splitlines()[0]}") from error
    model.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    model.eval().requires_grad_(False)
    return model, metadata

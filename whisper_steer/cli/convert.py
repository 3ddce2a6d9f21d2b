"""whisper-steer convert: a model in another runtime's format."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options

Format = Annotated[
    str, typer.Option("--format", metavar="FORMAT", help="openai (.pt), transformers, ct2 or ggml.")
]
Out = Annotated[
    str | None, typer.Option("--out", metavar="PATH", help="File or folder to write; it must not exist yet.")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="openai, transformers: float32, float16, bfloat16; ct2: those, int8, int8_float16, int16, ...; "
        "ggml: f16, q8_0, q5_0. The first is the default.",
    ),
]


def convert(
    format: Format,
    model: options.Model = "mini.en",
    out: Out = None,
    dtype: Dtype = None,
    model_dir: options.ModelDir = None,
) -> None:
    """Write a model for openai-whisper, transformers, CTranslate2 (faster-whisper) or whisper.cpp (ggml)."""
    from ..convert import convert as convert_model

    print(convert_model(model, format, out, dtype=dtype, download_root=model_dir))

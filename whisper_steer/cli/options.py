"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import values

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Name (see: whisper-steer models), .pt file, transformers or CTranslate2 folder, or hub id.",
    ),
]
ModelDir = Annotated[
    str | None, typer.Option("--model-dir", help="Where models are kept; ~/.cache/whisper by default.")
]
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="openai, faster or transformers; by default faster for a CTranslate2 model, else openai.",
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="cuda if there is one, else cpu.")]
Alpha = Annotated[
    Any,
    typer.Option(
        "--alpha",
        metavar="NUMBER",
        parser=values.alpha,
        help="How strongly to steer: 0 is plain Whisper, 1 the calibrated strength and the default.",
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME",
        help="In place of --alpha, one of the steering's own strengths: gentle, balanced or strict.",
    ),
]
Steering = Annotated[
    str | None,
    typer.Option(
        "--steering",
        help="A steering file, or a name such as gate (no edits) or audiosae; by default the model's.",
    ),
]
Vad = Annotated[
    str | None,
    typer.Option(
        "--vad",
        metavar="NAME",
        help="gate: the steering's gate finds the speech first (one more pass of the encoder), and only that "
        "is transcribed; by default everything is.",
    ),
]
Language = Annotated[
    str | None,
    typer.Option("--language", help="Spoken language, as en or English; detected by default."),
]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain",
        help="Say on stderr which windows were withheld and why (gate logit and threshold), what skipping "
        "them saved, and where else the stream was edited.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]

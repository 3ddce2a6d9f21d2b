"""whisper-steer bake and unbake: a Shift in a model's weights, and out of them again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .convert import Dtype, Out

if TYPE_CHECKING:
    from ..steering import Steering

Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="openai (.pt), transformers, ct2 or ggml. By default that of the model's file or folder, which "
        "is patched; a model of another format is converted first.",
    ),
]
Again = Annotated[bool, typer.Option("--again", help="Bake more into what is baked already.")]
Approximate = Annotated[
    str | None,
    typer.Option(
        "--approximate",
        metavar="FOLDER",
        help="For a gated or latent steering: fit the best Shift in its place on the recordings in "
        "FOLDER/speech (transcripts in .txt files beside them) and FOLDER/nonspeech, and bake that.",
    ),
]
Anyway = Annotated[
    bool,
    typer.Option(
        "--anyway", help="With --approximate: bake the Shift even if it loses words or makes no fewer."
    ),
]
Path_ = Annotated[str, typer.Argument(metavar="PATH", help="File or folder that bake has written.")]


def bake(
    model: options.Model = "mini.en",
    alpha: options.Alpha = None,
    profile: options.Profile = None,
    format: Format = None,
    out: Out = None,
    steering: options.Steering = None,
    dtype: Dtype = None,
    again: Again = False,
    approximate: Approximate = None,
    anyway: Anyway = False,
    as_json: options.Json = False,
    model_dir: options.ModelDir = None,
) -> None:
    """Write a model with a Shift in its weights: steered in its own runtime, at no cost, without a plugin."""
    from dataclasses import asdict, replace

    from ..bake import bake as bake_model
    from .output import print_json
    from .strength import announce, check_one, steering_of

    check_one(alpha, profile)
    chosen: Steering | str | None = steering
    if approximate is not None and profile is not None:  # what is fitted for minutes is said before
        chosen = steering_of(model, steering, model_dir)
        alpha = chosen.alpha_of(profile)
        announce(profile, alpha, chosen.measured(alpha))
        profile = None
    done = bake_model(
        model,
        alpha=alpha,
        profile=profile,
        format=format,
        out=out,
        steering=chosen,
        dtype=dtype,
        again=again,
        approximate=approximate,
        anyway=anyway,
        download_root=model_dir,
    )
    fit = done.fit
    announce(done.profile, done.alpha, done.measured)
    if as_json:
        record = {**asdict(replace(done, fit=None)), "path": str(done.path), "record": str(done.record)}
        print_json({**record, "fit": None if fit is None else fit.record()})
        return
    if fit is not None:
        for line in fit.lines():
            print(line)
    layers = ", ".join(map(str, done.layers))
    print(f"{done.path}  {done.format}, {done.steering} x {done.alpha:g} in layer {layers}")
    print(f"record: {done.record}")


def unbake(path: Path_, out: Out = None) -> None:
    """Restore the original bytes of what bake has written; in place, or in --out."""
    from ..bake import unbake as unbake_model

    print(unbake_model(path, out))

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
    as_json: options.Json = False,
    model_dir: options.ModelDir = None,
) -> None:
    """Write a model with a Shift in its weights: steered in its own runtime, at no cost, without a plugin."""
    from dataclasses import asdict

    from ..bake import bake as bake_model
    from .output import print_json
    from .strength import announce, check_one, steering_of

    check_one(alpha, profile)
    fit = None
    if approximate is not None:
        from calibration.shift_fit import fit_from_folder

        fitted: Steering | str | None = steering
        if profile is not None:
            fitted = steering_of(model, steering, model_dir)
            alpha = fitted.alpha_of(profile)
            announce(profile, alpha, fitted.measured(alpha))
        strength = 1.0 if alpha is None else alpha
        fit = fit_from_folder(model, fitted, approximate, alpha=strength, download_root=model_dir)
    done = bake_model(
        model,
        alpha=alpha if fit is None else 1.0,  # the fit is of the steering at alpha
        profile=profile if fit is None else None,
        format=format,
        out=out,
        steering=steering if fit is None else fit.steering,
        dtype=dtype,
        again=again,
        download_root=model_dir,
    )
    announce(done.profile, done.alpha, done.measured)
    if as_json:
        record = {**asdict(done), "path": str(done.path), "record": str(done.record)}
        print_json(record if fit is None else {**record, "fit": fit.record()})
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

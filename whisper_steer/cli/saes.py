"""whisper-steer saes: sparse autoencoders of other libraries, in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import print_json

if TYPE_CHECKING:
    from ..interop.convert import Conversion

saes = typer.Typer(
    help="Convert sparse autoencoders from and to other libraries' formats.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Out = Annotated[str, typer.Option("--out", metavar="DIR", help="Folder to write to; made if missing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the way.")]


@saes.command("import")
def import_(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="An SAE's folder or weights, a folder of them, or a hub id."),
    ],
    out: Out,
    layer: Annotated[
        int | None,
        typer.Option(
            "--layer", min=0, help="Only this encoder layer, counted from 0; needed where no file tells."
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            "--format", help="dictionary_learning, saelens or sparsify; by the files' names by default."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The Whisper they were trained on: checked, and stored with them."),
    ] = None,
    model_dir: options.ModelDir = None,
    half: Annotated[bool, typer.Option("--half", help="Store the matrices as float16.")] = False,
    overwrite: Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Read SAEs of dictionary_learning (AudioSAE), SAELens or sparsify; write DIR/layer_XX.safetensors.

    Layers are counted from 0: AudioSAE's folder layer_1 becomes layer_00.safetensors.
    """
    import torch

    from ..fileformat import model_metadata
    from ..interop.convert import import_saes

    identity = None
    if model is not None:
        from ..zoo import load_model

        identity = model_metadata(load_model(model, device="cpu", download_root=model_dir))
    done = import_saes(
        path,
        out,
        layer=layer,
        format=format,
        model=identity,
        dtype=torch.float16 if half else torch.float32,
        overwrite=overwrite,
    )
    _show(done, as_json)


@saes.command("export")
def export(
    path: Annotated[str, typer.Argument(metavar="FILE", help="layer_XX.safetensors, or a folder of them.")],
    format: Annotated[str, typer.Option("--format", metavar="saelens|sparsify", help="What to write.")],
    out: Out,
    overwrite: Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write SAEs for SAELens (exact) or sparsify (TopK only); one folder DIR/encoder.layers.N per layer."""
    from ..interop.convert import export_saes

    _show(export_saes(path, out, format, overwrite=overwrite), as_json)


def _show(done: list[Conversion], as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json([{**asdict(item), "written": str(item.written)} for item in done])
        return
    for item in done:
        k = "" if item.k is None else f", k {item.k}"
        notes = ", theta not calibrated" if item.theta_missing else ""
        notes += "" if item.exact else ", not exact"
        size = f"{item.n_latents} x {item.d_model}"
        print(f"{item.written}  layer {item.layer}, {size}, {item.activation}{k}{notes}")

"""whisper-steer saes: sparse autoencoders of other libraries, in and out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import options
from .output import print_json

if TYPE_CHECKING:
    from calibration.adapters import AudioEncoder

    from ..interop.convert import Conversion
    from ..sae import SparseAutoencoder

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
        typer.Option(
            "--model",
            help="The model they were trained on (Whisper, HuBERT, ...): checked, and stored with them.",
        ),
    ] = None,
    audio: Annotated[
        list[str] | None,
        typer.Option(
            "--audio",
            metavar="PATH",
            help="Audio files or folders to set missing thresholds on (with --model; may be repeated).",
        ),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the matrices as float16.")] = False,
    overwrite: Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Read SAEs of dictionary_learning (AudioSAE), SAELens or sparsify; write DIR/layer_XX.safetensors.

    Layers are counted from 0: AudioSAE's folder layer_1 becomes layer_00.safetensors.
    """
    import torch

    from ..interop.convert import import_saes

    identity: dict[str, Any] | None = None
    calibrate: dict[str, Any] = {}
    if model is not None:
        from calibration.adapters import load_encoder

        encoder = load_encoder(model)
        identity = encoder.metadata()
        if audio:
            calibrate["before_saving"] = _on_audio(encoder, audio)
    elif audio:
        raise UsageError("--audio is given without --model: name the model whose encoder is to hear it")
    done = import_saes(
        path,
        out,
        layer=layer,
        format=format,
        model=identity,
        dtype=torch.float16 if half else torch.float32,
        overwrite=overwrite,
        **calibrate,
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


def _on_audio(encoder: AudioEncoder, paths: list[str]) -> Callable[[Sequence[SparseAutoencoder]], None]:
    """Sets the thresholds that are missing."""
    from ..audio import find_audio

    try:
        from calibration.foreign_thresholds import calibrate_missing
    except ImportError as error:
        raise UsageError(f"--audio needs {error.name}: pip install 'whisper-steer[calibration]'") from error
    files = find_audio(paths)
    return lambda saes: calibrate_missing(saes, encoder, files)


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

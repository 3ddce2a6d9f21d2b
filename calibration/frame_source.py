"""From command-line flags to the model and the audio behind a stream of frames, on any machine."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.frames import DTYPES, StreamingFrames
from calibration.mixture import DOMAINS, Dataset, Mixture
from calibration.mixture_file import HELD_OUT_SHARE
from whisper_steer.errors import UsageError

if TYPE_CHECKING:
    from calibration.adapters import AudioEncoder


@dataclass(frozen=True)
class SourceSpec:
    """Plain values from which any process builds the same `StreamingFrames`; small, and can be pickled.

    Attributes:
        model: name or path for `calibration.adapters.load_encoder`.
        mixture: TOML or YAML file, or the name of a bundled one; None: the clips of `corpus` and `data`.
        audio: folder of recordings or manifest, instead of a mixture; domain: theirs where nothing says it.
        corpus, data: folders of the synthetic corpus and of real recordings; "@corpus" and "@data" in a
            mixture.
        clips: without a mixture: at most so many synthetic clips of each kind.
        layers: 0-based; None: all.
        unit_frames: frames of 20 ms in a unit, at least 1.
        dtype: "float16", "bfloat16" or "float32".
        packed: share (0..1) of windows filled with several clips.
        batch: windows per forward pass. workers: threads that prepare windows.
        device: None: CUDA if there is one.
    """

    model: str = "mini.en"
    mixture: str | None = None
    audio: Path | None = None
    domain: str = "speech"
    corpus: Path | None = None
    data: Path | None = None
    clips: int = 1500
    layers: tuple[int, ...] | None = None
    unit_frames: int = 250_000
    dtype: str = "float16"
    seed: int = 0
    packed: float = 0.75
    batch: int = 8
    workers: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        """Raises UsageError: a value out of its range."""
        for name in ("clips", "unit_frames", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}: expected one of {', '.join(DTYPES)}")

    @classmethod
    def from_args(cls, args: argparse.Namespace, unit_frames: int | None = None) -> SourceSpec:
        """From the flags of `add_source_flags`. Paths become absolute, for workers that run elsewhere."""
        return cls(
            model=_absolute_if_there(args.model),
            mixture=None if args.mixture is None else _absolute_if_there(args.mixture),
            audio=None if args.audio is None else args.audio.resolve(),
            domain=args.domain,
            corpus=None if args.corpus is None else args.corpus.resolve(),
            data=None if args.data is None else args.data.resolve(),
            clips=args.clips,
            layers=parse_layers(args.layers),
            unit_frames=args.unit_frames if unit_frames is None else unit_frames,
            dtype=args.dtype,
            seed=args.data_seed,
            packed=args.packed,
            batch=args.windows,
            workers=args.workers,
            device=args.device,
        )


def add_source_flags(parser: argparse.ArgumentParser, *, unit_frames: bool = True) -> None:
    """The flags that `SourceSpec.from_args` reads; unit_frames: with --unit-frames."""
    default = SourceSpec()
    flag = parser.add_argument
    flag("--model", default=default.model, help=f"name, file or folder (default: {default.model})")
    flag("--mixture", help="TOML or YAML file of weighted data sets, or the name of a bundled one")
    flag("--audio", type=Path, help="folder of recordings or a manifest, instead of a mixture")
    flag(
        "--domain", default=default.domain, choices=DOMAINS,
        help="with --audio: what the recordings are where nothing else says it (default: %(default)s)",
    )  # fmt: skip
    flag("--corpus", type=Path, help="folder of python -m calibration.synthesis")
    flag("--data", type=Path, help="folder with real recordings")
    flag(
        "--clips", type=int, default=default.clips,
        help="without --mixture: most synthetic clips of each kind (default: %(default)s)",
    )  # fmt: skip
    flag("--layers", default="all", help="0-based layers such as 0,3 (default: all)")
    if unit_frames:
        flag(
            "--unit-frames", type=int, default=default.unit_frames,
            help="frames of 20 ms in a unit, which are shuffled together (default: %(default)s)",
        )  # fmt: skip
    flag("--dtype", default=default.dtype, choices=tuple(DTYPES), help="of the frames (default: %(default)s)")
    flag("--data-seed", type=int, default=default.seed, help="order of the audio (default: %(default)s)")
    flag(
        "--packed", type=float, default=default.packed,
        help="share of windows filled with several clips (default: %(default)s)",
    )  # fmt: skip
    flag("--windows", type=int, default=default.batch, help="windows per forward pass (default: %(default)s)")
    flag("--workers", type=int, default=default.workers, help="threads that prepare audio (default: 0)")
    flag("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")


def build_mixture(spec: SourceSpec) -> Mixture:
    """The audio that `spec` names: its mixture, or the training clips of its corpus and data folders.

    Raises UsageError: no audio there, or a mixture that makes no sense.
    """
    if spec.mixture is not None:
        from calibration.mixture import load_mixture

        return load_mixture(spec.mixture, {"corpus": spec.corpus, "data": spec.data})
    if spec.audio is not None:
        return _mixture_of_audio(spec.audio, spec.domain)
    if spec.corpus is None and spec.data is None:
        raise UsageError(
            "no audio to train on: give --audio FOLDER, --mixture FILE or NAME, or --corpus FOLDER"
        )
    from calibration.training_clips import training_clips

    return Mixture.of(
        training_clips(
            spec.corpus, spec.data, speech=spec.clips, nonspeech=spec.clips, real=spec.clips, seed=spec.seed
        )
    )


def _mixture_of_audio(path: Path, domain: str) -> Mixture:
    """One data set of weight 1; some of its groups are held out."""
    from calibration.item_sources import from_folder
    from calibration.manifests import from_manifest

    name = path.stem or str(path)
    read = from_folder if path.is_dir() else from_manifest
    items = read(name, path, domain=domain)
    # a small folder holds out more of its groups, so that there is something to measure on
    share = max(HELD_OUT_SHARE, min(0.2, 20 / max(len(items), 1)))
    return Mixture([Dataset(name, 1.0, items)], name=name, held_out_share=share)


def build_source(spec: SourceSpec) -> StreamingFrames:
    """The frames of the model and the audio that `spec` names.

    Raises UsageError, ModelError, FormatError: something named does not exist or makes no sense.
    """
    from calibration.adapters import load_encoder

    mixture = build_mixture(spec)
    return source_of(spec, load_encoder(spec.model, spec.device), mixture)


def source_of(spec: SourceSpec, encoder: AudioEncoder, mixture: Mixture) -> StreamingFrames:
    """The same from a model and a mixture that are there already. Raises UsageError: a layer that the model
    does not have.
    """
    from calibration.plan import WindowPlan

    layers = range(encoder.n_layers) if spec.layers is None else spec.layers
    for layer in layers:
        if not 0 <= layer < encoder.n_layers:
            raise UsageError(
                f"layer {layer} does not exist: {encoder.name} has 0 to {encoder.n_layers - 1} (0-based)"
            )
    plan = WindowPlan(
        mixture,
        seed=spec.seed,
        packed_share=spec.packed,
        max_samples=encoder.max_samples,
        workers=spec.workers,
    )
    return StreamingFrames(
        encoder, plan, layers=layers, unit_frames=spec.unit_frames, dtype=DTYPES[spec.dtype], batch=spec.batch
    )


def _absolute_if_there(name: str) -> str:
    """A file, or a folder given with a slash, made absolute; anything else is a name and stays as it is."""
    path = Path(name).expanduser()
    is_path = path.is_file() or (os.sep in name and path.exists())
    return str(path.resolve()) if is_path else name


def parse_layers(text: str) -> tuple[int, ...] | None:
    """ "all" -> None, "0,3" -> (0, 3). Raises UsageError: anything else."""
    if text == "all":
        return None
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"--layers is {text!r}: expected 'all' or 0-based numbers such as 0,3") from error

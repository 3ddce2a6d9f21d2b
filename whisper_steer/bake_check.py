"""Is a steering made for the model in a file? Looked up on the disk, one tensor of the encoder at a time.

One rule for every format, by how the encoder's weights are stored:

    float32 alone         exact: the encoder of another model is refused
    float16, too          comparable, for models are published like that: another encoder is warned about
    bfloat16, quantised   rounded: the hash says nothing; the shape must do, with a warning
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from . import ggml_file, zoo
from .bake_files import SAFETENSORS_TYPES, openai_tensors, safetensors_header, shape_of
from .bake_zip import zip_tensors
from .convert_hf import openai_name, weight_sets
from .ct2_encoder import Ct2View
from .errors import MismatchError, UsageError
from .fileformat import encoder_sha256
from .ggml_quant import decode

if TYPE_CHECKING:
    from .steering import Steering

logger = logging.getLogger("whisper_steer")

_POSITIONS = "positional_embedding"  # a buffer, not part of the hash
_CONV_BIASES = ("conv1.bias", "conv2.bias")  # (n, 1) in ggml


class View(Protocol):
    """What Steering.check and the zoo look at in an openai-whisper model, and how exact its weights are."""

    name: str
    dims: Any
    exact: bool
    comparable: bool

    @property
    def encoder(self) -> Any: ...


@dataclass(frozen=True)
class _Stored:
    """A parameter that is read when it is looked at. dtype: its type in the file."""

    dtype: str
    read: Callable[[], Tensor]

    def detach(self) -> Tensor:
        return self.read()


class StoredEncoder:
    """The View of a file or folder: nothing is loaded, the tensors are read one by one when they are hashed.

    Raises FormatError: unreadable, or no Whisper.
    """

    def __init__(self, path: Path, format: str, name: str) -> None:
        shape = shape_of(path, format)
        self.dims = SimpleNamespace(n_audio_state=shape.d_model, n_audio_layer=shape.n_layers)
        self.name = name
        readers = {"openai": _openai, "transformers": _transformers, "ggml": _ggml}
        parameters = {key: stored for key, stored in readers[format](path) if key != _POSITIONS}
        types = {stored.dtype for stored in parameters.values()}
        self.exact = types == {"float32"}
        self.comparable = types <= {"float32", "float16"}
        self.encoder = SimpleNamespace(named_parameters=parameters.items)


def view_of(path: Path, format: str, name: str) -> View:
    """The encoder in a file or folder of one of the four formats. Raises FormatError."""
    return Ct2View(path, name) if format == "ct2" else StoredEncoder(path, format, name)


def kept_for(view: View, source: Path) -> Steering:
    """The steering kept for the model in `source`: by its name, else by its encoder.

    Raises MismatchError (none is kept), UsageError (rounded weights do not tell which model it is).
    """
    if view.comparable:
        return zoo.steering_for(view)  # type: ignore[arg-type]
    try:
        return zoo.load_steering("default", view.name)
    except UsageError as error:
        raise UsageError(
            f"steering is missing: {source} does not tell which model it is, pass --steering FILE"
        ) from error


def checked(steering: Steering, view: View, source: Path) -> bool:
    """True if the steering is found to be for this very encoder, False if that cannot be told.

    Raises MismatchError: another shape, or exact weights of another model.
    """
    own = steering.metadata.get("encoder_sha256")
    if own is None:
        return False
    unhashed(steering).check(view)
    if not view.comparable:
        logger.warning(
            "%s is rounded for its runtime: that it is the model of the steering is not checked", source
        )
        return False
    if not view.exact and encoder_sha256(view) == own:
        return True
    steering.check(view, strict=view.exact)
    return view.exact


def checked_by_record(steering: Steering, records: Sequence[Mapping[str, Any]], source: Path) -> bool:
    """Like `checked`, of a baked model: its weights have moved, but what was baked first still tells."""
    own, first = steering.metadata.get("encoder_sha256"), records[0]
    if own is None:
        return False
    if not first.get("verified") or first.get("encoder_sha256") is None:
        logger.warning("%s is baked: that it is the model of the steering is not checked", source)
        return False
    if first["encoder_sha256"] != own:
        raise MismatchError(
            f"steering is for {steering.metadata.get('base_model')} with encoder {str(own)[:12]}, {source} "
            f"was {first.get('base_model')} with encoder {str(first['encoder_sha256'])[:12]} before it was "
            "baked: pass --steering made for it"
        )
    return True


def unhashed(steering: Steering) -> Steering:
    """The same steering for any encoder of its shape."""
    return replace(steering, metadata={**steering.metadata, "encoder_sha256": None})


# ---------- (openai-whisper's name inside the encoder, parameter) of each format


def _openai(path: Path) -> Iterator[tuple[str, _Stored]]:
    for name, tensor in openai_tensors(path).items():
        if name.startswith("encoder."):
            yield name.removeprefix("encoder."), _mapped(tensor)


def _transformers(folder: Path) -> Iterator[tuple[str, _Stored]]:
    for file in weight_sets(folder)[0]:
        for name, stored in _shard(folder / file):
            known = openai_name(name)
            if known is not None and known.startswith("encoder."):
                yield known.removeprefix("encoder."), stored


def _shard(path: Path) -> Iterator[tuple[str, _Stored]]:
    if path.suffix != ".safetensors":
        yield from ((name, _mapped(tensor)) for name, tensor in zip_tensors(path).items())
        return
    for name, entry in safetensors_header(path).items():
        if name:  # "" is where the data begin
            dtype = SAFETENSORS_TYPES.get(entry["dtype"], entry["dtype"])
            yield name, _Stored(dtype, partial(_from_safetensors, path, name))


def _ggml(path: Path) -> Iterator[tuple[str, _Stored]]:
    types = {"f32": "float32", "f16": "float16"}
    for name, tensor in ggml_file.read_layout(path).tensors.items():
        if name.startswith("encoder."):
            read = partial(_from_ggml, path, tensor)
            yield name.removeprefix("encoder."), _Stored(types.get(tensor.kind, tensor.kind), read)


def _mapped(tensor: Tensor) -> _Stored:
    return _Stored(str(tensor.dtype).removeprefix("torch."), lambda: tensor)


def _from_safetensors(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        found: Tensor = file.get_tensor(name)
        return found


def _from_ggml(path: Path, tensor: ggml_file.GgmlTensor) -> Tensor:
    with open(path, "rb") as file:
        file.seek(tensor.offset)
        values = decode(file.read(tensor.nbytes), tensor.kind, tensor.shape)
    flat = values.reshape(-1) if tensor.name.removeprefix("encoder.") in _CONV_BIASES else values
    return torch.from_numpy(flat)

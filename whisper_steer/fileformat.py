"""One file format for everything: safetensors with one JSON value under the metadata key "whisper_steer".

Required in that JSON: `format_version` and `kind` ("sae", "steering", "model", ...); the rest belongs to the
kind. Files are written to a temporary name and renamed, so a reader never sees half a file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import FormatError, UsageError

FORMAT_VERSION = 1
METADATA_KEY = "whisper_steer"

UNNAMED = "unnamed"  # what a model goes by that carries no name and has no released size
# (d_model, encoder blocks) of the released Whisper sizes, to name a model that carries no name itself
_RELEASED_SIZES = {
    (384, 4): "tiny",
    (512, 6): "base",
    (768, 12): "small",
    (1024, 24): "medium",
    (1280, 32): "large",
}


def package_version() -> str:
    """Version of the installed package; "unknown" when it is imported without being installed."""
    try:
        return importlib.metadata.version("whisper-steer")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write `tensors` (any dtype, kept) and `metadata` (JSON-able; must hold "kind") to `path`, atomically.

    Adds "format_version" and "package_version". Numbers that are not finite become null: a rate that could
    not be measured. Missing parent folders are made. Equal input gives equal bytes.

    Raises UsageError (metadata without a kind or not JSON-able), FormatError (cannot be written).
    """
    path = Path(path)
    if not isinstance(metadata.get("kind"), str):
        raise UsageError(
            f"metadata for {path.name} has no 'kind': expected a string such as 'sae' or 'steering'"
        )
    header = {**metadata, "format_version": FORMAT_VERSION, "package_version": package_version()}
    try:
        text = json.dumps(_finite(header), allow_nan=False, ensure_ascii=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"metadata for {path.name} cannot be written as JSON: {_first_line(error)}"
        ) from error
    # clones: safetensors refuses tensors that share memory
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    data = save(plain, metadata={METADATA_KEY: text})
    write_atomically(path, [data])


def write_atomically(path: Path, blocks: Iterable[bytes]) -> None:
    """Write `blocks` to a temporary name and rename it: a reader never sees half a file.

    Missing parent folders are made. Raises FormatError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            for block in blocks:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FormatError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def load_tensors(path: str | Path, kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read (tensors, metadata) of a whisper-steer file; `kind` None accepts every kind. Tensors are on the
    CPU.

    Raises FormatError: missing, not safetensors, corrupt, not ours, of another kind, or of a newer format.
    """
    with _opened(path, kind) as (file, metadata):
        # clones: the file may be mapped into memory and replaced later
        return {name: file.get_tensor(name).clone() for name in file.keys()}, metadata


def load_metadata(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Read only the metadata of a whisper-steer file. Raises like `load_tensors`."""
    with _opened(path, kind) as (_, metadata):
        return metadata


def encoder_sha256(model: Any) -> str:
    """SHA-256 (hex) of a Whisper's encoder: sorted parameter names (openai-whisper's, without the "encoder."
    prefix), each followed by a NUL byte and its values as little-endian float32.

    Buffers are left out: the sinusoidal positions are the same for every model of a shape.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.encoder.named_parameters()):
        digest.update(name.encode() + b"\0")
        values = parameter.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(memoryview(values.astype("<f4", copy=False)).cast("B"))
    return digest.hexdigest()


def model_name(model: Any) -> str:
    """The model's `name`, else the released size that it has the shape of, else UNNAMED."""
    name = getattr(model, "name", None)
    if isinstance(name, str) and name:
        return name
    return _RELEASED_SIZES.get((model.dims.n_audio_state, model.dims.n_audio_layer), UNNAMED)


def model_metadata(model: Any) -> dict[str, Any]:
    """What a file made for `model` records about it: base_model, encoder_sha256, d_model, n_layers."""
    return {
        "base_model": model_name(model),
        "encoder_sha256": encoder_sha256(model),
        "d_model": model.dims.n_audio_state,
        "n_layers": model.dims.n_audio_layer,
    }


@contextmanager
def _opened(path: str | Path, kind: str | None) -> Iterator[tuple[Any, dict[str, Any]]]:
    path = Path(path)
    expected = f"a whisper-steer {kind} file" if kind else "a whisper-steer file"
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise FormatError(f"{path} {what}: expected {expected}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file, _checked_metadata(path, file.metadata(), kind, expected)
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} is not a readable safetensors file ({_first_line(error)}): expected {expected}, "
            "fetch it again"
        ) from error


def _checked_metadata(
    path: Path, header: dict[str, str] | None, kind: str | None, expected: str
) -> dict[str, Any]:
    text = (header or {}).get(METADATA_KEY)
    if text is None:
        raise FormatError(f"{path} is safetensors, but of another program: expected {expected}")
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise FormatError(
            f"{path} has damaged metadata ({_first_line(error)}): expected {expected}"
        ) from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("kind"), str):
        raise FormatError(f"{path} does not say what kind of file it is: expected {expected}")
    version = metadata.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise FormatError(f"{path} has format_version {version!r}: expected 1 to {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{path} has format {version}, this whisper-steer ({package_version()}) reads up to "
            f"{FORMAT_VERSION}: upgrade whisper-steer"
        )
    if kind is not None and metadata["kind"] != kind:
        raise FormatError(f"{path} is a {metadata['kind']} file: expected {expected}")
    return metadata


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

"""A model in another runtime's format: openai-whisper's .pt, transformers, CTranslate2, whisper.cpp.

CTranslate2's files are made by its own converter out of a transformers folder; the others are written here
(transformers_folder.py, ggml_file.py). All four can be converted from, too (loading.py).
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import FormatError, UsageError
from .zoo import DEFAULT_MODEL

if TYPE_CHECKING:
    from whisper.model import Whisper

FORMATS = ("openai", "transformers", "ct2", "ggml")
_FLOATS = ("float32", "float16", "bfloat16")
# what each format can hold; the first is the default
DTYPES = {
    "openai": _FLOATS,
    "transformers": _FLOATS,
    "ct2": (
        *_FLOATS,
        "int8",
        "int8_float32",
        "int8_float16",
        "int8_bfloat16",
        "int16",
    ),
    # not f32: whisper.cpp 1.8 loads such files, then aborts in the convolution
    "ggml": ("f16", "q8_0", "q5_0"),
}


def convert(
    model: str | Path | Whisper = DEFAULT_MODEL,
    format: str = "transformers",
    out: str | Path | None = None,
    *,
    dtype: str | None = None,
    download_root: str | Path | None = None,
) -> Path:
    """Write a model for another runtime; returns the path of the file (openai, ggml) or folder written.

    model: what load_model takes (a CTranslate2 folder and a whisper.cpp file too), or a plain loaded model.
    format: one of FORMATS. out: must not exist yet; None: named after model and format, in the current
    folder. dtype: one of DTYPES[format]; None: its first.

    Raises UsageError (unknown format or dtype, `out` exists, a package is missing, the model is steered),
    ModelError and FormatError (cannot be loaded or written).
    """
    kind = check_dtype(format, dtype)
    target = Path(out) if out is not None else default_path(_name_of(model), format)
    refuse_existing(target)
    plain = _plain(model, download_root)
    writers: dict[str, Callable[[Path], None]] = {
        "openai": lambda path: _write_checkpoint(plain, path, kind),
        "transformers": lambda path: _write_transformers(plain, path, kind),
        "ct2": lambda path: _write_ct2(plain, path, kind),
        "ggml": lambda path: _write_ggml(plain, path, kind),
    }
    write_new(target, writers[format])
    return target


def check_dtype(format: str, dtype: str | None) -> str:
    """The dtype to write in a format. Raises UsageError for an unknown format or dtype."""
    if format not in FORMATS:
        raise UsageError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES[format]:
        raise UsageError(f"dtype {dtype!r} for {format}: expected one of {', '.join(DTYPES[format])}")
    return dtype or DTYPES[format][0]


def default_path(name: str, format: str) -> Path:
    """mini.en.pt, ggml-mini.en.bin, mini.en-ct2, mini.en-transformers."""
    base = name.rstrip("/").rpartition("/")[2].removesuffix(".pt").removesuffix(".safetensors")
    names = {"openai": f"{base}.pt", "ggml": f"ggml-{base}.bin"}
    return Path(names.get(format, f"{base}-{format}"))


def refuse_existing(target: Path) -> None:
    """Raises UsageError if something of that name is there already."""
    if target.exists():
        raise UsageError(f"{target} exists already: choose another --out, or remove it first")


def write_new(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or folder under a temporary name, then give it its own.

    Raises FormatError if it cannot be written; nothing is left behind then.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.rename(temporary, target)
    except OSError as error:
        raise FormatError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _name_of(model: str | Path | Whisper) -> str:
    if not isinstance(model, (str, Path)):
        return str(getattr(model, "name", None) or "model")
    from .convert_from import runtime_name

    return runtime_name(Path(model).expanduser()) or str(model)


def _plain(model: str | Path | Whisper, download_root: str | Path | None) -> Whisper:
    from .attach import handles_of
    from .zoo import load_model

    if isinstance(model, (str, Path)):
        return load_model(model, device="cpu", download_root=download_root)
    if handles_of(model):
        raise UsageError("the model is steered: remove its handles first, or bake the steering")
    return model


def _write_checkpoint(model: Whisper, path: Path, dtype: str) -> None:
    import torch

    kind = getattr(torch, dtype)
    state = {name: tensor.detach().cpu().to(kind).clone() for name, tensor in model.state_dict().items()}
    torch.save({"dims": dataclasses.asdict(model.dims), "model_state_dict": state}, path)


def _write_transformers(model: Whisper, path: Path, dtype: str) -> None:
    from .transformers_folder import write_folder

    path.mkdir()
    write_folder(model, path, dtype)


def _write_ggml(model: Whisper, path: Path, dtype: str) -> None:
    from .ggml_file import write_ggml

    write_ggml(model, path, dtype)


def _write_ct2(model: Whisper, path: Path, dtype: str) -> None:
    """Through a transformers folder, which is removed again."""
    from .transformers_folder import PREPROCESSOR_CONFIG, TOKENIZER, write_folder

    try:
        import transformers
        from ctranslate2.converters import TransformersConverter
    except ImportError as error:
        raise UsageError(
            f"CTranslate2's converter needs {error.name or 'transformers'}: pip install 'whisper-steer[hf]'"
        ) from error
    between = path.with_name(path.name + ".transformers")
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        between.mkdir()
        write_folder(model, between)
        TransformersConverter(str(between), copy_files=[TOKENIZER, PREPROCESSOR_CONFIG]).convert(
            str(path), quantization=dtype
        )
    finally:
        shutil.rmtree(between, ignore_errors=True)
        if shown:
            logging.enable_progress_bar()

"""A model in another runtime's format: openai-whisper's .pt, transformers, CTranslate2, whisper.cpp.

CTranslate2's files are made by its own converter out of a transformers folder; the others are written here
(transformers_folder.py, ggml_file.py). All four can be converted from, too (loading.py).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bake_record import (
    RECORD_FILE,
    carried,
    described,
    read_records,
    record_path,
    refuse_stray,
    write_record,
)
from .errors import FormatError, UsageError
from .zoo import DEFAULT_MODEL

if TYPE_CHECKING:
    from whisper.model import Whisper

logger = logging.getLogger("whisper_steer")

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
    folder. dtype: one of DTYPES[format]; None: its first. A baked model stays baked: its record goes
    along.

    Raises UsageError (unknown format or dtype, `out` exists, a package is missing, the model is steered),
    ModelError and FormatError (cannot be loaded or written).
    """
    kind = check_dtype(format, dtype)
    target = Path(out) if out is not None else default_path(name_of(model), format)
    refuse_existing(target)
    records = _records_of(model)
    if not records:
        refuse_stray(target)
    plain = plain_model(model, download_root)
    writers: dict[str, Callable[[Path], None]] = {
        "openai": lambda path: _write_checkpoint(plain, path, kind),
        "transformers": lambda path: _write_transformers(plain, path, kind),
        "ct2": lambda path: _write_ct2(plain, path, kind),
        "ggml": lambda path: _write_ggml(plain, path, kind),
    }

    def write(path: Path) -> None:
        writers[format](path)
        if records:
            write_record(path / RECORD_FILE if path.is_dir() else record_path(target), records)

    write_new(target, write)
    if records:
        logger.warning("%s is baked (%s), and so is %s", model, described(records), target)
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
    """Raises UsageError if something of that name is there already, or if there can be nothing: one of the
    folders in its path is a file."""
    if os.path.lexists(target):
        raise UsageError(f"{target} exists already: choose another --out, or remove it first")
    above = next((folder for folder in target.parents if os.path.exists(folder)), None)
    if above is not None and not above.is_dir():
        raise UsageError(f"{target} cannot be made, as {above} is a file: choose another --out")


def refuse_inside(target: Path, source: Path) -> None:
    """Raises UsageError if the folder `source`, whose files are taken over, would hold its own result."""
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise UsageError(f"{target} is inside of {source}: choose an --out elsewhere")


def write_new(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or folder under a temporary name, then give it its own.

    Raises FormatError if it cannot be written; nothing is left behind then.
    """
    with workplace(target, f".{target.name}.{secrets.token_hex(4)}.tmp") as temporary:
        try:
            write(temporary)
            os.rename(temporary, target)
        except OSError as error:
            raise FormatError(f"cannot write {target}: {error.strerror or error}") from error


@contextmanager
def workplace(target: Path, name: str) -> Iterator[Path]:
    """A path of that name beside `target`, for a file or folder that is gone in the end; folders above it are
    made, and stay unless there is an error. Raises FormatError if they cannot be."""
    target = Path(os.path.abspath(target))
    missing = [folder for folder in target.parents if not os.path.exists(folder)]
    temporary = target.with_name(name)
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FormatError(f"cannot write {target}: {error.strerror or error}") from error
        yield temporary
    except BaseException:
        _remove(temporary)
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise
    _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def name_of(model: str | Path | Whisper) -> str:
    """What a model is called, without what converters add: files and folders are named after it.

    A folder in the hub's cache has the name of its repository.
    """
    if not isinstance(model, (str, Path)):
        return str(getattr(model, "name", None) or "model")
    from .convert_from import runtime_name

    path = Path(model).expanduser()
    return (runtime_name(path) or folder_name(path)) if path.exists() else str(model)


def folder_name(path: Path) -> str:
    """The name of a file or folder; of a folder in the hub's cache, that of its repository."""
    whole = Path(os.path.abspath(path))
    if whole.parent.name == "snapshots":
        return whole.parent.parent.name.rpartition("--")[2] or whole.name
    return whole.name


def _records_of(model: str | Path | Whisper) -> list[dict[str, Any]]:
    """What was baked into a file or folder, as its conversion records it."""
    if not isinstance(model, (str, Path)):
        return []
    return carried(read_records(Path(model).expanduser()))


def plain_model(model: str | Path | Whisper, download_root: str | Path | None) -> Whisper:
    """The model as it is or as it is loaded, on the CPU. Raises UsageError if it is steered, ModelError."""
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
    try:
        torch.save({"dims": dataclasses.asdict(model.dims), "model_state_dict": state}, path)
    except RuntimeError as error:  # of its own writer in C++, which does not say why
        raise FormatError(f"cannot write {path.parent}: torch.save failed, is the disk full?") from error


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

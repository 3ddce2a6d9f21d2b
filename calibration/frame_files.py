"""A folder of cached units: one safetensors file each, and beside it what is known about the file.

    cache.json                      what decides the content of all units
    units/r00003_s00.safetensors    tensors layer_00, layer_01, ... (frames, d_model) and domains (frames,)
    units/r00003_s00.json           its SHA-256, size and modification time; without it the unit is unfinished
    verified.jsonl                  files whose checksum was compared once, so that it is not done every time

A unit's file is written under a temporary name, synced and renamed, and only then its .json is written in
the same way. Whenever a writer is killed, a unit is therefore either whole or written again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calibration.frames import DTYPES, Frames, FrameSource
from whisper_steer.errors import FormatError, UsageError
from whisper_steer.fileformat import FORMAT_VERSION, METADATA_KEY, load_metadata, package_version

Unit = tuple[int, int]  # (round, shard)

_SAFETENSORS_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.uint8: "U8",
}
_ABANDONED_SECONDS = 3600  # a temporary file of another machine that nobody has written to for this long


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unit_name(unit: Unit) -> str:
    return f"r{unit[0]:05d}_s{unit[1]:02d}"


def tensor_name(layer: int) -> str:
    return f"layer_{layer:02d}"


def size_text(n_bytes: float) -> str:
    """Bytes for people, in powers of 1000 as disks are sold: "9.3 TB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def unit_bytes(n_layers: int, unit_frames: int, d_model: int, dtype: torch.dtype) -> int:
    """Size of one unit's tensors on disk, without the header of a few hundred bytes."""
    return unit_frames * (n_layers * d_model * dtype.itemsize + 1)


def differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Where two JSON-able values differ: "plan.seed is 0, wanted 1"."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        keys = sorted({*found, *wanted})
        pairs = ((f"{name}.{key}" if name else str(key), found.get(key), wanted.get(key)) for key in keys)
        return [text for key, a, b in pairs for text in differences(a, b, key)]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = ((f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(found, wanted, strict=True)))
        return [text for key, a, b in pairs for text in differences(a, b, key)]
    if found == wanted:
        return []
    return [f"{name} is {_short(found)}, wanted {_short(wanted)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


class CacheFolder:
    """The files of one cache.

    Attributes:
        folder: where they are.
        layers: 0-based layers that every unit holds, in order.
        d_model, unit_frames, dtype: of every unit.
        identity: of the source that the units come from.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]):
        """header: the content of cache.json; use `create` or `open`."""
        self.folder = folder
        self.identity: dict[str, Any] = header["identity"]
        self.layers = tuple(int(layer) for layer in header["layers"])
        self.d_model, self.unit_frames = int(header["d_model"]), int(header["unit_frames"])
        self.dtype = DTYPES[header["dtype"]]
        self._digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self._verified: set[tuple[str, int, int]] | None = None

    @classmethod
    def create(cls, folder: Path | str, source: FrameSource) -> CacheFolder:
        """The cache of `source` in `folder`: begun, or continued if it is there already.

        Raises UsageError: the folder holds units of another source. FormatError: cannot be read or written.
        """
        folder = Path(folder)
        header = {
            "kind": "frame-cache",
            "format_version": FORMAT_VERSION,
            "layers": list(source.layers),
            "d_model": source.d_model,
            "unit_frames": source.unit_frames,
            "dtype": dtype_name(source.dtype),
            "identity": json.loads(json.dumps(source.identity())),
        }
        path = folder / "cache.json"
        if path.exists():
            found = _read_header(path)
            differing = differences(found, header)
            if differing:
                raise UsageError(
                    f"{folder} holds frames made with other settings ({listed(differing)}): "
                    "give another folder, or the settings that it was made with"
                )
        else:
            with _one_line(folder):
                (folder / "units").mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps(header, indent=1).encode() + b"\n")
        return cls(folder, header)

    @classmethod
    def open(cls, folder: Path | str) -> CacheFolder:
        """The cache in `folder`. Raises FormatError: none there, damaged, or of a newer format."""
        return cls(Path(folder), _read_header(Path(folder) / "cache.json"))

    def path(self, unit: Unit) -> Path:
        return self.folder / "units" / f"{unit_name(unit)}.safetensors"

    def units(self) -> list[Unit]:
        """Units that are finished, in order; whether their files are intact is not looked at."""
        found = []
        for path in (self.folder / "units").glob("r*_s*.json"):
            round_text, _, shard_text = path.stem[1:].partition("_s")
            if round_text.isdigit() and shard_text.isdigit() and path.with_suffix(".safetensors").exists():
                found.append((int(round_text), int(shard_text)))
        return sorted(found)

    def is_complete(self, unit: Unit) -> bool:
        """Whether the unit is finished; its checksum is compared only if the file's time is not the recorded
        one.
        """
        record = self._record(unit)
        if record is None:
            return False
        try:
            status = self.path(unit).stat()
        except OSError:
            return False
        if status.st_size != record.get("bytes"):
            return False
        return status.st_mtime_ns == record.get("mtime_ns") or _sha256(self.path(unit)) == record["sha256"]

    def write(self, unit: Unit, frames: Frames) -> None:
        """Write a unit so that it is there as a whole or not at all.

        Raises UsageError: frames of another shape or dtype. FormatError: cannot be written; a full disk says
        how much is free and needed.
        """
        shape = (len(self.layers), self.unit_frames, self.d_model)
        if tuple(frames.data.shape) != shape or frames.data.dtype != self.dtype:
            raise UsageError(
                f"unit {unit} is {tuple(frames.data.shape)} {dtype_name(frames.data.dtype)}: "
                f"{self.folder} expects {shape} {dtype_name(self.dtype)}"
            )
        names = [tensor_name(layer) for layer in self.layers]
        tensors = {**dict(zip(names, frames.data, strict=True)), "domains": frames.domains}
        metadata = {
            "kind": "frames",
            "format_version": FORMAT_VERSION,
            "package_version": package_version(),
            "round": unit[0],
            "shard": unit[1],
            "source_sha256": self._digest,
        }
        path = self.path(unit)
        with _one_line(self.folder, needed=sum(tensor.nbytes for tensor in tensors.values())):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _temporary(path) as (file, commit):
                digest = _write_safetensors(file, tensors, metadata)
                commit()
            status = path.stat()
            record = {"sha256": digest, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
            write_atomically(path.with_suffix(".json"), json.dumps(record).encode() + b"\n")

    def read(self, unit: Unit, layers: Sequence[int]) -> Frames:
        """Some layers of a unit, copied out of the memory-mapped file; its checksum is compared once.

        Raises FormatError: missing, unfinished, damaged, or of another cache.
        """
        path = self.path(unit)
        self._verify(unit)
        metadata = load_metadata(path, "frames")
        if (metadata.get("round"), metadata.get("shard"), metadata.get("source_sha256")) != (
            *unit,
            self._digest,
        ):
            raise FormatError(f"{path} is a unit of another cache: delete it and cache again")
        data = torch.empty(len(layers), self.unit_frames, self.d_model, dtype=self.dtype)
        try:
            with safe_open(path, framework="pt") as file:
                for row, layer in zip(data, layers, strict=True):
                    row.copy_(file.get_tensor(tensor_name(layer)))
                domains = file.get_tensor("domains").clone()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise FormatError(f"{path} cannot be read ({error}): delete it and cache again") from error
        return Frames(data, domains)

    def sweep(self) -> None:
        """Remove temporary files of writers that are gone."""
        for path in (self.folder / "units").glob(".*.tmp"):
            host, _, process = path.name.split(".")[-3].rpartition("-")
            with suppress(OSError, ValueError):
                abandoned = time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
                if abandoned or (host == _host() and not _is_running(int(process))):
                    path.unlink()

    def _record(self, unit: Unit) -> dict[str, Any] | None:
        try:
            record = json.loads(self.path(unit).with_suffix(".json").read_bytes())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and isinstance(record.get("sha256"), str) else None

    def _verify(self, unit: Unit) -> None:
        path = self.path(unit)
        record = self._record(unit)
        if record is None or not path.is_file():
            raise FormatError(f"{path} is missing or unfinished: cache again with the same settings")
        status = path.stat()
        key = (path.name, status.st_size, status.st_mtime_ns)
        if self._verified is None:
            self._verified = _read_verified(self.folder / "verified.jsonl")
        if key in self._verified:
            return
        if status.st_size != record.get("bytes") or _sha256(path) != record["sha256"]:
            raise FormatError(
                f"{path} is damaged (its SHA-256 is not the one it was written with): "
                "delete it and cache again with the same settings"
            )
        self._verified.add(key)
        with suppress(OSError):  # a cache may lie on a disk that only allows reading
            with (self.folder / "verified.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(key) + "\n")


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FormatError(
            f"{path.parent} holds no frame cache (no {path.name}): make one with "
            "python -m calibration.frame_cache"
        ) from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error}): delete the cache and make it again") from error
    if not isinstance(header, dict) or header.get("kind") != "frame-cache":
        raise FormatError(f"{path} does not describe a frame cache: give the folder of one")
    if header.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format {header.get('format_version')!r}, this version reads {FORMAT_VERSION}: "
            "cache again or upgrade whisper-steer"
        )
    missing = {"layers", "d_model", "unit_frames", "dtype", "identity"} - set(header)
    if missing or header["dtype"] not in DTYPES:
        what = ", ".join(sorted(missing)) or "dtype"
        raise FormatError(f"{path} is damaged ({what}): make the cache again")
    return header


def _read_verified(path: Path) -> set[tuple[str, int, int]]:
    verified = set()
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError):  # half a line of a killed reader: verified again
                name, size, mtime = json.loads(line)
                verified.add((name, size, mtime))
    return verified


def listed(problems: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    shown = "; ".join(problems[:3])
    return shown if len(problems) <= 3 else f"{shown}; and {len(problems) - 3} more"


def _write_safetensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Write one tensor after the other, without a copy of the whole; returns the file's SHA-256."""
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: json.dumps(metadata, sort_keys=True)}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for part in (len(text).to_bytes(8, "little"), text):
        digest.update(part)
        file.write(part)
    for tensor in tensors.values():
        raw = tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
        digest.update(raw)
        file.write(raw)
    return digest.hexdigest()


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[IO[bytes], Any]]:
    """A file beside `path` that takes its place when `commit()` is called, and is gone otherwise."""
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}.{secrets.token_hex(4)}.tmp")

    def commit() -> None:
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)

    try:
        with open(temporary, "xb") as file:
            yield file, commit
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_atomically(path: Path, data: bytes) -> None:
    """A small file, synced, as a whole or not at all. Raises OSError."""
    with _temporary(path) as (file, commit):
        file.write(data)
        commit()


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _one_line(folder: Path, needed: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder).free
            raise FormatError(
                f"the disk of {folder} is full ({size_text(free)} free, the next unit needs "
                f"{size_text(needed)}): make room and give the same command; finished units are kept"
            ) from error
        raise FormatError(f"cannot write to {folder}: {error.strerror or error}") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _host() -> str:
    return socket.gethostname().replace(".", "_")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""What the loaders of other libraries share: an SAE's weights in our orientation, and what is folded in."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FormatError, UsageError
from ..fileformat import METADATA_KEY
from ..sae import SparseAutoencoder

# names of a block's output: encoder.blocks.3, layers.3, blocks.3.hook_resid_post; hook_resid_pre is its input
_BLOCK = re.compile(r"(?:.*[./])?(?:blocks|layers|layer|h)\.(\d+)(?:\.hook_resid_(post|pre))?")


@dataclass(frozen=True)
class Parts:
    """An SAE's weights while they are converted, all float64 so that folding costs no precision.

    pre = W_enc x + b_enc, f = pre where pre > theta, x^ = W_dec^T f + b_dec; W_enc and W_dec (n_latents,
    d_model), b_enc and theta (n_latents,), b_dec (d_model,). Every method returns changed copies.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    theta: Tensor

    @classmethod
    def of(
        cls, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, theta: Tensor | None = None
    ) -> Parts:
        """theta: one value per latent or for all of them; zeros when None. Raises FormatError where the
        shapes do not belong together."""
        n, d = W_enc.shape if W_enc.ndim == 2 else (0, 0)
        theta = torch.zeros(n) if theta is None else theta.double().reshape(-1)
        theta = theta.expand(n) if theta.numel() == 1 else theta
        given = {"encoder": W_enc, "encoder bias": b_enc, "decoder": W_dec, "decoder bias": b_dec}
        shapes = {"encoder": (n, d), "encoder bias": (n,), "decoder": (n, d), "decoder bias": (d,)}
        for name, shape in {**shapes, "threshold": (n,)}.items():
            tensor = theta if name == "threshold" else given[name]
            if n == 0 or d == 0 or tuple(tensor.shape) != shape:
                raise FormatError(f"the {name} has shape {tuple(tensor.shape)}, expected {shape}")
            if not bool(torch.isfinite(tensor).all()):
                raise FormatError(f"the {name} holds NaN or infinity")
        return cls(W_enc.double(), b_enc.double(), W_dec.double(), b_dec.double(), theta.double())

    def encoding_minus_b_dec(self) -> Parts:
        """For an SAE that encodes x - b_dec: W (x - b_dec) + b = W x + (b - W b_dec)."""
        return replace(self, b_enc=self.b_enc - self.W_enc @ self.b_dec)

    def with_unit_decoder(self, *, scale_theta: bool) -> Parts:
        """Codes multiplied, decoder rows divided by the rows' lengths: the reconstruction stays.

        scale_theta False: the thresholds were already compared with the multiplied pre-activations.
        """
        lengths = self.W_dec.norm(dim=1).clamp(min=1e-8)
        return Parts(
            self.W_enc * lengths[:, None],
            self.b_enc * lengths,
            self.W_dec / lengths[:, None],
            self.b_dec,
            self.theta * lengths if scale_theta else self.theta,
        )

    def gated(self, r_mag: Tensor, b_gate: Tensor, b_mag: Tensor) -> Parts:
        """A Gated SAE as the JumpReLU that it equals (Rajamanoharan et al. 2024, arXiv 2404.16014, appendix):
        W x + b_gate > 0 says the same of e^r W x + b_mag as being above b_mag - e^r b_gate."""
        growth = r_mag.double().exp()
        return replace(
            self,
            W_enc=self.W_enc * growth[:, None],
            b_enc=b_mag.double(),
            theta=b_mag.double() - growth * b_gate.double(),
        )

    def of_inputs(self, mean: Tensor, matrix: Tensor, inverse: Tensor) -> Parts:
        """An SAE made for z = (x - mean) matrix, as one for x = z inverse + mean; (d_model, d_model)."""
        mean, matrix, inverse = mean.double(), matrix.double(), inverse.double()
        W_enc = self.W_enc @ matrix.T
        return replace(
            self,
            W_enc=W_enc,
            b_enc=self.b_enc - W_enc @ mean,
            W_dec=self.W_dec @ inverse,
            b_dec=self.b_dec @ inverse + mean,
        )

    def build(
        self, *, activation: str, k: int | None, layer: int, metadata: Mapping[str, Any]
    ) -> SparseAutoencoder:
        """The SAE, float32, in eval mode. Raises UsageError for an impossible k or layer."""
        n, d = self.W_enc.shape
        # on no device, so that no random start is drawn for weights that are replaced at once
        with torch.device("meta"):
            sae = SparseAutoencoder(d, n, activation=activation, k=k, layer=layer, metadata=dict(metadata))
        weights = {name: getattr(self, name).float().contiguous() for name in _NAMES}
        sae.load_state_dict(weights, assign=True)
        return sae.eval()


_SAID_BY_THE_FILE = (
    *("kind", "format_version", "package_version"),
    *("layer", "activation", "k", "d_model", "n_latents"),
)
_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "theta")


def source(library: str, kind: str, file: Path, base_model: str | None) -> dict[str, Any]:
    """Metadata that says where an imported SAE comes from; its licence is the source's, so none is named."""
    return {
        "source": {
            "library": library,
            "class": kind,
            "file": file.name,
            "sha256": sha256(file),
            "base_model": base_model,
        },
        "licence": None,
    }


def provenance(sae: SparseAutoencoder, kind: str) -> dict[str, Any]:
    """Header metadata of an exported file, which `own_metadata` reads again."""
    return {"licence": "MIT", **sae.metadata, "kind": kind}


def own_metadata(header: Mapping[str, str]) -> dict[str, Any]:
    """What `provenance` put into a file's header; empty for files that another program wrote."""
    try:
        metadata = json.loads(header.get(METADATA_KEY, "{}"))
    except ValueError:
        return {}
    if not isinstance(metadata, dict):
        return {}
    return {name: value for name, value in metadata.items() if name not in _SAID_BY_THE_FILE}


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def layer_of_hook(name: str) -> int | None:
    """The 0-based layer whose output a hook name means, None if it names something else (an MLP, ...).

    "encoder.layers.3" and "blocks.3.hook_resid_post" are layer 3, "blocks.3.hook_resid_pre" is layer 2.
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    layer = int(match[1]) - (match[2] == "pre")
    return layer if layer >= 0 else None


def hook_of_layer(layer: int) -> str:
    """Name written for a layer: transformers' name of a Whisper, HuBERT, wav2vec2 or WavLM block."""
    return f"encoder.layers.{layer}"


def chosen_layer(given: int | None, recorded: int | None, where: Path, unclear: str = "") -> int:
    """The layer the caller gives, else the recorded one. Raises UsageError if there is neither."""
    if given is not None:
        return given
    if recorded is None:
        raise UsageError(
            f"{where} does not tell which encoder layer it is for{unclear}: pass layer=, counted from 0"
        )
    return recorded


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FormatError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise FormatError(f"{path} is not JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a JSON {type(value).__name__}: expected an object")
    return value


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors on the CPU, header metadata). Raises FormatError."""
    if not path.is_file():
        raise FormatError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path} is not a readable safetensors file ({reason}): fetch it again") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Atomically. Raises FormatError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x", encoding="utf-8") as file:
            json.dump(value, file, indent=2, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FormatError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def required(tensors: Mapping[str, Any], names: tuple[str, ...], where: Path) -> list[Tensor]:
    """The named tensors, in that order. Raises FormatError naming all that are missing."""
    missing = [name for name in names if not isinstance(tensors.get(name), Tensor)]
    if missing:
        raise FormatError(f"{where} lacks {', '.join(missing)}: it has {', '.join(map(str, tensors))}")
    return [tensors[name] for name in names]


def checked_parts(
    where: Path,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    theta: Tensor | None = None,
) -> Parts:
    """Parts.of with the file's name in its errors."""
    try:
        return Parts.of(W_enc, b_enc, W_dec, b_dec, theta)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from error


def whole_k(value: Any, where: Path) -> int:
    """k as a whole number >= 1: libraries store it as int, float (an average) or tensor."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or round(value) < 1:
        raise FormatError(f"{where}: k is {value!r}, expected a number >= 1")
    return round(value)

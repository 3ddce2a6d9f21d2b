"""A sparse autoencoder on the residual stream of one encoder block.

    f(x) = act(W_enc x + b_enc)        x^ = W_dec^T f + b_dec

AudioSAE's form (arXiv 2602.05027): b_dec is not subtracted before encoding. `layer` is 0-based and means the
output of `encoder.blocks[layer]`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import activation_functions, kernels
from .errors import FormatError, UsageError
from .fileformat import load_tensors, save_tensors

KIND = "sae"
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "theta")


class SparseAutoencoder(nn.Module):
    """W_enc (n_latents, d_model), b_enc (n_latents,), W_dec (n_latents, d_model), b_dec (d_model,), all
    parameters; theta (n_latents,), a buffer: the threshold of the inference form (zeros where the activation
    has none).

    For training use `pre_activations`, `decode` and the training form from `activation_functions.make`, and
    copy that form's `theta()` into this module's `theta` at the end.

    metadata: what was calibrated on, rates, base model, ...; saved with the file (see `save`).
    """

    theta: Tensor

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        *,
        activation: str = "batchtopk",
        k: int | None = None,
        layer: int = 0,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """Random start: unit decoder rows, the encoder equal to them, biases and thresholds zero.

        Raises UsageError for an unknown activation, one that lacks its k, or a size below 1.
        """
        super().__init__()
        activation_functions.check_activation(activation, k)
        for name, value, least in (("d_model", d_model, 1), ("n_latents", n_latents, 1), ("layer", layer, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"{name} is {value!r}: expected a whole number >= {least}")
        self.activation, self.k, self.layer = activation, k, layer
        self.metadata: dict[str, Any] = dict(metadata or {})
        rows = nn.functional.normalize(torch.randn(n_latents, d_model), dim=-1)
        self.W_enc = nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(rows)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("theta", torch.zeros(n_latents))

    @property
    def n_latents(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[1]

    def pre_activations(self, x: Tensor) -> Tensor:
        """W_enc x + b_enc in the SAE's dtype: (..., d_model) -> (..., n_latents). Raises UsageError on
        another width."""
        return nn.functional.linear(self._checked(x), self.W_enc, self.b_enc)

    def encode(self, x: Tensor) -> Tensor:
        """Codes by the inference form: (..., d_model) -> (..., n_latents), in the SAE's dtype."""
        pre = self.pre_activations(x)
        if self.activation == "topk":
            return activation_functions.topk(pre, int(self.k or 0))
        return activation_functions.threshold(pre, self.theta)

    def encode_subset(self, x: Tensor, indices: Tensor) -> Tensor:
        """Codes of the m latents `indices` (m,) alone, at 2 d m FLOP per frame: (..., d_model) -> (..., m).

        Raises UsageError for "topk": which latents are kept depends on all of them.
        """
        if self.activation == "topk":
            raise UsageError(
                "a subset of a 'topk' SAE's latents is not defined alone: use encode(x)[..., indices]"
            )
        rows = (tensor[indices] for tensor in (self.W_enc, self.b_enc, self.theta))
        return kernels.encode_subset(self._checked(x), *rows).to(self.W_enc.dtype)

    def sparse_codes(self, x: Tensor) -> kernels.Codes:
        """The same codes as `encode`'s, but only those that are not 0, values in float32: (..., d_model) ->
        Codes. Faster and smaller where few latents are active, as in every activation but "relu"."""
        z, k = self._checked(x), self.k if self.activation == "topk" else None
        theta = self.theta if k is None else None
        return kernels.encode(z, self.W_enc, self.b_enc, theta=theta, k=k)

    def decode(self, f: Tensor | kernels.Codes) -> Tensor:
        """(..., n_latents), or what `sparse_codes` gives -> (..., d_model)."""
        if isinstance(f, kernels.Codes):
            return kernels.decode(f, self.W_dec, self.b_dec)
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction, in x's dtype: (..., d_model) -> (..., d_model)."""
        # autograd and torch.compile know the dense products best
        dense = torch.is_grad_enabled() or torch.compiler.is_compiling() or self.activation == "relu"
        return self.decode(self.encode(x) if dense else self.sparse_codes(x)).to(x.dtype)

    def fold_input_scale(self, scale: float) -> SparseAutoencoder:
        """An SAE trained on x / scale, as an SAE on x with the same codes (a copy).

        W_enc x / scale = (W_enc / scale) x, and the reconstruction grows by scale. For inputs (x - mean) /
        scale fold the scale first, then the mean.
        """
        scale = float(scale)
        if not (scale > 0 and scale != float("inf")):
            raise UsageError(f"input scale is {scale}: expected a finite number > 0")
        folded = copy.deepcopy(self)
        with torch.no_grad():
            folded.W_enc.div_(scale)
            folded.W_dec.mul_(scale)
            folded.b_dec.mul_(scale)
        return folded

    def fold_mean(self, mean: Tensor) -> SparseAutoencoder:
        """An SAE trained on x - mean, as an SAE on x with the same codes (a copy). mean: (d_model,)."""
        if mean.shape != self.b_dec.shape or not bool(torch.isfinite(mean).all()):
            raise UsageError(f"mean has shape {tuple(mean.shape)}: expected ({self.d_model},) finite numbers")
        mean = mean.to(self.b_dec)
        folded = copy.deepcopy(self)
        with torch.no_grad():
            folded.b_enc.sub_(self.W_enc @ mean)
            folded.b_dec.add_(mean)
        return folded

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write atomically. `dtype` torch.float16 halves the file; thresholds and biases stay float32.

        Metadata written: kind, base_model, encoder_sha256, d_model, layer, n_latents, activation, k,
        calibrated_on, rates, licence (from `self.metadata` where not known here), plus whatever else
        `self.metadata` holds.
        """
        defaults: dict[str, Any] = {
            "base_model": None,
            "encoder_sha256": None,
            "calibrated_on": {},
            "rates": {},
            "licence": "MIT",
        }
        structure = {
            "kind": KIND,
            "d_model": self.d_model,
            "layer": self.layer,
            "n_latents": self.n_latents,
            "activation": self.activation,
            "k": self.k,
        }
        tensors = {name: getattr(self, name).float() for name in _TENSORS}
        tensors.update({name: tensors[name].to(dtype) for name in ("W_enc", "W_dec")})
        save_tensors(path, tensors, {**defaults, **self.metadata, **structure})

    @classmethod
    def load(cls, path: str | Path) -> SparseAutoencoder:
        """Read what `save` wrote, as float32 in eval mode. Raises FormatError (missing, corrupt, another
        kind)."""
        tensors, metadata = load_tensors(path, KIND)
        missing = [name for name in _TENSORS if name not in tensors]
        if missing:
            raise FormatError(f"{path} lacks {', '.join(missing)}: expected {', '.join(_TENSORS)}")
        n, d = tensors["W_enc"].shape if tensors["W_enc"].ndim == 2 else (0, 0)
        shapes = {"W_enc": (n, d), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "theta": (n,)}
        for name, shape in shapes.items():
            tensor = tensors[name]
            if n == 0 or tuple(tensor.shape) != shape:
                expected = shape if n else ("n_latents", "d_model")
                raise FormatError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {expected}")
            if not bool(torch.isfinite(tensor).all()):
                raise FormatError(f"{path}: {name} holds NaN or infinity; make or fetch the file again")
        try:
            sae = cls(
                d,
                n,
                activation=metadata["activation"],
                k=metadata["k"],
                layer=metadata["layer"],
                metadata=metadata,
            )
        except KeyError as error:
            raise FormatError(f"{path}: the metadata lacks {error}") from error
        except UsageError as error:
            raise FormatError(f"{path}: {error}") from error
        sae.load_state_dict({name: tensors[name].float() for name in _TENSORS})
        return sae.eval()

    def _checked(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.d_model,):
            raise UsageError(
                f"activations have shape {tuple(x.shape)}: the SAE expects (..., {self.d_model})"
            )
        return x.to(self.W_enc.dtype)

"""Runs inside another library's environment: it has torch and safetensors, but not whisper_steer."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

D, N, K = 24, 96, 5  # width, latents, latents kept per frame


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Weights that no fold may ignore: biases far from 0, decoder rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            scale = 0.3 if parameter.ndim == 2 else 0.4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


class Results:
    """Codes (frames, latents) and reconstructions (frames, width) that the library itself computes."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.x = load_file(self.folder / "x.safetensors")["x"]
        self.tensors: dict[str, torch.Tensor] = {}

    def made(self, name: str) -> Path:
        """A new folder for an SAE of that name."""
        folder = self.folder / "made" / name
        folder.mkdir(parents=True)
        return folder

    def exported(self) -> list[Path]:
        """What whisper-steer wrote for this library."""
        return sorted((self.folder / "exported").iterdir())

    def add(self, name: str, codes: torch.Tensor, reconstruction: torch.Tensor) -> None:
        self.tensors[f"{name}/codes"] = codes.detach().float().contiguous().clone()
        self.tensors[f"{name}/reconstruction"] = reconstruction.detach().float().contiguous().clone()

    def save(self) -> None:
        save_file(self.tensors, self.folder / "results.safetensors")

"""Frames without audio: sparse combinations of fixed directions, different for every (seed, round, shard)."""

import torch

from calibration.frames import Frames

D_MODEL = 12


class SyntheticFrames:
    layers = (1, 3)
    d_model = D_MODEL
    dtype = torch.float16

    def __init__(self, unit_frames, seed=0):
        self.unit_frames, self.seed = unit_frames, seed

    def identity(self):
        return {"source": "synthetic", "seed": self.seed}

    def load(self, round_index, shard):
        generator = torch.Generator().manual_seed((self.seed * 1000 + round_index) * 10 + shard)
        directions = torch.randn(2, 30, D_MODEL, generator=torch.Generator().manual_seed(9))
        active = torch.rand(2, self.unit_frames, 30, generator=generator)
        codes = active * (torch.rand(2, self.unit_frames, 30, generator=generator) < 0.1)
        data = torch.einsum("lfn,lnd->lfd", codes, directions) + 1.5
        domains = (torch.arange(self.unit_frames) % 2 * 2).to(torch.uint8)
        return Frames(data.half(), domains)

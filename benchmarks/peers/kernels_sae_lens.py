"""SAELens's inference path: TopKSAE, and JumpReLUSAE, as which its BatchTopK SAEs are saved. Codes are
dense."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from kernels_worker import Request, Work, made, main
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig


def build(request: Request) -> Mapping[str, Work]:
    size = made(request)
    common = {"d_in": request.d, "d_sae": request.n, "device": request.device, "dtype": request.dtype}
    jump = JumpReLUSAE(JumpReLUSAEConfig(**common))
    largest = TopKSAE(TopKSAEConfig(k=request.k, **common))
    with torch.no_grad():
        for sae in (jump, largest):
            sae.W_enc.copy_(size.W_enc.T)
            sae.W_dec.copy_(size.W_dec)
            sae.b_enc.copy_(size.b_enc)
            sae.b_dec.copy_(size.b_dec)
        jump.threshold.copy_(size.theta)
    dense = torch.zeros(request.frames, request.n, dtype=size.x.dtype, device=request.device)
    dense.scatter_(1, size.indices, size.values)
    return {
        "encode-threshold": lambda: jump.encode(size.x),
        "encode-topk": lambda: largest.encode(size.x),
        "decode": lambda: jump.decode(dense),
    }


if __name__ == "__main__":
    main(build)

"""sparsify's inference path: SparseCoder.encode (top-k) and SparseCoder.decode.

Its encoder is W (x - b_dec) + b; with b_dec zero, as here, that is the same product as everyone's. On a
CPU its decode is torch's embedding_bag, on CUDA its Triton kernel, if Triton is there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from kernels_worker import Request, Work, made, main
from sparsify.config import SparseCoderConfig
from sparsify.sparse_coder import SparseCoder


def build(request: Request) -> Mapping[str, Work]:
    size = made(request)
    config = SparseCoderConfig(num_latents=request.n, k=request.k)
    sae = SparseCoder(request.d, config, request.device, dtype=size.x.dtype)
    with torch.no_grad():
        sae.encoder.weight.copy_(size.W_enc)
        sae.encoder.bias.copy_(size.b_enc)
        sae.W_dec.copy_(size.W_dec)
        sae.b_dec.copy_(size.b_dec)
    return {
        "encode-topk": lambda: sae.encode(size.x),
        "decode": lambda: sae.decode(size.values, size.indices),
    }


if __name__ == "__main__":
    main(build)

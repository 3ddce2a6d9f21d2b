"""openai/sparse_autoencoder's inference path: Autoencoder with TopK. Its codes are dense, and so is its
decode on a CPU; on CUDA its decode is its Triton product of k codes a frame.

Run with PYTHONPATH at a checkout: it is on no package index.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from kernels_worker import Request, Work, made, main
from sparse_autoencoder.model import Autoencoder, TopK


def build(request: Request) -> Mapping[str, Work]:
    size = made(request)
    sae = Autoencoder(request.n, request.d, activation=TopK(request.k)).to(request.device, size.x.dtype)
    with torch.no_grad():
        sae.encoder.weight.copy_(size.W_enc)
        sae.latent_bias.copy_(size.b_enc)
        sae.decoder.weight.copy_(size.W_dec.T)
        sae.pre_bias.copy_(size.b_dec)
    works: dict[str, Work] = {"encode-topk": lambda: sae.encode(size.x)}
    if request.device == "cpu":
        dense = torch.zeros(request.frames, request.n, dtype=size.x.dtype)
        dense.scatter_(1, size.indices, size.values)
        works["decode"] = lambda: sae.decode(dense)
    else:
        from sparse_autoencoder.kernels import triton_sparse_dense_matmul

        weights = size.W_dec.contiguous()
        works["decode"] = lambda: triton_sparse_dense_matmul(size.indices, size.values, weights)
    return works


if __name__ == "__main__":
    main(build)

"""What the kernel benchmark times in its own process: dense torch, the same compiled, and whisper_steer's
kernels.

"dense" is what one writes without thinking of sparsity: the whole product, a threshold or top-k over it,
codes with all their zeros, a full product back; an edit by full encode and decode, with the error added
back; training by autograd.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.peers.kernels_worker import Request, Sizes, Work, made
from whisper_steer import kernels
from whisper_steer.activation_functions import threshold, topk
from whisper_steer.kernels import Change, Codes

DENSE, COMPILED, OURS = "dense torch", "torch.compile", "whisper_steer"
OPERATIONS = ("encode-threshold", "encode-topk", "decode", "edit", "train")
EDITED = 100  # latents of an edit
AMOUNT = 1.0


def encode_threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor) -> Tensor:
    return threshold(linear(x, W_enc, b_enc), theta)


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    return topk(linear(x, W_enc, b_enc), k)


def decode(f: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return f @ W_dec + b_dec


def edit(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, W_dec: Tensor, b_dec: Tensor, factor: Tensor
) -> Tensor:
    """Scale latents by `factor` (n,); the reconstruction's error stays in the stream."""
    f = threshold(linear(x, W_enc, b_enc), theta)
    reconstruction = f @ W_dec + b_dec
    return (f * factor) @ W_dec + b_dec + (x - reconstruction)


def edit_once(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, W_dec: Tensor, b_dec: Tensor, factor: Tensor
) -> Tensor:
    """As the papers: one full encode, one full decode, the error dropped."""
    return (threshold(linear(x, W_enc, b_enc), theta) * factor) @ W_dec + b_dec


def dense(request: Request, compiled: bool = False) -> dict[str, Work]:
    """By operation; with `compiled` through torch.compile."""
    size = made(request)
    if compiled:
        # another size or number of threads is another program; too many of one function are an error
        torch.compiler.reset()
    codes = Codes(size.values, size.indices.int(), request.n, (request.frames,)).dense()
    factor = torch.ones(request.n, dtype=size.x.dtype, device=size.x.device)
    factor[:EDITED] = 0

    def ready(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(function, fullgraph=True, dynamic=False) if compiled else function

    by_threshold, by_topk = ready(encode_threshold), ready(encode_topk)
    back, edited = ready(decode), ready(edit_once)
    encoder = (size.W_enc, size.b_enc)
    return {
        "encode-threshold": lambda: by_threshold(size.x, *encoder, size.theta),
        "encode-topk": lambda: by_topk(size.x, *encoder, request.k),
        "decode": lambda: back(codes, size.W_dec, size.b_dec),
        "edit": lambda: edited(size.x, *encoder, size.theta, size.W_dec, size.b_dec, factor),
    }


def few(size: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of the edited latents: W_enc, b_enc, theta, W_dec."""
    W_enc, b_enc = size.W_enc[:EDITED].contiguous(), size.b_enc[:EDITED].contiguous()
    return W_enc, b_enc, size.theta[:EDITED].contiguous(), size.W_dec[:EDITED].contiguous()


def ours(request: Request) -> dict[str, Work]:
    """By operation, with whatever implementation is chosen here."""
    size = made(request)
    codes = Codes(size.values.float(), size.indices.int(), request.n, (request.frames,))
    W_enc, b_enc, theta, W_dec = few(size)
    change = Change("scale", torch.zeros(min(EDITED, request.n), device=size.x.device), AMOUNT)
    # on CUDA the places per frame are given, as in a service: nothing then waits for the device
    width = 4 * request.k if size.x.is_cuda else None
    encoder = (size.W_enc, size.b_enc)
    return {
        "encode-threshold": lambda: kernels.encode(size.x, *encoder, theta=size.theta, width=width),
        "encode-topk": lambda: kernels.encode(size.x, *encoder, k=request.k),
        "decode": lambda: kernels.decode(codes, size.W_dec, size.b_dec),
        "edit": lambda: kernels.edit(size.x, W_enc, b_enc, theta, W_dec, change),
    }


def training(request: Request, sparse: bool) -> Work:
    """One optimiser step of the training engine on all frames: forward, backward, Adam."""
    from calibration.sae_training import SAETrainer

    x = made(request).x.float()
    trainer = SAETrainer(
        0, request.d, request.n, activation="topk", k=request.k, sparse=sparse, device=request.device,
        autocast=request.dtype == "bfloat16",
    )  # fmt: skip

    def step() -> object:
        with torch.enable_grad():
            return trainer.step(x, lr_factor=1e-3)

    return step


def compiler_problem(device: str) -> str | None:
    """Why torch.compile cannot run, in words."""
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler on a CPU, and none was found"
    return None


def works(
    request: Request, operations: Sequence[str], *, compiled: bool = True
) -> Iterator[tuple[str, str, Work | str]]:
    """(operation, contestant, what to time or why not), for those of OPERATIONS that are asked for."""
    problem = compiler_problem(request.device)
    plain, own = dense(request), ours(request)
    with_compiler = {} if problem or not compiled else dense(request, compiled=True)
    for operation in OPERATIONS:
        if operation not in operations:
            continue
        if operation == "train":
            yield operation, DENSE, training(request, False)
            yield operation, OURS, training(request, True)
            continue
        yield operation, DENSE, plain[operation]
        if compiled:
            yield operation, COMPILED, with_compiler.get(operation, problem or "")
        yield operation, OURS, own[operation]


def check(request: Request) -> None:
    """Raises RuntimeError where the contestants do not compute the same thing: a fast wrong answer is
    none.

    Dense torch in float32, from the same numbers: in bfloat16 its pre-activations are rounded before they are
    compared with the threshold, which drops 2 % of the codes.
    """
    size = made(request)
    x = size.x[:8]
    wide = {name: part.float() for name, part in vars(size).items()}
    encoder, decoder = (wide["W_enc"], wide["b_enc"], wide["theta"]), (wide["W_dec"], wide["b_dec"])
    ours_ = kernels.encode(x, size.W_enc, size.b_enc, theta=size.theta).dense()
    theirs = encode_threshold(x.float(), *encoder)
    factor = torch.ones(request.n, device=size.x.device)
    factor[:EDITED] = 0
    W_enc, b_enc, theta, W_dec = few(size)
    change = Change("scale", torch.zeros(len(theta), device=x.device), AMOUNT)
    edited = kernels.edit(x, W_enc, b_enc, theta, W_dec, change)
    full = edit(x.float(), *encoder, *decoder, factor)
    most = 1e-4 if size.x.dtype == torch.float32 else 5e-2
    for name, one, other in (("encode", ours_, theirs), ("edit", edited, full)):
        off = float((one.float() - other).norm() / other.norm().clamp_min(1e-9))
        if not off < most:
            raise RuntimeError(f"{name} of whisper_steer differs from dense torch by {off:.1e}")

"""The Triton kernels compiled for an H100 (sm_90) with the sizes that the launcher gives them.

Triton brings NVIDIA's assembler, so this needs no GPU: what is proven is that they compile, fit the chip's
shared memory, and multiply float32 in float32.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from kernel_cases import random_case

from whisper_steer.kernels import Change, Codes, triton_launch

SHARED = 227 * 1024  # bytes of shared memory that one block may have on sm_90
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int16: "*i16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="triton is not installed (pip install triton), or interprets",
)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """A function that calls a launcher and returns what it would have launched, by kernel: compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # unset, Triton warns
    found = {}

    def build(kernel, grid, *arguments, num_warps=4, **constants):
        signature, constants, attributes = {}, dict(constants), {}
        for place, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            if isinstance(argument, torch.Tensor):
                signature[name] = TYPES[argument.dtype]
            elif isinstance(argument, float):
                signature[name] = "fp32"
            elif argument == 1:  # as Triton does
                constants[name] = argument
            else:
                signature[name] = "i32"
            if isinstance(argument, torch.Tensor) or argument % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(constants, "constexpr")
        ordered = {name: signature[name] for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        attributes = {place: what for place, what in attributes.items() if place not in places}
        source = ASTSource(fn=kernel, signature=ordered, constexprs=places, attrs=attributes)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
        assert built.asm["cubin"] and built.metadata.shared <= SHARED
        assert all(0 < size < 2**31 for size in grid) and grid[-1] < 2**16
        found[kernel.fn.__name__] = built.asm["ptx"]

    monkeypatch.setattr(triton_launch, "_run", build)

    def call(launcher, *arguments, **options):
        found.clear()
        launcher(*arguments, **options)
        return dict(found)

    return call


def multiplies(ptx):
    """The instructions that matrices are multiplied with."""
    return {name for name in ("wgmma", "mma.sync", "fma.rn") if name in ptx}


def edited(case, dtype, m, mode="scale"):
    rows = [part[:m].to(dtype) for part in (case.W_enc, case.b_enc, case.theta, case.W_dec)]
    change = Change(mode, torch.zeros(m), 0.5)
    return case.x.to(dtype), *rows, change, torch.ones(len(case.x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_edit_compiles(compiled, dtype):
    case = random_case(frames=3, d=384, n=100)
    ptx = compiled(triton_launch.edit, *edited(case, dtype, 100))["edit"]
    assert "tf32" not in ptx
    assert multiplies(ptx) >= ({"fma.rn"} if dtype == torch.float32 else {"wgmma"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_encoding_by_thresholds_compiles(compiled, dtype):
    case = random_case(frames=3, d=384, n=500).to(dtype)
    found = compiled(triton_launch.encode_threshold, case.x, case.W_enc, case.b_enc, case.theta, width=200)
    assert set(found) == {"keep_above"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encoding_while_multiplying_compiles(compiled, monkeypatch, dtype):
    """With a torch that rounds the sums of halves."""
    monkeypatch.setattr(triton_launch, "_gives_float32_sums", lambda: False)
    case = random_case(frames=3, d=384, n=500).to(dtype)
    found = compiled(triton_launch.encode_threshold, case.x, case.W_enc, case.b_enc, case.theta, width=200)
    assert set(found) == {"encode_threshold", "gather_segments"}
    assert multiplies(found["encode_threshold"]) == {"wgmma"}


@pytest.mark.parametrize("index", [torch.int16, torch.int32])
def test_products_of_codes_compile(compiled, index):
    case = random_case(frames=3, d=384, n=500).to(torch.bfloat16)
    padded = Codes(torch.rand(3, 50), torch.zeros(3, 50, dtype=index), 500, (3,))
    for codes in (padded, padded.csr()):
        assert compiled(triton_launch.decode, codes, case.W_dec).keys() == {"weighted_rows"}
        assert compiled(triton_launch.products, codes, case.x, case.W_dec).keys() == {"products"}
        scattered = compiled(triton_launch.weight_gradient, codes, case.x, deterministic=False)
        assert "red" in scattered["scatter_rows"] or "atom" in scattered["scatter_rows"]
        assert compiled(triton_launch.weight_gradient, codes, case.x).keys() == {"weighted_rows"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["add", "scale", "clamp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m", [1, 20, 256])
def test_every_edit_compiles(compiled, dtype, m, mode):
    case = random_case(frames=3, d=1280, n=m)
    *arguments, gate = edited(case, dtype, m, mode)
    for g in (None, gate):
        assert "tf32" not in compiled(triton_launch.edit, *arguments, g)["edit"]

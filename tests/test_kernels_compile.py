"""Kernels inside torch.compile: one graph, no breaks, the same numbers."""

from __future__ import annotations

import shutil

import pytest
import torch
from kernel_cases import random_case

from whisper_steer import kernels
from whisper_steer.edits import LatentEdit, Shift, gated
from whisper_steer.kernels import Change
from whisper_steer.sae import SparseAutoencoder


def parts(frames=20):
    case = random_case(frames=frames)
    return case.x, (case.W_enc, case.b_enc, case.theta, case.W_dec), Change("add", torch.ones(70), 0.7)


def gates(frames=20):
    g = torch.linspace(-0.5, 1, frames).clamp_min(0)
    assert 0 < int((g == 0).sum()) < frames
    return g


@pytest.mark.parametrize("gate", [None, gates()])
def test_the_edit_is_one_operator_of_one_graph(gate):
    x, rows, change = parts()
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(
        lambda x: kernels.edit(x, *rows, change, gate=gate) * 2, fullgraph=True, backend=backend
    )
    expected = kernels.edit(x, *rows, change, gate=gate) * 2
    assert torch.equal(compiled(x), expected)
    assert sum("whisper_steer.edit" in name for name in seen) == 1


def test_the_operator_keeps_torchs_rules():
    x, (W_enc, b_enc, theta, W_dec), change = parts()
    arguments = (x, W_enc, b_enc, theta, W_dec, change.values, gates(), "scale", 0.5, True)
    torch.library.opcheck(torch.ops.whisper_steer.edit, arguments)


def test_edits_and_saes_compile_as_a_whole():
    torch.manual_seed(0)
    sae = SparseAutoencoder(48, 70, activation="batchtopk", k=5).eval().requires_grad_(False)
    x = random_case().x.reshape(2, 9, 48)
    g = gates(18).reshape(2, 9)
    edits = [
        Shift(0, torch.ones(48), 1.0),
        LatentEdit.from_sae(sae, [1, 5, 30], torch.tensor([0.0, 0.5, 2.0]), mode="scale"),
        LatentEdit.from_sae(sae, None, torch.ones(70), reconstruct=True),
    ]
    for edit in edits:
        compiled = torch.compile(lambda x, edit=edit: gated(edit, x, 0.8, g), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), gated(edit, x, 0.8, g))
    compiled = torch.compile(sae, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), sae(x))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_compiles_it_too():
    x, rows, change = parts()
    gate = gates()
    compiled = torch.compile(lambda x: kernels.edit(x, *rows, change, gate=gate) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x), kernels.edit(x, *rows, change, gate=gate) + 1)

"""SAEs that the other libraries wrote and applied themselves, and ours applied by them: 1e-5 everywhere.

Each library runs in its own environment, $WHISPER_STEER_PEERS/<name>/bin/python (default: out/peers).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.peers import environments
from whisper_steer.interop import load_foreign, save_saelens, save_sparsify
from whisper_steer.sae import SparseAutoencoder

SCRIPTS = Path(__file__).parent / "peer_scripts"
D, N, K, FRAMES = 24, 96, 5, 200
NEAR = 1e-5


def inputs() -> Tensor:
    return torch.randn(FRAMES, D, generator=torch.Generator().manual_seed(1)) + 0.2


def random_sae(
    activation: str, k: int | None = None, theta: float = 0.0, layer: int = 2
) -> SparseAutoencoder:
    sae = SparseAutoencoder(D, N, activation=activation, k=k, layer=layer, metadata={"base_model": "tiny"})
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        sae.theta.copy_(theta * (0.5 + torch.rand(N, generator=generator)))
    return sae.eval()


EXPORTED = {
    "relu": random_sae("relu"),
    "topk": random_sae("topk", k=K),
    "jumprelu": random_sae("jumprelu", theta=0.8),
    "batchtopk": random_sae("batchtopk", k=K, theta=1.2),
}


def run(name: str, folder: Path) -> dict[str, Tensor]:
    """What the library computes; the files that it made are below folder/made."""
    problem = environments.missing(environments.default_folder(), name)
    if problem:
        pytest.skip(problem)
    python = environments.interpreter(environments.default_folder(), name)
    save_file({"x": inputs()}, folder / "x.safetensors")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    environment |= environments.variables("cpu")
    command = [str(python.absolute()), str(SCRIPTS / f"{name}.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "results.safetensors")


def decided(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """Frames in which no latent is so near its threshold that rounding decides whether it is active."""
    pre = sae.pre_activations(x)
    if sae.activation == "topk":
        largest = pre.relu().topk(int(sae.k or 0) + 1).values
        return (largest[:, -2] - largest[:, -1] > NEAR) | (largest[:, -2] == 0)
    return ((sae.theta <= 0) | ((pre - sae.theta).abs() > NEAR)).all(dim=1)


@torch.no_grad()
def assert_same(sae: SparseAutoencoder, results: dict[str, Tensor], name: str) -> None:
    x = inputs()
    clear = decided(sae, x)
    assert clear.float().mean() > 0.9
    codes = sae.encode(x)
    assert codes.count_nonzero() > FRAMES  # not trivially the same
    expected, reconstruction = results[f"{name}/codes"], results[f"{name}/reconstruction"]
    torch.testing.assert_close(codes[clear], expected[clear], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x)[clear], reconstruction[clear], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def dictionary_learning(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("dictionary_learning")
    return folder / "made", run("dictionary_learning", folder)


@pytest.fixture(scope="module")
def sae_lens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("sae_lens")
    for name, sae in EXPORTED.items():
        save_saelens(sae, folder / "exported" / f"ours_{name}")
    return folder / "made", run("sae_lens", folder)


@pytest.fixture(scope="module")
def sparsify(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("sparsify")
    save_sparsify(EXPORTED["topk"], folder / "exported" / "ours_topk")
    return folder / "made", run("sparsify", folder)


@pytest.mark.parametrize(
    ("name", "layer", "activation", "k"),
    [
        ("AutoEncoderTopK", 0, "topk", K),
        ("BatchTopKSAE", 1, "batchtopk", K),
        ("MatryoshkaBatchTopKSAE", 2, "batchtopk", K),
        ("AutoEncoder", 3, "relu", None),
        ("AutoEncoderNew", 4, "relu", None),
        ("JumpReluAutoEncoder", 5, "jumprelu", None),
        ("GatedAutoEncoder", 6, "jumprelu", None),
    ],
)
def test_reads_dictionary_learning(
    dictionary_learning: tuple[Path, dict[str, Tensor]], name: str, layer: int, activation: str, k: int | None
) -> None:
    made, results = dictionary_learning
    sae = load_foreign(made / name)
    assert (sae.layer, sae.activation, sae.k) == (layer, activation, k)
    assert sae.metadata["source"]["class"] == name
    assert sae.metadata["source"]["base_model"] == "openai/whisper-small"
    assert_same(sae, results, name)


@pytest.mark.parametrize(
    ("name", "layer", "activation", "k"),
    [
        ("standard", 0, "relu", None),
        ("standard_plain_input", 1, "relu", None),
        ("topk", 2, "topk", K),
        ("topk_rescaled", 3, "topk", K),
        ("jumprelu", 4, "jumprelu", None),
        ("gated", 5, "jumprelu", None),
        ("gated_plain_input", 6, "jumprelu", None),
        ("batchtopk_inference", 7, "batchtopk", K),
        ("batchtopk_checkpoint", 7, "batchtopk", K),
        ("scaled_checkpoint", 8, "batchtopk", K),
        ("whitened_checkpoint", 8, "batchtopk", K),
    ],
)
def test_reads_saelens(
    sae_lens: tuple[Path, dict[str, Tensor]], name: str, layer: int, activation: str, k: int | None
) -> None:
    made, results = sae_lens
    sae = load_foreign(made / name)
    assert (sae.layer, sae.activation, sae.k) == (layer, activation, k)
    assert sae.metadata["source"]["base_model"] == "whisper-small"
    assert_same(sae, results, name)


@pytest.mark.parametrize("name", EXPORTED)
def test_saelens_reads_ours(sae_lens: tuple[Path, dict[str, Tensor]], name: str) -> None:
    assert_same(EXPORTED[name], sae_lens[1], f"ours_{name}")


def test_reads_sparsify(sparsify: tuple[Path, dict[str, Tensor]]) -> None:
    made, results = sparsify
    sae = load_foreign(made)
    assert (sae.layer, sae.activation, sae.k) == (3, "topk", K)
    assert_same(sae, results, "layers.3")


def test_sparsify_reads_ours(sparsify: tuple[Path, dict[str, Tensor]]) -> None:
    assert_same(EXPORTED["topk"], sparsify[1], "ours_topk")

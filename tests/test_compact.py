"""The bundled models' file: only the trained embedding rows, expanded to a plain whisper.Whisper."""

from __future__ import annotations

import pytest
import torch
from whisper.model import ModelDimensions, Whisper

from whisper_steer.compact import pack_model, unpack_model
from whisper_steer.errors import FormatError, UsageError
from whisper_steer.fileformat import load_tensors, save_tensors

DIMS = ModelDimensions(80, 1500, 64, 1, 4, 51864, 448, 64, 1, 2)


@pytest.fixture(scope="module")
def model() -> Whisper:
    torch.manual_seed(3)
    whisper = Whisper(DIMS)
    embedding = torch.randn(64).expand(51864, -1).clone()
    embedding[[5, 17, 50257]] = torch.randn(3, 64)
    whisper.decoder.token_embedding.weight = torch.nn.Parameter(embedding)
    heads = torch.zeros(2, 1, dtype=torch.bool)
    heads[1, 0] = True
    whisper.register_buffer("alignment_heads", heads.to_sparse(), persistent=False)
    whisper.decoder.positional_embedding.data.normal_(std=0.02)  # torch.empty until a checkpoint is loaded
    for parameter in whisper.parameters():  # what float16 can hold
        parameter.data = parameter.data.half().float()
    return whisper.eval()


def test_round_trip_gives_the_same_weights_and_logits(model, tmp_path):
    path = tmp_path / "whisper.safetensors"
    pack_model(model, path, [5, 17, 50257], {"base_model": "toy"})
    assert path.stat().st_size < 2_000_000  # 51,864 rows alone would be 6.6 MB
    loaded, metadata = unpack_model(path)
    assert type(loaded) is Whisper and metadata["base_model"] == "toy"
    assert metadata["dims"]["n_audio_layer"] == 4
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.alignment_heads.to_dense().tolist() == [[False], [True]]
    mel, tokens = torch.randn(1, 80, 3000), torch.tensor([[50257, 5, 17]])
    with torch.no_grad():
        assert torch.equal(loaded(mel, tokens), model(mel, tokens))


def test_rows_that_differ_are_refused(model, tmp_path):
    with pytest.raises(UsageError, match="not all equal"):
        pack_model(model, tmp_path / "x.safetensors", [5, 17])
    assert not (tmp_path / "x.safetensors").exists()


def test_an_incomplete_file_is_refused_in_one_line(model, tmp_path):
    path = tmp_path / "whisper.safetensors"
    pack_model(model, path, [5, 17, 50257])
    tensors, metadata = load_tensors(path)
    del tensors["encoder.conv1.weight"]
    save_tensors(path, tensors, metadata)
    with pytest.raises(FormatError, match="encoder.conv1.weight") as caught:
        unpack_model(path)
    assert "\n" not in str(caught.value)

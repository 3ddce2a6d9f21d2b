"""Conversions: the same encoder and the same tokens in every runtime."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import whisper
from conftest import TINY_DIMS, make_tiny_whisper
from tiny import mel, shift
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

from whisper_steer import ct2_file
from whisper_steer.attach import steer
from whisper_steer.cli import main
from whisper_steer.convert import DTYPES, FORMATS, convert, default_path
from whisper_steer.convert_hf import load_transformers, openai_name
from whisper_steer.errors import FormatError, UsageError
from whisper_steer.ggml_file import read_layout
from whisper_steer.steering import Steering
from whisper_steer.transformers_folder import transformers_name, write_folder
from whisper_steer.zoo import load_model


@pytest.fixture(scope="module")
def model() -> Whisper:
    return make_tiny_whisper()


@pytest.fixture(scope="module")
def folder(model: Whisper, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(model, "transformers", tmp_path_factory.mktemp("hf") / "tiny")


def test_names_go_both_ways(model: Whisper) -> None:
    for name in model.state_dict():
        assert openai_name(transformers_name(name)) == name
    with pytest.raises(UsageError, match="decoder.blocks.0.mlp.9.bias is not a tensor"):
        transformers_name("decoder.blocks.0.mlp.9.bias")


def test_transformers_and_back_is_exact(model: Whisper, folder: Path) -> None:
    back = load_transformers(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert torch.equal(back.alignment_heads.to_dense(), model.alignment_heads.to_dense())


def test_tokenizer_is_openai_whispers(folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    own = get_tokenizer(False)
    for text in (
        " The quick brown fox jumps over the lazy dog.",
        "  It's 3.14, isn't it? naïve café — ¡olé!",
        " 你好，世界 🎉 Straße\n\tx",
    ):
        ids = theirs.encode(text).ids
        assert ids == own.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.token_to_id("<|endoftext|>") == own.eot == 50256
    assert theirs.token_to_id("<|notimestamps|>") == own.no_timestamps == 50362
    assert theirs.token_to_id("<|30.00|>") == 51863
    assert theirs.get_vocab_size() == 51864


def test_configs(folder: Path) -> None:
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["decoder_start_token_id"] == 50257
    assert generation["begin_suppress_tokens"] == [220, 50256]
    assert generation["is_multilingual"] is False
    # the list of openai/whisper-tiny.en begins and ends so
    assert generation["suppress_tokens"][:3] == [1, 2, 7]
    assert generation["suppress_tokens"][-6:] == [50257, 50357, 50358, 50359, 50360, 50361]
    assert json.loads((folder / "preprocessor_config.json").read_text())["feature_size"] == 80


def test_multilingual_ids(tmp_path: Path) -> None:
    model = Whisper(ModelDimensions(80, 1500, 64, 1, 1, 51865, 448, 64, 1, 1)).eval()
    torch.nn.init.zeros_(model.decoder.positional_embedding)
    write_folder(model, tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["lang_to_id"]["<|en|>"] == 50259
    assert generation["lang_to_id"]["<|su|>"] == 50357
    assert generation["task_to_id"] == {"transcribe": 50359, "translate": 50358}
    assert generation["no_timestamps_token_id"] == 50363


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see conftest
@pytest.mark.parametrize("vocabulary", [51864, 51865, 51866])
def test_the_folder_and_the_model_in_memory_have_the_same_settings(tmp_path: Path, vocabulary: int) -> None:
    pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    from whisper_steer.transformers_model import from_openai

    model = make_tiny_whisper(dims=replace(TINY_DIMS, n_vocab=vocabulary))
    write_folder(model, tmp_path)
    made = from_openai(model)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    own = made.generation_config.to_dict()
    assert {key: own[key] for key in generation} == generation
    languages = {51864: 0, 51865: 99, 51866: 100}[vocabulary]
    assert len(generation.get("lang_to_id", {})) == languages
    config = json.loads((tmp_path / "config.json").read_text())
    named = {key: value for key, value in config.items() if key not in ("architectures", "torch_dtype")}
    assert {key: getattr(made.config, key) for key in named} == named


def test_transformers_computes_the_same(model: Whisper, folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    features = mel(1, (1, 80, 3000))
    with torch.no_grad():
        difference = theirs.model.encoder(features).last_hidden_state - model.encoder(features)
    assert difference.abs().max() < 2e-5
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.convert_tokens_to_ids("<|notimestamps|>") == 50362
    assert processor.tokenizer.all_special_ids[-1] == 50362


def test_ct2_computes_the_same(model: Whisper, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    import ctranslate2

    path = convert(model, "ct2", tmp_path / "ct2")
    assert {file.name for file in path.iterdir()} == {
        "config.json",
        "model.bin",
        "preprocessor_config.json",
        "tokenizer.json",
        "vocabulary.json",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["ct2"]
    loaded = ctranslate2.models.Whisper(str(path))
    features = mel(1, (1, 80, 3000))
    encoded = np.array(loaded.encode(ctranslate2.StorageView.from_array(features.numpy())))
    assert np.abs(encoded - model.encoder(features).numpy()).max() < 2e-5
    assert ct2_file.read_layout(path).revision == 3
    stored = ct2_file.read_variables(path, "encoder/layer_2/ffn/linear_1/")
    block = model.encoder.blocks[2].mlp[2]
    assert (stored["encoder/layer_2/ffn/linear_1/weight"] == block.weight.numpy()).all()
    assert (stored[ct2_file.ffn_bias_name(2)] == block.bias.numpy()).all()


def test_openai_checkpoint(model: Whisper, tmp_path: Path) -> None:
    path = convert(model, "openai", tmp_path / "tiny.pt")
    back = whisper.load_model(str(path), device="cpu")
    assert torch.equal(back.encoder.conv1.weight, model.encoder.conv1.weight)
    half = convert(model, "openai", tmp_path / "half.pt", dtype="float16")
    weight = load_model(half, device="cpu").encoder.conv1.weight
    assert torch.equal(weight, model.encoder.conv1.weight.half().float())


def test_refusals(model: Whisper, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="format 'onnx': expected one of openai, transformers, ct2, ggml"):
        convert(model, "onnx")
    with pytest.raises(UsageError, match="dtype 'int8' for ggml: expected one of f16"):
        convert(model, "ggml", dtype="int8")
    (tmp_path / "there").touch()
    with pytest.raises(UsageError, match="there exists already"):
        convert(model, "ggml", tmp_path / "there")
    steered = make_tiny_whisper()
    with steer(steered, steering=Steering((shift(),))), pytest.raises(UsageError, match="model is steered"):
        convert(steered, "ggml", tmp_path / "new.bin")
    assert [file.name for file in tmp_path.iterdir()] == ["there"]
    assert set(DTYPES) == set(FORMATS)
    assert default_path("openai/whisper-tiny", "ggml") == Path("ggml-whisper-tiny.bin")
    assert default_path("a/b.pt", "ct2") == Path("b-ct2")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mini.bin"
    assert main(["convert", "--format", "ggml", "--dtype", "q8_0", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert read_layout(out).hparams["n_audio_state"] == 192
    assert main(["convert", "--format", "ggml", "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", "--format", "onnx"]) == 2


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("format", "size"),
    # the weights are the largest file of a transformers folder, its tokenizer (2 MB) is written last
    [("openai", 10**6), ("transformers", 10**6), ("ct2", 10**6), ("ggml", 10**6), ("tokenizer", 10**5)],
)
def test_a_full_disk(
    model: Whisper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, size: int
) -> None:
    if format == "ct2":
        pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    if format == "tokenizer":
        monkeypatch.setattr("safetensors.torch.save_file", lambda weights, path, metadata: path.touch())
        format = "transformers"
    with files_of_at_most(size), pytest.raises(FormatError, match="^cannot write "):
        convert(model, format, tmp_path / "not" / "there" / "yet")
    assert not list(tmp_path.iterdir())


def test_all_files_have_the_same_mode(folder: Path) -> None:
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"] and set(modes.values()) == {
        modes["config.json"]
    }

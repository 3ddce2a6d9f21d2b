"""CTranslate2 folders and whisper.cpp files as sources: the same weights back, names, heads, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import whisper
from conftest import TINY_DIMS, make_tiny_whisper
from whisper.model import Whisper

from whisper_steer import ct2_file, load_model
from whisper_steer.convert import convert
from whisper_steer.convert_from import is_ct2_folder, load_ct2, load_ggml, runtime_name
from whisper_steer.errors import FormatError, ModelError
from whisper_steer.ggml_file import write_ggml

DIMS = replace(TINY_DIMS, n_audio_head=2, n_text_head=4, n_text_ctx=32)
HEADS = [[1, 3]]


@pytest.fixture(scope="module")
def model() -> Whisper:
    """Other numbers of heads than conftest's, and heads for word times that are not the default."""
    made = make_tiny_whisper(dims=DIMS)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 3] = True
    made.register_buffer("alignment_heads", mask.to_sparse(), persistent=False)
    return made


@pytest.fixture(scope="module")
def folders(model: Whisper, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    root = tmp_path_factory.mktemp("ct2")
    return {dtype: convert(model, "ct2", root / f"me-{dtype}", dtype=dtype) for dtype in ("float32", "int8")}


def same(found: Whisper, expected: Whisper) -> None:
    assert found.dims == expected.dims and not found.training
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_ctranslate2_and_back_is_exact(model: Whisper, folders: dict[str, Path]) -> None:
    back = load_ct2(folders["float32"])
    same(back, model)
    assert back.alignment_heads.to_dense().nonzero().tolist() == HEADS


def test_ctranslate2_int8_is_what_it_computes_with(model: Whisper, folders: dict[str, Path]) -> None:
    """Matrices and convolutions within half a step of a row's 127 steps; all else as it was."""
    back, wanted = load_ct2(folders["int8"]).state_dict(), model.state_dict()
    for name, value in wanted.items():
        quantised = value.ndim > 1 and not name.endswith("positional_embedding")
        flat = value.flatten(1) if quantised else value
        step = flat.abs().amax(1, keepdim=True) / 127 if quantised else torch.zeros(())
        assert bool(((back[name].reshape(flat.shape) - flat).abs() <= step * 0.501).all()), name
        assert torch.equal(back[name], value) == (not quantised), name


def test_all_ways_from_ctranslate2(model: Whisper, folders: dict[str, Path], tmp_path: Path) -> None:
    """To transformers, openai and ggml; the name goes along."""
    hf = convert(folders["float32"], "transformers", tmp_path / "hf")
    same(load_model(hf, device="cpu"), model)
    assert json.loads((hf / "generation_config.json").read_text())["alignment_heads"] == HEADS
    checkpoint = convert(folders["float32"], "openai", tmp_path / "me.pt")
    same(load_model(checkpoint, device="cpu"), model)
    ggml = convert(folders["float32"], "ggml", tmp_path / "ggml-me.bin")
    assert load_model(ggml, device="cpu").name == load_model(folders["int8"], device="cpu").name == "me"
    again = convert(ggml, "ct2", tmp_path / "again", dtype="float16")
    halves = ct2_file.read_variables(again, "decoder/layer_1/attention/linear_1/weight")
    keys = model.decoder.blocks[1].cross_attn.key.weight
    assert np.array_equal(next(iter(halves.values()))[:64], keys.half().float().numpy())


def test_default_names(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert(folders["float32"], "openai") == Path("me.pt")
    assert convert(folders["int8"], "ggml", dtype="q8_0") == Path("ggml-me.bin")
    assert convert("ggml-me.bin", "transformers") == Path("me-transformers")


@pytest.mark.parametrize(("kind", "steps"), [("f32", 0), ("f16", 0), ("q8_0", 127), ("q5_0", 15)])
def test_whisper_cpp_and_back(model: Whisper, tmp_path: Path, kind: str, steps: int) -> None:
    path = tmp_path / "ggml-me.bin"
    write_ggml(model, path, kind)
    back = load_ggml(path)
    if kind == "f32":
        same(back, model)
    for name, value in model.state_dict().items():
        if value.ndim == 1 or name.endswith("positional_embedding") or kind == "f32":
            expected = torch.zeros(())
        elif value.ndim == 3 or kind == "f16":
            expected = (value.half().float() - value).abs()
        else:
            expected = value.abs().max() / steps
        assert bool(((back.state_dict()[name] - value).abs() <= expected).all()), name
    # not in the file: openai-whisper's own choice
    assert back.alignment_heads.to_dense().nonzero().tolist() == [[1, 0], [1, 1], [1, 2], [1, 3]]


def test_heads_of_openais_models_by_name(
    model: Whisper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64
    import gzip

    mask = np.zeros((2, 4), dtype=bool)
    mask[0, 2] = True
    dump = base64.b85encode(gzip.compress(mask.tobytes()))
    monkeypatch.setitem(whisper._ALIGNMENT_HEADS, "tiny.en", dump)
    for name, heads in (("ggml-tiny.en-q8_0.bin", [[0, 2]]), ("ggml-base.en.bin", None), ("x.bin", None)):
        write_ggml(model, tmp_path / name, "q8_0")
        found = load_ggml(tmp_path / name).alignment_heads.to_dense().nonzero().tolist()
        assert found == (heads or [[1, 0], [1, 1], [1, 2], [1, 3]])


def test_names(folders: dict[str, Path], tmp_path: Path) -> None:
    assert runtime_name(folders["int8"]) == "me" and is_ct2_folder(folders["int8"])
    assert runtime_name(tmp_path) is None and runtime_name(tmp_path / "none.bin") is None
    for name, expected in [
        ("ggml-small.en-q5_1.bin", "small.en"),
        ("ggml-large-v3-turbo-q8_0.bin", "large-v3-turbo"),
        ("mine.bin", "mine"),
        ("ggml-f16.bin", "f16"),
    ]:
        (tmp_path / name).write_bytes(b"lmgg")
        assert runtime_name(tmp_path / name) == expected
    (tmp_path / "model.bin").touch()
    assert runtime_name(tmp_path) is not None
    (tmp_path / "model.safetensors").touch()  # transformers' weights are the exact ones
    assert runtime_name(tmp_path) is None


def test_the_words_are_those_of_the_source(folders: dict[str, Path], model: Whisper) -> None:
    """The loaded model decodes like the one that was converted."""
    options = whisper.DecodingOptions(fp16=False, language="en", sample_len=5)
    features = torch.randn(80, 3000, generator=torch.Generator().manual_seed(1))
    expected = whisper.decode(model, features, options)
    found = whisper.decode(load_ct2(folders["float32"]), features, options)
    assert (found.tokens, found.avg_logprob) == (expected.tokens, expected.avg_logprob)


def test_damage(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken-ct2"
    broken.mkdir()
    data = (folders["float32"] / "model.bin").read_bytes()
    (broken / "model.bin").write_bytes(data.replace(b"decoder/layer_norm/gamma", b"decoder/layer_norm/gamme"))
    with pytest.raises(FormatError, match="does not hold Whisper's decoder.*layer_norm/gamma"):
        load_model(broken, device="cpu")
    (broken / "model.bin").write_bytes(data)
    (broken / "config.json").write_text('{"alignment_heads": [[7, 0]]}')
    with pytest.raises(FormatError, match=r"config.json: alignment_heads do not fit"):
        load_model(broken, device="cpu")
    (broken / "config.json").unlink()
    assert load_model(broken, device="cpu").name == "broken"
    (tmp_path / "ggml-cut.bin").write_bytes(b"lmgg" + b"\0" * 20)
    with pytest.raises(FormatError, match="ggml-cut.bin is truncated or damaged"):
        load_model(tmp_path / "ggml-cut.bin", device="cpu")
    with pytest.raises(ModelError, match=r"expected config.json \(transformers\), model.bin \(CTranslate2\)"):
        (tmp_path / "empty").mkdir()
        load_model(tmp_path / "empty", device="cpu")

import copy
import hashlib
import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch

from whisper_steer import fileformat
from whisper_steer.errors import FormatError, UsageError
from whisper_steer.fileformat import encoder_sha256, load_metadata, load_tensors, model_name, save_tensors


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def write_foreign(path, header):
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(2)}, metadata=header))


def test_round_trip_keeps_values_dtypes_and_metadata(tmp_path):
    path = tmp_path / "deep" / "folder" / "x.safetensors"
    tensors = {
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "whole": torch.tensor([[1, 2], [3, 4]]),
        "strided": torch.arange(6.0).reshape(2, 3).T,
    }
    save_tensors(path, tensors, {"kind": "sae", "name": "ü", "rates": {"wer": 0.1}, "layers": (0, 3)})
    loaded, metadata = load_tensors(path, "sae")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert metadata == {
        "kind": "sae",
        "name": "ü",
        "rates": {"wer": 0.1},
        "layers": [0, 3],
        "format_version": 1,
        "package_version": fileformat.package_version(),
    }
    assert load_metadata(path, "sae") == load_metadata(path) == metadata


def test_tensors_that_share_memory_are_saved(tmp_path):
    shared = torch.arange(4.0)
    save_tensors(tmp_path / "x", {"a": shared, "b": shared, "c": shared[1:]}, {"kind": "t"})
    assert torch.equal(load_tensors(tmp_path / "x")[0]["c"], torch.tensor([1.0, 2.0, 3.0]))


def test_metadata_is_one_strict_json_value(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(
        path, {"a": torch.zeros(1)}, {"kind": "t", "rates": {"wer": float("nan"), "hr": [float("inf"), 1.0]}}
    )
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert list(header) == ["whisper_steer"]
    value = json.loads(
        header["whisper_steer"], parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )
    assert value["rates"] == {"wer": None, "hr": [None, 1.0]}


@pytest.mark.parametrize("metadata", [{}, {"kind": 3}, {"kind": "t", "bad": object()}])
def test_bad_metadata_is_a_usage_error_and_writes_nothing(tmp_path, metadata):
    with pytest.raises(UsageError) as error:
        save_tensors(tmp_path / "x", {"a": torch.zeros(1)}, metadata)
    assert "x" in one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_leftovers(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(1)}, {"kind": "t"})
    before = path.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FormatError) as error:
        save_tensors(path, {"a": torch.ones(1)}, {"kind": "t"})
    assert "No space left on device" in one_line(error)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_writing_below_a_file_is_a_format_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError) as error:
        save_tensors(tmp_path / "file" / "x", {"a": torch.zeros(1)}, {"kind": "t"})
    assert "cannot write" in one_line(error)


def test_missing_and_directory(tmp_path):
    with pytest.raises(FormatError) as error:
        load_tensors(tmp_path / "none.safetensors", "sae")
    assert "does not exist" in one_line(error) and "sae" in one_line(error)
    with pytest.raises(FormatError) as error:
        load_tensors(tmp_path)
    assert "is a directory" in one_line(error)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header"])
def test_corrupt_files(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(1000)}, {"kind": "sae"})
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello" * 9, "cut": data[:-100], "header": data[:4]}[damage])
    with pytest.raises(FormatError) as error:
        load_tensors(path, "sae")
    assert "not a readable safetensors file" in one_line(error) and str(path) in one_line(error)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "of another program"),
        ({"format": "pt"}, "of another program"),
        ({"whisper_steer": "{not json"}, "damaged metadata"),
        ({"whisper_steer": "[1]"}, "what kind of file"),
        ({"whisper_steer": '{"format_version": 1}'}, "what kind of file"),
        ({"whisper_steer": '{"kind": "sae"}'}, "format_version None"),
        ({"whisper_steer": '{"kind": "sae", "format_version": 0}'}, "format_version 0"),
        ({"whisper_steer": '{"kind": "sae", "format_version": 99}'}, "upgrade whisper-steer"),
        ({"whisper_steer": '{"kind": "steering", "format_version": 1}'}, "is a steering file"),
    ],
)
def test_foreign_files_and_other_kinds(tmp_path, header, message):
    path = tmp_path / "x.safetensors"
    write_foreign(path, header)
    with pytest.raises(FormatError) as error:
        load_tensors(path, "sae")
    assert message in one_line(error)


def test_any_kind_is_read_when_none_is_asked_for(tmp_path):
    save_tensors(tmp_path / "x", {"a": torch.zeros(1)}, {"kind": "whatever"})
    assert load_metadata(tmp_path / "x")["kind"] == "whatever"


def test_encoder_sha256_is_what_its_docstring_says(tiny_whisper):
    digest = hashlib.sha256()
    state = {k: v for k, v in tiny_whisper.encoder.state_dict().items() if k != "positional_embedding"}
    for name in sorted(state):
        digest.update(name.encode() + b"\0" + state[name].numpy().astype("<f4").tobytes())
    assert encoder_sha256(tiny_whisper) == digest.hexdigest()


def test_encoder_sha256_sees_the_encoder_only(tiny_whisper):
    before = encoder_sha256(tiny_whisper)
    tiny_whisper.decoder.token_embedding.weight[0, 0] += 1
    assert encoder_sha256(tiny_whisper) == before
    tiny_whisper.encoder.blocks[2].mlp[2].bias[5] += 1e-3
    assert encoder_sha256(tiny_whisper) != before


def test_encoder_sha256_is_the_same_after_a_lossless_cast(tiny_whisper):
    for parameter in tiny_whisper.encoder.parameters():
        parameter.copy_(parameter.half().float())
    assert encoder_sha256(copy.deepcopy(tiny_whisper).half()) == encoder_sha256(tiny_whisper)


def test_model_name(tiny_whisper):
    assert model_name(tiny_whisper) == "unnamed"
    tiny_whisper.name = "mini.en"
    assert model_name(tiny_whisper) == "mini.en"
    del tiny_whisper.name
    tiny_whisper.dims.n_audio_state, tiny_whisper.dims.n_audio_layer = 512, 6
    assert model_name(tiny_whisper) == "base"


def test_model_metadata(tiny_whisper):
    tiny_whisper.name = "mini.en"
    assert fileformat.model_metadata(tiny_whisper) == {
        "base_model": "mini.en",
        "encoder_sha256": encoder_sha256(tiny_whisper),
        "d_model": 64,
        "n_layers": 4,
    }


def test_numpy_numbers_in_metadata_are_refused_by_name(tmp_path):
    with pytest.raises(UsageError) as error:
        save_tensors(tmp_path / "x", {"a": torch.zeros(1)}, {"kind": "t", "n": np.int64(3)})
    assert "int64" in one_line(error)

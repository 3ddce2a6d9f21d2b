"""The PyTorch encoder built from CTranslate2's weights against CTranslate2's own."""

from __future__ import annotations

from pathlib import Path

import ctranslate2
import numpy as np
import pytest
import torch
from faster_models import mini_ct2

from whisper_steer.bake_record import record_path, write_record
from whisper_steer.ct2_encoder import Ct2View, load_encoder, plain_name, run_encoder
from whisper_steer.errors import FormatError
from whisper_steer.fileformat import encoder_sha256
from whisper_steer.zoo import load_model


# int8: CTranslate2 also quantises the activations; measured 0.11 on noise
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float16", 2e-5), ("int8", 0.3)])
def test_same_output_as_ctranslate2(dtype: str, tolerance: float) -> None:
    folder = mini_ct2(dtype)
    kind = "int8" if dtype == "int8" else "float32"
    model = ctranslate2.models.Whisper(str(folder), intra_threads=1, compute_type=kind)
    mel = np.random.default_rng(0).normal(size=(2, 80, 400)).astype(np.float32)  # a short window, too
    theirs = np.array(model.encode(ctranslate2.StorageView.from_array(mel)))
    ours = run_encoder(load_encoder(folder), torch.from_numpy(mel)).numpy()
    assert ours.shape == theirs.shape == (2, 200, 192)
    assert np.abs(ours - theirs).max() < tolerance


def test_hash_of_the_weights_is_that_of_the_model() -> None:
    expected = encoder_sha256(load_model("mini.en", device="cpu"))
    view = Ct2View(mini_ct2(), "faster-whisper-mini.en")
    assert (view.name, view.exact, view.comparable) == ("mini.en", True, True)
    assert (view.dims.n_audio_state, view.dims.n_audio_layer, view.dims.n_audio_ctx) == (192, 4, 1500)
    assert encoder_sha256(view) == expected
    half = Ct2View(mini_ct2("float16"), "x")  # its values were rounded to float16 when it was published
    assert (half.exact, half.comparable, encoder_sha256(half)) == (False, True, expected)
    assert not Ct2View(mini_ct2("int8"), "x").comparable


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("/cache/models--Systran--faster-whisper-small.en/snapshots/0a1b", "small.en"),
        ("Systran/faster-whisper-large-v3", "large-v3"),
        ("mini.en-ct2-int8", "mini.en"),
        ("large-v3-turbo", "large-v3-turbo"),
        ("folder/", "folder"),
        ("ct2-int8", "ct2-int8"),
        ("me/faster-whisper", "faster-whisper"),
    ],
)
def test_plain_name(given: str, name: str) -> None:
    assert plain_name(given) == name


def test_a_folder_named_after_what_it_holds(tmp_path: Path) -> None:
    for around, name in (("mini.en", "mini.en"), ("faster-whisper-small.en", "small.en"), ("x", "ct2-int8")):
        folder = tmp_path / around / "ct2-int8"
        folder.mkdir(parents=True)
        assert plain_name(folder) == name
    record = {"files": {}, "alpha": 1.0, "steering": "shift", "base_model": "mine"}
    write_record(record_path(folder), [record])
    assert plain_name(folder) == "mine"


def test_what_is_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        load_encoder(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"nonsense")
    with pytest.raises(FormatError):
        load_encoder(tmp_path)

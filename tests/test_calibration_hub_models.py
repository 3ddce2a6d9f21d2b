"""Models from folders and from the hub, which is a folder here."""

import json
import logging
import shutil
import sys

import pytest
import torch
from calibration_tools import make_terse_whisper
from test_calibration_adapters import CLIPS, NAMES, raw_model
from test_zoo import one_line, write_hf
from whisper.model import Whisper

from calibration.adapters import RawAudioEncoder, WhisperEncoder, load_encoder
from whisper_steer.errors import FormatError, ModelError, UsageError
from whisper_steer.fileformat import model_metadata


@pytest.fixture(scope="module")
def whisper_model():
    return make_terse_whisper(1)


def write_raw(folder, family="hubert", *, preprocessor=None, head="Model", **model):
    raw_model(family, head=head, **model).save_pretrained(folder)
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.mark.parametrize("family", NAMES)
def test_a_transformers_folder_becomes_a_raw_encoder(tmp_path, family):
    folder = write_raw(tmp_path / "tiny", family, preprocessor={"do_normalize": False}, norm="layer")
    encoder = load_encoder(folder, device="cpu", max_samples=16_000)
    assert isinstance(encoder, RawAudioEncoder)
    assert (encoder.family, encoder.name, encoder.max_samples) == (family, "tiny", 16_000)
    direct = RawAudioEncoder(raw_model(family, "layer"), do_normalize=False, name="tiny")
    assert encoder.metadata() == direct.metadata()
    assert torch.equal(encoder.encode(CLIPS[:1], [0, 2])[0], direct.encode(CLIPS[:1], [0, 2])[0])
    rounded = load_encoder(str(folder), device="cpu", dtype=torch.bfloat16)
    assert rounded.metadata()["precision"] == "bfloat16"
    assert load_encoder(folder, "cpu", torch.float32).metadata() == encoder.metadata()


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("preprocessor_config.json", {"do_normalize": True, "sampling_rate": 16_000}, True),
        ("preprocessor_config.json", {}, True),  # Wav2Vec2FeatureExtractor's default
        ("preprocessor_config.json", {"do_normalize": False}, False),
        ("processor_config.json", {"feature_extractor": {"do_normalize": True}}, True),
    ],
)
def test_the_preprocessor_says_whether_input_is_normalised(tmp_path, name, settings, expected):
    folder = write_raw(tmp_path / "tiny")
    (folder / name).write_text(json.dumps(settings))
    assert load_encoder(folder, "cpu").metadata()["do_normalize"] is expected


def test_without_a_preprocessor_input_is_not_normalised_and_a_warning_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="whisper_steer"):
        encoder = load_encoder(write_raw(tmp_path / "tiny"), "cpu")
    assert encoder.metadata()["do_normalize"] is False
    assert [record.message for record in caplog.records if record.name == "whisper_steer"] == [
        f"{tmp_path / 'tiny'} has no preprocessor_config.json: its input is not normalised"
    ]


def test_a_head_is_left_out_and_half_precision_weights_are_read_as_float32(tmp_path):
    folder = tmp_path / "ctc"
    raw_model(head="ForCTC").half().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    encoder = load_encoder(folder, "cpu")
    assert encoder.metadata()["precision"] == "float32"
    assert encoder.encode(CLIPS[:1], [2])[0].isfinite().all()


def test_whispers_of_all_forms_become_whisper_encoders(tmp_path, whisper_model):
    hub_like = write_hf(tmp_path / "hf", whisper_model)
    torch.save(
        {"dims": vars(whisper_model.dims), "model_state_dict": whisper_model.state_dict()},
        tmp_path / "terse.pt",
    )
    digest = model_metadata(whisper_model)["encoder_sha256"]
    for path, name in ((hub_like, "hf"), (tmp_path / "terse.pt", "terse")):
        encoder = load_encoder(path, "cpu")
        assert isinstance(encoder, WhisperEncoder) and isinstance(encoder.model, Whisper)
        assert encoder.name == name and encoder.metadata()["encoder_sha256"] == digest
    assert load_encoder("mini.en", "cpu").metadata()["base_model"] == "mini.en"


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path, monkeypatch):
    def refused(error, path, **arguments):
        with pytest.raises(error) as caught:
            load_encoder(path, **{"device": "cpu", **arguments})
        return one_line(caught)

    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    expected = "is a 'bert' model, which cannot be encoded: expected whisper, hubert, wav2vec2, wavlm"
    assert refused(ModelError, other) == f"{other} {expected}"
    (other / "config.json").write_text("{}")
    assert "has no model_type" in refused(FormatError, other)
    (other / "config.json").write_text("{")
    assert "cannot be read as JSON" in refused(FormatError, other)
    assert "unknown model 'tinny'" in refused(ModelError, "tinny")
    assert "no such file" in refused(ModelError, tmp_path / "absent.pt")

    telephone = write_raw(tmp_path / "8k", preprocessor={"sampling_rate": 8000})
    assert "made for audio at 8000 Hz: expected 16000" in refused(ModelError, telephone)
    good = write_raw(tmp_path / "good", preprocessor={})
    assert "device 'nonsense' cannot be used here" in refused(UsageError, good, device="nonsense")
    assert "torch.int8" in refused(UsageError, good, dtype=torch.int8)
    (good / "model.safetensors").write_bytes(b"damaged")
    assert "transformers cannot load this model" in refused(FormatError, good)
    (good / "model.safetensors").unlink()
    assert "transformers cannot load this model" in refused(FormatError, good)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'whisper-steer[hf]'" in refused(ModelError, good)


def test_missing_tensors_are_named_and_never_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_raw(tmp_path / "tiny", preprocessor={})
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layers.1.attention.k_proj.weight"], weights["masked_spec_embed"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=r"1 tensors are missing.*: encoder.layers.1.attention.k_proj"):
        load_encoder(folder, "cpu")
    weights["encoder.layers.1.attention.k_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError) as caught:
        load_encoder(folder, "cpu")
    assert "transformers cannot load this model" in one_line(caught)


# ---------- the hub


class FakeHub:
    """Stands for hf_hub_download: `remote` holds the repository's files, `cache` what was fetched."""

    def __init__(self, remote, cache, *, online=True):
        self.remote, self.cache, self.online, self.fetched = remote, cache, online, []
        cache.mkdir(exist_ok=True)

    def __call__(self, repo, name, *, local_files_only=False, cache_dir=None):
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo)
        assert repo == "someone/tiny"
        if (self.cache / name).is_file():
            return str(self.cache / name)
        if local_files_only or not self.online:
            raise LocalEntryNotFoundError("not in the cache, and no network")
        if not (self.remote / name).is_file():
            raise EntryNotFoundError("404")
        shutil.copy(self.remote / name, self.cache / name)
        self.fetched.append(name)
        return str(self.cache / name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def make(remote, **changes):
        fake = FakeHub(remote, tmp_path / "cache", **changes)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)
        return fake

    return make


def test_a_hub_id_is_fetched_once_and_then_works_without_a_network(tmp_path, hub):
    remote = write_raw(tmp_path / "remote", "wav2vec2", preprocessor={"do_normalize": True})
    (remote / "pytorch_model.bin").write_bytes(b"the same as a pickle")
    online = hub(remote)
    encoder = load_encoder("someone/tiny", "cpu")
    assert (encoder.family, encoder.name) == ("wav2vec2", "someone/tiny")
    assert encoder.metadata()["do_normalize"] is True
    assert online.fetched == ["config.json", "model.safetensors", "preprocessor_config.json"]
    hub(remote, online=False)
    assert load_encoder("someone/tiny", "cpu").metadata() == encoder.metadata()


def test_sharded_weights_are_fetched_whole(tmp_path, hub):
    model = raw_model()
    model.save_pretrained(tmp_path / "remote", max_shard_size="20KB")
    online = hub(tmp_path / "remote")
    encoder = load_encoder("someone/tiny", "cpu")
    shards = [name for name in online.fetched if name.startswith("model-")]
    assert len(shards) > 1 and "model.safetensors.index.json" in online.fetched
    expected = RawAudioEncoder(model, do_normalize=False, name="someone/tiny")
    assert encoder.metadata() == expected.metadata()


def test_an_old_repository_without_safetensors_is_read_too(tmp_path, hub):
    remote = write_raw(tmp_path / "remote", preprocessor={})
    state = raw_model().state_dict()
    (remote / "model.safetensors").unlink()
    torch.save(state, remote / "pytorch_model.bin")
    online = hub(remote)
    encoder = load_encoder("someone/tiny", "cpu")
    assert "pytorch_model.bin" in online.fetched
    expected = RawAudioEncoder(raw_model(), do_normalize=True, name="someone/tiny")
    assert encoder.metadata() == expected.metadata()
    # complete in the cache, though safetensors were never there to be found
    assert load_encoder("someone/tiny", "cpu").metadata() == expected.metadata()
    hub(remote, online=False)
    assert load_encoder("someone/tiny", "cpu").metadata() == expected.metadata()


def test_what_the_hub_cannot_give_is_said_in_one_line(tmp_path, hub):
    def refused(name="someone/tiny"):
        with pytest.raises(ModelError) as caught:
            load_encoder(name, "cpu")
        return one_line(caught)

    remote = write_raw(tmp_path / "remote", preprocessor={})
    hub(remote, online=False)
    assert "someone/tiny: no such file or folder here, not in the cache, and the" in refused()
    (remote / "model.safetensors").unlink()
    hub(remote)
    assert "the repository holds neither model.safetensors nor pytorch_model.bin" in refused()
    (tmp_path / "cache" / "config.json").unlink()
    (remote / "config.json").unlink()
    assert "not available from the Hugging Face hub (404)" in refused()
    assert "not a hub id" in refused("someone/x..y--")
    assert "unknown model 'some/folder/deep'" in refused("some/folder/deep")


def test_a_whisper_on_the_hub_needs_no_transformers(tmp_path, hub, whisper_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    hub(write_hf(tmp_path / "remote", whisper_model))
    encoder = load_encoder("someone/tiny", "cpu")
    assert isinstance(encoder, WhisperEncoder)
    assert encoder.metadata()["encoder_sha256"] == model_metadata(whisper_model)["encoder_sha256"]


def test_only_the_config_of_a_model_of_another_kind_is_fetched(tmp_path, hub):
    remote = tmp_path / "remote"
    remote.mkdir()
    (remote / "config.json").write_text('{"model_type": "bert"}')
    online = hub(remote)
    with pytest.raises(ModelError, match="'bert' model, which cannot be encoded"):
        load_encoder("someone/tiny")
    assert online.fetched == ["config.json"]

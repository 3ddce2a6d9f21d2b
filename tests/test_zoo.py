"""Models, SAEs and steerings by name and by path, and everything that can be wrong with them."""

from __future__ import annotations

import json
import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
import whisper
from conftest import make_tiny_whisper
from safetensors.torch import save_file
from steering_files import constant_steering, save_checkpoint
from torch import Tensor
from whisper.model import ModelDimensions, Whisper

from whisper_steer import zoo
from whisper_steer.attach import handles_of
from whisper_steer.compact import pack_model
from whisper_steer.convert_hf import openai_name
from whisper_steer.errors import FormatError, MismatchError, ModelError, UsageError, WhisperSteerError
from whisper_steer.sae import SparseAutoencoder

# unequal sizes everywhere, so that no two tensors can be swapped unnoticed
SMALL = ModelDimensions(80, 60, 32, 2, 3, 200, 20, 32, 4, 2)


@pytest.fixture
def small() -> Whisper:
    return make_tiny_whisper(1, SMALL)


@pytest.fixture
def shelves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty bundled folder; the user's caches are empty too."""
    bundled = tmp_path / "bundled"
    bundled.mkdir()
    monkeypatch.setattr(zoo, "bundled_dir", lambda: bundled)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WHISPER_STEER_CACHE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return bundled


def put_bundled(shelves: Path, name: str, model: Whisper) -> Path:
    """A compact model; all but the first 50 token rows become one and the same."""
    with torch.no_grad():
        model.decoder.token_embedding.weight[50:] = model.decoder.token_embedding.weight[50]
    (shelves / name).mkdir()
    pack_model(model, shelves / name / "whisper.safetensors", list(range(50)), {"name": name})
    return shelves / name


def outputs(model: Whisper) -> tuple[Tensor, Tensor]:
    """(encoder output, logits) on fixed inputs."""
    mel = torch.randn(1, 80, 2 * model.dims.n_audio_ctx, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        features = model.encoder(mel)
        return features, model.decoder(torch.tensor([[3, 1, 4, 1, 5]]), features)


def assert_same(a: Whisper, b: Whisper) -> None:
    """Bit for bit."""
    for one, other in zip(outputs(a), outputs(b), strict=True):
        assert torch.equal(one, other)


def one_line(error: pytest.ExceptionInfo[WhisperSteerError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


# ---------- transformers' format, written by hand


def hf_name(name: str) -> str:
    """openai -> transformers, as transformers' convert_openai_to_hf.py renames (WHISPER_MAPPING)."""
    table = [
        ("encoder.ln_post", "encoder.layer_norm"),
        ("decoder.ln.", "decoder.layer_norm."),
        ("token_embedding", "embed_tokens"),
        ("positional_embedding", "embed_positions.weight"),
        ("blocks", "layers"),
        ("mlp.0", "fc1"),
        ("mlp.2", "fc2"),
        ("mlp_ln", "final_layer_norm"),
        (".cross_attn_ln", ".encoder_attn_layer_norm"),
        (".cross_attn.query", ".encoder_attn.q_proj"),
        (".cross_attn.key", ".encoder_attn.k_proj"),
        (".cross_attn.value", ".encoder_attn.v_proj"),
        (".cross_attn.out", ".encoder_attn.out_proj"),
        (".attn_ln", ".self_attn_layer_norm"),
        (".attn.query", ".self_attn.q_proj"),
        (".attn.key", ".self_attn.k_proj"),
        (".attn.value", ".self_attn.v_proj"),
        (".attn.out", ".self_attn.out_proj"),
    ]
    for ours, theirs in table:
        name = name.replace(ours, theirs)
    return f"model.{name}"


def hf_config(model: Whisper) -> dict[str, object]:
    d = model.dims
    return {
        "model_type": "whisper",
        "num_mel_bins": d.n_mels,
        "max_source_positions": d.n_audio_ctx,
        "d_model": d.n_audio_state,
        "encoder_attention_heads": d.n_audio_head,
        "encoder_layers": d.n_audio_layer,
        "vocab_size": d.n_vocab,
        "max_target_positions": d.n_text_ctx,
        "decoder_attention_heads": d.n_text_head,
        "decoder_layers": d.n_text_layer,
    }


def hf_state(model: Whisper) -> dict[str, Tensor]:
    return {hf_name(name): value.clone() for name, value in model.state_dict().items()}


def write_hf(folder: Path, model: Whisper, *, kind: str = "safetensors", shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model)))
    state = hf_state(model)
    stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = sorted(state)
    parts = [names[i::shards] for i in range(shards)]
    files = [f"{stem}.{suffix}"] if shards == 1 else [f"{stem}-{i}.{suffix}" for i in range(shards)]
    for file, part in zip(files, parts, strict=True):
        tensors = {name: state[name] for name in part}
        save_file(tensors, folder / file) if suffix == "safetensors" else torch.save(tensors, folder / file)
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


class TestTransformersFolder:
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("kind", ["safetensors", "bin"])
    def test_computes_the_same(self, tmp_path: Path, small: Whisper, kind: str, shards: int) -> None:
        folder = write_hf(tmp_path / "my-whisper", small, kind=kind, shards=shards)
        loaded = zoo.load_model(folder, device="cpu")
        assert loaded.dims == SMALL and loaded.name == "my-whisper" and not loaded.training
        assert_same(loaded, small)

    def test_every_name_is_mapped_back(self, small: Whisper) -> None:
        for name in small.state_dict():
            assert openai_name(hf_name(name)) == name
        assert (
            openai_name("encoder.layers.0.fc1.bias") == "encoder.blocks.0.mlp.0.bias"
        )  # a bare WhisperModel
        for foreign in (
            "proj_out.weight",
            "model.encoder.layers.x.fc1.bias",
            "lm_head.weight",
            "model.encoder.layers.1.adapter.weight",
        ):
            assert openai_name(foreign) is None

    def test_tied_output_projection_is_accepted(self, tmp_path: Path, small: Whisper) -> None:
        folder = write_hf(tmp_path / "w", small)
        state = hf_state(small)
        state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"].clone()
        save_file(state, folder / "model.safetensors")
        assert_same(zoo.load_model(folder, device="cpu"), small)
        state["proj_out.weight"] += 1
        save_file(state, folder / "model.safetensors")
        with pytest.raises(FormatError, match="ties the two") as error:
            zoo.load_model(folder)
        assert str(folder) in one_line(error)

    def test_half_precision_is_widened(self, tmp_path: Path, small: Whisper) -> None:
        folder = write_hf(tmp_path / "w", small)
        save_file(
            {name: value.half() for name, value in hf_state(small).items()}, folder / "model.safetensors"
        )
        loaded = zoo.load_model(folder, device="cpu")
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert torch.equal(
            loaded.encoder.blocks[1].mlp[0].weight, small.encoder.blocks[1].mlp[0].weight.half().float()
        )

    def test_alignment_heads(self, tmp_path: Path, small: Whisper) -> None:
        folder = write_hf(tmp_path / "w", small)
        (folder / "generation_config.json").write_text(json.dumps({"alignment_heads": [[0, 3], [1, 1]]}))
        assert zoo.load_model(folder).alignment_heads.to_dense().nonzero().tolist() == [[0, 3], [1, 1]]
        (folder / "generation_config.json").write_text(json.dumps({"alignment_heads": [[9, 9]]}))
        with pytest.raises(FormatError, match="alignment_heads"):
            zoo.load_model(folder)

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            ("no_weights", "no weights"),
            ("truncated", "damaged"),
            ("text", "damaged"),
            ("wrong_model", "'bert' model, expected 'whisper'"),
            ("bad_json", "JSON"),
            ("no_size", "lacks d_model"),
            ("missing_tensor", "missing encoder.conv1.bias"),
            ("wrong_shape", r"encoder.conv1.bias has shape \(31,\), expected \(32,\)"),
            ("extra_tensor", "not Whisper's: model.adapter"),
        ],
    )
    def test_damaged(self, tmp_path: Path, small: Whisper, damage: str, words: str) -> None:
        folder = write_hf(tmp_path / "w", small)
        weights, config, state = folder / "model.safetensors", hf_config(small), hf_state(small)
        if damage == "no_weights":
            weights.unlink()
        elif damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif damage == "text":
            weights.write_text("version https://git-lfs.github.com/spec/v1")
        elif damage == "wrong_model":
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
        elif damage == "bad_json":
            (folder / "config.json").write_text("{")
        elif damage == "no_size":
            (folder / "config.json").write_text(
                json.dumps({k: v for k, v in config.items() if k != "d_model"})
            )
        elif damage == "missing_tensor":
            del state["model.encoder.conv1.bias"]
        elif damage == "wrong_shape":
            state["model.encoder.conv1.bias"] = torch.zeros(31)
        elif damage == "extra_tensor":
            state["model.adapter"] = torch.zeros(3)
        if damage in ("missing_tensor", "wrong_shape", "extra_tensor"):
            save_file(state, weights)
        with pytest.raises(FormatError, match=words) as error:
            zoo.load_model(folder)
        assert str(folder) in one_line(error)

    def test_missing_shard_and_a_shard_outside_the_folder(self, tmp_path: Path, small: Whisper) -> None:
        folder = write_hf(tmp_path / "w", small, shards=2)
        (folder / "model-1.safetensors").unlink()
        with pytest.raises(FormatError, match="model-1.safetensors is listed but missing"):
            zoo.load_model(folder)
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
        with pytest.raises(FormatError, match="not a plain file name"):
            zoo.load_model(folder)

    def test_a_pickle_with_code_is_refused(self, tmp_path: Path, small: Whisper) -> None:
        folder = write_hf(tmp_path / "w", small, kind="bin")
        torch.save({"a": Path}, folder / "pytorch_model.bin")
        with pytest.raises(FormatError, match="pytorch_model.bin") as error:
            zoo.load_model(folder)
        one_line(error)


class TestHub:
    def put_in_cache(self, root: Path, repo: str, model: Whisper) -> None:
        folder = root / f"models--{repo.replace('/', '--')}"
        write_hf(folder / "snapshots" / ("0" * 40), model)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)

    @pytest.fixture
    def offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def test_cache_is_used_offline(
        self, shelves: Path, tmp_path: Path, small: Whisper, offline: None
    ) -> None:
        self.put_in_cache(tmp_path / "models", "someone/whisper-small-test", small)
        loaded = zoo.load_model("someone/whisper-small-test", device="cpu", download_root=tmp_path / "models")
        assert loaded.name == "someone/whisper-small-test"
        assert_same(loaded, small)

    def test_no_network(self, shelves: Path, tmp_path: Path, offline: None) -> None:
        with pytest.raises(ModelError, match="someone/whisper-x: .* hub cannot be reached") as error:
            zoo.load_model("someone/whisper-x", download_root=tmp_path)
        one_line(error)

    def test_errors_of_the_http_library_are_one_line(
        self, shelves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub.errors import LocalEntryNotFoundError

        def fail(*args: object, local_files_only: bool, **kwargs: object) -> None:
            if local_files_only:
                raise LocalEntryNotFoundError("not in the cache")
            raise RuntimeError("\nconnection refused\nfor more see ...")

        monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
        with pytest.raises(ModelError, match=r"\(connection refused\)") as error:
            zoo.load_model("someone/whisper-x")
        one_line(error)

    def test_the_cache_is_not_asked_about_over_the_network(
        self, shelves: Path, tmp_path: Path, small: Whisper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub

        original, asked = huggingface_hub.hf_hub_download, []

        def spy(repo: str, name: str, **kwargs: Any) -> str:
            asked.append((name, kwargs["local_files_only"]))
            return original(repo, name, **kwargs)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", spy)
        self.put_in_cache(tmp_path, "someone/whisper-test", small)
        zoo.load_model("someone/whisper-test", download_root=tmp_path)
        assert asked == [("config.json", True), ("model.safetensors", True), ("generation_config.json", True)]

    def test_a_repository_without_weights(
        self, shelves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        def only_config(repo: str, name: str, *, local_files_only: bool, **kwargs: object) -> str:
            if local_files_only:
                raise LocalEntryNotFoundError("not in the cache")
            if name != "config.json":
                raise EntryNotFoundError("404")
            return str(tmp_path / name)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", only_config)
        with pytest.raises(ModelError, match="neither model.safetensors nor pytorch_model.bin") as error:
            zoo.load_model("someone/whisper-x")
        one_line(error)

    def test_impossible_id(self, shelves: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="not a hub id") as error:
            zoo.load_model("someone/x..y--", download_root=tmp_path)
        one_line(error)

    def test_listed_as_cached(self, shelves: Path, tmp_path: Path, small: Whisper) -> None:
        self.put_in_cache(tmp_path / "hub", "someone/whisper-small-test", small)
        entry = next(e for e in zoo.models() if e.name == "someone/whisper-small-test")
        assert (entry.status, entry.d_model, entry.layers) == ("cached", 32, 3)


class TestCheckpoint:
    def test_pt(self, tmp_path: Path, small: Whisper) -> None:
        loaded = zoo.load_model(save_checkpoint(small, tmp_path / "fine.pt"), device="cpu")
        assert loaded.name == "fine" and isinstance(loaded, whisper.Whisper)
        assert_same(loaded, small)

    def test_openai_whisper_reads_the_same(self, tmp_path: Path, small: Whisper) -> None:
        path = save_checkpoint(small, tmp_path / "fine.pt")
        assert_same(zoo.load_model(path, device="cpu"), whisper.load_model(str(path), device="cpu"))

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "damaged or not a torch checkpoint"),
            (b"not a checkpoint at all", "damaged or not a torch checkpoint"),
            ({"weights": torch.zeros(3)}, "expected 'dims' and 'model_state_dict'"),
            ({"dims": {"n_mels": 80}, "model_state_dict": {}}, "expected 'dims' and 'model_state_dict'"),
            ([1, 2], "expected 'dims' and 'model_state_dict'"),
        ],
    )
    def test_bad_pt(self, tmp_path: Path, content: object, words: str) -> None:
        path = tmp_path / "bad.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(FormatError, match=words) as error:
            zoo.load_model(path)
        assert str(path) in one_line(error)

    def test_truncated_pt(self, tmp_path: Path, small: Whisper) -> None:
        path = save_checkpoint(small, tmp_path / "cut.pt")
        path.write_bytes(path.read_bytes()[:-500])
        with pytest.raises(FormatError, match="damaged"):
            zoo.load_model(path)

    def test_a_pickle_with_code_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "evil.pt"
        torch.save({"dims": {}, "model_state_dict": Path}, path)
        with pytest.raises(FormatError):
            zoo.load_model(path)


class TestOpenAINames:
    def test_no_network_is_one_line(
        self, shelves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_network(*args: object, **kwargs: object) -> None:
            raise urllib.error.URLError("Name or service not known")

        monkeypatch.setattr("urllib.request.urlopen", no_network)
        with pytest.raises(ModelError, match="tiny.en is not in .* cannot be downloaded") as error:
            zoo.load_model("tiny.en", download_root=tmp_path)
        assert "Name or service not known" in one_line(error)

    def test_broken_download_is_one_line(
        self, shelves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def reset(*args: object, **kwargs: object) -> None:
            raise ConnectionResetError("peer went away\nmidway")

        monkeypatch.setattr("urllib.request.urlopen", reset)
        with pytest.raises(ModelError, match="peer went away") as error:
            zoo.load_model("tiny", download_root=tmp_path)
        one_line(error)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("mini.ne", "unknown model 'mini.ne': did you mean mini.en\\?"),
            ("smal", "did you mean small\\?"),
            ("nothing.pt", "nothing.pt: no such file"),
            ("some/where/nothing.safetensors", "no such file"),
            ("./folder", "no such file or folder"),
            ("", "unknown model"),
        ],
    )
    def test_unknown(self, shelves: Path, small: Whisper, name: str, words: str) -> None:
        put_bundled(shelves, "mini.en", small)
        with pytest.raises(ModelError, match=words) as error:
            zoo.load_model(name)
        one_line(error)

    def test_a_folder_without_a_model(self, shelves: Path, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no model in this folder"):
            zoo.load_model(tmp_path / "bundled")


class TestBundled:
    def test_by_name_by_folder_and_by_file(self, shelves: Path, small: Whisper) -> None:
        folder = put_bundled(shelves, "mini.en", small)
        by_name = zoo.load_model(device="cpu")
        assert by_name.name == "mini.en"
        assert torch.equal(by_name.encoder.conv1.weight, small.encoder.conv1.weight.half().float())
        for path in (folder, folder / "whisper.safetensors"):
            loaded = zoo.load_model(path, device="cpu")
            assert loaded.name == "mini.en"
            assert_same(loaded, by_name)

    def test_damaged(self, shelves: Path, small: Whisper) -> None:
        path = put_bundled(shelves, "mini.en", small) / "whisper.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(FormatError) as error:
            zoo.load_model("mini.en")
        assert str(path) in one_line(error)

    def test_the_users_own_folder_comes_after(
        self, shelves: Path, tmp_path: Path, small: Whisper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("WHISPER_STEER_CACHE", str(tmp_path / "mine"))
        put_bundled(tmp_path, "unused", small)
        own = tmp_path / "mine" / "models" / "tuned"
        own.mkdir(parents=True)
        (tmp_path / "unused" / "whisper.safetensors").rename(own / "whisper.safetensors")
        assert zoo.cache_dir() == own.parent
        assert zoo.load_model("tuned").name == "tuned"
        assert [e.name for e in zoo.models() if e.status == "bundled"] == ["tuned"]

    def test_missing_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(zoo, "__file__", str(tmp_path / "site" / "whisper_steer" / "zoo.py"))
        with pytest.raises(ModelError, match="reinstall"):
            zoo.bundled_dir()

    def test_checkout(self) -> None:
        assert zoo.bundled_dir().name in ("sae_weights", "_bundled")


class TestSteered:
    def test_alpha_steers(self, shelves: Path, small: Whisper) -> None:
        folder = put_bundled(shelves, "mini.en", small)
        plain = zoo.load_model(device="cpu")
        assert handles_of(plain) == ()
        constant_steering(plain, -2.0).save(folder / "steering.safetensors")
        steered = zoo.load_model(alpha=0.5, device="cpu")
        (handle,) = handles_of(steered)
        assert handle.alpha == 0.5 and handle.steering.metadata["name"] == "test"
        assert not torch.equal(outputs(steered)[0], outputs(plain)[0])
        handle.remove()
        assert_same(steered, plain)

    def test_steering_without_alpha(self, shelves: Path) -> None:
        with pytest.raises(UsageError, match="pass alpha=1.0 too"):
            zoo.load_model("mini.en", steering="default")

    def test_no_steering_for_the_model(self, shelves: Path, tmp_path: Path, small: Whisper) -> None:
        path = save_checkpoint(small, tmp_path / "fine.pt")
        with pytest.raises(
            MismatchError, match=r"no steering is kept for the model fine \(d_model 32, 3 blocks\)"
        ):
            zoo.load_model(path, alpha=1.0)

    def test_found_by_the_encoder_if_the_name_is_another(
        self, shelves: Path, tmp_path: Path, small: Whisper
    ) -> None:
        folder = put_bundled(shelves, "mini.en", small)
        model = zoo.load_model(device="cpu")
        constant_steering(model, -2.0).save(folder / "steering.safetensors")
        renamed = zoo.load_model(save_checkpoint(model, tmp_path / "copy.pt"), alpha=1.0, device="cpu")
        assert renamed.name == "copy" and len(handles_of(renamed)) == 1

    @pytest.mark.parametrize("device", ["nonsense", "cuda:99", 3.5])
    def test_bad_device(self, shelves: Path, small: Whisper, device: str) -> None:
        put_bundled(shelves, "mini.en", small)
        with pytest.raises(UsageError, match="device") as error:
            zoo.load_model("mini.en", device=device)
        one_line(error)


class TestLoadSteering:
    @pytest.fixture
    def kept(self, shelves: Path, small: Whisper) -> Path:
        folder = put_bundled(shelves, "mini.en", small)
        constant_steering(small, -2.0, name="ours").save(folder / "steering.safetensors")
        constant_steering(small, -2.0, name="paper").save(folder / "steering-audiosae.safetensors")
        return folder

    @pytest.mark.parametrize(
        ("given", "model_name", "expected"),
        [
            ("default", "mini.en", "ours"),
            ("steering", "mini.en", "ours"),
            ("audiosae", "mini.en", "paper"),
            ("mini.en/audiosae", None, "paper"),
            ("mini.en/audiosae", "other", "paper"),
            ("mini.en", None, "ours"),
        ],
    )
    def test_by_name(self, kept: Path, given: str, model_name: str | None, expected: str) -> None:
        assert zoo.load_steering(given, model_name).metadata["name"] == expected

    def test_by_path(self, kept: Path) -> None:
        assert zoo.load_steering(kept / "steering-audiosae.safetensors").metadata["name"] == "paper"

    @pytest.mark.parametrize("given", ["audio-sae", "base/default", "x/y/z"])
    def test_unknown(self, kept: Path, given: str) -> None:
        with pytest.raises(UsageError, match="mini.en/default, mini.en/audiosae") as error:
            zoo.load_steering(given, "mini.en")
        assert given in one_line(error)

    def test_missing_file(self, kept: Path) -> None:
        with pytest.raises(UsageError, match="gone.safetensors: no such file"):
            zoo.load_steering("gone.safetensors")

    def test_corrupt(self, kept: Path) -> None:
        path = kept / "steering.safetensors"
        path.write_bytes(b"\x00" * 40)
        with pytest.raises(FormatError) as error:
            zoo.load_steering("default", "mini.en")
        assert str(path) in one_line(error)

    def test_an_sae_is_not_a_steering(self, kept: Path) -> None:
        SparseAutoencoder(32, 8, k=2).save(kept / "layer_00.safetensors")
        with pytest.raises(FormatError, match="is a sae file"):
            zoo.load_steering(kept / "layer_00.safetensors")


class TestLoadSAE:
    def test_by_layer(self, shelves: Path, small: Whisper) -> None:
        folder = put_bundled(shelves, "mini.en", small)
        for layer in (0, 2):
            SparseAutoencoder(32, 8, k=2, layer=layer).save(folder / f"layer_{layer:02d}.safetensors")
        assert zoo.load_sae("mini.en", 2).layer == 2
        with pytest.raises(ModelError, match="no SAE for layer 1 of mini.en: layers 0, 2 are kept"):
            zoo.load_sae("mini.en", 1)
        with pytest.raises(ModelError, match="none is kept"):
            zoo.load_sae("base", 0)
        SparseAutoencoder(32, 8, k=4, layer=2).save(folder / "seed1" / "layer_02.safetensors")
        assert zoo.load_sae("mini.en", 2, "seed1").k == 4
        with pytest.raises(ModelError, match=r"no SAE \(seed1\) for layer 0 of mini.en: layers 2 are kept"):
            zoo.load_sae("mini.en", 0, "seed1")


class TestModels:
    def test_bundled_cached_known(self, shelves: Path, tmp_path: Path, small: Whisper) -> None:
        folder = put_bundled(shelves, "mini.en", small)
        constant_steering(small, 0.0).save(folder / "steering.safetensors")
        constant_steering(small, 0.0).save(folder / "steering-audiosae.safetensors")
        (shelves / "small").mkdir()
        constant_steering(small, 0.0).save(shelves / "small" / "steering.safetensors")
        root = tmp_path / "cache" / "whisper"
        root.mkdir(parents=True)
        (root / "large-v3-turbo.pt").touch()
        entries = {entry.name: entry for entry in zoo.models()}
        assert set(entries) == {"mini.en", *whisper.available_models()}
        mini = entries["mini.en"]
        assert (mini.status, mini.path, mini.d_model, mini.layers) == ("bundled", folder, 32, 3)
        assert mini.steerings == ("default", "audiosae")
        assert entries["turbo"].status == "cached" and entries["turbo"].path == root / "large-v3-turbo.pt"
        assert (entries["small"].status, entries["small"].path) == ("known", None)
        assert entries["small"].steerings == ("default",) and entries["base"].steerings == ()
        sizes = {name: (e.d_model, e.layers) for name, e in entries.items()}
        assert sizes["tiny.en"] == (384, 4) and sizes["medium"] == (1024, 24)
        assert sizes["large-v2"] == sizes["turbo"] == (1280, 32)
        assert [e.status for e in zoo.models()] == sorted(e.status for e in zoo.models())

"""Finding SAEs of other libraries on the disk and on the hub; converting whole folders; the saes command."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from audio_files import tone, write_wav
from conftest import make_tiny_whisper
from foreign_saes import (
    assert_codes,
    write_dictionary_learning,
    write_saelens,
    write_sparsify,
)
from safetensors import safe_open
from steering_files import save_checkpoint
from test_interop_peers import random_sae

from calibration.adapters import WhisperEncoder
from whisper_steer.cli import main
from whisper_steer.errors import FormatError, MismatchError, ModelError, UsageError
from whisper_steer.fileformat import encoder_sha256
from whisper_steer.interop import (
    download_foreign,
    find_foreign,
    load_foreign,
    save_sparsify,
)
from whisper_steer.interop.convert import export_saes, import_saes
from whisper_steer.sae import SparseAutoencoder

# ---------- finding and the hub


def test_find_foreign(tmp_path: Path) -> None:
    write_saelens(tmp_path / "lens")
    write_sparsify(tmp_path / "run" / "layers.1")
    write_dictionary_learning(tmp_path / "layer_1")
    found = [(sae.layer, sae.format) for sae in find_foreign(tmp_path)]
    assert found == [(0, "dictionary_learning"), (1, "sparsify"), (4, "saelens")]
    assert [sae.path for sae in find_foreign(tmp_path, format="saelens")] == [tmp_path / "lens"]
    assert load_foreign(tmp_path, format="sparsify").layer == 1
    assert load_foreign(tmp_path / "lens" / "sae_weights.safetensors").layer == 4
    write_sparsify(tmp_path / "other" / "layers.1")
    with pytest.raises(UsageError, match="2 SAEs for layer 1: pass one of"):
        load_foreign(tmp_path, layer=1)


def test_nothing_found(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"holds no SAE: expected ae.pt \(dictionary_learning\), sae_weights"
    ):
        find_foreign(tmp_path)
    with pytest.raises(FormatError, match="does not exist"):
        find_foreign(tmp_path / "no")
    with pytest.raises(UsageError, match="format is 'keras'"):
        find_foreign(tmp_path, format="keras")
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(FormatError, match="no SAE of another library"):
        load_foreign(tmp_path / "a.safetensors")


class FakeHub:
    """A repository on the hub, as a local folder."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.fetched, self.online = root, [], True
        self.sha: str | None = None
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot)

    def model_info(self, repo: str, files_metadata: bool) -> SimpleNamespace:
        if not self.online:
            raise ConnectionError("[Errno -2] Name or service not known\nlong story")
        files = []
        for path in sorted(path for path in self.root.rglob("*") if path.is_file()):
            sha = self.sha or hashlib.sha256(path.read_bytes()).hexdigest()
            lfs = SimpleNamespace(sha256=sha) if path.suffix == ".pt" else None
            files.append(SimpleNamespace(rfilename=path.relative_to(self.root).as_posix(), lfs=lfs))
        return SimpleNamespace(siblings=files, sha="abc")

    def download(self, repo: str, name: str, *, revision: str, cache_dir: Path) -> str:
        assert revision == "abc"
        target = Path(cache_dir) / "snapshots" / revision / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((self.root / name).read_bytes())
        self.fetched.append(name)
        return str(target)

    def snapshot(self, repo: str, *, cache_dir: Path, local_files_only: bool) -> str:
        assert local_files_only
        if not (Path(cache_dir) / "snapshots" / "abc").is_dir():
            raise OSError("not in the cache")
        return str(Path(cache_dir) / "snapshots" / "abc")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    for number in (1, 2, 10):
        write_dictionary_learning(tmp_path / "repo" / f"layer_{number}")
    (tmp_path / "repo" / "README.md").write_text("about")
    (tmp_path / "repo" / "layer_1" / "optimizer.bin").write_text("large")
    return FakeHub(tmp_path / "repo", monkeypatch)


def test_download_one_layer(hub: FakeHub, tmp_path: Path) -> None:
    folder = download_foreign("owner/name", 1, cache_dir=tmp_path / "cache")
    assert sorted(hub.fetched) == ["layer_2/ae.pt", "layer_2/config.json"]
    assert load_foreign(folder, layer=1).layer == 1
    hub.online = False  # what is in the cache needs no network
    assert download_foreign("owner/name", 1, cache_dir=tmp_path / "cache") == folder
    with pytest.raises(ModelError, match=r"not available .*Name or service not known\)") as caught:
        download_foreign("owner/name", 9, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_download_everything(hub: FakeHub, tmp_path: Path) -> None:
    folder = download_foreign("owner/name", cache_dir=tmp_path / "cache")
    assert [sae.layer for sae in find_foreign(folder)] == [0, 1, 9]
    assert len(hub.fetched) == 6
    hub.online = False
    assert download_foreign("owner/name", cache_dir=tmp_path / "cache") == folder


def test_damaged_download(hub: FakeHub, tmp_path: Path) -> None:
    hub.sha = "0" * 64
    with pytest.raises(ModelError, match=r"ae.pt: SHA-256 is .*, the hub states 000000000000"):
        download_foreign("owner/name", 0, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "snapshots" / "abc" / "layer_1" / "ae.pt").exists()


def test_not_a_hub_id() -> None:
    with pytest.raises(ModelError, match="not a hub id; expected owner/name"):
        download_foreign("name")


# ---------- the command


def test_import_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 3):
        write_dictionary_learning(tmp_path / "repo" / f"layer_{number}")
    out = tmp_path / "out"
    assert main(["saes", "import", str(tmp_path / "repo"), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{out}/layer_00.safetensors  layer 0, 3 x 2, batchtopk, k 2",
        f"{out}/layer_02.safetensors  layer 2, 3 x 2, batchtopk, k 2",
    ]
    assert_codes(SparseAutoencoder.load(out / "layer_02.safetensors"), [[1.5, 1, 2], [0, 0, 0]])
    assert main(["saes", "import", str(tmp_path / "repo"), "--out", str(out)]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    args = ["saes", "import", str(tmp_path / "repo"), "--out", str(out), "--overwrite", "--half", "--json"]
    assert main(args) == 0
    records = json.loads(capsys.readouterr().out)
    assert [(record["layer"], record["exact"]) for record in records] == [(0, False), (2, False)]
    with safe_open(out / "layer_00.safetensors", "pt") as file:
        assert file.get_tensor("W_enc").dtype == torch.float16


def test_import_for_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny_whisper()
    checkpoint = save_checkpoint(model, tmp_path / "tiny.pt")
    sae = SparseAutoencoder(64, 8, activation="topk", k=2)
    save_sparsify(sae, tmp_path / "layers.3")
    out = tmp_path / "out"
    args = ["saes", "import", str(tmp_path / "layers.3"), "--out", str(out), "--model", str(checkpoint)]
    assert main(args) == 0
    metadata = SparseAutoencoder.load(out / "layer_03.safetensors").metadata
    assert metadata["encoder_sha256"] == encoder_sha256(model) and metadata["base_model"] == "tiny"
    capsys.readouterr()
    assert main([*args, "--layer", "4", "--overwrite"]) == 1
    assert "layer 4 counted from 0; tiny has d_model 64 and 4 layers" in capsys.readouterr().err


def save_for_tiny_whisper(folder: Path) -> SparseAutoencoder:
    """AudioSAE's layout: BatchTopK without threshold for layer 1 of the tiny Whisper."""
    torch.manual_seed(0)
    sae = SparseAutoencoder(64, 32, activation="batchtopk", k=4, layer=1)
    state = {
        "encoder.weight": sae.W_enc.detach(),
        "encoder.bias": torch.zeros(32),
        "decoder.weight": sae.W_dec.detach().T.contiguous(),
        "b_dec": torch.zeros(64),
    }
    folder.mkdir()
    torch.save(state, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE", "k": 4}}))
    return sae


def test_missing_threshold_is_set_on_audio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_tiny_whisper()
    checkpoint = save_checkpoint(model, tmp_path / "tiny.pt")
    own = save_for_tiny_whisper(tmp_path / "layer_2")
    (tmp_path / "audio").mkdir()
    clips = [tone(1.0, frequency=300.0), tone(2.0, frequency=500.0)]
    for number, clip in enumerate(clips):
        write_wav(tmp_path / "audio" / f"{number}.wav", clip)
    (tmp_path / "audio" / "broken.wav").write_bytes(b"nothing")
    args = ["saes", "import", str(tmp_path / "layer_2"), "--out", str(tmp_path / "out")]
    model_and_audio = ["--model", str(checkpoint), "--audio", str(tmp_path / "audio")]
    assert main([*args, *model_and_audio]) == 0
    captured = capsys.readouterr()
    assert "skipped: " in captured.err and "not calibrated" not in captured.out
    sae = SparseAutoencoder.load(tmp_path / "out" / "layer_01.safetensors")
    record = sae.metadata["theta_calibration"]
    assert "theta_missing" not in sae.metadata
    assert (record["target_l0"], record["frames"], record["clips"]) == (4, 150, 2)  # 50 frames a second
    x = torch.cat([frames[0] for frames in WhisperEncoder(model).encode(clips, [1])])
    with torch.no_grad():
        l0 = sae.encode(x).count_nonzero(dim=1).double().mean()
        assert own.encode(x).count_nonzero(dim=1).double().mean() > 8  # what theta 0 gives
    assert l0 == pytest.approx(4, abs=0.05) and record["reached_l0"] == pytest.approx(4, abs=0.05)
    for file in ("0.wav", "1.wav"):
        (tmp_path / "audio" / file).unlink()
    assert main([*args, *model_and_audio, "--overwrite"]) == 1
    assert "none of 1 audio files can be used" in capsys.readouterr().err
    assert main([*args, "--audio", "a.wav"]) == 2
    assert "--audio is given without --model" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["saes", "--help"], ["saes", "import", "--help"], ["saes", "export"]])
def test_start_up_is_light(args: list[str]) -> None:
    code = (
        f"import sys\nfrom whisper_steer.cli import main\nmain({args!r})\n"
        "print('LOADED', sorted({'torch', 'whisper', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-1] == "LOADED []", done.stderr


def test_import_refuses_two_of_a_layer(tmp_path: Path) -> None:
    for run in ("a", "b"):
        write_sparsify(tmp_path / run / "layers.1")
    with pytest.raises(UsageError, match="several SAEs for layer 1: pass one of"):
        import_saes(tmp_path, tmp_path / "out")
    with pytest.raises(MismatchError, match="d_model 2, layer 1"):
        model = {"base_model": "base", "d_model": 512, "n_layers": 6, "encoder_sha256": ""}
        import_saes(tmp_path / "a", tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()


def test_export_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saes = tmp_path / "saes"
    for layer in (0, 5):
        random_sae("batchtopk", 5, theta=1.0, layer=layer).save(saes / f"layer_{layer:02d}.safetensors")
    out = tmp_path / "out"
    assert main(["saes", "export", str(saes), "--format", "saelens", "--out", str(out)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert [sae.layer for sae in find_foreign(out)] == [0, 5]
    args = ["saes", "export", str(saes / "layer_05.safetensors"), "--format", "sparsify"]
    assert main([*args, "--out", str(tmp_path / "b"), "--json"]) == 0
    captured = capsys.readouterr()
    assert "codes will differ" in captured.err
    (record,) = json.loads(captured.out)
    assert (record["layer"], record["k"], record["exact"]) == (5, 5, False)
    assert load_foreign(tmp_path / "b").layer == 5
    with pytest.raises(UsageError, match="format is 'onnx': expected one of saelens, sparsify"):
        export_saes(saes, out, "onnx")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["import", "nowhere", "--out", "x"], 1, "nowhere does not exist"),
        (["import"], 2, "PATH"),
        (["export", "a.safetensors", "--format", "saelens", "--out", "x"], 1, "a.safetensors does not exist"),
        (["import", "a", "--out", "x", "--layer", "-1"], 2, "--layer"),
    ],
)
def test_wrong_use(args: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["saes", *args]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert words in captured.err

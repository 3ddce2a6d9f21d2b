import json
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from calibration_tools import FakeClip, clips, make_terse_whisper

from calibration import export
from calibration.adapters import WhisperEncoder
from calibration.export import export_saes, finite, print_report
from calibration.held_out import HeldOut, HeldOutSettings, balanced, collect_halves, layer_groups
from calibration.sae_quality import domain_quality
from whisper_steer.errors import AudioError, FormatError, UsageError
from whisper_steer.fileformat import encoder_sha256
from whisper_steer.sae import SparseAutoencoder

QUICK = {"wer_clips": 0, "progress": False}


@dataclass(frozen=True)
class FakeTrained:
    layer: int
    name: str = ""
    k: int | None = 4
    activation: str = "batchtopk"
    recipe: dict = field(default_factory=lambda: {"seed": 0, "lr": 2e-4})

    def export(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.layer)
            sae = SparseAutoencoder(32, 64, activation=self.activation, k=self.k, layer=self.layer)
        with torch.no_grad():
            sae.theta.fill_(0.25)
        return sae.eval().requires_grad_(False)


class Silent:
    """An encoder without a Whisper inside: random but reproducible frames, 50 per second."""

    name, family, n_layers, d_model = "silent", "hubert", 3, 32
    frame_samples, max_samples = 320, 16_000 * 2
    device = torch.device("cpu")

    def __init__(self):
        self.calls = []

    def metadata(self):
        return {"base_model": "silent", "encoder_sha256": "0" * 64, "d_model": 32, "n_layers": 3}

    def encode(self, audios, layers):
        self.calls.append((len(audios), list(layers)))
        result = []
        for audio in audios:
            frames = len(audio) // 320
            generator = torch.Generator().manual_seed(int(abs(audio).sum() * 1000) % 2**31)
            every = torch.randn(self.n_layers, frames, 32, generator=generator)
            result.append(every[list(layers)])
        return result


def domains(speech=6, music=6, sounds=6, seconds=2.0):
    sets = {
        "speech": clips(speech, 0, seconds=seconds)["speech"],
        "music": [FakeClip(f"music/{i}", "nonspeech", seconds) for i in range(music)],
        "sounds": [FakeClip(f"sounds/{i}", "nonspeech", seconds) for i in range(sounds)],
    }
    return {name: chosen for name, chosen in sets.items() if chosen}


def test_files_and_report_of_a_sweep(tmp_path):
    trained = [FakeTrained(layer, name, k) for name, k in (("k4", 4), ("k8", 8)) for layer in (0, 2)]
    report = export_saes(Silent(), trained, domains(), tmp_path, **QUICK)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert [(row["name"], row["layer"]) for row in report["saes"]] == [
        ("k4", 0), ("k4", 2), ("k8", 0), ("k8", 2),
    ]  # fmt: skip
    assert report["held_out"] == {"speech": 6, "music": 6, "sounds": 6}
    for one, row in zip(trained, report["saes"], strict=True):
        assert row["file"] == f"{one.name}/layer_{one.layer:02d}.safetensors"
        sae = SparseAutoencoder.load(tmp_path / row["file"])
        assert (sae.layer, sae.k, sae.activation) == (one.layer, one.k, "batchtopk")
        assert sae.metadata["rates"] == row
        assert sae.metadata["base_model"] == "silent" and sae.metadata["recipe"] == one.recipe
        record = sae.metadata["theta_calibration"]
        assert record["target_l0"] == one.k
        assert record["reached_l0"] == pytest.approx(one.k, abs=0.01)
        assert record["running_estimate"] == pytest.approx(0.25)
        assert record["theta"] == row["theta"] == pytest.approx(float(sae.theta[0]))
        # three clips of 100 frames each: as much speech as music and sounds together
        assert record["domains"] == {"speech": 300, "music": 150, "sounds": 150}
        assert record["frames"] == 600 and record["clips"] == {"speech": 3, "music": 3, "sounds": 3}
        assert [row["domains"][name]["frames"] for name in ("speech", "music", "sounds")] == [300] * 3
        assert row["expansion"] == 2 and "recognition" not in row


def test_measured_with_the_files_weights_on_the_other_half(tmp_path):
    encoder, sets = Silent(), domains()
    (row,) = export_saes(encoder, [FakeTrained(1)], sets, tmp_path, **QUICK)["saes"]
    sae = SparseAutoencoder.load(tmp_path / "layer_01.safetensors")
    frames = [
        encoder.encode([clip.load()], [1])[0][0] for clip in HeldOut(sets, HeldOutSettings()).half("music", 1)
    ]
    again = domain_quality(sae, torch.cat(frames), scale=row["input_scale"])
    for name in ("frames", "l0", "fvu", "alive", "l2"):
        assert getattr(again, name) == pytest.approx(row["domains"]["music"][name]), name


def test_float32_files_and_other_activations(tmp_path):
    trained = [FakeTrained(0, "topk", 3, "topk"), FakeTrained(0, "relu", None, "relu")]
    report = export_saes(Silent(), trained, domains(), tmp_path, dtype=torch.float32, **QUICK)
    topk, relu = report["saes"]
    assert topk["theta_calibration"] is None and relu["theta_calibration"] is None
    assert topk["l0"] == pytest.approx(3) and relu["k"] is None
    assert torch.equal(
        SparseAutoencoder.load(tmp_path / "topk/layer_00.safetensors").W_enc, trained[0].export().W_enc
    )


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    trained = [FakeTrained(layer) for layer in (0, 1, 2)]
    whole = export_saes(Silent(), trained, domains(), tmp_path / "whole", **QUICK)
    measure, count = export.measure_sae, []

    def stop(*args, **kwargs):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(export, "measure_sae", stop)
    with pytest.raises(KeyboardInterrupt):
        export_saes(Silent(), trained, domains(), tmp_path / "parts", **QUICK)
    assert not (tmp_path / "parts/report.json").exists()
    encoder = Silent()
    assert export_saes(encoder, trained, domains(), tmp_path / "parts", **QUICK) == whole
    assert {tuple(layers) for _, layers in encoder.calls} == {(2,)}  # the other two were not measured again
    assert len(count) == 4
    # other clips, other settings or another recipe are measured anew
    export_saes(Silent(), trained, domains(music=7), tmp_path / "parts", **QUICK)
    assert len(count) == 7
    export_saes(Silent(), trained, domains(music=7), tmp_path / "parts", max_frames=100, **QUICK)
    assert len(count) == 10


def test_frames_are_spread_over_clips_and_layers_grouped_by_memory():
    encoder = Silent()
    held = HeldOut(domains(speech=8, music=0, sounds=0), HeldOutSettings(max_frames=100, max_clips=3))
    first, second = collect_halves(encoder, held, [0, 2])
    assert first["speech"].shape == second["speech"].shape == (2, 99, 32)  # 3 of 4 clips, 33 frames of each
    audio = held.half("speech", 0)[0].load()
    whole = encoder.encode([audio], [0, 2])[0]
    assert torch.equal(first["speech"][:, 0], whole[:, 0])
    assert torch.equal(first["speech"][:, 32], whole[:, 99])
    per_layer = 4 * 198 * 32
    assert list(layer_groups([0, 1, 2], 32, held, 2 * per_layer, progress=False)) == [[0, 1], [2]]
    assert list(layer_groups([0, 1], 32, held, 1, progress=False)) == [[0], [1]]


def test_halves_are_disjoint_and_both_hear_every_variant():
    variants = ["clean", "noisy", "quiet", "whispered"]
    held = HeldOut({"speech": [FakeClip(f"{i}#{v}", "speech", 1.0) for i in range(8) for v in variants]},
                   HeldOutSettings())  # fmt: skip
    halves = [[clip.id for clip in held.half("speech", part)] for part in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(clip.id for clip in held.domains["speech"])
    for half in halves:
        assert [sum(name.endswith(variant) for name in half) for variant in variants] == [4] * 4


def test_little_memory_changes_nothing_but_the_passes(tmp_path, capsys):
    trained = [FakeTrained(layer) for layer in (0, 1, 2)]
    one, many = Silent(), Silent()
    at_once = export_saes(one, trained, domains(), tmp_path / "a", **QUICK)
    piecewise = export_saes(many, trained, domains(), tmp_path / "b", memory=1, wer_clips=0)
    assert piecewise == at_once
    assert len(many.calls) == 3 * len(one.calls) == 3 * 6
    assert "1 layers at a time, 3 passes" in capsys.readouterr().err


def test_long_clips_are_cut_to_what_the_model_sees(tmp_path):
    (row,) = export_saes(Silent(), [FakeTrained(0)], domains(seconds=3.0), tmp_path, **QUICK)["saes"]
    assert row["domains"]["speech"]["frames"] == 300  # three clips of the encoder's 2 s


@dataclass(frozen=True)
class Broken:
    id: str

    def load(self):
        raise AudioError(f"{self.id} is not audio")


@dataclass(frozen=True)
class Empty:
    id: str
    dataset: str = "silence"

    def load(self):
        return np.zeros(0, np.float32)


def test_unreadable_clips_are_left_out_and_listed(tmp_path):
    sets = domains()
    sets["sounds"] = [*sets["sounds"], Broken("a"), Broken("b"), Empty("c")]
    report = export_saes(Silent(), [FakeTrained(0)], sets, tmp_path, **QUICK)
    expected = {"a": "a is not audio", "b": "b is not audio", "silence/c": "no samples"}
    assert report["skipped"] == expected
    again = export_saes(Silent(), [FakeTrained(0)], sets, tmp_path, **QUICK)
    assert again["skipped"] == expected  # though no audio was read
    with pytest.raises(UsageError, match=r"no held-out clip could be read \(a is not audio\)"):
        broken = {"sounds": [Broken("a"), Broken("b")]}
        export_saes(Silent(), [FakeTrained(0)], broken, tmp_path / "x", **QUICK)


def test_equal_shares_of_speech_and_the_rest():
    def sizes(**frames):
        return {
            name: len(x) for name, x in balanced({n: torch.zeros(f, 2) for n, f in frames.items()}).items()
        }

    assert sizes(speech=100, music=100, sounds=100) == {"speech": 100, "music": 50, "sounds": 50}
    assert sizes(speech=100, music=10, sounds=200) == {"speech": 100, "music": 10, "sounds": 90}
    assert sizes(speech=100, music=10, sounds=20) == {"speech": 30, "music": 10, "sounds": 20}
    assert sizes(speech=7, music=0, sounds=0) == {"speech": 7}
    assert sizes(speech=0, music=5, sounds=3) == {"music": 5, "sounds": 3}


def test_what_whisper_hears(tmp_path, capsys):
    model = make_terse_whisper(1)
    report = export_saes(
        WhisperEncoder(model), [FakeTrained(1)], domains(4, 2, 2), tmp_path, wer_clips=2, progress=False
    )
    assert report["encoder_sha256"] == encoder_sha256(model)
    heard = report["saes"][0]["recognition"]
    assert heard["speech"]["all"]["clips"] == 2 and heard["nonspeech"]["clips"] == 2
    assert heard["speech"]["all"]["tokens"] == 6  # "hello world" and the end, twice
    print_report(report)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "WER" in lines[1] and "text-FPR" in lines[1] and "music" in lines[2]


def test_errors_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="no SAE to export"):
        export_saes(Silent(), [], domains(), tmp_path, **QUICK)
    with pytest.raises(UsageError, match="two SAEs are called 'x' at layer 1"):
        export_saes(Silent(), [FakeTrained(1, "x"), FakeTrained(1, "x")], domains(), tmp_path, **QUICK)
    with pytest.raises(UsageError, match="no held-out audio"):
        export_saes(Silent(), [FakeTrained(1)], {"speech": []}, tmp_path, **QUICK)
    with pytest.raises(UsageError, match="max_frames is 0"):
        export_saes(Silent(), [FakeTrained(1)], domains(), tmp_path, max_frames=0, **QUICK)
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="cannot write"):
        export_saes(Silent(), [FakeTrained(1)], domains(), tmp_path / "file", **QUICK)


def test_numbers_that_json_lacks_become_null():
    assert finite({"a": float("nan"), "b": [1.0, float("inf")], 3: (1,)}) == {
        "a": None,
        "b": [1.0, None],
        "3": [1],
    }

"""The training command as a user gives it: a folder of recordings in, measured SAEs out."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from audio_files import write_wav
from calibration_tools import make_terse_whisper, sound
from safetensors.torch import load_file

from calibration.engine import TrainingRun
from calibration.frame_source import SourceSpec, build_mixture, parse_layers, source_of
from calibration.frames import StreamingFrames
from calibration.mixture import DOMAINS, Mixture
from calibration.plan import WindowPlan
from calibration.recipe import TrainConfig
from calibration.train import available_memory, config_of, main, parser, train
from calibration.write_through import WriteThroughCache
from whisper_steer.errors import AudioError, UsageError, WhisperSteerError
from whisper_steer.sae import SparseAutoencoder

REPO = Path(__file__).parent.parent
FLAGS = ["--k", "3", "--expansion", "2", "--batch", "64", "--steps", "9", "--buffer-batches", "4",
         "--lr", "0.003", "--warm-up", "2", "--wer-clips", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model file, and a folder of recordings with transcripts; one file is damaged."""
    folder = tmp_path_factory.mktemp("world")
    model = make_terse_whisper(1)
    torch.save({"dims": asdict(model.dims), "model_state_dict": model.state_dict()}, folder / "tiny.pt")
    (folder / "audio").mkdir()
    for number in range(24):
        write_wav(folder / "audio" / f"{number:02d}.wav", sound(f"clip {number}", 1.5, speech=True))
        (folder / "audio" / f"{number:02d}.txt").write_text("hello world\n")
    (folder / "audio" / "damaged.wav").write_bytes(b"RIFF nonsense")
    return folder


def flags(world, out, *more):
    return [
        "--model",
        str(world / "tiny.pt"),
        "--audio",
        str(world / "audio"),
        "--out",
        str(out),
        *FLAGS,
        *more,
    ]


def files(out):
    return {
        path.relative_to(out).as_posix(): load_file(path)
        for path in sorted(out.rglob("layer_*.safetensors"))
        if "checkpoints" not in path.parts
    }


def assert_same_saes(found, expected, exact=True):
    assert set(found) == set(expected) and expected
    for name, tensors in expected.items():
        for key, value in tensors.items():
            if exact:
                assert torch.equal(found[name][key], value), (name, key)
            else:
                torch.testing.assert_close(found[name][key].float(), value.float(), rtol=2e-3, atol=2e-3)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("saes")
    main(flags(world, out))
    return out


def test_a_folder_of_recordings_becomes_measured_saes(world, trained):
    report = json.loads((trained / "report.json").read_text())
    assert [(row["layer"], row["k"], row["n_latents"]) for row in report["saes"]] == [(0, 3, 64), (1, 3, 64)]
    for row in report["saes"]:
        assert row["domains"]["speech"]["frames"] > 100 and 0 < row["domains"]["speech"]["fvu"] < 2
        assert row["recipe"]["steps"] == 9 and row["recipe"]["k"] == 3
    sae = SparseAutoencoder.load(trained / "layer_01.safetensors")
    assert sae.metadata["theta_calibration"]["target_l0"] == 3
    assert sae.metadata["input_scale"] > 0 and len(sae.metadata["input_mean"]) == 32
    assert sae.metadata["base_model"] == "tiny" and sae.metadata["variant"] == "batchtopk"


def test_unreadable_files_are_listed_once(trained):
    lines = (
        (trained / "skipped.jsonl").read_text().splitlines() if (trained / "skipped.jsonl").exists() else []
    )
    held_out = json.loads((trained / "report.json").read_text())["skipped"]
    named = [json.loads(line)["path"] for line in lines] + list(held_out)
    assert len(named) == 1 and "damaged.wav" in named[0]


def test_the_same_command_again_changes_nothing(world, trained, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("layer_*.safetensors")}
    main(flags(world, trained))
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("layer_*.safetensors")} == before
    assert "going on from the checkpoint of step 9" in capsys.readouterr().err


def test_a_grid_leaves_a_table_and_figures(world, tmp_path, capsys):
    main(flags(world, tmp_path, "--k", "2,4", "--seed", "0,1", "--layers", "1", "--wer-clips", "0"))
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("layer_*.safetensors")}
    names = {name for name in names if not name.startswith("checkpoints")}
    variants = [f"batchtopk-k{k}-x2-seed{seed}" for k in (2, 4) for seed in (0, 1)]
    assert names == {f"{variant}/layer_01.safetensors" for variant in variants}
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 5
    assert len(list(tmp_path.glob("*.png"))) >= 3
    captured = capsys.readouterr()
    assert "operating point" in captured.out and "4 SAEs in" in captured.out
    assert "frames: streamed from the audio" in captured.err and "memory:" in captured.err


def test_a_cache_changes_nothing_but_the_encoding(world, trained, tmp_path, monkeypatch):
    main(flags(world, tmp_path / "first", "--cache", str(tmp_path / "frames")))
    assert_same_saes(files(tmp_path / "first"), files(trained))

    def never(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(StreamingFrames, "load", never)
    main(flags(world, tmp_path / "second", "--cache", str(tmp_path / "frames")))
    assert_same_saes(files(tmp_path / "second"), files(trained))


def test_encoding_beside_or_between_gives_the_same(world, trained, tmp_path):
    main(flags(world, tmp_path, "--no-background", "--wer-clips", "0"))
    assert_same_saes(files(tmp_path), files(trained))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "0"], r"k is \[0\]"),
        (["--layers", "7"], "layer 7 does not exist"),
        (["--audio", "/nowhere"], "nowhere"),
        (["--steps", "10"], r"config\.steps: 9, now 10"),
        (["--data-seed", "3"], "data_seed: 0, now 3"),
        (
            ["--buffer-batches", "100000000", "--steps", "100000000", "--out", "elsewhere"],
            "memory are needed",
        ),
    ],
)
def test_mistakes_are_one_line(world, trained, more, message):
    with pytest.raises(WhisperSteerError, match=message) as caught:
        main(flags(world, trained, *more))
    assert "\n" not in str(caught.value)


def test_without_audio_the_way_out_is_named(world):
    with pytest.raises(UsageError, match="give --audio FOLDER"):
        main(["--model", str(world / "tiny.pt")])


def test_flags_win_over_the_mixture_and_the_mixture_over_the_defaults(tmp_path):
    mixture = Mixture.of([Recording("a"), Recording("b")])
    mixture.training.update({"k": [25, 50], "lr": 0.1, "steps": 77})
    config = config_of(parser().parse_args(["--k", "9", "--data-seed", "4"]), mixture, 2)
    assert (config.k, config.lr, config.steps, config.data_seed, config.shards) == ((9,), 0.1, 77, 4, 2)
    assert config.batch == TrainConfig().batch
    mixture.training["steps_per_epoch"] = 3
    with pytest.raises(UsageError, match="settings of clips: steps_per_epoch is unknown"):
        config_of(parser().parse_args([]), mixture, 1)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not say how much is free")
def test_available_memory_is_read_from_the_system():
    available = available_memory()
    assert available is not None and 10**8 < available < 10**14


# ---------- frames from audio


class Recording:
    kind = "speech"

    def __init__(self, name, seconds=0.7):
        self.id, self.seconds = name, seconds

    def load(self):
        return sound(self.id, self.seconds, speech=True)


class FakeEncoder:
    """Every frame's vector is its number in the window."""

    name, n_layers, d_model, frame_samples, max_samples = "fake", 3, 2, 320, 480_000

    def metadata(self):
        return {"base_model": "fake"}

    def encode(self, audios, layers):
        lengths = [len(audio) // 320 for audio in audios]
        return [
            torch.arange(n, dtype=torch.float32)[None, :, None].expand(len(layers), n, 2)
            + 100.0 * torch.tensor(layers)[:, None, None]
            for n in lengths
        ]


def streaming(unit_frames=100, dtype=torch.float16, clips=None, encoder=None):
    plan = WindowPlan(Mixture.of(clips or [Recording("a"), Recording("b")]), seed=3, packed_share=0)
    return StreamingFrames(
        encoder or FakeEncoder(), plan, layers=[0, 2], unit_frames=unit_frames, dtype=dtype, batch=2
    )


def test_units_hold_true_frames_only_and_depend_on_round_and_shard():
    source = streaming()
    unit = source.load(0, 0)
    assert unit.data.shape == (2, 100, 2) and unit.data.dtype == torch.float16
    expected = torch.cat([torch.arange(35)] * 3)[:100].half()  # clips of 0.7 s: 35 frames each
    assert torch.equal(unit.data[0, :, 0], expected) and torch.equal(unit.data[1, :, 0], expected + 200)
    assert unit.domains.tolist() == [DOMAINS.index("speech")] * 100
    again = streaming().load(0, 0)
    assert torch.equal(again.data, unit.data)
    assert source.identity() == streaming().identity() != streaming(unit_frames=50).identity()


def test_activations_that_overflow_are_named():
    class Loud(FakeEncoder):
        def encode(self, audios, layers):
            return [frames * 1e6 for frames in super().encode(audios, layers)]

    with pytest.raises(AudioError, match="use --dtype bfloat16"):
        streaming(encoder=Loud()).load(0, 0)
    assert streaming(encoder=Loud(), dtype=torch.bfloat16).load(0, 0).data.max() > 1e7
    with pytest.raises(UsageError, match="expected one of float16"):
        streaming(dtype=torch.int8)


def test_write_through_reads_what_it_wrote(tmp_path):
    source = streaming()
    cached = WriteThroughCache(source, tmp_path)
    assert cached.identity() == source.identity()
    first = cached.load(1, 0)
    assert torch.equal(first.data, source.load(1, 0).data)
    source.load = None  # type: ignore[method-assign]
    assert torch.equal(cached.load(1, 0).data, first.data)
    with pytest.raises(UsageError, match="other settings"):
        WriteThroughCache(streaming(unit_frames=50), tmp_path)


def test_the_same_spec_gives_the_same_frames_anywhere(world):
    spec = SourceSpec(model=str(world / "tiny.pt"), audio=world / "audio", unit_frames=40)
    from calibration.adapters import load_encoder

    mixture = build_mixture(spec)
    assert 1 <= sum(map(len, mixture.held_out().values())) <= 12
    source = source_of(spec, load_encoder(spec.model), mixture)
    assert source.layers == (0, 1) and np.isfinite(source.load(0, 0).data.float().numpy()).all()


# ---------- really killed, really distributed


def command(world, out, *more):
    return [sys.executable, "-m", "calibration.train", *flags(world, out, "--wer-clips", "0", *more)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(REPO)}


def kill_soon_after(process, marker: bytes, seconds: float) -> None:
    """Kill the process `seconds` after its stderr shows the marker (or let it end, if it never does): the
    moments are those of the run, however fast the machine is."""
    seen = b""
    while marker not in seen and (piece := os.read(process.stderr.fileno(), 4096)):
        seen += piece
    if marker in seen:
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_kill_minus_nine_at_random_moments_of_the_command(world, trained, tmp_path):
    rng, killed = random.Random(5), 0
    # the first kill comes before any step, the others where the run happens to be by then
    markers = [b"0/9", b"drawn", b"memory", b"step/s", b"round", b"measuring"]
    for attempt in range(20):
        process = subprocess.Popen(
            command(world, tmp_path, "--checkpoint-minutes", "0"),
            cwd=REPO,
            env=environment(),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        if attempt < len(markers):
            kill_soon_after(process, markers[attempt], rng.uniform(0.0, 0.5) if attempt else 0.0)
        process.communicate(timeout=300)
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert killed >= 1 and process.returncode == 0
    assert_same_saes(files(tmp_path), files(trained))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["gradients", "saes"])
def test_torchrun_gives_what_one_process_gives(world, tmp_path, split):
    main(flags(world, tmp_path / "one", "--shards", "2", "--wer-clips", "0"))
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=localhost:0", *command(world, tmp_path / "two", "--split", split)[1:]]
    said = ""
    for _ in range(3):  # see test_calibration_engine: gloo may abort a process; the run goes on
        started = [sys.executable, *torchrun]
        done = subprocess.run(
            started, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=300
        )
        said += done.stderr
        if done.returncode == 0:
            break
    assert done.returncode == 0, said
    assert_same_saes(files(tmp_path / "two"), files(tmp_path / "one"), exact=split == "saes")


def test_training_is_importable_without_starting():
    assert callable(train) and callable(TrainingRun)


def test_layers_are_numbers_or_all():
    assert parse_layers("all") is None and parse_layers("0,3,0") == (0, 3)
    with pytest.raises(UsageError, match="expected 'all' or 0-based numbers"):
        parse_layers("first")

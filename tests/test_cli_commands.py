"""The other commands, the start-up of all of them, and the comparison behind `compare`."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from audio_files import tone, write_wav
from conftest import make_tiny_whisper
from rich.console import Console
from steering_files import brief_whisper, constant_steering, save_checkpoint, separating_steering
from test_zoo import put_bundled, shelves, small  # noqa: F401
from whisper.model import Whisper

import whisper_steer
from whisper_steer.attach import handles_of, steer
from whisper_steer.cli import main
from whisper_steer.cli.compare import show
from whisper_steer.cli.output import print_json
from whisper_steer.comparison import Comparison, Row, ScoredText, compare, diff_words
from whisper_steer.errors import MismatchError, UsageError
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.steering import LatentEdit, Shift, Steering
from whisper_steer.transcribe import Suppressed, Transcript

FAST = {"temperature": 0.0, "sample_len": 6, "without_timestamps": True}


# ---------- start-up


@pytest.mark.parametrize(
    "args", [["--help"], ["transcribe", "--help"], ["--version"], ["compare", "-h"], ["no-such"]]
)
def test_start_up_is_light(args: list[str]) -> None:
    """--help must answer in a third of a second: none of the heavy packages may be imported for it."""
    code = (
        "import sys\nfrom whisper_steer.cli import main\n"
        f"code = main({args!r})\n"
        "heavy = {'torch', 'whisper', 'numpy', 'av', 'safetensors', 'rich', 'tqdm', 'scipy'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-1] == f"LOADED [] {2 if args == ['no-such'] else 0}", done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"whisper-steer {whisper_steer.__version__}\n"


def test_help_says_what_the_default_output_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transcribe", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "The transcript goes to stdout" in text
    assert "Files are written only when --output-dir or --output-format is given" in text
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("transcribe", "compare", "models", "inspect"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["sing"], "No such command 'sing'"),
        (["inspect"], "PATH"),
        (["compare"], "FILE"),
        (["compare", "a.wav", "--alpha", "abc"], "'abc': expected a number >= 0"),
        (["models", "extra"], "extra"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert words in captured.err and "--help)" in captured.err


def test_without_arguments_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code = main([])
    captured = capsys.readouterr()
    assert code in (0, 2) and "Commands:" in captured.out + captured.err


def test_json_is_valid_for_every_reader(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.5], "b": (float("inf"),), "c": "ä"})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None], "c": "ä"}


# ---------- compare


def test_diff_ignores_case_and_punctuation() -> None:
    plain = "Thanks for watching! Hello, world - .".split()
    steered = "hello World new .".split()
    assert diff_words(plain, steered) == (
        [True, True, True, False, False, True, False],
        [False, False, True, False],
    )
    assert diff_words([], []) == ([], [])
    assert diff_words(["a"], []) == ([True], [])


@pytest.fixture
def model(tiny_whisper: Whisper) -> Whisper:
    tiny_whisper.name = "tiny"
    return tiny_whisper


@pytest.fixture
def two_windows() -> np.ndarray:
    """40 s: a tone, then silence in the second window."""
    samples = np.zeros(40 * 16_000, dtype=np.float32)
    samples[: 8 * 16_000] = tone(8.0)
    return samples


def test_compare(model: Whisper, two_windows: np.ndarray) -> None:
    steering = separating_steering(model, two_windows, speech=0, silence=1)
    seen: list[float] = []
    comparison = compare(
        two_windows,
        model,
        steering=steering,
        decode_withheld=True,
        progress=lambda done, total: seen.append(done / total),
        **FAST,
    )
    assert handles_of(model) == ()
    assert seen == pytest.approx([0.375, 0.5, 0.875, 1.0])
    first, second = comparison.rows
    assert (first.start, second.start) == (0.0, 30.0)
    assert len(first.plain) == len(first.steered) == 1 and first.withheld == ()
    assert first.plain[0].text == first.steered[0].text
    assert not any(changed for _, changed in first.plain[0].words)
    assert (second.steered, len(second.withheld)) == ((), 1)
    assert all(changed for _, changed in second.plain[0].words)
    assert list(comparison.removed) == second.plain[0].text.split() and comparison.added == ()
    assert first.plain[0].gate is not None and first.plain[0].gate < 0.5
    assert second.plain[0].gate == pytest.approx(second.withheld[0].score, abs=1e-5)
    value = comparison.to_dict()
    assert json.loads(json.dumps(value)) == value
    assert value["removed"] == list(comparison.removed) and value["steering"] == "separating"
    assert value["rows"][1]["withheld"][0]["text"].split() == list(comparison.removed)


def test_compare_refuses(model: Whisper, two_windows: np.ndarray) -> None:
    steering = constant_steering(model, -1.0)
    with steer(model, steering=steering), pytest.raises(UsageError, match="needs a plain model"):
        compare(two_windows, model, steering=steering)
    other = make_tiny_whisper(9)
    with pytest.raises(MismatchError):
        compare(two_windows, model, steering=constant_steering(other, -1.0))
    with pytest.raises(UsageError):
        compare(two_windows, model, steering=steering, alpha=-1)


def shown(comparison: Comparison, *, colour: bool) -> str:
    file = io.StringIO()
    system = "standard" if colour else None
    show(comparison, Console(file=file, width=100, force_terminal=colour, color_system=system))  # type: ignore[arg-type]
    return file.getvalue()


def test_compare_is_shown_with_marks_and_scores() -> None:
    part = ScoredText(0.0, 2.5, (("Oh", True), ("thanks", True), ("all.", False)), 0.98, -0.31, 0.12)
    after = ScoredText(0.0, 2.5, (("all.", False), ("new", True)), 0.97, -0.5, 0.12)
    lonely = ScoredText(30.0, 40.0, (("you", True),), 0.9, -0.2, 0.99)
    window = Suppressed(30.0, 40.0, " you", 0.99, 0.9, -0.2)
    transcript = Transcript("", (), "en", 40.0, (window,), "tiny", "test", 0.5)
    rows = (
        Row(0.0, 2.5, (part,), (after,), ()),
        Row(30.0, 40.0, (lonely,), (), (window,)),
        Row(50.0, 60.0, (), (), (window,)),
    )
    comparison = Comparison(transcript, transcript, rows)
    plain = shown(comparison, colour=False)
    assert "\x1b[" not in plain
    assert "[-Oh thanks-] all." in plain and "all. {+new+}" in plain and "[-you-]" in plain
    assert "no_speech 0.98  logprob -0.31  gate 0.12" in plain and "test, alpha 0.5" in plain
    assert "30.0-40.0 withheld, gate 0.99" in plain and "50.0-60.0" in plain
    assert "3 words removed, 1 new, 1 window withheld" in plain
    coloured = shown(comparison, colour=True)
    assert "\x1b[" in coloured and "[-" not in re.sub(r"\x1b\[[\d;]*m", "", coloured)
    nothing = shown(Comparison(transcript, transcript, ()), colour=False)
    assert "no words in either transcript" in nothing


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = brief_whisper()
    constant_steering(model, 4.0).save(tmp_path / "drop.safetensors")
    save_checkpoint(model, tmp_path / "tiny.pt")
    audio = write_wav(tmp_path / "a.wav", tone(1.0))
    words = ["compare", str(audio), "--model", str(tmp_path / "tiny.pt"), "--beam_size", "None"]
    words += ["--steering", str(tmp_path / "drop.safetensors"), "--json"]
    assert main(words) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["file"] == str(audio) and value["model"] == "tiny" and value["steered"]["text"] == ""
    assert value["removed"] == value["plain"]["text"].split() != []
    assert main(["compare", str(tmp_path / "gone.wav"), *words[2:]]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'gone.wav'}: no such file\n"


# ---------- models, inspect


def test_models(shelves: Path, small: Whisper, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    folder = put_bundled(shelves, "mini.en", small)
    constant_steering(small, 0.0).save(folder / "steering.safetensors")
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MODEL", "STATUS", "D_MODEL", "LAYERS", "STEERINGS", "PATH"]
    assert lines[1].split() == ["mini.en", "bundled", "32", "3", "default", str(folder)]
    assert ["small", "known", "768", "12", "-", "-"] in [line.split() for line in lines]
    assert main(["models", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert entries[0] == {
        "name": "mini.en",
        "status": "bundled",
        "path": str(folder),
        "d_model": 32,
        "layers": 3,
        "steerings": ["default"],
    }


@pytest.fixture
def folder(tmp_path: Path, small: Whisper) -> Path:  # noqa: F811
    put_bundled(tmp_path, "mini.en", small)
    folder = tmp_path / "mini.en"
    sae = SparseAutoencoder(32, 8, k=2, layer=1, metadata={"rates": {"fvu": 0.125}})
    sae.theta.copy_(torch.arange(8.0))
    sae.save(folder / "layer_01.safetensors")
    base = constant_steering(small, -1.0)
    edits = (
        Shift(1, torch.tensor([3.0, 4.0] + [0.0] * 30), 2.5),
        LatentEdit.from_sae(sae, [5, 2], torch.ones(2)),
    )
    Steering(edits, base.gate, base.metadata).save(folder / "steering.safetensors")
    return folder


def test_inspect_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--json"]) == 0
    sae, steering, model = json.loads(capsys.readouterr().out)
    assert (sae["kind"], sae["layer"], sae["d_model"], sae["n_latents"]) == ("sae", 1, 32, 8)
    assert (sae["activation"], sae["k"], sae["rates"]) == ("batchtopk", 2, {"fvu": 0.125})
    assert sae["theta"] == {"min": 0.0, "median": 3.0, "max": 7.0}
    assert steering["kind"] == "steering" and steering["name"] == "test" and steering["d_model"] == 32
    shift, latents = steering["edits"]
    assert shift == {"type": "shift", "layer": 1, "strength": 2.5, "norm": 5.0}
    assert (latents["type"], latents["mode"], latents["latents"], latents["indices"]) == (
        "latents",
        "add",
        2,
        [5, 2],
    )
    assert (steering["gate"]["kind"], steering["gate"]["features"], steering["gate"]["smooth"]) == (
        "raw",
        32,
        1,
    )
    assert (model["kind"], model["name"], model["dims"]["n_audio_layer"]) == ("model", "mini.en", 3)
    assert main(["inspect", str(folder / "steering.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == steering


def test_inspect_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder / "steering.safetensors")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "kind steering",
        "edits 0",
        "type shift",
        "norm 5",
        "indices 5 2",
        "gate",
        "threshold 0",
        "text_fpr 0.25",
    ):
        assert line in lines


@pytest.mark.parametrize("damage", ["missing", "empty_folder", "cut", "text", "foreign", "newer"])
def test_inspect_bad_files(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "steering.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "empty_folder":
        path = folder / "sub"
        path.mkdir()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(2)}, path)
    elif damage == "newer":
        data = path.read_bytes()
        path.write_bytes(data.replace(b'\\"format_version\\": 1', b'\\"format_version\\": 9'))
    assert main(["inspect", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and str(path) in captured.err


def test_inspect_shortens_long_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sae = SparseAutoencoder(4, 8, k=2, metadata={"input_mean": [0.5] * 768})
    sae.save(tmp_path / "layer_00.safetensors")
    assert main(["inspect", str(tmp_path / "layer_00.safetensors")]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("input_mean")]
    assert line.split(maxsplit=1)[1] == "0.5 " * 16 + "... (768 values, all with --json)"

"""whisper-steer transcribe, end to end on a random model: output, files, bad input, exit codes."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import whisper.transcribe  # noqa: F401
import whisper.utils
from audio_files import tone, write_encoded, write_float_wav, write_wav
from conftest import make_tiny_whisper
from steering_files import brief_whisper, constant_steering, save_checkpoint

from whisper_steer.cli import app, main, values

GREEDY = "--beam_size None --best_of None --temperature_increment_on_fallback None".split()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.pt, a.wav, keep.safetensors, which withholds nothing, and drop.safetensors, withholding all."""
    folder = tmp_path_factory.mktemp("shelf")
    model = brief_whisper()
    save_checkpoint(model, folder / "tiny.pt")
    constant_steering(model, -1.0).save(folder / "keep.safetensors")
    constant_steering(model, 4.0).save(folder / "drop.safetensors")
    write_wav(folder / "a.wav", tone(2.0))
    return folder


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        # which backend it is, is said once the model is loaded
        lines = err.splitlines(keepends=True)
        self.backend = [line for line in lines if line.startswith("backend: ")]
        self.code, self.out = code, out
        self.err = "".join(line for line in lines if line not in self.backend)

    @property
    def error(self) -> str:
        """The only line on stderr."""
        assert self.err.count("\n") == 1 and self.err.startswith("error: "), self.err
        return self.err.strip()


@pytest.fixture
def run(shelf: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run_command(*args: object, steering: str | None = "keep", model: bool = True) -> Result:
        words = ["transcribe", *GREEDY, *map(str, args)]
        words += ["--model", str(shelf / "tiny.pt")] if model else []
        words += ["--steering", str(shelf / f"{steering}.safetensors")] if steering else []
        code = main(words)
        return Result(code, *capsys.readouterr())

    return run_command


# ---------- the same options as openai-whisper's command


@pytest.fixture(scope="module")
def whispers_parser() -> argparse.ArgumentParser:
    """openai-whisper builds its parser inside cli(): caught when it begins to parse."""

    class Caught(Exception):
        pass

    def catch(self: argparse.ArgumentParser, *args: object) -> None:
        raise Caught(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        with pytest.raises(Caught) as caught:
            sys.modules["whisper.transcribe"].cli()
    parser = caught.value.args[0]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


@functools.cache
def our_command() -> Any:
    return typer.main.get_command(app).commands["transcribe"]  # type: ignore[attr-defined]


def parsed(*args: str) -> dict[str, Any]:
    """Values of our options, as the command receives them."""
    root = {"token_normalize_func": lambda token: token.replace("_", "-")}
    return dict(our_command().make_context("transcribe", ["a.wav", *args], **root).params)


def test_every_option_of_openai_whisper_with_its_default(whispers_parser: argparse.ArgumentParser) -> None:
    ours = parsed()
    for action in whispers_parser._actions:
        if action.dest in (
            "help",
            "audio",
            "model",
            "device",
        ):  # ours: the bundled model; device is found later
            continue
        assert ours[action.dest] == action.default, action.dest
        assert type(ours[action.dest]) is type(action.default) or action.dest == "temperature"
    assert ours["backend"] is None
    assert (ours["model"], ours["device"]) == ("mini.en", None)
    assert {"model", "device"} <= set(ours)


def test_both_spellings_and_the_same_types(whispers_parser: argparse.ArgumentParser) -> None:
    for action in whispers_parser._actions:
        if action.dest in ("help", "audio", "model"):
            continue
        kind = getattr(action.type, "__name__", "str")
        texts = {
            "str2bool": ["True", "False"],
            "optional_int": ["3", "None"],
            "optional_float": ["0.25", "None"],
            "float": ["0.25"],
            "str": [str(next(iter(action.choices or ["x"])))],
        }[kind]
        for text in texts:
            expected = vars(whispers_parser.parse_args(["a.wav", f"--{action.dest}", text]))[action.dest]
            for spelling in (action.dest, action.dest.replace("_", "-")):
                assert parsed(f"--{spelling}", text)[action.dest] == expected, spelling
                assert parsed(f"--{spelling}={text}")[action.dest] == expected, spelling
    assert parsed("-o", "x", "-f", "srt")["output_dir"] == "x"
    assert parsed("-o", "x", "-f", "srt")["output_format"] == "srt"


def test_value_types_agree_with_whispers() -> None:
    for name, texts in {
        "str2bool": ["True", "False"],
        "optional_int": ["5", "None", "-1"],
        "optional_float": ["0.5", "None", "-1", "1e-3"],
    }.items():
        for text in texts:
            assert getattr(values, name)(text) == getattr(whisper.utils, name)(text)
        with pytest.raises(typer.BadParameter):
            getattr(values, name)("perhaps")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--alpha", "-0.5"], "--alpha.*'-0.5': expected a number >= 0"),
        (["--alpha", "nan"], "--alpha.*'nan': expected a number >= 0"),
        (["--alpha", "inf"], "--alpha.*'inf': expected a number >= 0"),
        (["--alpha", "abc"], "--alpha.*'abc': expected a number >= 0"),
        (["--fp16", "yes"], "--fp16.*expected True or False"),
        (["--beam_size", "many"], "--beam.size.*expected a whole number or None"),
        (["--logprob_threshold", "low"], "--logprob.threshold.*expected a number or None"),
        (["--temperature", "warm"], "--temperature.*'warm': expected a number"),
        (["--output_format", "doc"], "'doc': expected one of txt, vtt, srt, tsv, json, all"),
        (["--task", "sing"], "'sing': expected one of transcribe, translate"),
        (["--language", "klingon"], "--language klingon: expected a code or name"),
        (["--highlight_words", "True"], "--highlight-words requires --word-timestamps True"),
        (["--max_line_width", "40"], "--max-line-width requires --word-timestamps True"),
        (["--temperature", "-1"], "--temperature -1.0: expected a number >= 0"),
        (["--threads", "-2"], "--threads -2"),
        (["--device", "nonsense"], "device 'nonsense' cannot be used here"),
        (["--outputdir", "x"], "No such option: --outputdir"),
        (["--steering", "nothing.safetensors"], "steering nothing.safetensors: no such file"),
        (["--clip_timestamps", "one"], "one"),
        (["--patience", "2.0"], "patience"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run: Any, shelf: Path, args: list[str], words: str) -> None:
    import re

    result = run(shelf / "a.wav", *args, steering=None if "--steering" in args else "keep")
    assert result.code == 2 and result.out == ""
    assert re.search(words, result.error), result.error


def test_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transcribe"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "FILES" in captured.err and captured.err.count("\n") == 1


# ---------- what comes out


def test_prints_timestamped_lines(run: Any, shelf: Path) -> None:
    result = run(shelf / "a.wav")
    assert result.code == 0 and result.err == ""
    line = result.out.splitlines()[0]
    said = line.split("] ")[1].strip()
    assert line.startswith("[00:00.000 --> 00:0") and said
    words = run(shelf / "a.wav", "--verbose", "False").out
    assert words.splitlines()[0] == said


def test_json_is_one_object_per_line(run: Any, shelf: Path, tmp_path: Path) -> None:
    b = write_wav(tmp_path / "b.wav", tone(1.0))
    result = run(shelf / "a.wav", b, tmp_path / "gone.wav", "--json", "--alpha", "0.5")
    assert result.code == 1
    first, second, third = map(json.loads, result.out.splitlines())
    assert first["file"] == str(shelf / "a.wav") and second["file"] == str(b)
    assert (first["duration"], second["duration"]) == (2.0, 1.0)
    assert (first["model"], first["steering"], first["alpha"]) == ("tiny", "test", 0.5)
    assert first["language"] == "en" and first["suppressed"] == []
    assert first["text"] == "".join(segment["text"] for segment in first["segments"])
    assert third == {"file": str(tmp_path / "gone.wav"), "error": f"{tmp_path / 'gone.wav'}: no such file"}
    assert result.error == f"error: {third['error']}"


def test_alpha_0_is_plain_whisper(run: Any, shelf: Path) -> None:
    import whisper

    from whisper_steer.audio import load_audio

    result = run(shelf / "a.wav", "--alpha", "0", "--json", steering=None)
    record = json.loads(result.out)
    model = whisper.load_model(str(shelf / "tiny.pt"), device="cpu")
    expected = whisper.transcribe(
        model, load_audio(shelf / "a.wav"), fp16=False, temperature=0.0, language="en"
    )
    assert record["text"] == expected["text"] and record["steering"] is None and record["alpha"] == 0
    with_file = json.loads(run(shelf / "a.wav", "--alpha", "0", "--json", steering="drop").out)
    assert with_file["text"] == expected["text"] and with_file["suppressed"] == []


def test_withheld_words(run: Any, shelf: Path) -> None:
    result = run(shelf / "a.wav", steering="drop")
    assert (result.code, result.out) == (0, "")
    assert result.err == (
        f"{shelf / 'a.wav'}: 1 window withheld, nobody speaks (2.0 s); "
        "--keep-suppressed decodes and shows them\n"
    )
    result = run(shelf / "a.wav", "--keep-suppressed", steering="drop")
    assert result.out.startswith("[00:00.000 --> 00:02.000] (withheld, nobody speaks: 98.2%)  ")
    assert "--keep-suppressed" not in result.err
    record = json.loads(run(shelf / "a.wav", "--keep-suppressed", "--json", steering="drop").out)
    (window,) = record["suppressed"]
    assert (window["start"], window["end"]) == (0.0, 2.0) and window["score"] == pytest.approx(
        0.982, abs=1e-3
    )
    assert record["segments"][0]["text"].strip() == window["text"].strip() == record["text"].strip() != ""


def test_files_only_when_asked_for(
    run: Any, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(shelf / "a.wav")
    assert list(tmp_path.iterdir()) == []
    result = run(shelf / "a.wav", "--output-format", "srt")  # into ".", as openai-whisper would
    assert [path.name for path in tmp_path.iterdir()] == ["a.srt"] and result.out.startswith("[00:00")
    result = run(shelf / "a.wav", "-o", "new/folder", "--verbose", "False")
    assert result.out == "" and result.code == 0
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["a.json", "a.srt", "a.tsv", "a.txt", "a.vtt"]


def test_files_are_openai_whispers(run: Any, shelf: Path, tmp_path: Path) -> None:
    record = json.loads(run(shelf / "a.wav", "--output_dir", tmp_path, "--json").out)
    written = json.loads((tmp_path / "a.json").read_text())
    assert {key: record[key] for key in written} == written
    assert set(written) == {"text", "segments", "language", "suppressed", "edited"}
    writer = whisper.utils.get_writer("all", str(tmp_path))
    writer({**written}, "expected.wav", {})
    for suffix in ("txt", "vtt", "srt", "tsv", "json"):
        assert (tmp_path / f"a.{suffix}").read_text() == (tmp_path / f"expected.{suffix}").read_text()
    segment = written["segments"][0]
    assert (tmp_path / "a.txt").read_text().splitlines()[0] == segment["text"].strip()
    assert (tmp_path / "a.tsv").read_text().splitlines()[1].split("\t")[0] == str(
        round(1000 * segment["start"])
    )
    assert (tmp_path / "a.vtt").read_text().startswith("WEBVTT\n\n")


def test_word_options_reach_the_writer(run: Any, shelf: Path, tmp_path: Path) -> None:
    options = (
        "-f srt --word_timestamps True --highlight_words True --clip_timestamps 0,0.1 --max_line_count 2"
    )
    result = run(shelf / "a.wav", "-o", tmp_path, *options.split())
    assert result.code == 0 and "warning: --max-line-count has no effect" in result.err
    assert "<u>" in (tmp_path / "a.srt").read_text()


def test_many_files_directories_and_globs(run: Any, shelf: Path, tmp_path: Path) -> None:
    for name in ("x/one.wav", "x/deep/two.wav", "y/three.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_wav(tmp_path / name, tone(0.5))
    result = run(tmp_path / "x", f"{tmp_path}/y/*.wav", tmp_path / "x" / "one.wav", steering="drop")
    assert result.code == 0 and result.err.count("1 window withheld") == 3
    heads = [line for line in result.out.splitlines() if line.startswith("==>")]
    assert heads == [f"==> {tmp_path / name} <==" for name in ("x/deep/two.wav", "x/one.wav", "y/three.wav")]


def test_no_file_is_overwritten_by_a_namesake(run: Any, tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_wav(tmp_path / name / "a.wav", tone(0.5))
    result = run(tmp_path / "x", tmp_path / "y", "-o", tmp_path / "out", "-f", "txt", steering="drop")
    assert result.code == 1 and "y/a.wav: not transcribed, it would overwrite" in result.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.txt"]


# ---------- bad files: one line each, the others go on


def bad_files(folder: Path) -> dict[str, str]:
    """name: words of its message."""
    (folder / "empty.wav").touch()
    (folder / "notes.wav").write_text("Dear diary, this is not a recording. " * 30)
    samples = tone(1.0)
    samples[5_000] = np.nan
    write_float_wav(folder / "nan.wav", samples)
    flac = write_encoded(folder / "whole.flac", tone(1.0), 16_000, "flac")
    (folder / "cut.flac").write_bytes(flac.read_bytes()[:40])
    flac.unlink()
    return {
        "gone.wav": "no such file",
        "empty.wav": "empty (0 bytes)",
        "notes.wav": "cannot be read as audio",
        "nan.wav": "NaN or infinite samples",
        "cut.flac": "",
    }


def test_bad_files_do_not_stop_good_ones(run: Any, shelf: Path, tmp_path: Path) -> None:
    expected = bad_files(tmp_path)
    (tmp_path / "silent").mkdir()
    paths = [tmp_path / name for name in expected]
    result = run(*paths, tmp_path / "silent", f"{tmp_path}/*.opus", shelf / "a.wav")
    assert result.code == 1
    lines = result.err.splitlines()
    assert len(lines) == len(expected) + 2 and all(line.startswith("error: ") for line in lines)
    for path, words in zip(paths, expected.values(), strict=True):
        assert any(str(path) in line and words in line for line in lines)
    assert any("no audio file in this directory" in line for line in lines)
    assert any("no file matches this pattern" in line for line in lines)
    assert f"==> {shelf / 'a.wav'} <==\n[00:00.000 --> " in result.out


def test_unusual_but_good_files(run: Any, tmp_path: Path) -> None:
    write_wav(tmp_path / "8ch.wav", np.repeat(tone(0.5)[:, None], 8, axis=1))
    write_wav(tmp_path / "96k.wav", tone(0.5, 96_000), 96_000)
    whole = write_wav(tmp_path / "whole.wav", tone(2.0))
    (tmp_path / "cut.wav").write_bytes(whole.read_bytes()[:32_044])
    result = run(tmp_path / "8ch.wav", tmp_path / "96k.wav", tmp_path / "cut.wav", "--json")
    assert result.code == 0
    durations = [json.loads(line)["duration"] for line in result.out.splitlines()]
    assert durations == pytest.approx([0.5, 0.5, 1.0], abs=0.01)
    assert result.err == f"warning: {tmp_path / 'cut.wav'}: cut off: 1.0 s of 2.0 s could be decoded\n"


def test_only_bad_files_load_no_model(run: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run(tmp_path / "empty", "--model", "nothing.pt", model=False)
    assert result.code == 1 and "no audio file in this directory" in result.error


def test_an_unforeseen_error_is_one_line_too(run: Any, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory\nlong story")

    monkeypatch.setattr("whisper.model.Whisper.decode", explode)
    result = run(shelf / "a.wav")
    assert result.code == 1 and result.error == f"error: {shelf / 'a.wav'}: RuntimeError: out of memory"


def test_interrupted(run: Any, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("whisper.model.Whisper.decode", interrupt)
    assert run(shelf / "a.wav").code == 130


def test_unwritable_output_dir(run: Any, shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run(shelf / "a.wav", "-o", tmp_path / "file" / "sub")
    assert result.code == 2 and "--output-dir" in result.error


# ---------- bad models and steerings


def test_steering_of_another_model(run: Any, shelf: Path, tmp_path: Path) -> None:
    other = make_tiny_whisper(9)
    other.name = "other"
    constant_steering(other, 0.0).save(tmp_path / "other.safetensors")
    result = run(shelf / "a.wav", "--steering", tmp_path / "other.safetensors", steering=None)
    assert result.code == 1 and "steering is for other" in result.error and "tiny" in result.error


def test_steering_of_another_size(run: Any, shelf: Path, tmp_path: Path) -> None:
    from test_zoo import SMALL

    other = make_tiny_whisper(9, SMALL)
    other.name = "small-one"
    constant_steering(other, 0.0).save(tmp_path / "other.safetensors")
    result = run(shelf / "a.wav", "--steering", tmp_path / "other.safetensors", steering=None)
    assert result.code == 1
    assert (
        "steering is for small-one (d_model 32, 3 blocks), the model is tiny (d_model 64, 4 blocks)"
        in result.error
    )


def test_corrupt_steering(run: Any, shelf: Path, tmp_path: Path) -> None:
    data = (shelf / "keep.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[:-20])
    result = run(shelf / "a.wav", "--steering", path, steering=None)
    assert result.code == 1 and str(path) in result.error


def test_corrupt_and_unknown_models(run: Any, shelf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    path.write_bytes((shelf / "tiny.pt").read_bytes()[:1_000])
    result = run(shelf / "a.wav", "--model", path, model=False)
    assert result.code == 1 and str(path) in result.error
    result = run(shelf / "a.wav", "--model", "mini.em", model=False)
    assert result.code == 1 and "unknown model 'mini.em'" in result.error


def test_model_without_a_steering(
    run: Any, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whisper_steer.zoo.bundled_dir", lambda: tmp_path)
    monkeypatch.setenv("WHISPER_STEER_CACHE", str(tmp_path))
    result = run(shelf / "a.wav", steering=None)
    assert result.code == 1 and "no steering is kept for the model tiny" in result.error


def test_the_command_itself(shelf: Path) -> None:
    """In a process of its own: stdout holds the transcript and nothing else, the exit code arrives."""
    words = [sys.executable, "-m", "whisper_steer.cli", "transcribe", "gone.wav", "a.wav", "--alpha", "0"]
    words += ["--model", "tiny.pt", "--device", "cpu", "--verbose", "False", *GREEDY]
    # openai-whisper warns where there is a GPU that is not used
    environment = os.environ | {"PYTHONWARNINGS": "ignore::UserWarning"}
    done = subprocess.run(words, cwd=shelf, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stdout.startswith("==> a.wav <==\n")
    said = "backend: openai (the model is not in CTranslate2's format)"
    assert done.stderr == f"{said}\nerror: gone.wav: no such file\n"

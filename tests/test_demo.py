"""The demo: it runs the installed command twice on the bundled clips and shows what came out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from calibration import demo
from whisper_steer.errors import UsageError, WhisperSteerError
from whisper_steer.zoo import MODEL_FILE

HELD = {"text": " Thanks for watching!", "score": 0.998}

# a stand-in for whisper-steer: words on everything at alpha 0, on speech alone at alpha 1
COMMAND = """#!{python}
import json, sys
clips = [a for a in sys.argv if a.endswith(".flac")]
plain = sys.argv[sys.argv.index("--alpha") + 1] == "0"
assert sys.argv[1] == "transcribe" and "--json" in sys.argv
for clip in clips:
    words = plain or "speech" in clip
    held = [] if words else [{held}]
    print(json.dumps({{"text": " [you] " if words else "", "duration": 5.0, "suppressed": held}}))
"""


@pytest.fixture
def command(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "whisper-steer"
    path.parent.mkdir()
    path.write_text(COMMAND.format(python=sys.executable, held=json.dumps(HELD)))
    path.chmod(0o755)
    return path


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "weights" / "mini.en" / "demo"
    folder.mkdir(parents=True)
    monkeypatch.setattr(demo, "bundled_dir", lambda: tmp_path / "weights")
    metadata = {folder.parent / MODEL_FILE: {"demo": {"noise": "", "speech": "Good evening."}}}
    monkeypatch.setattr(demo, "load_metadata", metadata.__getitem__)
    for name in demo.CLIPS:
        (folder / f"{name}.flac").touch()
    return folder


def test_words_and_what_was_withheld() -> None:
    assert demo.what_came_out({"text": " Hello. ", "suppressed": []}) == '"Hello."'
    assert demo.what_came_out({"text": "", "suppressed": []}) == "(no words)"
    shown = demo.what_came_out({"text": "", "suppressed": [HELD, {"text": None, "score": 1.0}]})
    assert shown.splitlines() == [
        "(no words)",
        'withheld "Thanks for watching!": 99.8 % sure that nobody speaks',
        "withheld: 100.0 % sure that nobody speaks",
    ]


def test_demo_shows_before_and_after(
    command: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.sys, "executable", str(command.with_name("python")))
    assert demo.main([]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0].startswith("$ whisper-steer transcribe ")
    assert lines[0].endswith("demo/*.flac --model mini.en --alpha 0") and lines[1].endswith("--alpha 1")
    noise, music, speech = (next(line for line in lines if f"{name}.flac " in line) for name in demo.CLIPS)
    assert noise.split()[1] == "none" and noise.count('"[you]"') == 1 and "(no words)" in noise
    assert music.split()[1] == "unknown"
    assert '"Good evening."' in speech and speech.count('"[you]"') == 2
    assert 'withheld "Thanks for watching!": 99.8 %' in " ".join(shown.split())


def test_the_command_is_shown_as_one_would_type_it(
    command: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert demo.as_typed(str(command)) == "whisper-steer"
    monkeypatch.chdir(tmp_path)
    assert demo.as_typed(str(command)) == "bin/whisper-steer"


def test_missing_clips_are_one_line(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "music.flac").unlink()
    assert demo.main([]) == 1
    assert capsys.readouterr().err == (
        f"error: {bundle} lacks music: run python -m calibration.bundle model\n"
    )


def test_a_failing_command_is_one_line(command: Path) -> None:
    command.write_text("#!/bin/sh\necho 'warning: something' >&2; echo 'error: no such model' >&2; exit 1\n")
    with pytest.raises(WhisperSteerError, match="^whisper-steer transcribe ended with 1: no such model$"):
        demo.transcripts(str(command), [], "nope", 1.0)


def test_without_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="not installed: run make demo"):
        demo.find_command()

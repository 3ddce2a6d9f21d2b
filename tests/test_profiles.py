"""Named strengths: what a steering file says of them, and --profile and profile= wherever alpha is taken."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from audio_files import tone, write_wav
from faster_models import CPU, clip, mini_ct2
from steering_files import brief_whisper, constant_steering, save_checkpoint

import whisper_steer
from whisper_steer.attach import check_alpha, steer
from whisper_steer.cli import main
from whisper_steer.errors import FormatError, UsageError
from whisper_steer.faster import BatchedInferencePipeline, WhisperModel
from whisper_steer.profiles import FrontierPoint
from whisper_steer.steering import Steering

PROFILES = {"strict": 1.8, "gentle": 0.6, "balanced": 1.0}
STRICT = {
    "alpha": 1.8, "threshold": -1.25, "text_fpr": 0.012, "text_fpr_lo": 0.004, "text_fpr_hi": 0.025,
    "wer_rise": 0.0005, "wer_rise_hi": 0.001, "empty_speech": 0.002,
    "nonspeech_clips": 588, "speech_clips": 1165, "unheard_clips": 40,
}  # fmt: skip
GENTLE = {"alpha": 0.6, "threshold": 3.5, "text_fpr": 0.21, "wer_rise": -0.001, "note": "more may be stored"}
SUMMARY = (
    "words over 1.2 % [0.4, 2.5] of 588 non-speech clips, WER +0.05 (at most +0.10) points, "
    "0.2 % of 1165 speech clips empty"
)


def with_profiles(steering: Steering, **changes: Any) -> Steering:
    stored = {"profiles": PROFILES, "frontier": [STRICT, GENTLE], **changes}
    return replace(steering, metadata={**steering.metadata, **stored})


@pytest.fixture(scope="module")
def steering() -> Steering:
    """Withholds nothing at alpha 0.6, everything from alpha 1 on; for the model named "tiny"."""
    made = constant_steering(brief_whisper(), -0.5)
    assert made.gate is not None
    # the threshold is 0.18 at alpha 0.6, -0.7 at 1, -1.72 at 1.8
    return with_profiles(replace(made, gate=replace(made.gate, threshold=-0.7, spread=1.2)))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, steering: Steering) -> Path:
    """tiny.pt, a.wav, named.safetensors with profiles, none.safetensors without."""
    folder = tmp_path_factory.mktemp("profiles")
    save_checkpoint(brief_whisper(), folder / "tiny.pt")
    steering.save(folder / "named.safetensors")
    constant_steering(brief_whisper(), -1.0).save(folder / "none.safetensors")
    write_wav(folder / "a.wav", tone(1.0))
    return folder


# ---------- what a file says


def test_profiles_and_frontier_come_out_of_the_file_in_order(shelf: Path) -> None:
    steering = Steering.load(shelf / "named.safetensors")
    assert list(steering.profiles.items()) == [("gentle", 0.6), ("balanced", 1.0), ("strict", 1.8)]
    assert [point.alpha for point in steering.frontier] == [0.6, 1.8]
    assert steering.frontier[1] == FrontierPoint(**STRICT)
    assert steering.frontier[0].text_fpr_lo is None
    assert steering.alpha_of("strict") == 1.8
    assert steering.measured(1.8) == steering.frontier[1] and steering.measured(1.0) is None
    with pytest.raises(TypeError):
        steering.profiles["strict"] = 3.0  # type: ignore[index]


def test_a_point_in_words() -> None:
    assert FrontierPoint(**STRICT).summary() == SUMMARY
    assert FrontierPoint(1.0).summary() == ""
    some = FrontierPoint(1.0, text_fpr=0.5, text_fpr_lo=0.4, wer_rise=-0.001)
    assert some.summary() == "words over 50.0 % of non-speech clips, WER -0.10 points"


def test_unknown_profiles_and_files_without_any(shelf: Path) -> None:
    with pytest.raises(UsageError) as error:
        Steering.load(shelf / "named.safetensors").alpha_of("wild")
    assert str(error.value) == "profile is 'wild': steering test has gentle, balanced, strict"
    without = Steering.load(shelf / "none.safetensors")
    assert dict(without.profiles) == {} and without.frontier == ()
    with pytest.raises(UsageError) as error:
        without.alpha_of("strict")
    assert str(error.value).startswith("steering test has no profiles: ")
    assert "whisper-steer calibrate --model tiny " in str(error.value)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"profiles": ["gentle"]}, "profiles is a list: expected names"),
        ({"profiles": {"gentle": "weak"}}, "profile 'gentle' has alpha 'weak'"),
        ({"profiles": {"gentle": True}}, "profile 'gentle' has alpha True"),
        ({"profiles": {"gentle": -0.1}}, "expected a name and a number >= 0"),
        ({"frontier": {"alpha": 1}}, "frontier is no list of points"),
        ({"frontier": [{"alpha": 1, "text_fpr": "few"}]}, "frontier point 0 has text_fpr 'few'"),
        ({"frontier": [{"text_fpr": 0.1}]}, "frontier point 0 has alpha None"),
    ],
)
def test_damaged_records(shelf: Path, tmp_path: Path, stored: dict[str, Any], words: str) -> None:
    good = Steering.load(shelf / "none.safetensors")
    with pytest.raises(UsageError, match=words):
        with_profiles(good, **stored)
    good.metadata.update(stored)  # what another program may have written
    good.save(tmp_path / "bad.safetensors")
    with pytest.raises(FormatError, match=words) as error:
        Steering.load(tmp_path / "bad.safetensors")
    assert str(error.value).startswith(str(tmp_path / "bad.safetensors")) and "\n" not in str(error.value)


# ---------- Python


def test_steer_by_profile_and_change_it_live(steering: Steering, caplog: pytest.LogCaptureFixture) -> None:
    model = brief_whisper()
    with steer(model, profile="strict", steering=steering) as handle:
        assert (handle.alpha, handle.profile) == (1.8, "strict")
        handle.profile = "gentle"
        assert (handle.alpha, handle.profile) == (0.6, "gentle")
        with pytest.raises(UsageError, match="has gentle, balanced, strict"):
            handle.profile = "wild"
        assert handle.alpha == 0.6
        handle.alpha = 0.9
        assert (handle.alpha, handle.profile) == (0.9, None)
    assert caplog.text == ""  # a profile above 1 was measured: no warning
    with pytest.raises(UsageError, match="'wild'"):
        steer(model, profile="wild", steering=steering)
    for strength in (0.5, 0, 1.0):
        with pytest.raises(UsageError, match=f"alpha {strength} and profile 'gentle' are both given"):
            steer(model, alpha=strength, profile="gentle", steering=steering)
    assert whisper_steer.handles_of(model) == () and check_alpha(1.0) == 1.0


def test_transcribe_by_profile(steering: Steering) -> None:
    model, sound = brief_whisper(), tone(1.0)
    gentle = whisper_steer.transcribe(sound, model, profile="gentle", steering=steering, temperature=0.0)
    assert (gentle.alpha, gentle.profile, gentle.suppressed) == (0.6, "gentle", ())
    strict = whisper_steer.transcribe(sound, model, profile="strict", steering=steering, temperature=0.0)
    assert (strict.alpha, strict.profile, strict.text) == (1.8, "strict", "")
    (window,) = strict.suppressed
    assert window.logit == -0.5 and window.threshold == pytest.approx(-0.7 - 1.2 * math.log2(1.8))
    plain = whisper_steer.transcribe(sound, model, alpha=0.6, steering=steering, temperature=0.0)
    assert plain.profile is None and plain.text == gentle.text
    with pytest.raises(UsageError, match="both given"):
        whisper_steer.transcribe(sound, model, alpha=1.0, profile="gentle", steering=steering)
    with steer(model, steering=steering), pytest.raises(UsageError, match="steered already"):
        whisper_steer.transcribe(sound, model, profile="gentle")


def test_load_model_and_compare_by_profile(shelf: Path, steering: Steering) -> None:
    model = whisper_steer.load_model(
        shelf / "tiny.pt", profile="gentle", steering=shelf / "named.safetensors", device="cpu"
    )
    (handle,) = whisper_steer.handles_of(model)
    assert handle.alpha == 0.6
    handle.remove()
    found = whisper_steer.compare(
        shelf / "a.wav", model, profile="strict", steering=steering, temperature=0.0
    )
    assert found.to_dict()["profile"] == "strict" and found.steered.alpha == 1.8
    assert found.steered.text == "" and len(found.removed) == len(found.plain.text.split()) > 0


def test_faster_whisper_by_profile() -> None:
    bundled = whisper_steer.load_steering("mini.en")
    named = with_profiles(bundled)
    model = WhisperModel(str(mini_ct2()), profile="gentle", steering=named, **CPU)
    pipeline = BatchedInferencePipeline(model)
    assert (model.alpha, model.profile, pipeline.profile) == (0.6, "gentle", "gentle")
    pipeline.profile = "strict"
    assert (model.alpha, pipeline.alpha) == (1.8, 1.8)
    found = whisper_steer.transcribe(clip("noise"), model)
    assert (found.text, found.alpha, found.profile) == ("", 1.8, "strict")
    with pytest.raises(UsageError, match="both given"):
        WhisperModel(str(mini_ct2()), alpha=1.0, profile="gentle", steering=named)
    plain = WhisperModel(str(mini_ct2()), alpha=0, **CPU)
    with pytest.raises(UsageError, match="'wild'"):
        steer(plain, profile="wild", steering=named)
    assert plain.profile is None and whisper_steer.handles_of(plain) == ()


def test_transformers_by_profile(steering: Steering) -> None:
    pytest.importorskip("transformers", reason="pip install whisper-steer[hf]")
    from whisper_steer.transformers_model import from_openai

    found = whisper_steer.transcribe(
        tone(1.0), from_openai(brief_whisper()), profile="strict", steering=steering, temperature=0.0
    )
    assert (found.alpha, found.profile, found.text) == (1.8, "strict", "")
    assert [window.text for window in found.suppressed] == [None]


# ---------- the command


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([*map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_transcribe_command(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["transcribe", shelf / "a.wav", "--model", shelf / "tiny.pt", "--beam_size", "None"]
    named = [*words, "--steering", shelf / "named.safetensors"]
    code, out, err = run(capsys, *named, "--profile", "strict", "--json")
    record = json.loads(out)
    assert (code, record["alpha"], record["profile"], record["text"]) == (0, 1.8, "strict", "")
    assert f"profile strict: alpha 1.8: {SUMMARY} (measured when it was calibrated)\n" in err
    code, out, err = run(capsys, *named, "--profile", "balanced")
    assert code == 0 and "profile balanced: alpha 1\n" in err  # nothing was measured at 1
    code, out, err = run(capsys, *named, "--profile", "strict", "--alpha", "1")
    assert (code, out) == (2, "")
    assert err == "error: --alpha 1 and --profile strict are both given: leave one of them out\n"
    code, out, err = run(capsys, *named, "--profile", "wild")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "has gentle, balanced, strict" in err
    code, out, err = run(capsys, *words, "--steering", shelf / "none.safetensors", "--profile", "strict")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "whisper-steer calibrate" in err


def test_inspect_shows_profiles_and_the_frontier(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", shelf / "named.safetensors")
    table = out[out.index("frontier (") :].splitlines()
    assert code == 0 and "profiles\n  gentle    0.6\n  balanced  1\n  strict    1.8\n" in out
    assert table[0] == "frontier (percent and points, on the calibration's validation split)"
    assert [line.split() for line in table[1:4]] == [
        (
            "alpha threshold text-FPR WER rise at most empty speech non-speech clips speech clips not heard "
            "profile"
        ).split(),
        "0.6 3.5 21.0 -0.10 - - - - - gentle".split(),
        "1.8 -1.25 1.2 [0.4, 2.5] 0.05 0.10 0.20 588 1165 40 strict".split(),
    ]
    assert table[1].index("profile") == table[3].index("strict")
    code, out, _ = run(capsys, "inspect", shelf / "named.safetensors", "--json")
    assert json.loads(out)["frontier"][1] == STRICT
    code, out, _ = run(capsys, "inspect", shelf / "none.safetensors")
    assert code == 0 and "frontier (" not in out


def test_compare_command(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", shelf / "a.wav", "--model", shelf / "tiny.pt", "--beam-size", "None", "--json"]
    words += ["--steering", shelf / "named.safetensors"]
    code, out, err = run(capsys, *words, "--profile", "strict")
    assert code == 0 and json.loads(out)["alpha"] == 1.8 and "profile strict: alpha 1.8: words over" in err
    code, out, err = run(capsys, *words, "--profile", "strict", "--alpha", "0.5")
    assert (code, out) == (2, "") and "--alpha 0.5 and --profile strict are both given" in err


def test_bake_command(
    shelf: Path, steering: Steering, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(steering, gate=None).save(tmp_path / "shift.safetensors")
    words = ["bake", "--model", shelf / "tiny.pt", "--steering", tmp_path / "shift.safetensors"]
    code, out, err = run(capsys, *words, "--profile", "gentle", "--out", tmp_path / "gentle.pt")
    assert code == 0 and "shift" not in err and "test x 0.6 in layer 2" in out
    assert err == (
        "profile gentle: alpha 0.6: words over 21.0 % of non-speech clips, WER -0.10 points "
        "(measured when it was calibrated)\n"
    )
    by_alpha = whisper_steer.bake(
        shelf / "tiny.pt", alpha=0.6, steering=tmp_path / "shift.safetensors", out=tmp_path / "alpha.pt"
    )
    assert by_alpha.path.read_bytes() == (tmp_path / "gentle.pt").read_bytes()
    assert by_alpha.path.read_bytes() != (shelf / "tiny.pt").read_bytes()
    code, out, err = run(capsys, *words, "--profile", "gentle", "--alpha", "1")
    assert (code, out) == (2, "") and "are both given" in err


def test_bake_approximately_by_profile(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fit gets the steering and the profile's alpha; it is what is baked, whole."""
    from calibration import shift_fit

    asked: list[Any] = []

    def fit(model: str, steering: Steering, folder: str, *, alpha: float, **options: Any) -> Any:
        asked.append((model, steering.name, folder, alpha))
        raise UsageError("nothing to fit on")

    monkeypatch.setattr(shift_fit, "fit_from_folder", fit)
    monkeypatch.setattr("whisper_steer.attach._warned_above_one", True)  # said once per process, maybe before
    words = ["bake", "--model", shelf / "tiny.pt", "--steering", shelf / "named.safetensors"]
    words += ["--approximate", tmp_path, "--profile", "strict"]
    code, _, err = run(capsys, *words)
    assert code == 2 and asked == [(str(shelf / "tiny.pt"), "test", str(tmp_path), 1.8)]
    assert err.splitlines()[0].startswith("profile strict: alpha 1.8: words over 1.2 %")
    assert err.splitlines()[1:] == ["error: nothing to fit on"]

"""transcribe(): what openai-whisper gives, minus what nobody said; and the package's public names."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import whisper
from audio_files import tone, write_wav
from steering_files import constant_steering, save_checkpoint, separating_steering
from whisper.model import Whisper

import whisper_steer
from whisper_steer import zoo
from whisper_steer.attach import handles_of, steer
from whisper_steer.errors import AudioError, MismatchError, UsageError
from whisper_steer.transcribe import Segment, Suppressed, Transcript, transcribe

FAST: dict[str, Any] = {"temperature": 0.0, "sample_len": 6}
# window by window: seeking does not hang on the timestamps that a random model happens to write
WHOLE: dict[str, Any] = {**FAST, "without_timestamps": True}


def long_audio() -> np.ndarray:
    """70 s: a tone in the first and the third window, silence in the second."""
    samples = np.zeros(70 * 16_000, dtype=np.float32)
    samples[: 8 * 16_000] = tone(8.0)
    samples[60 * 16_000 : 66 * 16_000] = tone(6.0)
    return samples


@pytest.fixture
def audio() -> np.ndarray:
    return tone(5.0)


@pytest.fixture
def model(tiny_whisper: Whisper) -> Whisper:
    tiny_whisper.name = "tiny-test"
    return tiny_whisper


class TestPlain:
    @pytest.mark.parametrize(
        "options", [FAST, WHOLE, {**FAST, "word_timestamps": True, "clip_timestamps": "0,0.1"}]
    )
    def test_equals_openai_whisper(self, model: Whisper, audio: np.ndarray, options: dict[str, Any]) -> None:
        expected = whisper.transcribe(model, audio, fp16=False, **options)
        transcript = transcribe(audio, model, alpha=0, **options)
        got = transcript.to_dict()
        assert (got.pop("suppressed"), got.pop("edited")) == ([], [])
        for segment in expected["segments"]:
            if "word_timestamps" not in options:
                segment.pop("words", None)  # openai-whisper adds them to empty segments only
        assert got == expected
        assert transcript.text and transcript.segments
        assert (transcript.model, transcript.steering, transcript.alpha) == ("tiny-test", None, 0.0)
        assert transcript.duration == 5.0 and transcript.suppressed == ()

    def test_file_and_array_and_integers_agree(
        self, tmp_path: Path, model: Whisper, audio: np.ndarray
    ) -> None:
        path = write_wav(tmp_path / "a.wav", audio)
        expected = transcribe(path, model, alpha=0, **FAST)
        codes = np.frombuffer(path.read_bytes()[44:], dtype="<i2")
        assert transcribe(str(path), model, alpha=0, **FAST) == expected
        assert transcribe(codes, model, alpha=0, **FAST) == expected

    def test_model_by_path(self, tmp_path: Path, model: Whisper, audio: np.ndarray) -> None:
        path = save_checkpoint(model, tmp_path / "tiny-test.pt")
        expected = transcribe(audio, model, alpha=0, **FAST)
        assert transcribe(audio, path, alpha=0, device="cpu", **FAST) == expected

    def test_shorter_than_a_frame(self, model: Whisper) -> None:
        transcript = transcribe(np.zeros(100, dtype=np.float32), model, alpha=0, **FAST)
        assert (transcript.text, transcript.segments, transcript.duration) == ("", (), 100 / 16_000)

    def test_plain_json(self, model: Whisper, audio: np.ndarray) -> None:
        transcript = transcribe(audio, model, alpha=0, temperature=(0.0, 0.4), sample_len=6)
        assert json.loads(json.dumps(transcript.to_dict())) == transcript.to_dict()

    def test_results_cannot_be_changed(self, model: Whisper, audio: np.ndarray) -> None:
        transcript = transcribe(audio, model, alpha=0, **FAST)
        with pytest.raises(dataclasses.FrozenInstanceError):
            transcript.text = ""  # type: ignore[misc]
        assert copy.deepcopy(transcript) == transcript


class TestWithheld:
    def test_times_words_and_scores(self, model: Whisper) -> None:
        audio = long_audio()
        plain = transcribe(audio, model, alpha=0, condition_on_previous_text=False, **WHOLE)
        assert [s.start for s in plain.segments] == [0, 30, 60]
        steering = constant_steering(model, 5.0, strength=0.0)
        transcript = transcribe(audio, model, steering=steering, decode_withheld=True, **WHOLE)
        assert (transcript.text, transcript.segments) == ("", ())
        assert (transcript.steering, transcript.alpha) == ("test", 1.0)
        assert [(w.start, w.end) for w in transcript.suppressed] == [(0, 30), (30, 60), (60, 70)]
        for window, segment in zip(transcript.suppressed, plain.segments, strict=True):
            assert window.text is not None and window.text.strip() == segment.text.strip()
            assert window.avg_logprob == pytest.approx(segment.avg_logprob)
            assert window.no_speech_prob == pytest.approx(segment.no_speech_prob)
            assert window.score == pytest.approx(1 / (1 + np.exp(-5.0)))
            assert (window.logit, window.threshold) == (5.0, 0.0)
        assert handles_of(model) == ()

    def test_only_windows_in_which_nobody_speaks(self, model: Whisper) -> None:
        audio = long_audio()
        steering = separating_steering(model, audio, speech=0, silence=1)
        plain = transcribe(audio, model, alpha=0, condition_on_previous_text=False, **WHOLE)
        options = {**WHOLE, "condition_on_previous_text": False}
        kept = transcribe(audio, model, steering=steering, decode_withheld=True, **options)
        assert [(w.start, w.end) for w in kept.suppressed] == [(30, 60)]
        assert [s.id for s in kept.segments] == [0, 1]
        assert [dataclasses.replace(s, id=0) for s in kept.segments] == [
            dataclasses.replace(plain.segments[i], id=0) for i in (0, 2)
        ]
        assert kept.text == plain.segments[0].text + plain.segments[2].text
        shown = kept.with_suppressed()
        assert [s.id for s in shown.segments] == [0, 1, 2]
        assert [s.text.strip() for s in shown.segments] == [s.text.strip() for s in plain.segments]
        assert [(s.start, s.seek) for s in shown.segments] == [(0, 0), (30, 3000), (60, 6000)]
        assert shown.segments[1].end == 60
        assert shown.text.split() == plain.text.split() and shown.suppressed == kept.suppressed
        skipped = transcribe(audio, model, steering=steering, **options)
        assert (skipped.text, skipped.segments) == (kept.text, kept.segments)
        assert [window.text for window in skipped.suppressed] == [None]
        assert skipped.with_suppressed() == skipped

    def test_withheld_words_do_not_prompt_the_next_window(self, model: Whisper) -> None:
        audio = long_audio()[30 * 16_000 :]  # silence, then the tone
        steering = separating_steering(model, audio, speech=1, silence=0)
        prompts: list[list[int]] = []
        original = model.decode

        def spy(mel: Any, options: Any, **kwargs: Any) -> Any:
            prompts.append(list(options.prompt))
            return original(mel, options, **kwargs)

        model.decode = spy  # type: ignore[method-assign]
        transcript = transcribe(audio, model, steering=steering, decode_withheld=True, **WHOLE)
        assert len(transcript.suppressed) == 1
        assert prompts == [[], []]
        prompts.clear()
        transcript = transcribe(audio, model, steering=steering, **WHOLE)
        assert len(transcript.suppressed) == 1 and prompts == [[]]  # not decoded at all

    def test_with_word_timestamps(self, model: Whisper) -> None:
        audio = long_audio()[: 62 * 16_000]
        steering = separating_steering(model, audio, speech=0, silence=1)
        options = {**WHOLE, "word_timestamps": True, "clip_timestamps": "0,4,30,60"}
        transcript = transcribe(audio, model, steering=steering, decode_withheld=True, **options)
        assert [(w.start, w.end) for w in transcript.suppressed] == [(30, 60)]
        assert transcript.segments and all(s.words is not None for s in transcript.segments)
        word = next(w for s in transcript.segments for w in s.words or ())
        assert 0 <= word.start <= word.end <= 5 and 0 <= word.probability <= 1
        last = transcript.with_suppressed().segments[-1]
        assert last.words is not None and [(w.word, w.start, w.end) for w in last.words] == [
            (last.text, 30, 60)
        ]

    def test_words_only_if_asked_for(self, model: Whisper, audio: np.ndarray) -> None:
        steering = constant_steering(model, 5.0)
        found = transcribe(audio, model, steering=steering, decode_withheld=True, **FAST)
        shown = found.with_suppressed()
        assert [segment.words for segment in shown.segments] == [None]
        assert "words" not in shown.to_dict()["segments"][0]

    def test_windows_without_text_are_not_shown(self) -> None:
        windows = tuple(
            Suppressed(i * 30.0, i * 30.0 + 30, text, 0.9, None, None)
            for i, text in enumerate(["", None, " "])
        )
        transcript = Transcript("", (), "en", 90.0, windows, "m", "s", 1.0)
        assert transcript.with_suppressed() == transcript
        assert len(transcript.to_dict()["suppressed"]) == 3

    def test_unsure_windows_are_kept(self, model: Whisper, audio: np.ndarray) -> None:
        transcript = transcribe(audio, model, steering=constant_steering(model, -0.1), **FAST)
        assert transcript.suppressed == () and transcript.text


class TestSteering:
    def test_a_models_own_handles_are_used(self, model: Whisper, audio: np.ndarray) -> None:
        steering = constant_steering(model, -0.5)
        expected = transcribe(audio, model, alpha=0.7, steering=steering, **FAST)
        with steer(model, alpha=0.7, steering=steering) as handle:
            got = transcribe(audio, model, **FAST)
            assert got == expected and handles_of(model) == (handle,)
            handle.alpha = 0
            assert (
                transcribe(audio, model, **FAST).text
                == transcribe(audio, copy_of(model, handle), alpha=0, **FAST).text
            )
        assert expected.alpha == 0.7 and expected.text != transcribe(audio, model, alpha=0, **FAST).text

    def test_several_handles(self, model: Whisper, audio: np.ndarray) -> None:
        steering = constant_steering(model, -0.5)
        with steer(model, alpha=0.5, steering=steering), steer(model, alpha=1.0, steering=steering):
            transcript = transcribe(audio, model, **FAST)
        assert (transcript.steering, transcript.alpha) == ("test + test", None)

    @pytest.mark.parametrize("extra", [{"alpha": 0.5}, {"alpha": 0}, {"steering": "default"}])
    def test_a_steered_model_with_another_alpha(
        self, model: Whisper, audio: np.ndarray, extra: dict[str, Any]
    ) -> None:
        with (
            steer(model, steering=constant_steering(model, -0.5)) as handle,
            pytest.raises(UsageError, match="steered already"),
        ):
            transcribe(audio, model, **extra)
        assert handle not in handles_of(model)

    @pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf"), "abc", True, [1]])
    def test_bad_alpha(self, model: Whisper, audio: np.ndarray, alpha: Any) -> None:
        with pytest.raises(UsageError) as error:
            transcribe(audio, model, alpha=alpha)
        assert "\n" not in str(error.value)

    def test_without_any_steering(
        self, model: Whisper, audio: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(zoo, "bundled_dir", lambda: tmp_path)
        monkeypatch.setenv("WHISPER_STEER_CACHE", str(tmp_path))
        with pytest.raises(MismatchError, match="tiny-test"):
            transcribe(audio, model, **FAST)
        assert transcribe(audio, model, alpha=0, **FAST).steering is None

    def test_steering_of_another_model(self, model: Whisper, audio: np.ndarray) -> None:
        from conftest import make_tiny_whisper

        other = make_tiny_whisper(7)
        other.name = "other"
        with pytest.raises(MismatchError, match="other.*tiny-test"):
            transcribe(audio, model, steering=constant_steering(other, 0.0), **FAST)
        assert handles_of(model) == ()

    def test_errors_leave_nothing_behind(self, model: Whisper, audio: np.ndarray) -> None:
        before = sorted(model.__dict__)
        hook = model.encoder.ln_post.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            transcribe(audio, model, steering=constant_steering(model, 5.0), **FAST)
        hook.remove()
        assert handles_of(model) == () and sorted(model.__dict__) == before
        assert transcribe(audio, model, alpha=0, **FAST).text

    def test_two_threads_with_one_model(self, model: Whisper) -> None:
        steering = constant_steering(model, -0.5)
        jobs = [
            (tone(3.0), {}),
            (tone(3.0, frequency=1_500), {}),
            (tone(3.0), {"alpha": 0}),
            (tone(4.0), {"alpha": 0.5}),
        ]

        def run(samples: np.ndarray, extra: dict[str, Any]) -> Transcript:
            chosen = {} if extra.get("alpha") == 0 else {"steering": steering}
            return transcribe(samples, model, **chosen, **extra, **FAST)

        expected = [run(*job) for job in jobs]
        got: list[Transcript | None] = [None] * len(jobs)

        def work(i: int) -> None:
            got[i] = run(*jobs[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == expected and handles_of(model) == ()


def copy_of(model: Whisper, handle: Any) -> Whisper:
    """A plain model with the same weights; a steered one cannot be copied."""
    other = Whisper(model.dims)
    other.load_state_dict(model.state_dict())
    other.alignment_heads = model.alignment_heads
    return other.eval()


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"beam": 5}, "unknown option 'beam': expected one of openai-whisper's: .*beam_size"),
            ({"language": "klingon"}, "klingon"),
            ({"length_penalty": 9.0}, "length_penalty"),
            ({"patience": 2.0}, "patience"),
            ({"clip_timestamps": "a,b"}, "a"),
        ],
    )
    def test_bad_options(
        self, model: Whisper, audio: np.ndarray, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(UsageError, match=words) as error:
            transcribe(audio, model, alpha=0, **options)
        assert "\n" not in str(error.value)

    def test_unknown_backend(self, model: Whisper, audio: np.ndarray) -> None:
        with pytest.raises(UsageError, match="unknown backend 'tpu': expected one of openai"):
            transcribe(audio, model, backend="tpu")

    def test_not_a_model(self, audio: np.ndarray) -> None:
        with pytest.raises(UsageError, match="model is a Linear"):
            import torch

            transcribe(audio, torch.nn.Linear(2, 2))  # type: ignore[arg-type]

    def test_device_of_a_loaded_model(self, model: Whisper, audio: np.ndarray) -> None:
        with pytest.raises(UsageError, match="model.to"):
            transcribe(audio, model, device="cpu")

    @pytest.mark.parametrize("bad", ["nothing.wav", np.array([np.nan]), np.zeros((2, 5)), 3.0])
    def test_bad_audio(self, model: Whisper, bad: Any) -> None:
        with pytest.raises(AudioError):
            transcribe(bad, model, alpha=0)

    def test_half_precision_on_the_cpu_is_ignored_without_a_warning(
        self, model: Whisper, audio: np.ndarray, recwarn: pytest.WarningsRecorder
    ) -> None:
        assert transcribe(audio, model, alpha=0, fp16=True, **FAST) == transcribe(
            audio, model, alpha=0, **FAST
        )
        beside_a_gpu = "Performing inference on CPU when CUDA is available"
        assert [w for w in recwarn if str(w.message) != beside_a_gpu] == []


class TestProgress:
    def test_reports_seconds_up_to_the_end(self, model: Whisper) -> None:
        seen: list[tuple[float, float]] = []
        transcribe(long_audio(), model, alpha=0, progress=lambda *t: seen.append(t), **WHOLE)
        assert seen == [(30.0, 70.0), (60.0, 70.0), (70.0, 70.0)]

    def test_without_a_listener_openai_whispers_bar_is_its_own(
        self, model: Whisper, audio: np.ndarray, capsys: pytest.CaptureFixture[str]
    ) -> None:
        transcribe(audio, model, alpha=0, progress=lambda *_: None, **WHOLE)
        assert capsys.readouterr().err == ""
        whisper.transcribe(model, audio, verbose=False, fp16=False, **WHOLE)
        assert "500/500" in capsys.readouterr().err

    def test_an_error_in_the_listener_stops_and_cleans_up(self, model: Whisper, audio: np.ndarray) -> None:
        def stop(done: float, total: float) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            transcribe(audio, model, steering=constant_steering(model, -0.5), progress=stop, **WHOLE)
        assert handles_of(model) == ()


class TestPublicNames:
    def test_all(self) -> None:
        for name in whisper_steer.__all__:
            assert getattr(whisper_steer, name) is not None
        assert sorted(whisper_steer.__all__) == whisper_steer.__all__
        assert set(whisper_steer.__all__) <= set(dir(whisper_steer))
        assert whisper_steer.Segment is Segment and whisper_steer.load_model is zoo.load_model

    def test_unknown_name(self) -> None:
        with pytest.raises(AttributeError, match="has no attribute 'transcibe'"):
            whisper_steer.transcibe  # noqa: B018

    def test_the_function_is_not_hidden_by_its_module(self) -> None:
        # its module was imported above, which makes Python set the package's attribute of that name
        assert whisper_steer.transcribe is transcribe
        assert sys.modules["whisper_steer.transcribe"].transcribe is transcribe
        code = "import whisper_steer as w; f = w.transcribe; import whisper_steer.transcribe; "
        code += "assert w.transcribe is f"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=600)

    def test_importing_the_package_is_light(self) -> None:
        code = "import sys, whisper_steer; assert not {'torch', 'numpy', 'whisper', 'av'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


MINI = Path(zoo.bundled_dir()) / "mini.en"
DEMO = MINI / "demo"


@pytest.mark.skipif(
    not (MINI / "steering.safetensors").is_file(), reason="sae_weights/mini.en is not in this checkout"
)
class TestBundledModel:
    """The shipped model on the shipped clips: the disease, and the cure."""

    @pytest.fixture
    def mini(self) -> Whisper:
        return whisper_steer.load_model("mini.en", device="cpu")

    @pytest.mark.parametrize("clip", ["noise", "music"])
    def test_plain_invents_words_and_steered_does_not(self, mini: Whisper, clip: str) -> None:
        plain = transcribe(DEMO / f"{clip}.flac", mini, alpha=0)
        steered = transcribe(DEMO / f"{clip}.flac", mini, decode_withheld=True)
        assert plain.text.strip() and not steered.text.strip()
        assert steered.suppressed and any(window.text for window in steered.suppressed)
        assert steered.suppressed[0].start == 0.0 and 0.5 < steered.suppressed[0].score <= 1.0

    def test_speech_is_left_alone(self, mini: Whisper) -> None:
        plain = transcribe(DEMO / "speech.flac", mini, alpha=0)
        steered = transcribe(DEMO / "speech.flac", mini)
        assert len(plain.text.split()) >= 3 and steered.text == plain.text and steered.suppressed == ()

    def test_openai_whisper_itself_withholds_too(self, mini: Whisper) -> None:
        samples = whisper_steer.load_audio(DEMO / "noise.flac")
        with whisper_steer.steer(mini):
            assert whisper.transcribe(mini, samples, fp16=False)["text"].strip() == ""
        assert whisper.transcribe(mini, samples, fp16=False)["text"].strip() != ""

    def test_loaded_steered(self) -> None:
        model = whisper_steer.load_model("mini.en", alpha=1.0, device="cpu")
        assert transcribe(DEMO / "noise.flac", model).text.strip() == ""

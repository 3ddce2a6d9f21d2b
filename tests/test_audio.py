"""load_audio, check_audio, find_audio: formats, channels, rates, and every kind of bad input."""

from __future__ import annotations

import logging
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from audio_files import tone, write_encoded, write_float_wav, write_wav

from whisper_steer.audio import check_audio, find_audio, load_audio
from whisper_steer.errors import AudioError


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the common part."""
    n = min(len(a), len(b))
    return float(a[:n] @ b[:n] / np.sqrt((a[:n] @ a[:n]) * (b[:n] @ b[:n])))


def message_of(error: pytest.ExceptionInfo[AudioError], path: Path) -> str:
    """The message, checked to be one line that names the file."""
    text = str(error.value)
    assert str(path) in text and "\n" not in text
    return text


class TestFormats:
    def test_wav_samples_are_exact(self, tmp_path: Path) -> None:
        codes = np.array([0, 1, -1, 16_384, -32_768, 32_767], dtype=np.int16)
        path = tmp_path / "a.wav"
        write_wav(path, codes / 32_767)  # the header, then exact codes
        path.write_bytes(path.read_bytes()[:44] + codes.tobytes())
        np.testing.assert_array_equal(load_audio(path), codes.astype(np.float32) / 32_768)

    @pytest.mark.parametrize(
        ("suffix", "codec", "rate"),
        [
            ("flac", "flac", 16_000),
            ("mp3", "libmp3lame", 44_100),
            ("ogg", "libopus", 48_000),
            ("opus", "libopus", 48_000),
            ("m4a", "aac", 44_100),
            ("webm", "libopus", 48_000),
        ],
    )
    def test_compressed(self, tmp_path: Path, suffix: str, codec: str, rate: int) -> None:
        path = write_encoded(tmp_path / f"a.{suffix}", tone(2.0, rate), rate, codec)
        samples = load_audio(path)
        assert samples.dtype == np.float32 and samples.ndim == 1
        assert abs(len(samples) - 32_000) < 3_000  # encoders pad by up to a few frames
        spectrum = np.abs(np.fft.rfft(samples[4_000:28_000]))
        assert np.argmax(spectrum) * 16_000 / 24_000 == pytest.approx(440, abs=1)
        assert np.sqrt(np.mean(samples[4_000:28_000] ** 2)) == pytest.approx(
            0.5 / np.sqrt(2),
            rel=0.06,  # LAME turns the volume down by 5 %
        )

    @pytest.mark.parametrize("suffix", ["mp4", "mkv"])
    def test_sound_track_of_video(self, tmp_path: Path, suffix: str) -> None:
        path = write_encoded(tmp_path / f"a.{suffix}", tone(1.0, 48_000), 48_000, "aac", video=True)
        assert len(load_audio(path)) == pytest.approx(16_000, abs=2_000)

    def test_video_without_sound(self, tmp_path: Path) -> None:
        import av

        path = tmp_path / "silent.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=5)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
            container.mux(stream.encode(None))
        with pytest.raises(AudioError, match="no audio in it") as error:
            load_audio(path)
        message_of(error, path)

    def test_8_channels_are_averaged_equally(self, tmp_path: Path) -> None:
        channels = np.zeros((16_000, 8), dtype=np.float32)
        channels[:, 3] = 0.8  # an LFE channel in the usual 7.1 order, which FFmpeg's own downmix would drop
        samples = load_audio(write_wav(tmp_path / "eight.wav", channels))
        np.testing.assert_allclose(samples, 0.1, atol=1e-4)

    def test_stereo_flac_is_averaged(self, tmp_path: Path) -> None:
        import av

        path = tmp_path / "stereo.flac"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("flac", rate=16_000)
            stream.layout, stream.format = "stereo", "s16"
            codes = np.tile(np.array([8_192, -4_096], dtype=np.int16), 4_096)[None, :]
            frame = av.AudioFrame.from_ndarray(codes, format="s16", layout="stereo")
            frame.sample_rate = 16_000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        np.testing.assert_allclose(load_audio(path), np.full(4_096, 2_048 / 32_768, dtype=np.float32))

    @pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 96_000])
    def test_resampling(self, tmp_path: Path, rate: int) -> None:
        samples = load_audio(write_wav(tmp_path / "a.wav", tone(1.5, rate), rate))
        assert abs(len(samples) - 24_000) <= 32
        assert similarity(samples, tone(1.5)) > 0.999

    def test_resampling_removes_what_16_khz_cannot_hold(self, tmp_path: Path) -> None:
        samples = load_audio(write_wav(tmp_path / "a.wav", tone(1.0, 96_000, frequency=20_000), 96_000))
        assert np.abs(samples[2_000:-2_000]).max() < 1e-3

    def test_another_target_rate(self, tmp_path: Path) -> None:
        path = write_wav(tmp_path / "a.wav", tone(1.0))
        assert abs(len(load_audio(path, sampling_rate=8_000)) - 8_000) <= 32

    def test_agrees_with_openai_whisper_decoding(self, tmp_path: Path) -> None:
        """As by the ffmpeg command that openai-whisper calls: equal up to its rounding to 16 bits."""
        import av

        path = write_wav(tmp_path / "a.wav", tone(1.0, 44_100), 44_100)
        with av.open(str(path)) as container:
            resampler = av.AudioResampler(format="s16", layout="mono", rate=16_000)
            frames = [
                r for f in container.decode(audio=0) for r in resampler.resample(f)
            ] + resampler.resample(None)
        expected = np.concatenate([frame.to_ndarray()[0] for frame in frames]) / 32_768
        np.testing.assert_allclose(load_audio(path), expected, atol=2 / 32_768)


class TestBadFiles:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(AudioError, match="no such file") as error:
            load_audio(tmp_path / "nothing.wav")
        message_of(error, tmp_path / "nothing.wav")

    def test_directory(self, tmp_path: Path) -> None:
        with pytest.raises(AudioError, match="is a directory") as error:
            load_audio(tmp_path)
        message_of(error, tmp_path)

    def test_zero_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.wav"
        path.touch()
        with pytest.raises(AudioError, match="empty") as error:
            load_audio(path)
        message_of(error, path)

    def test_header_without_samples(self, tmp_path: Path) -> None:
        path = write_wav(tmp_path / "a.wav", np.zeros(0, dtype=np.float32))
        with pytest.raises(AudioError, match="no audio samples|cannot be read") as error:
            load_audio(path)
        message_of(error, path)

    @pytest.mark.parametrize("name", ["notes.wav", "notes.mp3", "notes.txt"])
    def test_text(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.write_text("This is a shopping list, not a recording.\n" * 50)
        with pytest.raises(AudioError) as error:
            load_audio(path)
        message_of(error, path)

    def test_random_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "junk.flac"
        path.write_bytes(np.random.default_rng(0).bytes(3_000))
        with pytest.raises(AudioError) as error:
            load_audio(path)
        message_of(error, path)

    def test_picture(self, tmp_path: Path) -> None:
        import av

        path = tmp_path / "cover.png"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = 8, 8, "rgb24"
            container.mux(stream.encode(av.VideoFrame(8, 8, "rgb24")))
        with pytest.raises(AudioError, match="no audio in it"):
            load_audio(path)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_non_finite_samples(self, tmp_path: Path, bad: float) -> None:
        samples = tone(2.0)
        samples[20_000] = bad
        path = write_float_wav(tmp_path / "a.wav", samples)
        with pytest.raises(AudioError, match=r"NaN or infinite samples near 1\.\d+ s") as error:
            load_audio(path)
        message_of(error, path)

    @pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX here")
    def test_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_wav(tmp_path / "a.wav", tone(0.1))
        monkeypatch.setattr("os.access", lambda *_: False)  # root may read everything
        with pytest.raises(AudioError, match="no permission"):
            load_audio(path)


class TestTruncatedFiles:
    def test_wav_gives_what_is_there_and_warns(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = write_wav(tmp_path / "a.wav", tone(4.0))
        cut = tmp_path / "cut.wav"
        cut.write_bytes(whole.read_bytes()[: 44 + 2 * 16_000])
        with caplog.at_level(logging.WARNING, "whisper_steer"):
            samples = load_audio(cut)
        np.testing.assert_array_equal(samples, load_audio(whole)[:16_000])
        assert str(cut) in caplog.text and "1.0 s of 4.0 s" in caplog.text

    def test_flac_gives_what_is_there_and_warns(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, 64_000).astype(np.float32)
        whole = write_encoded(tmp_path / "a.flac", noise, 16_000, "flac")
        data = whole.read_bytes()
        cut = tmp_path / "cut.flac"
        cut.write_bytes(data[: len(data) // 2])
        with caplog.at_level(logging.WARNING, "whisper_steer"):
            samples = load_audio(cut)
        assert 20_000 < len(samples) < 40_000
        good = len(samples) - 8_192  # the frame at the cut may be damaged
        np.testing.assert_array_equal(samples[:good], load_audio(whole)[:good])
        assert str(cut) in caplog.text

    @pytest.mark.parametrize("suffix", ["flac", "wav", "m4a"])
    def test_nothing_left(self, tmp_path: Path, suffix: str) -> None:
        codec = {"flac": "flac", "wav": "pcm_s16le", "m4a": "aac"}[suffix]
        whole = write_encoded(tmp_path / f"a.{suffix}", tone(1.0), 16_000, codec)
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(whole.read_bytes()[:43])
        with pytest.raises(AudioError) as error:
            load_audio(cut)
        message_of(error, cut)

    def test_intact_files_do_not_warn(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "whisper_steer"):
            load_audio(write_wav(tmp_path / "a.wav", tone(1.0, 96_000), 96_000))
            load_audio(write_encoded(tmp_path / "a.flac", tone(1.0), 16_000, "flac"))
            load_audio(write_encoded(tmp_path / "a.m4a", tone(1.0), 16_000, "aac"))
            load_audio(write_encoded(tmp_path / "a.webm", tone(1.0, 48_000), 48_000, "libopus"))
        assert caplog.text == ""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="resource is POSIX")
def test_three_hours_hold_one_copy(tmp_path: Path) -> None:
    """3 h are 691 MB of float32: the peak may exceed that only by the decoder's own needs."""
    import wave

    path = tmp_path / "long.wav"
    minute = (tone(60.0) * 32_767).astype("<i2").tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        for _ in range(180):
            file.writeframes(minute)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples = load_audio(path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # kB on Linux
    assert samples.shape == (180 * 60 * 16_000,)
    np.testing.assert_allclose(samples[-16_000:], tone(60.0)[-16_000:], atol=1e-4)
    assert grown < samples.nbytes + 150e6


class TestCheckAudio:
    def test_float_passes_through(self) -> None:
        samples = tone(0.1)
        assert check_audio(samples) is samples
        np.testing.assert_array_equal(check_audio(samples.astype(np.float64)), samples)
        np.testing.assert_array_equal(check_audio(samples.tolist()), samples)

    def test_tensor(self) -> None:
        samples = check_audio(torch.tensor([0.0, 0.25, -1.0], requires_grad=True))
        np.testing.assert_array_equal(samples, np.array([0, 0.25, -1], dtype=np.float32))

    @pytest.mark.parametrize(
        ("dtype", "codes", "expected"),
        [
            (np.int16, [0, 16_384, -32_768], [0.0, 0.5, -1.0]),
            (np.int32, [0, 2**30, -(2**31)], [0.0, 0.5, -1.0]),
            (np.uint8, [128, 192, 0], [0.0, 0.5, -1.0]),
        ],
    )
    def test_pcm_codes_are_scaled(self, dtype: type, codes: list[int], expected: list[float]) -> None:
        samples = check_audio(np.array(codes, dtype=dtype))
        assert samples.dtype == np.float32
        np.testing.assert_array_equal(samples, expected)

    @pytest.mark.parametrize(
        ("audio", "words"),
        [
            (np.zeros((2, 100), dtype=np.float32), "downmix"),
            (np.float32(1.0), "1-D"),
            (np.zeros(0, dtype=np.float32), "no samples"),
            (np.array([0.0, np.nan, np.inf]), "2 NaN or infinite samples, the first at index 1"),
            (np.zeros(4, dtype=np.int64), "dtype int64"),
            (np.zeros(4, dtype=bool), "dtype bool"),
            (np.zeros(4, dtype=complex), "dtype complex128"),
            (np.array(["a"]), "dtype <U1"),
            ([[1.0], [1.0, 2.0]], "1-D"),
            (None, "1-D"),
        ],
    )
    def test_bad_arrays(self, audio: object, words: str) -> None:
        with pytest.raises(AudioError, match=words) as error:
            check_audio(audio)
        assert "\n" not in str(error.value)


class TestFindAudio:
    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        for name in ["b.wav", "a.FLAC", "sub/deep/c.mp3", "notes.txt", ".hidden.wav", ".cache/d.wav"]:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / "empty").mkdir()
        return tmp_path

    def test_directory_is_searched_by_suffix(self, tree: Path) -> None:
        assert find_audio([tree]) == [tree / "a.FLAC", tree / "b.wav", tree / "sub/deep/c.mp3"]

    def test_order_is_kept_and_a_file_comes_once(self, tree: Path) -> None:
        assert find_audio([str(tree / "b.wav"), tree]) == [
            tree / "b.wav",
            tree / "a.FLAC",
            tree / "sub/deep/c.mp3",
        ]

    def test_globs(self, tree: Path) -> None:
        assert find_audio([f"{tree}/*.wav"]) == [tree / "b.wav"]
        assert find_audio([f"{tree}/**/*.mp3"]) == [tree / "sub/deep/c.mp3"]
        assert find_audio([f"{tree}/s*"]) == [tree / "sub/deep/c.mp3"]

    def test_a_file_whose_name_looks_like_a_glob(self, tree: Path) -> None:
        (tree / "take[1].wav").touch()
        assert find_audio([tree / "take[1].wav"]) == [tree / "take[1].wav"]

    def test_named_files_are_left_to_load_audio(self, tree: Path) -> None:
        assert find_audio([tree / "notes.txt", tree / "nothing.wav"]) == [
            tree / "notes.txt",
            tree / "nothing.wav",
        ]

    def test_directory_without_audio(self, tree: Path) -> None:
        with pytest.raises(AudioError, match="no audio file in this directory"):
            find_audio([tree / "empty"])

    def test_pattern_without_match(self, tree: Path) -> None:
        with pytest.raises(AudioError, match="no file matches"):
            find_audio([f"{tree}/*.opus"])

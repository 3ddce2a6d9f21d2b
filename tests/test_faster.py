"""faster-whisper, steered: identical at alpha 0, silent over noise, the same words over speech."""

from __future__ import annotations

import copy
import inspect
from dataclasses import asdict
from pathlib import Path
from typing import Any

import faster_whisper
import numpy as np
import pytest
import torch
from faster_models import CPU, clip, mini_ct2
from whisper.audio import N_SAMPLES, log_mel_spectrogram, pad_or_trim

import whisper_steer
from whisper_steer import ct2_steering
from whisper_steer.bake import constant_shifts
from whisper_steer.ct2_file import added_bytes, ffn_bias_name
from whisper_steer.ct2_steering import SteeredWhisper
from whisper_steer.errors import MismatchError, ModelError, UsageError
from whisper_steer.faster import BatchedInferencePipeline, WhisperModel
from whisper_steer.steering import Shift, Steering
from whisper_steer.withholding import collecting
from whisper_steer.zoo import load_model, load_steering

SPOKEN = " No, Sarah did not cover the little cat. Who has a blue coat?"
INVENTED = "Thank you for watching."


def direction(layer: int = 2, strength: float = 3.0) -> Steering:
    vector = torch.randn(192, generator=torch.Generator().manual_seed(5))
    return Steering((Shift(layer, vector, strength), Shift(layer, vector, 0.5)), None)


@pytest.fixture(scope="module")
def plain() -> faster_whisper.WhisperModel:
    return faster_whisper.WhisperModel(str(mini_ct2()), **CPU)


@pytest.fixture(scope="module")
def shared() -> WhisperModel:
    """Found by name: the bundled steering, a gated latent edit."""
    return WhisperModel(str(mini_ct2()), decode_withheld=True, **CPU)


@pytest.fixture
def steered(shared: WhisperModel) -> WhisperModel:
    shared.alpha = 1.0
    return shared


def text(found: tuple[Any, Any]) -> str:
    return "".join(segment.text for segment in found[0])


def mel(*names: str) -> np.ndarray:
    padded = [torch.from_numpy(pad_or_trim(clip(name), N_SAMPLES)) for name in names]
    return np.stack([log_mel_spectrogram(samples).numpy() for samples in padded])


# ---------- alpha 0


@pytest.mark.parametrize("options", [{}, {"word_timestamps": True}, {"vad_filter": True, "beam_size": 1}])
def test_identical_at_alpha_zero(plain: Any, steered: WhisperModel, options: dict[str, Any]) -> None:
    steered.alpha = 0
    theirs, their_info = plain.transcribe(clip("speech"), **options)
    ours, our_info = steered.transcribe(clip("speech"), **options)
    assert [asdict(s) for s in ours] == [asdict(s) for s in theirs]
    assert our_info == their_info


def test_identical_at_alpha_zero_in_batches(plain: Any, steered: WhisperModel) -> None:
    steered.alpha = 0
    options = {"vad_filter": False, "word_timestamps": True}
    theirs = faster_whisper.BatchedInferencePipeline(plain).transcribe(clip("noise"), **options)
    ours = BatchedInferencePipeline(steered).transcribe(clip("noise"), **options)
    assert [asdict(s) for s in ours[0]] == [asdict(s) for s in theirs[0]]
    assert ours[1] == theirs[1]
    assert np.array_equal(np.array(steered.encode(mel("noise"))), np.array(plain.encode(mel("noise"))))


def test_looks_like_the_original() -> None:
    for ours, theirs in (
        (WhisperModel, faster_whisper.WhisperModel),
        (BatchedInferencePipeline, faster_whisper.BatchedInferencePipeline),
    ):
        assert inspect.signature(ours.transcribe) == inspect.signature(theirs.transcribe)
        assert inspect.getargs(ours.transcribe.__code__) == inspect.getargs(theirs.transcribe.__code__)


# ---------- withheld windows


@pytest.mark.parametrize("words", [False, True])
def test_noise_gives_no_segment_and_a_record(steered: WhisperModel, words: bool) -> None:
    before = len(steered.withheld)
    found, info = steered.transcribe(clip("noise"), word_timestamps=words)
    assert list(found) == [] and info.duration == 8.0
    (record,) = steered.withheld[before:]
    assert (record.start, record.end, record.text) == (0.0, 8.0, INVENTED)
    assert record.score > 0.9 and record.no_speech_prob is not None and 0 < record.no_speech_prob < 1
    assert record.avg_logprob is not None and -1 < record.avg_logprob < 0


def test_speech_keeps_its_words_and_times(plain: Any, steered: WhisperModel) -> None:
    theirs = list(plain.transcribe(clip("speech"), word_timestamps=True)[0])
    ours = list(steered.transcribe(clip("speech"), word_timestamps=True)[0])
    assert "".join(s.text for s in ours) == SPOKEN
    assert [w.word for s in ours for w in s.words] == [w.word for s in theirs for w in s.words]
    starts = [[w.start for s in found for w in s.words] for found in (ours, theirs)]
    assert np.abs(np.subtract(*starts)).max() <= 0.1


@pytest.mark.parametrize("pipeline", [BatchedInferencePipeline, faster_whisper.BatchedInferencePipeline])
def test_batches_with_noise_and_speech(steered: WhisperModel, pipeline: Any) -> None:
    audio = np.concatenate([clip("noise"), clip("speech"), clip("noise")])
    clips = [{"start": 0.0, "end": 8.0}, {"start": 8.0, "end": 13.38}, {"start": 13.39, "end": 21.38}]
    before = len(steered.withheld)
    found, _ = pipeline(steered).transcribe(audio, clip_timestamps=clips, word_timestamps=True)
    segments = list(found)
    assert "".join(s.text for s in segments) == SPOKEN
    assert 8.0 <= segments[0].start <= segments[-1].end <= 13.5
    records = steered.withheld[before:]
    assert [r.text for r in records] == [INVENTED, INVENTED]
    if pipeline is BatchedInferencePipeline:
        assert [(round(r.start or 0, 2), round(r.end or 0, 2)) for r in records] == [(0, 8), (13.39, 21.38)]


def test_times_of_withheld_windows_are_those_before_voice_detection(
    steered: WhisperModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = np.concatenate([np.zeros(32000, np.float32), clip("noise")])
    module = inspect.getmodule(faster_whisper.WhisperModel)
    heard = [{"start": 32000, "end": 160000}]
    monkeypatch.setattr(module, "get_speech_timestamps", lambda *args, **kwargs: copy.deepcopy(heard))
    for model in (steered, BatchedInferencePipeline(steered)):
        assert list(model.transcribe(audio, vad_filter=True)[0]) == []
        assert (steered.withheld[-1].start, steered.withheld[-1].end) == (2.0, 10.0)


def test_collecting_takes_the_records(steered: WhisperModel) -> None:
    before = steered.withheld
    with collecting(steered) as collector:
        assert list(steered.transcribe(clip("noise"), beam_size=1)[0]) == []
    assert [r.text for r in collector.records] == [INVENTED] and steered.withheld == before


def test_generate_itself(steered: WhisperModel) -> None:
    """What programs built on faster-whisper call: mel or encoded features, batches, asynchronous."""
    ct2 = steered.model
    features = faster_whisper.transcribe.get_ctranslate2_storage(mel("noise", "speech"))
    prompt = steered.hf_tokenizer.token_to_id("<|startoftranscript|>")
    handle = ct2.handles[0]
    try:
        handle.decode_withheld = False
        silent, spoken = ct2.generate(features, [[prompt]] * 2, beam_size=1)
        assert silent.sequences_ids == [[]] and len(spoken.sequences_ids[0]) > 10
        assert steered.withheld[-1].text is None
    finally:
        handle.decode_withheld = True
    later = ct2.generate(ct2.encode(features), [[prompt]] * 2, beam_size=1, asynchronous=True)
    assert [r.result().sequences_ids[0] for r in later] == [[], spoken.sequences_ids[0]]
    assert steered.withheld[-1].text == INVENTED


# ---------- the edits


@pytest.mark.parametrize("kind", ["shift", "latents"])
def test_encoder_output_is_that_of_the_hook(kind: str) -> None:
    made = direction() if kind == "shift" else Steering(load_steering("mini.en").edits, None)
    reference = load_model("mini.en", device="cpu")
    model = WhisperModel(str(mini_ct2()), alpha=0.5, steering=made, **CPU)
    features = mel("speech")
    for alpha in (0.5, 1.0):
        model.alpha = alpha
        with whisper_steer.steer(reference, alpha=alpha, steering=made), torch.no_grad():
            expected = reference.encoder(torch.from_numpy(features)).numpy()
        assert np.abs(np.array(model.encode(features)) - expected).max() < 5e-5
    model.alpha = 0
    with torch.no_grad():
        expected = reference.encoder(torch.from_numpy(features)).numpy()
    assert np.abs(np.array(model.encode(features)) - expected).max() < 5e-5


def test_shifts_need_no_pytorch_encoder() -> None:
    model = WhisperModel(str(mini_ct2("int8")), steering=direction(), **CPU)
    assert model.model._made.shifted is None  # nothing is loaded before it is needed
    model.encode(mel("speech"))
    patched = model.model._made.shifted[1]
    assert model.model._made.encoder is None and patched is not model.model.plain
    model.encode(mel("speech"))
    assert model.model._made.shifted[1] is patched  # the same alpha: nothing is loaded again
    model.alpha = 0
    model.encode(mel("speech"))
    model.alpha = 1.0
    model.encode(mel("speech"))
    assert model.model._made.shifted[1] is patched


@pytest.mark.parametrize("dtype", ["float32", "int16", "int8"])
def test_a_change_of_alpha_is_the_whole_file_patched(dtype: str) -> None:
    """Encoder output and words, bit for bit, of a model of which all is loaded again."""
    files = {path.name: path.read_bytes() for path in mini_ct2(dtype).iterdir()}
    ours = WhisperModel("mini.en", files=dict(files), steering=direction(), alpha=0.2, **CPU)
    for alpha in (1.0, 0.5):
        ours.alpha = alpha
        bias = {ffn_bias_name(at): vector for at, vector in constant_shifts(direction(), alpha).items()}
        whole = {**files, "model.bin": added_bytes(files["model.bin"], bias)}
        reference = faster_whisper.WhisperModel("mini.en", files=whole, **CPU)
        assert np.array_equal(np.array(ours.encode(mel("speech"))), np.array(reference.encode(mel("speech"))))
    found, expected = (list(m.transcribe(clip("speech"), beam_size=1)[0]) for m in (ours, reference))
    assert [asdict(segment) for segment in found] == [asdict(segment) for segment in expected] != []


def test_unloading_and_loading_again() -> None:
    model = WhisperModel(str(mini_ct2("int8")), steering=direction(), **CPU)
    before = np.array(model.encode(mel("speech")))
    model.model.unload_model()
    assert not model.model.model_is_loaded and model.model._made.shifted is None
    model.model.load_model()
    assert model.model.model_is_loaded and np.array_equal(np.array(model.encode(mel("speech"))), before)


# ---------- construction


def test_from_memory_and_arguments_of_its_own(plain: Any) -> None:
    files = {path.name: path.read_bytes() for path in mini_ct2().iterdir()}
    given = dict(files)
    model = WhisperModel("mini.en", files=given, alpha=0.8, steering=direction(), **CPU)
    assert given == files and model.alpha == 0.8 and model.steering is not None
    assert not np.allclose(np.array(model.encode(mel("speech"))), np.array(plain.encode(mel("speech"))))
    with pytest.raises(ModelError, match="files has no model.bin"):
        WhisperModel("mini.en", files={"config.json": b"{}"})
    with pytest.raises(UsageError, match="alpha is -1"):
        WhisperModel(str(mini_ct2()), alpha=-1)
    with pytest.raises(TypeError):
        WhisperModel(str(mini_ct2()), no_such_parameter=1)


def test_steering_of_another_model() -> None:
    wrong = Steering((Shift(0, torch.ones(64), 1.0),), None)
    with pytest.raises(MismatchError, match="d_model 64"):
        WhisperModel(str(mini_ct2()), steering=wrong, **CPU)


def test_a_quantised_encoder_is_not_checked(caplog: pytest.LogCaptureFixture) -> None:
    foreign = Steering(direction().edits, None, {"base_model": "another", "encoder_sha256": "0" * 64})
    with pytest.raises(MismatchError, match="of the same shape"):
        WhisperModel(str(mini_ct2()), steering=foreign, **CPU)
    assert caplog.text == ""
    for _ in range(2):
        WhisperModel(str(mini_ct2("int8")), steering=foreign, **CPU)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{mini_ct2('int8')} is quantised: that its encoder (mini.en) is the one the steering was made for "
        "(another) cannot be checked"
    )
    WhisperModel(str(mini_ct2("int8")), **CPU)  # kept under the model's own name
    assert len(caplog.records) == 1


def test_the_encoder_in_pytorch_has_the_models_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    original, threads = ct2_steering.run_encoder, []

    def noting(*args: Any) -> torch.Tensor:
        threads.append(torch.get_num_threads())
        return original(*args)

    monkeypatch.setattr(ct2_steering, "run_encoder", noting)
    for count in (7, 0):
        WhisperModel(str(mini_ct2("int8")), device="cpu", cpu_threads=count).encode(mel("noise"))
    # 0: PyTorch's own choice, which a fresh start of its pool may read anew
    assert threads[0] == 7 and threads[1] != 7 and torch.get_num_threads() != 7


def test_alpha_from_zero_finds_the_steering() -> None:
    model = WhisperModel(str(mini_ct2("int8")), alpha=0, **CPU)
    assert model.steering is None and model.alpha == 0 and model.withheld == []
    model.alpha = 1.0  # quantised: found by its name, since its hash says nothing
    assert model.steering is not None and text(model.transcribe(clip("noise"))) == ""


def test_empty_audio(steered: WhisperModel) -> None:
    nothing = np.zeros(0, np.float32)
    assert list(steered.transcribe(nothing)[0]) == []
    assert list(BatchedInferencePipeline(steered).transcribe(nothing)[0]) == []
    assert steered.supported_languages == ["en"]


# ---------- models that exist already


def test_steer_and_unsteer_an_existing_model(plain: Any) -> None:
    before, kind = plain.model, type(plain)
    pipeline = faster_whisper.BatchedInferencePipeline(plain)
    with whisper_steer.steer(pipeline, files=mini_ct2()) as handle:
        assert isinstance(plain.model, SteeredWhisper) and whisper_steer.handles_of(plain) == (handle,)
        assert text(plain.transcribe(clip("noise"))) == ""
        assert text(pipeline.transcribe(clip("noise"), vad_filter=False)) == ""
        assert [(r.start, r.end) for r in handle.withheld] == [(0.0, 8.0)] * 2
        with whisper_steer.steer(plain, steering=direction()) as second:
            assert whisper_steer.handles_of(plain) == (handle, second)
            with pytest.raises(UsageError, match="not steered yet"):
                whisper_steer.steer(plain, files=mini_ct2())
    assert plain.model is before and type(plain) is kind and whisper_steer.handles_of(plain) == ()
    assert type(pipeline) is faster_whisper.BatchedInferencePipeline
    assert text(plain.transcribe(clip("noise"))).strip() == INVENTED


def test_files_are_searched_for_and_checked(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="pass files=FOLDER"):
        whisper_steer.steer(plain)
    snapshot = tmp_path / "models--someone--faster-whisper-mini.en" / "snapshots" / "0"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(mini_ct2())
    with whisper_steer.steer(plain) as handle:
        assert handle.steering.metadata["base_model"] == "mini.en"
    other = tmp_path / "other"
    other.mkdir()
    patched = added_bytes(
        mini_ct2(), {"encoder/layer_norm/beta": np.linspace(-50, 50, 192, dtype=np.float32)}
    )
    (other / "model.bin").write_bytes(patched)
    with pytest.raises(MismatchError, match="hold another model"):
        whisper_steer.steer(plain, files=other)
    with pytest.raises(UsageError, match="files is for a faster-whisper model"):
        whisper_steer.steer(load_model("mini.en", device="cpu"), files=other)


# ---------- segments that are walked through later


def test_segments_stay_steered_behind_the_block(plain: Any) -> None:
    pipeline = faster_whisper.BatchedInferencePipeline(plain)
    before = list(plain.transcribe(clip("noise"))[0])
    with whisper_steer.steer(pipeline, files=mini_ct2()) as handle:
        one_by_one, _ = plain.transcribe(clip("noise"))
        in_batches, _ = pipeline.transcribe(clip("noise"), vad_filter=False)
    assert handle.withheld == [] and plain.transcribe(clip("noise"))[0] is not one_by_one
    assert list(one_by_one) == list(in_batches) == []
    assert [(record.start, record.end) for record in handle.withheld] == [(0.0, 8.0)] * 2
    assert [asdict(s) for s in plain.transcribe(clip("noise"))[0]] == [asdict(s) for s in before] != []


def test_segments_are_not_steered_by_what_comes_later() -> None:
    model = WhisperModel(str(mini_ct2()), alpha=0, **CPU)
    segments, _ = model.transcribe(clip("noise"))
    with whisper_steer.steer(model):
        assert text((segments, None)).strip() == INVENTED
        assert text(model.transcribe(clip("noise"))) == ""
    segments, _ = model.transcribe(clip("noise"))
    model.alpha = 1.0  # but the model's own dial is live, also from plain on
    assert list(segments) == [] and len(model.withheld) == 1


# ---------- a pipeline sets the model's dial


def test_a_pipeline_takes_alpha_and_steering() -> None:
    model = WhisperModel(str(mini_ct2()), alpha=0, **CPU)
    pipeline = BatchedInferencePipeline(model, alpha=0.8, steering=direction())
    assert (model.alpha, pipeline.alpha) == (0.8, 0.8) and len(model.model.handles) == 1
    assert pipeline.steering is model.steering is not None and pipeline.steering.gate is None
    pipeline.steering = "default"
    assert (pipeline.alpha, len(model.model.handles)) == (0.8, 1) and model.steering.gate is not None
    assert text(pipeline.transcribe(clip("noise"), vad_filter=False)) == ""
    with pytest.raises(MismatchError, match="d_model 64"):
        pipeline.steering = Steering((Shift(0, torch.ones(64), 1.0),), None)
    assert pipeline.alpha == 0.8 and model.steering.gate is not None
    with pytest.raises(UsageError, match="both given"):
        BatchedInferencePipeline(model, alpha=1, profile="strict")
    other = BatchedInferencePipeline(WhisperModel(str(mini_ct2("int8")), alpha=0, **CPU))
    with whisper_steer.steer(other), pytest.raises(UsageError, match="steered already"):
        other.steering = direction()
    assert other.steering is None

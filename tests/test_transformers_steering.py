"""Steering transformers' Whisper: edits, withheld windows in generate() and in pipelines."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from steering_files import brief_whisper, constant_steering, raw_gate
from tiny import latents, mel, outputs

pytest.importorskip("transformers", reason="the runtime under test")

from transformers import (  # noqa: E402
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
    pipeline,
)
from whisper.tokenizer import get_tokenizer  # noqa: E402

from whisper_steer import transformers_steering  # noqa: E402
from whisper_steer.attach import collecting, handles_of, steer  # noqa: E402
from whisper_steer.audio import load_audio  # noqa: E402
from whisper_steer.backends.asked import Asked  # noqa: E402
from whisper_steer.backends.transformers import TransformersBackend  # noqa: E402
from whisper_steer.errors import MismatchError, UsageError  # noqa: E402
from whisper_steer.fileformat import encoder_sha256, model_metadata  # noqa: E402
from whisper_steer.passing import Pass, Step  # noqa: E402
from whisper_steer.steering import Gate, Shift, Steering  # noqa: E402
from whisper_steer.transformers_model import from_openai, vocabulary  # noqa: E402
from whisper_steer.transformers_pipeline import placed  # noqa: E402
from whisper_steer.transformers_steering import OpenAIView, short_name  # noqa: E402
from whisper_steer.zoo import bundled_dir, load_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def originals():
    openai = brief_whisper()
    return openai, from_openai(openai)


@pytest.fixture
def openai(originals):
    return originals[0]


@pytest.fixture
def model(originals):
    return copy.deepcopy(originals[1])


def first_window_silent(openai, features):
    """A gate that withholds features[0] and lets features[1] pass."""
    found = []
    hook = openai.encoder.blocks[1].register_forward_hook(lambda *a: found.append(a[2]))
    openai.encoder(features)
    hook.remove()
    centres = found[0].mean(1)
    coef = centres[0] - centres[1]
    coef = 10 * coef / coef.norm() ** 2
    gate = raw_gate(coef, -float(coef @ (centres[0] + centres[1])) / 2)
    return Steering((), replace(gate, smooth=1499), {**model_metadata(openai), "name": "first"})


def hf_outputs(model, features):
    """Encoder output and that of every layer."""
    layers = []
    take = lambda out: layers.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
    hooks = [layer.register_forward_hook(lambda m, a, out: take(out)) for layer in model.model.encoder.layers]
    with torch.no_grad():
        final = model.model.encoder(features)[0]
    for hook in hooks:
        hook.remove()
    return final, layers


def tokenizer_of(size: int = 51864) -> WhisperTokenizer:
    """transformers' tokenizer made from openai-whisper's ranks; it can decode, all that a pipeline needs."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    own = get_tokenizer(False)
    letters = bytes_to_unicode()
    vocab = {"".join(letters[b] for b in key): rank for key, rank in own.encoding._mergeable_ranks.items()}
    vocab = dict(sorted({**vocab, "<|endoftext|>": own.eot}.items(), key=lambda item: item[1]))
    special = sorted((number, name) for name, number in own.encoding._special_tokens.items())
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [name for number, name in special if number < own.timestamp_begin]}
    )
    tokenizer.add_tokens([name for number, name in special if number >= own.timestamp_begin])
    return tokenizer


# ---------- the model


def test_a_converted_model_computes_the_same(openai, model):
    final, layers = hf_outputs(model, mel()[None])
    with torch.no_grad():
        expected, blocks = outputs(openai, mel()[None])
    assert torch.allclose(final, expected, atol=1e-5)
    assert torch.allclose(layers[1], blocks[1], atol=1e-5)


def test_the_view_hashes_like_the_openai_model(openai, model):
    view = OpenAIView(model)
    assert encoder_sha256(view) == encoder_sha256(openai)
    assert (view.dims, view.name, view.exact) == (openai.dims, "tiny", True)
    assert not OpenAIView(model.bfloat16()).exact


def test_names():
    assert short_name("openai/whisper-small.en") == "small.en"
    assert short_name("/models/mini.en/") == "mini.en"
    assert short_name("me/whisper-mine") == "whisper-mine"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see conftest
def test_vocabularies():
    assert [vocabulary(size).num_languages for size in (51864, 51865, 51866)] == [99, 99, 100]
    assert vocabulary(1000) is None


# ---------- edits


def test_edits_are_those_of_openai_whisper(openai, model):
    shift = Shift(1, torch.linspace(-1, 1, 64), 2.0)
    steering = Steering((shift, latents(2)), raw_gate(torch.zeros(64), 1.0))
    with steer(openai, steering=steering), torch.no_grad():
        expected, _ = outputs(openai, mel()[None])
    plain, _ = hf_outputs(model, mel()[None])
    with steer(model, steering=steering) as handle:
        steered, _ = hf_outputs(model, mel()[None])
        handle.alpha = 0
        off, _ = hf_outputs(model, mel()[None])
    assert torch.allclose(steered, expected, atol=1e-5)
    assert (steered - plain).abs().max() > 0.01
    assert torch.equal(off, plain)
    assert torch.equal(hf_outputs(model, mel()[None])[0], plain)


def test_a_tuple_from_the_layer_keeps_its_other_parts(model):
    """transformers 4 returns (output, attention weights)."""
    registry = transformers_steering.TransformersRegistry(model)
    steering = Steering((Shift(1, torch.ones(64), 1.0),))
    registry._local.current = Pass((Step(None, 1.0, steering),), of_decode=True)
    after = registry._block_hook(1)
    x = torch.zeros(1, 3, 64)
    edited, other = after(model, (), (x, "weights"))
    assert torch.equal(edited, torch.ones(1, 3, 64)) and other == "weights"
    assert torch.equal(after(model, (), x), torch.ones(1, 3, 64))
    assert registry._block_hook(0)(model, (), (x,)) is None


def test_half_precision_is_clamped_like_the_layer(model):
    steering = Steering((Shift(3, torch.full((64,), 1e5), 1.0),))
    model = model.half()
    with steer(model, steering=steering):
        _, layers = hf_outputs(model, mel()[None].half())
    assert layers[3].dtype == torch.float16
    assert float(layers[3].max()) == 64512  # 65504 - 1000, rounded


def test_bfloat16(model, caplog):
    steering = constant_steering(brief_whisper(), -1.0)
    plain, _ = hf_outputs(model.bfloat16(), mel()[None].bfloat16())
    with steer(model, steering=steering):
        steered, _ = hf_outputs(model, mel()[None].bfloat16())
    assert steered.dtype == torch.bfloat16 and not torch.equal(steered, plain)
    assert "its effect is not calibrated" in caplog.text  # rounded weights prove nothing


def test_float32_of_another_model_is_refused(model):
    other = constant_steering(brief_whisper(seed=5), 1.0)
    with pytest.raises(MismatchError, match="of the same shape"):
        steer(model, steering=other)


def test_what_cannot_be_steered():
    with pytest.raises(UsageError, match="openai-whisper Whisper.*WhisperForConditionalGeneration"):
        steer(torch.nn.Linear(1, 1))


# ---------- generate


def test_withheld_windows_have_no_words(openai, model):
    features = torch.stack([mel(0), mel(1)])
    plain = model.generate(features)
    steering = first_window_silent(openai, features)
    with steer(model, steering=steering, decode_withheld=True) as handle:
        steered = model.generate(features)
        (record,) = handle.withheld
    assert (plain[0] != model.generation_config.pad_token_id).sum() > 2
    assert (steered[0] == model.generation_config.pad_token_id).all()
    assert torch.equal(steered[1], plain[1][: steered.shape[1]])
    words = [token for token in plain[0].tolist() if token < get_tokenizer(False).eot]
    assert record.text == get_tokenizer(False).decode(words)
    assert (record.start, record.end, record.no_speech_prob, record.avg_logprob) == (0.0, 30.0, None, None)
    assert 0.5 < record.score <= 1
    assert torch.equal(model.generate(features), plain)


def test_decode_withheld_false_runs_the_decoder_on_the_other_windows_only(openai, model):
    features = torch.stack([mel(0), mel(1)])
    plain, rows = model.generate(features), []
    hook = model.model.decoder.register_forward_pre_hook(
        lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True
    )
    with steer(model, steering=first_window_silent(openai, features), decode_withheld=False) as handle:
        steered = model.generate(features)
        assert set(rows) == {1}
        rows.clear()
        nothing = model.generate(features[:1])
        assert rows == []
    hook.remove()
    assert [record.text for record in handle.withheld] == [None, None]
    assert torch.equal(steered[1], plain[1][: steered.shape[1]])
    assert nothing.shape == (1, 0) and nothing.dtype == torch.int64


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"return_timestamps": True}])
def test_beams_and_timestamps(model, openai, options):
    features = torch.stack([mel(0), mel(1)])
    plain = model.generate(features, **options)
    with steer(model, steering=first_window_silent(openai, features)):
        steered = model.generate(features, **options)
    assert (steered[0] == model.generation_config.pad_token_id).all()
    assert torch.equal(steered[1], plain[1][: steered.shape[1]])


@pytest.mark.parametrize("decode_withheld", [True, False])
def test_a_dict_of_outputs_is_silent_behind_the_prompt(model, openai, decode_withheld):
    features = torch.stack([mel(0), mel(1)])
    plain = model.generate(features, return_dict_in_generate=True)
    steering = first_window_silent(openai, features)
    with steer(model, steering=steering, decode_withheld=decode_withheld):
        steered = model.generate(features, return_dict_in_generate=True)
    end = get_tokenizer(False).eot
    assert steered.sequences.shape == plain.sequences.shape
    assert (steered.sequences[0, 2:] == end).all()  # <|startoftranscript|><|notimestamps|>
    assert torch.equal(steered.sequences[1], plain.sequences[1])


@pytest.mark.parametrize("decode_withheld", [True, False])
def test_the_fallback_goes_on_for_the_other_windows(model, openai, decode_withheld):
    """Nothing is ever good enough here: every window that is not withheld is tried at both temperatures."""
    features, batches = torch.stack([mel(0), mel(1)]), []
    hook = model.model.encoder.register_forward_pre_hook(
        lambda m, a, k: batches.append(len(k["input_features"] if k else a[0])), with_kwargs=True
    )
    steering = first_window_silent(openai, features)
    with steer(model, steering=steering, decode_withheld=decode_withheld) as handle:
        steered = model.generate(
            features,
            temperature=(0.0, 0.5),
            logprob_threshold=10.0,
            compression_ratio_threshold=1.35,
            return_timestamps=True,
        )
    hook.remove()
    # one window is left, without beams: it is encoded only once
    assert batches == ([2, 1] if decode_withheld else [2])
    (record,) = handle.withheld
    assert (record.avg_logprob is not None) == decode_withheld
    assert (steered[0] == model.generation_config.pad_token_id).all()
    assert (steered[1] != model.generation_config.pad_token_id).any()


def test_long_audio_has_empty_segments_with_their_times(model, openai):
    features = torch.cat([mel(0), mel(1), mel(0)[:, :500]], dim=1)[None]
    steering = first_window_silent(openai, torch.stack([mel(0), mel(1)]))
    with steer(model, steering=steering), collecting(model) as collector:
        result = model.generate(features, return_segments=True, return_timestamps=True)
    first, second = result["segments"][0][:2]
    assert len(first["tokens"]) == 0 and (float(first["start"]), float(first["end"])) == (0.0, 30.0)
    assert len(second["tokens"]) > 0
    assert (collector.records[0].start, collector.records[0].end) == (0.0, 30.0)


def test_the_attention_mask_says_where_the_audio_ends(model, openai):
    features = torch.stack([mel(0), mel(1)])
    mask = torch.zeros(2, 3000, dtype=torch.long)
    mask[:, :800] = 1
    with steer(model, steering=first_window_silent(openai, features)) as handle:
        model.generate(features, attention_mask=mask)
    assert (handle.withheld[0].start, handle.withheld[0].end) == (0.0, 8.0)


def test_encoded_input_is_left_alone(model):
    """There is nothing to gate: the encoder does not run."""
    encoded = model.model.encoder(mel()[None])
    plain = model.generate(encoder_outputs=encoded)
    with steer(model, steering=constant_steering(brief_whisper(), 5.0), decode_withheld=False):
        assert torch.equal(model.generate(encoder_outputs=encoded), plain)


def test_handles_come_and_go_without_a_trace(model):
    before = sorted(model.__dict__)
    first = steer(model, steering=constant_steering(brief_whisper(), 1.0))
    second = steer(model, steering=constant_steering(brief_whisper(), -1.0), alpha=0.5)
    assert handles_of(model) == (first, second)
    with pytest.raises(UsageError, match="cannot be copied"):
        copy.deepcopy(model)
    first.remove()
    second.remove()
    assert handles_of(model) == () and sorted(model.__dict__) == before
    assert not any(layer._forward_hooks for layer in model.model.encoder.layers)
    assert not model.model.encoder._forward_pre_hooks


# ---------- pipelines


@pytest.fixture(scope="module")
def mini():
    found = load_model("mini.en", device="cpu")
    return found, from_openai(found)


@pytest.fixture(scope="module")
def recogniser(mini):
    return pipeline(
        "automatic-speech-recognition",
        model=mini[1],
        tokenizer=tokenizer_of(),
        feature_extractor=WhisperFeatureExtractor(feature_size=80),
        device="cpu",
    )


@pytest.fixture(scope="module")
def clips():
    return {name: load_audio(bundled_dir() / "mini.en/demo" / f"{name}.flac") for name in ("noise", "speech")}


QUICK = {"num_beams": 1, "max_new_tokens": 30}
WORDS = "No, Sarah did not cover the little cat. Who has a blue coat?"


def test_pipeline_short_clips(recogniser, clips):
    batch = [clips["noise"], clips["speech"]]
    plain = [r["text"].strip() for r in recogniser(batch, generate_kwargs=QUICK, batch_size=2)]
    with steer(recogniser, decode_withheld=True) as handle:
        steered = [r["text"].strip() for r in recogniser(batch, generate_kwargs=QUICK, batch_size=2)]
        assert handles_of(recogniser) == (handle,)
    assert plain == ["Thank you for watching.", WORDS]
    assert steered == ["", WORDS]
    (record,) = handle.withheld
    assert record.text.strip() == "Thank you for watching."
    assert (record.start, record.end) == (0.0, pytest.approx(8.0, abs=0.01))


def test_pipeline_in_chunks_tells_where(recogniser, clips):
    """Two windows of 10 s that overlap by 1 s on each side: noise, then speech."""
    sound = np.concatenate([np.resize(clips["noise"], 10 * 16000), clips["speech"]])
    with steer(recogniser) as handle:
        result = recogniser(
            sound, chunk_length_s=10, stride_length_s=1, return_timestamps=True, generate_kwargs=QUICK
        )
    assert [(record.start, record.end) for record in handle.withheld] == [(0.0, 10.0)]
    assert "Who has a blue coat?" in result["text"] and "watching" not in result["text"]
    assert not {"_forward", "postprocess"} & set(recogniser.__dict__)


def test_pipeline_word_times_of_a_withheld_clip(recogniser, clips):
    with steer(recogniser):
        result = recogniser(clips["noise"], return_timestamps="word", generate_kwargs=QUICK)
    assert result == {"text": "", "chunks": []}


def test_chunks_find_their_place_over_batches():
    local = SimpleNamespace()

    def starts(stride, is_last):
        with placed(local, {"stride": stride, "is_last": is_last}, 16000):
            assert local.sequential == (local.offsets is None)
            return local.offsets

    second = 16000
    chunks = [(10 * second, 0, second), (10 * second, second, second)]
    assert starts(chunks, [False, False]) == [0.0, 8.0]
    assert starts((5 * second, second, 0), True) == [16.0]
    assert starts((5 * second, 0, 0), True) == [0.0]
    assert starts(None, True) is None
    assert (local.offsets, local.sequential) == (None, False)


# ---------- the backend


def test_backend_words_are_those_of_the_reference(mini, clips):
    sound = np.concatenate([np.resize(clips["noise"], 30 * 16000), clips["speech"]])
    backend, seen = TransformersBackend(mini[1], Asked(alpha=1.0, decode_withheld=True)), []
    result = backend.transcribe(
        sound, {"temperature": 0.0, "word_timestamps": True}, lambda done, total: seen.append((done, total))
    )
    # openai-whisper itself, told "Thank you for watching." as the previous words, gets the second half only
    assert result["text"].strip() == WORDS
    (withheld,) = result["suppressed"]
    assert (withheld.start, withheld.end) == (0.0, 30.0) and "watching" in withheld.text
    assert (result["language"], result["model"], result["alpha"]) == ("en", "mini.en", 1.0)
    first = result["segments"][0]
    assert (first["id"], first["seek"], first["temperature"]) == (0, 3000, 0.0)
    assert first["start"] >= 30 and -1 < first["avg_logprob"] <= 0
    spoken = [word for segment in result["segments"] for word in segment["words"]]
    assert "".join(word["word"] for word in spoken).strip() == WORDS
    assert all(0 < word["probability"] <= 1 and word["start"] <= word["end"] for word in spoken)
    assert seen[-1] == (pytest.approx(35.4, abs=0.2),) * 2
    assert handles_of(mini[1]) == () and "_need_fallback" not in mini[1].__dict__


def test_backend_at_alpha_0_is_plain(mini, clips):
    result = TransformersBackend(mini[1], Asked(alpha=0)).transcribe(clips["noise"], {"beam_size": 1})
    assert result["text"].strip() == "Thank you for watching."
    assert (result["steering"], result["alpha"], result["suppressed"]) == (None, 0.0, [])
    empty = TransformersBackend(mini[1], Asked(alpha=0)).transcribe(np.zeros(0, "f4"), {})
    assert (empty["text"], empty["segments"]) == ("", [])


def test_backend_refuses_what_it_cannot_do(mini):
    backend = TransformersBackend(mini[1], Asked(alpha=0))
    for options, message in [
        ({"nonsense": 1}, "unknown option 'nonsense'"),
        ({"hallucination_silence_threshold": 2.0}, "no counterpart of hallucination_silence_threshold"),
        ({"logprob_threshold": None}, "needs logprob_threshold"),
    ]:
        with pytest.raises(UsageError, match=message):
            backend.transcribe(np.zeros(1600, "f4"), options)
    with pytest.raises(UsageError, match="expected a name, a path"):
        TransformersBackend(3)


def test_backend_loads_a_transformers_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "tiny")
    loaded = TransformersBackend(tmp_path / "tiny", device="cpu").load()
    assert isinstance(loaded, WhisperForConditionalGeneration)
    assert torch.equal(loaded.model.encoder.layers[0].fc1.weight, model.model.encoder.layers[0].fc1.weight)


def test_gates_read_the_stream_before_edits(model, openai):
    """The same verdict at any strength of the edit."""
    gate: Gate = first_window_silent(openai, torch.stack([mel(0), mel(1)])).gate
    steering = Steering((Shift(1, torch.full((64,), 50.0), 1.0),), gate, model_metadata(openai))
    with steer(model, steering=steering) as handle:
        model.generate(torch.stack([mel(0), mel(1)]))
    assert len(handle.withheld) == 1

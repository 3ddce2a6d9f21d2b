"""Frames against what the models themselves report, on tiny models of the true classes."""

import threading

import numpy as np
import pytest
import torch
from calibration_tools import make_terse_whisper, sound
from test_zoo import hf_config, hf_state
from whisper.model import ModelDimensions, Whisper

from calibration.activations import encode_clip, window_mels
from calibration.adapters import RawAudioEncoder, TransformersWhisperEncoder, WhisperEncoder
from whisper_steer.convert_hf import to_openai
from whisper_steer.errors import AudioError, UsageError
from whisper_steer.fileformat import model_metadata

# family, feat_extract_norm, do_stable_layer_norm: both kinds of every switch, as in the released models
RAW = [
    ("hubert", "group", False),  # base
    ("hubert", "layer", True),  # large
    ("hubert", "layer", False),
    ("wav2vec2", "group", False),  # base
    ("wav2vec2", "layer", True),  # large-lv60, XLS-R
    ("wav2vec2", "group", True),
    ("wavlm", "group", False),  # base, base-plus
    ("wavlm", "layer", True),  # large
]
NAMES = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2", "wavlm": "WavLM"}


def raw_model(family="hubert", norm="group", stable=False, head="Model", **changes):
    """A randomly initialised model, 3 blocks of width 24."""
    transformers = pytest.importorskip("transformers")
    settings = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": [8] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": norm,
        "conv_bias": norm == "layer",
        "do_stable_layer_norm": stable,
        "initializer_range": 0.3,  # so that blocks and clips differ clearly
        "vocab_size": 5,
        "mask_feature_prob": 0.5,  # SpecAugment, which only training may apply
        "layerdrop": 0.9,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{NAMES[family]}Config")(**settings)
        return getattr(transformers, f"{NAMES[family]}{head}")(config).train()


def scaled(audio):
    return (audio - audio.mean()) / np.sqrt(audio.var() + 1e-7)


CLIPS = [
    sound("a", 0.41, speech=True),
    sound("b", 0.7, speech=False),
    sound("c", 0.41, speech=False),
    np.zeros(399, np.float32),  # one sample short of a frame
    sound("d", 0.025, speech=True),  # 400 samples: exactly one
]


@pytest.fixture(scope="module")
def whisper_model():
    return make_terse_whisper(1)


@pytest.fixture(scope="module")
def openai(whisper_model):
    return WhisperEncoder(whisper_model)


# ---------- openai-whisper


def test_whisper_frames_are_those_of_encode_clip(openai, whisper_model):
    audios = [sound("a", 1.23, speech=True), sound("b", 31.0, speech=False), np.zeros(0, np.float32)]
    both = openai.encode(audios, [0, 1])
    assert [frames.shape for frames in both] == [(2, 62, 32), (2, 1550, 32), (2, 0, 32)]
    for audio, frames in zip(audios[:2], both, strict=False):
        assert frames.dtype == torch.float32 and frames.device == openai.device and not frames.requires_grad
        torch.testing.assert_close(frames, encode_clip(whisper_model, audio).frames, rtol=1e-5, atol=1e-5)


def test_layers_come_in_the_order_asked_for_and_later_blocks_do_not_run(openai, whisper_model):
    audio = sound("a", 0.5, speech=True)
    both = openai.encode([audio], [0, 1])[0]
    assert torch.equal(openai.encode([audio], [1, 0])[0], both.flip(0))
    ran = []
    handle = whisper_model.encoder.blocks[1].register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        assert torch.equal(openai.encode([audio], [0])[0], both[:1]) and not ran
        openai.encode([audio, audio], [0, 1])
        assert ran == [1]  # all layers and both clips in one pass
    finally:
        handle.remove()
    assert not any(block._forward_hooks for block in whisper_model.encoder.blocks)


def test_an_error_in_the_model_leaves_no_hooks(whisper_model, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(whisper_model.encoder.blocks[1].mlp, "forward", fails)
    encoder = WhisperEncoder(whisper_model)
    for _ in range(2):  # the second time shows that the lock was given back
        with pytest.raises(RuntimeError, match="out of memory"):
            encoder.encode([CLIPS[0]], [0, 1])
    assert not any(block._forward_hooks for block in whisper_model.encoder.blocks)


def test_audio_of_any_memory_layout_is_taken(openai):
    audio = CLIPS[0].copy()
    audio.flags.writeable = False
    (frames,) = openai.encode([audio], [0])
    doubled = np.repeat(audio.astype(np.float64), 2)[::2]
    assert torch.equal(openai.encode([doubled], [0])[0], frames)


def test_threads_may_share_an_encoder(openai):
    alone = [openai.encode([clip], [layer])[0] for clip, layer in ((CLIPS[0], 0), (CLIPS[1], 1))]
    results = {}

    def work(index):
        results[index] = [openai.encode([CLIPS[index]], [index])[0] for _ in range(4)]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        assert len(results[index]) == 4
        for frames in results[index]:
            torch.testing.assert_close(frames, alone[index])


def test_whisper_metadata(openai, whisper_model):
    assert openai.metadata() == {**model_metadata(whisper_model), "family": "whisper", "precision": "float32"}
    assert (openai.n_layers, openai.d_model) == (2, 32)
    assert (openai.frame_samples, openai.max_samples) == (320, 480_000)
    assert WhisperEncoder(whisper_model, autocast=torch.bfloat16).metadata()["precision"] == "bfloat16"


def test_what_cannot_be_encoded_is_said_in_one_line(openai, whisper_model):
    audio = sound("a", 0.5, speech=True)
    with pytest.raises(UsageError, match=r"layer 2 does not exist.*0 to 1"):
        openai.encode([audio], [0, 2])
    with pytest.raises(UsageError, match="no layers"):
        openai.encode([audio], [])
    with pytest.raises(AudioError, match=r"\(2, 4000\).*one channel"):
        openai.encode([audio.reshape(2, -1)], [0])
    with pytest.raises(AudioError, match="not finite"):
        openai.encode([np.array([0.1, np.nan])], [0])
    with pytest.raises(UsageError, match="torch.float64"):
        WhisperEncoder(whisper_model, autocast=torch.float64)
    with pytest.raises(UsageError, match=r"100 positions.*expected 1500"):
        WhisperEncoder(Whisper(ModelDimensions(80, 100, 32, 1, 1, 100, 8, 32, 1, 1)))
    assert openai.encode([], [0]) == []


@pytest.mark.parametrize("family", ["whisper", "hubert", "wavlm"])
def test_autocast_stays_near_full_precision(whisper_model, family):
    if family == "whisper":
        plain, rounded = (WhisperEncoder(whisper_model, autocast=t) for t in (None, torch.bfloat16))
    else:
        model = raw_model(family, "layer", True)
        plain, rounded = (
            RawAudioEncoder(model, do_normalize=True, autocast=t) for t in (None, torch.bfloat16)
        )
    layers = range(plain.n_layers)
    for exact, near in zip(plain.encode(CLIPS[:2], layers), rounded.encode(CLIPS[:2], layers), strict=True):
        assert near.dtype == torch.float32 and not torch.equal(exact, near)
        assert (exact - near).norm() < 0.1 * exact.norm()


# ---------- Whisper through transformers


def transformers_whisper(model, kind="WhisperForConditionalGeneration"):
    """The same weights as a transformers model."""
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        **{**hf_config(model), "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_layerdrop": 0.9}
    )
    twin = getattr(transformers, kind)(config)
    state = hf_state(model)
    if kind == "WhisperModel":
        state = {name.removeprefix("model."): value for name, value in state.items()}
    else:
        state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    twin.load_state_dict(state)
    return twin.train()


@pytest.mark.parametrize("kind", ["WhisperModel", "WhisperForConditionalGeneration"])
def test_transformers_whisper_gives_the_frames_of_the_same_openai_whisper(openai, whisper_model, kind):
    twin = TransformersWhisperEncoder(transformers_whisper(whisper_model, kind), name="terse")
    audios = [CLIPS[0], sound("b", 31.0, speech=False)]
    for ours, theirs in zip(openai.encode(audios, [0, 1]), twin.encode(audios, [0, 1]), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert twin.metadata() == {**openai.metadata(), "base_model": "terse"}
    assert (twin.n_layers, twin.d_model, twin.max_samples, twin.family) == (2, 32, 480_000, "whisper")


def test_transformers_whisper_layers_are_its_hidden_states(whisper_model):
    model = transformers_whisper(whisper_model)
    encoder = TransformersWhisperEncoder(model)
    with torch.no_grad():
        out = model.get_encoder()(window_mels(CLIPS[0], 80), output_hidden_states=True)
        (frames,) = encoder.encode([CLIPS[0]], [0, 1])
        assert frames.shape == (2, 21, 32)
        torch.testing.assert_close(frames[0], out.hidden_states[1][0, :21])
        # the last hidden state is behind the final layer norm, the last layer before it
        torch.testing.assert_close(model.get_encoder().layer_norm(frames[1]), out.hidden_states[-1][0, :21])
    # and it goes back to openai-whisper's names unchanged
    assert set(to_openai(model.state_dict())) == set(whisper_model.state_dict())
    assert encoder.name == "unnamed"


# ---------- HuBERT, wav2vec 2.0, WavLM


@pytest.mark.parametrize(("family", "norm", "stable"), RAW)
def test_raw_layers_are_the_models_hidden_states(family, norm, stable):
    model = raw_model(family, norm, stable)
    encoder = RawAudioEncoder(model, do_normalize=True)
    assert not model.training
    assert (encoder.family, encoder.n_layers, encoder.d_model) == (family, 3, 24)
    for clip, frames in zip(CLIPS, encoder.encode(CLIPS, [0, 1, 2]), strict=True):
        if len(clip) < 400:
            assert frames.shape == (3, 0, 24)
            continue
        with torch.no_grad():
            out = model(torch.from_numpy(scaled(clip))[None], output_hidden_states=True)
        assert frames.shape[1] == model._get_feat_extract_output_lengths(torch.tensor(len(clip)))
        close = {"rtol": 1e-3, "atol": 1e-4}
        for layer in range(2):
            torch.testing.assert_close(frames[layer], out.hidden_states[layer + 1][0], **close)
        normed = model.encoder.layer_norm(frames[2]).detach() if stable else frames[2]
        torch.testing.assert_close(normed, out.last_hidden_state[0], **close)
        # releases differ in whether the last hidden state is behind a final layer norm
        last = out.hidden_states[-1][0]
        assert min((last - normed).abs().max(), (last - frames[2]).abs().max()) < 1e-3


@pytest.mark.parametrize(("family", "norm", "stable"), RAW)
def test_frames_do_not_depend_on_the_neighbours(family, norm, stable):
    encoder = RawAudioEncoder(raw_model(family, norm, stable), do_normalize=False)
    together = encoder.encode(CLIPS, [2, 0])
    for clip, frames in zip(CLIPS, together, strict=True):
        torch.testing.assert_close(encoder.encode([clip], [2, 0])[0], frames, rtol=1e-3, atol=1e-4)
    passes = []
    handle = encoder._network.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        encoder.encode(CLIPS, [0])
    finally:
        handle.remove()
    # three different lengths have a frame
    assert len(passes) == (1 if norm == "layer" and family != "wavlm" else 3)


@pytest.mark.parametrize("family", NAMES)
def test_frame_count_is_the_models_own(family):
    model = raw_model(family)
    encoder = RawAudioEncoder(model, do_normalize=False)
    for n in (400, 719, 720, 721, 16_000, 123_457, 480_000):
        assert encoder.n_frames(n) == int(model._get_feat_extract_output_lengths(torch.tensor(n)))
    assert [encoder.n_frames(n) for n in (0, 1, 399, 400, 720, 16_000, 480_000)] == [0, 0, 0, 1, 2, 49, 1499]


def test_input_is_normalised_only_if_the_model_wants_it():
    model = raw_model(norm="layer", stable=True)
    clip = CLIPS[0] + np.float32(0.05)
    wants, raw = (RawAudioEncoder(model, do_normalize=choice) for choice in (True, False))
    torch.testing.assert_close(wants.encode([clip], [0])[0], raw.encode([scaled(clip)], [0])[0])
    assert not torch.allclose(wants.encode([clip], [0])[0], raw.encode([clip], [0])[0], atol=1e-3)
    assert wants.metadata() == {**raw.metadata(), "do_normalize": True}
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)(clip, sampling_rate=16_000)
    np.testing.assert_allclose(scaled(clip), theirs["input_values"][0], rtol=1e-5, atol=1e-6)


def test_audio_beyond_max_samples_is_encoded_in_pieces():
    encoder = RawAudioEncoder(raw_model(), do_normalize=False, max_samples=8000)
    audio = sound("long", 1.26, speech=True)  # 8000 + 8000 + 4160 samples
    (frames,) = encoder.encode([audio], [1])
    parts = [encoder.encode([audio[start : start + 8000]], [1])[0] for start in (0, 8000, 16_000)]
    torch.testing.assert_close(frames, torch.cat(parts, dim=1), rtol=1e-4, atol=1e-5)
    assert [part.shape[1] for part in parts] == [24, 24, 12] and encoder.max_samples == 8000
    # a rest that is too short for a frame has none
    assert encoder.encode([audio[:8100]], [1])[0].shape == (1, 24, 24)


def test_the_digest_is_of_the_weights_that_make_the_frames():
    plain = RawAudioEncoder(raw_model(), do_normalize=False, name="a")
    model = raw_model(head="ForCTC")
    model.hubert.load_state_dict(plain._network.state_dict())
    with torch.no_grad():
        model.hubert.masked_spec_embed.add_(1)  # for training only
    below_head = RawAudioEncoder(model, do_normalize=False, name="a")
    assert below_head.metadata() == plain.metadata()
    assert torch.equal(below_head.encode(CLIPS[:1], [2])[0], plain.encode(CLIPS[:1], [2])[0])
    with torch.no_grad():
        model.hubert.encoder.layers[1].final_layer_norm.bias[0] += 1e-3
    changed = RawAudioEncoder(model, do_normalize=False, name="a").metadata()
    assert changed["encoder_sha256"] != plain.metadata()["encoder_sha256"]
    assert {**changed, "encoder_sha256": plain.metadata()["encoder_sha256"]} == plain.metadata()


def test_models_of_another_kind_are_refused(whisper_model):
    with pytest.raises(UsageError, match="Whisper is not a Whisper: expected transformers' WhisperModel"):
        TransformersWhisperEncoder(whisper_model)
    with pytest.raises(UsageError, match="HubertModel is not a Whisper"):
        TransformersWhisperEncoder(raw_model())
    with pytest.raises(
        UsageError, match="Whisper does not hear raw audio: expected transformers' HubertModel"
    ):
        RawAudioEncoder(whisper_model, do_normalize=True)
    with pytest.raises(UsageError, match="max_samples 300 is too short"):
        RawAudioEncoder(raw_model(), do_normalize=True, max_samples=300)

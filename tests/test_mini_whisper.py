"""Training windows and the training of the bundled model, on a corpus of a few clips."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from whisper.audio import log_mel_spectrogram
from whisper.tokenizer import get_tokenizer

from calibration import bundle, mini_whisper, synthesis, windows
from calibration.mini_whisper import Recipe, Trainee, full_whisper, learning_rate, train
from calibration.windows import IGNORE, Vocabulary, WindowDataset
from whisper_steer.compact import unpack_model
from whisper_steer.fileformat import encoder_sha256

pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed")
TINY = Recipe(d_model=64, heads=1, encoder_blocks=4, decoder_blocks=1, steps=4, warmup=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    synthesis.make_speech_shard(folder / "speech_000.jsonl", 3, 12)
    synthesis.make_non_speech_shard(folder / "nonspeech_000.jsonl", 4, 10)
    return folder


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(windows, "SIZES", {"short": (320, 2), "medium": (750, 1), "full": (1500, 1)})


def test_token_times_follow_the_word_times():
    tokenizer = get_tokenizer(multilingual=False)
    text = "Turn on the light."
    tokens = tokenizer.encode(" " + text)
    words = [[0, 0.0], [5, 0.3], [8, 0.4], [12, 0.5]]
    times = windows.token_times(text, words, 1.0, tokens, tokenizer)
    starts = [start for start, _ in times]
    assert [tokenizer.decode([token]) for token in tokens] == [" Turn", " on", " the", " light", "."]
    assert starts == sorted(starts) and starts[0] == 0
    assert starts[1] == pytest.approx(0.3) and starts[3] == pytest.approx(0.5)
    assert all(start <= end <= 1.0 for start, end in times)


def test_the_same_step_gives_the_same_batch(corpus, small_batches):
    data = WindowDataset(corpus, 1, 100, [(1.0, (1, 0, 0))])
    first, again, other = data[5], data[5], data[6]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["mel"], other["mel"])


def test_targets_are_whisper_sequences(corpus, small_batches):
    data = WindowDataset(corpus, 1, 100, [(1.0, (0.4, 0.3, 0.3))])
    tokenizer, ids = data.tokenizer, data.vocabulary.ids
    kinds = set()
    for step in range(40):
        batch = data[step]
        assert batch["mel"].shape[2] == 2 * batch["phones"].shape[1]
        for row in range(len(batch["tokens"])):
            targets = [ids[i] for i in batch["targets"][row].tolist() if i != IGNORE]
            assert ids[batch["tokens"][row, 0]] == tokenizer.sot and targets[-1] == tokenizer.eot
            first = targets[0]
            if first == tokenizer.no_speech:
                assert targets == [tokenizer.no_speech, tokenizer.eot]
                assert not batch["phones"][row].any()
                kinds.add("no speech")
            elif first == tokenizer.no_timestamps:
                assert all(token < tokenizer.timestamp_begin for token in targets[1:])
                kinds.add("text")
            else:  # Whisper's decoders allow at most 1 s for the first timestamp at the start of a window
                stamps = [t - tokenizer.timestamp_begin for t in targets if t >= tokenizer.timestamp_begin]
                assert stamps == sorted(stamps) and all(stamp % 5 == 0 for stamp in stamps)
                assert stamps[0] <= 50 + batch["offset"][row]
                kinds.add("timestamps")
            frames = batch["phones"].shape[1]
            assert batch["spans"][row].max() < frames and 0 <= batch["offset"][row] <= 1500 - frames
    assert kinds == {"no speech", "text", "timestamps"}


def test_a_window_at_the_start_is_what_whisper_encodes(corpus):
    recipe = TINY
    data = WindowDataset(corpus, 1, 10, [(1.0, (1, 0, 0))])
    torch.manual_seed(0)
    trainee = Trainee(recipe, data.vocabulary, len(data.phonemes)).eval()
    mel = log_mel_spectrogram(data.speech.audio(0)[: 320 * 50], padding=480000)[:, :3000]
    with torch.no_grad():
        assert torch.allclose(
            trainee.encode(mel[None], torch.zeros(1, dtype=torch.long)),
            trainee.whisper.encoder(mel[None]),
            atol=1e-5,
        )


def test_guidance_is_the_log_of_the_attention_inside_the_word(corpus):
    torch.manual_seed(0)
    data = WindowDataset(corpus, 1, 10, [(1.0, (1, 0, 0))])
    trainee = Trainee(TINY, data.vocabulary, 4)
    attention = trainee.whisper.decoder.blocks[0].cross_attn
    h, audio = torch.randn(1, 3, 64), torch.randn(1, 10, 64)
    inside = torch.zeros(1, 3, 10, dtype=torch.bool)
    inside[0, 1, 2:5] = True
    guided = torch.tensor([[False, True, False]])
    weights = torch.softmax(attention.query(h)[0, 1] @ attention.key(audio)[0].T / 8, -1)
    expected = -math.log(float(weights[2:5].sum().detach()))
    loss = mini_whisper._guidance(attention, h, audio, inside, guided).detach()
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_learning_rate_rises_stays_and_falls():
    assert learning_rate(0.0, 0, 100) == pytest.approx(0.01)
    assert learning_rate(0.3, 1000, 100) == pytest.approx(1.0)
    assert learning_rate(0.7, 1000, 100) == pytest.approx(0.51)
    assert learning_rate(1.0, 1000, 100) == pytest.approx(0.02)


def test_a_killed_training_ends_as_an_unbroken_one(corpus, small_batches, tmp_path, monkeypatch):
    monkeypatch.setattr(mini_whisper, "CHECKPOINT_SECONDS", 0)
    train(corpus, tmp_path / "whole", TINY, "cpu", 0)
    save, saves = mini_whisper._save, []

    def killed(path, state):
        save(path, state)
        saves.append(state["step"])
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(mini_whisper, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(corpus, tmp_path / "broken", TINY, "cpu", 0)
    train(corpus, tmp_path / "broken", TINY, "cpu", 0)
    assert saves == [1, 2, 3, 4]
    states = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("whole", "broken")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    # export: the full vocabulary, one shared row, the softmax the trainee was trained with
    model, ids, recipe = full_whisper(tmp_path / "whole" / "checkpoint.pt")
    assert model.dims.n_vocab == 51864 and recipe["step"] == 4
    data = WindowDataset(corpus, 1, 10, [(1.0, (1, 0, 0))])
    trainee = Trainee(TINY, data.vocabulary, len(data.phonemes))
    trainee.load_state_dict(states[0])
    audio, tokens = torch.randn(1, 1500, 64), torch.tensor([[ids.index(50257), ids.index(50362)]])
    with torch.no_grad():
        rows, _ = trainee.decode(tokens, audio, torch.full((1, 2, 2), -1))
        full = model.decoder(torch.tensor([[50257, 50362]]), audio)
    trained = torch.log_softmax(rows, -1)[..., :-1]
    assert torch.allclose(torch.log_softmax(full, -1)[..., ids], trained, atol=1e-4)

    bundle.bundle_model(tmp_path / "whole" / "checkpoint.pt", tmp_path / "toy.en")
    loaded, metadata = unpack_model(tmp_path / "toy.en" / "whisper.safetensors")
    assert encoder_sha256(loaded) == metadata["encoder_sha256"]
    assert metadata["recipe"]["d_model"] == 64 and metadata["base_model"] == "toy.en"
    assert loaded.alignment_heads.to_dense().tolist() == [[True]]
    assert (
        set(metadata["demo"]) == {"noise", "music", "speech"} and metadata["demo"]["speech"].count(".") >= 1
    )
    assert json.dumps(metadata)


def test_the_vocabulary_holds_every_token_that_is_needed(corpus):
    vocabulary = Vocabulary.of_corpus(corpus)
    tokenizer = get_tokenizer(multilingual=False)
    for text in ("Thank you for watching.", synthesis.Shards.open(corpus, "speech").records[0]["text"]):
        assert set(tokenizer.encode(" " + text)) <= set(vocabulary.ids)
    assert {tokenizer.sot, tokenizer.eot, tokenizer.no_speech, tokenizer.timestamp_begin + 1500} <= set(
        vocabulary.ids
    )
    assert np.all(np.diff(vocabulary.ids) > 0) and vocabulary.row_of[vocabulary.ids[7]] == 7

import threading

import numpy as np
import pytest
import torch
import whisper
from conftest import make_tiny_whisper
from test_gate import raw_gate
from test_sae import random_sae
from tiny import OPTIONS, audio, frame_gate, latents, manual, mel, outputs, same_result, says, shift
from whisper.decoding import DecodingOptions

from whisper_steer.attach import handles_of, model_lock, steer
from whisper_steer.registry import registry_of
from whisper_steer.steering import Steering

# ---------- what the hooks compute


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_hooks_equal_the_manual_computation(tiny_whisper, alpha):
    x, steering = mel(shape=(2, 80, 3000)), Steering((shift(1), latents(1), latents(3, "clamp")))
    expected = manual(
        tiny_whisper,
        x,
        {1: lambda h: latents(1)(shift(1)(h, alpha), alpha), 3: lambda h: latents(3, "clamp")(h, alpha)},
    )
    with steer(tiny_whisper, alpha=alpha, steering=steering):
        assert torch.equal(tiny_whisper.encoder(x), expected)
    assert not torch.equal(tiny_whisper.encoder(x), expected)


def test_gated_hooks_equal_the_manual_computation(tiny_whisper):
    x, gate = mel(shape=(2, 80, 3000)), frame_gate(1)
    seen = {}

    def at_gate(h):
        seen["g"] = gate.frame_gate(gate.frame_logits(h))  # before the edit of the same layer
        return h + seen["g"].unsqueeze(-1) * (shift(1)(h, 0.5) - h)

    expected = manual(
        tiny_whisper, x, {1: at_gate, 2: lambda h: h + seen["g"].unsqueeze(-1) * (latents(2)(h, 0.5) - h)}
    )
    with steer(tiny_whisper, alpha=0.5, steering=Steering((shift(1), latents(2)), gate)):
        torch.testing.assert_close(tiny_whisper.encoder(x), expected, rtol=1e-4, atol=1e-4)


def test_frames_where_the_gate_is_closed_keep_every_bit_at_the_edited_layer(tiny_whisper):
    x, gate = mel(shape=(1, 80, 3000)), frame_gate(1)
    _, plain = outputs(tiny_whisper, x)
    g = gate.frame_gate(gate.frame_logits(plain[1]))
    assert 100 < int((g == 0).sum()) < 1400
    with steer(tiny_whisper, steering=Steering((shift(1), latents(1, "scale")), gate)):
        _, steered = outputs(tiny_whisper, x)
    assert torch.equal(steered[1][g == 0], plain[1][g == 0])
    assert (steered[1] != plain[1]).any(-1)[g > 0].all()


def test_where_somebody_speaks_throughout_nothing_changes(tiny_whisper):
    plain = tiny_whisper.encoder(mel(shape=(1, 80, 3000)))
    with steer(tiny_whisper, steering=Steering((shift(2),), says(False))):
        assert torch.equal(tiny_whisper.encoder(mel(shape=(1, 80, 3000))), plain)


def test_the_gate_is_one_encode_of_its_own_latents(tiny_whisper, monkeypatch):
    sae = random_sae(5, d=64, n=400)
    rows = torch.tensor([1, 5, 9])
    encode = {"W_enc": sae.W_enc[rows], "b_enc": sae.b_enc[rows], "theta": sae.theta[rows]}
    changes = {"kind": "latents", "coef": torch.ones(3), "unit": torch.ones(3), "mean": None, "std": None}
    gate = raw_gate(**changes, **encode)
    shapes = []
    linear = torch.nn.functional.linear
    with steer(tiny_whisper, steering=Steering((shift(2),), gate)):
        monkeypatch.setattr(
            torch.nn.functional,
            "linear",
            lambda x, W, b=None: shapes.append(tuple(W.shape)) or linear(x, W, b),
        )
        tiny_whisper.encoder(mel(shape=(1, 80, 3000)))
    own = [shape for shape in shapes if shape not in {(64, 64), (256, 64), (64, 256)}]
    assert own == [(3, 64)]


def test_a_block_called_outside_of_the_encoder_is_left_alone(tiny_whisper):
    x, block = torch.randn(1, 1500, 64), tiny_whisper.encoder.blocks[1]
    plain = block(x)
    with steer(tiny_whisper, steering=Steering((shift(1),))):
        assert torch.equal(block(x), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(tiny_whisper, dtype):
    steering = Steering((shift(1), latents(2)), frame_gate(1))
    x = mel(shape=(1, 80, 3000)).to(dtype)
    plain, _ = outputs(tiny_whisper, x)
    with steer(tiny_whisper, steering=steering):
        steered, blocks = outputs(tiny_whisper, x)
    assert steered.dtype == dtype and all(block.dtype == dtype for block in blocks)
    assert torch.isfinite(steered).all() and not torch.equal(steered, plain)


def test_decoding_in_half_precision(tiny_whisper):
    """openai-whisper's default, also on a CPU when `decode` is called directly."""
    options = DecodingOptions(language="en", sample_len=3)
    with steer(tiny_whisper, steering=Steering((shift(1),), says(False))):
        result = tiny_whisper.decode(mel(), options)
    assert result.audio_features.dtype == torch.float16
    same_result(result, tiny_whisper.decode(mel(), options))  # the gate is closed


# ---------- exceptions


def state_of(model):
    return registry_of(model)._current()


def test_an_exception_in_the_encoder_leaves_no_state(tiny_whisper):
    x = mel(shape=(1, 80, 3000))
    with steer(tiny_whisper, steering=Steering((shift(1), shift(3)), frame_gate(1))):
        good = tiny_whisper.encoder(x)
        result = tiny_whisper.decode(mel(), OPTIONS)

        def fail(module, args, output):
            assert state_of(tiny_whisper) is not None
            raise RuntimeError("broken block")

        hook = tiny_whisper.encoder.blocks[2].register_forward_hook(fail)
        for call in (
            lambda: tiny_whisper.encoder(x),
            lambda: tiny_whisper.decode(mel(), OPTIONS),
            lambda: tiny_whisper(x, torch.tensor([[50257]])),
        ):
            with pytest.raises(RuntimeError, match="broken block"):
                call()
            assert state_of(tiny_whisper) is None
        hook.remove()
        assert torch.equal(tiny_whisper.encoder(x), good)
        same_result(tiny_whisper.decode(mel(), OPTIONS), result)


def test_bad_input_and_interrupts_leave_no_state(tiny_whisper):
    x = mel(shape=(1, 80, 3000))
    with steer(tiny_whisper, steering=Steering((shift(1),), says(False))):
        good = tiny_whisper.encoder(x)
        with pytest.raises(AssertionError, match="incorrect audio shape"):
            tiny_whisper.decode(mel(shape=(80, 2000)), OPTIONS)
        assert state_of(tiny_whisper) is None

        def interrupt(module, args, output):
            raise KeyboardInterrupt

        hook = tiny_whisper.encoder.blocks[2].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny_whisper.encoder(x)
        hook.remove()
        assert torch.equal(tiny_whisper.encoder(x), good)
        assert state_of(tiny_whisper) is None


def test_an_exception_in_the_decoder_releases_the_lock_and_the_state(tiny_whisper):
    steering = Steering((shift(1),), says(True))
    with steer(tiny_whisper, steering=steering, decode_withheld=True) as handle:
        hook = tiny_whisper.decoder.register_forward_pre_hook(
            lambda *a: (_ for _ in ()).throw(RuntimeError("no"))
        )
        with pytest.raises(RuntimeError, match="no"):
            tiny_whisper.decode(mel(), OPTIONS)
        hook.remove()
        assert state_of(tiny_whisper) is None and handle.withheld == []
        free = threading.Thread(target=lambda: tiny_whisper.decode(mel(), OPTIONS))
        free.start()
        free.join(300)
        assert not free.is_alive() and len(handle.withheld) == 1


# ---------- threads


def in_threads(*calls):
    """Run the calls at once; their results in order. An exception in one is raised here."""
    results, errors = [None] * len(calls), []

    def work(number):
        try:
            start.wait()
            results[number] = calls[number]()
        except BaseException as error:
            errors.append(error)

    start = threading.Barrier(len(calls))
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_two_threads_transcribe_as_one_would(tiny_whisper):
    def run(seed):
        return whisper.transcribe(tiny_whisper, audio(seed), temperature=0.0, fp16=False, sample_len=8)

    # a gate that depends on the audio, so that mixed-up state would show
    with steer(
        tiny_whisper, alpha=0.8, steering=Steering((shift(1, 0.5), latents(2)), frame_gate(1, smooth=25))
    ):
        alone = [run(seed) for seed in (1, 2)]
        assert alone[0]["text"] != alone[1]["text"]
        for found, expected in zip(in_threads(lambda: run(1), lambda: run(2)), alone, strict=True):
            assert found["text"] == expected["text"]
            for a, b in zip(found["segments"], expected["segments"], strict=True):
                # sums may differ in the last bits: BLAS looks at how its arrays lie in memory
                assert a == {**b, "avg_logprob": pytest.approx(b["avg_logprob"], rel=1e-4)} | {
                    "no_speech_prob": pytest.approx(b["no_speech_prob"], rel=1e-3)
                }
    assert run(1)["text"] != alone[0]["text"]


def test_two_threads_decode_as_one_would(tiny_whisper):
    def run(seed):
        return [tiny_whisper.decode(mel(seed + 10 * i), OPTIONS) for i in range(4)]

    # withholds some windows and lets others through
    gate = raw_gate(64, coef=torch.randn(64, generator=torch.Generator().manual_seed(1)), intercept=0.0)
    logits = [
        float(gate.window_logit(gate.frame_logits(outputs(tiny_whisper, mel(seed)[None])[1][0])))
        for seed in (1, 11, 21, 31, 2, 12, 22, 32)
    ]
    gate = raw_gate(64, coef=gate.probes[0].coef, intercept=0.0, threshold=float(np.median(logits)))
    with steer(tiny_whisper, steering=Steering((shift(1),), gate)):
        alone = [run(1), run(2)]
        assert {r.text == "" for r in alone[0] + alone[1]} == {True, False}
        for found, expected in zip(in_threads(lambda: run(1), lambda: run(2)), alone, strict=True):
            for a, b in zip(found, expected, strict=True):
                same_result(a, b)


def test_bare_encoders_in_two_threads_keep_their_gates_apart(tiny_whisper):
    x = [mel(1, (1, 80, 3000)), mel(2, (3, 80, 3000))]
    with steer(tiny_whisper, steering=Steering((shift(3),), frame_gate(0))):
        alone = [tiny_whisper.encoder(m) for m in x]
        found = in_threads(*[lambda m=m: [tiny_whisper.encoder(m) for _ in range(4)] for m in x])
    for results, expected in zip(found, alone, strict=True):
        assert all(torch.equal(r, expected) for r in results)


def test_removing_waits_for_the_window_in_progress(tiny_whisper):
    steering = Steering((shift(1), shift(3)))
    with steer(tiny_whisper, steering=steering):
        expected = tiny_whisper.decode(mel(), OPTIONS)
    handle = steer(tiny_whisper, steering=steering)
    remover = threading.Thread(target=handle.remove)
    seen = []

    def meanwhile(module, args, output):
        remover.start()
        remover.join(0.2)
        seen.append(remover.is_alive())

    hook = tiny_whisper.encoder.blocks[2].register_forward_hook(meanwhile)
    same_result(tiny_whisper.decode(mel(), OPTIONS), expected)
    hook.remove()
    remover.join(300)
    assert seen == [True] and handles_of(tiny_whisper) == ()


def test_one_lock_per_model(tiny_whisper):
    lock = model_lock(tiny_whisper)
    with lock, lock:  # re-entrant
        with steer(tiny_whisper, steering=Steering((shift(),))):
            tiny_whisper.decode(mel(), OPTIONS)
    assert model_lock(tiny_whisper) is lock and model_lock(make_tiny_whisper(1)) is not lock

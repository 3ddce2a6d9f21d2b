"""On a CUDA device: the words, withheld windows and edits of the CPU, and SAEs that learn. Skipped without
one; the kernels have tests of their own (test_kernels_triton.py)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_tiny_whisper
from kernel_cases import no_waiting
from whisper.audio import log_mel_spectrogram, pad_or_trim

import whisper_steer
from whisper_steer.attach import handles_of, steer
from whisper_steer.audio import load_audio
from whisper_steer.sae import SparseAutoencoder
from whisper_steer.steering import MeanAblation, Steering
from whisper_steer.zoo import bundled_dir, load_sae

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CLIPS = ("noise", "music", "speech", "speech, then noise")
SENTENCE = " No, Sarah did not cover the little cat. Who has a blue coat?"
# of a window logit: half precision, and float32 whose convolutions cuDNN may compute in TF32
LOGITS = {False: 0.05, True: 0.5}


def demo(name):
    if name == "speech, then noise":
        return np.concatenate([demo("speech"), 0.5 * demo("noise")])
    return load_audio(bundled_dir() / "mini.en" / "demo" / f"{name}.flac")


def mels(*names):
    return torch.stack([log_mel_spectrogram(pad_or_trim(demo(name)), 80) for name in names])


def close(found, expected):
    """Stretches in seconds, within two frames."""
    return np.shape(found) == np.shape(expected) and np.allclose(found, expected, atol=0.041)


@pytest.fixture(scope="module")
def cpu():
    return whisper_steer.load_model("mini.en", device="cpu")


@pytest.fixture(scope="module")
def gpu():
    model = whisper_steer.load_model("mini.en")
    assert model.device.type == "cuda"  # without being asked
    return model


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("name", CLIPS)
def test_the_words_of_the_cpu(cpu, gpu, name, alpha, fp16):
    audio = demo(name)
    here = whisper_steer.transcribe(audio, cpu, alpha=alpha)
    there = whisper_steer.transcribe(audio, gpu, alpha=alpha, fp16=fp16)
    assert there.text == here.text
    if "speech" in name:
        assert there.text == SENTENCE
    assert bool(there.text) == (alpha == 0 or "speech" in name)
    assert [(w.start, w.end) for w in there.suppressed] == [(w.start, w.end) for w in here.suppressed]
    for found, expected in zip(there.suppressed, here.suppressed, strict=True):
        assert found.logit == pytest.approx(expected.logit, abs=LOGITS[fp16])
        assert found.threshold == expected.threshold
    assert close(there.edited, here.edited)
    assert bool(there.edited) == (alpha == 1 and name == "speech, then noise")
    assert handles_of(gpu) == ()


@pytest.mark.parametrize("fp16", [False, True])
def test_the_stream_of_the_cpu(cpu, gpu, fp16):
    """A batch of windows: plain bit for bit at alpha 0, and otherwise what the CPU's float32 gives."""
    windows = mels(*CLIPS)
    given = windows.to("cuda", torch.float16 if fp16 else torch.float32)
    most = 2e-2 if fp16 else 2e-3
    with torch.no_grad():
        plain = gpu.encoder(given)
        with steer(gpu, alpha=0.0):
            assert torch.equal(gpu.encoder(given), plain)
        with steer(cpu, alpha=1.0), steer(gpu, alpha=1.0) as handle:
            expected, found = cpu.encoder(windows), gpu.encoder(given)
            handle.alpha = 0.0
            assert torch.equal(gpu.encoder(given), plain)
        assert torch.equal(gpu.encoder(given), plain)
    assert found.dtype == given.dtype and found.device.type == "cuda"
    assert float((found.cpu() - expected).norm() / expected.norm()) < most
    assert not torch.equal(found, plain)
    assert torch.equal(found[2], plain[2])  # speech is left alone


def test_the_encoder_does_not_wait_for_the_device(gpu):
    """What a steered encoder adds asks the device nothing, but for edits before the gate's layer: kernels
    queue up behind each other as in the plain one."""
    given = mels("speech, then noise").cuda().half()
    with torch.no_grad(), steer(gpu, alpha=1.0):
        expected = gpu.encoder(given)
        with no_waiting():
            found = gpu.encoder(given)
    assert torch.equal(found, expected)


def test_edits_before_the_gate_run_the_blocks_again(cpu, gpu):
    gate = whisper_steer.load_steering("mini.en").gate
    early = MeanAblation(0, torch.zeros(1, 192), 0.5)
    steering = Steering((early,), gate)
    windows = mels("speech, then noise", "speech")
    with torch.no_grad(), steer(cpu, steering=steering), steer(gpu, steering=steering):
        expected, found = cpu.encoder(windows), gpu.encoder(windows.cuda())
        plain = whisper_steer.load_model("mini.en").encoder(windows.cuda())
    assert float((found.cpu() - expected).norm() / expected.norm()) < 2e-3
    assert not torch.allclose(found[0], plain[0], atol=0.1)
    torch.testing.assert_close(found[1], plain[1])


@pytest.mark.parametrize("fp16", [False, True])
def test_the_speech_finder(cpu, gpu, fp16):
    audio = demo("speech, then noise")
    here = whisper_steer.transcribe(audio, cpu, alpha=1.0, vad="gate")
    there = whisper_steer.transcribe(audio, gpu, alpha=1.0, vad="gate", fp16=fp16)
    assert there.text == here.text == SENTENCE
    assert len(there.suppressed) == len(here.suppressed) > 0
    assert close([(w.start, w.end) for w in there.suppressed], [(w.start, w.end) for w in here.suppressed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_transformers(cpu, gpu, alpha, dtype):
    pytest.importorskip("transformers", reason="pip install 'whisper-steer[hf]'")
    from whisper_steer.transformers_model import from_openai

    one, other = from_openai(cpu), from_openai(gpu).to(dtype)
    assert other.device.type == "cuda"
    for name in CLIPS:
        here, there = (whisper_steer.transcribe(demo(name), model, alpha=alpha) for model in (one, other))
        assert there.text == here.text
        assert bool(there.text) == (alpha == 0 or "speech" in name)
        assert len(there.suppressed) == len(here.suppressed)
        assert bool(there.edited) == bool(here.edited)
        if dtype == torch.float32:
            assert close(there.edited, here.edited)


def test_other_devices_models_may_share_a_steering(cpu, gpu):
    steering = whisper_steer.load_steering("mini.en")
    windows = mels("speech, then noise")
    with torch.no_grad(), steer(cpu, steering=steering) as one, steer(gpu, steering=steering) as other:
        expected, found = cpu.encoder(windows), gpu.encoder(windows.cuda())
    assert float((found.cpu() - expected).norm() / expected.norm()) < 2e-3
    assert other.on(gpu.device).edits[0].W_enc.is_cuda and not one.on(cpu.device).edits[0].W_enc.is_cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bundled_saes(cpu, gpu, dtype):
    """Codes and reconstruction by the kernels, against dense products on the CPU."""
    sae: SparseAutoencoder = load_sae("mini.en", 3)
    streams = []
    hook = cpu.encoder.blocks[3].register_forward_hook(lambda *call: streams.append(call[2]))
    with torch.no_grad():
        cpu.encoder(mels("speech", "music"))
        hook.remove()
        x = streams[0].to(dtype)
        codes, expected = sae.encode(x.float()), sae(x.float())
        sae = sae.to("cuda")
        found = sae.sparse_codes(x.cuda())
        reconstruction = sae(x.cuda())
    assert reconstruction.dtype == dtype
    # codes this close to a threshold may fall on either side
    assert float((found.dense().cpu() - codes).norm() / codes.norm()) < 1e-2
    most = 1e-2 if dtype == torch.float32 else 2e-2
    assert float((reconstruction.float().cpu() - expected).norm() / expected.norm()) < most


@pytest.mark.parametrize("activation", ["batchtopk", "topk", "matryoshka"])
def test_written_out_gradients_are_autograds(activation):
    from calibration.sae_training import SAETrainer

    x = 3 + torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) @ torch.randn(64, 64)
    one, other = (
        SAETrainer(0, 64, 512, activation=activation, k=8, sparse=sparse, device="cuda")
        for sparse in (True, False)
    )
    for trainer in (one, other):
        trainer.set_normalisation(x, centre=True)
    z = one.normalised(x)
    assert z.is_cuda
    by_hand, by_autograd = one._sparse_gradients(z), other._dense_gradients(z, 1.0)
    torch.testing.assert_close(by_hand.errors, by_autograd.errors, rtol=1e-4, atol=1e-6)
    assert torch.equal(by_hand.active, by_autograd.active)
    for name, parameter in other.sae.named_parameters():
        found = dict(one.sae.named_parameters())[name].grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-6)
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_an_sae_learns_what_it_learns_on_the_cpu(sparse, autocast):
    from calibration.sae_training import SAETrainer

    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(128, 32, generator=generator), dim=1)
    errors = {}
    for device in ("cpu", "cuda"):
        trainer = SAETrainer(
            0, 32, 128, k=4, lr=3e-3, sparse=sparse, device=device, autocast=autocast and device == "cuda"
        )
        draw = torch.Generator().manual_seed(1)
        for step in range(150):
            strengths = torch.rand(256, 128, generator=draw)
            x = (strengths * (torch.rand(256, 128, generator=draw) < 0.03)) @ directions
            if step == 0:
                trainer.set_normalisation(x, centre=True)
                first = trainer.step(x).error
            else:
                last = trainer.step(x).error
        errors[device] = last
        assert last < 0.5 * first
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.15)


def test_clips_are_heard_in_batches(cpu, gpu):
    """Calibration's transcripts: on CUDA windows are float16, the clip's spectrogram is not."""
    from calibration.decoding import transcribe_clips

    audios = [demo(name) for name in CLIPS]
    here, there = (transcribe_clips(model, audios) for model in (cpu, gpu))
    for found, expected in zip(there, here, strict=True):
        assert found.text == expected.text
        assert [(w.seek, w.size, w.text) for w in found.windows] == [
            (w.seek, w.size, w.text) for w in expected.windows
        ]
        assert np.allclose(found.greedy, expected.greedy, atol=0.02)
    (longer,) = transcribe_clips(gpu, [np.concatenate([demo("speech"), demo("music"), *[demo("noise")] * 3])])
    assert longer.windows[0].seek == 0 and 0 < longer.windows[1].seek <= 3000
    assert sum(window.size for window in longer.windows) >= 3900


def test_what_trains_faster_is_measured_there():
    from calibration.training_choice import measured_choice

    found = measured_choice("batchtopk", 192, 1536, 25, 500, "cuda", True)
    assert found.sparse_s > 0 and found.dense_s > 0
    assert found.sparse == (found.sparse_s < found.dense_s)


def test_latency_is_measured_in_both_precisions(monkeypatch):
    """Every mode, on a tiny model: what is timed there runs, and computes in what it is told to."""
    from benchmarks import latency, latency_runtimes

    model = make_tiny_whisper()
    monkeypatch.setattr(latency_runtimes, "random_model", lambda shape: make_tiny_whisper())
    monkeypatch.setattr(latency_runtimes, "dimensions", lambda shape: model.dims)
    monkeypatch.setattr(latency_runtimes, "TOKENS", 3)
    monkeypatch.setattr(latency, "ROW_SECONDS", 0.0)
    words = ["--device", "cuda", "--shapes", "tiny", "--batches", "2", "--rounds", "1", "--runtimes"]
    args = latency.parser().parse_args([*words, "openai", "transformers", "--dtypes", "float32", "float16"])
    rows = latency.run(args)
    assert len(rows) == 2 * (2 * len(latency.MODES) + 1)
    assert {row.dtype for row in rows} == {"float32", "float16"}
    assert all(row.encoder_ratio > 0 for row in rows[:-2]) and all(row.peak_mb > 0 for row in rows)
    runtime = latency_runtimes.OpenAIRuntime(model, "cuda")
    runtime.use("float16")
    steering = latency_runtimes.steering_for("reconstruction", None, model.dims)
    with runtime.steered(replace(steering)):
        assert runtime.encode(runtime.features(latency_runtimes.sound(1))).dtype == torch.float16

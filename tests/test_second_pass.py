"""A runtime may encode some of the windows again while it decodes: every pass begins anew."""

import pytest
import torch
from gates import changed_gate
from tiny import frame_gate, mel, shift

from whisper_steer.attach import steer
from whisper_steer.registry import registry_of
from whisper_steer.steering import Steering

EDITS = (shift(0), shift(2))  # before the gate's layer and behind it
OPEN = changed_gate(frame_gate(1), threshold=1e9)


def windows():
    batch = torch.stack([mel(seed) for seed in (0, 1, 2)])
    batch[1, :, 801:] = 0.0
    return batch


def test_fewer_windows_again_are_edited_as_if_they_were_alone(tiny_whisper):
    features, steering = windows(), Steering(EDITS, OPEN)
    with torch.no_grad(), steer(tiny_whisper, steering=steering):
        alone = tiny_whisper.encoder(features[1:])
        registry = registry_of(tiny_whisper)
        with registry._passing(registry._steps()):
            tiny_whisper.encoder(features)
            again = tiny_whisper.encoder(features[1:])
    torch.testing.assert_close(again, alone)
    with torch.no_grad():
        assert (tiny_whisper.encoder(features[1:]) - alone).abs().max() > 0.01


def test_transformers_at_another_temperature():
    pytest.importorskip("transformers", reason="the runtime under test")
    from conftest import make_tiny_whisper

    from whisper_steer.transformers_model import from_openai

    model, features = from_openai(make_tiny_whisper()), windows()
    open_ = Steering(EDITS, OPEN)
    with torch.no_grad(), steer(model, steering=open_):
        expected = model.model.encoder(features)[0]
    passes = []

    def keep(module, args, kwargs, output):
        passes.append((next(x for x in (*args, *kwargs.values()) if torch.is_tensor(x)), output[0]))

    hook = model.model.encoder.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad(), steer(model, steering=open_):
        model.generate(
            features,
            max_new_tokens=5,
            temperature=(0.0, 0.4),
            logprob_threshold=5.0,  # nothing is likely enough: all are decoded again
            no_speech_threshold=None,
            return_timestamps=True,
            condition_on_prev_tokens=False,
        )
    hook.remove()
    assert len(passes) >= 2
    for given, output in passes:
        rows = [next(i for i, one in enumerate(features) if torch.equal(one, row)) for row in given]
        torch.testing.assert_close(output, expected[rows], rtol=1e-4, atol=1e-4)


def test_transformers_decodes_again_beside_a_withheld_window():
    pytest.importorskip("transformers", reason="the runtime under test")
    from conftest import make_tiny_whisper

    from whisper_steer.transformers_model import from_openai

    model, features = from_openai(make_tiny_whisper()), windows()
    with torch.no_grad(), steer(model, steering=Steering(EDITS, OPEN)):
        registry = registry_of(model)
        steps = registry._steps()
        with registry._passing(steps):
            model.model.encoder(features)
        logits = steps[0].window_logit.sort().values
    gate = changed_gate(OPEN, threshold=float(logits[1:].mean()))
    sizes = []
    hook = model.model.encoder.register_forward_hook(lambda *args: sizes.append(len(args[2][0])))
    with torch.no_grad(), steer(model, steering=Steering(EDITS, gate)) as handle:
        model.generate(
            features,
            max_new_tokens=5,
            temperature=(0.0, 0.4),
            logprob_threshold=5.0,
            return_timestamps=True,
            condition_on_prev_tokens=False,
        )
        assert len(handle.withheld) == 1
    hook.remove()
    assert sizes[0] == 3 and len(sizes) >= 2

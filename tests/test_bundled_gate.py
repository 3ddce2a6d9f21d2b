"""The steering `gate`: the bundled default without its edits."""

from __future__ import annotations

from pathlib import Path

import torch
from faster_models import clip

import whisper_steer
from whisper_steer.fileformat import load_tensors
from whisper_steer.zoo import load_model, load_steering


def test_it_is_the_default_without_edits(tmp_path: Path) -> None:
    default, gate = load_steering("default", "mini.en"), load_steering("gate", "mini.en")
    assert default.edits and not gate.edits and gate.name == "gate"
    for name, steering in (("default", default), ("gate", gate)):
        steering.save(tmp_path / f"{name}.safetensors")
    theirs, their_record = load_tensors(tmp_path / "default.safetensors")
    ours, our_record = load_tensors(tmp_path / "gate.safetensors")
    gates = {name: tensor for name, tensor in theirs.items() if name.startswith("gate.")}
    assert gates.keys() == ours.keys() and all(torch.equal(gates[name], ours[name]) for name in ours)
    assert their_record["gate"] == our_record["gate"]


def test_it_withholds_and_leaves_all_else_as_it_is() -> None:
    model = load_model("mini.en", device="cpu")
    options = {"temperature": 0.0}
    for name, withheld in (("noise", 1), ("speech", 0)):
        plain = whisper_steer.transcribe(clip(name), model, alpha=0, **options)
        found = whisper_steer.transcribe(clip(name), model, steering="gate", **options)
        kept = () if withheld else plain.segments
        assert plain.segments and list(found.segments) == list(kept)
        assert len(found.suppressed) == withheld and not found.edited

"""Clips heard under a gate: only those in which an edit acts are decoded again."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from calibration_tools import make_terse_whisper, sound

from calibration import gated_hearing
from calibration.decoding import ClipTranscript, DecodedWindow
from calibration.gated_hearing import GatedHearing
from calibration.selection import CalibrationClip
from whisper_steer.steering import Gate, Probe, Shift


def test_where_the_frame_gate_stays_shut_nothing_is_decoded_again(monkeypatch):
    model = make_terse_whisper(1)
    width = model.dims.n_audio_state
    # opens where the first feature is positive, in some frames of any random model
    coef = torch.zeros(width)
    coef[0] = 1.0
    probe = Probe(0, "raw", coef, mean=torch.zeros(width), std=torch.ones(width))
    open_ = Gate((probe,), 0.0, 1, threshold=1e6, spread=0.0, frame_scale=10.0, frame_bias=0.0)
    window = DecodedWindow(0, 100, " one", 0.1, -0.2, 0.0)
    plain = ClipTranscript(" one", (window,), ((0.1, -0.2),), 1.0)
    clips = [CalibrationClip(name, "speech", "one", plain, (row,)) for row, name in enumerate("ab")]
    joined = CalibrationClip("j", "joined", "one", plain, ())
    audio = {name: sound(name, 1.0, speech=True) for name in "abj"}
    calibration = SimpleNamespace(
        model=model,
        language="en",
        sources={
            (c.set, c.id): SimpleNamespace(load=lambda name=c.id: audio[name]) for c in (*clips, joined)
        },
    )
    asked: list[int] = []

    def hear(_model, audios, *, language):
        found = list(audios)
        asked.append(len(found))
        return [replace(plain, text=" two", windows=(replace(window, text=" two"),)) for _ in found]

    monkeypatch.setattr(gated_hearing, "iterate_transcripts", hear)
    edits = (Shift(0, torch.ones(width), 1.0),)
    hearing = GatedHearing(calibration, open_, np.full(2, -9.0))
    heard = hearing.hear(edits, clips, "open", progress=False)
    assert asked == [2] and {t.text for t in heard.transcripts.values()} == {" two"}
    assert hearing.touched(clips, progress=False) == {("speech", "a"), ("speech", "b")}
    shut = hearing.with_gate(replace(open_, frame_bias=1e6))
    assert shut.touched(clips, progress=False) == set()
    heard = shut.hear(edits, clips, "shut", progress=False)
    assert asked == [2] and {t.text for t in heard.transcripts.values()} == {" one"}
    # of a recording that was joined nothing is known beforehand
    shut.hear(edits, [*clips, joined], "shut", progress=False)
    assert asked == [2, 1]

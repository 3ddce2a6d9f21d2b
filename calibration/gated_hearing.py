"""Calibration clips heard with edits under a gate whose decisions come from cached, out-of-fold logits.

The gate that ships has seen the calibration clips; what it says about them would look too good. So windows
are withheld by the logits of gates that were fitted without their clips, and only what passes is decoded.
Windows that only the edited model looks at (it seeks on from other words) and recordings joined from several
clips have no such logits: there the gate itself is asked, and what it says may look too good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from calibration.activations import cut_window, encode_windows, padded_log_mel
from calibration.decoding import ClipTranscript, iterate_transcripts, withhold
from calibration.hearing import Calibration, Heard, compare
from calibration.selection import CalibrationClip
from whisper_steer.attach import steer
from whisper_steer.fileformat import model_metadata
from whisper_steer.passing import padding_frames
from whisper_steer.steering import Edit, Gate, Steering

NEVER = 1e9  # a window logit that no window reaches


class GatedHearing:
    """Hears clips of a calibration under one gate.

    Args:
        window_logits: (rows,) of the table's rows.
    """

    def __init__(self, calibration: Calibration, gate: Gate, window_logits: np.ndarray):
        self.calibration, self.gate, self.window_logits = calibration, gate, window_logits

    def with_gate(self, gate: Gate) -> GatedHearing:
        """The same with another slope of the frame gate (not with another smoothing)."""
        other = GatedHearing.__new__(GatedHearing)
        other.__dict__.update(self.__dict__, gate=gate)
        return other

    def passes(self, clip: CalibrationClip, alpha: float = 1.0) -> bool:
        """Whether any of the clip's windows is decoded."""
        if not clip.rows:
            return True  # nothing is known of it yet: a joined recording
        threshold = self.gate.window_threshold(alpha)
        return any(self.window_logits[row] <= threshold for row in clip.rows)

    def hear(
        self,
        edits: Sequence[Edit],
        clips: Sequence[CalibrationClip],
        label: str,
        *,
        alpha: float = 1.0,
        progress: bool = True,
    ) -> Heard:
        """Transcripts of the clips with the edits at alpha, words of withheld windows left out."""
        model = self.calibration.model
        threshold = self.gate.window_threshold(alpha)
        open_gate = replace(self.gate, threshold=NEVER, spread=0.0)
        metadata = dict(model_metadata(model))
        decoded = [clip for clip in clips if self.passes(clip, alpha)] if edits else []
        after: dict[tuple[str, str], ClipTranscript] = {}
        if decoded:
            audios = (self.calibration.sources[clip.set, clip.id].load() for clip in decoded)
            with steer(model, alpha=alpha, steering=Steering(tuple(edits), open_gate, metadata)):
                bar = tqdm(
                    iterate_transcripts(model, audios),
                    total=len(decoded),
                    desc=label,
                    unit="clip",
                    disable=not progress,
                )
                for clip, transcript in zip(decoded, bar, strict=True):
                    after[clip.set, clip.id] = transcript
        transcripts = []
        for clip in clips:
            transcript = after.get((clip.set, clip.id), clip.transcript)
            values = self._values(clip, transcript)
            transcripts.append(withhold(transcript, [value > threshold for value in values]))
        return compare(clips, transcripts)

    def tightened(self, heard: Heard, clips: Sequence[CalibrationClip], alpha: float) -> Heard:
        """What was heard at a smaller alpha with the windows left out that this alpha withholds, too."""
        threshold = self.gate.window_threshold(alpha)
        transcripts = []
        for clip in clips:
            transcript = heard.transcripts[clip.set, clip.id]
            values = self._values(clip, transcript)
            transcripts.append(withhold(transcript, [value > threshold for value in values]))
        return compare(clips, transcripts)

    def _values(self, clip: CalibrationClip, transcript: ClipTranscript) -> list[float]:
        """Window logits of a transcript's windows: cached where plain Whisper looked at the same one."""
        rows = zip(clip.rows, clip.transcript.windows, strict=False)
        known = {window.seek: float(self.window_logits[row]) for row, window in rows}
        missing = [window.seek for window in transcript.windows if window.seek not in known]
        if missing:
            model = self.calibration.model
            mel, content = padded_log_mel(
                self.calibration.sources[clip.set, clip.id].load(), model.dims.n_mels
            )
            mels = torch.stack([cut_window(mel, content, seek) for seek in missing])
            layers = list(self.gate.layers)
            streams = dict(zip(layers, encode_windows(model, mels, layers), strict=True))
            with torch.no_grad():
                logits = self.gate.frame_logits(streams)
                values = self.gate.window_logit(logits, streams, padding_frames(mels.to(logits.device)))
            known |= dict(zip(missing, values.tolist(), strict=True))
        return [known[window.seek] for window in transcript.windows]

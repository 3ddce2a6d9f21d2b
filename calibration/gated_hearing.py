"""Calibration clips heard with edits under a gate whose decisions come from cached, out-of-fold logits.

The gate that ships has seen the calibration clips; what it says about them would look too good. So windows
are withheld by the logits of gates that were fitted without their clips, and only what passes is decoded.
Windows that only the edited model looks at (it seeks on from other words) and recordings joined from several
clips have no such logits: there the gate itself is asked, and what it says may look too good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
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
        self._opens: dict[tuple[str, str], bool] = {}

    def with_gate(self, gate: Gate) -> GatedHearing:
        """The same with another slope of the frame gate (not with another smoothing)."""
        other = copy(self)
        other.gate, other._opens = gate, {}
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
        """Transcripts of the clips with the edits at alpha, words of withheld windows left out. Where the
        frame gate stays shut nothing is edited, and nothing is decoded again."""
        model = self.calibration.model
        threshold = self.gate.window_threshold(alpha)
        open_gate = replace(self.gate, threshold=NEVER, spread=0.0)
        metadata = dict(model_metadata(model))
        decoded = [clip for clip in clips if self.passes(clip, alpha)] if edits else []
        edited = self.touched([clip for clip in decoded if clip.rows], progress=progress)
        decoded = [clip for clip in decoded if not clip.rows or (clip.set, clip.id) in edited]
        after: dict[tuple[str, str], ClipTranscript] = {}
        if decoded:
            audios = (self.calibration.sources[clip.set, clip.id].load() for clip in decoded)
            with steer(model, alpha=alpha, steering=Steering(tuple(edits), open_gate, metadata)):
                bar = tqdm(
                    iterate_transcripts(model, audios, language=self.calibration.language),
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

    def withheld_at(
        self,
        transcripts: Mapping[tuple[str, str], ClipTranscript],
        clips: Sequence[CalibrationClip],
        alpha: float,
    ) -> dict[tuple[str, str], ClipTranscript]:
        """The clips' transcripts, by (set, clip id), less the windows that are withheld at this alpha."""
        threshold = self.gate.window_threshold(alpha)
        left = {}
        for clip in clips:
            transcript = transcripts[clip.set, clip.id]
            values = self._values(clip, transcript)
            left[clip.set, clip.id] = withhold(transcript, [value > threshold for value in values])
        return left

    def touched(
        self, clips: Sequence[CalibrationClip], *, batch: int = 8, progress: bool = True
    ) -> set[tuple[str, str]]:
        """(set, clip id) of the clips in which the frame gate opens anywhere. Edits leave the others as they
        are, at every alpha: the frame gate does not depend on it."""
        model, layers = self.calibration.model, list(self.gate.layers)
        waiting: list[tuple[tuple[str, str], Tensor]] = []

        @torch.no_grad()
        def flush() -> None:
            mels = torch.stack([mel for _, mel in waiting])
            streams = encode_windows(model, mels, layers)
            logits = self.gate.frame_logits(dict(zip(layers, streams, strict=True)))
            opened = (self.gate.frame_gate(logits, padding_frames(mels.to(logits.device))) > 0).any(dim=1)
            for (key, _), is_open in zip(waiting, opened.tolist(), strict=True):
                self._opens[key] = is_open or self._opens.get(key, False)
            waiting.clear()

        keys = {(clip.set, clip.id) for clip in clips}
        new = [clip for clip in clips if (clip.set, clip.id) not in self._opens]
        for clip in tqdm(new, desc="where edits act", unit="clip", disable=not progress or not new):
            mel, content = padded_log_mel(
                self.calibration.sources[clip.set, clip.id].load(), model.dims.n_mels
            )
            for window in clip.transcript.windows:
                waiting.append(((clip.set, clip.id), cut_window(mel, content, window.seek)))
                if len(waiting) == batch:
                    flush()
        if waiting:
            flush()
        return {key for key in keys if self._opens[key]}

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

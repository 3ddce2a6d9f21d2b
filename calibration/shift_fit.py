"""The best Shift in the place of a gated or latent steering, and what it loses.

A gate or a latent edit depends on the audio, so it cannot be folded into weights; a Shift can
(whisper_steer.bake). The vector v that minimises the mean of |d_t - v|^2 over frames, d_t being what the
steering adds to frame t of non-speech audio, is the mean of the d_t. Its strength is then chosen among
multiples of that on the recordings themselves: the fewest non-speech clips with words, among those whose WER
on speech stays within the budget. Windows that a gate would have withheld are beyond a Shift: the measured
rates say what is left.

    whisper-steer bake --model small.en --format ct2 --approximate recordings/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from whisper.audio import N_FRAMES, log_mel_spectrogram, pad_or_trim
from whisper.model import Whisper

from calibration.decoding import ClipTranscript, transcribe_clips
from calibration.evaluate import NonSpeechMetrics, SpeechMetrics, nonspeech_metrics, speech_metrics
from whisper_steer.attach import steer
from whisper_steer.errors import UsageError, WhisperSteerError
from whisper_steer.fileformat import model_metadata, model_name
from whisper_steer.passing import padding_frames
from whisper_steer.steering import Shift, Steering

MULTIPLES = (0.5, 1.0, 2.0)
WER_BUDGET = 0.01  # absolute, against the plain model on the same clips


class ShiftRefused(WhisperSteerError):
    """No Shift in the place of a steering is good; the message says what was measured."""


@dataclass(frozen=True)
class Measured:
    """Rates of one setting. multiple: of the least-squares vector (0: plain model; None: the steering that is
    approximated)."""

    multiple: float | None
    speech: SpeechMetrics
    nonspeech: NonSpeechMetrics


@dataclass(frozen=True)
class ShiftFit:
    """steering: the Shift (strength 1 is the chosen multiple). explained: share of the energy of the
    steering's own change, on non-speech frames, that the least-squares vector accounts for, by layer (1 = it
    is constant). rows: what was measured; chosen: the multiple that became the steering. problem: why it
    should not be used, None if it is good."""

    steering: Steering
    explained: dict[int, float]
    rows: tuple[Measured, ...]
    chosen: float
    problem: str | None = None

    def record(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "explained": {str(layer): share for layer, share in self.explained.items()},
            "chosen": self.chosen,
            "problem": self.problem,
            "rows": [
                {"multiple": row.multiple, "speech": row.speech.row(), "nonspeech": row.nonspeech.row()}
                for row in self.rows
            ],
        }

    def lines(self) -> list[str]:
        """A table for people."""
        shares = ", ".join(f"layer {layer}: {share:.0%}" for layer, share in self.explained.items())
        lines = [f"least-squares Shift; explains of the steering's own change {shares}"]
        lines.append(f"{'':<12}{'text-FPR':>9}{'nsp-FPR':>9}{'HR':>7}{'WER':>8}{'empty':>7}")
        for row in self.rows:
            names = {None: "steering", 0.0: "plain"}
            name = names.get(row.multiple, f"shift x {row.multiple or 0:g}")
            mark = "  <- baked" if row.multiple == self.chosen else ""
            quiet, speech = row.nonspeech, row.speech
            lines.append(
                f"{name:<12}{quiet.text_fpr.value:>9.1%}{quiet.nsp_fpr.value:>9.1%}{quiet.hr.value:>7.1%}"
                f"{speech.wer.value:>8.1%}{speech.empty_speech.value:>7.1%}{mark}"
            )
        return lines if self.problem is None else [*lines, f"baked all the same: {self.problem}"]


@torch.no_grad()
def least_squares_shifts(
    model: Whisper, steering: Steering, alpha: float, clips: Sequence[np.ndarray]
) -> tuple[dict[int, Tensor], dict[int, float]]:
    """(vector by layer, explained share by layer) of what `steering` at `alpha` adds on `clips`.

    Clips: mono float32 at 16 kHz; the first 30 s of each count, padding as Whisper pads it. Later layers are
    seen as the earlier edits leave them.
    """
    layers = sorted({edit.layer for edit in steering.edits})
    sums = {layer: torch.zeros(steering.d_model, dtype=torch.float64) for layer in layers}
    energy, frames = dict.fromkeys(layers, 0.0), 0
    local = steering.to(model.device)
    blocks = model.encoder.blocks
    for clip in clips:
        mel = log_mel_spectrogram(pad_or_trim(np.asarray(clip, np.float32)), model.dims.n_mels)
        mel = mel[None, :, :N_FRAMES].to(model.device)
        g = None
        if local.gate is not None:  # it reads the stream as it is without edits
            streams: dict[int, Tensor] = {}
            keep = [blocks[n].register_forward_hook(partial(_keep, streams, n)) for n in local.gate.layers]
            try:
                model.encoder(mel)
            finally:
                for hook in keep:
                    hook.remove()
            logits, padding = local.gate.frame_logits(streams), padding_frames(mel)
            heard = local.gate.window_logit(logits, streams, padding) <= local.gate.window_threshold(alpha)
            g = local.gate.frame_gate(logits, padding & heard.unsqueeze(1))

        def edit(layer: int, module: Any, args: Any, x: Tensor, g: Tensor | None = g) -> Tensor:
            edited = local.edit(x, layer, alpha, g)
            change = (edited.double() - x.double())[0].cpu()
            sums[layer] += change.sum(0)
            energy[layer] += float((change**2).sum())
            return edited

        hooks = [blocks[layer].register_forward_hook(partial(edit, layer)) for layer in layers]
        try:
            frames += model.encoder(mel).shape[1]
        finally:
            for hook in hooks:
                hook.remove()
    means = {layer: (total / frames) for layer, total in sums.items()}
    explained = {
        layer: float(frames * (mean**2).sum() / energy[layer]) if energy[layer] else 1.0
        for layer, mean in means.items()
    }
    return {layer: mean.float() for layer, mean in means.items()}, explained


def _keep(streams: dict[int, Tensor], layer: int, module: Any, args: Any, x: Tensor) -> None:
    streams[layer] = x


def fit_shift(
    model: Whisper,
    steering: Steering,
    speech: Sequence[np.ndarray],
    nonspeech: Sequence[np.ndarray],
    *,
    references: Sequence[str] | None = None,
    alpha: float = 1.0,
    multiples: Sequence[float] = MULTIPLES,
    wer_budget: float = WER_BUDGET,
    anyway: bool = False,
) -> ShiftFit:
    """Fit a Shift to `steering` at `alpha`, choose its strength, and measure all of it on these clips.

    Clips: mono float32 at 16 kHz. references: what is said in the speech clips; None: what the plain model
    hears. alpha is folded in: bake the result at alpha 1 for the steering at `alpha`.
    Raises UsageError: no clips of one kind, or a steering without edits (a gate alone adds nothing).
    ShiftRefused, unless `anyway`: no multiple keeps the WER within `wer_budget` of the plain model's, or none
    that does lowers text-FPR or HR.
    """
    if not speech or not nonspeech:
        raise UsageError(f"{len(speech)} speech and {len(nonspeech)} non-speech clips: expected some of each")
    if not steering.edits:
        raise UsageError("the steering only withholds windows: there is no change of features to approximate")
    steering.check(model)
    vectors, explained = least_squares_shifts(model, steering, alpha, nonspeech)
    heard = transcribe_clips(model, speech)
    truth = list(references) if references is not None else [clip.text for clip in heard]
    rows = [_measured(0.0, truth, heard, transcribe_clips(model, nonspeech))]
    with steer(model, alpha=alpha, steering=steering):
        rows.append(
            _measured(None, truth, transcribe_clips(model, speech), transcribe_clips(model, nonspeech))
        )
    for multiple in multiples:
        with steer(model, alpha=1.0, steering=_shift(vectors, multiple, {})):
            rows.append(
                _measured(
                    multiple, truth, transcribe_clips(model, speech), transcribe_clips(model, nonspeech)
                )
            )
    best, problem = _chosen(rows, wer_budget)
    if problem is not None and not anyway:
        raise ShiftRefused(f"{problem}: steer live with whisper_steer.steer, or bake it with --anyway")
    chosen = float(best.multiple or 0)
    at = "" if alpha == 1 else f" (alpha {alpha:g})"
    name = f"{steering.metadata.get('name') or 'steering'}-shift{at}"
    metadata = {**model_metadata(model), "name": name}
    fit = ShiftFit(_shift(vectors, chosen, metadata), explained, tuple(rows), chosen, problem)
    metadata["recipe"] = {"approximates": steering.metadata.get("name"), "alpha": alpha}
    metadata["rates"] = fit.record()
    return replace(fit, steering=_shift(vectors, chosen, metadata))


def _chosen(rows: Sequence[Measured], wer_budget: float) -> tuple[Measured, str | None]:
    """The best of the Shifts, and what is wrong with it. rows: plain, the steering, then the Shifts."""
    plain, shifts = rows[0], rows[2:]
    within = [row for row in shifts if row.speech.wer.value <= plain.speech.wer.value + wer_budget]
    # none within the budget: the gentlest
    best = min(within, key=_remaining) if within else min(shifts, key=lambda row: row.multiple or 0)
    if not within:
        worst = "no strength of the Shift keeps the WER within {:.1f} points of the plain model's"
        return best, f"{worst.format(100 * wer_budget)} ({_rates(rows)})"
    if _remaining(best)[:2] >= _remaining(plain)[:2]:
        return best, f"no strength of the Shift that keeps the WER makes fewer words ({_rates(rows)})"
    return best, None


def _rates(rows: Sequence[Measured]) -> str:
    """Those of the plain model and of every Shift, in one line."""
    named = [("plain" if row.multiple == 0 else f"x {row.multiple:g}", row) for row in (rows[0], *rows[2:])]
    return "; ".join(
        f"{name}: WER {row.speech.wer.value:.1%}, text-FPR {row.nonspeech.text_fpr.value:.1%}"
        for name, row in named
    )


def fit_from_folder(
    model: str | Path | Whisper,
    steering: Steering | str | Path | None,
    folder: str | Path,
    *,
    alpha: float = 1.0,
    anyway: bool = False,
    download_root: str | Path | None = None,
) -> ShiftFit:
    """`fit_shift` on the recordings in folder/speech (each with its transcript in a .txt file beside it, or
    none of them) and folder/nonspeech, for a model and a steering, loaded or by name.

    Raises UsageError (folders missing or empty, some transcripts missing), ShiftRefused (see `fit_shift`),
    and what loading raises.
    """
    from whisper_steer.audio import find_audio, load_audio
    from whisper_steer.zoo import load_model, load_steering, steering_for

    clips: dict[str, list[Path]] = {}
    for kind in ("speech", "nonspeech"):
        inside = Path(folder) / kind
        if not inside.is_dir():
            raise UsageError(f"{folder} has no folder {kind}: expected speech and nonspeech with recordings")
        clips[kind] = [Path(path) for path in find_audio([inside])]
    texts = [path.with_suffix(".txt") for path in clips["speech"]]
    present = [path.is_file() for path in texts]
    if any(present) and not all(present):
        raise UsageError(f"{texts[present.index(False)]} is missing: transcribe all of the clips, or none")
    name = str(model) if isinstance(model, (str, Path)) else model_name(model)
    loaded = model
    if not isinstance(loaded, Whisper):
        loaded = load_model(loaded, device="cpu", download_root=download_root)
    if steering is None:
        chosen = steering_for(loaded)
    else:
        chosen = steering if isinstance(steering, Steering) else load_steering(steering, name)
    return fit_shift(
        loaded,
        chosen,
        [load_audio(path) for path in clips["speech"]],
        [load_audio(path) for path in clips["nonspeech"]],
        references=[path.read_text(encoding="utf-8") for path in texts] if all(present) else None,
        alpha=alpha,
        anyway=anyway,
    )


def _shift(vectors: dict[int, Tensor], multiple: float, metadata: dict[str, Any]) -> Steering:
    edits = tuple(Shift(layer, vector, multiple) for layer, vector in vectors.items())
    return Steering(edits, metadata=metadata)


def _remaining(row: Measured) -> tuple[float, float, float]:
    return row.nonspeech.text_fpr.value, row.nonspeech.hr.value, row.nonspeech.nsp_fpr.value


def _measured(
    multiple: float | None,
    references: Sequence[str],
    speech: Sequence[ClipTranscript],
    nonspeech: Sequence[ClipTranscript],
) -> Measured:
    return Measured(
        multiple,
        speech_metrics(references, [clip.text for clip in speech]),
        nonspeech_metrics([clip.outcome() for clip in nonspeech]),
    )

"""Our own forms: the bundled steering, the same behind a VAD or with its gate as the speech finder, and its
edits alone, without a gate.

whisper-steer is what `whisper-steer transcribe` does. ours-shift and ours-latents are fitted on calibration
clips here: the layer is that of the bundled steering's edits (the last one where there are none), the
contrast is words over non-speech; strength 1 is the multiple of the fitted edit under which the fewest of
some non-speech calibration clips have words, among those whose word errors on speech stay within 1 point.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.availability import CALIBRATION, SAES, STEERING
from benchmarks.methods import ALONE, AT_ONCE, BEHIND_VAD, Heard, Method, Setup, Unavailable
from benchmarks.peers import pooling
from benchmarks.peers.intervention import EditMethod, hear_under, label_events
from whisper_steer.errors import FormatError, MismatchError, UsageError

if TYPE_CHECKING:
    from calibration.corpus import Clip
    from calibration.decoding import ClipTranscript
    from whisper_steer.steering import LatentEdit, Shift, Steering
    from whisper_steer.stretches import GateVad

ALPHAS = (0.25, 0.5, 0.75, 1.0, 2.0, 4.0)
QUICK_ALPHAS = (0.5, 1.0, 2.0)
LABELS = ("text", "hr", "nsp")
VAD_NEEDS = ("faster_whisper", "onnxruntime")
TOP_K = 25
MULTIPLES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
QUICK_MULTIPLES = (1 / 16, 1 / 4, 1.0)
TRIED, QUICK_TRIED = 24, 8  # calibration clips of each kind on which the multiple is chosen
WER_BUDGET = 0.01


def steering_of(setup: Setup) -> Steering:
    """The steering that is measured: setup.steering, else the one bundled for the model. Raises Unavailable
    if none is bundled, and what loading raises for an explicit one."""
    from whisper_steer.zoo import load_steering

    if "steering" not in setup.memory:
        try:
            steering = load_steering(setup.steering or "default", setup.name)
            steering.check(setup.model)
        except (UsageError, MismatchError) as error:
            if setup.steering is not None:
                raise
            raise Unavailable(f"no steering is bundled for {setup.name}: pass --steering FILE") from error
        setup.memory["steering"] = steering
    found: Steering = setup.memory["steering"]
    return found


def without_edits(steering: Steering) -> Steering:
    """Its gate alone. Raises Unavailable if it has none."""
    if steering.gate is None:
        raise Unavailable("it needs a steering with a gate")
    return replace(steering, edits=())


def steering_hash(steering: Steering) -> str:
    """Of everything in its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "steering.safetensors"
        steering.save(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Steered:
    """See benchmarks.methods.Method. vad: Silero VAD at its default threshold comes first. edits: those of
    the steering, too, not its gate alone (`ours_gate` has that without a VAD)."""

    name: str
    about: str
    vad: bool = False
    edits: bool = True
    strengths: tuple[float, ...] = ALPHAS
    quick_strengths: tuple[float, ...] = QUICK_ALPHAS

    @property
    def timed(self) -> str:
        return BEHIND_VAD if self.vad else AT_ONCE

    @property
    def needs(self) -> tuple[str, ...]:
        return (STEERING, *VAD_NEEDS) if self.vad else (STEERING,)

    def steering(self, setup: Setup) -> Steering:
        return steering_of(setup) if self.edits else without_edits(steering_of(setup))

    def prepare(self, setup: Setup) -> None:
        self.steering(setup)
        if self.vad:
            _check_vad()

    def fingerprint(self, setup: Setup) -> str:
        """What the words depend on beside the model."""
        own = steering_hash(self.steering(setup))
        if not self.vad:
            return own
        from benchmarks.peers.silero import vad_version

        return f"{own}-{vad_version()}"

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        from whisper_steer.attach import steer

        steering = self.steering(setup)
        if not self.vad:
            # nobody reads what a withheld window would have said: its decoding is saved, as by default
            yield from hear_under(
                setup,
                clips,
                lambda: steer(setup.model, alpha=strength, steering=steering, decode_withheld=False),
            )
            return
        from benchmarks.peers.silero import GROUP, hear_behind_vad

        for start in range(0, len(clips), GROUP):
            audios = [setup.audio(clip) for clip in clips[start : start + GROUP]]
            with steer(setup.model, alpha=strength, steering=steering, decode_withheld=False):
                heard = list(hear_behind_vad(setup.model, audios))
            yield from heard


@dataclass(frozen=True)
class SteeredStretches:
    """See benchmarks.methods.Method. The package's own `vad="gate"`; options: other than its defaults."""

    name: str
    about: str
    options: GateVad | None = None
    strengths: tuple[float, ...] = (0.0, *ALPHAS)
    quick_strengths: tuple[float, ...] = (0.0, 0.5, 1.0)
    timed: str = ALONE
    needs: tuple[str, ...] = (STEERING,)

    def prepare(self, setup: Setup) -> None:
        if steering_of(setup).gate is None:
            raise Unavailable("it needs a steering with a gate")

    def fingerprint(self, setup: Setup) -> str:
        """What the words depend on beside the model."""
        from whisper_steer.stretches import GateVad

        return f"{steering_hash(steering_of(setup))}-{self.options or GateVad()}"

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        import torch

        from whisper_steer.transcribe import transcribe

        for clip in clips:
            audio = setup.audio(clip)
            began = time.perf_counter()
            with torch.random.fork_rng(devices=None if torch.cuda.is_available() else []):
                # sampling at higher temperatures repeats with the audio
                torch.manual_seed(zlib.crc32(audio.tobytes()))
                transcript = transcribe(
                    audio,
                    setup.model,
                    alpha=strength,
                    steering=steering_of(setup),
                    vad=self.options or "gate",
                    language="en",
                )
            # what the finder left out and what was withheld has no segment: recognised non-speech
            nsp, hr = label_events((s.no_speech_prob, s.avg_logprob) for s in transcript.segments)
            yield Heard(
                text=transcript.text,
                segments=tuple((s.start, s.end, s.text) for s in transcript.segments if s.text.strip()),
                nsp=nsp,
                hr=hr,
                seconds=time.perf_counter() - began,
            )


def _check_vad() -> None:
    try:
        from benchmarks.peers.silero import check_vad
    except ImportError as error:
        raise Unavailable(f"it needs Silero VAD ({error})") from error
    check_vad()


# -- edits without a gate -------------------------------------------------------------------------------


def _layer(setup: Setup) -> int:
    """Of the bundled steering's last shift or latent edit, else the encoder's last block."""
    from whisper_steer.steering import MeanAblation

    try:
        edits = steering_of(setup).edits
    except Unavailable:
        edits = ()
    moving = (edit.layer for edit in edits if not isinstance(edit, MeanAblation))
    return max(moving, default=pooling.last_layer(setup))


def fit_shift(setup: Setup) -> Shift | LatentEdit:
    """Towards the mean activation of clips without words over non-speech; strength 1 as calibrated."""
    from calibration.edit_fit import mean_difference

    pooled = pooling.pool(setup, _layer(setup), LABELS)
    fitted = mean_difference(pooled.layer, pooled.clips.mean, pooled.hallucinated, normalised=False)
    return _calibrated(setup, "ours-shift", fitted)


def fit_latents(setup: Setup) -> Shift | LatentEdit:
    """The latents that tell words over non-speech, shifted by their own mean activation."""
    from calibration.edit_fit import additive_edit

    layer = _layer(setup)
    sae = pooling.sae_of(setup, layer)
    pooled = pooling.pool(setup, layer, LABELS)
    beta = pooling.regression(setup, pooled).beta
    return _calibrated(setup, "ours-latents", additive_edit(sae, beta, pooled.clips.mean_activation, TOP_K))


def _calibrated(setup: Setup, name: str, fitted: Shift | LatentEdit) -> Shift | LatentEdit:
    """The edit with its chosen multiple as strength 1; kept in setup.cache."""
    from whisper_steer.fileformat import model_metadata
    from whisper_steer.steering import Steering

    path = setup.cache / f"{name}-{steering_hash(Steering((fitted,)))}.safetensors"
    if path.is_file():
        try:
            (kept,) = Steering.load(path).edits
            return times(fitted, kept.strength)
        except (FormatError, ValueError):
            pass  # damaged: choose again
    multiple = choose_multiple(setup, fitted)
    edit = replace(fitted, strength=multiple)
    Steering((edit,), None, {"name": name, **model_metadata(setup.model)}).save(path)
    return times(fitted, multiple)


def times(edit: Shift | LatentEdit, multiple: float) -> Shift | LatentEdit:
    """The edit whose strength 1 is strength `multiple` of this one."""
    from whisper_steer.steering import LatentEdit

    if isinstance(edit, LatentEdit):
        return replace(edit, values=multiple * edit.values)
    return replace(edit, direction=multiple * edit.direction)


def choose_multiple(setup: Setup, fitted: Shift | LatentEdit) -> float:
    """The strength that becomes 1: on calibration clips the fewest non-speech clips with words, among the
    multiples under which the WER on speech rises by at most WER_BUDGET; the smallest if none does so."""
    from calibration.decoding import transcribe_clips
    from calibration.evaluate import evenly, normalise
    from whisper_steer.attach import steer
    from whisper_steer.steering import Steering

    silent, spoken = pooling.nonspeech_and_speech(setup)
    count = QUICK_TRIED if setup.quick else TRIED
    # clips on which something can be won, or lost
    silent = evenly([clip for clip in silent if setup.labels[clip.id].text_fp], count)
    spoken = evenly([clip for clip in spoken if normalise(setup.labels[clip.id].text)], count)
    audios = [setup.audio(clip) for clip in (*silent, *spoken)]
    limit = _wer(spoken, [setup.labels[clip.id].transcript for clip in spoken]) + WER_BUDGET
    multiples = QUICK_MULTIPLES if setup.quick else MULTIPLES
    best, fewest = multiples[0], len(silent) + 1
    for multiple in multiples:
        steering = Steering((replace(fitted, strength=multiple),))
        with steer(setup.model, alpha=1.0, steering=steering):
            transcripts = transcribe_clips(setup.model, audios)
        left = sum(bool(normalise(transcript.text)) for transcript in transcripts[: len(silent)])
        if _wer(spoken, transcripts[len(silent) :]) <= limit and left < fewest:
            best, fewest = multiple, left
    return best


def _wer(clips: Sequence[Clip], transcripts: Sequence[ClipTranscript]) -> float:
    """0 without a reference word."""
    from calibration.evaluate import word_errors

    counted = [
        errors
        for clip, transcript in zip(clips, transcripts, strict=True)
        if (errors := word_errors(clip.text or "", transcript.text)) is not None
    ]
    return sum(errors.total for errors in counted) / max(1, sum(errors.words for errors in counted))


@dataclass(frozen=True)
class Ungated(EditMethod):
    """An edit in every frame; kept results are those of the very edit that was fitted."""

    def fingerprint(self, setup: Setup) -> str:
        """What the words depend on beside the model."""
        from whisper_steer.steering import Steering

        return steering_hash(Steering((self.fitted(setup),)))


METHODS: tuple[Method, ...] = (
    Steered(
        "whisper-steer",
        "ours: the bundled steering, or --steering FILE: gate and edits; strength: alpha, calibrated: 1",
    ),
    Steered(
        "whisper-steer+vad",
        "ours behind Silero VAD at its default threshold (0.5); strength: alpha, calibrated: 1",
        vad=True,
    ),
    Steered(
        "whisper-steer-gate+vad",
        "ours without edits (--steering gate) behind Silero VAD at its default threshold (0.5); strength: "
        "alpha, calibrated: 1",
        vad=True,
        edits=False,
    ),
    SteeredStretches(
        "whisper-steer+gate-vad",
        'ours on the stretches that its own gate finds (vad="gate"); strength: alpha, calibrated: 1; 0: the '
        "finder alone",
    ),
    Ungated(
        name="ours-shift",
        strengths=ALPHAS,
        quick_strengths=(1.0,),
        about=(
            "ours without a gate: one direction added to every frame; strength: alpha, calibrated: 1 "
            "(word errors within 1 point on calibration clips)"
        ),
        edit=fit_shift,
        needs=(CALIBRATION,),
    ),
    Ungated(
        name="ours-latents",
        strengths=ALPHAS,
        quick_strengths=(1.0,),
        about=(
            f"ours without a gate: {TOP_K} SAE latents shifted in every frame; strength: alpha, calibrated: "
            "1 (word errors within 1 point on calibration clips)"
        ),
        edit=fit_latents,
        needs=(CALIBRATION, SAES, "sklearn"),
    ),
)

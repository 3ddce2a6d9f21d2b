"""What the trade-off benchmark asks of a method: to make words of clips, at one of its strengths.

Every competitor and every form of ours is one small file in `benchmarks/peers/` whose METHODS lists its
Method objects. `Setup` is what they may use: the model, its SAEs, the calibration clips with the labels of
plain Whisper (methods may be fitted on those, never on the test split), and plain Whisper's transcripts of
the clips that are measured, for methods that only judge what plain Whisper wrote.

A method may have more members: quick_strengths, the range of a quick run (none: left out of it);
fingerprint(setup), a string that changes with what its words depend on beside the model's weights (without
it that is taken to be everything that methods can be fitted on); timed, how its seconds come about, a key of
TIMED (without it: AT_ONCE); and needs, what `benchmarks.availability` looks for before it runs (without it:
nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from whisper_steer.errors import WhisperSteerError

if TYPE_CHECKING:
    import numpy as np
    from whisper.model import Whisper

    from calibration.corpus import Clip
    from calibration.decoding import ClipTranscript
    from calibration.hallucinations import Labels
    from whisper_steer.sae import SparseAutoencoder


AT_ONCE, ALONE, FASTER, BEHIND_VAD, JUDGED, GATED = (
    "8 at once", "one by one", "one by one, beam 5", "8 at once behind VAD", "plain + judging",
    "plain, or encoder, 8 at once",
)  # fmt: skip
# how seconds of compute come about: only methods that are run alike can be compared by them
TIMED: Mapping[str, str] = {
    AT_ONCE: "eight clips are decoded as one batch and share its time",
    ALONE: "every clip is transcribed by itself, which takes longer per clip than a batch",
    FASTER: "every clip by itself in CTranslate2, with faster-whisper's default beam search",
    BEHIND_VAD: "the VAD reads clip by clip (in one thread), the stretches of eight clips are one batch",
    JUDGED: "the time in which plain Whisper decodes everything, and that of judging it: nothing is saved",
    GATED: "of a clip whose windows are all withheld the encoder's time, eight windows as one batch; of any "
    "other plain Whisper's, whose encoder has the states that the probe reads",
}


class Unavailable(WhisperSteerError):
    """A method cannot run here; the message is the reason, one line."""


@dataclass(frozen=True)
class Heard:
    """What a method made of one clip.

    text: as the method's runtime returns it. segments: (start, end, text), seconds, in time order. nsp, hr:
    the two label events of the first greedy pass, or of the transcript's segments in runtimes that show only
    these (what was suppressed, skipped or left out counts as recognised non-speech); None where the runtime
    does not show the scores. seconds: compute time spent on the clip, see TIMED.
    """

    text: str
    segments: tuple[tuple[float, float, str], ...]
    nsp: bool | None
    hr: bool | None
    seconds: float


class Method(Protocol):
    """A competitor, or a form of ours."""

    @property
    def name(self) -> str:
        """As in a row's "method"; fixed parameters are part of it: "audiosae-sae-k10"."""

    @property
    def strengths(self) -> tuple[float, ...]:
        """As in a row's "alpha": the range that is swept, ascending; each method says what the number is."""

    @property
    def about(self) -> str:
        """One line: what it does, its source, and what its strength means."""

    def prepare(self, setup: Setup) -> None:
        """Fit or convert what is needed, cached under setup.cache. Raises Unavailable with the reason."""

    def hear(self, setup: Setup, strength: float, clips: Sequence[Clip]) -> Iterator[Heard]:
        """One result per clip, in order, as they are finished. The model is left as it was."""


@dataclass(eq=False)
class Setup:
    """What methods may use. quick: the small calibration sets. plain: transcripts of plain Whisper for
    clips, each clip decoded once. cache: folder for what methods fit, per model."""

    model: Whisper
    name: str
    cache: Path
    plain: Callable[[Sequence[Clip]], Sequence[Heard]]
    plain_windows: Callable[[Sequence[Clip]], Sequence[ClipTranscript]]
    data_dir: Path | None = None
    quick: bool = False
    progress: bool = True
    labels_file: Path | None = None
    steering: str | None = None
    memory: dict[str, Any] = field(default_factory=dict)  # what a method keeps between its strengths

    @cached_property
    def saes(self) -> tuple[SparseAutoencoder, ...]:
        """The SAEs that are kept for the model, one per layer. Raises Unavailable if there are none."""
        from whisper_steer.zoo import load_sae

        try:
            layers = range(self.model.dims.n_audio_layer)
            return tuple(load_sae(self.name, layer) for layer in layers)
        except WhisperSteerError as error:
            raise Unavailable(f"it needs SAEs of every layer: {error}") from error

    @cached_property
    def calibration(self) -> Mapping[str, Sequence[Clip]]:
        """The calibration split's sets by name."""
        from calibration.corpus import eval_sets

        return eval_sets("calibration", data_dir=self.data_dir, quick=self.quick)

    @property
    def taught(self) -> list[Clip]:
        """The calibration clips that something may be fitted on. The sets `calibration.refit.UNTAUGHT` have
        voices of the test split: they may set a threshold, for ours as for its competitors, and teach
        nothing."""
        from calibration.refit import UNTAUGHT

        return [clip for name, group in self.calibration.items() if name not in UNTAUGHT for clip in group]

    @cached_property
    def labels(self) -> Mapping[str, Labels]:
        """What plain Whisper makes of every calibration clip, by clip id."""
        from calibration.hallucinations import label_clips

        clips = [clip for group in self.calibration.values() for clip in group]
        return label_clips(self.model, clips, cache=self.labels_file, progress=self.progress)

    def audio(self, clip: Clip) -> np.ndarray:
        """float32 (n,), 16 kHz."""
        return clip.load()

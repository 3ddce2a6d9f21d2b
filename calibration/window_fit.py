"""Fits what a gate reads of windows as a whole, beside their frame most like speech.

Pools of the streams of the gate's layers (`whisper_steer.gate.pooled_windows`) tell windows in which somebody
speaks from the others: the mean over the window by how likely each frame is speech, the mean over all that is
not padding, and the standard deviation over that (speech comes and goes, most noise does not). Two fits
compete: a logistic regression on both means (window and sound probes), and a support vector machine on all
three (`whisper_steer.window_kernel`), which costs more bytes. Both are fitted on the training clips that gave
the gate, in all their conditions (of the synthetic ones, which are plenty and alike, every third), on
altered copies of the real ones (`some_altered`), on excerpts of a word's length (`some_snippets`), and on the
calibration clips: where they err is on recordings of sources that they have not met, and on short ones. So
that calibration clips can also choose how strong the regularisation is and what the fit weighs beside the
frames, and set the threshold, each is judged by a fit without it and without its group (cross-fitting): of a
real recording its speaker or source; a synthetic one is a group of its own, whose voice the training clips
have. Real training speech, as it was recorded and over a telephone, is judged in the same way and counts
where the threshold is set: calibration has few speakers, and what a fit without a voice says of it is what
it will say of the next one. Real training recordings without speech count where fits are compared. (The
frames' part of that knows them: its probes were fitted on them.) Voices that nothing is trained on
(`UNTAUGHT`) teach nothing here either: the test split speaks with them, too.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.gate_fit import SPEECH
from calibration.refit import FOLDS, UNTAUGHT, deal_folds
from calibration.selection import (
    Budget,
    CalibrationClip,
    GateChoice,
    MoreSpeech,
    window_choice,
)
from calibration.training_clips import (
    TrainingClip,
    clean_sounds,
    clean_speech,
    is_synthetic,
    some_altered,
    some_snippets,
)
from calibration.window_parts import LINEAR, WIDTHS, best_probes, depths, kernel_of
from calibration.window_samples import WindowSample, calibration_windows, training_windows
from whisper_steer.errors import UsageError

if TYPE_CHECKING:
    from whisper.model import Whisper

    from calibration.corpus import Clip

logger = logging.getLogger("whisper_steer")

SHARES = (1.0, 2.0, 0.5)  # what the window probes, or the kernel, may weigh beside the frames
_EVERY = 3  # of the synthetic training clips one in so many teaches
ALWAYS = -2  # the fold of windows that teach in every fit


def out_of_fold(
    sample: WindowSample,
    own: WindowSample,
    usable: np.ndarray,
    folds: np.ndarray,
    sample_folds: np.ndarray,
    fit: Callable[[WindowSample], Callable[[np.ndarray], np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """(len(own),) and (len(sample),): what fits on sample and the usable part of own, without a window's
    fold, say of it.

    usable: (len(own),) bool, the others are judged but nothing is fitted on them. folds, sample_folds:
    (len(own),) and (len(sample),) int; windows of the fold ALWAYS teach in every fit and are not judged
    (NaN), nor are those of sample without which there is only one class. fit: sample -> (windows, pools,
    d_model) -> (windows,).
    """
    said, said_of_sample = np.full(len(own.x), np.nan), np.full(len(sample.x), np.nan)
    for fold in np.unique(np.concatenate([folds, sample_folds])):
        mine, of_sample = folds == fold, sample_folds == fold
        if fold == ALWAYS:
            continue
        rest = WindowSample(sample.x[~of_sample], sample.nobody[~of_sample])
        part = _joined(rest, own, usable & ~mine)
        if len(set(part.nobody.tolist())) == 2:
            judge = fit(part)
            said_of_sample[of_sample] = judge(sample.x[of_sample])
        else:
            judge = fit(_joined(sample, own, usable & ~mine))
        said[mine] = judge(own.x[mine])
    return said, said_of_sample


def _joined(sample: WindowSample, own: WindowSample, chosen: np.ndarray) -> WindowSample:
    return WindowSample(
        np.concatenate([sample.x, own.x[chosen]]), np.concatenate([sample.nobody, own.nobody[chosen]])
    )


def with_window_probes(
    model: Whisper,
    choice: GateChoice,
    logits: np.ndarray,
    targets: np.ndarray,
    clips: Sequence[CalibrationClip],
    sources: Mapping[tuple[str, str], Clip],
    training: Sequence[TrainingClip],
    budget: Budget,
    *,
    cache: Path | None = None,
    progress: bool = True,
) -> GateChoice:
    """The choice with window probes and its threshold set anew, by the training speech, too; without them
    where they do not lower text-FPR over a range of budgets. Its window logits are out of fold: what they say
    of the clips is not flattered.

    logits: (rows, frames) unsmoothed frame logits of the chosen gate on clips that it was not fitted on;
    targets: the same shape, SPEECH, NOBODY or UNCLEAR. training: with both kinds. cache: see
    `training_windows`. Where all calibration clips of a kind are of one group, nothing is fitted on them.
    """
    gate = choice.gate
    more_clips = (*some_altered(training), *some_snippets(training))
    taught = [clip for clip in (*training, *more_clips) if _teaches(clip)]
    windows = training_windows(model, gate, taught, cache=cache, progress=progress)
    sample, sample_folds = windows.sample, _training_folds(windows.clips)
    clean = _are_among(clean_speech(windows.clips), windows.clips)
    sounds = _are_among(clean_sounds(windows.clips), windows.clips)

    def more_speech(said: np.ndarray) -> MoreSpeech:
        """said: (training windows,) beside their frames, NaN where nobody judged."""
        judged, logits = (sample_folds != ALWAYS) & ~np.isnan(said), windows.lowest + said
        speech = np.flatnonzero(clean & judged)
        groups = tuple(windows.clips[i].group for i in speech)
        return MoreSpeech(logits[speech], groups, logits[sounds & judged])

    x = calibration_windows(model, gate, logits, clips, sources, progress=progress)
    nobody, spoken = _kinds(clips, targets)
    own, folds = WindowSample(x, nobody), _folds(clips, sources, len(x))
    usable = (nobody | spoken) & (folds >= 0)
    for clip in clips:
        if clip.set in UNTAUGHT:
            usable[list(clip.rows)] = False
    whole = _joined(sample, own, usable)
    judge = partial(out_of_fold, sample, own, usable, folds, sample_folds)
    probes = best_probes(gate, whole, judge, own, spoken)
    found = [probes.weighed(gate, share) for share in SHARES]
    known = nobody | spoken
    for count, width, linear in itertools.product(depths(gate), WIDTHS, LINEAR):
        kernel = kernel_of(gate, count, width, linear, whole, judge, known, nobody)
        found += [kernel.weighed(gate, share) for share in SHARES]
    best = window_choice(
        choice.name, gate, choice.window_logits, clips, budget, more_speech(np.zeros(len(sample.x)))
    )
    before, table = best.over_budgets[0], list(choice.table)
    for one in found:
        logits_ = choice.window_logits + one.said
        tried = window_choice(choice.name, one.gate, logits_, clips, budget, more_speech(one.of_sample))
        table += [{**measured, **one.row} for measured in tried.table]
        if tried.over_budgets < best.over_budgets:
            best = tried
    after = best.over_budgets[0]
    logger.info("windows as a whole: text-FPR over budgets %.4f -> %.4f", before, after)
    return replace(best, table=tuple(table))


def _teaches(clip: TrainingClip) -> bool:
    return not is_synthetic(clip) or zlib.crc32(clip.id.encode()) % _EVERY == 0


def _training_folds(clips: Sequence[TrainingClip]) -> np.ndarray:
    """(clips,) int: by group, so that no fit judges a voice or a source that it knows; ALWAYS where the group
    is not known, as of synthetic clips."""
    folds = [zlib.crc32(clip.group.encode()) % FOLDS if clip.group else ALWAYS for clip in clips]
    return np.array(folds, dtype=int)


def _are_among(some: Sequence[TrainingClip], clips: Sequence[TrainingClip]) -> np.ndarray:
    """(clips,) bool."""
    known = {clip.id for clip in some}
    return np.array([clip.id in known for clip in clips], dtype=bool)


def _kinds(clips: Sequence[CalibrationClip], targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) bool twice: nobody speaks in the window; somebody surely does."""
    nobody, spoken = np.zeros(len(targets), bool), np.zeros(len(targets), bool)
    for clip in clips:
        for row in clip.rows:
            nobody[row] = not clip.is_speech
            spoken[row] = clip.is_speech and bool((targets[row] == SPEECH).any())
    return nobody, spoken


def _folds(
    clips: Sequence[CalibrationClip], sources: Mapping[tuple[str, str], Clip], rows: int
) -> np.ndarray:
    """(rows,) int, the fold of every window's clip; all -1 where the clips cannot be dealt out."""
    folds = np.full(rows, -1)
    try:
        owners = deal_folds([sources[clip.set, clip.id] for clip in clips])
    except UsageError as error:
        logger.warning("window probes are fitted on training clips alone: %s", error)
        return folds
    for clip, owner in zip(clips, owners, strict=True):
        folds[list(clip.rows)] = owner
    return folds

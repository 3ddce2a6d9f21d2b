"""The papers' data sets as they unpack, and what stands in for them where they are not at hand.

Expected below one folder, each optional (the names are those of the distributed archives):

    musan/noise/<source>/*.wav                                    openslr.org/17
    FSD50K/FSD50K.{dev,eval}_audio/*.wav, or these two folders    zenodo.org/records/4060432
    wham_noise/{tr,cv,tt}/*.wav                                   wham.whisper.ai
    UrbanSound8K/audio/fold<n>/*.wav                              urbansounddataset.weebly.com
    ESC-50-master/audio/*.wav                                     github.com/karolpiczak/ESC-50
    LibriSpeech/{dev,test}-clean/<reader>/<chapter>/*.flac        openslr.org/12

What may be fitted on and what is measured never meet: the authors' own parts where there are any (WHAM! tr
against cv and tt, FSD50K dev against eval, as in arXiv 2606.07473); MUSAN has none and is halved by a hash of
the file name. FSD50K's clips are taken as they are, as in the papers: some of them hold speech.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from benchmarks.published import ESC50, FSD50K, LIBRISPEECH, MUSAN, US8K, WHAM
from calibration.source_names import ESC50 as ESC50_NAMES
from calibration.source_names import URBANSOUND8K
from whisper_steer.errors import UsageError

if TYPE_CHECKING:
    from calibration.corpus import Clip
    from calibration.mixture import AudioItem


@dataclass(frozen=True)
class Layout:
    """Where a data set lies.

    roots: folders below the data folder, the first that holds a part counts. fit, test: folders below the
    root; equal ones are halved by hash. pattern: see `calibration.item_sources.from_folder`.
    """

    name: str
    roots: tuple[str, ...]
    fit: tuple[str, ...]
    test: tuple[str, ...]
    speech: bool = False
    pattern: str | None = None


LAYOUTS = (
    Layout(MUSAN, ("musan",), ("noise",), ("noise",)),
    Layout(FSD50K, ("FSD50K", "."), ("FSD50K.dev_audio",), ("FSD50K.eval_audio",)),
    Layout(WHAM, ("wham_noise",), ("tr",), ("cv", "tt")),
    Layout(US8K, ("UrbanSound8K",), (), ("audio",), pattern=URBANSOUND8K),
    Layout(ESC50, ("ESC-50-master", "ESC-50"), (), ("audio",), pattern=ESC50_NAMES),
    Layout(LIBRISPEECH, ("LibriSpeech",), ("dev-clean",), ("test-clean",), True, r"^(?P<group>\d+)/"),
)

# data set -> the evaluation sets (calibration.corpus.eval_sets) that take its place
STAND_INS: Mapping[str, tuple[str, ...]] = {
    MUSAN: ("music", "tones"),
    FSD50K: ("human",),
    WHAM: ("noise",),
    US8K: ("sounds",),
    LIBRISPEECH: ("speech", "real_speech"),
}
ESC10 = "esc10"  # source of the recordings that ESC-50 has in common with ESC-10, its subset


@dataclass(frozen=True)
class Corpus:
    """A data set's clips.

    name: as in the papers. fit: may be fitted on; test: only measured. about: what it is, for the reader of a
    table ("MUSAN", or "music + tones of the evaluation sets").
    """

    name: str
    speech: bool
    fit: tuple[Clip, ...]
    test: tuple[Clip, ...]
    about: str


@dataclass(frozen=True)
class Corpora:
    """All data sets at hand. stand_in: none of the papers' own is. notes: lines for the reader."""

    sets: tuple[Corpus, ...]
    stand_in: bool
    notes: tuple[str, ...]

    def get(self, name: str) -> Corpus | None:
        """By its name, None where it is not at hand."""
        return next((corpus for corpus in self.sets if corpus.name == name), None)

    @property
    def about(self) -> dict[str, str]:
        """Every set in words, by its name: what it is, its clips to fit on and to measure."""
        return {
            c.name: (f"{c.name} = {c.about}" if self.stand_in else c.about)
            + f" ({len(c.fit)} clips to fit on, {len(c.test)} measured)"
            for c in self.sets
        }


def read_corpora(
    data: Path | None, *, fit_limit: int | None = None, test_limit: int | None = None, quick: bool = False
) -> Corpora:
    """The papers' data sets below `data`; if there is none, the evaluation sets and the recordings of `data`.

    fit_limit, test_limit: at most so many clips per set, chosen by a hash of their names. quick: the small
    evaluation sets.

    Raises UsageError: `data` holds nothing that is known. FormatError: a data set's folder without audio.
    """
    if data is not None and not data.is_dir():
        raise UsageError(f"--data {data}: no such folder")
    found = [] if data is None else [corpus for layout in LAYOUTS if (corpus := _read(data, layout))]
    if found:
        missing = [layout.name for layout in LAYOUTS if layout.name not in {corpus.name for corpus in found}]
        notes = [f"not below {data}: {', '.join(missing)}"] if missing else []
        limited = [_limited(corpus, fit_limit, test_limit) for corpus in found]
        return Corpora(tuple(limited), False, tuple(notes))
    return _stand_ins(data, fit_limit, test_limit, quick)


# -- the papers' own


def _read(data: Path, layout: Layout) -> Corpus | None:
    """The data set, or None if no part of it lies below `data`."""
    for root in layout.roots:
        fit, test = (_clips(data / root, layout, split) for split in ("calibration", "test"))
        if fit or test:
            return Corpus(layout.name, layout.speech, fit, test, layout.name)
    return None


def _clips(root: Path, layout: Layout, split: str) -> tuple[Clip, ...]:
    """Clips of the parts that are there."""
    from calibration.item_sources import from_folder

    parts = layout.fit if split == "calibration" else layout.test
    clips = []
    for part in parts:
        if not (root / part).is_dir():
            continue
        domain = "speech" if layout.speech else "sounds"
        for item in from_folder(layout.name, root / part, domain=domain, pattern=layout.pattern):
            # without parts of its own a data set is halved
            if layout.fit != layout.test or _half(item.id) == split:
                clips.append(_clip(item, layout, part, split))
    return tuple(clips)


def _half(name: str) -> str:
    """ "calibration" or "test", by a hash of the file's name without its folder."""
    return "test" if hashlib.sha256(Path(name).name.encode()).digest()[0] % 2 else "calibration"


def _clip(item: AudioItem, layout: Layout, part: str, split: str) -> Clip:
    from calibration.corpus import Clip

    kind = "real_speech" if layout.speech else "nonspeech"
    return Clip(
        f"{layout.name}/{part}/{item.id}", kind, layout.name, split, item.text if layout.speech else None,
        item.group, layout.name, path=item.path, audio=item.load,
    )  # fmt: skip


# -- what stands in


def _stand_ins(data: Path | None, fit_limit: int | None, test_limit: int | None, quick: bool) -> Corpora:
    from calibration.corpus import eval_sets, real_clips

    if data is not None and not real_clips(data, "test"):
        names = ", ".join(sorted({root for layout in LAYOUTS for root in layout.roots if root != "."}))
        raise UsageError(
            f"--data {data} holds no known data: expected folders such as {names}, or speech/, sounds/ with "
            "a manifest.csv each; leave --data out to measure on synthetic audio alone"
        )
    fit, test = (eval_sets(split, data, quick) for split in ("calibration", "test"))
    made = []
    for name, places in STAND_INS.items():
        about = " + ".join(place for place in places if place in test) + " of the evaluation sets"
        corpus = Corpus(name, name == LIBRISPEECH, _joined(fit, places), _joined(test, places), about)
        made.append(_limited(corpus, fit_limit, test_limit))
    ten = tuple(clip for clips in test.values() for clip in clips if clip.source == ESC10)
    if ten:  # only measured, as ESC-50 is
        about = f"ESC-10 below {data}, a subset: 10 of its 50 classes"
        made.append(_limited(Corpus(ESC50, False, (), ten, about), fit_limit, test_limit))
    where = "synthetic audio" + (f" and the recordings below {data}" if data is not None else " alone")
    note = f"none of the papers' data sets is at hand: the evaluation sets take their places ({where})"
    return Corpora(tuple(made), True, (note,))


def _joined(sets: Mapping[str, Sequence[Clip]], names: Sequence[str]) -> tuple[Clip, ...]:
    return tuple(clip for name in names for clip in sets.get(name, ()))


def _limited(corpus: Corpus, fit_limit: int | None, test_limit: int | None) -> Corpus:
    fit, test = _chosen(corpus.fit, fit_limit), _chosen(corpus.test, test_limit)
    return Corpus(corpus.name, corpus.speech, fit, test, corpus.about)


def _chosen(clips: tuple[Clip, ...], limit: int | None) -> tuple[Clip, ...]:
    from calibration.item_sources import limited

    # it only looks at ids, which clips have too
    return tuple(cast("list[Clip]", limited(cast("Sequence[AudioItem]", clips), limit)))

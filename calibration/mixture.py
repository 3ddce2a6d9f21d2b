"""Audio for training: data sets with weights and domains, drawn from as AudioSAE does (arXiv 2602.05027).

A data set's chance to be drawn is its weight times the number of its items; inside it every item is equally
likely. A fixed share of the groups (speakers, source recordings) is held out by hash: it is never drawn, and
what a trained SAE is calibrated and measured on.

`Mixture.of` makes a mixture of clips at hand, `load_mixture` reads one from a file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from whisper_steer.audio import check_audio, load_audio
from whisper_steer.errors import AudioError, UsageError

DOMAINS = ("speech", "music", "sounds")  # whatever is neither speech nor music is "sounds"

Key = tuple[int, int]  # (position of the data set, position of the item in it)


@dataclass(frozen=True, slots=True)
class AudioItem:
    """One recording.

    Attributes:
        id: unique inside its data set.
        dataset: name of the data set.
        domain: one of DOMAINS.
        group: what must not be split between training and held-out audio: a speaker, a source recording.
        text: what is said, where known.
        duration: seconds, where known without decoding.
        labels: anything else that is known (emotion, class, ...).
        path: the file, where there is one.
        audio: gives the samples; without it, `path` is decoded.
    """

    id: str
    dataset: str
    domain: str
    group: str = ""
    text: str | None = None
    duration: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    path: str | None = None
    audio: Callable[[], np.ndarray] | None = field(default=None, repr=False, compare=False)

    def load(self) -> np.ndarray:
        """float32 (n,), 16 kHz, mono.

        Raises AudioError: unreadable, empty, or not finite.
        """
        if self.audio is not None:
            return check_audio(self.audio())
        if self.path is None:
            raise AudioError(f"{self.dataset}/{self.id}: has neither a path nor samples")
        return load_audio(self.path)


@dataclass(frozen=True)
class Dataset:
    """Items that are drawn with the same weight.

    Attributes:
        name, weight, items: the chance of the whole data set is weight x number of items x pieces.
        pieces: windows that an average item fills. AudioSAE trains on whole recordings, here a draw takes at
            most one window of them: recordings of several minutes have to count as several.
    """

    name: str
    weight: float
    items: Sequence[AudioItem]
    pieces: float = 1.0

    @property
    def item_weight(self) -> float:
        return self.weight * self.pieces


@dataclass(frozen=True)
class Augmentation:
    """Online augmentation of drawn clips; AudioSAE's values by default.

    Attributes:
        noise_probability, music_probability: chance that a clip gets noise or music added (0..1).
        snr_db: range from which the ratio of clip to addition is drawn uniformly, in dB.
        noise_from, music_from: names of the data sets that the additions come from; empty: every item of the
            domain "sounds" or "music".
    """

    noise_probability: float = 0.05
    music_probability: float = 0.025
    snr_db: tuple[float, float] = (0.0, 20.0)
    noise_from: tuple[str, ...] = ()
    music_from: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """What is wrong with the values, one phrase each."""
        found = [
            f"{name} is {value!r}, expected a number from 0 to 1"
            for name, value in (
                ("noise_probability", self.noise_probability),
                ("music_probability", self.music_probability),
            )
            if not (isinstance(value, (int, float)) and 0 <= value <= 1)
        ]
        low, high = self.snr_db
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            found.append(f"snr_db is {list(self.snr_db)}, expected two numbers, the lower one first")
        return found


class _Pool:
    """Some items of some data sets, drawn with a chance of weight x count."""

    def __init__(self, parts: Sequence[tuple[int, float, Sequence[int]]]):
        """parts: (position of the data set, its weight, positions of the items)."""
        self.parts = [(number, positions) for number, _, positions in parts if len(positions)]
        weights = [weight * len(positions) for _, weight, positions in parts if len(positions)]
        total = math.fsum(weights)
        self.chances = [weight / total for weight in weights]
        self._bounds = np.cumsum(self.chances)

    def __len__(self) -> int:
        return sum(len(positions) for _, positions in self.parts)

    def pick(self, rng: np.random.Generator) -> Key:
        part = int(np.searchsorted(self._bounds, rng.random(), side="right"))
        number, positions = self.parts[min(part, len(self.parts) - 1)]
        return number, positions[int(rng.integers(len(positions)))]


def is_held_out(group: str, share: float) -> bool:
    """Whether a group belongs to the held-out share: decided by a hash of its name alone.

    So a speaker who is in two data sets under one name (LibriSpeech and Libriheavy share their readers) is on
    the same side in both.
    """
    digest = hashlib.sha256(f"whisper-steer:held-out:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class Mixture:
    """Weighted data sets, what is held out of them, and the augmentation of what is drawn.

    Attributes:
        name: of the mixture.
        datasets: what is drawn from, held-out groups removed.
        augmentation: None: off.
        held_out_share: share of the groups that is held out by hash.
        test_sets: data sets that are neither drawn nor held out for calibration.
        training: settings for the training engine from the mixture's file, handed through.
        notes: what a user should know: data sets that were skipped, domains without held-out audio.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        name: str = "clips",
        augmentation: Augmentation | None = None,
        held_out_share: float = 0.0,
        held_out_sets: Sequence[Dataset] = (),
        test_sets: Sequence[Dataset] = (),
        training: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ):
        """datasets: to train on; of these, `held_out_share` (0..1) of the groups is held out.
        held_out_sets: data sets of which every item is held out.

        Raises UsageError: nothing to train on, a weight that is not a positive number, a name used twice,
            an unknown domain, an augmentation without sources.
        """
        self.name, self.augmentation, self.held_out_share = name, augmentation, held_out_share
        self.test_sets, self.training = tuple(test_sets), dict(training or {})
        _check(datasets, held_out_sets, self.test_sets, held_out_share)
        kept, held_out, used_up = [], [], []
        for dataset in datasets:
            train, held = _split(dataset, held_out_share)
            if len(train):
                kept.append(replace(dataset, items=train))
            else:
                used_up.append(f"{dataset.name}: nothing is left to train on")
            held_out += held
        self.datasets = tuple(kept)
        self._held_out = held_out + [item for dataset in held_out_sets for item in dataset.items]
        if not self.datasets:
            raise UsageError(
                f"mixture {name}: no training clips: give a corpus, a data folder or a mixture with data"
            )
        self._pool = _Pool([(i, d.item_weight, range(len(d.items))) for i, d in enumerate(self.datasets)])
        self._additions = {"sounds": self._sources("noise"), "music": self._sources("music")}
        self.notes = (*notes, *used_up, *self._missing_domains())

    @classmethod
    def of(cls, clips: Sequence[Any], name: str = "clips", *, held_out_share: float = 0.0) -> Mixture:
        """A mixture of one data set, of weight 1 and without augmentation.

        clips: objects with `id` and `load()`, such as `calibration.training_clips.TrainingClip`. Their `kind`
            says the domain: "nonspeech" is "music" if `category` (or `condition`) is "music", else "sounds";
            every other kind, or none, is speech. `text`, `group` and `path` are used where present.
        """
        return cls([Dataset(name, 1.0, items_of(clips, name))], name=name, held_out_share=held_out_share)

    def chances(self) -> dict[str, float]:
        """Each data set's chance to be drawn; they add up to 1."""
        return dict(zip((dataset.name for dataset in self.datasets), self._pool.chances, strict=True))

    def pick(self, rng: np.random.Generator) -> Key:
        """Where the next item is: a data set by its chance, then any item of it."""
        return self._pool.pick(rng)

    def item(self, key: Key) -> AudioItem:
        return self.datasets[key[0]].items[key[1]]

    def draw(self, rng: np.random.Generator) -> AudioItem:
        return self.item(self.pick(rng))

    def pick_addition(self, domain: str, rng: np.random.Generator) -> Key:
        """An item to mix into a clip; domain: "sounds" or "music"."""
        return self._additions[domain].pick(rng)

    def held_out(self) -> dict[str, list[AudioItem]]:
        """Held-out items by domain; only domains that have some, in the order of DOMAINS."""
        found = {domain: [item for item in self._held_out if item.domain == domain] for domain in DOMAINS}
        return {domain: items for domain, items in found.items() if items}

    def settings(self) -> dict[str, Any]:
        """Identity of the mixture as JSON-able values: what a resumed run must find unchanged."""
        return self._settings

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "datasets": [
                {
                    "name": dataset.name,
                    "weight": float(dataset.weight),
                    "pieces": float(dataset.pieces),
                    "items": len(dataset.items),
                    "sha256": _digest(dataset.items),
                }
                for dataset in self.datasets
            ],
            "augmentation": _jsonable(asdict(self.augmentation)) if self.augmentation else None,
        }

    def describe(self) -> tuple[list[str], dict[str, Any]]:
        """(lines of a table, the same as JSON-able values): what is drawn how often, what is held out."""
        from calibration.mixture_table import record_of, table_of

        record = record_of(self)
        return table_of(record), record

    def _sources(self, what: str) -> _Pool:
        """The pool that noise or music to add is drawn from; empty where augmentation never asks for it."""
        domain = "sounds" if what == "noise" else what
        wanted = self.augmentation
        if wanted is None or getattr(wanted, f"{what}_probability") == 0:
            return _Pool([])
        names = getattr(wanted, f"{what}_from")
        known = {dataset.name for dataset in self.datasets}
        if missing := sorted(set(names) - known):
            raise UsageError(
                f"mixture {self.name}: {what}_from names {', '.join(missing)}, "
                f"the data sets to train on are {', '.join(sorted(known))}"
            )
        parts = []
        for number, dataset in enumerate(self.datasets):
            if names:
                positions: Sequence[int] = range(len(dataset.items)) if dataset.name in names else ()
            else:
                positions = [i for i, item in enumerate(dataset.items) if item.domain == domain]
            parts.append((number, dataset.item_weight, positions))
        pool = _Pool(parts)
        if not len(pool):
            raise UsageError(
                f"mixture {self.name}: {what}_probability is {getattr(wanted, f'{what}_probability')}, but "
                f'there is no audio of the domain "{domain}" to add: name data sets in {what}_from, or give 0'
            )
        return pool

    def _missing_domains(self) -> list[str]:
        if not self._held_out:
            return []
        trained = {item.domain for dataset in self.datasets for item in dataset.items}
        return [
            f"no held-out {domain}: its quality is not measured (raise held_out, or give a held-out data set)"
            for domain in DOMAINS
            if domain in trained and domain not in self.held_out()
        ]


def load_mixture(path: Path | str, roots: Mapping[str, Path | None]) -> Mixture:
    """The mixture that a TOML or YAML file describes, or a bundled one by its name ("mini.en", "audiosae").

    roots: folders that paths such as "@corpus" or "@data/musan" start at, by name. See
    `calibration.mixture_file` for what can be in the file.

    Raises FormatError: the file cannot be read. UsageError: everything that is wrong in it, in one line.
    """
    from calibration.mixture_file import read_mixture

    return read_mixture(path, roots)


def items_of(clips: Sequence[Any], dataset: str) -> list[AudioItem]:
    """Clips (see `Mixture.of`) as items of a data set; an AudioItem stays what it is."""
    return [clip if isinstance(clip, AudioItem) else _item_of(clip, dataset) for clip in clips]


def _item_of(clip: Any, dataset: str) -> AudioItem:
    kind = getattr(clip, "kind", None)
    what = getattr(clip, "category", None) or getattr(clip, "condition", None)
    domain = "speech"
    if kind == "nonspeech":
        domain = "music" if what == "music" else "sounds"
    labels = {name: str(value) for name, value in (("kind", kind), ("category", what)) if value}
    path = getattr(clip, "path", None)
    # "#" marks a variant of a clip, such as a noisy one
    group = getattr(clip, "group", None) or clip.id.partition("#")[0]
    return AudioItem(
        clip.id, dataset, domain, group, getattr(clip, "text", None), None, labels, path, clip.load
    )


def _split(dataset: Dataset, share: float) -> tuple[Sequence[AudioItem], list[AudioItem]]:
    if share == 0:
        return dataset.items, []
    decided: dict[str, bool] = {}
    parts: tuple[list[AudioItem], list[AudioItem]] = ([], [])
    for item in dataset.items:
        group = item.group or item.id
        if group not in decided:
            decided[group] = is_held_out(group, share)
        parts[decided[group]].append(item)
    return parts


def _check(
    datasets: Sequence[Dataset], held_out: Sequence[Dataset], tests: Sequence[Dataset], share: float
) -> None:
    problems = [
        f"{what} of {dataset.name} is {getattr(dataset, what)!r}, expected a positive number"
        for dataset in datasets
        for what in ("weight", "pieces")
        if not (math.isfinite(getattr(dataset, what)) and getattr(dataset, what) > 0)
    ]
    everything = [*datasets, *held_out, *tests]
    names = [dataset.name for dataset in everything]
    problems += [
        f"the name {name} is used twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    unknown = {item.domain for dataset in everything for item in dataset.items} - set(DOMAINS)
    problems += [f"domain {domain!r}, expected one of {', '.join(DOMAINS)}" for domain in sorted(unknown)]
    if not 0 <= share < 1:
        problems.append(f"the held-out share is {share!r}, expected 0 to below 1")
    if problems:
        raise UsageError("mixture: " + "; ".join(problems))


def _digest(items: Sequence[AudioItem]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.id}\n".encode())
    return digest.hexdigest()


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(entry) for key, entry in value.items()}
    return [_jsonable(entry) for entry in value] if isinstance(value, (list, tuple)) else value

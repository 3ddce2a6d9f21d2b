"""Mixtures in TOML or YAML files.

    name = "my audio"
    held_out = 0.02                     # share of the groups that is never drawn, chosen by hash

    [training]                          # settings of the training engine, handed through
    k = 50

    [augmentation]                      # without this table: off
    noise_probability = 0.05
    music_probability = 0.025
    snr_db = [0, 20]
    noise_from = ["musan"]              # default: every item of the domain "sounds"; music_from likewise

    [[dataset]]
    name = "musan"
    format = "folder"
    path = "@data/musan"                # "@data" is a root that the caller names; else relative to this file
    weight = 5                          # chance to be drawn: weight x number of items
    domain = "sounds"                   # speech, music, or sounds for everything else
    domains = {"music/*" = "music", "speech/*" = "speech"}

For every data set: name, format, weight (1), pieces (1; windows that an average item fills: items of minutes
count as several), limit (at most so many items, chosen by hash), optional (skipped with a note if its data is
absent), use ("train"; "held_out": not drawn, all of it held out; "test": neither).
By format (see the functions of `calibration.item_sources` and `calibration.manifests`):

    folder     path, domain; include, exclude, pattern, domains
    manifest   path; domain, audio_root, split, columns
    lhotse     path; domain, audio_root
    hf         path (hub id or local folder), domain; config, split, revision, audio, text, group, labels
    corpus     path; data, speech, nonspeech, real, seed
    eval_sets  data, split, quick          always held out
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from calibration import item_sources, manifests
from calibration.mixture import DOMAINS, AudioItem, Augmentation, Dataset, Mixture
from whisper_steer.errors import FormatError, UsageError, WhisperSteerError

HELD_OUT_SHARE = 0.02
USES = ("train", "held_out", "test")

Check = tuple[str, Callable[[Any], bool]]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _is_table(value: Any, keys: Sequence[str] | None = None, values: Sequence[str] | None = None) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str)
        and isinstance(entry, str)
        and (keys is None or key in keys)
        and (values is None or entry in values)
        for key, entry in value.items()
    )


TEXT: Check = ("a text", lambda value: isinstance(value, str) and value != "")
COUNT: Check = ("a whole number from 0 on", _is_count)
FLAG: Check = ("true or false", lambda value: isinstance(value, bool))
TEXTS: Check = (
    "a list of texts",
    lambda value: isinstance(value, list) and all(isinstance(entry, str) for entry in value),
)
DOMAIN: Check = (f"one of {', '.join(DOMAINS)}", lambda value: value in DOMAINS)
RANGE: Check = (
    "two numbers",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)),
)
POSITIVE: Check = ("a number above 0", lambda value: _is_number(value) and value > 0)
PROBABILITY: Check = ("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)

TOP: dict[str, Check] = {
    "name": TEXT,
    "held_out": ("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1),
    "training": ("a table", lambda value: isinstance(value, Mapping)),
    "augmentation": ("a table", lambda value: isinstance(value, Mapping)),
    "dataset": (
        "a list of tables",
        lambda value: isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value),
    ),
}
AUGMENTATION: dict[str, Check] = {
    "noise_probability": PROBABILITY,
    "music_probability": PROBABILITY,
    "snr_db": RANGE,
    "noise_from": TEXTS,
    "music_from": TEXTS,
}
COMMON: dict[str, Check] = {
    "name": TEXT,
    "format": TEXT,
    "weight": POSITIVE,
    "pieces": POSITIVE,
    "limit": ("a whole number from 1 on", lambda value: _is_count(value) and value > 0),
    "optional": FLAG,
    "use": (f"one of {', '.join(USES)}", lambda value: value in USES),
}
FORMATS: dict[str, dict[str, Check]] = {
    "folder": {
        "path": TEXT,
        "domain": DOMAIN,
        "include": TEXTS,
        "exclude": TEXTS,
        "pattern": ("a regular expression", _is_pattern),
        "domains": (
            f"a table from shell pattern to {', '.join(DOMAINS)}",
            lambda value: _is_table(value, values=DOMAINS),
        ),
    },
    "manifest": {
        "path": TEXT,
        "domain": DOMAIN,
        "audio_root": TEXT,
        "split": TEXT,
        "columns": (
            f"a table from {', '.join(manifests.COLUMNS)} to names of columns",
            lambda value: _is_table(value, keys=tuple(manifests.COLUMNS)),
        ),
    },
    "lhotse": {"path": TEXT, "domain": DOMAIN, "audio_root": TEXT},
    "hf": {
        "path": TEXT,
        "domain": DOMAIN,
        "config": TEXT,
        "split": TEXT,
        "revision": TEXT,
        "audio": TEXT,
        "text": TEXT,
        "group": TEXT,
        "labels": TEXTS,
    },
    "corpus": {
        "path": TEXT,
        "data": TEXT,
        "speech": COUNT,
        "nonspeech": COUNT,
        "real": COUNT,
        "seed": COUNT,
    },
    "eval_sets": {
        "data": TEXT,
        "split": ("calibration or test", lambda value: value in ("calibration", "test")),
        "quick": FLAG,
    },
}
REQUIRED = {
    "folder": ("path", "domain"),
    "manifest": ("path",),
    "lhotse": ("path",),
    "hf": ("path", "domain"),
    "corpus": ("path",),
    "eval_sets": (),
}


class _Absent(Exception):
    """The data is not on this machine, or its root was not given."""


def bundled() -> dict[str, Path]:
    """The mixtures that come with the package: name -> file."""
    folder = Path(str(resources.files("calibration"))) / "mixtures"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_mixture(path: Path | str, roots: Mapping[str, Path | None]) -> Mixture:
    """See `calibration.mixture.load_mixture`."""
    file = bundled().get(str(path), Path(path))
    table = _parsed(file)
    problems = _wrong_keys("", table, TOP)
    for key in ("name", "dataset"):
        if not table.get(key):
            problems.append(f"{key} is missing" if key == "name" else "no [[dataset]]")
    added = table.get("augmentation")
    if isinstance(added, Mapping):
        problems += _wrong_keys("augmentation: ", added, AUGMENTATION)
    entries = table.get("dataset", [])
    if isinstance(entries, list):
        for number, entry in enumerate(entries, start=1):
            if isinstance(entry, Mapping):
                problems += _wrong_dataset(number, entry)
    if problems:
        raise UsageError(f"{file}: {'; '.join(problems)}")
    augmentation = None
    if added is not None:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in added.items()}
        augmentation = Augmentation(**values)
        problems += [f"augmentation: {problem}" for problem in augmentation.problems()]
    reader = _Reader(file.parent, roots)
    sets: dict[str, list[Dataset]] = {use: [] for use in USES}
    for entry in entries:
        try:
            items = reader.items(entry)
        except _Absent as absence:
            if entry.get("optional", False):
                reader.notes.append(f"{entry['name']} is left out: {absence}")
            else:
                problems.append(f"{entry['name']}: {absence} (optional = true would leave it out)")
            continue
        except WhisperSteerError as error:
            problems.append(f"{entry['name']}: {error}")
            continue
        use = "held_out" if entry["format"] == "eval_sets" else entry.get("use", "train")
        weight, pieces = float(entry.get("weight", 1.0)), float(entry.get("pieces", 1.0))
        sets[use].append(Dataset(entry["name"], weight, items, pieces))
    if problems:
        raise UsageError(f"{file}: {'; '.join(problems)}")
    try:
        return Mixture(
            sets["train"],
            name=table["name"],
            augmentation=augmentation,
            held_out_share=float(table.get("held_out", HELD_OUT_SHARE)),
            held_out_sets=sets["held_out"],
            test_sets=sets["test"],
            training=table.get("training"),
            notes=reader.notes,
        )
    except UsageError as error:
        raise UsageError("; ".join([f"{file}: {error}", *reader.notes])) from error


class _Reader:
    """Turns the tables of data sets into items."""

    def __init__(self, folder: Path, roots: Mapping[str, Path | None]):
        self.folder = folder
        self.roots = {name: Path(root) for name, root in roots.items() if root is not None}
        self.notes: list[str] = []

    def items(self, entry: Mapping[str, Any]) -> list[AudioItem]:
        """Raises _Absent where the data is not there."""
        name, kind = entry["name"], entry["format"]
        options = {key: value for key, value in entry.items() if key not in COMMON and key != "path"}
        if "audio_root" in options:
            options["audio_root"] = self._present(options["audio_root"])
        if kind in ("corpus", "eval_sets"):
            options["data"] = self._data(name, options.get("data"))
        if kind == "eval_sets":
            items = item_sources.from_eval_sets(name, **options)
        elif kind == "hf":
            items = item_sources.from_hf(name, self._source(entry["path"]), **options)
        else:
            make: Any = {
                "folder": item_sources.from_folder,
                "manifest": manifests.from_manifest,
                "lhotse": manifests.from_lhotse,
                "corpus": item_sources.from_corpus,
            }[kind]
            items = make(name, self._present(entry["path"]), **options)
        return item_sources.limited(items, entry.get("limit"))

    def _resolved(self, path: str) -> Path:
        if not path.startswith("@"):
            return self.folder / path
        root, _, rest = path[1:].partition("/")
        if root not in self.roots:
            given = ", ".join(f"@{known}" for known in sorted(self.roots)) or "none"
            raise _Absent(f"{path}: no folder is given for @{root} (given: {given})")
        return self.roots[root] / rest

    def _present(self, path: str) -> Path:
        resolved = self._resolved(path)
        if not resolved.exists():
            raise _Absent(f"{resolved} does not exist")
        return resolved

    def _source(self, path: str) -> str:
        """A local folder, or the id of a data set on the hub."""
        if path.startswith(("@", "/", "./", "../")):
            return str(self._present(path))
        return path

    def _data(self, name: str, path: str | None) -> Path | None:
        """Real recordings are welcome, not required."""
        if path is None:
            return None
        try:
            return self._present(path)
        except _Absent as absence:
            self.notes.append(f"{name} is without real recordings: {absence}")
            return None


def _wrong_keys(where: str, table: Mapping[str, Any], known: Mapping[str, Check]) -> list[str]:
    problems = []
    for key, value in table.items():
        if key not in known:
            problems.append(f"{where}unknown key {key} (known: {', '.join(known)})")
        elif not known[key][1](value):
            problems.append(f"{where}{key} is {value!r}, expected {known[key][0]}")
    return problems


def _wrong_dataset(number: int, entry: Mapping[str, Any]) -> list[str]:
    name = entry.get("name")
    where = f"dataset {name if isinstance(name, str) and name else number}: "
    kind = entry.get("format")
    if not isinstance(kind, str) or kind not in FORMATS:
        return [f"{where}format is {kind!r}, expected one of {', '.join(FORMATS)}"]
    known = COMMON | FORMATS[kind]
    if kind == "eval_sets":
        known = {key: check for key, check in known.items() if key not in ("weight", "pieces", "use")}
    problems = _wrong_keys(where, entry, known)
    problems += [f"{where}{key} is missing" for key in ("name", *REQUIRED[kind]) if key not in entry]
    if entry.get("use", "train") != "train":
        problems += [
            f"{where}{key} has no effect: nothing is drawn from use = {entry['use']!r}"
            for key in ("weight", "pieces")
            if key in entry
        ]
    return problems


def _parsed(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FormatError(f"{file}: no such mixture file; bundled mixtures: {', '.join(bundled())}")
    suffix = file.suffix.lower()
    if suffix not in (".toml", ".yaml", ".yml"):
        raise FormatError(f"{file}: a mixture file is .toml, .yaml or .yml")
    text = file.read_text(encoding="utf-8")
    table = _toml(file, text) if suffix == ".toml" else _yaml(file, text)
    if not isinstance(table, dict):
        raise FormatError(f"{file}: expected keys and values, found {type(table).__name__}")
    return table


def _toml(file: Path, text: str) -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # type: ignore[no-redef]
        except ImportError as error:
            raise UsageError(
                f"{file}: on Python 3.10 TOML needs the package tomli: pip install tomli"
            ) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FormatError(f"{file}: not valid TOML ({error})") from error


def _yaml(file: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise UsageError(
            f"{file}: YAML needs the package pyyaml: pip install pyyaml, or write the mixture as TOML"
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FormatError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error

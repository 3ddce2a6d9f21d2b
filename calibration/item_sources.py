"""Where the items of a data set come from: folders, Hugging Face data sets, this project's own audio.

Every function takes the data set's name and its options, and returns items in a fixed order with ids that do
not change when the data moves to another folder. No audio is decoded before an item is loaded. Manifests are
read by `calibration.manifests`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibration.mixture import AudioItem, items_of
from whisper_steer.audio import AUDIO_SUFFIXES, load_audio
from whisper_steer.errors import AudioError, FormatError, UsageError


def limited(items: Sequence[AudioItem], limit: int | None) -> list[AudioItem]:
    """At most `limit` items, chosen by a hash of their ids, in their order."""
    if limit is None or len(items) <= limit:
        return list(items)
    ranks = [hashlib.sha256(item.id.encode()).digest() for item in items]
    chosen = sorted(range(len(items)), key=ranks.__getitem__)[:limit]
    return [items[index] for index in sorted(chosen)]


# -- folders


def from_folder(
    name: str,
    folder: Path,
    *,
    domain: str,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    pattern: str | None = None,
    domains: Mapping[str, str] | None = None,
) -> list[AudioItem]:
    """Audio files below a folder, sorted by path.

    Args:
        include, exclude: shell patterns for paths relative to `folder`, with "/"; "*" crosses folders. An
            empty `include` takes every file with an audio suffix.
        pattern: regular expression, searched in the relative path; its named group "group" is the item's
            group (by default every file is its own), "text" its text, the others become labels.
        domains: shell pattern -> domain, for the files that are not of `domain`; the first match counts.

    Transcripts are taken from `x.txt` beside `x.wav`, or from LibriSpeech's `*.trans.txt` in the same folder.

    Raises FormatError: no such folder, no audio in it, or `pattern` fits none of the files.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    expression = re.compile(pattern) if pattern else None
    items, fitting = [], 0
    for relative, text in _files_below(folder, include, exclude):
        match = expression.search(relative) if expression else None
        found = {key: value for key, value in match.groupdict().items() if value} if match else {}
        fitting += match is not None
        kind = next((d for glob, d in (domains or {}).items() if fnmatch.fnmatchcase(relative, glob)), domain)
        items.append(
            AudioItem(
                relative,
                name,
                kind,
                found.pop("group", relative),
                found.pop("text", text),
                None,
                found,
                str(folder / relative),
            )
        )
    if not items:
        raise FormatError(f"{folder}: no audio file that fits {', '.join(include) or 'a known suffix'}")
    if expression and not fitting:
        raise FormatError(f"{folder}: pattern {pattern!r} fits no path, such as {items[0].id}")
    return items


def _files_below(
    folder: Path, include: Sequence[str], exclude: Sequence[str]
) -> Iterator[tuple[str, str | None]]:
    """(relative path, transcript) of every wanted audio file, sorted inside each folder."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        prefix = Path(parent).relative_to(folder).as_posix()
        texts: dict[str, str] | None = None
        present = set(names)
        for name in sorted(names):
            if name.startswith(".") or Path(name).suffix.lower() not in AUDIO_SUFFIXES:
                continue
            relative = name if prefix == "." else f"{prefix}/{name}"
            if include and not any(fnmatch.fnmatchcase(relative, glob) for glob in include):
                continue
            if any(fnmatch.fnmatchcase(relative, glob) for glob in exclude):
                continue
            stem = Path(name).stem
            if f"{stem}.txt" in present:
                yield relative, _text_of(Path(parent, f"{stem}.txt"))
                continue
            if texts is None:
                texts = _librispeech_texts(
                    [Path(parent, entry) for entry in names if entry.endswith(".trans.txt")]
                )
            yield relative, texts.get(stem)


def _text_of(path: Path) -> str | None:
    return " ".join(path.read_text(encoding="utf-8", errors="replace").split()) or None


def _librispeech_texts(paths: Sequence[Path]) -> dict[str, str]:
    texts = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            utterance, _, text = line.strip().partition(" ")
            texts[utterance] = text
    return texts


# -- Hugging Face data sets


def from_hf(
    name: str,
    source: str,
    *,
    domain: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    audio: str = "audio",
    text: str | None = None,
    group: str | None = None,
    labels: Sequence[str] = (),
) -> list[AudioItem]:
    """Rows of a data set on the Hugging Face hub, or in a local folder (as downloaded, or by `save_to_disk`).

    audio, text, group, labels: names of columns.

    Raises UsageError: the package `datasets` is missing, or a column is. FormatError: the data set cannot be
        loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"data set {source} needs the package datasets: pip install 'whisper-steer[hf]'"
        ) from error
    try:
        if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(source)
            table = table[split] if isinstance(table, datasets.DatasetDict) else table
        else:
            table = datasets.load_dataset(source, config, split=split, revision=revision)
    except Exception as error:  # whatever the package and its network stack raise
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise FormatError(f"Hugging Face data set {source} cannot be loaded ({reason})") from error
    wanted = [column for column in (audio, text, group, *labels) if column]
    if missing := [column for column in wanted if column not in table.column_names]:
        raise UsageError(
            f"Hugging Face data set {source} has no column {', '.join(missing)}; "
            f"its columns are {', '.join(table.column_names)}"
        )
    table = table.cast_column(audio, datasets.Audio(decode=False))
    others = table.select_columns([column for column in wanted if column != audio])
    items = []
    for index, row in enumerate(others if others.column_names else ({} for _ in range(len(table)))):
        said = row.get(text) if text else None
        items.append(
            AudioItem(
                f"{split}/{index}",
                name,
                domain,
                str(row[group]) if group else f"{split}/{index}",
                str(said) if said else None,
                None,
                {column: str(row[column]) for column in labels},
                None,
                partial(_hf_audio, table, index, audio, f"{source}, {split} {index}"),
            )
        )
    return items


def _hf_audio(table: Any, index: int, column: str, what: str) -> np.ndarray:
    cell = table[index][column]
    data, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    if data is None:
        if not path:
            raise AudioError(f"{what}: holds no audio")
        return load_audio(path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "audio" + Path(path or "").suffix)
        file.write_bytes(data)
        try:
            return load_audio(file)
        except AudioError as error:
            raise AudioError(str(error).replace(str(file), what)) from error


# -- this project's own audio


def from_corpus(
    name: str,
    corpus: Path | None,
    data: Path | None,
    *,
    speech: int = 600,
    nonspeech: int = 400,
    real: int = 600,
    seed: int = 0,
) -> list[AudioItem]:
    """The clips of `calibration.training_clips.training_clips`, in their conditions.

    Raises FormatError: there is nothing in the corpus of what is asked for.
    """
    from calibration.training_clips import training_clips

    for kind, count in (("speech", speech), ("nonspeech", nonspeech)):
        if count and corpus is not None and not any(corpus.glob(f"{kind}_*.jsonl")):
            raise FormatError(
                f"{corpus}: holds no {kind}; python -m calibration.synthesis --out {corpus} makes a corpus"
            )
    clips = training_clips(corpus, data, speech=speech, nonspeech=nonspeech, real=real, seed=seed)
    return items_of(clips, name)


def from_eval_sets(
    name: str, data: Path | None, *, split: str = "calibration", quick: bool = False
) -> list[AudioItem]:
    """The clips of `calibration.corpus.eval_sets`; never to be trained on."""
    from calibration.corpus import eval_sets

    sets = eval_sets(split, data_dir=data, quick=quick)
    return [item for clips in sets.values() for item in items_of(clips, name)]

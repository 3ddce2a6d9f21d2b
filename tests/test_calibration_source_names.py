"""Clips cut from one recording are known by their names or a manifest, and stay on one side."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from audio_files import write_wav
from test_calibration_user_data import noise, read, write_rows, write_sounds, write_speech

from calibration.source_names import source_by_name, sources_by_manifest


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("1-100032-A-0.wav", "Freesound 100032"),  # ESC-50
        ("5-9032-B-49.ogg", "Freesound 9032"),
        ("101415-3-0-2.wav", "Freesound 101415"),  # UrbanSound8K
        ("100032-0-0-0.wav", "Freesound 100032"),
        ("2024-01-05-12.wav", ""),  # a date
        ("6-100032-A-0.wav", ""),  # five folds
        ("1-100032-A-0 (copy).wav", ""),
        ("fan-3.wav", ""),
    ],
)
def test_names_of_known_data_sets(name: str, source: str) -> None:
    assert source_by_name(Path("some") / name) == source


def test_manifests_say_the_source_in_the_first_column_that_is_filled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "manifest.csv").write_text(
        "file,label,speaker,group,source\na.wav,fan,,g1,site\nb/c.wav,fan,anna,,site\nd.wav,fan,,,site\ne.wav,fan,,,\n"
    )
    found = sources_by_manifest([tmp_path, tmp_path, tmp_path / "none"])
    assert {path.relative_to(tmp_path.resolve()).as_posix(): source for path, source in found.items()} == {
        "a.wav": "g1", "b/c.wav": "anna", "d.wav": "site",
    }  # fmt: skip
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.csv").write_text("name,where\na.wav,here\n")
    assert sources_by_manifest([other]) == {}
    (other / "manifest.csv").write_bytes(b"file,group\n\xff\xfe,1\n")
    assert sources_by_manifest([other]) == {} and "manifest.csv cannot be read" in caplog.text


def sides_of(splits) -> list[dict[str, str]]:
    """Per split: id of each non-speech clip -> its group ("" in training, which keeps none)."""
    training = {clip.id: "" for clip in splits.training if clip.kind == "nonspeech" and "#" not in clip.id}
    rest = [
        {clip.id: clip.group for group in part.values() for clip in group if clip.kind == "nonspeech"}
        for part in (splits.validation, splits.test)
    ]
    return [training, *rest]


def test_takes_of_one_recording_are_on_one_side(tmp_path: Path) -> None:
    esc, urban = tmp_path / "esc", tmp_path / "urban"
    esc.mkdir()
    (urban / "fold1").mkdir(parents=True)
    for number in range(12):  # three takes of each of four recordings
        write_wav(esc / f"1-{500 + number // 3}-{'ABC'[number % 3]}-7.wav", noise(number))
    for number in range(12):  # one recording is in both sets
        write_wav(urban / "fold1" / f"{503 + number // 3}-2-0-{number % 3}.wav", noise(50 + number))
    splits = read([esc, urban], write_speech(tmp_path))
    sides = sides_of(splits)
    assert sum(map(len, sides)) == 24
    where: dict[str, set[int]] = {}
    for number, side in enumerate(sides):
        for name in side:
            stem = Path(name).stem
            recording = stem.split("-")[1 if name.startswith("esc") else 0]
            where.setdefault(recording, set()).add(number)
    assert len(where) == 7 and all(len(found) == 1 for found in where.values())
    counts = [splits.counts[name]["nonspeech_groups"] for name in ("training", "validation", "test")]
    assert sum(counts) == 7


def test_a_manifest_beside_the_recordings_and_copies_join_sources(tmp_path: Path) -> None:
    fans = write_sounds(tmp_path / "fans", 24)
    rows = [{"file": f"{i:02d}.wav", "group": f"fan {i // 4}"} for i in range(24)]
    write_rows(fans / "manifest.csv", rows)
    shutil.copy(fans / "00.wav", fans / "copy.wav")  # the same recording, listed under another source
    write_rows(fans / "manifest.csv", [*rows, {"file": "copy.wav", "group": "fan 5"}])
    splits = read([fans], write_speech(tmp_path))
    assert splits.counts["left_out"] == {"duplicate": 1}
    sides = sides_of(splits)
    of_fan = [{int(Path(name).stem) // 4 for name in side} for side in sides]
    assert sum(map(len, of_fan)) == 6  # each fan on one side
    (together,) = [found for found in of_fan if 0 in found]
    assert 5 in together
    assert sum(splits.counts[name]["nonspeech_groups"] for name in ("training", "validation", "test")) == 5


def test_other_audio_under_the_same_names_has_another_fingerprint(tmp_path: Path) -> None:
    fans, speech = write_sounds(tmp_path / "fans", 20), write_speech(tmp_path)
    first = read([fans], speech)
    assert first.fingerprint == read([fans], speech, seed=4).fingerprint != ""
    write_wav(fans / "07.wav", noise(9))
    assert read([fans], speech).fingerprint != first.fingerprint
    (fans / "08.wav").rename(fans / "x.wav")
    swapped = read([fans], speech).fingerprint
    (fans / "09.wav").rename(fans / "08.wav")
    (fans / "x.wav").rename(fans / "09.wav")
    assert read([fans], speech).fingerprint not in (first.fingerprint, swapped)

"""The papers' tables measured again: published figures, data sets' layouts, fits, scores, report, command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from audio_files import tone, write_encoded, write_wav
from conftest import make_tiny_whisper
from test_sae import random_sae
from whisper.model import ModelDimensions, Whisper

from benchmarks import published, reproduce, reproduce_report, steered_scores
from benchmarks.corpora import LAYOUTS, Corpora, Corpus, read_corpora
from benchmarks.published import ALL, Condition, tables_for
from benchmarks.reproduce import Measured, Reproduction
from benchmarks.reproduce_fit import (
    Edits,
    Fit,
    Source,
    classifier_f1,
    fit_source,
    layers_of,
    load_saes,
    pool_clips,
)
from benchmarks.steered_scores import Score, Setting, first_step, score
from calibration.activations import encode_windows, window_mels
from calibration.corpus import Clip
from calibration.decoding import greedy_decode
from calibration.edit_fit import Contrast, PooledClips
from calibration.evaluate import Rate
from whisper_steer.attach import steer
from whisper_steer.edits import Shift
from whisper_steer.errors import AudioError, FormatError, MismatchError, UsageError
from whisper_steer.fileformat import model_metadata
from whisper_steer.steering import Steering

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file.*whisper:ResourceWarning")


@pytest.fixture
def small() -> Whisper:
    """Random weights; a text context of 12 tokens keeps its endless sentences short."""
    model = make_tiny_whisper(dims=ModelDimensions(80, 1500, 64, 1, 3, 51864, 12, 64, 1, 1))
    model.name = "tiny-random"
    return model


def clip(name: str, kind: str = "nonspeech", text: str | None = None, seconds: float = 1.0) -> Clip:
    frequency = 100.0 + 37 * (sum(name.encode()) % 40)
    return Clip(
        name, kind, name.split("/")[0], "test", text, name, audio=lambda: tone(seconds, frequency=frequency)
    )


def score_of(p: float, logprob: float | None = -0.5, text: str = "") -> Score:
    return Score(((p, logprob),), (text,), 1.0)


# -- published figures ----------------------------------------------------------------------------------


def test_headings_name_the_tables_that_a_group_covers() -> None:
    titles = {table.id: table.title for table in tables_for(12)}
    assert titles["audiosae-2"].startswith("AudioSAE, Table 2: ")
    for group in ("audiosae-classifier", "audiosae-s-vector", "audiosae-sae"):
        assert titles[group].startswith("AudioSAE, tables 6-13, those on ")
    notes = {table.id: table.note for table in tables_for(12)}
    assert "which number" in notes["audiosae-sae"] and "which number" not in notes["audiosae-2"]


def test_esc10_takes_the_place_of_esc50_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def clip(name: str, source: str) -> Clip:
        return Clip(name, "nonspeech", name.split("/")[0], "test", source=source, group=name)

    sets = {
        "sounds": [clip("sounds/rain", "esc10"), clip("sounds/blip", "game")],
        "human": [clip("human/cry", "esc10")],
        "speech": [Clip("speech/0", "speech", "speech", "test", "yes")],
    }
    monkeypatch.setattr("calibration.corpus.eval_sets", lambda split, data=None, quick=False: sets)
    monkeypatch.setattr("calibration.corpus.real_clips", lambda data, split: sets["sounds"])
    found = read_corpora(tmp_path).get("ESC-50")
    assert found is not None and found.fit == () and not found.speech
    assert sorted(one.id for one in found.test) == ["human/cry", "sounds/rain"]
    assert "a subset: 10 of its 50 classes" in found.about
    sets["sounds"], sets["human"] = sets["sounds"][1:], []
    assert read_corpora(tmp_path).get("ESC-50") is None


def test_published_figures_stand_in_their_cells() -> None:
    table_2, _, classifier, _, sae, follow_up = tables_for(12)
    plain = Condition("plain")
    assert table_2.figures[plain, "WHAM!", "nsp_fpr"] == (0.51, 0.51)
    assert table_2.figures[Condition("reconstruction"), "FSD50K", "nsp_fpr"] == (0.24, 0.26)
    assert table_2.figures[Condition("audiosae", "FSD50K", 100, 3.0), "LibriSpeech", "wer"] == (0.984, 0.984)
    ten = Condition("classifier", k=10, where=published.EIGHTH)
    assert classifier.figures[ten, "WHAM!", "f1"] == (0.80, 0.80)
    strongest = Condition("audiosae", "WHAM!", 100, 3.0, published.EIGHTH)
    assert [sae.figures[strongest, name, "nsp_fpr"][0] for name in published.VECTOR_SETS] == [0.0, 0.01, 0.0]
    assert sae.figures[strongest, "LibriSpeech", "wer"] == (0.975, 0.975)
    assert follow_up.model == "small" and follow_up.figures[plain, ALL, "hr"] == (0.7263, 0.7263)
    assert tables_for(32)[-1].model == "large-v3"


@pytest.mark.parametrize("blocks", [4, 12, 32])
def test_every_figure_has_a_cell_and_is_a_rate(blocks: int) -> None:
    for table in tables_for(blocks):
        cells = list(table.cells())
        assert len(set(cells)) == len(cells)
        assert set(table.figures) <= set(cells)
        assert all(0 <= low <= high <= 1 for low, high in table.figures.values())
        assert (
            len({row.key for row in table.rows}) == len({row.label for row in table.rows}) == len(table.rows)
        )


@pytest.mark.parametrize("blocks", [12, 32])
def test_the_follow_ups_pooled_rates_are_the_mean_over_its_clips(blocks: int) -> None:
    """Weighted by the sizes of the three test sets; the plain rate of small is 0.05 points off in print."""
    sizes = {"UrbanSound8K": 8732, "WHAM!": 8000, "FSD50K": 10231}
    table, checked = tables_for(blocks)[-1], 0
    for row in table.rows:
        if (row, ALL, "hr") in table.figures:
            hits = sum(size * table.figures[row, name, "hr"][0] for name, size in sizes.items())
            assert hits / sum(sizes.values()) == pytest.approx(table.figures[row, ALL, "hr"][0], abs=6e-4)
            checked += 1
    assert checked == {12: 2, 32: 4}[blocks]


# -- data sets ------------------------------------------------------------------------------------------


def put(path: Path, samples: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = tone(0.3) if samples is None else samples
    if path.suffix == ".flac":
        write_encoded(path, sound, 16_000, "flac")
    else:
        write_wav(path, sound)


def unpack(data: Path, numbers: int = 8) -> None:
    """Every data set in its layout, with little in it."""
    for number in range(numbers):
        put(data / f"musan/noise/free-sound/noise-free-sound-{number:04d}.wav")
        put(data / f"FSD50K/FSD50K.dev_audio/{1000 + number}.wav")
    put(data / "musan/music/fma/music-fma-0000.wav")
    put(data / "musan/speech/librivox/speech-librivox-0000.wav")
    put(data / "FSD50K/FSD50K.eval_audio/37199.wav")
    for part in ("tr", "cv", "tt"):
        put(data / f"wham_noise/{part}/01dc0215_0.22439_01fc0207_-0.22439sp12.wav")
    put(data / "UrbanSound8K/audio/fold1/101415-3-0-2.wav")
    put(data / "UrbanSound8K/audio/fold10/100648-1-0-0.wav")
    put(data / "ESC-50-master/audio/1-100032-A-0.wav")
    for part, reader in (
        ("dev-clean", "84-121123"),
        ("test-clean", "1089-134686"),
        ("train-clean-100", "19-198"),
    ):
        folder = data / "LibriSpeech" / part / reader.replace("-", "/")
        put(folder / f"{reader}-0000.flac")
        (folder / f"{reader}.trans.txt").write_text(f"{reader}-0000 GO DO YOU HEAR\n")


def test_every_layout_is_read_as_it_unpacks(tmp_path: Path) -> None:
    unpack(tmp_path)
    corpora = read_corpora(tmp_path)
    assert [corpus.name for corpus in corpora.sets] == [layout.name for layout in LAYOUTS]
    assert not corpora.stand_in and corpora.notes == ()
    ids = {c.name: ([clip.id for clip in c.fit], [clip.id for clip in c.test]) for c in corpora.sets}
    assert ids["WHAM!"] == (
        ["WHAM!/tr/01dc0215_0.22439_01fc0207_-0.22439sp12.wav"],
        [f"WHAM!/{part}/01dc0215_0.22439_01fc0207_-0.22439sp12.wav" for part in ("cv", "tt")],
    )
    assert len(ids["FSD50K"][0]) == 8 and ids["FSD50K"][1] == ["FSD50K/FSD50K.eval_audio/37199.wav"]
    assert ids["UrbanSound8K"] == (
        [],
        ["UrbanSound8K/audio/fold1/101415-3-0-2.wav", "UrbanSound8K/audio/fold10/100648-1-0-0.wav"],
    )
    assert ids["ESC-50"] == ([], ["ESC-50/audio/1-100032-A-0.wav"])
    assert ids["LibriSpeech"] == (
        ["LibriSpeech/dev-clean/84/121123/84-121123-0000.flac"],
        ["LibriSpeech/test-clean/1089/134686/1089-134686-0000.flac"],
    )
    groups = {clip.id: clip.group for corpus in corpora.sets for clip in corpus.test}
    assert groups["UrbanSound8K/audio/fold1/101415-3-0-2.wav"] == "101415"
    assert groups["ESC-50/audio/1-100032-A-0.wav"] == "100032"
    (said,) = corpora.get("LibriSpeech").test
    assert said.text == "GO DO YOU HEAR" and said.group == "1089" and said.kind == "real_speech"
    assert len(said.load()) == pytest.approx(4800, abs=16)


def test_musan_is_its_noise_halved_without_overlap(tmp_path: Path) -> None:
    unpack(tmp_path, numbers=40)
    musan = read_corpora(tmp_path).get("MUSAN")
    fit, test = ({clip.id for clip in clips} for clips in (musan.fit, musan.test))
    assert len(fit) + len(test) == 40 and not fit & test
    assert 10 <= len(fit) <= 30
    assert all("noise-free-sound" in name for name in fit | test)
    elsewhere = tmp_path / "elsewhere"
    unpack(elsewhere, numbers=40)
    assert {clip.id for clip in read_corpora(elsewhere).get("MUSAN").fit} == fit  # by name, not by place


def test_parts_may_be_absent_and_fsd50k_may_lie_unpacked(tmp_path: Path) -> None:
    put(tmp_path / "FSD50K.eval_audio/1.wav")
    put(tmp_path / "ESC-50/audio/1-100032-A-0.wav")
    corpora = read_corpora(tmp_path)
    assert [(c.name, len(c.fit), len(c.test)) for c in corpora.sets] == [("FSD50K", 0, 1), ("ESC-50", 0, 1)]
    (note,) = corpora.notes
    assert note == f"not below {tmp_path}: MUSAN, WHAM!, UrbanSound8K, LibriSpeech"


def test_limits_choose_the_same_clips_whatever_else_is_there(tmp_path: Path) -> None:
    unpack(tmp_path, numbers=20)
    few = read_corpora(tmp_path, fit_limit=3, test_limit=1)
    more = read_corpora(tmp_path, fit_limit=6, test_limit=4)
    assert len(few.get("FSD50K").fit) == 3 and len(few.get("WHAM!").test) == 1
    assert set(few.get("FSD50K").fit) < set(more.get("FSD50K").fit)


def test_unknown_data_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data .* holds no known data: expected folders such as ESC-50, "):
        read_corpora(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        read_corpora(tmp_path / "nowhere")
    (tmp_path / "wham_noise" / "tr").mkdir(parents=True)
    with pytest.raises(FormatError, match="no audio file"):
        read_corpora(tmp_path)


def test_folders_are_those_of_the_training_mixture() -> None:
    """Both name the folder into which a data set's archive unpacks."""
    from calibration.mixture_file import bundled

    text = bundled()["audiosae"].read_text()
    shared = 0
    for layout in LAYOUTS:
        if f'name = "{layout.name}"' in text:
            assert f'path = "@data/{layout.roots[0]}"' in text
            shared += 1
    assert shared == 5  # all but UrbanSound8K, which nothing is trained on


def test_evaluation_sets_take_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    def eval_sets(split: str, data: object, quick: bool) -> dict[str, list[Clip]]:
        names = ("speech", "noise", "tones", "music", "sounds", "human")
        return {
            name: [
                clip(f"{name}/{split}{i}", "speech" if name == "speech" else "nonspeech") for i in range(3)
            ]
            for name in names
        }

    monkeypatch.setattr("calibration.corpus.eval_sets", eval_sets)
    corpora = read_corpora(None, test_limit=2)
    assert (
        corpora.stand_in and "evaluation sets take their places (synthetic audio alone)" in corpora.notes[0]
    )
    sizes = {c.name: (len(c.fit), len(c.test)) for c in corpora.sets}
    assert sizes == {
        "MUSAN": (6, 2), "FSD50K": (3, 2), "WHAM!": (3, 2), "UrbanSound8K": (3, 2), "LibriSpeech": (3, 2),
    }  # fmt: skip
    assert all("calibration" in c.id for corpus in corpora.sets for c in corpus.fit)
    assert all("test" in c.id for corpus in corpora.sets for c in corpus.test)
    assert corpora.about["WHAM!"] == "WHAM! = noise of the evaluation sets (3 clips to fit on, 2 measured)"


# -- scores ---------------------------------------------------------------------------------------------


def test_score_events_by_hand() -> None:
    confident = score_of(0.98, -0.3, "Thanks for watching!")
    assert (confident.nsp, confident.hr, confident.text_fp) == (False, True, True)
    skipped = score_of(0.7, -1.2, "you")
    assert (skipped.nsp, skipped.hr, skipped.text_fp) == (False, False, False)
    empty = score_of(0.2, -0.1, " ...")
    assert (empty.nsp, empty.hr, empty.text_fp) == (True, True, False)
    two = Score(((0.9, -2.0), (0.55, -2.0)), ("a", "b"), 40.0)
    assert (two.no_speech_prob, two.nsp, two.hr, two.text_fp, two.text) == (0.55, False, True, True, "a b")
    with pytest.raises(UsageError, match="decode=True"):
        _ = score_of(0.9, None).hr


def test_first_step_is_the_no_speech_prob_of_decoding(small: Whisper) -> None:
    mels = torch.cat([window_mels(clip(f"a/{i}").load(), 80) for i in range(3)])
    expected = [result.no_speech_prob for result in greedy_decode(small, mels)]
    assert first_step(small, small.encoder(mels)) == pytest.approx(expected, rel=1e-5)


def test_scores_are_those_of_a_steered_model(small: Whisper) -> None:
    clips = [clip("noise/0"), clip("noise/1", seconds=31.0)]
    sae = random_sae(3, d=64, n=40, layer=1)
    edits = Edits(3, {1: sae}, {"MUSAN": fit_on_layer(1)}, layer=1)
    condition = Condition("audiosae", "MUSAN", 5, 3.0)
    late = Shift(2, torch.linspace(-1, 1, 64), 4.0)
    ways = {
        "plain": (),
        "path": edits.of(Condition("reconstruction")),
        "sae": edits.of(condition),
        "two": (*edits.of(condition), late),
    }
    settings = {name: Setting(tuple(made), True) for name, made in ways.items()}
    found = score(small, clips, settings, progress=False, batch=2)
    assert list(found) == ["noise/0", "noise/1"] and len(found["noise/1"]["sae"].windows) == 2
    texts = set()
    for name, made in ways.items():
        for item in clips:
            mels = window_mels(item.load(), 80)
            if made:
                with steer(small, steering=Steering(tuple(made), None, model_metadata(small))):
                    expected = greedy_decode(small, mels)
            else:
                expected = greedy_decode(small, mels)
            got = found[item.id][name]
            assert [p for p, _ in got.windows] == pytest.approx(
                [r.no_speech_prob for r in expected], rel=1e-4
            )
            assert got.texts == tuple(r.text for r in expected)
            texts.add(got.windows)
    assert len(texts) == 8  # every way and clip its own
    only_first = {name: Setting(tuple(made), False) for name, made in ways.items()}
    again = score(small, clips, only_first, progress=False)
    for item in clips:
        for name in ways:
            assert again[item.id][name].no_speech_prob == pytest.approx(
                found[item.id][name].no_speech_prob, rel=1e-4
            )
            assert again[item.id][name].windows[0][1] is None


def fit_on_layer(layer: int, d: int = 64, n: int = 40) -> Fit:
    """Twenty clips whose first latent and first dimension tell the two halves apart."""
    rng = np.random.default_rng(0)
    positive = np.arange(20) < 10
    latents = rng.random((20, n)).astype(np.float32)
    latents[:, 0] = np.where(positive, 5.0, 0.0)
    mean = np.zeros((20, d), np.float32)
    mean[positive, 0] = 2.0
    pooled = PooledClips(latents, mean, latents.sum(axis=0), np.full(n, 20.0))
    contrast = Contrast("nsp", positive, np.ones(20, dtype=bool), "by hand")
    return Fit(contrast, {layer: pooled})


def test_finished_clips_are_not_computed_again(
    small: Whisper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = [clip(f"noise/{i}") for i in range(3)]
    settings = {"plain": Setting((), True)}
    first = score(small, clips[:2], settings, store=tmp_path, progress=False, batch=1)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes() + b'{"id": "noise/2", "cr')  # a run that was killed
    seen = []
    real = steered_scores.encode_windows

    def encode(model: Whisper, mels: torch.Tensor, layers: list[int]) -> torch.Tensor:
        seen.append(len(mels))
        return real(model, mels, layers)

    monkeypatch.setattr(steered_scores, "encode_windows", encode)
    second = score(small, clips, settings, store=tmp_path, progress=False)
    assert seen == [1] and {name: second[name] for name in first} == first
    assert len(path.read_text().splitlines()) == 3
    assert score(small, clips, settings, store=tmp_path, progress=False) == second and seen == [1]
    # other settings, other audio: nothing is reused
    shift = Shift(1, torch.ones(64), 2.0)
    score(small, clips[:1], {"plain": Setting((shift,), True)}, store=tmp_path, progress=False)
    score(small, [clip("noise/0", seconds=2.0)], settings, store=tmp_path, progress=False)
    assert seen == [1, 1, 1] and len(list(tmp_path.glob("*.jsonl"))) == 2
    path.write_text("[]\n")
    with pytest.raises(UsageError, match="is damaged .* delete it and run again"):
        score(small, clips, settings, store=tmp_path, progress=False)


def test_unreadable_clips_are_left_out_with_a_warning(
    small: Whisper, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> np.ndarray:
        raise AudioError("b.wav: cannot be read as audio")

    bad = Clip("noise/bad", "nonspeech", "noise", "test", audio=broken)
    settings = {"plain": Setting((), False)}
    found = score(small, [bad, clip("noise/0")], settings, progress=False)
    assert list(found) == ["noise/0"] and "left out: b.wav" in caplog.text
    with pytest.raises(UsageError, match="none of the 1 clips could be read, such as noise/bad"):
        score(small, [bad], settings, progress=False)
    backwards = (Shift(2, torch.ones(64), 1.0), Shift(1, torch.ones(64), 1.0))
    with pytest.raises(
        UsageError, match=r"setting a edits layers \[2, 1\]: expected them in ascending order"
    ):
        score(small, [clip("noise/0")], {"a": Setting(backwards, False)}, progress=False)


# -- fits -----------------------------------------------------------------------------------------------


def test_layers_are_the_papers_at_the_same_depth() -> None:
    assert layers_of(published.LAST, 12) == (11,) and layers_of(published.EIGHTH, 12) == (7,)
    assert layers_of(published.EIGHTH, 4) == (2,) and layers_of(published.EIGHTH, 32) == (20,)
    assert layers_of(published.TWO, 32) == (25, 31) and layers_of(published.TWO, 4) == (2, 3)
    assert layers_of(published.LAST, 12, layer=5) == layers_of(published.EIGHTH, 12, layer=5) == (5,)


def test_sae_steering_is_the_reconstruction_with_the_codes_shifted() -> None:
    """decoder(f + alpha s), s = -sign(beta) of the heaviest latent in units of its decoder row."""
    sae = random_sae(2, d=6, n=20, layer=1)
    fit = fit_on_layer(1, d=6, n=20)  # latent 0 marks the hallucinated clips: beta_0 > 0
    edits = Edits(2, {1: sae}, {"WHAM!": fit}, layer=1)
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    y = x
    for edit in edits.of(Condition("audiosae", "WHAM!", 1, 3.0)):
        y = edit(y, 1.0)
    codes = sae.encode(x)
    codes[..., 0] -= 3.0 / sae.W_dec[0].norm()
    torch.testing.assert_close(y, sae.decode(codes), rtol=1e-4, atol=1e-4)
    (path,) = edits.of(Condition("reconstruction"))
    torch.testing.assert_close(path(x, 1.0), sae.decode(sae.encode(x)), rtol=1e-4, atol=1e-4)
    assert edits.of(Condition("audiosae", "WHAM!", 10, 1.0))[0] is path  # shared, so computed once


def test_vectors_point_away_from_hallucination() -> None:
    edits = Edits(2, {}, {"": fit_on_layer(1, d=6), "MUSAN": fit_on_layer(1, d=6)}, layer=1)
    (unit,) = edits.of(Condition("s-vector", "MUSAN", alpha=3.0))
    assert unit.strength == 3.0 and unit.direction.tolist() == [-1.0, 0, 0, 0, 0, 0]
    (raw,) = edits.of(Condition("activation", alpha=8.0))
    assert raw.strength == 8.0 and raw.direction.tolist() == [-2.0, 0, 0, 0, 0, 0]
    assert edits.of(Condition("plain")) == ()
    with pytest.raises(UsageError, match="there is no SAE of layer 1"):
        edits.of(Condition("audiosae", "MUSAN", 1, 1.0))
    with pytest.raises(UsageError, match="nothing to fit on from FSD50K"):
        edits.of(Condition("s-vector", "FSD50K", alpha=1.0))


def test_follow_ups_latents_work_on_both_layers() -> None:
    saes = {n: random_sae(n, d=6, n=20, layer=n) for n in (2, 3)}
    pooled = fit_on_layer(2, d=6, n=20)
    fit = Fit(pooled.contrast, {n: pooled.pooled[2] for n in (2, 3)})
    made = Edits(4, saes, {"": fit}).of(Condition("latents", k=1, alpha=3.5, where=published.TWO))
    assert [edit.layer for edit in made] == [2, 3] and [edit.strength for edit in made] == [3.5, 3.5]
    # latent 0 fires with 50 / 20 on average
    assert [(edit.indices.tolist(), edit.values.tolist()) for edit in made] == [([0], [-2.5])] * 2


def test_what_counts_as_hallucinated() -> None:
    def source(ps: list[float]) -> Source:
        rows = len(ps)
        pooled = PooledClips(np.ones((rows, 2)), np.ones((rows, 3)), np.ones(2), np.ones(2))
        return Source(tuple(score_of(p, -2.0, "you") for p in ps), {0: pooled})

    split = fit_source(source([0.1] * 8 + [0.9] * 10), None, ("nsp", "hr", "text"))
    assert split.contrast.name == "nsp" and split.contrast.positive.tolist() == [True] * 8 + [False] * 10
    other = fit_source(source([0.55] * 9 + [0.9] * 10), None, ("nsp", "hr", "text"))
    assert other.contrast.name == "hr" and int(other.contrast.positive.sum()) == 9
    alike, speech = source([0.9] * 10), source([0.1] * 30)
    fallen = fit_source(alike, speech, ("nsp", "hr", "text"))
    assert fallen.contrast.name == "speech" and fallen.pooled[0].latents.shape == (20, 2)
    assert fallen.contrast.positive.tolist() == [False] * 10 + [True] * 10
    assert "speech clips against non-speech clips instead" in fallen.contrast.reason
    with pytest.raises(UsageError, match="edits cannot be fitted without speech and non-speech clips"):
        fit_source(alike, None, ("nsp", "hr", "text"))


def test_classifier_f1_out_of_fold() -> None:
    rng = np.random.default_rng(0)
    positive = np.arange(60) < 30
    told = rng.random((60, 12))
    told[:, 7] += 4.0 * positive
    assert classifier_f1(told, positive, 1).value == 1.0
    assert classifier_f1(told, positive, 0).value > 0.95
    # noise with as many features as clips is learnt by heart, but not out of fold
    noise = classifier_f1(rng.random((60, 200)), positive, 20)
    assert 0.2 < noise.lo < noise.value < noise.hi < 0.8
    assert math.isnan(classifier_f1(told[:31], positive[:31], 1).value)


def test_pooling_takes_frames_with_audio_and_is_kept(
    small: Whisper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = [clip("noise/0", seconds=0.1), clip("noise/1", seconds=31.0)]
    sae = random_sae(4, d=64, n=8, layer=1)
    pooled = pool_clips(small, clips, {1: sae}, [1, 2], store=tmp_path, batch=2, progress=False)
    frames = encode_windows(small, window_mels(clips[1].load(), 80), [1, 2])
    joined = torch.cat([frames[:, 0], frames[:, 1, :50]], dim=1)  # 30 s, then 1 s
    np.testing.assert_allclose(pooled[2].mean[1], joined[1].mean(dim=0), rtol=1e-4, atol=1e-5)
    assert pooled[1].latents.shape == (2, 8) and pooled[2].latents.shape == (2, 0)
    codes = torch.cat([sae.encode(encode_windows(small, window_mels(clips[0].load(), 80), [1])[0, 0, :5]),
                       sae.encode(joined[0])])  # fmt: skip
    np.testing.assert_allclose(pooled[1].active_count, (codes > 0).sum(dim=0), atol=1)
    monkeypatch.setattr("benchmarks.reproduce_fit.encode_windows", None)  # asked again, nothing is encoded
    again = pool_clips(small, clips, {1: sae}, [1, 2], store=tmp_path, progress=False)
    np.testing.assert_array_equal(again[1].latents, pooled[1].latents)


def test_saes_are_checked_against_the_model(small: Whisper, tmp_path: Path) -> None:
    random_sae(1, d=64, n=8, layer=1).save(tmp_path / "layer_01.safetensors")
    found, notes = load_saes(small, tmp_path, [1, 2])
    assert list(found) == [1] and notes == [
        f"no SAE for layer 2: {tmp_path / 'layer_02.safetensors'} does not exist"
    ]
    nothing, notes = load_saes(small, None, [2])
    assert nothing == {} and "no SAE for layer 2 of tiny-random" in notes[0] and "pass --saes DIR" in notes[0]
    random_sae(1, d=6, n=8, layer=2).save(tmp_path / "layer_02.safetensors")
    with pytest.raises(
        MismatchError, match=r"layer 2 is for an unknown model \(d_model 6\), the model is tiny"
    ):
        load_saes(small, tmp_path, [2])
    with pytest.raises(UsageError, match="holds no SAE of layers 0: expected files such as layer_07"):
        load_saes(small, tmp_path, [0])


# -- report ---------------------------------------------------------------------------------------------


def by_hand() -> tuple[published.Table, Reproduction, reproduce_report.About]:
    table = tables_for(12)[0]
    plain = table.rows[0]
    cells = {
        (plain, "MUSAN", "nsp_fpr"): Measured(Rate(0.3, 0.2, 0.41), 50),
        (plain, "LibriSpeech", "wer"): Measured(Rate(0.05, 0.04, 0.06), 20),
        (table.rows[1], "MUSAN", "nsp_fpr"): Measured(Rate(math.nan, math.nan, math.nan), 0),
    }
    probabilities = {"MUSAN": {plain: (0.1, 0.9)}}
    result = Reproduction(cells, probabilities, {"MUSAN": "by nsp"}, ())
    about = reproduce_report.About("tiny (d_model 64)", "tiny", {"MUSAN": "MUSAN <b>"}, True, ("a note",))
    return table, result, about


def test_cells_show_both_figures() -> None:
    table, result, about = by_hand()
    plain, in_path = table.rows[:2]
    assert reproduce_report.published_text(table, (in_path, "FSD50K", "nsp_fpr")) == "24.0-26.0"
    assert reproduce_report.published_text(table, (plain, "ESC-50", "nsp_fpr")) == "-"
    assert (
        reproduce_report.measured_text(result.cells[plain, "MUSAN", "nsp_fpr"], "nsp_fpr")
        == "30.0 [20.0, 41.0]"
    )
    assert reproduce_report.measured_text(Measured(Rate(0.5, 0.25, 1), 4), "f1") == "0.50 [0.25, 1.00]"
    assert reproduce_report.measured_text(result.cells[in_path, "MUSAN", "nsp_fpr"], "nsp_fpr") == "-"
    assert reproduce_report.measured_text(None, "wer") == "-"
    assert reproduce_report.header(("MUSAN", "hr"), about) == "MUSAN* HR %"
    (shown,) = reproduce_report.console_tables(table, result, about)
    columns = [list(column.cells) for column in shown.columns]
    assert columns[0][0] == "plain" and columns[1][0] == "33.0 | 30.0 [20.0, 41.0]"
    assert [column.header for column in shown.columns][1:] == [
        "MUSAN* FPR %", "FSD50K* FPR %", "WHAM!* FPR %", "LibriSpeech* WER %",
    ]  # fmt: skip
    lines = about.lines([table])
    assert lines[0] == "published: small (arXiv 2602.05027v2), on the papers' data sets"
    assert lines[1] == "measured: tiny (d_model 64) on MUSAN <b>" and "not comparable" in lines[2]


def test_rows_name_model_and_data_of_both_figures() -> None:
    table, result, about = by_hand()
    rows = reproduce_report.json_rows([table], result, about)
    assert len(rows) == len(list(table.cells())) and all(
        tuple(row) == reproduce_report.ROW_KEYS for row in rows
    )
    first = rows[0]
    assert (first["published"], first["published_to"], first["published_model"]) == (0.33, None, "small")
    assert (first["measured"], first["measured_lo"], first["measured_hi"], first["clips"]) == (
        0.3,
        0.2,
        0.41,
        50,
    )
    assert (first["model"], first["data"], first["stand_in"]) == ("tiny", "MUSAN <b>", True)
    ranged = [row for row in rows if row["published_to"] is not None]
    assert [(row["published"], row["published_to"]) for row in ranged] == [(0.24, 0.26)]
    json.dumps(rows, allow_nan=False)  # nan became null


def test_page_and_pictures_are_written(tmp_path: Path) -> None:
    table, result, about = by_hand()
    written = reproduce_report.write_pictures_and_page(tmp_path, [table], result, about)
    assert [path.name for path in written] == ["nsp_distributions.png", "reproduce.html"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    html = written[1].read_text()
    assert (
        "30.0 [20.0, 41.0]" in html
        and "24.0-26.0" in html
        and "MUSAN &lt;b&gt;" in html
        and "<b>" not in html
    )
    assert f"2 of {len(table.figures)} published figures" in html


def test_steering_picture_needs_all_rates() -> None:
    table = tables_for(12)[4]
    row = table.rows[0]
    empty = Reproduction({}, {}, {}, ())
    assert reproduce_report._point(table, empty, row, True) is None
    assert reproduce_report._point(table, empty, table.rows[-1], False) == pytest.approx((1 / 3, 97.5))
    cells = {(row, name, "nsp_fpr"): Measured(Rate(0.3, 0.2, 0.4), 9) for name in published.VECTOR_SETS}
    cells[row, "LibriSpeech", "wer"] = Measured(Rate(0.12, 0.1, 0.2), 9)
    assert reproduce_report._point(table, Reproduction(cells, {}, {}, ()), row, True) == pytest.approx(
        (30, 12)
    )
    assert reproduce_report.steering_picture(table, empty, "nothing measured").startswith(b"\x89PNG")


# -- measuring and the command --------------------------------------------------------------------------


def test_cells_come_from_their_own_clips(small: Whisper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand-made scores in place of the model's: every table's rates follow."""
    probabilities = {"UrbanSound8K": [0.1, 0.9], "WHAM!": [0.55, 0.9], "FSD50K": [0.2, 0.3]}

    def scored(model: object, clips: list[Clip], settings: dict[str, Setting], **_: object) -> dict:
        result = {}
        for item in clips:
            name, number = item.id.split("/")
            p = probabilities.get(name, [0.0, 0.0])[int(number)]
            text = "open the door" if name == "LibriSpeech" else "you"
            result[item.id] = {
                key: score_of(p, -2.0 if setting.decode else None, text) for key, setting in settings.items()
            }
        return result

    monkeypatch.setattr(steered_scores, "score", scored)
    sets = [
        Corpus(name, False, (), tuple(clip(f"{name}/{i}") for i in range(2)), name) for name in probabilities
    ]
    speech = tuple(clip(f"LibriSpeech/{i}", "real_speech", text) for i, text in
                   enumerate(("open the red door", "open the door")))  # fmt: skip
    corpora = Corpora((*sets, Corpus("LibriSpeech", True, (), speech, "LibriSpeech")), False, ())
    result = reproduce.measure(small, corpora, tables_for(3), {}, progress=False)
    plain = Condition("plain")
    value = {cell[1:]: measured for cell, measured in result.cells.items() if cell[0] == plain}
    assert value["UrbanSound8K", "nsp_fpr"].rate.value == 0.5 and value["WHAM!", "nsp_fpr"].rate.value == 0.0
    assert value["WHAM!", "hr"].rate.value == value["WHAM!", "text_fpr"].rate.value == 0.5
    assert value[ALL, "hr"].rate.value == pytest.approx(4 / 6) and value[ALL, "hr"].clips == 6
    assert (
        value["LibriSpeech", "wer"].rate.value == pytest.approx(1 / 7)
        and value["LibriSpeech", "wer"].clips == 2
    )
    assert value["LibriSpeech", "tpr"].rate.value == 1.0
    assert ("MUSAN", "nsp_fpr") not in value and ("ESC-50", "nsp_fpr") not in value
    assert {cell[0].method for cell in result.cells} == {"plain"}  # nothing to fit on, no SAE
    assert any("there is no SAE of layer 2" in note for note in result.notes)
    assert result.probabilities["WHAM!"] == {plain: (0.55, 0.9)}


def test_the_command_from_unpacked_data_to_report(
    small: Whisper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, saes, out = tmp_path / "data", tmp_path / "saes", tmp_path / "out"
    unpack(data, numbers=4)
    for layer in (1, 2):
        random_sae(layer, d=64, n=24, layer=layer).save(saes / f"layer_{layer:02d}.safetensors")
    monkeypatch.setattr("whisper_steer.zoo.load_model", lambda *a, **k: small)
    arguments = [
        "--data",
        str(data),
        "--saes",
        str(saes),
        "--limit",
        "1",
        "--fit-limit",
        "2",
        "--out",
        str(out),
    ]
    assert reproduce.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    shown = capsys.readouterr().out
    assert "AudioSAE, Table 2" in shown and "33.0 | " in shown and "stands in" not in shown
    assert "measured: tiny-random (d_model 64, 3 blocks) on MUSAN (" in shown
    rows = json.loads((tmp_path / "rows.json").read_text())
    missing = {(row["table"], row["set"]) for row in rows if row["measured"] is None}
    assert missing <= {("audiosae-classifier", name) for name in published.VECTOR_SETS}
    steered = [
        r for r in rows if r["table"] == "audiosae-sae" and r["vector"] == "WHAM!" and r["set"] == "MUSAN"
    ]
    assert len({(r["k"], r["alpha"]) for r in steered}) == 12
    assert all(r["clips"] == 1 and r["stand_in"] is False for r in steered)
    assert {path.name for path in out.iterdir()} == {
        "about.json", "cache", "nsp_distributions.png", "reproduce.html", "steering.png",
    }  # fmt: skip
    about = json.loads((out / "about.json").read_text())
    assert set(about["contrasts"]) == {"MUSAN", "FSD50K", "WHAM!", "follow-up"}


def test_wrong_arguments_are_one_line(
    small: Whisper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("whisper_steer.zoo.load_model", lambda *a, **k: small)
    assert reproduce.main(["--data", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --data {tmp_path} holds no known data")
    put(tmp_path / "ESC-50/audio/1-100032-A-0.wav")
    assert reproduce.main(["--data", str(tmp_path), "--layer", "3", "--out", str(tmp_path / "out")]) == 2
    assert "layer 3 does not exist: the encoder has layers 0 to 2" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        reproduce.main(["--limit", "0"])
    assert stopped.value.code == 2


@pytest.mark.slow
def test_the_bundled_model_on_the_evaluation_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command as it is documented, with two clips per set."""
    arguments = [
        "--limit",
        "2",
        "--fit-limit",
        "8",
        "--out",
        str(tmp_path),
        "--json",
        str(tmp_path / "rows.json"),
    ]
    assert reproduce.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "not comparable: * stands in for the data set of that name" in shown and "MUSAN* FPR %" in shown
    rows = json.loads((tmp_path / "rows.json").read_text())
    plain = {
        (r["set"], r["measure"]): r for r in rows if r["table"] == "audiosae-2" and r["method"] == "plain"
    }
    assert plain["LibriSpeech", "wer"]["measured"] < 0.2 and plain["LibriSpeech", "tpr"]["measured"] == 1.0
    assert (
        plain["LibriSpeech", "wer"]["published"] == 0.051 and plain["LibriSpeech", "wer"]["stand_in"] is True
    )
    assert all(r["measured"] is not None for r in rows if r["set"] != "ESC-50")

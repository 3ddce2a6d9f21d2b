import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from audio_files import tone, write_wav
from calibration_tools import RATE, FakeClip
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.mixture import DOMAINS, AudioItem, Augmentation, Dataset, Mixture, is_held_out, load_mixture
from calibration.plan import WindowPlan
from calibration.recipe import TrainConfig
from calibration.training_clips import TrainingClip
from whisper_steer.errors import AudioError, FormatError, UsageError


def silent(name, domain="speech", dataset="d", **more):
    return AudioItem(name, dataset, domain, audio=lambda: np.zeros(RATE, np.float32), **more)


def several(name, count, domain="speech", weight=1.0, **more):
    return Dataset(name, weight, [silent(f"{name}{i}", domain, name, **more) for i in range(count)])


# -- drawing


def test_chances_by_hand():
    mixture = Mixture(
        [several("a", 10, weight=1.0), several("b", 5, "music", 6.0), several("c", 20, weight=0.5)]
    )
    assert mixture.chances() == {"a": 0.2, "b": 0.6, "c": 0.2}
    assert Mixture([several("a", 10), Dataset("b", 1.0, several("b", 5).items, 2.0)]).chances() == {
        "a": 0.5,
        "b": 0.5,
    }


def test_draws_follow_the_chances_and_are_uniform_inside():
    mixture = Mixture([several("a", 2), several("b", 2, "music", 3.0)])
    rng = np.random.default_rng(0)
    drawn = [mixture.draw(rng).id for _ in range(4000)]
    for name, chance in (("a0", 0.125), ("a1", 0.125), ("b0", 0.375), ("b1", 0.375)):
        assert drawn.count(name) / 4000 == pytest.approx(chance, abs=0.03)
    rng = np.random.default_rng(0)
    assert [mixture.draw(rng).id for _ in range(100)] == drawn[:100]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 100)), min_size=1, max_size=6))
def test_chances_add_up_and_everything_can_be_drawn(parts):
    mixture = Mixture([several(f"d{i}", count, weight=weight) for i, (count, weight) in enumerate(parts)])
    chances = mixture.chances()
    assert sum(chances.values()) == pytest.approx(1.0)
    total = sum(count * weight for count, weight in parts)
    for i, (count, weight) in enumerate(parts):
        assert chances[f"d{i}"] == pytest.approx(count * weight / total)
    rng = np.random.default_rng(1)
    for _ in range(20):
        dataset, item = mixture.pick(rng)
        assert 0 <= item < len(mixture.datasets[dataset].items)


def test_mixture_of_clips():
    clips = [
        FakeClip("s", "speech", 1.0, "hello"),
        FakeClip("r", "real_speech", 1.0),
        FakeClip("n", "nonspeech", 1.0),
        TrainingClip("m#noisy", "nonspeech", "music", lambda: (np.ones(5, np.float32), ())),
    ]
    items = Mixture.of(clips).datasets[0].items
    assert [item.domain for item in items] == ["speech", "speech", "sounds", "music"]
    assert [item.text for item in items] == ["hello", None, None, None]
    assert items[3].group == "m" and items[3].labels == {"kind": "nonspeech", "category": "music"}
    assert items[3].load().tolist() == [1.0] * 5
    assert Mixture.of(clips).chances() == {"clips": 1.0} and Mixture.of(clips).held_out() == {}
    with pytest.raises(UsageError, match="mixture clips: no training clips"):
        Mixture.of([])


def test_items_load_files_and_check_samples(tmp_path):
    path = write_wav(tmp_path / "a.wav", np.stack([tone(0.5, 8000), np.zeros(4000)], axis=1), 8000)
    audio = AudioItem("a", "d", "speech", path=str(path)).load()
    assert audio.dtype == np.float32 and len(audio) == pytest.approx(8000, abs=40)
    assert np.abs(audio).max() == pytest.approx(0.25, abs=0.01)
    with pytest.raises(AudioError, match="NaN"):
        AudioItem("a", "d", "speech", audio=lambda: np.array([0.0, np.nan])).load()
    with pytest.raises(AudioError, match="d/a: has neither a path nor samples"):
        AudioItem("a", "d", "speech").load()


# -- held out


def test_held_out_groups_are_never_drawn_and_stay_the_same():
    items = [silent(f"{g}/{i}", group=f"speaker{g}") for g in range(200) for i in range(3)]
    mixture = Mixture([Dataset("d", 1.0, items)], held_out_share=0.1)
    held = {item.group for item in mixture.held_out()["speech"]}
    kept = {item.group for item in mixture.datasets[0].items}
    assert not held & kept and len(held) + len(kept) == 200 and 8 <= len(held) <= 35
    assert held == {f"speaker{g}" for g in range(200) if is_held_out(f"speaker{g}", 0.1)}
    larger = Mixture([Dataset("d", 1.0, items + [silent("new", group="new")])], held_out_share=0.2)
    assert held <= {item.group for item in larger.held_out()["speech"]}


def test_held_out_by_domain_with_whole_sets_and_notes():
    mixture = Mixture(
        [several("a", 5), several("b", 5, "music")], held_out_sets=[several("eval", 3, "speech")],
        test_sets=[several("test", 4, "sounds")], notes=["given"],
    )  # fmt: skip
    assert {domain: len(items) for domain, items in mixture.held_out().items()} == {"speech": 3}
    assert set(mixture.chances()) == {"a", "b"}
    assert mixture.notes[0] == "given" and mixture.notes[1].startswith("no held-out music")


def test_a_data_set_that_is_held_out_as_a_whole_is_noted():
    name = next(f"g{i}" for i in range(10_000) if is_held_out(f"g{i}", 0.02))
    mixture = Mixture([several("a", 1, group=name), several("b", 1, group="kept")], held_out_share=0.02)
    assert set(mixture.chances()) == {"b"} and "a: nothing is left to train on" in mixture.notes


@pytest.mark.parametrize(
    ("datasets", "options", "message"),
    [
        ([several("a", 1, weight=0.0)], {}, "weight of a is 0.0, expected a positive number"),
        ([several("a", 1, weight=float("inf"))], {}, "weight of a is inf"),
        ([several("a", 1), several("a", 1)], {}, "the name a is used twice"),
        ([several("a", 1, "birds")], {}, "domain 'birds', expected one of speech, music, sounds"),
        ([several("a", 1)], {"held_out_share": 1.0}, "held-out share is 1.0"),
        ([several("a", 1)], {"augmentation": Augmentation()}, 'no audio of the domain "sounds" to add'),
        (
            [several("a", 1, "sounds")],
            {"augmentation": Augmentation(0.1, 0.0, noise_from=("b",))},
            "noise_from names b, the data sets to train on are a",
        ),
    ],
)
def test_mixtures_that_make_no_sense(datasets, options, message):
    with pytest.raises(UsageError, match=message):
        Mixture(datasets, **options)


def test_additions_come_from_their_domain_or_from_named_sets():
    sets = [several("a", 3), several("n", 2, "sounds", 5.0), several("m", 2, "music")]
    rng = np.random.default_rng(0)
    mixture = Mixture(sets, augmentation=Augmentation())
    assert {mixture.item(mixture.pick_addition("sounds", rng)).dataset for _ in range(20)} == {"n"}
    assert {mixture.item(mixture.pick_addition("music", rng)).dataset for _ in range(20)} == {"m"}
    named = Mixture(sets, augmentation=Augmentation(noise_from=("a", "m")))
    assert {named.item(named.pick_addition("sounds", rng)).dataset for _ in range(40)} == {"a", "m"}


def test_settings_change_with_what_is_drawn_and_with_nothing_else():
    base = Mixture([several("a", 3)]).settings()
    assert json.loads(json.dumps(base)) == base
    assert base["datasets"][0]["items"] == 3 and base["augmentation"] is None
    moved = [AudioItem(f"a{i}", "a", "speech", path=f"/elsewhere/a{i}.wav") for i in range(3)]
    assert Mixture([Dataset("a", 1.0, moved)]).settings() == base
    for other in (
        Mixture([several("a", 4)]),
        Mixture([several("a", 3, weight=2.0)]),
        Mixture([Dataset("a", 1.0, [silent(f"b{i}") for i in range(3)])]),
        Mixture([several("a", 3, "sounds")], augmentation=Augmentation(0.1, 0.0)),
    ):
        assert other.settings() != base


def test_description():
    sets = [several("a", 6, duration=600.0), several("bb", 2, "music", 3.0)]
    mixture = Mixture(
        sets, held_out_sets=[several("eval", 2, "music")], augmentation=Augmentation(0.0, 0.025)
    )
    lines, record = mixture.describe()
    assert json.loads(json.dumps(record)) == record
    assert record["datasets"][0] == {
        "name": "a", "weight": 1.0, "pieces": 1.0, "items": 6, "hours": 1.0, "chance": 0.5,
        "domains": {"speech": 6}, "held_out": 0,
    }  # fmt: skip
    assert record["domain_chances"] == {"speech": 0.5, "music": 0.5, "sounds": 0.0}
    assert lines[1].split() == ["a", "1", "6", "1.0", "50.0%", "0", "speech"]
    assert lines[2].split() == ["bb", "3", "2", "?", "50.0%", "0", "music"]
    assert lines[3:6] == [
        "drawn: speech 50.0%, music 50.0%, sounds 0.0%",
        "held out: 2 music",
        "augmentation: noise 0.0%, music 2.5%, SNR 0 to 20 dB",
    ]
    assert lines[6].startswith("note: no held-out speech")


def test_items_of_files_can_be_sent_to_another_process(tmp_path):
    write_wav(tmp_path / "a.wav", tone(0.2))
    mixture = load_mixture(toml(tmp_path, folder()), {})
    item = pickle.loads(pickle.dumps(mixture.datasets[0].items[0]))
    assert len(item.load()) == 3200


# -- files


def toml(folder_path: Path, *parts: str, name="m.toml"):
    path = folder_path / name
    path.write_text('name = "m"\n' + "\n".join(parts) + "\n")
    return path


def folder(path=".", name="d", domain="speech", more=""):
    return f'[[dataset]]\nname = "{name}"\nformat = "folder"\npath = "{path}"\ndomain = "{domain}"\n{more}\n'


def test_folder_with_patterns_texts_and_domains(tmp_path):
    root = tmp_path / "data"
    for relative in (
        "11/c/11-c-0.wav",
        "12/c/12-c-0.wav",
        "music/x.wav",
        "12/test/skip.wav",
        ".hidden/y.wav",
    ):
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        write_wav(root / relative, tone(0.1))
    (root / "11/c/11-c.trans.txt").write_text("11-c-0 HELLO WORLD\n")
    (root / "12/c/12-c-0.txt").write_text("good\nbye \n")
    (root / "notes.csv").write_text("not audio")
    mixture = load_mixture(
        toml(tmp_path, "held_out = 0", folder("@data", more="""
exclude = ["*/test/*"]
pattern = '(?P<group>\\d+)-(?P<chapter>\\w)-'
domains = {"music/*" = "music"}""")),
        {"data": root, "corpus": None},
    )  # fmt: skip
    items = {item.id: item for item in mixture.datasets[0].items}
    assert list(items) == ["11/c/11-c-0.wav", "12/c/12-c-0.wav", "music/x.wav"]
    first, second, third = items.values()
    assert (first.text, first.group, first.labels, first.domain) == (
        "HELLO WORLD",
        "11",
        {"chapter": "c"},
        "speech",
    )
    assert (second.text, second.group, second.path) == ("good bye", "12", str(root / "12/c/12-c-0.wav"))
    assert (third.text, third.group, third.labels, third.domain) == (None, "music/x.wav", {}, "music")
    assert len(first.load()) == 1600


def test_limit_is_stable(tmp_path):
    for i in range(20):
        write_wav(tmp_path / f"{i:02}.wav", tone(0.05))
    file = toml(tmp_path, "held_out = 0", folder(more="limit = 5"))
    chosen = [item.id for item in load_mixture(file, {}).datasets[0].items]
    assert len(chosen) == 5 and chosen == sorted(chosen)
    write_wav(tmp_path / "99.wav", tone(0.05))
    assert len(set(chosen) & {item.id for item in load_mixture(file, {}).datasets[0].items}) >= 4


def test_yaml_and_toml_say_the_same(tmp_path):
    write_wav(tmp_path / "a.wav", tone(0.1))
    (tmp_path / "b").mkdir()
    write_wav(tmp_path / "b" / "b.wav", tone(0.1))
    yaml = tmp_path / "m.yaml"
    yaml.write_text("""
name: m
held_out: 0
training: {k: 50, lr: 2.0e-4}
augmentation: {music_probability: 0, snr_db: [5, 10], noise_from: [n]}
dataset:
  - {name: d, format: folder, path: ., domain: speech, weight: 2, exclude: ["b/*"]}
  - {name: n, format: folder, path: b, domain: sounds}
""")
    same = load_mixture(
        toml(
            tmp_path,
            "held_out = 0",
            "[training]\nk = 50\nlr = 2e-4",
            '[augmentation]\nmusic_probability = 0\nsnr_db = [5, 10]\nnoise_from = ["n"]',
            folder(more='weight = 2\nexclude = ["b/*"]'),
            folder("b", "n", "sounds"),
        ),
        {},
    )
    other = load_mixture(yaml, {})
    assert same.settings() == other.settings() and same.training == other.training == {"k": 50, "lr": 2e-4}
    assert same.augmentation == Augmentation(0.05, 0, (5, 10), ("n",)) == other.augmentation
    assert same.chances() == {"d": pytest.approx(2 / 3), "n": pytest.approx(1 / 3)}


def test_use_decides_what_is_drawn(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        write_wav(tmp_path / name / "x.wav", tone(0.1))
    mixture = load_mixture(
        toml(tmp_path, "held_out = 0", folder("a", "a"), folder("b", "b", more='use = "held_out"'),
             folder("c", "c", more='use = "test"')), {},
    )  # fmt: skip
    assert set(mixture.chances()) == {"a"}
    assert [item.dataset for item in mixture.held_out()["speech"]] == ["b"]
    assert [dataset.name for dataset in mixture.test_sets] == ["c"]


def test_absent_data_is_left_out_with_a_note_only_where_that_is_allowed(tmp_path):
    write_wav(tmp_path / "a.wav", tone(0.1))
    mixture = load_mixture(
        toml(tmp_path, "held_out = 0", folder(), folder("@data/x", "x", more="optional = true"),
             folder("@other", "y", more="optional = true")), {"data": tmp_path},
    )  # fmt: skip
    assert set(mixture.chances()) == {"d"}
    assert mixture.notes == (
        f"x is left out: {tmp_path}/x does not exist",
        "y is left out: @other: no folder is given for @other (given: @data)",
    )
    with pytest.raises(
        UsageError, match=r"x: .*/x does not exist.*; y: @other: no folder is given"
    ) as caught:
        load_mixture(
            toml(tmp_path, folder(), folder("@data/x", "x"), folder("@other", "y")), {"data": tmp_path}
        )
    assert "\n" not in str(caught.value)


def test_every_mistake_in_one_line(tmp_path):
    file = toml(
        tmp_path,
        "held_out = 2\nspeed = 1",
        '[augmentation]\nnoise_probability = 1.5\nloudness = 3\nsnr_db = "low"',
        '[[dataset]]\nname = "a"\nformat = "folder"\npath = "."\ndomain = "birds"\nweight = -1\nglob = "*"',
        '[[dataset]]\nname = "b"\nformat = "tape"',
        '[[dataset]]\nformat = "manifest"',
        '[[dataset]]\nname = "c"\nformat = "folder"\npath = "."\ndomain = "music"\n'
        'limit = 0\npattern = "(?P<"',
        '[[dataset]]\nname = "e"\nformat = "eval_sets"\nweight = 1\nsplit = "train"',
        '[[dataset]]\nname = "f"\nformat = "folder"\npath = "."\ndomain = "music"\nuse = "test"\nweight = 2',
    )
    with pytest.raises(UsageError) as caught:
        load_mixture(file, {})
    text = str(caught.value)
    for part in (
        f"{file}: held_out is 2, expected a number from 0 to below 1",
        "unknown key speed (known: name, held_out,",
        "augmentation: noise_probability is 1.5, expected a number from 0 to 1",
        "augmentation: unknown key loudness",
        "augmentation: snr_db is 'low', expected two numbers",
        "dataset a: domain is 'birds', expected one of speech, music, sounds",
        "dataset a: weight is -1, expected a number above 0",
        "dataset a: unknown key glob (known: name, format, weight,",
        "dataset b: format is 'tape', expected one of folder, manifest,",
        "dataset 3: name is missing; dataset 3: path is missing",
        "dataset c: pattern is '(?P<', expected a regular expression",
        "dataset c: limit is 0, expected a whole number from 1 on",
        "dataset e: unknown key weight",
        "dataset e: split is 'train', expected calibration or test",
        "dataset f: weight has no effect",
    ):
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("m.toml", "name = ", FormatError, "not valid TOML"),
        ("m.yaml", "a: [1", FormatError, "not valid YAML"),
        ("m.yaml", "- 1", FormatError, "expected keys and values, found list"),
        ("m.json", "{}", FormatError, "a mixture file is .toml, .yaml or .yml"),
        ("m.toml", "", UsageError, "name is missing; no .*dataset"),
        ("m.toml", 'name = "x"\ndataset = 3', UsageError, "dataset is 3, expected a list of tables"),
    ],
)
def test_files_that_are_no_mixture(tmp_path, name, text, error, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message) as caught:
        load_mixture(tmp_path / name, {})
    assert "\n" not in str(caught.value)


def test_missing_file_names_the_bundled_mixtures(tmp_path):
    with pytest.raises(FormatError, match="no such mixture file; bundled mixtures: audiosae, mini.en"):
        load_mixture(tmp_path / "none.toml", {})


def test_folder_problems_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    write_wav(tmp_path / "a.wav", tone(0.1))
    with pytest.raises(UsageError, match="d: .*no audio file that fits a known suffix"):
        load_mixture(toml(tmp_path, folder("empty")), {})
    with pytest.raises(UsageError, match=r"d: .*no audio file that fits \*.flac"):
        load_mixture(toml(tmp_path, folder(more='include = ["*.flac"]')), {})
    with pytest.raises(UsageError, match="pattern 'b' fits no path, such as a.wav"):
        load_mixture(toml(tmp_path, folder(more='pattern = "b"')), {})


# -- bundled mixtures

AUDIOSAE = {  # name: weight, files in the layout of the authors, domains
    "LibriSpeech": (1.0, ["LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac"], {"speech"}),
    "LibriHeavy": (0.1, ["libriheavy/download/librilight/small/100/book/01.flac"], {"speech"}),
    "ESD": (6, [
        "Emotional Speech Dataset (ESD)/Emotion Speech Dataset/0011/Angry/0011_000351.wav",
        "Emotional Speech Dataset (ESD)/Emotion Speech Dataset/0012/Sad/train/0012_001051.wav",
    ], {"speech"}),
    "Expresso": (5, ["expresso/audio_48khz/read/ex01/confused/base/ex01_confused_00001.wav"], {"speech"}),
    "CREMA-D": (4, ["CREMA-D/AudioWAV/1001_DFA_ANG_XX.wav"], {"speech"}),
    "MELD": (3, ["MELD.Raw/train_splits/dia0_utt0.mp4"], {"speech"}),
    "MTG-Jamendo": (2, ["mtg-jamendo/14/214.mp3", "mtg-jamendo/15/215.low.mp3"], {"music"}),
    "MUSAN": (5, [
        "musan/music/fma/music-fma-0000.wav", "musan/noise/free-sound/noise-free-sound-0000.wav",
        "musan/speech/librivox/speech-librivox-0000.wav",
    ], {"music", "sounds", "speech"}),
    "WHAM!": (2, ["wham_noise/tr/011a010d_1.4_20ga010m_-1.4.wav"], {"sounds"}),
    "FSD50K": (5, ["FSD50K/FSD50K.dev_audio/10000.wav"], {"sounds"}),
    "Nonspeech7k": (5, ["Nonspeech7k/train/1_1.wav"], {"sounds"}),
    "DEMAND": (3, ["DEMAND/DKITCHEN/ch01.wav", "DEMAND/DKITCHEN/ch16.wav"], {"sounds"}),
    "VGGSound": (1, ["VGGSound/video/---g-f_I2yQ_000001.mp4"], {"sounds"}),
    "VocalSound": (3, ["vs_release_16k/audio_16k/f0003_0_cough.wav"], {"sounds"}),
}  # fmt: skip
LEFT_OUT = [
    "LibriSpeech/test-clean/1089/134686/1089-134686-0000.flac", "wham_noise/tt/x.wav",
    "FSD50K/FSD50K.eval_audio/1.wav", "Nonspeech7k/test/1.wav", "MELD.Raw/dev_splits_complete/dia0_utt0.mp4",
]  # fmt: skip
TESTS = {
    "IEMOCAP": "IEMOCAP_full_release/Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav",
    "ESC-50": "ESC-50-master/audio/1-100032-A-0.wav",
}
GROUPS = {
    "LibriSpeech": "103", "LibriHeavy": "100", "ESD": "0011", "Expresso": "ex01", "CREMA-D": "1001",
    "MELD": "dia0", "DEMAND": "DKITCHEN", "VGGSound": "---g-f_I2yQ", "VocalSound": "f0003",
}  # fmt: skip


@pytest.fixture(scope="module")
def paper_tree(tmp_path_factory):
    """A few short files in every layout; the content is PCM whatever the suffix says."""
    root = tmp_path_factory.mktemp("data")
    names = [name for _, files, _ in AUDIOSAE.values() for name in files] + LEFT_OUT + list(TESTS.values())
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_wav(root / name, tone(0.4, frequency=200.0 + 20 * number))
    cut = {
        "id": "small/100/book/01_0", "start": 0.1, "duration": 0.2, "channel": 0,
        "supervisions": [{"speaker": "100", "custom": {"texts": ["The little girl.", "THE LITTLE GIRL"]}}],
        "recording": {"id": "small/100/book/01", "sources": [
            {"type": "file", "channels": [0], "source": "download/librilight/small/100/book/01.flac"}]},
    }  # fmt: skip
    import gzip

    with gzip.open(root / "libriheavy/libriheavy_cuts_large.jsonl.gz", "wt") as file:
        file.write(json.dumps(cut) + "\n")
    return root


def test_the_papers_mixture_draws_from_the_real_layouts(paper_tree):
    mixture = load_mixture("audiosae", {"data": paper_tree})
    assert not [note for note in mixture.notes if "left" in note]
    found = {dataset.name: dataset for dataset in mixture.datasets}
    assert {name: dataset.weight for name, dataset in found.items()} == {
        name: weight for name, (weight, _, _) in AUDIOSAE.items()
    }
    assert len(found) == 14
    for name, (_, files, domains) in AUDIOSAE.items():
        held_out = [i for items in mixture.held_out().values() for i in items if i.dataset == name]
        items = [*found[name].items, *held_out]
        assert sorted(str(item.path) for item in items) == sorted(str(paper_tree / file) for file in files)
        assert {item.domain for item in items} == domains
        if name in GROUPS:
            assert min(items, key=lambda item: item.id).group == GROUPS[name]
    assert found["LibriHeavy"].items[0].text == "The little girl."
    assert len(found["LibriHeavy"].items[0].load()) == 3200
    assert mixture.augmentation == Augmentation(0.05, 0.025, (0, 20))
    assert {dataset.name: len(dataset.items) for dataset in mixture.test_sets} == {"IEMOCAP": 1, "ESC-50": 1}
    plan = WindowPlan(mixture, seed=0, max_samples=5 * RATE, workers=1)
    windows = plan.windows(0)
    seen = {domain for _ in range(12) for _, _, domain in next(windows).pieces}
    assert seen == set(DOMAINS) and len(plan.skipped) == 0


def test_the_papers_recipe(paper_tree):
    mixture = load_mixture("audiosae", {"data": paper_tree})
    recipe = TrainConfig.of(mixture.training, "audiosae")
    assert (recipe.activation, recipe.k, recipe.expansion) == (("batchtopk",), (50,), (8,))
    assert (recipe.batch, recipe.steps, recipe.buffer_batches) == (2500, 200_000, 100)
    assert (recipe.lr, recipe.decay, recipe.centre) == (2e-4, 0.2, False)
    assert mixture.held_out_share == 0.02


def test_the_papers_mixture_notes_what_is_absent(paper_tree, tmp_path):
    for name in ("LibriSpeech", "musan"):
        (tmp_path / name).symlink_to(paper_tree / name)
    mixture = load_mixture("audiosae", {"data": tmp_path})
    assert set(mixture.chances()) == {"LibriSpeech", "MUSAN"}
    assert mixture.chances()["MUSAN"] == pytest.approx(15 / 16)
    assert len([note for note in mixture.notes if "is left out" in note]) == 14
    with pytest.raises(
        UsageError, match=r"no training clips.*LibriSpeech is left out: @data/LibriSpeech: no folder"
    ):
        load_mixture("audiosae", {})


def test_the_bundled_models_mixture(tmp_path, monkeypatch):
    import calibration.corpus
    import calibration.training_clips

    asked = {}

    def clips(corpus, data, **counts):
        asked.update(counts, corpus=corpus, data=data)
        return [FakeClip("s", "speech", 1.0, "hi"), FakeClip("n", "nonspeech", 1.0)]

    def sets(split, data_dir=None, quick=False):
        asked.update(split=split, eval_data=data_dir, quick=quick)
        return {"speech": [FakeClip("es", "speech", 1.0, "ho")], "tones": [FakeClip("en", "nonspeech", 1.0)]}

    monkeypatch.setattr(calibration.training_clips, "training_clips", clips)
    monkeypatch.setattr(calibration.corpus, "eval_sets", sets)
    with pytest.raises(UsageError, match="corpus: .*holds no speech; python -m calibration.synthesis"):
        load_mixture("mini.en", {"corpus": tmp_path})
    for kind in ("speech", "nonspeech"):
        (tmp_path / f"{kind}_000.jsonl").touch()
    mixture = load_mixture("mini.en", {"corpus": tmp_path, "data": None})
    assert asked == {
        "speech": 1500, "nonspeech": 1500, "real": 600, "seed": 0, "corpus": tmp_path, "data": None,
        "split": "calibration", "eval_data": None, "quick": False,
    }  # fmt: skip
    assert mixture.augmentation is None and mixture.held_out_share == 0
    assert [item.id for item in mixture.datasets[0].items] == ["s", "n"]
    assert {d: [item.id for item in items] for d, items in mixture.held_out().items()} == {
        "speech": ["es"], "sounds": ["en"],
    }  # fmt: skip
    assert [note for note in mixture.notes if "without real recordings" in note]
    load_mixture("mini.en", {"corpus": tmp_path, "data": tmp_path})
    assert asked["data"] == asked["eval_data"] == tmp_path
    with pytest.raises(UsageError, match="corpus: @corpus: no folder is given for @corpus"):
        load_mixture("mini.en", {})

"""The building blocks of reports, and the report of a calibration."""

from __future__ import annotations

import base64
import html.parser
import io
import re
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from calibration import html_report
from calibration.calibration_page import chosen_point, write_report
from calibration.html_report import Divider, Markup, Row, Tile
from calibration.report_figures import Label, picture, place_labels
from whisper_steer.errors import FormatError, UsageError

VOID = {"meta", "img", "source", "path", "rect", "br"}


class Checker(html.parser.HTMLParser):
    """Opens and closes tags in order, and keeps every address that a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def check(document: str) -> Checker:
    checker = Checker()
    checker.feed(document)
    checker.close()
    assert checker.open == []
    return checker


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (10, 20, 30)).save(buffer, format="png")
    return buffer.getvalue()


def decoded(player: str) -> tuple[np.ndarray, int]:
    data = re.search(r"src='data:audio/[a-z]+;base64,([^']+)'", player)
    assert data is not None
    with av.open(io.BytesIO(base64.b64decode(data[1]))) as file:
        frames = list(file.decode(audio=0))
    samples = np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])
    if samples.dtype == np.int16:
        samples = samples / 32768
    return samples, frames[0].sample_rate


# -- text, tables, pages --------------------------------------------------------------------------------


def test_text_is_escaped_once_and_markup_is_left_alone() -> None:
    assert html_report.text("a < b & 'c'") == "a &lt; b &amp; &#x27;c&#x27;"
    assert html_report.text(Markup("<b>x</b>")) == "<b>x</b>"
    assert html_report.text(html_report.text("<")) == "&lt;"
    assert html_report.text(None) == "–"
    assert html_report.joined(("<", Markup("<br>"))) == "&lt;<br>"


def test_page_is_whole_and_loads_nothing() -> None:
    body = [
        html_report.headline("95 % < 100 %", "", "more"),
        html_report.tiles([Tile("rate", "1 %", "of <all>", "good")]),
        html_report.section(
            "Part", html_report.table(("a", "b"), [Row(("x", 1), True, (None, 0.5))]), note="n"
        ),
        html_report.figure(png(), "caption", alt="it's a picture"),
        html_report.details("more", html_report.facts({"name": None})),
    ]
    document = html_report.page("T & U", body, subtitle="<sub>", footer=Markup("<i>f</i>"))
    checker = check(document)
    assert "<title>T &amp; U</title>" in document and "&lt;sub&gt;" in document and "<i>f</i>" in document
    assert [address[:22] for address in checker.addresses] == ["data:image/png;base64,"]
    assert "http" not in document and "@import" not in document and "url(" not in document
    assert document.count("prefers-color-scheme") == 1  # a plain PNG has no dark version


def test_table_marks_numbers_strong_rows_tints_and_dividers() -> None:
    rows = [
        Row(("x", "1", 2.5), strong=True, tint=(None, 0.25, 7.0)),
        Divider("then <these>"),
        Row(("y", None, 0)),
    ]
    made = html_report.table(("name", "one", "two"), rows, caption="C")
    assert made.count(" class='n'") == 6 and "<caption>C</caption>" in made
    assert "--tint:25%" in made and "--tint:100%" in made and made.count("style=") == 2
    assert "<tr class=strong><th scope='row'>x</th>" in made
    assert "<tr class='divider'><td colspan='3'>then &lt;these&gt;</td></tr>" in made
    assert "<td class='n'>–</td>" in made
    with pytest.raises(UsageError, match="3 columns got a row of 2 cells"):
        html_report.table(("a", "b", "c"), [Row(("x", "y"))])


def test_figure_has_a_dark_version_where_there_is_one() -> None:
    drawn = picture(lambda figure, theme: figure.text(0.1, 0.1, "x", color=theme.ink), (2, 1))
    light, dark = (Image.open(io.BytesIO(data)).convert("RGB") for data in (drawn.light, drawn.dark))
    assert light.size == dark.size == (260, 130)
    assert light.getpixel((0, 0)) == (255, 255, 255) and sum(dark.getpixel((0, 0))) < 150
    made = html_report.figure(drawn, alt="a")
    assert base64.b64encode(drawn.dark).decode() in made and base64.b64encode(drawn.light).decode() in made
    assert "<figcaption>" not in made


def test_labels_do_not_cover_each_other() -> None:
    boxes: list[tuple[float, float, float, float]] = []

    def draw(figure, theme) -> None:  # type: ignore[no-untyped-def]
        axes = figure.subplots()
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        labels = [Label(f"method {n}", 0.5 + n / 1000, 0.5, theme.ink, n == 3) for n in range(6)]
        place_labels(axes, labels, [(label.x, label.y) for label in labels], theme.paper)
        figure.canvas.draw()
        if not boxes:
            words = [note for note in axes.texts if note.get_text()]
            assert words[0].get_text() == "method 3"  # the strong one chose first
            # the words alone: for an annotation with an arrow the extent would hold that, too
            boxes.extend(tuple(note.get_window_extent().extents) for note in words)

    picture(draw, (6, 5))
    assert len(boxes) == 6
    for place, one in enumerate(boxes):
        for other in boxes[:place]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


# -- sound ----------------------------------------------------------------------------------------------


def tone(seconds: float, level: float) -> np.ndarray:
    return (level * np.sin(2 * np.pi * 440 * np.arange(int(16_000 * seconds)) / 16_000)).astype(np.float32)


def test_player_holds_the_sound_and_raises_quiet_ones() -> None:
    loud = html_report.audio_player(tone(1.0, 0.8), label="a<b")
    samples, rate = decoded(loud)
    assert rate == 16_000 and abs(len(samples) / rate - 1.0) < 0.2
    middle = samples[4_000:12_000]
    assert np.abs(middle).max() == pytest.approx(0.8, abs=0.08)
    spectrum = np.abs(np.fft.rfft(middle))
    assert np.argmax(spectrum) * rate / len(middle) == pytest.approx(440, abs=3)
    assert "raised" not in loud and "a&lt;b" in loud

    quiet = html_report.audio_player(tone(1.0, 0.009))  # 0.9 / 0.009 = 100 = 40 dB
    assert "raised by 40 dB" in quiet
    assert np.abs(decoded(quiet)[0][4_000:12_000]).max() == pytest.approx(0.9, abs=0.09)


def test_player_cuts_long_sounds_and_says_so() -> None:
    player = html_report.audio_player(tone(40.0, 0.8))
    samples, rate = decoded(player)
    assert len(samples) / rate == pytest.approx(30, abs=0.3) and "first 30 of 40 s" in player
    assert len(player) < 200_000
    assert "digital silence" in html_report.audio_player(np.zeros(1_600, np.float32))


@pytest.mark.parametrize("samples", [np.zeros(0), np.zeros((2, 3)), np.array([np.nan])])
def test_what_is_no_sound_is_one_line(samples: np.ndarray) -> None:
    with pytest.raises(UsageError, match="expected a vector of finite samples"):
        html_report.encoded(samples)


def test_every_codec_that_is_here_makes_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for codec in html_report.CODECS:
        if codec[0] in av.codecs_available:
            monkeypatch.setattr(html_report, "_codec", lambda codec=codec: codec)
            samples, rate = decoded(html_report.audio_player(tone(0.5, 0.8)))
            # Opus always decodes at 48 kHz
            assert rate in (16_000, 48_000) and len(samples) / rate == pytest.approx(0.5, abs=0.2)


def test_waveform_shades_the_speech() -> None:
    samples = np.concatenate([np.zeros(16_000), np.full(16_000, 0.1)]).astype(np.float32)
    made = html_report.waveform(samples, [(1.0, 3.0)])  # ends beyond the clip
    assert "<rect x='240.0' y='0' height='48' width='240.0'/>" in made
    bars = re.findall(r"v([\d.]+)", made)
    assert len(bars) == 240 and bars[0] == "0.6" and bars[-1] == "48.0"  # raised to full height
    assert "<rect" not in html_report.waveform(np.zeros(0))


# -- the report of a calibration ------------------------------------------------------------------------


def frontier() -> list[dict[str, float | None]]:
    rows = ((1.0, 4.0, 0.03, 0.0004), (0.0, None, 0.7, 0.0), (0.5, 6.0, 0.2, 0.0001), (2.0, 2.0, 0.01, 0.004))
    return [
        {
            "alpha": alpha, "threshold": threshold, "text_fpr": rate, "text_fpr_lo": rate / 2,
            "text_fpr_hi": 1.2 * rate, "wer_rise": rise, "wer_rise_hi": rise + 0.0005,
            "empty_speech": rise / 4,
        }
        for alpha, threshold, rate, rise in rows
    ]  # fmt: skip


def arguments(folder: Path, **changed: object) -> dict:
    return {
        "path_html": folder / "deep" / "c.html", "path_png": folder / "c.png",
        "title": "Calibration of <mini>",
        "model_line": "mini: 4 blocks", "frontier": frontier(),
        "profiles": {"strict": 2.0, "balanced": 1.0, "gentle": 0.3},
        "test": {
            "text_fpr": 0.034, "text_fpr_lo": 0.02, "text_fpr_hi": 0.05, "text_fpr_plain": 0.68,
            "wer": 0.061, "wer_plain": 0.0605, "empty_speech": 0.001, "words_per_min": 2.0,
            "plain": {"words_per_min": 30.0},
        },
        "splits": {"fit": {"speech": 40, "nonspeech": 30}, "test": {"speech": 20, "nonspeech": 15}},
        "record": {"layer": 3, "recipe": {"k": 25, "latents": list(range(500))}}, "budget": 0.001,
        **changed,
    }  # fmt: skip


def test_calibration_report_says_what_was_measured(tmp_path: Path) -> None:
    paths = write_report(**arguments(tmp_path))
    assert paths == (tmp_path / "deep" / "c.html", tmp_path / "c.png")
    document = paths[0].read_text(encoding="utf-8")
    checker = check(document)
    assert all(address.startswith("data:") for address in checker.addresses)
    with Image.open(paths[1]) as image:
        assert image.size[0] > 800
    assert "Calibration of &lt;mini&gt;" in document and "mini: 4 blocks" in document
    assert "68.0 % → 3.4 % of non-speech comes back with words" in document
    assert "changes by +0.05 points" in document and "budget +0.1 points" in document
    assert "−95.0 %" in document  # 0.034 / 0.68 - 1
    assert "tile good" in document and "does not keep the budget" not in document
    profiles = document[document.index("<h2>Profiles") : document.index("<h2>On the test split")]
    order = [profiles.index(name) for name in ("gentle", "balanced", "strict")]
    assert order == sorted(order) and profiles.count("not measured") == 6  # gentle is no measured point
    assert "3.0 <span class='ci'>[1.5, 3.6]</span>" in profiles
    assert "+0.04 <span class='ci'>up to +0.09</span>" in profiles
    assert "3.40 <span class='ci'>[2.00, 5.00]</span>" in document
    assert "<td class='n'>30.00</td>" in document  # plain Whisper's words per minute
    assert "recipe.k" in document and "(500 items)" in document


def test_calibration_report_without_a_test_split_uses_the_frontier(tmp_path: Path) -> None:
    over = [{**point, "wer_rise_hi": 0.02} for point in frontier()]
    write_report(**arguments(tmp_path, test={}, splits={"fit": 7}, record={}, frontier=over))
    document = (tmp_path / "deep" / "c.html").read_text(encoding="utf-8")
    check(document)
    assert "At alpha 1, 3.0 % of non-speech still comes back with words" in document
    assert "upper end of the interval +2 points, budget +0.1 points" in document
    assert "On the test split" not in document and "<h2>Record" not in document


def test_calibration_report_says_that_the_budget_is_exceeded(tmp_path: Path) -> None:
    test = {"text_fpr": 0.1, "wer_rise": 0.002, "clips": 12}
    write_report(**arguments(tmp_path, test=test, budget=0.0005))
    document = (tmp_path / "deep" / "c.html").read_text(encoding="utf-8")
    assert "tile bad" in document
    assert "Alpha 1 does not keep the budget on the validation split" in document
    assert "the upper end of its interval is +0.09 points" in document


def test_calibration_report_judges_by_the_upper_end_on_the_test_split(tmp_path: Path) -> None:
    test = {
        "text_fpr": 0.034, "text_fpr_plain": 0.68,
        "wer_rise": 0.0004, "wer_rise_lo": 0.0, "wer_rise_hi": 0.0021,
        "wrongly_emptied": 0.01, "wrongly_emptied_lo": 0.0, "wrongly_emptied_hi": 0.025,
        "counted_words": 1234, "counted_sets": ["speech", "speech_noisy"],
    }  # fmt: skip
    points = [{**one, "clips": 30, "nonspeech_clips": 10, "speech_clips": 20, "unheard_clips": 7}
              for one in frontier()]  # fmt: skip
    write_report(**arguments(tmp_path, test=test, frontier=points, notes=["Made without <SAEs>"]))
    document = (tmp_path / "deep" / "c.html").read_text(encoding="utf-8")
    check(document)
    assert "tile bad" in document and "tile good" not in document  # +0.04 points, but up to +0.21
    assert "±0 points to +0.21 points, budget +0.1 points" in document
    assert "The upper end of the interval, +0.21 points, is above the budget" in document
    assert "1.0 %" in document and "0.0 to 2.5 %" in document
    assert "over the 1234 words of speech, speech_noisy;" in document
    assert "Made without &lt;SAEs&gt;." in document.split("<details>")[0]
    assert "of the same 10 clips of non-speech and 20 of speech" in document
    assert document.count("<td class='n'>30</td><td class='n'>7</td>") == 6  # four points, two profiles
    within = {**test, "wer_rise_hi": 0.0009}
    write_report(**arguments(tmp_path, test=within))
    document = (tmp_path / "deep" / "c.html").read_text(encoding="utf-8")
    assert "tile good" in document and "is above the budget" not in document


def test_chosen_point_is_nearest_to_alpha_one() -> None:
    points = [{"alpha": alpha} for alpha in (0.25, 0.9, 1.5)]
    assert chosen_point(points)["alpha"] == 0.9
    assert chosen_point([{"alpha": 0.5}, {"alpha": 1.5}])["alpha"] == 0.5  # the gentler of equal ones


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frontier": []}, "the frontier has no point"),
        ({"frontier": [{"alpha": 1.0, "text_fpr": None, "wer_rise": 0.0}]}, "point 0 has text_fpr None"),
        ({"budget": -0.1}, "the WER budget is -0.1"),
        ({"budget": float("nan")}, "the WER budget is nan"),
    ],
)
def test_calibration_report_refuses(tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_report(**arguments(tmp_path, **changed))
    assert list(tmp_path.iterdir()) == []


def test_calibration_report_into_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("a file")
    with pytest.raises(FormatError, match="cannot write"):
        write_report(**arguments(tmp_path))

import csv
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_reports import make_record, make_report

from calibration import pareto, pareto_plots
from calibration.pareto import pick_operating_point, read_report, table_rows, write_sweep
from calibration.pareto_plots import ALIVE, L0, draw, spread
from whisper_steer.errors import FormatError, UsageError


def row(k, fvu, *, layer=0, expansion=8.0, l0=None, wer_rise=None, activation="batchtopk"):
    return {
        "activation": activation, "expansion": expansion, "n_latents": int(expansion * 100), "k": k,
        "layer": layer, "l0": float(k) if l0 is None else l0, "fvu": fvu, "wer_rise": wer_rise,
    }  # fmt: skip


# -- the table


def test_rows_are_flat_and_keep_every_figure():
    report = make_report(layers=2, expansions=(8,), ks=(25, 50))
    rows = table_rows(report)
    assert [(r["layer"], r["k"], r["seed"]) for r in rows] == [(0, 25, 0), (0, 50, 0), (1, 25, 0), (1, 50, 0)]
    first, record = rows[0], report["saes"][0]
    heard = record["recognition"]["speech"]
    assert first["l2"] == record["l2"] and first["music_fvu"] == record["domains"]["music"]["fvu"]
    assert first["wer_spliced"] == heard["all"]["wer_spliced"]["value"]
    assert first["noisy_wer_rise"] == heard["noisy"]["wer_rise"] == 2 * first["wer_rise"]
    assert first["text_fpr_spliced"] == 0.28 and first["file"].endswith("layer_00.safetensors")


def test_all_rows_have_the_same_columns():
    report = make_report(layers=1, expansions=(8,), ks=(25,))
    report["saes"].append(make_record(0, 8, 50, recognition=False))
    rows = table_rows(report)
    assert list(rows[0]) == list(rows[1])
    assert rows[1]["wer_rise"] is None and rows[0]["wer_rise"] is not None


def test_table_and_figures_of_a_sweep(tmp_path, capsys):
    report = make_report(layers=2, expansions=(8, 32), ks=(25, 50), seeds=(0, 1))
    (tmp_path / "report.json").write_text(json.dumps(report))
    pareto.main([str(tmp_path / "report.json"), "--out", str(tmp_path / "out")])
    out = tmp_path / "out"
    figures = [*pareto_plots.FIGURES, "l2_against_l0_by_domain"]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["table.csv", "table.json", *(f"{name}.png" for name in figures)]
    )
    for name in figures:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with (out / "table.csv").open(newline="") as lines:
        table = list(csv.DictReader(lines))
    kept = json.loads((out / "table.json").read_text())
    assert len(table) == len(kept["rows"]) == 16
    assert kept["rows"] == table_rows(report) and kept["base_model"] == "small"
    assert [float(r["l0"]) for r in table] == [r["l0"] for r in kept["rows"]]
    point = kept["operating_point"]
    assert point["reason"] in capsys.readouterr().out
    assert (point["expansion"], point["k"]) in {(8.0, 25), (8.0, 50), (32.0, 25), (32.0, 50)}


def test_figures_without_points_are_left_out(tmp_path):
    report = make_report(layers=1, expansions=(8,), ks=(25, 50), recognition=False)
    for record in report["saes"]:
        record["l2"] = None
        for cells in record["domains"].values():
            cells["l2"] = None
    point = write_sweep(report, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["alive_against_l0.png", "fvu_against_l0.png"]
    assert "WER was not measured" in point.reason
    header, first, *_ = (tmp_path / "table.csv").read_text().splitlines()
    assert dict(zip(header.split(","), first.split(","), strict=True))["l2"] == ""


def test_sparsity_that_no_k_sets(tmp_path):
    """relu and jumprelu without a target: points are joined by their L0."""
    rows = [row(None, 0.1, l0=l0, activation="relu") | {"alive": 0.5} for l0 in (40.0, 10.0, 20.0)]
    assert draw({"relu": (rows, "")}, L0, ALIVE, tmp_path / "a.png", title="t", subtitle="s")
    points = pareto_plots._points(rows, L0, ALIVE, "")
    assert [point for seeds in points.values() for point in seeds] == [(10, 50), (20, 50), (40, 50)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "lists no SAEs"),
        ('{"saes": []}', "lists no SAEs"),
        ('{"layers": [1]}', "lists no SAEs"),
    ],
)
def test_files_that_are_no_report(tmp_path, text, message):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_report(tmp_path / "report.json")


def test_missing_report_and_missing_figures(tmp_path):
    with pytest.raises(FormatError, match="cannot read .*nowhere.json"):
        read_report(tmp_path / "nowhere.json")
    with pytest.raises(FormatError, match="the report lacks 'alive'"):
        report = make_report(layers=1, expansions=(8,), ks=(25,))
        del report["saes"][0]["alive"]
        table_rows(report)


# -- the operating point


def test_the_cheapest_setting_within_the_margin_wins():
    rows = [
        row(25, 0.3, wer_rise=0.02),
        row(50, 0.2, wer_rise=0.009),
        row(100, 0.1, wer_rise=0.001),
        row(25, 0.25, expansion=32.0, wer_rise=0.009),
    ]
    point = pick_operating_point(rows)
    # L0 x latents: 50 x 800 = 40,000 is less than 25 x 3,200 = 80,000
    assert (point.expansion, point.k, point.cost, point.wer_rise) == (8, 50, 40_000, 0.009)
    assert point.reason.startswith("batchtopk 8x, k 50: smallest L0 x latents (4e+04) of the 3 of 4 settings")
    assert "within 1 points of plain (+0.90" in point.reason
    assert pick_operating_point(rows, wer_margin=0.005).k == 100
    assert pick_operating_point(rows, wer_margin=0.05).k == 25


def test_layers_and_seeds_are_averaged():
    rows = [row(k, 0.1, layer=layer, wer_rise=rise) for k, rises in ((10, (0.0, 0.03)), (20, (0.0, 0.01)))
            for layer, rise in enumerate(rises)]  # fmt: skip
    assert pick_operating_point(rows).k == 20
    assert pick_operating_point(rows, wer_margin=0.015).k == 10


def test_a_setting_that_lacks_a_layer_takes_no_part():
    rows = [row(10, 0.1, layer=0, wer_rise=0.0)]
    rows += [row(20, 0.1, layer=layer, wer_rise=0.0) for layer in (0, 1)]
    assert pick_operating_point(rows).k == 20


def test_knee_where_no_setting_is_good_enough():
    # straight down to k 20, then flat: the corner is the knee
    fvu = {10: 0.50, 20: 0.20, 40: 0.18, 80: 0.16}
    point = pick_operating_point([row(k, value, wer_rise=0.5) for k, value in fvu.items()])
    assert point.k == 20
    assert "no setting's spliced WER stays within 1 points of plain, so the knee" in point.reason
    assert "among 4 settings on the front" in point.reason
    # a setting that costs more and explains less is not on the front
    dominated = [row(k, value) for k, value in fvu.items()] + [row(15, 0.55, expansion=32.0)]
    assert pick_operating_point(dominated).k == 20


@pytest.mark.parametrize("count", [1, 2])
def test_a_front_without_a_knee_gives_its_cheapest(count):
    assert pick_operating_point([row(10, 0.3), row(20, 0.2)][:count]).k == 10


def test_nothing_to_choose_from():
    with pytest.raises(UsageError, match="no SAE was measured"):
        pick_operating_point([])
    with pytest.raises(UsageError, match="no SAE was measured"):
        pick_operating_point([row(10, None)])
    with pytest.raises(UsageError, match="wer_margin is nan"):
        pick_operating_point([row(10, 0.1)], wer_margin=float("nan"))


# -- places of the layer numbers


def test_numbers_move_apart_by_as_little_as_possible():
    assert spread([0.2, 0.5, 0.9], 0.1) == pytest.approx([0.2, 0.5, 0.9])
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert spread([0.0, 0.0], 0.1) == pytest.approx([0.0, 0.1])
    assert spread([1.0, 1.0], 0.1) == pytest.approx([0.9, 1.0])
    assert spread([0.5] * 5, 0.5) == [0, 0.25, 0.5, 0.75, 1]
    assert spread([], 0.1) == []


@given(st.lists(st.floats(0, 1), max_size=30), st.floats(0.001, 0.2))
def test_numbers_never_touch_and_stay_in_order(heights, gap):
    placed = spread(sorted(heights), gap)
    assert len(placed) == len(heights)
    assert all(-1e-9 <= height <= 1 + 1e-9 for height in placed)
    if gap * (len(heights) - 1) <= 1:
        assert all(b - a >= gap - 1e-9 for a, b in zip(placed, placed[1:], strict=False))

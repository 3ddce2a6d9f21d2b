"""Names beside points of a picture keep apart."""

import itertools

import pytest

from benchmarks.plots import label_apart


def test_names_cover_neither_each_other_nor_points():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation, Text

    figure = Figure(figsize=(6, 4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = {(0.1 * i, 0.1 * (i % 2)): [f"name {i}"] for i in range(8)}
    places[0.1, 0.1001] = ["twin", "third", "fourth"]  # it touches the marker of name 1
    axes.plot([x for x, _ in places], [y for _, y in places], "o", linestyle="none")
    axes.margins(0.3)
    figure.canvas.draw()
    before = axes.get_position().bounds
    label_apart(axes, places)
    figure.canvas.draw()
    assert axes.get_position().bounds == before
    labels = [child for child in axes.get_children() if isinstance(child, Annotation)]
    assert len(labels) == 8
    assert "name 1\ntwin\nthird\nand 1 more" in {label.get_text() for label in labels}
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    markers = axes.transData.transform(list(places))
    assert not any(box.contains(x, y) for box in boxes for x, y in markers)
    near = next(label for label in labels if label.get_text() == "name 0")
    assert near.xyann == pytest.approx((7, 0))


def test_a_name_without_room_is_left_out():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation, Text

    figure = Figure(figsize=(5, 3), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = {(float(i), float(j)): [f"the point {i} {j}"] for i in range(9) for j in range(9)}
    axes.plot([x for x, _ in places], [y for _, y in places], "o", linestyle="none")
    figure.canvas.draw()
    label_apart(axes, places)
    labels = [child for child in axes.get_children() if isinstance(child, Annotation)]
    assert 0 < len(labels) < len(places)
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))

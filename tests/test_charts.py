"""Charts as SVG: where curves, bars and cells lie, against the numbers that they show."""

import random
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from pipeline.service.web import charts

HOSTILE = '<script>alert("1")</script> & <b>'


def drawn(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


def test_a_curve_lies_where_its_values_are():
    """On the rules beside which the values stand."""
    points = [(0.0, 0.0), (10.0, 50.0), (20.0, 100.0)]
    for log, values in ((False, points), (True, [(0.0, 1.0), (10.0, 10.0), (20.0, 100.0)])):
        chart = drawn(charts.lines(HOSTILE, [charts.Curve("<b>", values)], log=log))
        xy = [tuple(map(float, pair.split(","))) for pair in chart.find("polyline").get("points").split()]
        (left, bottom), (middle, centre), (right, top) = xy
        assert middle == pytest.approx((left + right) / 2, abs=0.1)
        assert centre == pytest.approx((bottom + top) / 2, abs=0.1)
        rules = {float(path.get("d").split()[1].split("H")[0]) for path in chart.findall("path[@class='rule']")}
        assert min(rules) == pytest.approx(top, abs=0.1)
        assert max(rules) == pytest.approx(bottom, abs=0.1)
        assert chart.find("title").text == HOSTILE
        assert "<b>" in chart.find("desc").text


def test_thinned_curves_keep_their_extremes():
    numbers = random.Random(0)
    points = [(float(x), numbers.random()) for x in range(100_000)]
    points[31_415], points[27_182] = (31_415.0, 9.0), (27_182.0, -9.0)
    kept = charts.thin(points)
    assert len(kept) <= charts.MOST_POINTS
    assert {points[31_415], points[27_182], points[-1]} <= {*kept}
    assert kept == sorted({*kept})
    assert charts.thin(points[:50]) == points[:50]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (0, 1e-4), (0.013, 0.97), (0, 7), (99, 101), (0, 1.28e6), (-3, 5), (5, 5)]
)
def test_ticks_enclose_the_values_in_round_steps(low: float, high: float):
    marks = charts.ticks(low, high, 4)
    steps = {round(b - a, 12) for a, b in pairwise(marks)}
    assert marks[0] <= low
    assert marks[-1] >= high
    assert len(steps) <= 1
    assert 2 <= len(marks) <= 7
    assert all(f"{step:e}"[0] in "125" for step in steps)


@pytest.mark.parametrize("number", [1, 100, 101, 21_841])
def test_bars_are_in_proportion(number: int):
    values = [float(1 + i % 7) for i in range(number)]
    heights = [float(bar.get("height")) for bar in drawn(charts.bars("t", values, "d", "classes")).findall("rect")]
    assert len(heights) <= charts.MOST_BARS
    if number <= charts.MOST_BARS:
        assert [height / heights[0] for height in heights] == pytest.approx(values, rel=0.05)


@pytest.mark.parametrize("number", [1, 25, 2_000, 100_000])
def test_a_grid_says_how_many_shards_are_done(number: int):
    filled = [i % 3 == 0 for i in range(number)]
    chart = drawn(charts.grid("Shards", filled))
    cells = chart.findall("rect")
    assert len(cells) <= charts.MOST_CELLS
    assert f"{sum(filled):,} of {number:,} done" in chart.find("desc").text
    if number <= charts.MOST_CELLS:
        assert [cell.get("class") == "done" for cell in cells] == filled
    assert {cell.get("class") for cell in drawn(charts.grid("Shards", [True] * number)).findall("rect")} == {"done"}

"""Charts: round ticks, labels apart, and lines that are where their numbers are, however many or few these are."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor
from scipy.optimize import minimize

from trainer.figures.charts import BOTTOM, LEFT, RIGHT, TOP, Band, Line, chart
from trainer.figures.curves import curves, updates
from trainer.figures.drawing import BLUE, COLOURS, ORANGE, WIDTH
from trainer.figures.scales import Scale, decades, spread, thinned, ticks, up

HEIGHT = 400


def train(step: int, loss: float, **ratios: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": loss, "layers": {name: {"ratio": r} for name, r in ratios.items()}}


def validation(step: int, nll: float, top1: float, top5: float) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "nll": nll, "top1_error": top1, "top5_error": top5}


def has(sheet: Image.Image, colour: str) -> np.ndarray:
    return (np.asarray(sheet) == ImageColor.getrgb(colour)).all(2)


def drawn(sheet: Image.Image, colour: str) -> np.ndarray:
    """(height, ·) bool: where the field of a chart has a colour, without the names beside it."""
    return has(sheet, colour)[:, LEFT : RIGHT + 3]


@pytest.mark.parametrize("most", [3, 6, 9])
@pytest.mark.parametrize("high", [1, 3, 20, 99.9, 2400, 900_000, 0.07, 6.908, 1e-9, 1e12])
def test_ticks_are_round_and_few(high: float, most: int) -> None:
    found = ticks(0, high, most)
    step = found[1]
    assert found == pytest.approx(step * np.arange(len(found)))
    assert 2 <= len(found) <= most
    assert f"{step:.0e}"[0] in "125"
    assert float(f"{step:.0e}") == step
    assert high * (1 - 1e-9) - found[-1] < step
    end = up(high, most)
    assert end >= high * (1 - 1e-9)
    assert ticks(0, end, most)[-1] == pytest.approx(end)
    assert end - high < ticks(0, end, most)[1]


def test_steps_are_whole() -> None:
    assert ticks(0, 1, 9, least=1) == [0, 1]
    assert ticks(0, 3, 9, least=1) == [0, 1, 2, 3]
    assert up(0, 5) == 1


def test_decades_enclose() -> None:
    assert decades(2e-5, 3e-3) == [1e-5, 1e-4, 1e-3, 1e-2]
    assert decades(1e-4, 1e-2) == [1e-4, 1e-3, 1e-2]
    assert decades(1.0, 1.0) == [1, 10]


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_apart_and_move_as_little_as_they_can(seed: int) -> None:
    """Against a general optimiser."""
    places = np.random.default_rng(seed).uniform(0, 150, 7)
    found = spread(places, 20, 5, 160)
    order = np.argsort(places)
    assert np.diff(found[order]).min() >= 20 - 1e-9
    assert 5 - 1e-9 <= found.min() <= found.max() <= 160 + 1e-9
    apart = {"type": "ineq", "fun": lambda x: np.diff(x) - 20}
    start = np.linspace(5, 160, 7)
    best = minimize(lambda x: ((x - places[order]) ** 2).sum(), start, bounds=[(5, 160)] * 7, constraints=[apart])
    assert ((found - places) ** 2).sum() == pytest.approx(best.fun, abs=1e-3)


def test_labels_without_room_are_even() -> None:
    assert spread([3, 1, 2], 100, 0, 50).tolist() == [50, 0, 25]
    assert spread([7], 20, 0, 50).tolist() == [7]


def test_long_lines_keep_their_peaks_and_their_mean() -> None:
    x, y = np.linspace(0, 99.99, 20_000), np.random.default_rng(0).standard_normal(20_000)
    y[12_345], y[54] = 50, -70
    few = thinned(x, y, 2)
    assert few is not None
    assert len(few.x) == 50
    for i in range(50):
        inside = y[(x >= 2 * i) & (x < 2 * i + 2)]
        numbers = (few.mean[i], few.least[i], few.greatest[i])
        assert numbers == pytest.approx((inside.mean(), inside.min(), inside.max()))
        assert 2 * i <= few.x[i] < 2 * i + 2
    assert thinned(x[::150], y[::150], 2) is None


def test_scales() -> None:
    linear, log = Scale(0, 10, 100, 300), Scale(1e-4, 1e-1, 300, 0, log=True)
    assert linear.places([0, 5, 10]).tolist() == [100, 200, 300]
    assert log.places([1e-4, 1e-3, 1e-1, 0]) == pytest.approx([300, 200, 0, 300])


def test_lines_are_where_the_numbers_are() -> None:
    falling = Line("falling", [1, 100], [100, 0], BLUE)
    flat = Line("flat", [1, 50, 100], [50, 50, 50], ORANGE)
    sheet = chart("Errors", [falling, flat], HEIGHT)
    height, width = HEIGHT - TOP - BOTTOM, RIGHT - LEFT
    for step in (10, 30, 80):
        x = round(LEFT + step * width / 100)
        assert sheet.getpixel((x, TOP + height // 2)) == ImageColor.getrgb(ORANGE)
        y = HEIGHT - BOTTOM - (100 - 100 * (step - 1) / 99) * height / 100
        assert sheet.getpixel((x, round(y))) == ImageColor.getrgb(BLUE)


def test_a_band_is_between_its_values() -> None:
    line = Line("a", [1, 10], [1e-5, 1e-5], BLUE)
    sheet = chart("Updates", [line], HEIGHT, log=True, band=Band("healthy", 1e-4, 1e-2))
    decade = (HEIGHT - TOP - BOTTOM) / 3  # of 1e-5 to 1e-2
    shaded = (has(sheet, "#e6f1e6").sum(1) > 500).nonzero()[0]
    assert (shaded.min(), shaded.max()) == pytest.approx((TOP, TOP + 2 * decade), abs=2)
    low = chart("Errors", [Line("a", [1, 10], [0, 100], BLUE)], HEIGHT, band=Band("25 %", 25, 25))
    marked = (has(low, "#8fae8f").sum(1) > 500).nonzero()[0]
    assert marked.tolist() == [round(TOP + 0.75 * (HEIGHT - TOP - BOTTOM))]


def test_one_point_is_a_dot() -> None:
    sheet = curves([train(20, 2.3, conv1=1e-3), validation(20, 2.0, 90, 50)])
    for colour in (BLUE, ORANGE):
        rows, places = drawn(sheet, colour).nonzero()
        assert len(places)
        assert places.min() + LEFT >= RIGHT - 6
        assert np.ptp(rows[rows < 300]) <= 10
    assert has(updates([train(20, 2.3, conv1=1e-3)]), BLUE).any()


def test_constant_and_zero_values() -> None:
    lines = [train(step, 0.0, conv1=0.0, fc8=1e-4) for step in (1, 2, 3)]
    assert has(curves(lines), BLUE).any()
    sheet = updates(lines)
    height = sheet.height - 24  # its foot, without the margin
    lowest = drawn(sheet, BLUE).any(1).nonzero()[0]
    assert lowest.max() <= height - BOTTOM + 5
    assert lowest.min() >= height - BOTTOM - 5
    assert drawn(sheet, ORANGE).any(1).nonzero()[0].max() < height - BOTTOM - 50  # 1e-4 is not 0


@pytest.mark.parametrize("lines", [[], [train(1, 2.0, conv1=1e-3)], [validation(5, 1.0, 50, 20)]])
def test_what_is_not_recorded_is_said(lines: list[dict[str, Any]]) -> None:
    whole = curves([train(1, 2.0, conv1=1e-3), validation(5, 1.0, 50, 20)])
    found = curves(lines)
    assert found.width == WIDTH
    missing = sum(
        not any(line["kind"] in kinds for line in lines) for kinds in (("train", "validation"), ("validation",))
    )
    assert (whole.height - found.height > 200) == (missing > 0)
    assert updates(lines).width == WIDTH


def test_both_charts_have_one_axis_of_steps() -> None:
    """The error of step 500 stands in the middle of a run of 1,000, too."""
    sheet = curves([train(10, 2.0), train(1000, 1.0), validation(250, 2.0, 80, 40), validation(500, 1.5, 60, 20)])
    lower = drawn(sheet, BLUE)[sheet.height // 2 :]
    assert lower.any(0).nonzero()[0].max() == pytest.approx((RIGHT - LEFT) / 2, abs=6)


def test_names_of_lines_that_end_together_do_not_overlap() -> None:
    same = [Line(f"line {i}", [1, 10], [5, 5], COLOURS[i]) for i in range(6)]
    sheet = chart("Errors", same, HEIGHT)
    rows = [has(sheet, each.colour)[:, RIGHT + 30 :].any(1).nonzero()[0] for each in same]
    assert all(above.max() < below.min() for above, below in pairwise(rows))
    assert rows[0].min() >= TOP - 10


def test_a_long_run_shows_its_peak_and_its_course() -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 20_000)
    noise[7_000] = 8
    sheet = curves([train(i + 1, 2 + value, conv1=1e-3) for i, value in enumerate(noise.tolist())])
    strong, some = (
        drawn(sheet, BLUE),
        (np.asarray(sheet)[:, LEFT:RIGHT] != np.asarray(sheet)[:, LEFT : LEFT + 1]).any(2),
    )
    field = slice(24 + 31 + 16 + TOP, 24 + 31 + 16 + 380 - BOTTOM)
    assert np.ptp(strong[field].any(1).nonzero()[0]) < 15  # the mean: hardly any noise
    peak = round(7_000 / 20_000 * (RIGHT - LEFT))
    assert some[field][:60, peak - 3 : peak + 4].any()
    assert not some[field][10:60, : peak - 20].any()

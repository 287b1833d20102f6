"""A chart: lines over the steps of a run, each with its name at its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log10

import numpy as np
from PIL import Image, ImageDraw

from trainer.figures.drawing import INK, LINE, MARGIN, SMALL, SOFT, TEXT, WIDTH, blank, write
from trainer.figures.scales import Scale, decades, number, spread, thinned, ticks, up
from trainer.figures.strokes import DASH, area, dot, line

LEFT, TOP, RIGHT, BOTTOM = 80, 42, WIDTH - 210, 40  # pixels: edges of the field of a chart, from its left, top and end
LABEL, LEADER = 22, 30  # pixels: of a line's name, its height, and how far from the field's edge it stands
DOTS = (2.0, 3.0)  # pixels: drawn, left out
FEW = 60  # points, which are marked
STRETCH, VEIL = 3, 0.25  # of a line with many points: pixels that are drawn as one; how dark the noise around it is
SHADE, EDGE = "#e6f1e6", "#8fae8f"
MOST = 12  # powers of ten that have a tick
GROUNDED = 10  # a log axis with zeros begins so many times below the least number above zero

Marks = list[tuple[float, str]]


@dataclass(frozen=True)
class Line:
    """A line of a chart; `steps` ascend."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """Values that are marked in a chart: from `low` to `high`, or a level where both are the same."""

    name: str
    low: float
    high: float


def chart(
    title: str, lines: Sequence[Line], height: int, log: bool = False, band: Band | None = None, steps: int = 1
) -> Image.Image:
    """A part of a sheet, `height` pixels high; the axis of the steps goes to the last one, and at least to `steps`.

    Lines without points are left out; without any, the chart says so.

    On a log axis zeros lie on the lower edge, whose tick is 0. Of a line with very many points the mean is drawn, and
    paler its least and greatest values.
    """
    part, drawn = blank(height), [each for each in lines if len(each.steps)]
    write(part, (MARGIN, 0), title, TEXT, INK, bold=True, width=WIDTH - 2 * MARGIN)
    if not drawn:
        write(part, (MARGIN, TOP), "none recorded", TEXT, SOFT)
        return part.crop((0, 0, WIDTH, TOP + LABEL))
    x = Scale(0, max(steps, *(each.steps[-1] for each in drawn)), LEFT, RIGHT)
    y, marks = heights(drawn, height, log, band)
    if band:
        _band(part, y, band)
    _frame(part, x, y, marks)
    for each in drawn:
        _draw(part, x, y, each)
    _names(part, x, y, drawn)
    return part


def heights(lines: Sequence[Line], height: int, log: bool, band: Band | None) -> tuple[Scale, Marks]:
    """The axis of the values, and its ticks with their numbers."""
    values = np.concatenate([each.values for each in lines] + [[band.low, band.high] if band else []])
    foot, most = height - BOTTOM, (height - TOP - BOTTOM) // 45
    if not log:
        high = up(float(values.max()), most)
        return Scale(0, high, foot, TOP), [(value, number(value)) for value in ticks(0, high, most)]
    above = values[values > 0]
    least, greatest = (float(above.min()), float(above.max())) if len(above) else (1.0, 1.0)
    grounded = len(above) < len(values)
    powers = decades(least / GROUNDED if grounded else least, greatest)
    names = ["0" if grounded and not i else f"1e{log10(power):.0f}" for i, power in enumerate(powers)]
    every = -(-len(powers) // MOST)
    return Scale(powers[0], powers[-1], foot, TOP, log=True), list(zip(powers, names))[::every]


def _frame(part: Image.Image, x: Scale, y: Scale, marks: Marks) -> None:
    """Grid, ticks and their numbers."""
    pen = ImageDraw.Draw(part)
    for value, name in marks:
        height = round(y.place(value))
        pen.line([(LEFT, height), (RIGHT, height)], LINE)
        write(part, (LEFT - 10, height), name, SMALL, SOFT, "rm")
    for step in ticks(x.low, x.high, 9, least=1):
        place = round(x.place(step))
        pen.line([(place, y.start), (place, y.start + 5)], SOFT)
        write(part, (place, y.start + 10), number(step), SMALL, SOFT, "ma")
    pen.line([(LEFT, y.start), (RIGHT, y.start)], SOFT)
    write(part, (RIGHT + LEADER, y.start + 10), "step (updates)", SMALL, SOFT)


def _band(part: Image.Image, y: Scale, band: Band) -> None:
    top, foot = round(y.place(band.high)), round(y.place(band.low))
    ImageDraw.Draw(part).rectangle([LEFT, top, RIGHT, foot], SHADE, EDGE)
    write(part, (LEFT + 8, foot - 4), band.name, SMALL, SOFT, "ls")


def _draw(part: Image.Image, x: Scale, y: Scale, each: Line) -> None:
    places = x.places(each.steps), y.places(each.values)
    points, dash = list(zip(*(axis.tolist() for axis in places))), DASH if each.dashed else ()
    if few := thinned(*places, STRETCH):
        edge = np.stack([np.concatenate([few.x, few.x[::-1]]), np.concatenate([few.least, few.greatest[::-1]])], 1)
        area(part, edge.tolist(), each.colour, VEIL)
        points = list(zip(few.x.tolist(), few.mean.tolist()))
    line(part, points, each.colour, 2, dash)
    if len(points) <= FEW:
        for point in points:
            dot(part, point, each.colour)


def _names(part: Image.Image, x: Scale, y: Scale, lines: Sequence[Line]) -> None:
    """Each line's name, where it ends, or near that where names would overlap; and a dotted line to it."""
    ends = [y.place(each.values[-1]) for each in lines]
    for each, end, place in zip(lines, ends, spread(ends, LABEL, TOP, y.start - 4)):
        line(part, [(x.place(each.steps[-1]) + 4, end), (RIGHT + LEADER - 6, place)], each.colour, 1, DOTS)
        write(part, (RIGHT + LEADER, place), each.name, TEXT, each.colour, "lm", width=WIDTH - MARGIN - RIGHT - LEADER)

"""Lines, dots and ticks: Pillow's own have steps, so they are drawn larger and reduced."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import hypot

from PIL import Image, ImageDraw

from trainer.figures.drawing import TEXT, Point

DASH = (10.0, 7.0)  # pixels: drawn, left out
FINE = 4  # times as large


def line(
    sheet: Image.Image, points: Sequence[Point], colour: str, width: float = 2, dash: Sequence[float] = ()
) -> None:
    """A smooth line through the centres of pixels (x, y), or one with gaps."""
    left, top, right, foot = _box(points, width)
    mask = Image.new("L", ((right - left) * FINE, (foot - top) * FINE))
    pen = ImageDraw.Draw(mask)
    for piece in dashes(points, *dash) if dash else [points]:
        pen.line([_fine(x - left, y - top) for x, y in piece], 255, round(width * FINE), "curve")
    _paint(sheet, colour, left, top, mask)


def area(sheet: Image.Image, edge: Sequence[Point], colour: str, opacity: float) -> None:
    """What lies inside of an edge, of which the sheet beneath is seen."""
    left, top, right, foot = _box(edge, 1)
    mask = Image.new("L", (right - left, foot - top))
    ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in edge], round(255 * opacity))
    sheet.paste(colour, (left, top, right, foot), mask)


def dot(sheet: Image.Image, place: Point, colour: str, radius: float = 4) -> None:
    left, top, side = int(place[0] - radius) - 1, int(place[1] - radius) - 1, int(2 * radius) + 4
    mask = Image.new("L", (side * FINE, side * FINE))
    ImageDraw.Draw(mask).circle(_fine(place[0] - left, place[1] - top), radius * FINE, 255)
    _paint(sheet, colour, left, top, mask)


def tick(sheet: Image.Image, place: Point, colour: str, size: int = TEXT) -> float:
    """A mark, ✓, for what is true: the font has none. `place` is its left and its middle. Returns its width."""
    x, y = place
    step = size / 4
    line(sheet, [(x + 1, y), (x + 1 + step, y + step), (x + 1 + 3 * step, y - step)], colour, 2.5)
    return 3 * step + 6


def dashes(points: Sequence[Point], on: float, off: float) -> Iterator[list[Point]]:
    """The drawn parts of a line with gaps, which begins with a drawn one; lengths in pixels."""
    left, drawn, piece = on, True, [points[0]]  # `left` of the part that is being drawn, or left out
    for (x, y), (end_x, end_y) in pairwise(points):
        far = hypot(end_x - x, end_y - y)
        at = 0.0
        while far - at > left:
            at += left
            corner = (x + (end_x - x) * at / far, y + (end_y - y) * at / far)
            if drawn:
                yield [*piece, corner]
            drawn, piece, left = not drawn, [corner], off if drawn else on
        left -= far - at
        piece.append((end_x, end_y))
    if drawn and len(piece) > 1:
        yield piece


def _fine(x: float, y: float) -> Point:
    """The same place in a larger mask, where, too, pixels have their numbers at their centres."""
    return (x + 0.5) * FINE - 0.5, (y + 0.5) * FINE - 0.5


def _box(points: Sequence[Point], around: float) -> tuple[int, int, int, int]:
    """Left, top, right and foot of what is drawn around points, in whole pixels."""
    left, top = (int(min(values) - around) - 1 for values in zip(*points))
    right, foot = (int(max(values) + around) + 2 for values in zip(*points))
    return left, top, right, foot


def _paint(sheet: Image.Image, colour: str, left: int, top: int, mask: Image.Image) -> None:
    small = mask.reduce(FINE)
    sheet.paste(colour, (left, top, left + small.width, top + small.height), small)

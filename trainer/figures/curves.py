"""Draw curves on a sheet, told apart without colour: solid, dashed, dotted; each is named where it ends."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise

import numpy as np
from PIL import Image, ImageDraw

from trainer.figures.sheets import COLOURS, FINE, MARGIN, SMALL, SOFT, TEXT, WIDTH, blank, length, titled, write

HEIGHT, LEFT, BELOW = 400, 64, 56  # pixels: of the plot; kept for the numbers at its left, and below it
TICKS = 8  # of an axis, at most
WIDE = 2.5  # pixels, of a curve
PATTERNS = {  # pixels drawn and left out in turn
    "solid": (1, 0),
    "dashed": (14, 8),
    "dotted": (3, 6),
    "dashed and dotted": (14, 6, 3, 6),
}
GRID = "#e3e8ec"

Points = Sequence[tuple[float, float]]


def curves(courses: Mapping[str, Points], up: str, along: str, line: float, title: str) -> Image.Image:
    """Return the sheet of curves by name, each of points (x, y) ≥ 0 with growing x, on axes from 0.

    `up` and `along` name the axes; `line` is a value of y that a horizontal line stands at.
    """
    points = [point for course in courses.values() for point in course]
    x_step, y_step = (step(max((point[axis] for point in points), default=1)) for axis in (0, 1))
    x_end, y_end = (
        size * max(1, math.ceil(max((point[axis] for point in points), default=1) / size))
        for axis, size in enumerate((x_step, y_step))
    )
    part, right = blank(HEIGHT + BELOW + SMALL), WIDTH - 2 * MARGIN
    top = SMALL + 8

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * x / x_end, top + (HEIGHT - top) * (1 - y / y_end)

    pen = ImageDraw.Draw(part)
    for i in range(round(y_end / y_step) + 1):
        y = place(0, i * y_step)[1]
        pen.line([LEFT, y, right, y], GRID)
        write(part, (LEFT - 8, y), f"{i * y_step:g}", SMALL, SOFT, "rm")
    for i in range(round(x_end / x_step) + 1):
        x = place(i * x_step, 0)[0]
        pen.line([x, HEIGHT, x, HEIGHT + 5], SOFT)
        write(part, (x, HEIGHT + 8), f"{i * x_step:g}", SMALL, SOFT, "ma")
    pen.line([LEFT, HEIGHT, right, HEIGHT], SOFT)
    write(part, (LEFT, 0), up, SMALL, SOFT)
    write(part, ((LEFT + right) / 2, HEIGHT + 32), along, SMALL, SOFT, "ma")
    _stroke(part, [place(0, line), place(x_end, line)], PATTERNS["dotted"], SOFT, 1.2)
    styles = dict(zip(courses, cycle(PATTERNS)))
    for i, (name, course) in enumerate(courses.items()):
        places, colour = [place(*point) for point in course], COLOURS[i % len(COLOURS)]
        _stroke(part, places, PATTERNS[styles[name]], colour, WIDE)
        if places:
            x, leftwards = places[-1][0] - 4, places[-1][0] > (LEFT + right) / 2
            start = x - leftwards * length(name, TEXT, bold=True)
            xs, ys = zip(*places)
            y = min(float(np.interp(start, xs, ys)), *(y for x, y in places if x >= start))  # above all that it spans
            write(part, (x, y - 12), name, TEXT, colour, "rb" if leftwards else "lb", bold=True)
    return titled(title, [part], "; ".join(f"{name}: {style}" for name, style in styles.items()))


def step(end: float) -> float:
    """Return the distance of the ticks of an axis from 0 to `end`: 1, 2 or 5 times a power of ten."""
    least = max(end, 1e-9) / TICKS
    power = 10.0 ** math.floor(math.log10(least))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))


def _stroke(
    part: Image.Image, places: Sequence[tuple[float, float]], pattern: Sequence[float], colour: str, wide: float
) -> None:
    """Draw a line along places in pixels, smooth, with a pattern of strokes and gaps along its length."""
    mask = Image.new("L", (part.width * FINE, part.height * FINE))
    pen, width = ImageDraw.Draw(mask), max(1, round(wide * FINE))
    for piece in _pieces(places, pattern):
        pen.line([(x * FINE, y * FINE) for x, y in piece], 255, width, "curve")
    part.paste(colour, (0, 0), mask.reduce(FINE))


def _pieces(places: Sequence[tuple[float, float]], pattern: Sequence[float]) -> list[list[tuple[float, float]]]:
    """Return the strokes of a dashed line, each with the corners that it goes round."""
    if not any(pattern[1::2]):
        return [list(places)] if len(places) > 1 else []
    pieces: list[list[tuple[float, float]]] = [[]]
    index, left = 0, pattern[0]
    for (x0, y0), (x1, y1) in pairwise(places):
        long, done = math.hypot(x1 - x0, y1 - y0), 0.0
        while done < long:
            going = min(left, long - done)
            ends = [(x0 + (x1 - x0) * t / long, y0 + (y1 - y0) * t / long) for t in (done, done + going)]
            if index % 2 == 0:
                pieces[-1] += ends if not pieces[-1] else ends[1:]
            done, left = done + going, left - going
            if left <= 0:
                index = (index + 1) % len(pattern)
                left = pattern[index]
                pieces += [[]] if index % 2 == 0 else []
    return [piece for piece in pieces if piece]

"""Charts as SVG: pure functions from numbers to markup, coloured by style.css, with words for screen readers."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from markupsafe import Markup

MOST_POINTS = 400  # of a curve
MOST_CELLS = 2_000
MOST_BARS = 100
COLUMNS = 60  # of a grid of shards
WIDTH, HEIGHT = 480, 212  # units of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 26, 22  # margins
Point = tuple[float, float]


class Curve(NamedTuple):
    """A curve and its name in the legend; x grows."""

    name: str
    points: Sequence[Point]


def lines(title: str, curves: Sequence[Curve], unit: str = "", log: bool = False, least: float = 0) -> Markup:
    """Return a chart of curves over steps, with axes, ticks and a legend that has the newest values.

    Args:
        unit: stands behind the values.
        log: the y axis is logarithmic, where all values are positive; else it has zero.
        least: the y axis reaches so high at least.
    """
    curves = [Curve(c.name, thin([p for p in c.points if math.isfinite(p[1])])) for c in curves]
    curves = [c for c in curves if c.points]
    if not curves:
        return Markup('<p class="none">{}: nothing yet.</p>').format(title)
    xs = [x for c in curves for x, _ in c.points]
    ys = [y for c in curves for _, y in c.points]
    log = log and min(ys) > 0
    x_ticks = ticks(min(xs), max(xs), 5, whole=True)
    y_ticks = decades(min(ys), max(ys)) if log else ticks(min(0.0, *ys), max(*ys, least), 4)
    texts = [f"{curve.name} {figure(curve.points[-1][1])}{unit}" for curve in curves]
    places = _legend(texts)
    across = _scale(min(xs), max(*xs, min(xs) + 1), LEFT, WIDTH - RIGHT)
    up = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, places[-1][1] + 12, log)
    parts = [_rule(up(y), figure(y)) for y in y_ticks]
    parts += [_text(across(x), HEIGHT - BOTTOM + 16, figure(x), "middle") for x in x_ticks if min(xs) <= x <= max(xs)]
    parts.append(_text(0, HEIGHT - BOTTOM + 16, "step"))
    for number, (curve, (x, y)) in enumerate(zip(curves, places)):
        parts += _curve(f"c{number}", [(across(step), up(value)) for step, value in curve.points])
        parts.append(f'<path class="c{number}" d="M{x} {y - 4}h18"/>' + _text(x + 22, y, texts[number]))
    newest = [f"{text} at step {curve.points[-1][0]:,.0f}" for text, curve in zip(texts, curves)]
    return _svg(title, "; ".join(newest), WIDTH, HEIGHT, parts, "chart")


def _curve(style: str, points: Sequence[Point]) -> list[str]:
    """Return a curve with a dot at its end; a curve of one point is seen, too."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[-1]
    return [
        f'<polyline class="{style}" points="{path}"/>',
        f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>',
    ]


def bars(title: str, values: Sequence[float], description: str, x_name: str) -> Markup:
    """Return a chart of bars in their order; past MOST_BARS each is the mean of neighbours."""
    step = math.ceil(len(values) / MOST_BARS) or 1
    means = [sum(part) / len(part) for part in (values[i : i + step] for i in range(0, len(values), step))]
    y_ticks = ticks(0, max(means, default=1), 4)
    up = _scale(0, y_ticks[-1], HEIGHT - BOTTOM, TOP)
    pitch = (WIDTH - LEFT - RIGHT) / max(len(means), 1)
    gap = min(1.5, pitch / 5)
    parts = [_rule(up(y), figure(y)) for y in y_ticks]
    for number, mean in enumerate(means):
        x, y = LEFT + number * pitch, up(mean)
        box = f'x="{x:.2f}" y="{y:.1f}" width="{pitch - gap:.2f}" height="{HEIGHT - BOTTOM - y:.1f}"'
        parts.append(f'<rect class="bar" {box}/>')
    under = (LEFT, "1", "start"), ((WIDTH + LEFT) / 2, x_name, "middle"), (WIDTH - RIGHT, f"{len(values):,}", "end")
    parts += [_text(x, HEIGHT - BOTTOM + 16, text, anchor) for x, text, anchor in under]
    return _svg(title, description, WIDTH, HEIGHT, parts, "chart")


def bar(share: float) -> Markup:
    """Return a bar of a share 0 … 1, beside whose number it stands."""
    rect = f'<rect class="bar" width="{100 * min(max(share, 0), 1):.1f}" height="8"/>'
    return Markup(f'<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">{rect}</svg>')


def spark(title: str, values: Sequence[float]) -> Markup:
    """Return a small curve without axes, from zero; its newest value stands beside it in the page."""
    points = thin([(float(x), y) for x, y in enumerate(values) if math.isfinite(y)])
    if len(points) < 2:
        return Markup("")
    across, up = _scale(0, points[-1][0], 1, 119), _scale(0, max(*(y for _, y in points), 1e-9), 23, 1)
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
    curve = f'<polyline class="c0" points="{path}"/>'
    return _svg(title, f"{len(values)} values, the newest {figure(values[-1])}", 120, 24, [curve], "spark")


def grid(title: str, filled: Sequence[bool]) -> Markup:
    """Return a cell for each shard, filled where it is done; past MOST_CELLS a cell is the share of neighbours done."""
    step = math.ceil(len(filled) / MOST_CELLS) or 1
    shares = [sum(part) / len(part) for part in (filled[i : i + step] for i in range(0, len(filled), step))]
    columns = min(COLUMNS, len(shares))
    parts = []
    for number, share in enumerate(shares):
        y, x = divmod(number, columns)
        level = "done" if share == 1 else "part" if share else "open"
        parts.append(f'<rect class="{level}" x="{x * 10}" y="{y * 10}" width="8.4" height="8.4" rx="1.2"/>')
    done = f"{sum(filled):,} of {len(filled):,} done" + (f"; a cell is {step} shards" if step > 1 else "")
    width, height = columns * 10, math.ceil(len(shares) / columns) * 10
    return _svg(title, done, width, height, parts, "grid", f' width="{width * 1.2:g}"')


def swatch(title: str, colours: Sequence[Sequence[float]]) -> Markup:
    """Return fields of these colours (red, green, blue; grey levels) side by side."""
    parts = []
    for x, colour in enumerate(colours):
        red, green, blue = (min(max(round(level), 0), 255) for level in colour)
        parts.append(f'<rect x="{x}" width="1.02" height="1" fill="rgb({red},{green},{blue})"/>')
    return _svg(title, "", len(colours), 1, parts, "swatch", ' preserveAspectRatio="none"')


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most `most` points: of each bucket of neighbours the lowest and the highest, and the last of all."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2 - 1))
    kept: list[Point] = []
    for first in range(0, len(points), size):
        bucket = points[first : first + size]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Return about `most` round numbers from below `low` to above `high`."""
    span = max(high - low, 1.0 if whole else abs(high) * 1e-3, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * most >= span * 0.999)
    step = max(step, 1.0) if whole else step
    first = math.floor(low / step + 1e-9)
    return [n * step for n in range(first, max(math.ceil(high / step - 1e-9), first + 1) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Return 1, 2, 5, 10 … that enclose `low` … `high`, both above 0; past three decades the powers of ten alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [m * 10.0**p for p in powers for m in ((1, 2, 5) if len(powers) <= 4 else (1,))]
    first = max((s for s in steps if s <= low), default=steps[0])
    last = min((s for s in steps if s >= high), default=steps[-1])
    return [s for s in steps if first <= s <= last] if first < last else [first, first * 10]


def figure(value: float) -> str:
    """Return a number as a label: 12k, 0.05, 3.1M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / min(size, 1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _legend(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return where each text of a legend begins, in as many rows as they take."""
    x, y, places = LEFT, 14, []
    for text in texts:
        width = 36 + round(7.2 * len(text))
        if x > LEFT and x + width > WIDTH:
            x, y = LEFT, y + 16
        places.append((x, y))
        x += width
    return places


def _scale(low: float, high: float, start: float, end: float, log: bool = False) -> Callable[[float], float]:
    if log:
        inner = _scale(math.log(low), math.log(high), start, end)
        return lambda value: inner(math.log(value))
    return lambda value: start + (end - start) * (value - low) / ((high - low) or 1)


def _rule(y: float, text: str) -> str:
    return f'<path class="rule" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>' + _text(LEFT - 6, y + 4, text, "end")


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(
    title: str, description: str, width: float, height: float, parts: Sequence[str], kind: str, more: str = ""
) -> Markup:
    names = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    head = f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img"{more}>'
    return Markup(head + names + "".join(parts) + "</svg>")

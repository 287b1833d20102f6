"""Pictures and curves as fragments of HTML that need nothing from outside: PNG and JPEG data URIs, bars, charts."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from PIL import Image

from trainer.predict import top

MID_GREY = 128  # grey levels: what is added to an input, whose mean is about zero, to show it
FONT = "system-ui, sans-serif"
LINES = (  # told apart without colour, too
    ("#1f5f8b", "solid", "circle"),
    ("#b4530f", "dash", "diamond"),
    ("#3b7d3b", "dot", "square"),
    ("#7a3e9d", "dashdot", "cross"),
    ("#1c2733", "solid", "x"),
    ("#8a6d00", "dash", "triangle-up"),
    ("#0f7f86", "dot", "triangle-down"),
    ("#a6243c", "dashdot", "star"),
)

STYLE = """
:root { --ink: #1c2733; --soft: #55626d; --line: #d5dce2; --blue: #1f5f8b; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: #fff;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2, h3 { font-size: 1.25rem; margin: 0 0 .75rem; break-after: avoid; }
h3 { font-size: 1rem; }
p { max-width: 46rem; margin: 0 0 1rem; }
a { color: var(--blue); }
a:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; border-radius: 2px; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 0; padding: 0; list-style: none; }
nav a { display: inline-block; padding: .25rem 0; }
section, footer { margin-top: 2rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
figure { margin: 0; break-inside: avoid; }
figcaption, caption, footer p { color: var(--soft); font-size: .875rem; line-height: 1.35; }
figcaption b { color: var(--ink); }
img + figcaption { margin-top: .4rem; }
img { display: block; max-width: 100%; height: auto; }
.mean { width: 256px; }
.pixelated { image-rendering: pixelated; max-width: none; }
.facts { margin: 0 0 1rem; max-width: 56rem; }
.facts div { display: grid; grid-template-columns: 6rem 1fr; padding: .3rem 0; border-bottom: 1px solid var(--line); }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; break-inside: avoid; max-width: 100%; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: break-word; } td:last-child { padding-right: 0; }
thead th { font-size: .875rem; line-height: 1.3; vertical-align: bottom; }
tbody th { font-weight: 400; }
@media (min-width: 22.5rem) { .whole { white-space: nowrap; } }
.strip { display: inline-block; width: 2.5rem; height: 1.1rem; border: 1px solid var(--line); vertical-align: middle; }
.beside { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.beside > div { flex: 1 1 min(20rem, 100%); }
.word, figcaption b { overflow-wrap: anywhere; unicode-bidi: isolate; } /* also in a table; a word turns no other */
.samples { display: grid; grid-template-columns: repeat(2, 1fr); gap: 1.25rem .75rem; }
.samples img, .cards img { width: 100%; }
.samples img + img { margin-top: .4rem; }
.charts, .grids, .cards { display: grid; gap: 1.75rem 1.25rem; }
.charts > div { min-width: 0; break-inside: avoid; }
.cards figure { display: grid; grid-template-columns: 8rem 1fr; gap: .75rem; align-items: start; }
.bars { list-style: none; margin: .4rem 0 0; padding: 0; font-size: .875rem; line-height: 1.35; }
.bars li { display: grid; grid-template-columns: 1fr auto; column-gap: .5rem; margin-bottom: .35rem; }
.chance { font-variant-numeric: tabular-nums; white-space: nowrap; }
.true .chance { font-weight: 700; }
.track { grid-column: 1 / -1; background: #eef1f4; height: .5rem; print-color-adjust: exact; }
.bar { display: block; height: 100%; background: #93a1ac; }
.true .bar { background: var(--blue); }
.spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
pre { white-space: pre-wrap; font-size: .875rem; background: #f4f6f8; padding: .75rem; margin: 0 0 .75rem; }
.near { display: grid; grid-template-columns: repeat(3, 1fr); gap: .75rem; margin-bottom: 1.5rem; break-inside: avoid; }
.near img { width: 100%; }
.near .asked { grid-column: 1 / -1; max-width: 8rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 3px solid var(--blue); outline-offset: 2px; }
.scroll img { max-width: none; }
@media (min-width: 40rem) {
  .near { grid-template-columns: 1.2fr repeat(6, 1fr); }
  .near .asked { grid-column: auto; max-width: none; padding-right: 1rem; border-right: 1px solid var(--line); }
  .samples { grid-template-columns: repeat(4, 1fr); }
  .cards, .charts, .grids { grid-template-columns: repeat(2, 1fr); }
}
@media (min-width: 62rem) {
  .samples { grid-template-columns: repeat(8, 1fr); }
  .cards { grid-template-columns: repeat(4, 1fr); }
  .cards figure { grid-template-columns: 1fr; }
}
@media screen and (min-width: 75rem) {
  .pixelated { zoom: 2; } /* whole pixels only, so that all borders stay */
}
@media print { nav { display: none; } body { max-width: none; } .charts { display: block; }
  .scroll { overflow: visible; } .scroll img { max-width: 100%; } }
"""


@dataclass(frozen=True)
class Curve:
    """One line of a chart; `values` in the unit of the chart's vertical axis, one per step."""

    name: str
    steps: Sequence[int]
    values: Sequence[float]


def data_uri(data: bytes, kind: str) -> str:
    """The bytes of a `png` or `jpeg` file as the address of a picture."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def png(pixels: np.ndarray) -> bytes:
    """(height, width, 3) uint8 RGB → the bytes of a PNG file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def picture(data: bytes, kind: str, alt: str, style: str) -> str:
    """An <img> of a `png` or `jpeg` file at its own size, of the class `style`."""
    width, height = Image.open(io.BytesIO(data)).size
    size = f'width="{width}" height="{height}"'
    return f'<img class="{style}" src="{data_uri(data, kind)}" alt="{escape(alt)}" {size}>'


def seen_pixels(x: np.ndarray) -> np.ndarray:
    """One input of the network, (3, height, width) float32 in grey levels minus the mean → (height, width, 3) uint8."""
    return np.clip(np.rint(x.transpose(1, 2, 0) + MID_GREY), 0, 255).astype(np.uint8)


def grid(tiles: np.ndarray, columns: int = 6) -> np.ndarray:
    """(n, side, side, 3) uint8 → one picture (height, width, 3) uint8 of all, with white borders of 1 pixel."""
    columns = min(columns, len(tiles))
    rows, pitch = -(-len(tiles) // columns), tiles.shape[1] + 1
    whole = np.full((rows * pitch + 1, columns * pitch + 1, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * pitch + 1, i % columns * pitch + 1
        whole[top : top + pitch - 1, left : left + pitch - 1] = tile
    return whole


def gradient(low: np.ndarray, high: np.ndarray) -> str:
    """A strip from one colour to another; each (3,) in RGB grey levels, clipped to what a screen shows."""
    stops = ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in (_shown(colour) for colour in (low, high)))
    return f'<span class="strip" style="background: linear-gradient(to right, {stops})"></span>'


def _shown(colour: np.ndarray) -> list[int]:
    return [int(level) for level in np.clip(np.rint(colour), 0, 255)]


def bars(chances: np.ndarray, words: Sequence[str], label: int) -> str:
    """The five most probable of (classes,) probabilities as a list of bars; the class `label` is ticked and bold."""
    return f'<ol class="bars">{"".join(_bar(words[i], chances[i], i == label) for i in top(chances))}</ol>'


def _bar(word: str, chance: float, is_true: bool) -> str:
    percent = 100 * chance
    name = f'<b>✓ {escape(word)}</b> <span class="spoken">(the true label)</span>' if is_true else escape(word)
    kind = "true" if is_true else "other"
    return (
        f'<li class="{kind}"><span class="word">{name}</span> '
        f'<span class="chance">{percent:.1f} %</span>'
        f'<span class="track"><span class="bar" style="width: {percent:.2f}%"></span></span></li>'
    )


def pair(name: str, words: str, jpeg: bytes, x: np.ndarray) -> str:
    """A sample as stored and, beneath, as the network sees it: `x` (3, height, width) as for `seen_pixels`."""
    stored = picture(jpeg, "jpeg", f"{name}, {words}, as stored", "stored")
    seen = picture(png(seen_pixels(x)), "png", f"{name}, {words}, as the network sees it", "seen")
    return f"<figure>{stored}{seen}<figcaption>{escape(words)}</figcaption></figure>"


def prediction(name: str, jpeg: bytes, chances: np.ndarray, words: Sequence[str], label: int) -> str:
    """A picture beside its `bars`; `words` of every class, `label` −1: none."""
    true = words[label] if label >= 0 else "no label"
    missed = "" if label in top(chances) or label < 0 else " (not among these)"
    return (
        f"<figure>{picture(jpeg, 'jpeg', f'{name}, {true}', 'stored')}<div><figcaption>True label: "
        f"<b>{escape(true)}</b>{missed}</figcaption>{bars(chances, words, label)}</div></figure>"
    )


def near(name: str, jpeg: bytes, words: str, distance: float | None, same: bool) -> str:
    """A picture of a row of neighbours; `distance` None: what was looked for. `same`: it has that one's label."""
    mark = '✓ <span class="spoken">(the same label)</span>' if same else ""
    label = f"<b>{mark}{escape(words)}</b>" if same or distance is None else escape(words)
    how = "looked for" if distance is None else f"{distance:#.4g}".rstrip(".")
    style = "asked" if distance is None else "found"
    image = picture(jpeg, "jpeg", f"{name}, {words}", "stored")
    return f'<figure class="{style}">{image}<figcaption>{label}<br>{how}</figcaption></figure>'


def wide(data: bytes, name: str, alt: str) -> str:
    """A PNG at its own size, which scrolls where the page is narrower; the arrow keys scroll it, too."""
    image = picture(data, "png", alt, "whole-size")
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{image}</div>'


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first cell of a row is its head. `rows` are HTML, the rest is text."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = ""
    for first, *others in rows:
        body += f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>'
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def curves(lines: Sequence[dict[str, Any]]) -> str:
    """Charts of the lines of metrics.jsonl: the losses and, where there was a validation, its errors."""

    def curve(kind: str, key: str, name: str) -> Curve:
        mine = [line for line in lines if line["kind"] == kind]
        return Curve(name, [line["step"] for line in mine], [line[key] for line in mine])

    losses = [curve("train", "loss", "training"), curve("validation", "nll", "validation")]
    errors = [curve("validation", "top1_error", "top-1"), curve("validation", "top5_error", "top-5")]
    charts = _chart("losses", "Loss", "loss (nats per image)", losses, with_library=True)
    if errors[0].steps:
        charts += _chart("errors", "Validation error", "error (% of images)", errors)
    if ratios := _ratios([line for line in lines if line["kind"] == "train" and "layers" in line]):
        charts += _chart("updates", "Updates", "mean |update| / mean |weight|", ratios, log=True)
    return charts


def _ratios(lines: Sequence[dict[str, Any]]) -> list[Curve]:
    """Each layer's ratio of update to weight, where it is above zero: a frozen layer's is not."""
    found = []
    for name in dict.fromkeys(name for line in lines for name in line["layers"]):
        mine = [(line["step"], line["layers"][name]["ratio"]) for line in lines if name in line["layers"]]
        steps, values = zip(*[(step, ratio) for step, ratio in mine if ratio > 0] or [((), ())])
        found += [Curve(name, steps, values)] if steps else []
    return found


def _chart(
    name: str, title: str, unit: str, lines: Sequence[Curve], with_library: bool = False, log: bool = False
) -> str:
    """A chart over the steps of a run; `name` is its id, `unit` the title of its vertical axis.

    `with_library` puts plotly.js (5 MB) before it: once per page, at the first chart.
    """
    axis = {"gridcolor": "#e3e8ec", "linecolor": "#8a959e", "ticks": "outside", "automargin": True, "fixedrange": True}
    scale = {"type": "log", "dtick": 1, "exponentformat": "power"} if log else {"rangemode": "tozero"}
    layout = {
        "template": "none",
        "font": {"family": FONT, "size": 13, "color": "#1c2733"},
        "margin": {"l": 60, "r": 16, "t": 36, "b": 50},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hovermode": "x unified",
        "dragmode": False,
        "showlegend": True,
        "xaxis": axis | {"title": "step (updates)", "rangemode": "tozero"},
        "yaxis": axis | {"title": unit} | scale,
    }
    html = go.Figure([_trace(line, *LINES[i % len(LINES)]) for i, line in enumerate(lines)], layout).to_html(
        config={"responsive": True, "displayModeBar": False},
        include_plotlyjs=with_library,
        full_html=False,
        default_height="340px",
        div_id=name,
    )
    courses = "; ".join(_course(line) for line in lines if line.steps)
    chart = f'<div class="chart" role="img" aria-label="{escape(f"{title}, {unit}: {courses}")}">{html}</div>'
    return f"<div><h3>{title}</h3>{chart}</div>"


def _course(line: Curve) -> str:
    first, last = (f"{line.values[i]:.4g} at step {line.steps[i]}" for i in (0, -1))
    return f"{line.name} from {first} to {last}"


def _trace(curve: Curve, colour: str, dash: str, symbol: str) -> go.Scatter:
    return go.Scatter(
        x=list(curve.steps),
        y=list(curve.values),
        name=curve.name,
        mode="lines+markers" if len(curve.steps) <= 100 else "lines",
        line={"color": colour, "dash": dash, "width": 2},
        marker={"symbol": symbol, "size": 7},
        hovertemplate="%{y:.4g}",
    )

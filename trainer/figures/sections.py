"""Make the sections of the page, each a fragment of HTML that needs nothing from outside."""

import base64
import io
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from math import nan
from statistics import median

import numpy as np
import plotly.graph_objects as go
from PIL import Image

from pipeline.manifest import Manifest
from pipeline.online.samples import SampleReader
from trainer import data as feed
from trainer import recipe as recipes
from trainer.figures.drawing import png
from trainer.figures.gather import FigureData
from trainer.figures.sheets import distance, measured
from trainer.layers import plan
from trainer.probabilities import top

TRAINING_SAMPLES, CONFUSED = 16, 8  # the numbers shown
NO_VALIDATION = "<p>The data set has no images in val.</p>"
MID_GREY = 128  # grey levels: added to an input, whose mean is about zero, to show it
FEW = 100  # points of a curve, up to which they are marked
COLOURS = ("#1f5f8b", "#b4530f", "#3b7d3b", "#7a3e9d", "#1c2733", "#8a6d00", "#0f7f86", "#a6243c")
DASHES = ("solid", "dash", "dot", "dashdot")  # curves are told apart without colour, too
SYMBOLS = ("circle", "diamond", "square", "cross", "x", "triangle-up", "triangle-down", "star")
AXIS = {"gridcolor": "#e3e8ec", "linecolor": "#8a959e", "ticks": "outside", "automargin": True, "fixedrange": True}
LAYOUT = {
    "template": "none",
    "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1c2733"},
    "margin": {"l": 60, "r": 16, "t": 36, "b": 50},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    "hovermode": "x unified",
    "dragmode": False,
    "showlegend": True,
    "xaxis": AXIS | {"title": "step (updates)", "rangemode": "tozero"},
}


def facts(data: FigureData) -> str:
    """Return the list of what the run was given, and its speed."""
    dataset, checkpoint = data.dataset, data.checkpoint
    model, train = checkpoint.recipe.model, checkpoint.recipe.train
    layers = ", ".join(f"{layer.name} {layer.width:,}" for layer in plan(model, len(checkpoint.classes)))
    samples = ", ".join(f"{split.samples:,} {escape(name)}" for name, split in dataset.splits.items())
    times = [line["time"] for line in data.lines if line["kind"] == "train"]
    speed, stall = (median([time[key] for time in times] or [nan]) for key in ("images_per_second", "stall"))
    measured_speed = f"{speed:,.0f} images/s, stall {100 * stall:.1f} % of the time (medians over the training log)"
    rows = {
        "Data set": f"{escape(dataset.root.resolve().name)}: {samples} samples, {len(dataset.classes):,} classes, "
        f"identity <code>{dataset.identity[:12]}</code>",
        "Network": f"{layers} maps or units, {model.columns} column{'s together' if model.columns > 1 else ''}",
        "Training": f"{checkpoint.step:,} of {checkpoint.progress['steps']:,} steps of {train.batch_size} images, "
        f"seed {train.seed}",
        "Speed": measured_speed if times else "not recorded",
    }
    body = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in rows.items())
    return f'<dl class="facts">{body}</dl>'


def errors(data: FigureData, command: list[str]) -> str:
    """Return the tables of `evaluate`'s results; `command` is that of an evaluation."""
    evaluation, checkpoint = data.evaluation, data.checkpoint
    if evaluation is None:
        hint = f"<p>Not evaluated yet; the command is <code>{escape(shlex.join(command))}</code></p>"
        return hint if _validated(data.dataset) else NO_VALIDATION
    images, step = evaluation["centre"]["samples"], evaluation["step"]
    caption = f"Errors on the split {evaluation['split']} ({images:,} images) at step {step:,}"
    if (step, evaluation["dataset"]) != (checkpoint.step, checkpoint.dataset):
        caption += f"; out of date, the newest checkpoint is that of step {checkpoint.step:,}: evaluate again"
    rows = []
    for name, key in (("centre view", "centre"), ("ten views", "ten")):
        rates = (f"{evaluation[key][rate]:.1f}&nbsp;%" for rate in ("top1_error", "top5_error"))
        rows.append([name, *rates, f"{evaluation[key]['nll']:.3f}"])
    tables = table(caption, ("view", "top-1 error", "top-5 error", "negative log-likelihood, nats"), rows)
    if confused := evaluation["confused"][:CONFUSED]:
        word = '<span class="word">{}</span>'
        rows = [[*(word.format(escape(data.words(i))) for i in pair), f"{images:,}"] for *pair, images in confused]
        heads = ("true label", "taken for", "images")
        tables += f"</div><div>{table('Confused most often, by the ten views', heads, rows)}"
    return f'<div class="beside"><div>{tables}</div></div>'


def sheet(data: FigureData, sheets: Mapping[str, bytes], name: str) -> str:
    """Return the PNG sheet `name` with a text for those who cannot see it, or why there is none."""
    if name in data.lacking:
        return f"<p>{escape(data.lacking[name])}</p>"
    note = "<p>Only images that the network gets wrong.</p>" if name == "predictions" and data.only_errors else ""
    alt = ALTS[name](data) if name in ALTS else AUGMENTATION
    return note + picture(sheets[name], "png", alt, "sheet")


def _kernels(data: FigureData) -> str:
    assert data.kernels is not None
    columns, side = data.checkpoint.recipe.model.columns, data.kernels.shape[-1]
    parts = [f"column {i}: {measured(part)}" for i, part in enumerate(np.split(data.kernels, columns))]
    return f"The {len(data.kernels)} kernels of {side} × {side} weights of the first layer; {'; '.join(parts)}"


def _predictions(data: FigureData) -> str:
    texts = []
    for one in data.examples:
        guesses = (f"{data.words(i)} {100 * one.probabilities[i]:.1f} %" for i in top(one.probabilities))
        texts.append(f"{data.split} sample {one.id} ({data.words(one.label)}) is taken for {', '.join(guesses)}")
    return "; ".join(texts)


def _neighbours(data: FigureData) -> str:
    texts = []
    for query, found in data.similar:
        near = ", ".join(f"{one.id} ({data.words(one.label)}) at {distance(one)}" for one in found)
        texts.append(f"nearest to {data.split} sample {query.id} ({data.words(query.label)}): training samples {near}")
    return "; ".join(texts)


ALTS = {"kernels": _kernels, "predictions": _predictions, "neighbours": _neighbours}
AUGMENTATION = "One training picture: random crops of it, some mirrored, and its centre in the lightings of six epochs"

Curves = dict[str, list[tuple[int, float]]]  # by name: the points of a curve, which are (step, value)


def curves(data: FigureData) -> str:
    """Return charts of losses, errors and updates over the steps; a curve without points is left out."""
    train, validation = ([line for line in data.lines if line["kind"] == kind] for kind in ("train", "validation"))
    nll, top1, top5 = (
        [(line["step"], line[key]) for line in validation] for key in ("nll", "top1_error", "top5_error")
    )
    loss, updates = [(line["step"], line["loss"]) for line in train], Curves()
    for line in train:
        for name, layer in line.get("layers", {}).items():
            if layer["ratio"] > 0:  # a frozen layer's is not, and a logarithmic axis needs it
                updates.setdefault(name, []).append((line["step"], layer["ratio"]))
    html = ""
    for name, title, unit, lines in (
        ("losses", "Loss", "loss (nats per image)", {"training": loss, "validation": nll}),
        ("errors", "Validation error", "error (% of images)", {"top-1": top1, "top-5": top5}),
        ("updates", "Updates", "mean |update| / mean |weight|", updates),
    ):
        if drawn := {curve: points for curve, points in lines.items() if points}:
            html += _chart(name, title, unit, drawn, with_library=not html)
    if not html:
        return "<p>No steps are recorded.</p>"
    note = "<p>Training is measured with dropout on random views, validation without, on the centre view.</p>"
    return f'{note if _validated(data.dataset) else NO_VALIDATION}<div class="charts">{html}</div>'


def _chart(name: str, title: str, unit: str, lines: Curves, with_library: bool) -> str:
    """Return a chart over the steps of a run; `name` is its id, `unit` the title of its vertical axis.

    `with_library` puts plotly.js (5 MB) before it: once per page, at the first chart.
    """
    log = {"type": "log", "dtick": 1, "exponentformat": "power"}
    layout = LAYOUT | {
        "yaxis": AXIS | {"title": unit, "hoverformat": ".4g"} | (log if name == "updates" else {"rangemode": "tozero"})
    }
    traces = []
    for i, (curve, points) in enumerate(lines.items()):
        steps, values = zip(*points)
        mode = "lines+markers" if len(points) <= FEW else "lines"
        line = {"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i % len(DASHES)], "width": 2}
        marker = {"symbol": SYMBOLS[i % len(SYMBOLS)], "size": 7}
        traces.append(go.Scatter(x=steps, y=values, name=curve, mode=mode, line=line, marker=marker))
    html = go.Figure(traces, layout).to_html(
        config={"responsive": True, "displayModeBar": False},
        include_plotlyjs=with_library,
        full_html=False,
        default_height="340px",
        div_id=name,
    )
    courses = "; ".join(
        f"{curve} from {points[0][1]:.4g} at step {points[0][0]} to {points[-1][1]:.4g} at step {points[-1][0]}"
        for curve, points in lines.items()
    )
    chart = f'<div class="chart" role="img" aria-label="{escape(f"{title}, {unit}: {courses}")}">{html}</div>'
    return f"<div><h3>{title}</h3>{chart}</div>"


def mean(data: FigureData) -> str:
    """Return the mean image, and the components of the colours."""
    dataset = data.dataset
    statistics = dataset.statistics()
    colour, deviations = statistics.mean_color, np.sqrt(np.maximum(statistics.eigenvalues, 0.0))
    image = picture((dataset.root / "mean.png").read_bytes(), "png", "The mean of the training images", "mean")
    rows = []
    for i, (deviation, along) in enumerate(zip(deviations, statistics.eigenvectors.T), 1):
        strip = gradient(colour - deviation * along, colour + deviation * along)
        cells = (f"{i} {strip}", f"{deviation:.1f}", ", ".join(f"{part:.2f}".replace("-", "−") for part in along))
        rows.append([f'<span class="whole">{cell}</span>' for cell in cells])
    caption = "Principal components of the pixels’ colours; each strip ends one standard deviation off the mean colour"
    heads = ("no.", "standard deviation, grey levels", "direction (R, G, B)")
    levels = ", ".join(f"{level:.1f}" for level in colour)
    return (
        f'<div class="beside"><figure>{image}<figcaption>Mean of {statistics.n:,} training images</figcaption></figure>'
        f"<div><p>{gradient(colour, colour)} Mean colour: {levels} grey levels of red, green and blue</p>"
        f"{table(caption, heads, rows)}</div></div>"
    )


def training_samples(data: FigureData) -> str:
    """Return the first samples of the run's first batch: as stored, and as the network saw them in the first epoch."""
    dataset, recipe = data.dataset, data.checkpoint.recipe
    side, view = dataset.recipe.size, recipe.model.size
    with feed.training(dataset, recipe, batch_size=TRAINING_SAMPLES) as loader:
        batch = next(loader)
    with SampleReader(dataset, "train") as reader:
        jpegs = reader.read(batch.ids)
    cards = ""
    for number, jpeg, label, x in zip(batch.ids, jpegs, batch.labels.tolist(), batch.images.numpy()):
        pixels = np.clip(np.rint(x.transpose(1, 2, 0) + MID_GREY), 0, 255).astype(np.uint8)
        name, words = f"Training sample {number}", data.words(label)
        stored = picture(jpeg.tobytes(), "jpeg", f"{name}, {words}, as stored", "stored")
        seen = picture(png(Image.fromarray(pixels)), "png", f"{name}, {words}, as the network sees it", "seen")
        cards += f"<figure>{stored}{seen}<figcaption>{escape(words)}</figcaption></figure>"
    return (
        f"<p>Above, each sample as it is stored ({side} × {side} pixels, JPEG). Beneath, as the network sees it in the "
        f"first epoch: a random view of {view} × {view} pixels, {_treated(recipe)}. To show it, {MID_GREY} grey levels "
        f'are added, and what falls outside 0 to 255 is clipped.</p><div class="samples">{cards}</div>'
    )


def _treated(recipe: recipes.Recipe) -> str:
    lit = recipe.data.lighting != "off" and recipe.data.lighting_until > 0
    return (
        f"mirrored or not, minus the mean {'colour' if recipe.data.mean == 'colour' else 'image'}"
        f"{', with its colours shifted (lighting)' if lit else ''}"
        f"{' and divided by 1.1' if lit and recipe.data.lighting == 'code' else ''}"
    )


def picture(data: bytes, kind: str, alt: str, style: str) -> str:
    """Return an <img> of a `png` or `jpeg` file at its own size, of the class `style`."""
    width, height = Image.open(io.BytesIO(data)).size
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return f'<img class="{style}" src="{source}" alt="{escape(alt)}" width="{width}" height="{height}">'


def gradient(low: np.ndarray, high: np.ndarray) -> str:
    """Return a strip from one colour to another; each (3,) in RGB grey levels, clipped to what a screen shows."""
    colours = (np.clip(np.rint(colour), 0, 255).astype(int).tolist() for colour in (low, high))
    stops = ", ".join("rgb({}, {}, {})".format(*colour) for colour in colours)
    return f'<span class="strip" style="background: linear-gradient(to right, {stops})"></span>'


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first cell of a row is its head. `rows` are HTML, the rest is text."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = ""
    for first, *others in rows:
        body += f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>'
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _validated(dataset: Manifest) -> bool:
    return "val" in dataset.splits and dataset.splits["val"].samples > 0

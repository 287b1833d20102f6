"""python -m trainer figures: the sheets RUN/figures/*.png, and the page RUN/report.html, which needs no network."""

import base64
import io
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from importlib import metadata
from pathlib import Path
from statistics import median
from string import Template

import click
import numpy as np
import torch
from nvidia import dali
from PIL import Image

from pipeline import UserError, manifest, volumes
from pipeline.cli import Command
from pipeline.files import write_bytes_aside
from pipeline.online import augment
from pipeline.online.samples import SampleReader
from trainer import checkpoint as checkpoints
from trainer import data as loaders
from trainer.checkpoint import load_network
from trainer.devices import choose_devices
from trainer.figures import kernels, sheets
from trainer.figures.gather import FigureData, commands, gather, has_images
from trainer.layers import plan
from trainer.options import DATA, DEVICES, RUN
from trainer.pictures import pixels
from trainer.probabilities import top

FOLDER, FILE_NAME = "figures", "report.html"
TRAINING_SAMPLES, CONFUSED = 16, 8  # the numbers shown
MID_GREY = 128  # grey levels: added to an input, whose mean is about zero, to show it
NO_VALIDATION = "<p>The data set has no images in val.</p>"
FEW = 100  # points of a curve, up to which they are marked
DASHES = ("solid", "dash", "dot", "dashdot")  # curves are told apart without colour, too
AXIS = {"gridcolor": "#e3e8ec", "showgrid": True, "automargin": True, "fixedrange": True}
LAYOUT = {
    "template": "simple_white",
    "font": {"family": "system-ui, sans-serif", "size": 13},
    "margin": {"l": 60, "r": 16, "t": 36, "b": 50},
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    "colorway": sheets.COLOURS,
    "hovermode": "x unified",
    "dragmode": False,
    "showlegend": True,
    "xaxis": AXIS | {"title": "step (updates)", "rangemode": "tozero"},
}


@click.command(cls=Command)
@RUN
@DATA
@click.option("--split", help="The split whose images are shown with predictions.  [default: val]")
@click.option("--only-errors", is_flag=True, help="Show images that the network gets wrong.")
@DEVICES
def figures(run: Path, data: Path, split: str | None, only_errors: bool, devices: str | None) -> None:
    """Draw RUN/figures/*.png and the page RUN/report.html.

    Kernels of the first layer (Figure 3 of the paper), predictions and nearest training images (Figure 4), crops and
    lighting of one picture; the page adds curves of loss, error and updates.
    """
    if split is not None:
        manifest.load(data).split(split)
    placement = choose_devices(devices, checkpoints.load(run).recipe.model.columns)
    for line in draw(data, run, placement, split or "val", only_errors):
        click.echo(line)


def draw(
    data: Path, run: Path, devices: tuple[torch.device, ...], split: str = "val", only_errors: bool = False
) -> list[str]:
    """Draw all figures of a run; a sheet that nothing is known for is deleted.

    Returns:
        A line for each sheet that was not written, with the reason, and the files written, the page last.
    Raises:
        UserError: as `gather`; a sample is damaged; a file cannot be written.
    """
    checkpoint, dataset = checkpoints.load(run), manifest.load(data)
    content = gather(run, dataset, load_network(checkpoint, dataset, devices, run), checkpoint, split, only_errors)
    draws = {
        "kernels": lambda: kernels.sheet(np.asarray(content.kernels), checkpoint.recipe.model.columns),
        "predictions": lambda: sheets.predictions(content.examples, content.words),
        "neighbours": lambda: sheets.neighbours(content.similar, content.words),
        "augmentation": lambda: _augmentation(content),
    }
    drawn = {name: sheets.png(draw_sheet()) for name, draw_sheet in draws.items() if name not in content.lacking}
    files = {run / FOLDER / f"{name}.png": sheet for name, sheet in drawn.items()}
    files[run / FILE_NAME] = page(content, drawn).encode(errors="replace")
    try:
        for name in content.lacking:
            (run / FOLDER / f"{name}.png").unlink(missing_ok=True)
        for path, file in files.items():
            write_bytes_aside(path, file)
    except OSError as error:
        raise UserError(volumes.explained(error)) from error  # such as a full disk, which ends no training run
    return [*(f"no {name}.png: {reason}" for name, reason in content.lacking.items()), *map(str, files)]


def page(data: FigureData, drawn: Mapping[str, bytes]) -> str:
    """Return the page; `drawn` has the PNG sheets by name."""
    lines, sheet = commands(data), partial(_sheet, data, drawn)
    parts = {
        "Result": _facts(data) + _errors(data, lines["evaluate"]),
        "Validation images" if data.split == "val" else f"Images of {data.split}": sheet("predictions"),
        "Similar training images": sheet("neighbours"),
        "First-layer kernels": sheet("kernels"),
        "Curves": curves(data),
        "Mean image and colours": _mean(data),
        "Training samples": _training_samples(data),
        "Augmentation": sheet("augmentation"),
    }
    links = body = ""
    for name, content in parts.items():
        anchor = name.lower().replace(" ", "-")
        links += f'<li><a href="#{anchor}">{name}</a></li>'
        body += f'<section id="{anchor}"><h2>{name}</h2>{content}</section>\n'
    versions = [f"penstock {metadata.version('penstock-imagenet')}", f"torch {torch.__version__}"]
    versions += [f"DALI {dali.__version__}", f"pillow-simd {Image.__version__}"]
    return Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"AlexNet, run {data.run}"),
        links=links,
        body=body,
        commands=escape("\n".join(map(shlex.join, lines.values()))),
        versions=escape(", ".join(versions)),
    )


def _sheet(data: FigureData, drawn: Mapping[str, bytes], name: str) -> str:
    """Return the PNG sheet `name` with a text for those who cannot see it, or why there is none."""
    if name in data.lacking:
        return f"<p>{escape(data.lacking[name])}</p>"
    note = "<p>Only images that the network gets wrong.</p>" if name == "predictions" and data.only_errors else ""
    return note + _picture(drawn[name], "png", _alternative_text(data, name), "sheet")


def _alternative_text(data: FigureData, name: str) -> str:
    """Return in words what a sheet shows."""
    texts = []
    if name == "augmentation":
        return "One training picture: random crops of it, some mirrored, and its centre in the lightings of six epochs"
    if name == "kernels":
        weights = np.asarray(data.kernels)
        texts = [f"The {len(weights)} kernels of {weights.shape[2]} × {weights.shape[3]} weights of the first layer"]
        columns = np.split(weights, data.checkpoint.recipe.model.columns)
        texts += [f"column {i}: {kernels.measured(column)}" for i, column in enumerate(columns)]
    for one in data.examples if name == "predictions" else ():
        guesses = ", ".join(f"{data.words(i)} {100 * one.probabilities[i]:.1f} %" for i in top(one.probabilities))
        texts.append(f"{data.split} sample {one.id} ({data.words(one.label)}) is taken for {guesses}")
    for query, near in data.similar if name == "neighbours" else ():
        training = ", ".join(f"{one.id} ({data.words(one.label)}) at {sheets.distance(one)}" for one in near)
        words = data.words(query.label)
        texts.append(f"nearest to {data.split} sample {query.id} ({words}): training samples {training}")
    return "; ".join(texts)


def _facts(data: FigureData) -> str:
    """Return the list of what the run was given, and its speed."""
    dataset, checkpoint = data.dataset, data.checkpoint
    model, train = checkpoint.recipe.model, checkpoint.recipe.train
    layers = ", ".join(f"{layer.name} {layer.width:,}" for layer in plan(model, len(checkpoint.classes)))
    samples = ", ".join(f"{split.samples:,} {escape(name)}" for name, split in dataset.splits.items())
    speed = "not recorded"
    if times := [line["time"] for line in data.lines if line["kind"] == "train"]:
        images, stall = (median(time[key] for time in times) for key in ("images_per_second", "stall"))
        speed = f"{images:,.0f} images/s, stall {100 * stall:.1f} % of the time (medians over the training log)"
    rows = {
        "Data set": f"{escape(dataset.root.resolve().name)}: {samples} samples, {len(dataset.classes):,} classes, "
        f"identity <code>{dataset.identity[:12]}</code>",
        "Network": f"{layers} maps or units, {model.columns} column{'s together' if model.columns > 1 else ''}",
        "Training": f"{checkpoint.step:,} of {checkpoint.progress['steps']:,} steps of {train.batch_size} images, "
        f"seed {train.seed}",
        "Speed": speed,
    }
    return (
        f'<dl class="facts">{"".join(f"<div><dt>{name}</dt><dd>{row}</dd></div>" for name, row in rows.items())}</dl>'
    )


def _errors(data: FigureData, command: list[str]) -> str:
    """Return the tables of `evaluate`'s results; `command` is that of an evaluation."""
    evaluation, checkpoint = data.evaluation, data.checkpoint
    if evaluation is None:
        hint = f"<p>Not evaluated yet; the command is <code>{escape(shlex.join(command))}</code></p>"
        return hint if has_images(data.dataset, "val") else NO_VALIDATION
    images, step = evaluation["centre"]["samples"], evaluation["step"]
    caption = f"Errors on the split {evaluation['split']} ({images:,} images) at step {step:,}"
    if (step, evaluation["dataset"]) != (checkpoint.step, checkpoint.dataset):
        caption += f"; out of date, the newest checkpoint is that of step {checkpoint.step:,}: evaluate again"
    rows = []
    for name, key in (("centre view", "centre"), ("ten views", "ten")):
        rates = (f"{evaluation[key][rate]:.1f}&nbsp;%" for rate in ("top1_error", "top5_error"))
        rows.append([name, *rates, f"{evaluation[key]['nll']:.3f}"])
    tables = _table(caption, ("view", "top-1 error", "top-5 error", "negative log-likelihood, nats"), rows)
    if confused := evaluation["confused"][:CONFUSED]:
        word = '<span class="word">{}</span>'
        rows = []
        for pair in confused:
            labels = (word.format(escape(data.words(pair[key]))) for key in ("true", "predicted"))
            rows.append([*labels, f"{pair['images']:,}"])
        heads = ("true label", "taken for", "images")
        tables += f"</div><div>{_table('Confused most often, by the ten views', heads, rows)}"
    return f'<div class="beside"><div>{tables}</div></div>'


def curves(data: FigureData) -> str:
    """Return charts of losses, errors and updates over the steps; a curve without points is left out."""

    def points(kind: str, key: str) -> list[tuple[int, float]]:
        return [(line["step"], line[key]) for line in data.lines if line["kind"] == kind]

    updates: dict[str, list[tuple[int, float]]] = {}
    for line in data.lines:
        for name, layer in line.get("layers", {}).items():
            if layer["ratio"] > 0:  # the axis is logarithmic, and the update of a layer that stands still is 0
                updates.setdefault(name, []).append((line["step"], layer["ratio"]))
    losses = {"training": points("train", "loss"), "validation": points("validation", "nll")}
    errors = {"top-1": points("validation", "top1_error"), "top-5": points("validation", "top5_error")}
    html = ""
    for name, title, unit, lines in (
        ("losses", "Loss", "loss (nats per image)", losses),
        ("errors", "Validation error", "error (% of images)", errors),
        ("updates", "Updates", "mean |update| / mean |weight|", updates),
    ):
        if drawn := {curve: course for curve, course in lines.items() if course}:
            html += _chart(name, title, unit, drawn, with_library=not html)
    if not html:
        return "<p>No steps are recorded.</p>"
    note = "<p>Training is measured with dropout on random views, validation without, on the centre view.</p>"
    return f'{note if has_images(data.dataset, "val") else NO_VALIDATION}<div class="charts">{html}</div>'


def _chart(name: str, title: str, unit: str, lines: dict[str, list[tuple[int, float]]], with_library: bool) -> str:
    """Return a chart of curves, each (step, value) by name; `with_library` puts plotly.js (5 MB) before it."""
    import plotly.graph_objects as go  # here, because it takes long to import

    axis = {"type": "log", "dtick": 1, "exponentformat": "power"} if name == "updates" else {"rangemode": "tozero"}
    traces, courses = [], []
    for i, (curve, points) in enumerate(lines.items()):
        steps, values = zip(*points)
        mode = "lines+markers" if len(points) <= FEW else "lines"
        style = {"line_dash": DASHES[i % len(DASHES)], "marker_symbol": i, "marker_size": 7}
        traces.append(go.Scatter(x=steps, y=values, name=curve, mode=mode, **style))
        courses.append(f"{curve} from {values[0]:.4g} at step {steps[0]} to {values[-1]:.4g} at step {steps[-1]}")
    html = go.Figure(traces, LAYOUT | {"yaxis": AXIS | {"title": unit, "hoverformat": ".4g"} | axis}).to_html(
        config={"responsive": True, "displayModeBar": False},
        include_plotlyjs=with_library,
        full_html=False,
        default_height="340px",
        div_id=name,
    )
    label = escape(f"{title}, {unit}: {'; '.join(courses)}")
    return f'<div><h3>{title}</h3><div class="chart" role="img" aria-label="{label}">{html}</div></div>'


def _mean(data: FigureData) -> str:
    """Return the mean image, and the components of the colours."""
    statistics = data.dataset.statistics()
    colour, deviations = statistics.mean_color, np.sqrt(np.maximum(statistics.eigenvalues, 0.0))
    image = _picture((data.dataset.root / "mean.png").read_bytes(), "png", "The mean of the training images", "mean")
    rows = []
    for i, (deviation, along) in enumerate(zip(deviations, statistics.eigenvectors.T), 1):
        strip = _gradient(colour - deviation * along, colour + deviation * along)
        cells = (f"{i} {strip}", f"{deviation:.1f}", ", ".join(f"{part:.2f}".replace("-", "−") for part in along))
        rows.append([f'<span class="whole">{cell}</span>' for cell in cells])
    caption = "Principal components of the pixels’ colours; each strip ends one standard deviation off the mean colour"
    heads = ("no.", "standard deviation, grey levels", "direction (R, G, B)")
    levels = ", ".join(f"{level:.1f}" for level in colour)
    return (
        f'<div class="beside"><figure>{image}<figcaption>Mean of {statistics.n:,} training images</figcaption></figure>'
        f"<div><p>{_gradient(colour, colour)} Mean colour: {levels} grey levels of red, green and blue</p>"
        f"{_table(caption, heads, rows)}</div></div>"
    )


def _training_samples(data: FigureData) -> str:
    """Return the first samples of the run's first batch: as stored, and as the network saw them in the first epoch."""
    dataset, recipe = data.dataset, data.checkpoint.recipe
    side, view = dataset.recipe.size, recipe.model.size
    with loaders.training(dataset, recipe, batch_size=TRAINING_SAMPLES) as loader:
        batch = next(loader)
    with SampleReader(dataset, "train") as reader:
        jpegs = reader.read(batch.ids)
    cards = ""
    for number, jpeg, label, x in zip(batch.ids, jpegs, batch.labels.tolist(), batch.images.numpy()):
        levels = np.clip(np.rint(x.transpose(1, 2, 0) + MID_GREY), 0, 255).astype(np.uint8)
        name, words = f"Training sample {number}", data.words(label)
        stored = _picture(jpeg.tobytes(), "jpeg", f"{name}, {words}, as stored", "stored")
        seen = _picture(sheets.png(Image.fromarray(levels)), "png", f"{name}, {words}, as the network sees it", "seen")
        cards += f"<figure>{stored}{seen}<figcaption>{escape(words)}</figcaption></figure>"
    lit = recipe.data.lighting != "off" and recipe.data.lighting_until > 0
    treated = f"minus the mean {'colour' if recipe.data.mean == 'colour' else 'image'}"
    treated += ", with its colours shifted (lighting)" if lit else ""
    treated += " and divided by 1.1" if lit and recipe.data.lighting == "code" else ""
    return (
        f"<p>Above, each sample as it is stored ({side} × {side} pixels, JPEG). Beneath, as the network sees it in the "
        f"first epoch: a random view of {view} × {view} pixels, mirrored or not, {treated}. To show it, {MID_GREY} "
        f'grey levels are added, and what falls outside 0 to 255 is clipped.</p><div class="samples">{cards}</div>'
    )


def _augmentation(data: FigureData) -> Image.Image:
    """Return the sheet of the first training image."""
    recipe, keys = data.checkpoint.recipe, data.checkpoint.recipe.data
    lighting = keys.lighting if keys.lighting_until > 0 else "off"
    options = augment.Transform(
        view=recipe.model.size, mean=keys.mean, lighting=lighting, positions=keys.positions, crop_chunk=keys.crop_chunk
    )
    with SampleReader(data.dataset, "train") as reader:
        stored = pixels(reader.read(np.zeros(1, np.int64))[0].tobytes())
    return sheets.augmentation(stored, options, data.dataset.statistics(), recipe.train.seed, sample=0)


def _picture(data: bytes, kind: str, alt: str, style: str) -> str:
    """Return an <img> of a `png` or `jpeg` file at its own size, of the class `style`."""
    width, height = Image.open(io.BytesIO(data)).size
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return f'<img class="{style}" src="{source}" alt="{escape(alt)}" width="{width}" height="{height}">'


def _gradient(low: np.ndarray, high: np.ndarray) -> str:
    """Return a strip from one colour to another; each (3,) in RGB grey levels, clipped to what a screen shows."""
    colours = (np.clip(np.rint(colour), 0, 255).astype(int).tolist() for colour in (low, high))
    stops = ", ".join("rgb({}, {}, {})".format(*colour) for colour in colours)
    return f'<span class="strip" style="background: linear-gradient(to right, {stops})"></span>'


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first cell of a row is its head. `rows` are HTML, the rest is text."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = ""
    for first, *others in rows:
        body += f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>'
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

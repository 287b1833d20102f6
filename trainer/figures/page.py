"""python -m trainer figures: the sheets RUN/figures/*.png, and the page RUN/report.html, which needs no network."""

import base64
import io
import shlex
from collections.abc import Mapping, Sequence
from math import floor, log10
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from jinja2 import StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from penstock import __version__
from pipeline import UserError, manifest, volumes
from pipeline.cli import Command, print_event, print_line, progress_bars
from pipeline.files import write_bytes_aside
from pipeline.online import augment
from pipeline.online.samples import SampleReader
from trainer import checkpoint as checkpoints
from trainer import data as loaders
from trainer.checkpoint import load_network
from trainer.devices import choose_devices
from trainer.figures import kernels, sheets
from trainer.figures.gather import FigureData, commands, gather, has_images, noting
from trainer.layers import plan
from trainer.options import DATA, DEVICES, JSON, RUN, require_writable
from trainer.pictures import pixels
from trainer.probabilities import top

FOLDER, FILE_NAME = "figures", "report.html"
TRAINING_SAMPLES = 16  # shown
MID_GREY = 128  # grey levels: added to an input, whose mean is about zero, to show it
FEW = 100  # points of a curve, up to which they are marked
TICKS = 9  # of a logarithmic axis, about, if every power of ten would be more
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

Points = list[tuple[int, float]]  # of a curve: step, value


class Chart(NamedTuple):
    """A chart; `label` is for those who cannot see it."""

    title: str
    label: str
    html: Markup


@click.command(cls=Command)
@RUN
@DATA
@click.option("--split", help="The split whose images are shown with predictions.  [default: val]")
@click.option("--only-errors", is_flag=True, help="Show images that the network gets wrong.")
@JSON
@DEVICES
def figures(run: Path, data: Path, split: str | None, only_errors: bool, as_json: bool, devices: str | None) -> None:
    """Draw RUN/figures/*.png and the page RUN/report.html.

    Kernels of the first layer (Figure 3 of the paper), predictions and nearest training images (Figure 4), crops and
    lighting of one picture; the page adds curves of loss, error and updates.
    """
    if split is not None:
        manifest.load(data).split(split)
    for name in (FILE_NAME, f"{FOLDER}/kernels.png"):
        require_writable(run / name)
    placement = choose_devices(devices, checkpoints.load(run).recipe.model.columns)
    lacking, files = draw(data, run, placement, split or "val", only_errors, as_json)
    for line in lacking:
        print_line(as_json, line)
    if as_json:
        print_event("done", files=files)
    else:
        click.echo("\n".join(files))


def draw(
    data: Path,
    run: Path,
    devices: tuple[torch.device, ...],
    split: str = "val",
    only_errors: bool = False,
    as_json: bool = False,
) -> tuple[list[str], list[str]]:
    """Draw all figures of a run; a sheet that nothing is known for is deleted. `as_json`: progress is for programs.

    Returns:
        A line for each figure that was not drawn, with the reason; and the files written, the page last.
    Raises:
        UserError: as `gather`; the device has too little memory; a file cannot be written.
    """
    checkpoint, dataset = checkpoints.load(run), manifest.load(data)
    try:
        with progress_bars(as_json) as show:
            network = load_network(checkpoint, dataset, devices, run)
            content = gather(run, dataset, network, checkpoint, split, only_errors, show)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{error.args[0].splitlines()[0]} Name other --devices") from error
    draws = {
        "kernels": lambda: kernels.sheet(np.asarray(content.kernels), checkpoint.recipe.model.columns),
        "predictions": lambda: sheets.predictions(content.examples, content.words),
        "neighbours": lambda: sheets.neighbours(content.similar, content.words),
        "augmentation": lambda: _augmentation(content),
    }
    drawn = {}
    for name in (name for name in draws if name not in content.lacking):
        with noting(content.lacking, name):
            drawn[name] = sheets.png(draws[name]())
    files = {run / FOLDER / f"{name}.png": sheet for name, sheet in drawn.items()}
    files[run / FILE_NAME] = page(content, drawn).encode(errors="replace")
    try:
        for name in draws.keys() - drawn.keys():
            (run / FOLDER / f"{name}.png").unlink(missing_ok=True)
        for path, file in files.items():
            write_bytes_aside(path, file)
    except OSError as error:
        raise UserError(volumes.explained(error)) from error  # such as a full disk, which ends no training run
    lacking = [f"no {name}{'.png' * (name in draws)}: {reason}" for name, reason in content.lacking.items()]
    return lacking, [str(path) for path in files]


def page(data: FigureData, drawn: Mapping[str, bytes]) -> str:
    """Return the page; `drawn` has the PNG sheets by name."""
    statistics, model = data.dataset.statistics(), data.checkpoint.recipe.model
    columns = [] if data.kernels is None else np.split(data.kernels, model.columns)
    samples: list[tuple[int, str, bytes, bytes]] = []
    with noting(data.lacking, "training samples"):
        samples = _training_samples(data)
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Template(template, autoescape=True, trim_blocks=True, undefined=StrictUndefined).render(
        data=data,
        drawn=drawn,
        commands={name: shlex.join(words) for name, words in commands(data).items()},
        layers=plan(model, len(data.checkpoint.classes)),
        steps=loaders.steps_of(data.dataset, data.checkpoint.recipe),
        times=[line["time"] for line in data.lines if line["kind"] == "train"],
        validated=has_images(data.dataset, "val"),
        charts=charts(data.lines),
        still=still(data.lines),
        statistics=statistics,
        components=list(zip(np.sqrt(np.maximum(statistics.eigenvalues, 0.0)), statistics.eigenvectors.T)),
        mean=sheets.png(Image.fromarray(np.rint(statistics.mean_image).astype(np.uint8))),
        samples=samples,
        mid_grey=MID_GREY,
        versions=f"penstock {__version__}, torch {torch.__version__}, pillow-simd {Image.__version__}",
        picture=_picture,
        top=top,
        distance=sheets.distance,
        measured=[kernels.measured(column) for column in columns],
        rgb=_rgb,
        median=lambda records, key: median(record[key] for record in records),
    )


def charts(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Return charts of losses, errors and updates over the steps of metrics.jsonl, but for those without points."""

    def points(kind: str, key: str) -> Points:
        return [(line["step"], line[key]) for line in lines if line["kind"] == kind and key in line]

    updates: dict[str, Points] = {}
    for line in lines:
        for name, layer in line.get("layers", {}).items():
            if layer["ratio"] > 0:  # the axis is logarithmic, and the update of a layer that stands still is 0
                updates.setdefault(name, []).append((line["step"], layer["ratio"]))
    losses = {"training": points("train", "loss"), "validation": points("validation", "nll")}
    errors = {"top-1": points("validation", "top1_error"), "top-5": points("validation", "top5_error")}
    errors["top-1 in training"] = points("train", "top1_error")
    drawn: list[Chart] = []
    for name, title, unit, curves in (
        ("losses", "Loss", "loss (nats per image)", losses),
        ("errors", "Error", "error (% of images)", errors),
        ("updates", "Updates", "mean |update| / mean |weight|", updates),
    ):
        if curves := {curve: course for curve, course in curves.items() if course}:
            drawn.append(_chart(name, title, unit, curves, with_library=not drawn))
    return drawn


def still(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the layers that metrics.jsonl knows, but for those that `charts` has a curve of updates for."""
    layers = [layer for line in lines for layer in line.get("layers", {}).items()]
    moving = {name for name, layer in layers if layer["ratio"] > 0}
    return [name for name in dict.fromkeys(name for name, _ in layers) if name not in moving]


def _chart(name: str, title: str, unit: str, curves: dict[str, Points], with_library: bool) -> Chart:
    """Return a chart of curves, each (step, value) by name; `with_library` puts plotly.js (5 MB) before it."""
    import plotly.graph_objects as go  # here, because it takes long to import

    axis: dict[str, Any] = {"rangemode": "tozero"}
    if name == "updates":
        decades = [floor(log10(value)) for points in curves.values() for _, value in points]
        low, high = min(decades), max(decades) + 1  # a range without a power of ten would have no ticks
        axis = {"type": "log", "range": [low - 0.1, high + 0.1], "dtick": 1 + (high - low) // TICKS}
        axis["exponentformat"] = "power"
    traces, courses = [], []
    for i, (curve, points) in enumerate(curves.items()):
        steps, values = zip(*points)
        mode = "lines+markers" if len(points) <= FEW else "lines"
        style = {"line_dash": DASHES[i % len(DASHES)], "marker_symbol": i, "marker_size": 7}
        traces.append(go.Scatter(x=steps, y=values, name=curve, mode=mode, **style))
        first, last = (f"{value:.4g} at step {step}" for step, value in (points[0], points[-1]))
        courses.append(f"{curve} from {first} to {last}" if len(points) > 1 else f"{curve} {first}")
    html = go.Figure(traces, LAYOUT | {"yaxis": AXIS | {"title": unit, "hoverformat": ".4g"} | axis}).to_html(
        config={"responsive": True, "displayModeBar": False},
        include_plotlyjs=with_library,
        full_html=False,
        default_height="340px",
        div_id=name,
    )
    return Chart(title, f"{title}, {unit}: {'; '.join(courses)}", Markup(html))


def _training_samples(data: FigureData) -> list[tuple[int, str, bytes, bytes]]:
    """Return the first samples of the run's first batch: id, words, the JPEG stored, a PNG of the network's view."""
    with loaders.training(data.dataset, data.checkpoint.recipe, batch_size=TRAINING_SAMPLES) as loader:
        batch = next(loader)
    with SampleReader(data.dataset, "train") as reader:
        jpegs = [jpeg.tobytes() for jpeg in reader.read(batch.ids)]
    levels = np.clip(np.rint(batch.images.numpy().transpose(0, 2, 3, 1) + MID_GREY), 0, 255).astype(np.uint8)
    views = [sheets.png(Image.fromarray(view)) for view in levels]
    return list(zip(batch.ids.tolist(), map(data.words, batch.labels.tolist()), jpegs, views))


def _augmentation(data: FigureData) -> Image.Image:
    """Return the sheet of the first training image."""
    recipe, keys = data.checkpoint.recipe, data.checkpoint.recipe.data
    lighting = keys.lighting if keys.lighting_until > 0 else "off"
    options = augment.ViewOptions(
        view=recipe.model.size,
        mean=keys.mean,
        lighting=lighting,
        positions=keys.positions,
        flips=keys.flips,
        crop_chunk=keys.crop_chunk,
    )
    with SampleReader(data.dataset, "train") as reader:
        stored = pixels(reader.read(np.zeros(1, np.int64))[0].tobytes(), data.dataset.recipe.size)
    return sheets.augmentation(stored, options, data.dataset.statistics(), recipe.train.seed, sample=0)


def _picture(file: bytes, kind: str, alt: str, style: str) -> Markup:
    """Return an <img> of a `png` or `jpeg` file at its own size, of the class `style`."""
    width, height = Image.open(io.BytesIO(file)).size
    source = f"data:image/{kind};base64,{base64.b64encode(file).decode('ascii')}"
    image = Markup('<img class="{}" src="{}" alt="{}" width="{}" height="{}">')
    return image.format(style, source, alt, width, height)


def _rgb(colour: np.ndarray) -> str:
    """Return the CSS of a colour (3,) in RGB grey levels, clipped to what a screen shows."""
    return "rgb({}, {}, {})".format(*np.clip(np.rint(colour), 0, 255).astype(int))

"""How a run went: its losses and errors, and how far each layer's weights moved, over its steps."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from trainer.figures.charts import Band, Line, chart
from trainer.figures.drawing import BLUE, COLOURS, ORANGE, heading, paragraph, stacked

PANEL = 380  # pixels high
EACH = 24  # pixels of height that a layer's name needs
# What the logs of cuda-convnet2, which print it too, show of networks that learn.
HEALTHY = Band("healthy: 1e-4 to 3e-3", 1e-4, 3e-3)

Lines = Sequence[dict[str, Any]]  # of metrics.jsonl, as trainer.metrics.read returns them


def curves(lines: Lines) -> Image.Image:
    """The losses of training and validation, and the errors of validation."""
    losses = [_line(lines, "train", "loss", "training {:.3g}", BLUE)]
    losses.append(_line(lines, "validation", "nll", "validation {:.3g}", ORANGE, dashed=True))
    errors = [_line(lines, "validation", "top1_error", "top-1 {:.1f} %", BLUE)]
    errors.append(_line(lines, "validation", "top5_error", "top-5 {:.1f} %", ORANGE, dashed=True))
    last = max((line["step"] for line in lines), default=1)
    return stacked(
        heading("Losses and errors"),
        chart("Loss, nats per image", losses, PANEL),
        chart("Error of validation on the centre view, % of images", errors, PANEL, steps=last),
        paragraph("Training is measured with dropout on random views, validation without, on the centre view."),
    )


def updates(lines: Lines) -> Image.Image:
    """The mean absolute update of a step over the mean absolute weight, of each layer, on a log axis."""
    trained = [line for line in lines if line["kind"] == "train" and "layers" in line]
    names = list(dict.fromkeys(name for line in trained for name in line["layers"]))
    drawn = []
    for i, name in enumerate(names):
        mine = [line for line in trained if name in line["layers"]]
        values = [line["layers"][name]["ratio"] for line in mine]
        steps = [line["step"] for line in mine]
        drawn.append(Line(name, steps, values, COLOURS[i % len(COLOURS)], dashed=i >= len(COLOURS)))
    height = max(560, EACH * len(names) + 120)
    return stacked(
        heading("Updates of the weights"),
        chart("Mean |update| of a step / mean |weight|", drawn, height, log=True, band=HEALTHY if drawn else None),
    )


def _line(lines: Lines, kind: str, key: str, name: str, colour: str, dashed: bool = False) -> Line:
    """The line of what is recorded under `key`; `name` has a place for the last value."""
    mine = [line for line in lines if line["kind"] == kind]
    values = [line[key] for line in mine]
    return Line(name.format(values[-1]) if values else "", [line["step"] for line in mine], values, colour, dashed)

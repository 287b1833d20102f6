"""Draw what training makes of one picture: the crops, mirror images and colours of a run's first epochs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pipeline.manifest import Statistics
from pipeline.online import augment
from trainer.figures import drawing
from trainer.figures.drawing import INK, MARGIN, SMALL, SOFT, TEXT, TITLE, WIDTH

EPOCHS, ACROSS, GAP = 6, 3, 16  # epochs shown, views in a row, pixels between two
SIDE = (WIDTH - 2 * MARGIN - (ACROSS - 1) * GAP) // ACROSS  # pixels, of the box of a view
STORED = 512  # pixels, of the box of the stored picture
TAG = 24  # pixels, of the number of a crop box
COLOURS = ("#1f5f8b", "#b4530f", "#3b7d3b", "#7a3e9d", "#00737a", "#a6195a")  # of the epochs


@dataclass(frozen=True)
class View:
    """A sample as training sees it in one epoch."""

    top: int  # pixels
    left: int
    mirrored: bool
    pixels: np.ndarray  # (view, view, 3) uint8: as cut, and mirrored
    shift: np.ndarray  # (3,) float32, grey levels of red, green and blue that lighting adds; 0 if there is none


def first_views(
    stored: np.ndarray, options: augment.Transform, statistics: Statistics, seed: int, sample: int
) -> list[View]:
    """Return the views of a sample in the first epochs: stored (size, size, 3) uint8, in a run with this seed.

    These are a run's own numbers, unless several samples share a crop (`crop_chunk`); the lighting, while it lasts.

    Raises:
        UserError: no view fits in the picture.
    """
    positions = augment.AlexNet(options, statistics, len(stored), seed).positions
    views = []
    for epoch in range(EPOCHS):
        draws = augment.draw(seed, epoch, np.array([sample]), positions)
        (top, left), mirrored = draws.crop[0].tolist(), bool(draws.flip[0])
        lighting = augment.lighting_shift(draws.normals, statistics, options.lighting)[0]
        shift = lighting if options.lit(0) else np.zeros_like(lighting)
        view = augment.reference_view(stored, top, left, mirrored, options.view)
        views.append(View(top, left, mirrored, view, shift))
    return views


def augmentation(
    stored: np.ndarray, options: augment.Transform, statistics: Statistics, seed: int, sample: int
) -> Image.Image:
    """Return the sheet of one sample as stored, (size, size, 3) uint8, and of its `first_views`."""
    views = first_views(stored, options, statistics, seed, sample)
    boxes = [f"top {view.top}, left {view.left}{', mirrored' if view.mirrored else ''}" for view in views]
    parts = [
        drawing.paragraph(f"Sample {sample} in training with seed {seed}", TITLE, INK, bold=True),
        drawing.paragraph("As stored, with the crop boxes of the first six epochs", TEXT, INK),
        _crop_boxes(stored, views, options.view),
        drawing.paragraph(f"The views of {options.view} × {options.view} pixels, as cut and mirrored", TEXT, INK),
        _rows([view.pixels for view in views], boxes),
        drawing.paragraph("This run has no lighting.", TEXT, INK),
    ]
    if options.lit(0):
        middle = (len(stored) - options.view) // 2
        centre = augment.reference_view(stored, middle, middle, False, options.view)
        lit = [np.clip(np.rint(centre + view.shift), 0, 255).astype(np.uint8) for view in views]
        title = "The centre view with each epoch's lighting: grey levels added to red, green and blue"
        added = ["{:+.1f}, {:+.1f}, {:+.1f}".format(*view.shift) for view in views]
        parts[-1:] = [drawing.paragraph(title, TEXT, INK), _rows(lit, added)]
    return drawing.stacked(*parts, drawing.paragraph(_note(options)))


def _note(options: augment.Transform) -> str:
    divided = f", and divided by {options.divisor(0):g}" if options.divisor(0) != 1 else ""
    shared = f" In this run {options.crop_chunk} samples in a row share the crop of their first: not that shown here."
    return (
        "Crop, mirroring and lighting are functions of the seed, the epoch and the sample's number. Colours are "
        f"clipped to what a screen shows; the network sees them unclipped, less the mean{divided}."
        f"{shared if options.crop_chunk > 1 else ''}"
    )


def _crop_boxes(stored: np.ndarray, views: Sequence[View], side: int) -> Image.Image:
    """Return the stored picture with a numbered crop box for each epoch."""
    shown = drawing.picture(stored, STORED)
    part, scale = drawing.blank(shown.height + MARGIN), shown.width / len(stored)
    part.paste(shown, (MARGIN, 0))
    pen = ImageDraw.Draw(part)
    for view, colour in zip(views, COLOURS):
        left, top = MARGIN + view.left * scale, view.top * scale
        pen.rectangle([left, top, left + side * scale - 1, top + side * scale - 1], outline=colour, width=3)
    for epoch, view in enumerate(views):  # above all boxes, each at another position of its own box's top
        x, y = MARGIN + (view.left + side * (epoch + 0.5) / EPOCHS) * scale, view.top * scale
        pen.rectangle([x - TAG / 2, y, x + TAG / 2, y + TAG], COLOURS[epoch])
        drawing.write(part, (x, y + TAG / 2), str(epoch), SMALL, "white", "mm", bold=True)
    return part


def _rows(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
    """Return pictures in rows, each with its epoch and a caption beneath."""
    pitch = SIDE + 60
    part = drawing.blank(-(-len(pictures) // ACROSS) * pitch - 8)
    for i, (pixels, caption) in enumerate(zip(pictures, captions)):
        left, top = MARGIN + i % ACROSS * (SIDE + GAP), i // ACROSS * pitch
        drawing.put(part, (left, top), pixels, SIDE)
        drawing.write(part, (left, top + SIDE + 4), f"epoch {i}", SMALL, COLOURS[i], bold=True, width=SIDE)
        drawing.write(part, (left, top + SIDE + 26), caption, SMALL, SOFT, width=SIDE)
    return part

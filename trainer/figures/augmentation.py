"""What training makes of one picture: where its views are cut from, and how lighting changes its colours."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pipeline.manifest import Statistics
from pipeline.online import augment
from trainer.figures.drawing import (
    COLOURS,
    INK,
    MARGIN,
    SMALL,
    SOFT,
    TEXT,
    WIDTH,
    blank,
    heading,
    paragraph,
    picture,
    put,
    stacked,
    write,
)
from trainer.figures.strokes import DASH, line

EPOCHS = 6  # that are shown
GAP = 12  # pixels
SIDE = (WIDTH - 2 * MARGIN - (EPOCHS - 1) * GAP) // EPOCHS  # pixels, of the box of a view
STORED = 512  # pixels, of the box of the whole picture
DEVIATIONS = (-2, -1, 0, 1, 2)
PATCH = (104, 56)  # pixels: width and height of a colour
TAG = 22  # pixels, of the number of a window


@dataclass(frozen=True)
class Seen:
    """What training makes of a sample in one epoch."""

    epoch: int
    top: int  # pixels
    left: int
    mirrored: bool
    view: np.ndarray  # (view, view, 3) uint8: as cut, and mirrored
    shift: np.ndarray  # (3,) float32, grey levels of red, green and blue that lighting adds; 0 where there is none


def seen(stored: np.ndarray, options: augment.Transform, statistics: Statistics, seed: int, sample: int) -> list[Seen]:
    """The first epochs of a sample: stored (size, size, 3) uint8, seen with `options` in a run with this seed.

    These are a run's own numbers, unless several samples share a crop (`crop_chunk`); the lighting, while it lasts.

    Raises:
        UserError: no view fits in the picture.
    """
    positions = augment.AlexNet(options, statistics, len(stored), seed).positions
    found = []
    for epoch in range(EPOCHS):
        draws = augment.draw(seed, epoch, np.array([sample]), positions)
        (top, left), mirrored = draws.crop[0].tolist(), bool(draws.flip[0])
        lighting = augment.lighting_shift(draws.normals, statistics, options.lighting)[0]
        shift = lighting if options.lit(0) else np.zeros_like(lighting)
        view = augment.reference_view(stored, top, left, mirrored, options.view)
        found.append(Seen(epoch, top, left, mirrored, view, shift))
    return found


def augmentation(
    stored: np.ndarray, options: augment.Transform, statistics: Statistics, seed: int, sample: int
) -> Image.Image:
    """One sample as stored, (size, size, 3) uint8, and what a run with this seed sees of it; see `seen`."""
    epochs = seen(stored, options, statistics, seed, sample)
    middle = (len(stored) - options.view) // 2
    centre = augment.reference_view(stored, middle, middle, False, options.view)
    lit = [shifted(centre, each.shift) for each in epochs]
    places = [f"top {each.top}, left {each.left}" for each in epochs]
    return stacked(
        heading(f"Sample {sample} in training with seed {seed}"),
        _beside(_windows(stored, epochs, options.view), _colours(statistics)),
        paragraph(f"The views of {options.view} × {options.view} pixels, as cut and mirrored", TEXT, INK),
        _views([each.view for each in epochs], places, ["mirrored" if each.mirrored else "" for each in epochs]),
        *_lighting(options, lit, epochs),
        paragraph(_note(options)),
    )


def shifted(pixels: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8, (3,) grey levels → (h, w, 3) uint8, clipped to what a screen shows."""
    return np.clip(np.rint(pixels + shift), 0, 255).astype(np.uint8)


def _lighting(options: augment.Transform, lit: Sequence[np.ndarray], epochs: Sequence[Seen]) -> list[Image.Image]:
    if not options.lit(0):
        return [paragraph("This run has no lighting.", TEXT, INK)]
    words = ["{:+.1f}, {:+.1f}, {:+.1f}".format(*each.shift) for each in epochs]
    title = "The centre view with each epoch's lighting: grey levels added to red, green and blue"
    return [paragraph(title, TEXT, INK), _views(lit, words, [""] * len(lit))]


def _note(options: augment.Transform) -> str:
    divisor = options.divisor(0)
    text = (
        "Crop, mirroring and lighting are functions of the seed, the epoch and the sample's number. Colours are "
        "clipped to what a screen shows; the network sees them unclipped, less the mean"
        f"{f', and divided by {divisor:g}' if divisor != 1 else ''}."
    )
    if options.crop_chunk > 1:
        text += (
            f" In this run {options.crop_chunk} samples in a row share the crop of their first: not that shown here."
        )
    return text


def _windows(stored: np.ndarray, epochs: Sequence[Seen], view: int) -> Image.Image:
    """The picture with a numbered window for each epoch; dashed where it is mirrored."""
    shown = picture(stored, STORED)
    part = blank(STORED, STORED + MARGIN)
    part.paste(shown, (MARGIN, 0))
    scale = shown.width / len(stored)
    for each, colour in zip(epochs, COLOURS):
        left, top = MARGIN + each.left * scale, each.top * scale
        right, foot = left + view * scale - 1, top + view * scale - 1
        corners = [(left, top), (right, top), (right, foot), (left, foot), (left, top)]
        line(part, corners, colour, 3, DASH if each.mirrored else ())
    for each, colour in zip(epochs, COLOURS):  # above all windows, each at another place of its own window's top
        x, y = MARGIN + (each.left + view * (each.epoch + 0.5) / EPOCHS) * scale, each.top * scale
        ImageDraw.Draw(part).rectangle([x - TAG / 2, y, x + TAG / 2, y + TAG], colour)
        write(part, (x, y + TAG / 2), str(each.epoch), SMALL, "white", "mm", bold=True)
    return part


def _colours(statistics: Statistics) -> Image.Image:
    """The mean colour, and what lies along each eigenvector of the pixels' covariance."""
    part = blank(STORED, WIDTH - STORED - 2 * MARGIN)
    text = "As stored, with the windows of its first six epochs: solid ones are seen as they are, dashed ones mirrored."
    title = "Principal colours of the training pixels, in standard deviations from the mean"
    part.paste(paragraph(text, TEXT, INK, part.width), (0, 0))
    part.paste(paragraph(title, TEXT, INK, part.width), (0, 96))
    top = 132
    deviations = np.sqrt(np.maximum(statistics.eigenvalues, 0.0))
    for i, (deviation, along) in enumerate(zip(deviations, statistics.eigenvectors.T)):
        for j, times in enumerate(DEVIATIONS):
            colour = shifted(statistics.mean_color[None, None], times * deviation * along)[0, 0]
            x = MARGIN + j * (PATCH[0] + 4)
            ImageDraw.Draw(part).rectangle([x, top, x + PATCH[0] - 1, top + PATCH[1] - 1], tuple(colour.tolist()))
        words = "{}: deviation {:.1f} grey levels, along {:.2f}, {:.2f}, {:.2f}".format(i + 1, deviation, *along)
        write(part, (MARGIN, top + PATCH[1] + 6), words, SMALL, SOFT)
        top += PATCH[1] + 38
    for j, times in enumerate(DEVIATIONS):
        middle = MARGIN + j * (PATCH[0] + 4) + PATCH[0] / 2
        write(part, (middle, top), f"{times:+d}" if times else "mean", SMALL, INK, "ma")
    return part


def _views(pictures: Sequence[np.ndarray], words: Sequence[str], more: Sequence[str]) -> Image.Image:
    """A row of pictures, each with its epoch and two texts beneath."""
    part = blank(SIDE + 28 + (44 if any(more) else 22))
    for i, pixels in enumerate(pictures):
        left = MARGIN + i * (SIDE + GAP)
        put(part, (left, 0), pixels, SIDE)
        write(part, (left, SIDE + 6), f"epoch {i}", SMALL, COLOURS[i], bold=True, width=SIDE)
        for j, text in enumerate((words[i], more[i])):
            write(part, (left, SIDE + 28 + 22 * j), text, SMALL, SOFT, width=SIDE)
    return part


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    part = blank(max(left.height, right.height))
    part.paste(left, (0, 0))
    part.paste(right, (left.width, 0))
    return part

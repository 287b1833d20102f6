"""Figure 4 of the paper, right: pictures, and the training pictures that the last hidden layer takes to be nearest."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from trainer.figures.drawing import (
    INK,
    MARGIN,
    RED,
    SMALL,
    SOFT,
    TEXT,
    WIDTH,
    blank,
    heading,
    paragraph,
    put,
    stacked,
    write,
)
from trainer.figures.strokes import tick

MOST = 6  # neighbours of a query: the paper's
GAP, APART = 12, 48  # pixels: between two neighbours; between the query and the first of them
SIDE = (WIDTH - 2 * MARGIN - APART - (MOST - 1) * GAP) // (MOST + 1)  # pixels, of a picture's box


@dataclass(frozen=True)
class Neighbour:
    """A picture (height, width, 3) uint8 that was found; `same`: whether its label is the query's.

    Classes may share their words, as the two cranes of ImageNet do.
    """

    pixels: np.ndarray
    words: str | None  # of its label, if it has one
    distance: float
    same: bool


@dataclass(frozen=True)
class Row:
    """A query (height, width, 3) uint8, and what was found, the nearest first."""

    pixels: np.ndarray
    words: str | None  # of its label, if it has one
    found: Sequence[Neighbour]


def neighbours(rows: Sequence[Row]) -> Image.Image:
    """A row for each query: the picture, apart from it the six that are nearest. Those of its own label are ticked."""
    text = (
        "In each row, at the left, a picture that was looked for; then the training pictures nearest to it by the "
        "Euclidean distance of what the last hidden layer makes of them. Those of the same label are red and ticked."
    )
    return stacked(heading("Nearest training pictures"), *(_row(row) for row in rows), paragraph(text))


def _row(row: Row) -> Image.Image:
    part = blank(SIDE + 54)
    put(part, (MARGIN, 0), row.pixels, SIDE)
    _words(part, MARGIN, row.words, bold=True)
    for i, each in enumerate(row.found[:MOST]):
        left = MARGIN + SIDE + APART + i * (SIDE + GAP)
        put(part, (left, 0), each.pixels, SIDE)
        _words(part, left, each.words, same=each.same)
        write(part, (left, SIDE + 30), f"{each.distance:#.4g}".rstrip("."), SMALL, SOFT)
    return part


def _words(part: Image.Image, left: int, words: str | None, bold: bool = False, same: bool = False) -> None:
    start, middle = float(left), SIDE + 17
    if same:
        start += tick(part, (left, middle), RED)
    colour = RED if same else INK if words is not None else SOFT
    text = "no label" if words is None else words
    write(part, (start, middle), text, SMALL if not bold else TEXT, colour, "lm", bold or same, left + SIDE - start)

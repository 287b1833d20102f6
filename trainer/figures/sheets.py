"""Draw Figures 3 and 4 of the paper: the kernels of the first layer, predictions, and the nearest training pictures."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from trainer.figures import drawing, selectivity
from trainer.figures.drawing import INK, MARGIN, PALE, RED, SMALL, SOFT, TEXT, TITLE, WIDTH
from trainer.figures.gather import Example, Neighbour, Similar
from trainer.pictures import pixels
from trainer.probabilities import top

KERNEL, KERNEL_GAP = 44, 6  # pixels: of a kernel at most, between two: 12 kernels of 11 × 11 weights in a row
NOISE = 200  # kernels of noise, to compare with
ZERO, LARGEST = 128, 127  # grey levels: of a weight of zero, and the distance from it of the sheet's largest
SIDE, GAP = 184, 20  # pixels: of the box of a picture, and what is beside it
LABEL, ROW, BAR = 34, 30, 27  # pixels high: a true label, a guess, its bar
PERCENT = 72  # pixels: kept for the probability
ACROSS, NEAR_GAP = 3, 14  # neighbours in a row; pixels between two
NEAR = (WIDTH - 2 * MARGIN - SIDE - GAP - (ACROSS - 1) * NEAR_GAP) // ACROSS  # pixels, of a neighbour's box
OTHER_BAR, TRUE_BAR = "#bcd3e3", "#f3c5c1"  # pale, for there is text on them

Words = Callable[[int], str]  # of a label; −1: "no label"


def kernels(weights: np.ndarray, columns: int) -> Image.Image:
    """Return the sheet of a first layer's kernels, (n, 3, k, k) float in the grouped layout, of so many columns."""
    side = weights.shape[-1]
    parts = []
    shown = np.split(tiles(weights, zoom=max(1, KERNEL // side)), columns)
    for i, (column, column_tiles) in enumerate(zip(np.split(weights, columns), shown)):
        name = f"Column {i}" if columns > 1 else "One column"
        parts += [drawing.paragraph(f"{name}: {measured(column)}", TEXT, INK), _grid(column_tiles)]
    title = f"First layer: {len(weights)} kernels of {side} × {side} RGB weights"
    return _sheet(title, parts, reading(weights, columns))


def measured(weights: np.ndarray) -> str:
    """Return the selectivity of (n, 3, k, k) kernels in words."""
    numbers = [selectivity.mean(measure(weights), weights) for measure in (selectivity.colour, selectivity.orientation)]
    return "colour {:.2f}, orientation {:.2f}".format(*numbers)


def reading(weights: np.ndarray, columns: int) -> str:
    """Return what the numbers mean, and how sure that is."""
    noise = np.random.default_rng(2012).standard_normal((NOISE, *weights.shape[1:]))
    text = (
        "Colour: the share of the weights' energy that is not grey. Orientation: the share of their spatial power that "
        "has one direction. Means over the kernels, by their energy, from 0 to 1; "
        f"of weights that are noise: {measured(noise)}. Mid-grey is 0; all kernels have one scale."
    )
    if columns == 2:
        p = selectivity.chance(weights)
        text += (
            f" The colours of the two columns differ {'by' if p < 0.05 else 'no'} more than chance explains: random "
            f"halves of these kernels differ as much in {100 * p:.3g} % of draws."
        )
    return text


def tiles(weights: np.ndarray, zoom: int) -> np.ndarray:
    """(n, 3, k, k) → (n, zoom · k, zoom · k, 3) uint8: zero is mid-grey, and all kernels have one scale."""
    largest = float(np.abs(weights).max()) or 1.0
    levels = np.rint(ZERO + LARGEST * (weights.astype(np.float64) / largest)).astype(np.uint8)
    return levels.transpose(0, 2, 3, 1).repeat(zoom, axis=1).repeat(zoom, axis=2)


def predictions(examples: Sequence[Example], words: Words) -> Image.Image:
    """Return the sheet of examples, each with its true label and the five most probable ones as bars."""
    text = "At the top each picture's true label, then the most probable labels; the true one is red and ticked."
    return _sheet("Predictions", [_prediction(example, words) for example in examples], text)


def neighbours(similar: Similar, words: Words) -> Image.Image:
    """Return the sheet of queries, each with its nearest training pictures. Those of its own label are ticked."""
    text = (
        "At the left a picture that was looked for; beside it the training pictures nearest to it by the Euclidean "
        "distance of their features in the last hidden layer. Those of the same label are red and ticked."
    )
    return _sheet("Nearest training pictures", [_row(query, found, words) for query, found in similar], text)


def _sheet(title: str, parts: Sequence[Image.Image], text: str) -> Image.Image:
    return drawing.stacked(drawing.paragraph(title, TITLE, INK, bold=True), *parts, drawing.paragraph(text))


def _grid(column_tiles: np.ndarray) -> Image.Image:
    """Return tiles (n, side, side, 3) uint8 in rows, as many in each as fit."""
    pitch = column_tiles.shape[1] + KERNEL_GAP
    across = max(1, (WIDTH - 2 * MARGIN + KERNEL_GAP) // pitch)
    part = drawing.blank(-(-len(column_tiles) // across) * pitch - KERNEL_GAP)
    for i, tile in enumerate(column_tiles):
        part.paste(Image.fromarray(tile), (MARGIN + i % across * pitch, i // across * pitch))
    return part


def _prediction(example: Example, words: Words) -> Image.Image:
    """Return a part with an example at the left, its true label and its bars at the right."""
    best = top(example.probabilities).tolist()
    left, part = MARGIN + SIDE + GAP, drawing.blank(max(SIDE, LABEL + ROW * len(best)))
    drawing.put(part, (MARGIN, 0), pixels(example.jpeg), SIDE)
    labelled = example.label >= 0
    missed = " (missed)" if labelled and example.label not in best else ""
    name = drawing.fitted(words(example.label), WIDTH - MARGIN - left - drawing.length(missed, SMALL), TEXT, labelled)
    end = left + drawing.write(part, (left, LABEL // 2 - 2), name, TEXT, RED if labelled else SOFT, "lm", labelled)
    drawing.write(part, (end + 6, LABEL // 2 - 2), missed, SMALL, SOFT, "lm")
    for i, label in enumerate(best):
        _bar(part, LABEL + i * ROW, words(label), float(example.probabilities[label]), label == example.label)
    return part


def _bar(part: Image.Image, head: int, words: str, probability: float, true: bool) -> None:
    """Draw a guess on its bar, whose full width is 100 %."""
    left, end, middle = MARGIN + SIDE + GAP, WIDTH - MARGIN, head + BAR // 2
    pen = ImageDraw.Draw(part)
    pen.rectangle([left, head, end - 1, head + BAR - 1], PALE)
    if (wide := round((end - left) * probability)) > 0:
        pen.rectangle([left, head, left + wide - 1, head + BAR - 1], TRUE_BAR if true else OTHER_BAR)
    start = left + 6 + (drawing.tick(part, left + 6, middle) if true else 0)
    colour = RED if true else INK
    drawing.write(part, (start, middle), words, SMALL, colour, "lm", true, end - PERCENT - start)
    drawing.write(part, (end - 6, middle), f"{100 * probability:.1f} %", SMALL, colour, "rm", true)


def _row(query: Example, found: Sequence[Neighbour], words: Words) -> Image.Image:
    """Return a part with a query at the left, and at the right its neighbours, three in a row."""
    pitch = NEAR + 52
    part = drawing.blank(max(SIDE + 28, -(-len(found) // ACROSS) * pitch))
    drawing.put(part, (MARGIN, 0), pixels(query.jpeg), SIDE)
    colour = INK if query.label >= 0 else SOFT
    drawing.write(part, (MARGIN, SIDE + 14), words(query.label), TEXT, colour, "lm", query.label >= 0, SIDE)
    for i, neighbour in enumerate(found):
        left, head = MARGIN + SIDE + GAP + i % ACROSS * (NEAR + NEAR_GAP), i // ACROSS * pitch
        drawing.put(part, (left, head), pixels(neighbour.jpeg), NEAR)
        same = neighbour.label == query.label
        start, middle = left + (drawing.tick(part, left, head + NEAR + 13) if same else 0), head + NEAR + 13
        colour = RED if same else INK if neighbour.label >= 0 else SOFT
        drawing.write(part, (start, middle), words(neighbour.label), SMALL, colour, "lm", same, left + NEAR - start)
        drawing.write(part, (left, head + NEAR + 24), distance(neighbour), SMALL, SOFT)
    return part


def distance(neighbour: Neighbour) -> str:
    """Return a neighbour's distance with four digits."""
    return f"{neighbour.distance:#.4g}".rstrip(".")

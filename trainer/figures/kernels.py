"""Figure 3 of the paper: the kernels of the first layer, column by column, with what they answer to."""

import numpy as np
from PIL import Image

from trainer.figures import selectivity
from trainer.figures.drawing import INK, MARGIN, TITLE, WIDTH, blank, heading, paragraph, stacked

SIDE, GAP = 66, 6  # pixels: of a kernel at most, and between two: 16 kernels of 11 × 11 weights in a row, as in 2012
NOISE = 200  # kernels of noise, to compare with
ZERO, MOST = 128, 127  # grey levels: of a weight of zero, and the distance from it of the sheet's largest


def kernels(weights: np.ndarray, columns: int) -> Image.Image:
    """The kernels of a first layer, (n, 3, k, k) float in the grouped layout, of so many columns.

    Raises:
        UserError: a weight is not a finite number.
    """
    selectivity.require_finite(weights)
    side = weights.shape[-1]
    count = f"{len(weights)} kernel{'s' if len(weights) > 1 else ''}"
    parts = [heading(f"First layer: {count} of {side} × {side} weights of red, green and blue")]
    shown = np.split(tiles(weights, zoom=max(1, SIDE // side)), columns)
    for i, (part, pixels) in enumerate(zip(np.split(weights, columns), shown)):
        name = f"Column {i}" if columns > 1 else "One column"
        parts += [paragraph(f"{name}: {measured(part)}", TITLE - 2, INK), grid(pixels)]
    return stacked(*parts, paragraph(reading(weights, columns)))


def measured(weights: np.ndarray) -> str:
    """The selectivity of (n, 3, k, k) kernels in words."""
    numbers = [selectivity.mean(measure(weights), weights) for measure in (selectivity.colour, selectivity.orientation)]
    return "colour {:.2f}, orientation {:.2f}".format(*numbers)


def reading(weights: np.ndarray, columns: int) -> str:
    """What the numbers say, and how sure that is."""
    noise = np.random.default_rng(2012).standard_normal((NOISE, *weights.shape[1:]))
    text = (
        "Colour: the share of the weights' energy that is not grey. Orientation: the share of their spatial power that "
        "has one direction. Means over the kernels, by their energy, from 0 to 1; "
        f"of weights that are noise: {measured(noise)}. Mid-grey is 0; all kernels have one scale."
    )
    if columns != 2:
        return text
    p = selectivity.chance(weights)
    verdict = "by more than" if p < 0.05 else "no more than"
    return (
        f"{text} The colours of the two columns differ {verdict} chance explains: random halves of these kernels "
        f"differ as much in {100 * p:.3g} % of draws."
    )


def tiles(weights: np.ndarray, zoom: int) -> np.ndarray:
    """(n, 3, k, k) → (n, zoom · k, zoom · k, 3) uint8: zero is mid-grey, and all kernels have one scale."""
    largest = float(np.abs(weights).max()) or 1.0
    levels = np.rint(ZERO + MOST * (weights.astype(np.float64) / largest)).astype(np.uint8)
    return levels.transpose(0, 2, 3, 1).repeat(zoom, axis=1).repeat(zoom, axis=2)


def grid(pixels: np.ndarray) -> Image.Image:
    """Tiles (n, side, side, 3) uint8 in rows, as many in each as the sheet is wide."""
    pitch = pixels.shape[1] + GAP
    across = max(1, (WIDTH - 2 * MARGIN + GAP) // pitch)
    part = blank(-(-len(pixels) // across) * pitch - GAP, max(WIDTH, pitch + 2 * MARGIN))
    for i, tile in enumerate(pixels):
        part.paste(Image.fromarray(tile), (MARGIN + i % across * pitch, i // across * pitch))
    return part

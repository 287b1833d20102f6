"""Draw the first layer's kernels (Figure 3), and measure their selectivity: shares of colour, and of one direction."""

import numpy as np
from PIL import Image

from trainer.figures.sheets import INK, MARGIN, TEXT, WIDTH, grid, paragraph, titled

PADDED = 4  # the Fourier transform is taken of a square so many times as wide, zero outside the kernel
FLAT = 1e-12  # of a kernel's energy: what is left of a constant kernel less its mean, by rounding
DRAWS = 9999  # random halvings

SIDE, GAP = 44, 6  # pixels: of a kernel at most, between two: 12 kernels of 11 × 11 weights in a row
NOISE, NUMBERS = 200, 10**6  # kernels of noise, to compare with, and weights in all of them, at most
ZERO, LARGEST = 128, 127  # grey levels: of a weight of zero, and the distance from it of the sheet's largest


def sheet(weights: np.ndarray, columns: int) -> Image.Image:
    """Return the sheet of a first layer's kernels, (n, 3, k, k) float in the grouped layout, of so many columns."""
    side, parts, zoom = weights.shape[-1], [], max(1, SIDE // weights.shape[-1])
    shown, box = np.split(tiles(weights, zoom), columns), min(zoom * side, WIDTH - 2 * MARGIN)
    for i, (column, column_tiles) in enumerate(zip(np.split(weights, columns), shown)):
        name = f"Column {i}" if columns > 1 else "One column"
        parts += [paragraph(f"{name}: {measured(column)}", TEXT, INK), grid(column_tiles, box, GAP)]
    return titled(
        f"First layer: {len(weights)} kernels of {side} × {side} RGB weights", parts, reading(weights, columns)
    )


def measured(weights: np.ndarray) -> str:
    """Return the selectivity of (n, 3, k, k) kernels in words."""
    return "colour {:.2f}, orientation {:.2f}".format(*selectivity(weights))


def selectivity(weights: np.ndarray) -> tuple[float, float]:
    """Return colour and orientation of (n, 3, k, k) kernels: means by their energy; 0 if all energies are 0."""
    energies = energy(weights)
    sums = [(measure(weights) * energies).sum() for measure in (colour, orientation)]
    shares = _ratio(np.array(sums), np.full(2, energies.sum()))
    return float(shares[0]), float(shares[1])


def reading(weights: np.ndarray, columns: int) -> str:
    """Return the note on a sheet of kernels: the meaning of the numbers, and how sure they are."""
    count = min(NOISE, NUMBERS // weights[0].size + 1)
    noise = np.random.default_rng(2012).standard_normal((count, *weights.shape[1:]))
    text = (
        "Colour: the share of the weights' energy that is not grey. Orientation: the share of their spatial power that "
        "has one direction. Means over the kernels, by their energy, from 0 to 1; "
        f"of weights that are noise: {measured(noise)}. Mid-grey is 0; all kernels have one scale."
    )
    if columns == 2:
        p, _ = chance(weights)
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


def energy(weights: np.ndarray) -> np.ndarray:
    """Return the sum of the squared weights: (n, 3, k, k) → (n,) float64."""
    return (weights.astype(np.float64) ** 2).sum((1, 2, 3))


def colour(weights: np.ndarray) -> np.ndarray:
    """Return the share of a kernel's energy that is not grey: (n, 3, k, k) → (n,) float64 in [0, 1].

    |w − p|² / |w|², where p is the projection of each pixel's (red, green, blue) onto (1, 1, 1)/√3. 0: a grey kernel;
    1: its three colours cancel everywhere; 2/3 on average: weights drawn independently. The mean stays in: the answer
    to an even colour is an answer to colour. 0 for a kernel of zeros.
    """
    w = weights.astype(np.float64)
    chromatic = w - w.mean(1, keepdims=True)
    return _ratio(energy(chromatic), energy(w))


def orientation(weights: np.ndarray) -> np.ndarray:
    """Return the share of a kernel's power that has one direction: (n, 3, k, k) → (n,) float64 in [0, 1].

    |Σ P(f) e^{2iθ(f)}| / Σ P(f), which is 1 − the circular variance of the doubled angles (Mardia and Jupp, Directional
    Statistics, 2000): a grating's wave vectors f and −f are one direction. P is the power of the spatial
    Fourier transform, summed over red, green and blue, of the kernel less each colour's mean (the frequency zero). Only
    frequencies below 1/2 per pixel count: the corners of the square beyond have diagonal directions alone. They are
    sampled `PADDED` times as densely as the kernel's own, so that no direction has more samples than another. Near 1:
    a grating of several waves; 0: round, constant or zero kernels.
    """
    side = PADDED * weights.shape[-1]
    f = np.fft.fftfreq(side)[:, None] * 1j + np.fft.fftfreq(side)  # y as the imaginary part: its angle is θ
    inside = (np.abs(f) > 0) & (np.abs(f) < 0.5)
    turned = (f[inside] / np.abs(f[inside])) ** 2
    shares = np.zeros(len(weights))
    for i, kernel in enumerate(weights.astype(np.float64)):  # one by one: padded, they are large
        varying = kernel - kernel.mean((1, 2), keepdims=True)
        if (varying**2).sum() > FLAT * (kernel**2).sum():
            power = (np.abs(np.fft.fft2(varying, s=(side, side))) ** 2).sum(0)[inside]
            shares[i] = np.abs(power @ turned) / power.sum()
    return shares


def chance(weights: np.ndarray) -> tuple[float, float]:
    """Return the p-value of the two halves' difference in mean colour, and how much random halves differ on average.

    (n, 3, k, k), n even → in (0, 1], how many random halves differ as much; a permutation test (Phipson and Smyth,
    2010: the halves themselves count as one of the draws). Small: the columns differ by more than chance.
    """
    energies = energy(weights)
    values = np.stack([energies * colour(weights), energies], 1)  # of a kernel, for the two sums of a mean

    def apart(orders: np.ndarray) -> np.ndarray:
        first, second = (_ratio(*np.moveaxis(values[half].sum(1), 1, 0)) for half in np.split(orders, 2, axis=1))
        return np.abs(first - second)

    observed = apart(np.arange(len(energies))[None])[0]
    drawn = np.random.default_rng(2012).permuted(np.tile(np.arange(len(energies)), (DRAWS, 1)), axis=1)
    differences = apart(drawn)
    return (int((differences >= observed * (1 - FLAT)).sum()) + 1) / (DRAWS + 1), float(differences.mean())


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return the quotient; 0 where that is 0/0."""
    return np.divide(numerator, denominator, out=np.zeros(np.shape(denominator)), where=np.asarray(denominator) > 0)

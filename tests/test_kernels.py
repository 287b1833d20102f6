"""Figure 3: selectivity of kernels that are known, and the sheet's pixels against plain numpy."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from trainer.figures import kernels
from trainer.figures.kernels import measured, reading

GREY = (1.0, 1.0, 1.0)


def patch(envelope: float, colour: tuple[float, float, float], frequency: float = 0.0, degrees: float = 0.0):
    """A Gabor patch, (3, 11, 11); a blob where the frequency is 0."""
    y, x = np.mgrid[-5:6, -5:6]
    angle = np.deg2rad(degrees)
    wave = np.cos(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)))
    return np.multiply.outer(colour, wave * np.exp(-(x**2 + y**2) / (2 * envelope**2)))


def gabors() -> np.ndarray:
    return np.stack([patch(2.5, GREY, 0.2, degrees) for degrees in range(0, 180, 15)])


def blobs() -> np.ndarray:
    return np.stack([patch(1.8, colour) for colour in ((1, -1, 0), (-1, 0, 1), (1, 1, -2))])


def random(n: int, side: int = 11) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, 3, side, side))


def test_grey_gratings_have_no_colour_and_one_direction() -> None:
    assert kernels.colour(gabors()) == pytest.approx(0, abs=1e-12)
    shares = kernels.orientation(gabors())
    assert shares.min() > 0.85
    assert np.ptp(shares) < 0.03  # whatever the direction, that of the square's sides and of its corners included


def test_coloured_blobs_have_colour_and_no_direction() -> None:
    assert kernels.colour(blobs()) == pytest.approx(1, abs=1e-12)
    assert kernels.orientation(blobs()) == pytest.approx(0, abs=1e-9)


def test_colour_is_the_share_of_the_energy() -> None:
    kernel = patch(2, GREY, 0.1) + 0.3 * patch(2, (2, -1, -1))
    assert 0.1 < _projected(kernel) < 0.4
    assert kernels.colour(kernel[None]) == pytest.approx(_projected(kernel))
    assert kernels.colour(random(1)) == pytest.approx(_projected(random(1)[0]))


def _projected(kernel: np.ndarray) -> float:
    """1 − |projection onto (1, 1, 1)/√3|² / |w|², pixel by pixel."""
    w = kernel.reshape(3, -1)
    along = np.array(GREY) / np.sqrt(3) @ w
    return 1 - float((along**2).sum() / (w**2).sum())


def test_orientation_is_that_of_the_fourier_power() -> None:
    """Of sums written out, a frequency at a time."""
    kernel, side = random(1, 5)[0], 20
    kernel = kernel - kernel.mean((1, 2), keepdims=True)
    y, x = np.mgrid[:5, :5]
    resultant, total = 0j, 0.0
    for v in range(-10, 10):
        for u in range(-10, 10):
            if 0 < u * u + v * v < 100:
                waves = (kernel * np.exp(-2j * np.pi * (u * x + v * y) / side)).sum((1, 2))
                power = float((np.abs(waves) ** 2).sum())
                resultant, total = resultant + power * np.exp(2j * np.arctan2(v, u)), total + power
    assert kernels.orientation(random(1, 5)) == pytest.approx(abs(resultant) / total)


def test_orientation_knows_no_turns_scales_or_colours() -> None:
    weights, shares = random(6), kernels.orientation(random(6))
    for same in (np.rot90(weights, 1, (2, 3)), weights[..., ::-1], 1e-3 * weights, weights[:, ::-1], weights + 5):
        assert kernels.orientation(same) == pytest.approx(shares)
    crossed = patch(2.5, GREY, 0.2, 0) + patch(2.5, GREY, 0.2, 90)
    assert kernels.orientation(crossed[None]) == pytest.approx(0, abs=1e-9)
    for even in (np.zeros((1, 3, 11, 11)), np.full((1, 3, 11, 11), 0.1), np.ones((1, 3, 1, 1))):
        assert kernels.colour(even) == pytest.approx(0, abs=1e-12)
        assert kernels.orientation(even) == 0


def test_chance_counts_halves_by_their_energy() -> None:
    """Against all halves of eight kernels, one by one."""
    weights = np.concatenate([gabors()[:3], blobs()[:1], blobs(), gabors()[4:5]])
    energies = (weights**2).sum((1, 2, 3))
    coloured = energies * [_projected(kernel) for kernel in weights]

    def apart(half: tuple[int, ...]) -> float:
        first = np.isin(np.arange(8), half)
        return abs(coloured[first].sum() / energies[first].sum() - coloured[~first].sum() / energies[~first].sum())

    halves = [apart(half) for half in combinations(range(8), 4)]
    expected = np.mean([value >= apart((0, 1, 2, 3)) - 1e-9 for value in halves])
    assert 0.05 < expected < 0.95
    assert kernels.chance(weights)[0] == pytest.approx(expected, abs=0.02)
    swapped = np.concatenate([weights[4:], weights[:4]])
    assert kernels.chance(swapped)[0] == pytest.approx(expected, abs=0.02)
    assert kernels.chance(np.repeat(blobs()[:1], 4, axis=0)) == (1, 0)
    assert measured(weights).startswith(f"colour {coloured.sum() / energies.sum():.2f},")


def test_words_are_the_measures() -> None:
    assert measured(gabors()) == f"colour 0.00, orientation {kernels.orientation(gabors()).mean():.2f}"
    assert measured(blobs()) == "colour 1.00, orientation 0.00"
    columns = np.concatenate([gabors()[:9], np.repeat(blobs(), 3, axis=0)])
    assert "differ by more than chance explains" in reading(columns, 2)
    assert "differ no more than chance explains" in reading(random(8), 2)
    assert "two columns" not in reading(random(8), 1)
    assert "in 100 % of draws" in reading(np.zeros((2, 3, 4, 4)), 2)


@pytest.mark.parametrize(("n", "side", "columns", "zoom"), [(96, 11, 2, 4), (64, 5, 1, 8), (3, 70, 1, 1)])
def test_every_kernel_is_in_its_position(n: int, side: int, columns: int, zoom: int) -> None:
    """Zero is mid-grey, and all kernels have one scale."""
    weights = random(n, side).astype(np.float32)
    weights[0] = 0
    sheet = np.asarray(kernels.sheet(weights, columns))
    pitch, tops = side * zoom + 6, []
    across = (640 - 32 + 6) // pitch
    for i, kernel in enumerate(weights):
        column, position = divmod(i, n // columns)
        levels = np.rint(128 + 127 * kernel.astype(float) / np.abs(weights).max())
        tile = np.stack([np.kron(plane, np.ones((zoom, zoom))) for plane in levels], 2)
        left = 16 + position % across * pitch
        strip = sheet[:, left : left + side * zoom]
        (top,) = [top for top in range(len(strip) - side * zoom) if (strip[top : top + side * zoom] == tile).all()]
        tops.append((column, top - position // across * pitch))
    starts = sorted(set(tops))  # where each column's rows begin
    assert [column for column, _ in starts] == list(range(columns))
    rows = -(-(n // columns) // across)
    assert all(below - above > rows * pitch for (_, above), (_, below) in pairwise(starts))


@pytest.mark.parametrize("value", [0.0, 1e-45, 3e38])
def test_one_wide_kernel_of_one_value_fits_the_sheet(value: float) -> None:
    sheet = np.asarray(kernels.sheet(np.full((1, 3, 620, 620), value, np.float32), 1))
    assert sheet.shape[1] == 640
    assert (sheet[:, :16] == 255).all()
    assert (sheet[:, 624:] == 255).all()
    grey = 255 if value else 128
    assert (sheet[200:600, 16:624] == grey).all()

"""What happens to each sample: keyed draws of crop, flip and lighting; the numpy reference of the transform."""

from dataclasses import dataclass

import numpy as np

from pipeline.manifest import Statistics
from pipeline.online.philox import LIGHTING, VIEW, key_of, philox

VIEW_SIZE = 224  # pixels: the network's input is 224 × 224 (paper, section 3)
LIGHTING_SD = 0.1  # paper, section 4.1
LIGHTING_SCALE = 1 / (1 + LIGHTING_SD)  # the 2012 code brings training images back to about the scale of test images


@dataclass(frozen=True)
class Draws:
    """Crop (top, left) in pixels, flip, and three normals per sample."""

    crop: np.ndarray  # (n, 2) int32
    flip: np.ndarray  # (n,) int32: 0 or 1
    normals: np.ndarray  # (n, 3) float64, standard normal; one per eigenvector


def draw(seed: int, epoch: int, ids: np.ndarray, size: int) -> Draws:
    """The random numbers of samples `ids` (n,) int64 in an epoch: a function of (seed, epoch, id) alone.

    Crop positions are uniform over all (size − 224 + 1)² offsets, 33 × 33 for 256 (2012 code); half are flipped.
    """
    low, high = ids & 0xFFFFFFFF, ids >> 32
    words = philox(key_of(seed), (VIEW, epoch, low, high)).astype(np.uint64)
    offsets = np.uint64(size - VIEW_SIZE + 1)
    crop = ((words[:, :2] * offsets) >> np.uint64(32)).astype(np.int32)  # multiply and shift: bias below 2⁻²⁶
    flip = (words[:, 2] >> np.uint64(31)).astype(np.int32)
    return Draws(crop, flip, _normals(philox(key_of(seed), (LIGHTING, epoch, low, high)))[:, :3])


def centre(n: int, size: int) -> Draws:
    """The centre view of n samples: no flip, no lighting."""
    start = (size - VIEW_SIZE) // 2
    return Draws(np.full((n, 2), start, np.int32), np.zeros(n, np.int32), np.zeros((n, 3)))


def ten_views(size: int) -> list[tuple[int, int, bool]]:
    """(top, left, flip) of the ten views: four corners and the centre, and their mirror images (paper, section 4.1)."""
    end, middle = size - VIEW_SIZE, (size - VIEW_SIZE) // 2
    places = [(0, 0), (0, end), (middle, middle), (end, 0), (end, end)]
    return [(top, left, flip) for flip in (False, True) for top, left in places]


def lighting_shift(normals: np.ndarray, statistics: Statistics) -> np.ndarray:
    """The colour added to every pixel of an image: 0.1 · Σ zᵢ √λᵢ vᵢ in grey levels, (n, 3) float32.

    Standard deviations, as the code that produced the published numbers has it, not eigenvalues as in the text.
    """
    deviations = np.sqrt(np.maximum(statistics.eigenvalues, 0.0))
    return (LIGHTING_SD * (normals * deviations) @ statistics.eigenvectors.T).astype(np.float32)


def mean_view(statistics: Statistics) -> np.ndarray:
    """The centre 224×224 of the mean image, (224, 224, 3) float32: subtracted from every view, wherever it was cut."""
    size = statistics.mean_image.shape[0]
    start = (size - VIEW_SIZE) // 2
    return statistics.mean_image[start : start + VIEW_SIZE, start : start + VIEW_SIZE].astype(np.float32)


def reference_view(image: np.ndarray, top: int, left: int, flip: bool) -> np.ndarray:
    """(size, size, 3) uint8 → the view, (224, 224, 3) uint8. What the DALI graph must equal."""
    view = image[top : top + VIEW_SIZE, left : left + VIEW_SIZE]
    return view[:, ::-1] if flip else view


def reference_normalise(view: np.ndarray, mean: np.ndarray, shift: np.ndarray | None) -> np.ndarray:
    """(224, 224, 3) uint8 → network input (3, 224, 224) float32; shift (3,) or None. Oracle of `loader.normalise`."""
    x = view.astype(np.float32) - mean
    if shift is not None:
        x = (x + shift) * np.float32(LIGHTING_SCALE)
    return x.transpose(2, 0, 1)


def _normals(words: np.ndarray) -> np.ndarray:
    """(n, 4) uint32 → (n, 4) float64 standard normals by Box and Muller (1958)."""
    u = words.astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((u[:, :2] + 1.0) / 2.0**32))  # (0, 1]: the logarithm is finite
    angle = 2.0 * np.pi * (u[:, 2:] / 2.0**32)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)

"""The transform of 2012: keyed draws of crop, flip and lighting for each sample, and its numpy reference."""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from pipeline import UserError
from pipeline.manifest import Statistics
from pipeline.online.batch import Crops, Transform, ViewBox, require_at_least, require_one_of
from pipeline.online.philox import LIGHTING, VIEW, keyed_words

VIEW_SIZE = 224  # pixels, unless one asks for others: the network's input is 224 × 224 (paper, section 3)
LIGHTING_SD = 0.1  # paper, section 4.1
SHRINK = np.float32(1 + LIGHTING_SD)


@dataclass(frozen=True)
class ViewOptions:
    """The options of the 2012 transform. The defaults are those of the code that gave the published numbers.

    Args:
        views: "random" (crop, flip, lighting), "centre", "ten": corners and centre, and their mirror images; or "nine":
            at the top, middle and bottom, left, middle and right, none mirrored (cuda-convnet's test of CIFAR-10).
        mean: what is subtracted. "centre": the centre of the mean image from every view, wherever it was cut, never
            flipped, as the code has it; "aligned": the window of the mean image that the view was cut from, flipped
            with it; "colour": the mean colour.
        lighting: of random views. 0.1 · Σ zᵢ sᵢ vᵢ is added, where sᵢ are the square roots of the eigenvalues ("code"),
            or the eigenvalues themselves of pixels between 0 and 1 ("paper": the text's formula); or nothing ("off").
        lighting_until: random views have lighting in the steps below this one; None: in all.
        shrink: divide what has lighting by 1.1 afterwards; None: with the code's lighting, as the code does, and not
            with the paper's, which does not mention it.
        positions: where random views start: at all (size − view + 1)² positions ("code": 33 × 33 of 256), one less
            each way ("paper": 32 × 32, section 4.1), or always in the middle ("centre").
        flips: mirror half of the random views.
        crop_chunk: so many samples in a row of a global batch share crop and flip; the 2012 code had 32.
        view: pixels of a side of a view; on a CPU it equals Pillow's decoder and numpy bit for bit.
    Raises UserError: an impossible value.
    """

    views: str = "random"
    mean: str = "centre"
    lighting: str = "code"
    lighting_until: int | None = None
    shrink: bool | None = None
    positions: str = "code"
    flips: bool = True
    crop_chunk: int = 1
    view: int = VIEW_SIZE

    def __post_init__(self) -> None:
        require_one_of(("random", "centre", "ten", "nine"), views=self.views)
        require_one_of(("centre", "aligned", "colour"), mean=self.mean)
        require_one_of(("code", "paper", "off"), lighting=self.lighting)
        require_one_of(("code", "paper", "centre"), positions=self.positions)
        require_at_least(1, crop_chunk=self.crop_chunk, view=self.view)

    def lit(self, step: int) -> bool:
        """Return True where the views of this step have lighting."""
        drawn = self.views == "random" and self.lighting != "off"
        return drawn and (self.lighting_until is None or step < self.lighting_until)

    def divisor(self, step: int) -> float:
        """Return the divisor of the views of this step: 1.1 as float32 has it, or 1."""
        shrink = self.lighting == "code" if self.shrink is None else self.shrink
        return float(SHRINK) if shrink and self.lit(step) else 1.0


@dataclass(frozen=True)
class Draws:
    """Crop (top, left) in pixels, flip, and three normals per sample."""

    crop: np.ndarray  # (n, 2) int32
    flip: np.ndarray  # (n,) int32: 0 or 1
    normals: np.ndarray  # (n, 3) float64, standard normal; one per eigenvector


class AlexNet(Transform):
    """The recipe of 2012 for pictures of size × size pixels. Raises UserError where no view fits in them."""

    def __init__(self, options: ViewOptions, statistics: Statistics, size: int, seed: int) -> None:
        self.positions = _positions(options, size)
        self.options, self._statistics, self._seed = options, statistics, seed
        self.training, self.aligned = options.views == "random", options.mean == "aligned"
        self.view, self.chunk = options.view, options.crop_chunk
        several = {"ten": ten_views, "nine": nine_views}.get(options.views)
        self.several = tuple(several(size, self.view)) if several else ()
        self.decoded = size if several else self.view
        self._colour = statistics.mean_color.astype(np.float32)
        self._middle = (size - self.view) // 2
        if options.mean != "colour":
            deviation = (statistics.mean_image - statistics.mean_color).astype(np.float32)
            if not self.aligned:
                deviation = reference_view(deviation, self._middle, self._middle, False, self.view)
            factors = {1.0: np.float32(1), float(SHRINK): 1 / SHRINK}
            self.mean_deviations = {by: np.ascontiguousarray(deviation * factor) for by, factor in factors.items()}

    def crops(self, step: int, epoch: int, ids: np.ndarray, owners: np.ndarray | None, sizes: np.ndarray) -> Crops:
        n, options = len(ids), self.options
        start, flip = np.full((n, 2), 0 if self.several else self._middle, np.int32), np.zeros(n, np.int32)
        offset = np.tile(self._colour, (n, 1))
        if self.training:
            draws = self.draws(epoch, ids, owners)
            start, flip = draws.crop, draws.flip
            if options.lit(step):
                offset -= lighting_shift(draws.normals, self._statistics, options.lighting)
        shape, std = np.full((n, 2), self.decoded, np.int32), np.full((n, 3), self.divisor(step), np.float32)
        return Crops(start, shape, flip, offset, std)

    def draws(self, epoch: int, ids: np.ndarray, owners: np.ndarray | None = None) -> Draws:
        """Return what the random views of these samples have in an epoch; `owners` as for `draw`."""
        drawn = draw(self._seed, epoch, ids, self.positions, owners)
        crop = drawn.crop if self.options.positions != "centre" else np.full_like(drawn.crop, self._middle)
        return Draws(crop, drawn.flip if self.options.flips else np.zeros_like(drawn.flip), drawn.normals)

    def divisor(self, step: int) -> float:
        return self.options.divisor(step)

    def described(self) -> dict[str, Any]:
        options = {key: value for key, value in asdict(self.options).items() if key != "lighting_until"}
        return {"recipe": "alexnet", **options}


def draw(seed: int, epoch: int, ids: np.ndarray, positions: int, owners: np.ndarray | None = None) -> Draws:
    """Draw the random numbers of samples `ids` (n,) int64 in an epoch: a function of (seed, epoch, id) alone.

    Crop positions are uniform over 0 … positions − 1 each way; half are flipped. `owners` (n,) are the samples whose
    crop and flip are taken, where several share them; default: each its own.
    """
    words = keyed_words(seed, VIEW, epoch, ids if owners is None else owners).astype(np.uint64)
    crop = ((words[:, :2] * np.uint64(positions)) >> np.uint64(32)).astype(np.int32)  # bias below 2⁻²⁶
    flip = (words[:, 2] >> np.uint64(31)).astype(np.int32)
    return Draws(crop, flip, _normals(keyed_words(seed, LIGHTING, epoch, ids))[:, :3])


def ten_views(size: int, view: int = VIEW_SIZE) -> list[ViewBox]:
    """Return the ten views of a picture: four corners and the centre, and their mirror images (paper, section 4.1)."""
    end, middle = size - view, (size - view) // 2
    corners = [(0, 0), (0, end), (middle, middle), (end, 0), (end, end)]
    return [(top, left, flip) for flip in (False, True) for top, left in corners]


def nine_views(size: int, view: int = VIEW_SIZE) -> list[ViewBox]:
    """Return the nine views of a picture, row by row, none mirrored: cuda-convnet's multiview test of CIFAR-10."""
    return [(top, left, False) for top, left in product((0, (size - view) // 2, size - view), repeat=2)]


def lighting_shift(normals: np.ndarray, statistics: Statistics, lighting: str = "code") -> np.ndarray:
    """Return the colour added to every pixel of an image, (n, 3) float32 in grey levels: 0.1 · Σ zᵢ sᵢ vᵢ.

    "code": sᵢ = √λᵢ, the standard deviations along the eigenvectors. "paper": sᵢ = λᵢ/255, which is the text's λᵢ of
    pixels between 0 and 1, and its sum in grey levels (as λᵢ itself, the first would have a deviation of 1,483 levels).
    """
    variances = np.maximum(statistics.eigenvalues, 0.0)
    deviations = np.sqrt(variances) if lighting == "code" else variances / 255
    return (LIGHTING_SD * (normals * deviations) @ statistics.eigenvectors.T).astype(np.float32)


def reference_view(image: np.ndarray, top: int, left: int, flip: bool, view: int = VIEW_SIZE) -> np.ndarray:
    """Cut (view, view, 3) out of (size, size, 3): the oracle of the decoders."""
    window = image[top : top + view, left : left + view]
    return window[:, ::-1] if flip else window


def reference_normalise(
    view: np.ndarray, offset: np.ndarray, std: np.ndarray, mean_deviation: np.ndarray | None
) -> np.ndarray:
    """Return (view − offset) · (1/std) − mean_deviation, in float32 in this order: (h, w, 3) uint8 → (3, h, w) float32.

    `offset` (3,) is the mean colour less the lighting, and `mean_deviation` (h, w, 3) the mean image less the mean
    colour, divided by std; None where only the colour is subtracted. The oracle of `normalise`.
    """
    x = (view.astype(np.float32) - offset) * (np.float32(1) / std)
    return (x if mean_deviation is None else x - mean_deviation).transpose(2, 0, 1)


def reference(
    picture: np.ndarray, crops: Crops, index: int, mean_deviation: np.ndarray | None, aligned: bool = False
) -> np.ndarray:
    """Return the whole transform of one picture, (size, size, 3) uint8 → (3, view, view) float32, by numpy alone.

    `index` is its position in `crops`; `mean_deviation` is (view, view, 3), or where `aligned` (size, size, 3).
    """
    (top, left), flip, side = crops.start[index].tolist(), bool(crops.flip[index]), int(crops.shape[index, 0])
    if mean_deviation is not None and aligned:
        mean_deviation = reference_view(mean_deviation, top, left, flip, side)
    view = reference_view(picture, top, left, flip, side)
    return reference_normalise(view, crops.offset[index], crops.std[index], mean_deviation)


def _positions(options: ViewOptions, size: int) -> int:
    """Return how many positions a random view may start at, each way, in size × size pixels."""
    spare = options.positions == "paper"
    if size < options.view + spare:
        build = -(-options.view * 256 // VIEW_SIZE)  # as much larger than the view as in 2012
        remedy = f"build with --size {build}, or take view={size - spare} or less"
        raise UserError(f"images of {size} pixels; a view needs {options.view + spare}; {remedy}")
    return size - options.view + 1 - spare


def _normals(words: np.ndarray) -> np.ndarray:
    """Turn (n, 4) uint32 into (n, 4) float64 standard normals by Box and Muller (1958)."""
    u = words.astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((u[:, :2] + 1.0) / 2.0**32))  # (0, 1]: the logarithm is finite
    angle = 2.0 * np.pi * (u[:, 2:] / 2.0**32)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)

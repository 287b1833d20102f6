"""Single pictures as a network sees them: stored ones, or raw ones on the builder's way. On the CPU, without DALI."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.image import encode, rescaled
from pipeline.manifest import Manifest
from pipeline.online import augment
from trainer.data import require_pictures
from trainer.recipe import Recipe


class Pictures:
    """What a network of `recipe` sees of pictures of `dataset`'s kind; the same pixels as the loader gives.

    Raises:
        UserError: data set and recipe do not fit together; the statistics are damaged.
    """

    def __init__(self, dataset: Manifest, recipe: Recipe) -> None:
        require_pictures(dataset, recipe)
        self.rules, self._view, self._mean = dataset.recipe, recipe.model.size, recipe.data.mean
        self._statistics = dataset.statistics()

    def stored(self, raw: bytes) -> bytes:
        """A raw picture's bytes → the JPEG that the builder would store of it, byte for byte.

        Raises:
            ImageError: it cannot be used; with the reason's code.
        """
        return encode(rescaled(raw, self.rules), quality=self.rules.quality, subsampling=self.rules.subsampling)

    def views(self, jpegs: Sequence[bytes], views: str = "centre") -> Tensor:
        """Stored JPEGs → (n, 3, view, view) float32 of `centre`, (n, 10, 3, view, view) of `ten`, (n, 9, …) of `nine`:
        RGB grey levels less the mean."""
        options = augment.Transform(views=views, view=self._view, mean=self._mean)
        recipe = augment.AlexNet(options, self._statistics, self.rules.size, seed=0)
        found = [self._seen(pixels(jpeg), recipe) for jpeg in jpegs]
        several = len(recipe.several)
        shape = (len(found), *((several,) if several else ()), 3, self._view, self._view)
        return torch.from_numpy(np.stack(found) if found else np.zeros(shape, np.float32)).view(shape)

    def _seen(self, picture: np.ndarray, recipe: augment.AlexNet) -> np.ndarray:
        crops = recipe.crops(0, 0, np.zeros(1, np.int64), None, np.array([picture.shape[:2]]))
        offset, std = crops.offset[0], crops.std[0]
        rest = recipe.mean_deviations.get(recipe.divisor(0))
        if not recipe.several:
            return augment.reference(picture, crops, 0, rest, recipe.aligned)
        found = []
        for top, left, flip in recipe.several:
            view = augment.reference_view(picture, top, left, flip, self._view)
            less = rest
            if rest is not None and recipe.aligned:
                less = augment.reference_view(rest, top, left, flip, self._view)
            found.append(augment.reference_normalise(view, offset, std, less))
        return np.stack(found)


def pixels(jpeg: bytes) -> np.ndarray:
    """A stored JPEG → (size, size, 3) uint8 RGB."""
    return np.asarray(Image.open(io.BytesIO(jpeg)))

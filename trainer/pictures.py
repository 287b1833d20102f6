"""Prepare single pictures, stored or raw, for a network as builder and loader do; on the CPU, without DALI."""

from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from pipeline.image import encode, rescaled
from pipeline.manifest import DatasetError, Manifest
from pipeline.online import augment
from trainer.data import require_pictures
from trainer.recipe import Recipe


class Pictures:
    """Prepares pictures as the builder of `dataset` and the loader of a network of `recipe` do.

    Raises:
        UserError: data set and recipe do not fit together; the statistics are damaged.
    """

    def __init__(self, dataset: Manifest, recipe: Recipe) -> None:
        require_pictures(dataset, recipe)
        self.rules, self._view, self._mean = dataset.recipe, recipe.model.size, recipe.data.mean
        self._statistics = dataset.statistics()

    def stored(self, raw: bytes) -> bytes:
        """Return the JPEG that the builder would store of a raw picture, byte for byte. Raises ImageError."""
        return encode(rescaled(raw, self.rules), quality=self.rules.quality, subsampling=self.rules.subsampling)

    def views(self, jpegs: Sequence[bytes], views: str = "centre") -> Tensor:
        """Return the views of stored JPEGs, one at least: float32, RGB grey levels less the mean.

        (n, 3, view, view) of `centre`, (n, 10, 3, view, view) of `ten`, (n, 9, 3, view, view) of `nine`.
        Raises DatasetError as `pixels`.
        """
        return self.seen([pixels(jpeg, self.rules.size) for jpeg in jpegs], views)

    def seen(self, pictures: Sequence[np.ndarray], views: str = "centre") -> Tensor:
        """Return `views` of stored pictures, (size, size, 3) uint8 each."""
        options = augment.ViewOptions(views=views, view=self._view, mean=self._mean)
        recipe = augment.AlexNet(options, self._statistics, self.rules.size, seed=0)
        return torch.from_numpy(np.stack([self._seen(picture, recipe) for picture in pictures]))

    def _seen(self, picture: np.ndarray, recipe: augment.AlexNet) -> np.ndarray:
        crops = recipe.crops(0, 0, np.zeros(1, np.int64), None, np.array([picture.shape[:2]]))
        offset, std, deviation = crops.offset[0], crops.std[0], recipe.mean_deviations.get(recipe.divisor(0))
        if not recipe.several:
            return augment.reference(picture, crops, 0, deviation, recipe.aligned)
        views = []
        for box in recipe.several:
            less = deviation
            if deviation is not None and recipe.aligned:
                less = augment.reference_view(deviation, *box, self._view)
            view = augment.reference_view(picture, *box, self._view)
            views.append(augment.reference_normalise(view, offset, std, less))
        return np.stack(views)


def pixels(jpeg: bytes, size: int) -> np.ndarray:
    """Return the (size, size, 3) uint8 RGB pixels of a stored JPEG. Raises DatasetError if it has no such pixels."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
        if (height, width) != (size, size):  # before memory is taken for what a header may claim
            raise ValueError(f"{width} × {height} pixels")
        return np.asarray(simplejpeg.decode_jpeg(jpeg, "RGB"))
    except ValueError as error:
        damage = f"a stored picture does not decode to {size} × {size} pixels ({error})"
        raise DatasetError(f"{damage}; look at the data with tools/verify_shards.py") from error

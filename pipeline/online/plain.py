"""The same shards for other models: torchvision's and timm's recipe, and plain WebDataset."""

import io
import math
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import numpy as np

from pipeline import UserError, manifest, storage
from pipeline.online.batch import Crops, Transform, require_at_least, require_one_of
from pipeline.online.philox import REGION, VIEW, keyed_words

if TYPE_CHECKING:
    import webdataset as wds

VIEW_SIZE = 224  # pixels
MEAN = (255 * np.array([0.485, 0.456, 0.406])).astype(np.float32)  # grey levels: the constants of torchvision and timm
STD = (255 * np.array([0.229, 0.224, 0.225])).astype(np.float32)
TRIES = 10
SCALE = (0.08, 1.0)  # share of the picture's area
RATIO = (3 / 4, 4 / 3)  # width / height


class ImageNet(Transform):
    """The recipe that today's ImageNet models are trained with; see `batch.Transform`.

    "random" views are torchvision's RandomResizedCrop(224), bilinear with antialiasing, and RandomHorizontalFlip;
    "centre" views its CenterCrop(224), which after a build with --size 256 is Resize(256) and CenterCrop(224). Both are
    normalised with ImageNet's customary mean and deviation. timm's defaults are the same views, before its colour
    jitter and but for its choice of filters.
    Raises UserError: unknown views; from `crops`, a picture that no centre view fits in.
    """

    view = decoded = VIEW_SIZE

    def __init__(self, views: str = "random", seed: int = 2012) -> None:
        require_one_of(("random", "centre"), views=views)
        self.training = self.resize = views == "random"
        self._views, self._seed = views, seed

    def crops(self, step: int, epoch: int, ids: np.ndarray, owners: np.ndarray | None, sizes: np.ndarray) -> Crops:
        n = len(ids)
        if self.training:
            start, shape, flip = draw_regions(self._seed, epoch, ids if owners is None else owners, sizes)
        else:
            start, shape, flip = _centre(ids, sizes), np.full((n, 2), VIEW_SIZE, np.int32), np.zeros(n, np.int32)
        return Crops(start, shape, flip, np.tile(MEAN, (n, 1)), np.tile(STD, (n, 1)))

    def described(self) -> dict[str, Any]:
        return {"recipe": "imagenet", "views": self._views}


def draw_regions(
    seed: int, epoch: int, ids: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the crop boxes of RandomResizedCrop in pictures of `sizes` (n, 2): a function of (seed, epoch, id) and size.

    Try t = 0 … 9 has the four Philox words w of the counter (REGION + 256 t, epoch, id mod 2³², id div 2³²). In
    float64, u = w/2³²: area = height · width · (0.08 + 0.92 u₀), ratio = exp(ln ¾ + (ln 4⁄3 − ln ¾) u₁); the window is
    √(area/ratio) high and √(area · ratio) wide, rounded, halves to even. The first one that fits is taken, at
    top = ⌊w₂ (height − its height + 1)/2³²⌋, and left from w₃ likewise, in integers. Where none fits, it is the largest
    window of a permitted ratio, in the centre. Mirrored where bit 31 of word 2 of (VIEW, epoch, …) is set, as in
    `augment.draw`. (exp may differ by 1 ulp between machines: one window in some 10¹³ by a pixel.)
    Returns start (n, 2), shape (n, 2) in pixels and flip (n,), int32.
    """
    words = keyed_words(seed, REGION + (np.arange(TRIES)[:, None] << 8), epoch, ids)  # (10, n, 4)
    unit = words[..., :2] / 2.0**32
    area = sizes.prod(1) * (SCALE[0] + (SCALE[1] - SCALE[0]) * unit[..., 0])
    narrowest, widest = map(math.log, RATIO)
    ratio = np.exp(narrowest + (widest - narrowest) * unit[..., 1])
    tried = np.rint(np.sqrt(np.stack([area / ratio, area * ratio], axis=-1))).astype(np.int64)  # (10, n, 2)
    fits = ((tried > 0) & (tried <= sizes)).all(2)
    taken = fits.argmax(0), np.arange(len(ids))  # the first that fits
    fitted = fits[taken][:, None]
    height, width = sizes.T
    permitted = np.rint(np.stack([width / RATIO[0], height * RATIO[1]], axis=1))
    shape = np.where(fitted, tried[taken], np.minimum(sizes, permitted)).astype(np.int64)
    positions = (sizes - shape + 1).astype(np.uint64)
    drawn = ((words[taken][:, 2:] * positions) >> np.uint64(32)).astype(np.int64)  # bias below positions/2³²
    start = np.where(fitted, drawn, (sizes - shape) // 2)
    flip = keyed_words(seed, VIEW, epoch, ids)[:, 2] >> np.uint32(31)
    return start.astype(np.int32), shape.astype(np.int32), flip.astype(np.int32)


def webdataset(data: str | Path, split: str, *, shuffle: int = 0, seed: int = 2012) -> "wds.WebDataset":
    """Return a WebDataset pipeline over a data set's shards: (PIL image in RGB, label), −1: none.

    Shards are dealt to the ranks of a distributed run, then to the workers of a torch DataLoader (batch_size=None where
    the images stay PIL's); who gets no shard gives nothing. `shuffle`: samples in webdataset's shuffle buffer, which
    starts with at most 100; the shards of each worker are shuffled too. Every pass has another order, given by `seed`,
    as long as the workers live (persistent_workers=True). 0: the order of the build.
    The data set is local, or an HTTP server's: each worker then holds one whole shard, checked by its SHA-256.
    Raises UserError: a directory in an object store, damaged or not one; an empty split; a path that it cannot open.
    """
    require_at_least(0, shuffle=shuffle)
    root = storage.location(data)
    served = storage.is_served(root)
    if storage.is_remote(root) and not served:
        raise UserError(f"{data}: webdataset() reads local shards; copy the dataset directory to this machine first")
    built = manifest.load(root if served else Path(os.path.realpath(root)))
    if not built.split(split).samples:
        raise UserError(f"{root}: the split {split!r} is empty")
    shards = [str(built.root / shard.name) for shard in built.split(split).shards]
    if not served and urlparse(shards[0]).path != shards[0]:
        raise UserError(f"{shards[0]}: webdataset takes a path for a URL, and this one has '#' or '?'; rename it")
    import webdataset as wds  # slow

    seed <<= 32  # webdataset adds the number of the pass: the second of one seed would be the first of the next
    dataset = wds.WebDataset(
        shards,
        shardshuffle=len(shards) if shuffle else False,
        detshuffle=shuffle > 0,
        nodesplitter=wds.split_by_node,
        workersplitter=wds.split_by_worker,
        empty_check=False,
        seed=seed,
    )
    if served:  # webdataset itself would call curl, without a token
        opener = partial(_fetched, built)
        stages = dataset.pipeline
        dataset.pipeline = [opener if isinstance(stage, wds.cache.StreamingOpen) else stage for stage in stages]
    if shuffle:
        dataset = dataset.compose(wds.detshuffle(shuffle, seed=seed))
    return dataset.decode("pil").map(_pair)


def _centre(ids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return top and left of the centre views, (n, 2) int32: half the margin, halves to even, as CenterCrop has it."""
    small = np.flatnonzero(sizes.min(1) < VIEW_SIZE)
    if small.size:
        height, width = sizes[small[0]]
        reason = f"a picture of {width} × {height} pixels; a centre view needs {VIEW_SIZE} each way"
        raise UserError(f"sample {ids[small[0]]}: {reason}; build with --size 256")
    return np.rint((sizes - VIEW_SIZE) / 2).astype(np.int32)


def _fetched(data: manifest.Manifest, sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield webdataset's sources, shards by their URLs, with the content of each."""
    for source in sources:
        name = source["url"].removeprefix(f"{data.root / ''}")
        yield source | {"stream": io.BytesIO(data.read(name))}


def _pair(sample: dict[str, Any]) -> tuple[Any, int]:
    return sample["jpg"], sample.get("cls", -1)

"""Batch, the one record that the loader fills; Crops, its crop boxes and colours; Transform, which draws them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import UserError

ViewBox = tuple[int, int, bool]  # top and left of a view in its picture, in pixels; True: the view is mirrored


@dataclass(frozen=True)
class Crops:
    """Crop box, flip, offset and deviation of each sample of a batch.

    Pixels x become (x − offset) · (1/std) − mean deviation, in float32; the last is of `Transform.mean_deviations`.
    """

    start: np.ndarray  # (n, 2) int32: top and left, pixels
    shape: np.ndarray  # (n, 2) int32: height and width, pixels
    flip: np.ndarray  # (n,) int32: 0 or 1
    offset: np.ndarray  # (n, 3) float32, grey levels: the mean colour, less the lighting
    std: np.ndarray  # (n, 3) float32, grey levels

    def __getitem__(self, positions: slice) -> "Crops":
        return Crops(*(getattr(self, name)[positions] for name in self.__dataclass_fields__))


class Transform(ABC):
    """The views that a model sees: `augment.AlexNet` or `plain.ImageNet`."""

    view: int  # pixels of a side of a view
    decoded: int  # pixels of a side of what is decoded: the view, or the picture that several views are cut from
    training: bool  # random views, epoch after epoch; else every sample once, in the order of the ids
    resize = False  # crop boxes differ in shape and are resized to the view
    chunk = 1  # samples in a row of a global batch that share crop box and flip
    aligned = False  # the mean deviation is as large as the stored picture; each view has its own box of it, flipped
    several: tuple[ViewBox, ...] = ()  # the views that each decoded picture is cut into; empty: it is the view
    # Divisor → mean image less mean colour, over the divisor, (h, w, 3) float32; empty: none is subtracted
    mean_deviations: Mapping[float, np.ndarray] = MappingProxyType({})

    def divisor(self, step: int) -> float:
        """Return the key of `mean_deviations` for a step."""
        return 1.0

    @abstractmethod
    def crops(self, step: int, epoch: int, ids: np.ndarray, owners: np.ndarray | None, sizes: np.ndarray) -> Crops:
        """Draw the crops of samples `ids` (n,) int64: a function of (seed, epoch, id); `step` is one of that epoch.

        `owners` (n,) int64: the samples whose crop box and flip are used, where several share them (None: each its
        own); `sizes` (n, 2) int64: height and width of the stored pictures.
        """

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """Return the options that determine the views and stay the same during a run, for `Loader.state_dict`."""


@dataclass
class Batch:
    """A rank's part of one global batch; it may be empty.

    Several views of each picture have one more dimension: (n, 10, 3, view, view) of `ten`, (n, 9, …) of `nine`.
    """

    step: int
    epoch: int
    position: int  # of its first sample in the global batch
    global_size: int  # samples of the global batch
    ids: np.ndarray  # (n,) int64
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (n,), first device; −1: none
    replicas: tuple[Tensor, ...] = ()  # the images, on each device

    # What the stages before hand on to the next. `ids` differs from `requested_ids` where a bad sample is replaced.
    requested_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)  # whose crops are used
    crop_owner_ids: np.ndarray | None = field(default=None, repr=False)
    jpegs: list[np.ndarray] = field(default_factory=list, repr=False)  # (bytes,) uint8 each, until they are decoded
    crops: Crops = field(init=False, repr=False)  # set when the samples are read
    tensors: list[tuple[Tensor, ...]] = field(default_factory=list, repr=False)  # what `Normaliser.images` takes
    kind: str = ""  # of the records that `tensors` begin with; empty: views, or whole pictures, (n, h, w, 3)
    worker: str = ""  # of decoding workers, which gave the part that came last, by its name
    workers: int = 0  # that answer now
    read_at: float = field(default=0.0, repr=False)  # or when the last part came; by `time.perf_counter`, as decoded_at
    decoded_at: float = field(default=0.0, repr=False)

    def draw(self, recipe: Transform, sizes: np.ndarray) -> None:
        """Set the crops, of stored pictures of `sizes` (n, 2) int64: height and width in pixels."""
        self.crops = recipe.crops(self.step, self.epoch, self.requested_ids, self.crop_owner_ids, sizes)

    @property
    def images(self) -> Tensor:
        """(n, 3, view, view) on the first device: RGB grey levels less the mean, or what the recipe makes of them."""
        return self.replicas[0]


class NoWorkerError(UserError):
    """No decoding worker has answered for as long as the consumer has patience, or all refuse to answer."""


class Undecodable(Exception):
    """The pictures at `positions` of a batch do not decode."""

    def __init__(self, batch: Batch, positions: list[int]) -> None:
        super().__init__(f"step {batch.step}: pictures {positions} do not decode")
        self.batch, self.positions = batch, positions


def require_one_of(known: Iterable[str], **options: str) -> None:
    """Raise UserError where an option has none of the known values."""
    for name, value in options.items():
        if value not in known:
            raise UserError(f"{name}={value!r}: must be one of {', '.join(known)}")


def require_at_least(least: int, **options: int) -> None:
    """Raise UserError where an option is smaller."""
    for name, number in options.items():
        if number < least:
            raise UserError(f"{name}={number}: must be at least {least}")

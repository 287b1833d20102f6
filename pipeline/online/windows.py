"""What a recipe says of each picture of a batch: where its view is cut from, and the colours that become its zero."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Place = tuple[int, int, bool]  # of a view in a picture: top and left in pixels, and whether it is mirrored


@dataclass(frozen=True)
class Windows:
    """What is cut from each picture of a batch, and what is subtracted from it, and divided by.

    A view's pixels x become (x − offset) · (1/std) − rest, in float32; `Recipe.rest` is the same for a whole step.
    """

    start: np.ndarray  # (n, 2) int32: top and left, pixels
    shape: np.ndarray  # (n, 2) int32: height and width, pixels
    flip: np.ndarray  # (n,) int32: 0 or 1
    offset: np.ndarray  # (n, 3) float32, grey levels: the mean colour, less the lighting
    std: np.ndarray  # (n, 3) float32, grey levels

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, places: slice) -> "Windows":
        return Windows(*(getattr(self, name)[places] for name in self.__dataclass_fields__))


class Recipe(Protocol):
    """What a model sees of the pictures."""

    view: int  # pixels of a side of a view
    decoded: int  # pixels of a side of what the graph gives: the view, or the picture that several are cut from
    resize: bool  # whether windows differ in shape and are resized to the view
    training: bool  # random views, epoch after epoch; else every sample once, in the order of the ids
    aligned: bool  # `rest` is as large as the stored picture, and each view has its own window of it, flipped with it
    several: tuple[Place, ...]  # the views that what the graph gives is cut into; none: it is the view

    def windows(self, step: int, epoch: int, ids: np.ndarray, heads: np.ndarray | None, sizes: np.ndarray) -> Windows:
        """The windows of samples `ids` (n,) int64, a function of (seed, epoch, id), where `step` is in that epoch.

        `heads` (n,): the samples whose crop and flip are taken, where several share them (None: each its own);
        `sizes` (n, 2) int64: height and width of the stored pictures.
        """
        ...

    def rest(self, step: int) -> np.ndarray | None:
        """What is subtracted at last: (height, width, 3) float32, or None. The same array for steps with the same."""
        ...

    def described(self) -> dict[str, Any]:
        """The options that determine the views, but for those that may change during a run: for `state_dict`."""
        ...

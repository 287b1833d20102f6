"""Samples of a data set as pictures: as stored, and as a network sees them; the mean image, and what lighting does."""

import io
import json
import os
import threading
import zlib
from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.files import TAR_BLOCK
from pipeline.manifest import DatasetError, Manifest
from pipeline.service.site import Missing
from pipeline.volumes import open_regular

SKIPPED_FILE = "skipped.jsonl"
MENDING = "mend it by a job of the kind verify with `repair`"
MID_GREY = 128  # grey levels: added to an input, whose mean is about zero, to show it
MOST = 3.0  # standard deviations along a component
KEPT = 8  # data sets whose records stay in memory: those of ImageNet take 51 MB
_known: "OrderedDict[int, Contents]" = OrderedDict()
_lock = threading.Lock()
_decoding = threading.Semaphore(2)  # pictures at a time


class Contents:
    """Values computed of a data set once: what was skipped, the records of its samples, their numbers by class."""

    def __init__(self, data: Manifest) -> None:
        self.data = data
        self._records: dict[str, np.ndarray] = {}

    @cached_property
    def skipped(self) -> list[dict[str, Any]]:
        """Return the lines of skipped.jsonl. Raises DatasetError."""
        names = [name for name in (SKIPPED_FILE,) if name in self.data.files]
        return [json.loads(line) for name in names for line in self.data.read(name).splitlines()]

    def records(self, split: str) -> np.ndarray:
        """Return the records of a split, (n,) of manifest.SAMPLE. Raises Missing, DatasetError."""
        if split not in self.data.splits:
            raise Missing(f"{split:.40}: no such split; there are: {', '.join(self.data.splits)}")
        if split not in self._records:
            self._records[split] = self.data.samples(split)
        return self._records[split]

    def histogram(self, split: str) -> np.ndarray:
        """Return the number of samples of each class, (classes,) int64; those without a label count for none."""
        labels = self.records(split)["label"]
        return np.bincount(labels[labels >= 0], minlength=len(self.data.classes))

    def record(self, split: str, number: int) -> np.void:
        """Return the record of a sample. Raises Missing."""
        records = self.records(split)
        if not 0 <= number < len(records):
            raise Missing(f"{number}: no such sample; {split} has {len(records):,}, from 0 on")
        record: np.void = records[number]
        return record

    def stored(self, split: str, number: int) -> tuple[bytes, str]:
        """Return the JPEG of a sample and its key. Raises DatasetError: it is damaged."""
        record = self.record(split, number)
        path = self.data.root / f"{split}/{split}-{record['shard']:06d}.tar"
        try:
            with open_regular(path) as shard:
                start = int(record["offset"]) - TAR_BLOCK
                read = os.pread(shard.fileno(), TAR_BLOCK + int(record["size"]), start)
        except OSError as error:
            raise DatasetError(
                f"{path}: {error.strerror}; mend it by a job of the kind verify with `repair`"
            ) from error
        jpeg, key = read[TAR_BLOCK:], read[:100].partition(b"\0")[0].decode("ascii", "replace")
        if zlib.crc32(jpeg) != record["crc32"]:
            raise DatasetError(f"{path}: damaged at sample {number}; {MENDING}")
        return jpeg, key.removesuffix(".jpg")

    def pixels(self, split: str, number: int) -> np.ndarray:
        """Return the pixels of a stored picture, (size, size, 3) uint8 RGB. Raises DatasetError."""
        jpeg, _ = self.stored(split, number)
        with _decoding:
            try:
                height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
                if height * width > self.data.recipe.max_pixels:  # before memory is taken for what a header may claim
                    raise ValueError(f"{width} × {height} pixels")
                return np.asarray(simplejpeg.decode_jpeg(jpeg, "RGB"))
            except ValueError as error:
                raise DatasetError(
                    f"sample {number} of {split} does not decode ({error}); verify the data set"
                ) from error

    def view(self, split: str, number: int, seed: int, epoch: int, lit: bool) -> np.ndarray:
        """Return a sample as the network sees it in an epoch, less the mean, plus mid-grey: (view, view, 3) uint8.

        Crop, mirroring and lighting are those of a run with this seed; other splits than train have the centre view.
        Raises DatasetError: it is damaged; UserError: no view fits in it.
        """
        from pipeline.online import augment  # with torch, which takes a second or two

        size = self.data.recipe.size
        if self.data.recipe.crop == "none":
            raise DatasetError(
                "a data set of whole pictures: their crop boxes are those of `recipe=imagenet`, not shown"
            )
        side = augment.VIEW_SIZE if size >= augment.VIEW_SIZE else size * augment.VIEW_SIZE // 256
        views, lighting = "random" if split == "train" else "centre", "code" if lit else "off"
        options = augment.ViewOptions(views=views, lighting=lighting, view=side)
        recipe = augment.AlexNet(options, self.data.statistics(), size, seed)
        crops = recipe.crops(0, epoch, np.array([number]), None, np.array([[size, size]]))
        deviation = recipe.mean_deviations[recipe.divisor(0)]
        seen = augment.reference(self.pixels(split, number), crops, 0, deviation)
        return np.clip(np.rint(seen.transpose(1, 2, 0) + MID_GREY), 0, 255).astype(np.uint8)

    def shifted(self, component: int, amount: float, number: int = 0) -> np.ndarray:
        """Return a training picture moved by `amount` standard deviations along a component of colour, as uint8."""
        statistics = self.data.statistics_summary
        axis = np.array(statistics["eigenvectors"])[:, component]
        deviation = np.sqrt(max(statistics["eigenvalues"][component], 0.0))
        moved = self.pixels("train", number) + amount * deviation * axis
        return np.clip(np.rint(moved), 0, 255).astype(np.uint8)

    def mean(self) -> np.ndarray:
        """Return the mean image, (size, size, 3) uint8; of whole pictures a square of the mean colour."""
        mean = np.rint(self.data.statistics().mean_image).astype(np.uint8)
        return mean if len(mean) > 1 else np.broadcast_to(mean, (64, 64, 3))


def contents(data: Manifest) -> Contents:
    """Return the contents of a data set, the same as long as its manifest is."""
    with _lock:
        known = _known.pop(id(data), None) or Contents(data)  # which keeps the manifest, so its id is its own
        _known[id(data)] = known
        while len(_known) > KEPT:
            _known.popitem(last=False)
        return known


def png(pixels: np.ndarray) -> bytes:
    """Return the PNG of (height, width, 3) uint8 RGB."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "png", compress_level=1)
    return file.getvalue()

"""The pictures that all contestants work on: a folder per class, some thousands of JPEGs from any raw data we read."""

import os
from dataclasses import dataclass
from pathlib import Path

import simplejpeg  # type: ignore[import-untyped,unused-ignore]

from pipeline import UserError
from pipeline.offline.sources import find_sources


@dataclass(frozen=True)
class Pictures:
    """`images` files below `folder`, of which `distinct` differ; the others are links to those."""

    folder: Path
    images: int
    distinct: int
    left_out: int  # not a JPEG, or not whole: a peer may not survive those
    mean_bytes: float
    mean_pixels: float


def prepare(raw: Path, folder: Path, images: int) -> Pictures:
    """Write pictures drawn evenly over the training images of `raw` to `folder`, until there are `images` of them.

    Raises:
        UserError: `raw` has no layout that we know, or not one usable picture.
    """
    table = find_sources(raw, allow_incomplete=True).images
    training = [i for i in range(len(table)) if table[i].split == "train"]
    chosen = training if len(training) <= images else [training[k * len(training) // images] for k in range(images)]
    files: list[Path] = []
    sizes, pixels = [], []
    for i in chosen:
        image = table[i]
        data = image.read()
        if area := _pixels(data):
            path = folder / (image.wnid or "none") / f"{len(files):08d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            files.append(path)
            sizes.append(len(data))
            pixels.append(area)
    if not files:
        raise UserError(f"{raw}: none of {len(chosen):,} pictures looked at is a whole JPEG")
    for number in range(len(files), images):
        original = files[number % len(files)]
        os.link(original, original.with_name(f"{number:08d}.jpg"))
    whole = len(files)
    return Pictures(folder, images, whole, len(chosen) - whole, sum(sizes) / whole, sum(pixels) / whole)


def _pixels(data: bytes) -> int:
    """Width × height; 0 for what libjpeg-turbo does not decode to the end."""
    try:
        height, width, _ = simplejpeg.decode_jpeg(data).shape
    except ValueError:
        return 0
    return int(height * width)

"""The stored pictures in FFCV's .beton, their JPEG bytes as they are ("jpeg") or their pixels ("raw")."""

import io
import sys
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
from ffcv.fields import IntField, RGBImageField  # type: ignore[import-not-found,unused-ignore]
from ffcv.fields.rgb_image import IMAGE_MODES  # type: ignore[import-not-found,unused-ignore]
from ffcv.writer import DatasetWriter  # type: ignore[import-not-found,unused-ignore]
from PIL import Image

from tools.peers.loadjob import LoadJob, Stored


class StoredJpeg(RGBImageField):  # type: ignore[misc,unused-ignore]
    """Keeps JPEG bytes, that FFCV itself would encode anew from pixels. It is read as an RGBImageField."""

    def encode(self, destination: Any, image: bytes, malloc: Callable[[int], tuple[int, np.ndarray]]) -> None:
        destination["mode"] = IMAGE_MODES["jpg"]
        destination["width"], destination["height"] = Image.open(io.BytesIO(image)).size
        destination["data_ptr"], storage = malloc(len(image))
        storage[:] = np.frombuffer(image, np.uint8)


class Pictures:
    """What FFCV indexes: (JPEG bytes or RGB picture, label)."""

    def __init__(self, pictures: list[Stored], raw: bool) -> None:
        self.pictures, self.raw = pictures, raw

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        jpeg, label = self.pictures[i].jpeg(), self.pictures[i].label
        return (np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) if self.raw else jpeg), label


def main() -> None:
    job, raw = LoadJob.from_command(), sys.argv[6] == "raw"
    job.converted.mkdir(parents=True)
    pictures = Pictures(list(islice(job.pictures(), job.images)), raw)
    fields = {"image": RGBImageField(write_mode="raw") if raw else StoredJpeg(), "label": IntField()}
    writer = DatasetWriter(str(job.converted / "pictures.beton"), fields, num_workers=job.workers)
    writer.from_indexed_dataset(pictures, chunksize=max(1, min(100, len(pictures) // (8 * job.workers))))


if __name__ == "__main__":
    main()

"""FFCV's DatasetWriter with JPEG storage, fed by Pillow as in its own examples; the longer side to 256, no crop."""

import multiprocessing
import os
import time
from typing import Any

os.environ["NUMBA_THREADING_LAYER"] = (
    "workqueue"  # not needed to write; with TBB, the process hangs at exit on one core
)

from ffcv.fields import IntField, RGBImageField  # type: ignore[import-not-found,unused-ignore]
from ffcv.writer import DatasetWriter  # type: ignore[import-not-found,unused-ignore]
from PIL import Image

from tools.peers.job import QUALITY, SIDE, Job, Picture, Span, report


class Pictures:
    """What FFCV indexes: (RGB picture, label). `began` is when the first was asked for, in whichever process."""

    def __init__(self, pictures: list[Picture]) -> None:
        self.pictures = pictures
        self.began = multiprocessing.Value("d", 0.0)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        with self.began.get_lock():
            self.began.value = self.began.value or time.monotonic()
        with Image.open(self.pictures[i].path) as image:
            return image.convert("RGB"), self.pictures[i].label


def main() -> None:
    job = Job.from_command()
    job.out.mkdir(parents=True)
    pictures = Pictures(job.pictures())
    image = RGBImageField(write_mode="jpg", max_resolution=SIDE, jpeg_quality=QUALITY)
    writer = DatasetWriter(
        str(job.out / "pictures.beton"), {"image": image, "label": IntField()}, num_workers=job.workers
    )
    writer.from_indexed_dataset(pictures, chunksize=max(1, min(100, len(pictures) // (8 * job.workers))))
    report(Span(writer.num_samples, pictures.began.value, time.monotonic()), "ffcv", "opencv-python", "pillow", "torch")


if __name__ == "__main__":
    main()

"""The ceiling: libjpeg-turbo decodes each picture and, in the second form, encodes a square for it; nothing else."""

import os
import sys
from pathlib import Path

import numpy as np
import simplejpeg  # type: ignore[import-untyped,unused-ignore]
from PIL import Image

from pipeline.image import rescale
from tools.peers.job import QUALITY, SIDE, Job, Picture, report, run_shares

# Raw bytes and the rescaled square by inode, prepared before the fork: neither reading nor rescaling is timed.
_PREPARED: dict[int, tuple[bytes, np.ndarray]] = {}


def main() -> None:
    job = Job.from_command()
    for picture in job.pictures():
        if (inode := os.stat(picture.path).st_ino) not in _PREPARED:
            data = Path(picture.path).read_bytes()
            square = rescale(Image.fromarray(simplejpeg.decode_jpeg(data)), SIDE)
            _PREPARED[inode] = data, np.ascontiguousarray(square[..., :3])
    report(run_shares(job, {"decode": decode, "decode-encode": decode_encode}[sys.argv[5]]), "simplejpeg")


def decode(pictures: list[Picture], out: Path, per_shard: int) -> int:
    for picture in pictures:
        simplejpeg.decode_jpeg(_PREPARED[os.stat(picture.path).st_ino][0])
    return len(pictures)


def decode_encode(pictures: list[Picture], out: Path, per_shard: int) -> int:
    for picture in pictures:
        data, square = _PREPARED[os.stat(picture.path).st_ino]
        simplejpeg.decode_jpeg(data)
        simplejpeg.encode_jpeg(square, quality=QUALITY, colorsubsampling="420")
    return len(pictures)


if __name__ == "__main__":
    main()

"""img2dataset's Resizer and WebDatasetSampleWriter, fed from files: what its workers do after the download."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # read at the import: no look for newer versions

import pyarrow as pa
from img2dataset.resizer import Resizer  # type: ignore[import-not-found,unused-ignore]
from img2dataset.writer import WebDatasetSampleWriter  # type: ignore[import-not-found,unused-ignore]

from tools.peers.job import QUALITY, SIDE, Job, Picture, report, run_shares

TEXTS = ("key", "path", "status", "error_message", "sha256")
NUMBERS = ("label", "width", "height", "original_width", "original_height")
SCHEMA = pa.schema([(name, pa.string()) for name in TEXTS] + [(name, pa.int32()) for name in NUMBERS])


def main() -> None:
    report(run_shares(Job.from_command(), write), "img2dataset", "opencv-python-headless", "albumentations")


def write(pictures: list[Picture], out: Path, per_shard: int) -> int:
    resizer = Resizer(SIDE, "center_crop", False, encode_quality=QUALITY)
    stored = 0
    for number, start in enumerate(range(0, len(pictures), per_shard)):
        writer = WebDatasetSampleWriter(number, str(out), False, 5, SCHEMA, "jpg")
        for picture in pictures[start : start + per_shard]:
            stream = io.BytesIO(Path(picture.path).read_bytes())
            jpeg, width, height, original_width, original_height, error = resizer(stream)
            if error:
                raise ValueError(f"{picture.path}: {error}")
            meta: dict[str, Any] = {"key": picture.key, "path": picture.path, "label": picture.label}
            meta |= {"status": "success", "error_message": None, "width": width, "height": height}
            meta |= {"original_width": original_width, "original_height": original_height}
            meta["sha256"] = hashlib.sha256(stream.getvalue()).hexdigest()  # its default
            writer.write(jpeg, picture.key, None, meta)
            stored += 1
        writer.close()
    return stored


if __name__ == "__main__":
    main()

"""cuda-convnet2's recipe with today's OpenCV: shorter side to 256 by INTER_AREA (bicubic where smaller), centre crop,
JPEG 95; the JPEGs and labels of a batch in one pickle."""

import pickle
from pathlib import Path

import cv2  # type: ignore[import-not-found,unused-ignore]

from tools.peers.job import QUALITY, SIDE, Job, Picture, report, run_shares


def main() -> None:
    cv2.setNumThreads(1)  # a process a core, as with the others
    report(run_shares(Job.from_command(), write), "opencv-python-headless")


def write(pictures: list[Picture], out: Path, per_shard: int) -> int:
    stored = 0
    for number, start in enumerate(range(0, len(pictures), per_shard)):
        batch = pictures[start : start + per_shard]
        jpegs = [stored_jpeg(picture.path) for picture in batch]
        content = {"data": jpegs, "labels": [picture.label for picture in batch]}
        (out / f"data_batch_{number}").write_bytes(pickle.dumps(content))
        stored += len(jpegs)
    return stored


def stored_jpeg(path: str) -> bytes:
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    height, width = image.shape[:2]
    scale = SIDE / min(height, width)
    width, height = max(SIDE, round(scale * width)), max(SIDE, round(scale * height))
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    square = image[top : top + SIDE, left : left + SIDE]
    return bytes(cv2.imencode(".jpg", square, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1])


if __name__ == "__main__":
    main()

"""Builders, each run in its own Python as `PYTHON peers_build.py JOB.json`; only functions import their peers.

The docstring of a job is its note below the table.
"""

import io
import json
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

SIDE = 256  # pixels of a side of the stored square
QUALITY = 95  # JPEG, libjpeg's scale


@dataclass(frozen=True)
class Job:
    """Work from `source` (a folder of class folders, or a dataset directory) to the new folder `out`."""

    function: str
    source: str
    out: str
    workers: int
    options: dict[str, Any]
    per_shard: int = 0
    batch: int = 0
    batches: int = 0

    def pictures(self) -> list["Picture"]:
        """Return the raw pictures by class and name."""
        return [
            Picture(str(path), label, path.stem)
            for label, folder in enumerate(sorted(Path(self.source).iterdir()))
            for path in sorted(folder.iterdir())
        ]


class Picture(NamedTuple):
    path: str
    label: int
    key: str


Write = Callable[[list[Picture], Path, int], int]  # pictures, new folder, pictures per shard → pictures written


def main(functions: Mapping[str, Callable[[Job], None]]) -> None:
    """Run the job that the command line names, on as many cores as it has workers: nobody gains from more threads."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-job.workers :])
    functions[job.function](job)


def report(images: int, began: float, ended: float, *packages: str, **more: object) -> None:
    """Print the figures as the last line; "rss" is the peak of the largest process, in bytes."""
    peak = max(own_peak(), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    installed = {package: version(package) for package in packages}
    figures = {"images": images, "seconds": ended - began, "rss": peak, "versions": installed, **more}
    print("\n" + json.dumps(figures), flush=True)


def own_peak() -> int:
    """Return this process's peak of resident memory in bytes. (getrusage would include that of its parent.)"""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def in_processes(job: Job, write: Write, *packages: str) -> None:
    """Let every worker write every `workers`-th picture. Workers are forked: what was imported is there already."""
    fork, pictures = multiprocessing.get_context("fork"), job.pictures()
    results = fork.SimpleQueue()

    def work(worker: int) -> None:
        out = Path(job.out) / str(worker)
        out.mkdir(parents=True)
        began = time.monotonic()
        stored = write(pictures[worker :: job.workers], out, job.per_shard)
        results.put((stored, began, time.monotonic()))

    processes = [fork.Process(target=work, args=(worker,)) for worker in range(job.workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(1)  # its exception is the last line on stderr
    stored, began, ended = zip(*(results.get() for _ in processes))
    report(sum(stored), min(began), max(ended), *packages)


def decode(job: Job) -> None:
    """Decode by libjpeg-turbo through simplejpeg, from bytes in memory; nothing is rescaled, encoded or written."""
    turbojpeg(job, encode=False)


def decode_encode(job: Job) -> None:
    """Do the same, then encode one 256 × 256 picture, prepared beforehand, at quality 95, 4:2:0."""
    turbojpeg(job, encode=True)


def turbojpeg(job: Job, encode: bool) -> None:
    """Decode each picture, and encode a square for it."""
    import simplejpeg  # type: ignore[import-untyped,unused-ignore]

    prepared = {}  # by inode, before the fork: neither reading nor rescaling is timed
    for picture in job.pictures():
        if (inode := os.stat(picture.path).st_ino) not in prepared:
            square = simplejpeg.decode_jpeg(pillow_jpeg(picture.path))
            prepared[inode] = Path(picture.path).read_bytes(), square

    def write(pictures: list[Picture], out: Path, per_shard: int) -> int:
        for picture in pictures:
            data, square = prepared[os.stat(picture.path).st_ino]
            simplejpeg.decode_jpeg(data)
            if encode:
                simplejpeg.encode_jpeg(square, quality=QUALITY, colorsubsampling="420")
        return len(pictures)

    in_processes(job, write, "simplejpeg")


def penstock(job: Job) -> None:
    """Do the whole job: decode, bicubic rescaling, crop, JPEG 95, mean image and covariance, tar, index, labels,
    digests of raw pictures and of files, fsync of every file, manifest."""
    checkout, started = job.options["checkout"], time.monotonic()
    command = [sys.executable, f"{checkout}/tools/build_shards.py", job.source, job.out, "--layout", "class-folders"]
    command += ["--workers", str(job.workers), "--samples-per-shard", str(job.per_shard), "--holdout", "0"]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": checkout}, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not Path(job.out, "train").exists():
            time.sleep(0.002)
        began = time.monotonic()
    ended = time.monotonic()
    if process.returncode:
        sys.exit(process.returncode)
    images = json.loads(Path(job.out, "dataset.json").read_text())["splits"]["train"]["samples"]
    report(images, began, ended, "pillow-simd", "simplejpeg", "numpy", whole=ended - started)


def pillow_jpeg(path: str) -> bytes:
    """Return the JPEG to store, as hand-written loops make it: Pillow, shorter side to 256, bicubic, centre crop."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    short = min(image.size)
    width, height = (max(SIDE, round(side * SIDE / short)) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def webdataset(job: Job) -> None:
    """Rescale by stock Pillow, bicubic; tars and labels; no statistics, index, digests or fsync."""
    from webdataset import ShardWriter

    def write(pictures: list[Picture], out: Path, per_shard: int) -> int:
        with ShardWriter(str(out / "%06d.tar"), maxcount=per_shard, verbose=0) as writer:
            for picture in pictures:
                writer.write({"__key__": picture.key, "jpg": pillow_jpeg(picture.path), "cls": picture.label})
            return int(writer.total)

    in_processes(job, write, "webdataset", "pillow")


def opencv(job: Job) -> None:
    """Rescale by OpenCV, INTER_AREA (bicubic where smaller); JPEGs and labels in a pickle per shard; turns pictures as
    their EXIF says; no statistics, index, digests or fsync."""
    import cv2  # type: ignore[import-not-found,unused-ignore]

    cv2.setNumThreads(1)  # a process a core, as with the others

    def jpeg(path: str) -> bytes:
        image = cv2.imread(path, cv2.IMREAD_COLOR)
        height, width = image.shape[:2]
        scale = SIDE / min(height, width)
        width, height = max(SIDE, round(scale * width)), max(SIDE, round(scale * height))
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
        left, top = (width - SIDE) // 2, (height - SIDE) // 2
        square = image[top : top + SIDE, left : left + SIDE]
        return bytes(cv2.imencode(".jpg", square, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1])

    def write(pictures: list[Picture], out: Path, per_shard: int) -> int:
        for start in range(0, len(pictures), per_shard):
            batch = pictures[start : start + per_shard]
            content = {"data": [jpeg(picture.path) for picture in batch], "labels": [p.label for p in batch]}
            (out / f"data_batch_{start}").write_bytes(pickle.dumps(content))
        return len(pictures)

    in_processes(job, write, "opencv-python-headless")


def img2dataset(job: Job) -> None:
    """Download nothing: fed from files; OpenCV, INTER_AREA (Lanczos where smaller); grey pictures stay grey; SHA-256 of
    the raw bytes, JSON per picture, parquet per shard; no statistics, index or fsync."""
    import hashlib

    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # read at the import: do not look for newer versions
    import pyarrow as pa
    from img2dataset.resizer import Resizer  # type: ignore[import-not-found,unused-ignore]
    from img2dataset.writer import WebDatasetSampleWriter  # type: ignore[import-not-found,unused-ignore]

    texts = ("key", "path", "status", "error_message", "sha256")
    numbers = ("label", "width", "height", "original_width", "original_height")
    schema = pa.schema([(name, pa.string()) for name in texts] + [(name, pa.int32()) for name in numbers])

    def write(pictures: list[Picture], out: Path, per_shard: int) -> int:
        resizer = Resizer(SIDE, "center_crop", False, encode_quality=QUALITY)
        for shard, start in enumerate(range(0, len(pictures), per_shard)):
            writer = WebDatasetSampleWriter(shard, str(out), False, 5, schema, "jpg")
            for picture in pictures[start : start + per_shard]:
                stream = io.BytesIO(Path(picture.path).read_bytes())
                jpeg, *sides, error = resizer(stream)
                if error:
                    raise ValueError(f"{picture.path}: {error}")
                meta: dict[str, Any] = picture._asdict() | {"status": "success", "error_message": None}
                meta |= dict(zip(numbers[1:], sides))
                meta["sha256"] = hashlib.sha256(stream.getvalue()).hexdigest()  # its default
                writer.write(jpeg, picture.key, None, meta)
            writer.close()
        return len(pictures)

    in_processes(job, write, "img2dataset", "opencv-python-headless", "albumentations")


def litdata(job: Job) -> None:
    """Rescale by stock Pillow, bicubic, within its own chunk format; index of chunks; order not kept; no statistics,
    digests or fsync."""
    starts = Path(job.out, "starts")
    starts.mkdir(parents=True)
    ended = litdata_chunks(job, partial(litdata_sample, starts=starts), job.pictures(), job.per_shard)
    index = json.loads(Path(job.out, "chunks/index.json").read_text())
    stored = sum(chunk["chunk_size"] for chunk in index["chunks"])
    began = min(float(start.read_text()) for start in starts.iterdir())
    report(stored, began, ended, "litdata", "pillow", "torch")


def litdata_sample(picture: Picture, starts: Path) -> dict[str, Any]:
    """Return a picture for LitData; the first of a process notes the time."""
    start = starts / str(os.getpid())
    if not start.exists():
        start.write_text(str(time.monotonic()))
    return {"image": pillow_jpeg(picture.path), "label": picture.label}


def litdata_chunks(job: Job, sample: Callable[[Any], dict[str, Any]], inputs: list[Any], per_chunk: int) -> float:
    """Write LitData's chunks to `out`/chunks; return the time of the end."""
    litdata_folders(job)
    from litdata import optimize  # type: ignore[import-not-found,unused-ignore]

    chunks = str(Path(job.out, "chunks"))
    optimize(fn=sample, inputs=inputs, output_dir=chunks, chunk_size=per_chunk, num_workers=job.workers, verbose=False)
    return time.monotonic()


def litdata_folders(job: Job) -> None:
    """Keep LitData's copies below `out`, before it is imported: by default it empties folders in /tmp."""
    for variable in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
        folder = Path(job.out, variable.lower())
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(folder)


def ffcv(job: Job) -> None:
    """Rescale the longer side to 256 without a crop: fewer pixels are rescaled, encoded and stored; Pillow decodes,
    OpenCV rescales (INTER_AREA) and encodes; one file; no statistics, digests or fsync."""
    os.environ["NUMBA_THREADING_LAYER"] = "workqueue"  # with TBB, the process hangs at its exit on one core
    from ffcv.fields import IntField, RGBImageField  # type: ignore[import-not-found,unused-ignore]
    from ffcv.writer import DatasetWriter  # type: ignore[import-not-found,unused-ignore]
    from PIL import Image

    began, pictures = multiprocessing.Value("d", 0.0), job.pictures()  # began: in whichever process is first

    class Pictures:
        def __len__(self) -> int:
            return len(pictures)

        def __getitem__(self, i: int) -> tuple[Any, int]:
            with began.get_lock():
                began.value = began.value or time.monotonic()
            with Image.open(pictures[i].path) as image:
                return image.convert("RGB"), pictures[i].label

    Path(job.out).mkdir(parents=True)
    image = RGBImageField(write_mode="jpg", max_resolution=SIDE, jpeg_quality=QUALITY)
    fields = {"image": image, "label": IntField()}
    writer = DatasetWriter(str(Path(job.out, "pictures.beton")), fields, num_workers=job.workers)
    writer.from_indexed_dataset(Pictures(), chunksize=max(1, min(100, len(pictures) // (8 * job.workers))))
    report(writer.num_samples, began.value, time.monotonic(), "ffcv", "opencv-python", "pillow", "torch")


FUNCTIONS = {f.__name__: f for f in (decode, decode_encode, penstock, webdataset, opencv, img2dataset, litdata, ffcv)}

if __name__ == "__main__":
    main(FUNCTIONS)

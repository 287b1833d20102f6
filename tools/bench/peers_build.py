"""Builders, each run in its own Python as `PYTHON peers_build.py JOB`, JSON; only functions import their peers."""

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
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIDE = 256  # pixels of a side of the stored square
QUALITY = 95  # JPEG, libjpeg's scale
Figures = dict[str, Any]
Picture = tuple[str, int]  # path, label


@dataclass(frozen=True)
class Job:
    """Work from `source` (a folder of class folders, or a dataset directory) to the new folder `out`."""

    function: str
    source: str
    out: str
    workers: int
    options: Figures = field(default_factory=dict)
    per_shard: int = 0
    batch: int = 0
    batches: int = 0

    def pictures(self) -> list[Picture]:
        """Return the raw pictures by class and name."""
        folders = enumerate(sorted(Path(self.source).iterdir()))
        return [(str(path), label) for label, folder in folders for path in sorted(folder.iterdir())]


def main(functions: Mapping[str, Any]) -> None:
    """Run the one of `functions` that the job names, JSON on the command line, on as many cores as workers; print its
    figures last."""
    job = Job(**json.loads(sys.argv[1]))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-job.workers :])
    print("\n" + json.dumps(functions[job.function](job)), flush=True)


def measured(images: int, began: float, ended: float, *packages: str, **more: object) -> Figures:
    """Return the figures of a job; "rss" is the peak of the largest process, in bytes."""
    own = Path("/proc/self/status").read_text().partition("VmHWM:")[2]  # getrusage would include that of its parent
    peak = 1024 * max(int(own.split()[0]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    versions = {package: version(package) for package in packages}
    return {"images": images, "seconds": ended - began, "rss": peak, "versions": versions, **more}


def in_processes(job: Job, write: Callable[[list[Picture], str], object], *packages: str) -> Figures:
    """Let every worker, a fork, write shards of every `workers`-th picture: `write` gets pictures and a path."""
    fork, pictures = multiprocessing.get_context("fork"), job.pictures()
    times = fork.SimpleQueue()
    Path(job.out).mkdir()

    def work(worker: int) -> None:
        began, own = time.monotonic(), pictures[worker :: job.workers]
        for start in range(0, len(own), job.per_shard):
            write(own[start : start + job.per_shard], f"{job.out}/{worker}-{start}")
        times.put((began, time.monotonic()))

    processes = [fork.Process(target=work, args=(worker,)) for worker in range(job.workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(1)  # its exception is the last line on stderr
    began, ended = zip(*(times.get() for _ in processes))
    return measured(len(pictures), min(began), max(ended), *packages)


def codec(job: Job) -> Figures:
    """Decode JPEGs in memory by libjpeg-turbo; or encode a prepared square for each as well, quality 95, 4:2:0."""
    import simplejpeg  # type: ignore[import-untyped,unused-ignore]

    prepared = {}  # by inode, before the fork: neither reading nor rescaling is timed
    for path, _ in job.pictures():
        if (inode := os.stat(path).st_ino) not in prepared:
            prepared[inode] = Path(path).read_bytes(), simplejpeg.decode_jpeg(pillow_jpeg(path))

    def write(pictures: list[Picture], shard: str) -> None:
        for path, _ in pictures:
            data, square = prepared[os.stat(path).st_ino]
            simplejpeg.decode_jpeg(data)
            if job.options["encode"]:
                simplejpeg.encode_jpeg(square, quality=QUALITY, colorsubsampling="420")

    return in_processes(job, write, "simplejpeg")


def penstock(job: Job) -> Figures:
    """Do the whole job, with statistics, index, digests of raw pictures and of files, and fsync of every file."""
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
    return measured(images, began, ended, "pillow-simd", "simplejpeg", "numpy", start_to_exit=ended - started)


def centre_square(width: int, height: int) -> tuple[int, int, int, int]:
    """Return width and height of a picture whose shorter side is SIDE, and the left and top of its centre square."""
    wide, high = (max(SIDE, round(side * SIDE / min(width, height))) for side in (width, height))
    return wide, high, (wide - SIDE) // 2, (high - SIDE) // 2


def pillow_jpeg(path: str) -> bytes:
    """Return the JPEG to store: by Pillow, shorter side to 256, bicubic, centre crop."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    out, (width, height, left, top) = io.BytesIO(), centre_square(*image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


def webdataset(job: Job) -> Figures:
    """Rescale by stock Pillow, bicubic; tars and labels; no statistics, index, digests or fsync."""
    from webdataset import ShardWriter

    def write(pictures: list[Picture], shard: str) -> None:
        with ShardWriter(f"{shard}-%06d.tar", maxcount=job.per_shard, verbose=0) as writer:
            for path, label in pictures:
                writer.write({"__key__": Path(path).stem, "jpg": pillow_jpeg(path), "cls": label})

    return in_processes(job, write, "webdataset", "pillow")


def opencv(job: Job) -> Figures:
    """Rescale by OpenCV, INTER_AREA; JPEGs and labels in a pickle per shard; no statistics, index, digests or fsync."""
    import cv2  # type: ignore[import-not-found,unused-ignore]

    cv2.setNumThreads(1)  # a process a core, as with the others

    def jpeg(path: str) -> bytes:
        image = cv2.imread(path, cv2.IMREAD_COLOR)
        kind = cv2.INTER_AREA if min(image.shape[:2]) > SIDE else cv2.INTER_CUBIC
        width, height, left, top = centre_square(image.shape[1], image.shape[0])
        image = cv2.resize(image, (width, height), interpolation=kind)
        square = image[top : top + SIDE, left : left + SIDE]
        return bytes(cv2.imencode(".jpg", square, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1])

    def write(pictures: list[Picture], shard: str) -> None:
        content = {"data": [jpeg(path) for path, _ in pictures], "labels": [label for _, label in pictures]}
        Path(shard).write_bytes(pickle.dumps(content))

    return in_processes(job, write, "opencv-python-headless")


def img2dataset(job: Job) -> Figures:
    """Rescale by OpenCV, INTER_AREA, from files; SHA-256 and JSON per picture; no statistics, index or fsync."""
    import hashlib

    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # read at the import: do not look for newer versions
    import pyarrow as pa
    from img2dataset.resizer import Resizer  # type: ignore[import-not-found,unused-ignore]
    from img2dataset.writer import WebDatasetSampleWriter  # type: ignore[import-not-found,unused-ignore]

    texts = ("key", "path", "status", "error_message", "sha256")
    numbers = ("label", "width", "height", "original_width", "original_height")
    schema = pa.schema([(name, pa.string()) for name in texts] + [(name, pa.int32()) for name in numbers])
    resizer = Resizer(SIDE, "center_crop", False, encode_quality=QUALITY)

    def write(pictures: list[Picture], shard: str) -> None:
        Path(shard).mkdir()
        writer = WebDatasetSampleWriter(0, shard, False, 5, schema, "jpg")
        for path, label in pictures:
            data, key = Path(path).read_bytes(), Path(path).stem
            jpeg, *sides, error = resizer(io.BytesIO(data))
            if error:
                raise ValueError(f"{path}: {error}")
            values = (key, path, "success", None, hashlib.sha256(data).hexdigest(), label, *sides)
            writer.write(jpeg, key, None, dict(zip(schema.names, values)))
        writer.close()

    return in_processes(job, write, "img2dataset", "opencv-python-headless", "albumentations")


def litdata(job: Job) -> Figures:
    """Rescale by stock Pillow, bicubic; its own chunk format; order not kept; no statistics, digests or fsync."""
    litdata_folders(job)
    from litdata import optimize  # type: ignore[import-not-found,unused-ignore]

    starts, chunks = Path(job.out, "starts"), Path(job.out, "chunks")
    starts.mkdir()
    sample = partial(litdata_sample, starts=starts)
    sizes: Figures = {"chunk_size": job.per_shard, "num_workers": job.workers}
    optimize(fn=sample, inputs=job.pictures(), output_dir=str(chunks), verbose=False, **sizes)
    ended = time.monotonic()
    stored = sum(chunk["chunk_size"] for chunk in json.loads((chunks / "index.json").read_text())["chunks"])
    began = min(float(start.read_text()) for start in starts.iterdir())
    return measured(stored, began, ended, "litdata", "pillow", "torch")


def litdata_sample(picture: Picture, starts: Path) -> dict[str, Any]:
    """Return a picture for LitData; the first of a process notes the time."""
    start = starts / str(os.getpid())
    if not start.exists():
        start.write_text(str(time.monotonic()))
    return {"image": pillow_jpeg(picture[0]), "label": picture[1]}


def litdata_folders(job: Job) -> None:
    """Keep LitData's copies below `out`, before it is imported: by default it empties folders in /tmp."""
    for variable in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
        folder = Path(job.out, variable.lower())
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(folder)


def ffcv(job: Job) -> Figures:
    """Rescale the longer side to 256 by OpenCV, without a crop: fewer pixels; no statistics, digests or fsync."""
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
            path, label = pictures[i]
            with Image.open(path) as image:
                return image.convert("RGB"), label

    Path(job.out).mkdir(parents=True)
    image = RGBImageField(job.options.get("write_mode", "jpg"), max_resolution=SIDE, jpeg_quality=QUALITY)
    fields = {"image": image, "label": IntField()}
    writer = DatasetWriter(str(Path(job.out, "pictures.beton")), fields, num_workers=job.workers)
    writer.from_indexed_dataset(Pictures(), chunksize=max(1, min(100, len(pictures) // (8 * job.workers))))
    return measured(writer.num_samples, began.value, time.monotonic(), "ffcv", "opencv-python", "pillow", "torch")


if __name__ == "__main__":
    main(globals())

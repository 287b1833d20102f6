"""Loaders, each run in its own Python as `PYTHON peers_load.py JOB`, JSON; only functions import their peers."""

import io
import json
import os
import random
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from inspect import signature
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from tools.bench.peers_build import SIDE, Figures, Job, litdata_folders, main, measured

VIEW = 224  # pixels of a side of a view
DALI = "nvidia-dali-cuda130"


def warm_up(job: Job) -> int:
    """Return the batches before the first that is timed: more than any loader prepares ahead."""
    return max(8, 4 * job.workers)


def images_of(job: Job) -> int:
    """Return the images that a job takes, warm-up and what is prepared ahead at its end included."""
    return (warm_up(job) + job.batches + 4 * job.workers) * job.batch


def shards(source: str) -> list[str]:
    return sorted(map(str, Path(source, "train").glob("*.tar")))


def stored_jpegs(source: str) -> Iterator[bytes]:
    """Yield the JPEG of every training picture in the order of the shards."""
    for shard in shards(source):
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith(".jpg") and (file := archive.extractfile(member)):
                    yield file.read()


def mean_colour(job: Job) -> list[float]:
    """Return the mean RGB grey levels of the data set."""
    colour: list[float] = json.loads(Path(job.source, "dataset.json").read_text())["statistics"]["mean_color"]
    return colour


def take(job: Job, batches: Iterator[Any], *packages: str, count: Callable[[], dict[str, float]] = dict) -> Figures:
    """Take batches (anything with `shape` and `dtype`) as fast as they come; return the figures after the warm-up.

    `count` returns other figures so far, of which the result has the increase from the warm-up to the end.
    """
    images, shapes = 0, set()
    for _ in islice(batches, warm_up(job)):
        pass
    before, began = count(), time.monotonic()
    for batch in islice(batches, job.batches):
        images += batch.shape[0]
        shapes.add((*map(int, batch.shape[1:]), str(batch.dtype).removeprefix("torch.")))
    ended, after = time.monotonic(), count()
    ((*shape, dtype),) = shapes  # batches of different shapes or types are an error
    more = {name: after[name] - before[name] for name in after}
    return measured(images, began, ended, *packages, gives=f"{dtype}, {' × '.join(map(str, shape))}", **more)


def penstock(job: Job) -> Figures:
    """Cut random windows and flips of a permutation of the whole split, minus the mean image, with lighting; CRC-32."""
    sys.path.insert(0, job.options.pop("checkout"))
    from pipeline.online import Loader

    if "tier" not in signature(Loader.__init__).parameters:  # an older checkout's, which has JPEGs alone
        del job.options["tier"]
    with Loader(job.source, "train", batch_size=job.batch, threads=job.workers, **job.options) as loader:
        return take(job, (batch.images for batch in loader), "simplejpeg", "torch", "numpy")


def records(job: Job) -> Figures:
    """Read whole records in a random order, each checked by its digest, into memory that is used again: no colours."""
    sys.path.insert(0, job.options["checkout"])
    import numpy as np

    from pipeline import manifest, tier
    from pipeline.online.samples import SampleReader
    from pipeline.online.tiers import Records

    data = manifest.load(job.source)
    reader = SampleReader(data, "train")
    found = Records(data, "train", "yuv420", tier.load(data, "yuv420"), reader)
    ids = np.resize(np.random.default_rng(0).permutation(len(reader)), images_of(job)).reshape(-1, job.batch)
    memory = np.empty((2 * job.workers, job.batch, found.bytes), np.uint8)

    def read(step: int) -> np.ndarray:
        for sample, record in zip(ids[step].tolist(), batch := memory[step % len(memory)]):
            found.read(sample, record)
        return batch

    with ThreadPoolExecutor(job.workers) as pool:
        return take(job, pool.map(read, range(len(ids))), "numpy", "xxhash")


def first_batch(job: Job) -> Figures:
    """Load the manifest, construct the loader, take a batch; the imports are done before."""
    from pipeline import manifest
    from pipeline.online import Loader

    began = time.monotonic()
    data = manifest.load(job.source)
    loaded = time.monotonic()
    with Loader(data, "train", batch_size=job.batch) as loader:
        constructed = time.monotonic()
        images = len(next(loader).images)
        ended = time.monotonic()
    stages = {"manifest.load": loaded - began, "Loader(…)": constructed - loaded, "first batch": ended - constructed}
    return measured(images, began, ended, "simplejpeg", "torch", "numpy", stages=stages)


def decode(job: Job) -> Figures:
    """Decode whole JPEGs in memory by libjpeg-turbo in threads; nothing is read, cut, mirrored or handed over."""
    import numpy as np
    import simplejpeg  # type: ignore[import-untyped,unused-ignore]

    jpegs = list(islice(cycle(stored_jpegs(job.source)), images_of(job)))

    def decoded(start: int) -> SimpleNamespace:
        buffer = np.empty((SIDE, SIDE, 3), np.uint8)
        for jpeg in jpegs[start : start + job.batch]:
            simplejpeg.decode_jpeg(jpeg, buffer=buffer)
        return SimpleNamespace(shape=(job.batch, *buffer.shape), dtype="uint8")

    with ThreadPoolExecutor(job.workers) as pool:
        return take(job, pool.map(decoded, range(0, len(jpegs), job.batch)), "simplejpeg")


def dali_windows(
    jpegs: list[bytes], batch: int, threads: int, device: int | None = None, hardware_share: float = 0.0
) -> Iterator[SimpleNamespace]:
    """Yield shape and dtype of batches without end, by the CPU or by a GPU, whose hardware decoder takes a share."""
    import numpy as np
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    rng, integer = np.random.default_rng(0), types.DALIDataType.INT32
    arrays, size = [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs], np.full((batch, 2), VIEW, np.int32)

    def source() -> Any:
        chosen, starts = rng.integers(len(arrays), size=batch), rng.integers(SIDE - VIEW + 1, size=(batch, 2))
        return [arrays[i] for i in chosen], starts.astype(np.int32), size

    pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=device, prefetch_queue_depth=2)
    with pipeline:
        kinds = [types.DALIDataType.UINT8, integer, integer]
        inputs: Any = fn.external_source(source, num_outputs=3, dtype=kinds, ndim=[1, 1, 1], no_copy=True)
        jpeg, start, shape = inputs
        options = {"device": "cpu"} if device is None else {"device": "mixed", "hw_decoder_load": hardware_share}
        pipeline.set_outputs(fn.decoders.image_slice(jpeg, start=start, shape=shape, axis_names="HW", **options))
    pipeline.build()
    while True:
        (views,) = pipeline.run()
        yield SimpleNamespace(shape=(len(views), *views[0].shape()), dtype="uint8")


def dali_reader(job: Job) -> Figures:
    """Cut random windows and flips, minus the mean colour; a shuffle buffer of 1,024; by DALIGenericIterator."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    indices = [str(Path(shard).with_suffix(".idx")) for shard in shards(job.source)]
    files: Any = {"paths": shards(job.source), "index_paths": indices, "ext": ["jpg", "cls"]}
    colours: Any = {"mean": mean_colour(job), "std": [1.0] * 3, "dtype": types.DALIDataType.FLOAT}
    pipeline = Pipeline(batch_size=job.batch, num_threads=job.workers, device_id=None, prefetch_queue_depth=2)
    with pipeline:
        read: Any = fn.readers.webdataset(**files, random_shuffle=True, initial_fill=1024)
        left, top = (fn.random.uniform(range=[0.0, 1.0]) for _ in range(2))
        crop: Any = {"crop": (VIEW, VIEW), "crop_pos_x": left, "crop_pos_y": top}
        image = fn.decoders.image_crop(read[0], device="cpu", **crop)
        view = fn.crop_mirror_normalize(image, mirror=fn.random.coin_flip(), output_layout="CHW", **colours)
        pipeline.set_outputs(view, fn.pad(read[1]))
    pipeline.build()
    iterator = DALIGenericIterator(pipeline, ["images", "labels"], size=-1)  # without end
    return take(job, (batch["images"] for (batch,) in iterator), DALI, "torch")


def synthetic(job: Job) -> Figures:
    """Fill a new tensor with one number for each batch: what a loader without decoding would give."""
    import torch

    torch.set_num_threads(job.workers)
    level, shape = fmean(mean_colour(job)), (job.batch, 3, VIEW, VIEW)
    filled = (torch.empty(shape, memory_format=torch.channels_last).fill_(level) for _ in cycle([0]))
    return take(job, filled, "torch")


def pillow_view(image: Any, mean: Any) -> Any:
    """Return (3, 224, 224) float32, a random view of a Pillow image; `mean` (3, 1, 1) is in grey levels."""
    import numpy as np
    import torch
    from PIL import Image

    left, top = (random.randint(0, side - VIEW) for side in image.size)
    image = image.crop((left, top, left + VIEW, top + VIEW))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().sub_(mean)


def webdataset(job: Job) -> Figures:
    """Decode whole pictures by stock Pillow; window and flip, minus the mean colour; a shuffle buffer of 1,000."""
    import torch
    from torch.utils.data import DataLoader
    from webdataset import WebDataset

    mean = torch.tensor(mean_colour(job)).reshape(3, 1, 1)
    stream = WebDataset(shards(job.source), resampled=True, shardshuffle=False).shuffle(1000).decode("pil")
    views = stream.to_tuple("jpg", "cls").map(lambda pair: (pillow_view(pair[0], mean), pair[1])).batched(job.batch)
    loader = DataLoader(views, batch_size=None, num_workers=job.workers)
    return take(job, (images for images, _ in loader), "webdataset", "pillow", "torch")


def litdata(job: Job) -> Figures:
    """Decode whole pictures by stock Pillow, from its chunks of JPEGs; window and flip, minus the mean colour."""
    litdata_folders(job)
    import torch
    from litdata import StreamingDataLoader, StreamingDataset  # type: ignore[import-not-found,unused-ignore]

    view = partial(litdata_view, mean=torch.tensor(mean_colour(job)).reshape(3, 1, 1))
    dataset = StreamingDataset(str(Path(job.out, "chunks")), shuffle=True, drop_last=True, transform=view)
    loader = StreamingDataLoader(dataset, batch_size=job.batch, num_workers=job.workers, drop_last=True)
    return take(job, (images for images, _ in loader), "litdata", "pillow", "torch")


def litdata_view(stored: dict[str, Any], mean: Any) -> tuple[Any, int]:
    from PIL import Image

    with Image.open(io.BytesIO(stored["image"])) as image:
        return pillow_view(image.convert("RGB"), mean), stored["label"]


class Stored:
    """The stored JPEGs by position, for Grain: read at the offsets of `samples.npy`."""

    def __init__(self, job: Job) -> None:
        import numpy as np

        records = np.load(Path(job.source, "train/samples.npy"))
        self._records = list(zip(*(records[name].tolist() for name in ("shard", "offset", "size"))))
        self._files = [os.open(shard, os.O_RDONLY) for shard in shards(job.source)]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, position: int) -> bytes:
        shard, offset, size = self._records[position]
        return os.pread(self._files[shard], size, offset)


def grain(job: Job) -> Figures:
    """Decode whole pictures by simplejpeg in reading threads; window and flip in `random_map`; no mean, no CRC-32."""
    from grain import MapDataset, ReadOptions  # type: ignore[import-not-found,unused-ignore]

    views = MapDataset.source(Stored(job)).seed(0).shuffle().repeat().random_map(grain_view)
    reading = ReadOptions(num_threads=job.workers, prefetch_buffer_size=2 * job.batch)
    batches = iter(views.to_iter_dataset(reading).batch(job.batch))
    return take(job, batches, "grain", "simplejpeg", "numpy")


def grain_view(jpeg: bytes, rng: Any) -> Any:
    import numpy as np
    import simplejpeg  # type: ignore[import-untyped,unused-ignore]

    top, left, flip = rng.integers((SIDE - VIEW + 1, SIDE - VIEW + 1, 2))
    view = simplejpeg.decode_jpeg(jpeg)[top : top + VIEW, left : left + VIEW]
    return np.ascontiguousarray(view[:, ::-1] if flip else view)


def ffcv(job: Job) -> Figures:
    """Decode whole pictures of its .beton (JPEGs encoded anew, or pixels); its own crop, exactly a view, and flip."""
    from ffcv.fields import decoders  # type: ignore[import-not-found,unused-ignore]
    from ffcv.loader import Loader, OrderOption  # type: ignore[import-not-found,unused-ignore]
    from ffcv.transforms import RandomHorizontalFlip, ToTensor  # type: ignore[import-not-found,unused-ignore]

    share = (VIEW / SIDE) ** 2  # of the area: nothing is left to resize
    crop = decoders.RandomResizedCropRGBImageDecoder((VIEW, VIEW), scale=(share, share), ratio=(1.0, 1.0))
    pipelines = {"image": [crop, RandomHorizontalFlip(), ToTensor()], "label": [decoders.IntDecoder(), ToTensor()]}
    options: Any = {"batch_size": job.batch, "num_workers": job.workers, "os_cache": True, "pipelines": pipelines}
    loader = Loader(str(Path(job.out, "pictures.beton")), order=OrderOption.RANDOM, **options)
    return take(job, (images for images, _ in loader), "ffcv", "numba", "torch")


if __name__ == "__main__":
    main(globals())

"""The CPU's decoder: libjpeg-turbo in threads. Each picture is cut, mirrored, normalised while it is in the cache."""

import math
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from pipeline.online.batch import Batch, Crops, Transform, Undecodable
from pipeline.online.normalise import CHANNELS, normalise_planes, scaled
from pipeline.records import JPEG

KEPT = 8  # arrays of batches that the consumer has let go, for later batches: more than are ever under way


@dataclass
class Job:
    """A batch that is being decoded."""

    batch: Batch
    views: np.ndarray
    scaled: tuple[np.ndarray, np.ndarray]  # `normalise.scaled`
    deviation: np.ndarray | None  # (3, h, w) float32
    tasks: list[Future[None]] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)  # positions of what does not decode
    boxes: list[list[int]] = field(default_factory=list)  # crop boxes: top, left, height, width; 1: mirrored


class Shared:
    """Threads, and memory of views that nobody uses any more: of one decoder, or of several."""

    def __init__(self, threads: int, kept: int = KEPT) -> None:
        self.pool = ThreadPoolExecutor(threads, "penstock-turbo")
        self.free: deque[np.ndarray] = deque(maxlen=kept)


class Decoder:
    """Batches in, views out, in the same order: uint8 (n, h, w, 3), RGB; or normalised, (n, 3, h, w) float32.

    `threads` decode a picture each, and sleep where there is nothing to do. `most` is the size of the largest batch,
    for which memory is taken at once; 0: as much as each needs.
    """

    _in_words = True  # channels are normalised in their place in a word of RGBX
    under_way = 2  # batches that it has at a time: the threads never wait for the next

    def __init__(
        self, recipe: Transform, normalised: bool, most: int, threads: int, shared: Shared | None = None
    ) -> None:
        """`shared`: what other decoders use, too."""
        self._recipe, self._normalised, self._threads = recipe, normalised, threads
        side, deviations = recipe.decoded, recipe.mean_deviations.items()
        self._shape: tuple[int, ...] = (3, side, side) if normalised else (side, side, 3)
        self._dtype = np.dtype(np.float32 if normalised else np.uint8)
        self._least = most * side * side * 3 * self._dtype.itemsize
        self._deviations = {key: np.ascontiguousarray(array.transpose(2, 0, 1)) for key, array in deviations}
        self._scratch = _Scratch(side)
        self._jobs: deque[Job] = deque()
        self._stopped = False
        self._shared = shared or Shared(threads)
        self._is_shared = shared is not None

    def submit(self, batch: Batch) -> None:
        """Begin to decode a batch; it may be empty."""
        self._jobs.append(self.begin(batch))

    def result(self) -> tuple[Batch, list[Tensor]]:
        """Return the oldest batch and its views. Raises Undecodable: mend that batch and `retry`."""
        job = self._jobs[0]
        views = self.finish(job)
        self._jobs.popleft()
        return job.batch, [torch.from_numpy(views)]

    def retry(self) -> None:
        """Decode again what failed of the oldest batch."""
        self.again(self._jobs[0])

    # The same for threads that each wait for a batch of their own

    def begin(self, batch: Batch) -> Job:
        """Begin to decode a batch."""
        views, deviation = self._array(len(batch.ids)), self._deviations.get(self._recipe.divisor(batch.step))
        job = Job(batch, views, scaled(batch.crops, self._in_words), deviation)
        job.boxes = np.column_stack([batch.crops.start, batch.crops.shape, batch.crops.flip]).tolist()
        self._start(job, range(len(batch.ids)))
        return job

    def finish(self, job: Job) -> np.ndarray:
        """Wait for the views; let go of the JPEGs. Raises Undecodable: mend the batch, then do it `again`."""
        for task in job.tasks:
            task.result()
        if job.failed:
            raise Undecodable(job.batch, sorted(job.failed))
        job.batch.jpegs = []  # the consumer may keep the batch
        return job.views

    def again(self, job: Job) -> None:
        """Decode again what failed of a batch."""
        failed, job.failed = job.failed, []
        self._start(job, failed)

    def streams(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: a CPU has no streams."""
        return nullcontext()

    def stop(self) -> None:
        """Let the threads end, each after its picture; `result` then raises RuntimeError."""
        self._stopped = True

    def close(self) -> None:
        """End the threads and free the memory."""
        self.stop()
        if not self._is_shared:
            self._shared.pool.shutdown()
        self._jobs.clear()

    def _array(self, n: int) -> np.ndarray:
        """Return an array for n views: of a batch that nobody uses any more, since fresh pages are slow to write."""
        shape, free = (n, *self._shape), self._shared.free
        size = math.prod(shape) * self._dtype.itemsize
        memory = None
        with suppress(IndexError):  # another thread may have taken the last
            memory = free.pop()
        if memory is None or memory.nbytes < size:
            memory = self._fresh(max(size, self._least))
        views = memory[:size].view(self._dtype).reshape(shape)
        weakref.finalize(views, free.append, memory)  # the tensor made of `views` keeps them
        return views

    def _fresh(self, size: int) -> np.ndarray:
        return np.empty(size, np.uint8)

    def _start(self, job: Job, positions: Iterable[int]) -> None:
        shared = iter(list(positions))  # each thread takes the next of them, which is atomic
        job.tasks = [self._shared.pool.submit(self._work, job, shared) for _ in range(self._threads)]

    def _work(self, job: Job, positions: Iterator[int]) -> None:
        for i in positions:
            if self._stopped:
                raise RuntimeError("the loader is closed")
            try:
                self._decode(job, i)
            except ValueError:
                job.failed.append(i)

    def _decode(self, job: Job, i: int) -> None:
        jpeg, crops, scratch, recipe = job.batch.jpegs[i], job.batch.crops, self._scratch, self._recipe
        flip, view = bool(crops.flip[i]), scratch.view if self._normalised else job.views[i]
        if recipe.resize:
            pixels = resized(scratch.crop_box(jpeg, crops, i, "RGBX"), recipe.decoded, flip)
            if self._normalised:
                view = pixels
            else:
                for channel in range(3):  # much faster than three bytes of four at a time
                    view[..., channel] = pixels[..., channel]
        else:
            layouts = ("RGBX", "XBGR") if self._normalised else ("RGB", "BGR")
            copy(scratch.crop_box(jpeg, crops, i, layouts[flip]), view, flip)
        if self._normalised:
            levels = np.bitwise_and(view.view("<i4")[..., 0], CHANNELS, out=scratch.levels)
            self._normalise(job, i, levels, flip, scratch.planes)

    def _normalise(self, job: Job, i: int, levels: np.ndarray, flip: bool, planes: np.ndarray) -> None:
        deviation, (offset, factor) = job.deviation, job.scaled
        if deviation is not None and self._recipe.aligned:
            rows, columns = (slice(start, start + levels.shape[1]) for start in job.batch.crops.start[i].tolist())
            deviation = deviation[:, rows, columns][..., :: -1 if flip else 1]
        normalise_planes(levels, offset[i], factor[i], deviation, job.views[i], planes)


class _Scratch(threading.local):
    """A thread's memory for one picture after another: in the cache, and never fresh pages."""

    def __init__(self, side: int) -> None:
        self.pixels = np.empty(0, np.uint8)
        self.view = np.empty((side, side, 4), np.uint8)
        self.levels, self.planes = np.empty((3, side, side), np.int32), np.empty((3, side, side), np.float32)

    def crop_box(self, jpeg: np.ndarray, crops: Crops, i: int, layout: str) -> np.ndarray:
        """Decode a picture; return crop box `i`, rows of the bytes of `layout`, (h, w · 3 or 4): until the next one.

        Raises ValueError: it does not decode without a warning, is neither RGB nor grey, or the box is outside.
        """
        height, width, colours, _ = simplejpeg.decode_jpeg_header(jpeg)
        (top, left), (rows, columns) = crops.start[i].tolist(), crops.shape[i].tolist()
        if colours in ("CMYK", "YCCK") or top + rows > height or left + columns > width:
            raise ValueError(f"{height} × {width}, {colours}")
        pixel = len(layout)
        if (size := height * width * pixel) > self.pixels.size:
            memory = np.empty(size + 31, np.uint8)
            # libjpeg-turbo writes past the cache to rows that begin at a multiple of 32, and the next to read is here
            self.pixels = memory[(16 - memory.ctypes.data) % 32 :][:size]
        # accurate DCT and smooth chroma, as Pillow and DALI have them
        picture = simplejpeg.decode_jpeg(jpeg, layout, buffer=self.pixels, strict=True).reshape(height, -1)
        return picture[top : top + rows, left * pixel : (left + columns) * pixel]


def copy(rows: np.ndarray, out: np.ndarray, flip: bool) -> None:
    """Copy rows of bytes to `out`, uint8; where `flip`, each row back to front, and so the channels of its pixels.

    Whole words of at most 8 bytes are swapped and put in reverse order: much faster than single bytes.
    """
    out = out.reshape(rows.shape)
    if flip:
        word = math.gcd(rows.shape[-1], 8)
        out, rows = out.view(f">u{word}"), rows.view(f"<u{word}")[..., ::-1]
    out[...] = rows


def resized(box: np.ndarray, side: int, flip: bool) -> np.ndarray:
    """Return (side, side, 4) of RGBX rows as torchvision does with Pillow's images: cut, resize, then mirror."""
    size = box.shape[1] // 4, box.shape[0]
    picture = Image.frombuffer("RGBX", size, np.ascontiguousarray(box), "raw", "RGBX", 0, 1)
    view = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(view.view("<u4")[:, ::-1]).view(np.uint8) if flip else view


@cache
def fingerprint() -> str:
    """Return a digest of the pixels that this machine makes of a JPEG, cut, mirrored and resized: its codecs' version.

    Releases that give the same pixels have the same one.
    """
    jpeg, scratch, side = np.frombuffer(JPEG, np.uint8), _Scratch(0), 16
    box = np.array([[3, 5]], np.int32), np.array([[21, 27]], np.int32), np.zeros(1, np.int32)
    crops = Crops(*box, np.zeros((1, 3), np.float32), np.ones((1, 3), np.float32))
    digest = sha256()
    for layout in ("RGB", "BGR", "RGBX"):
        pixels = scratch.crop_box(jpeg, crops, 0, layout)
        digest.update(pixels.tobytes() if layout != "RGBX" else resized(pixels, side, True)[..., :3].tobytes())
    return digest.hexdigest()


def undecodable(batch: Batch) -> list[int]:
    """Return the positions in a batch of what does not decode on a CPU."""
    scratch, positions = _Scratch(0), []
    for i, jpeg in enumerate(batch.jpegs):
        try:
            scratch.crop_box(jpeg, batch.crops, i, "RGB")
        except ValueError:
            positions.append(i)
    return positions

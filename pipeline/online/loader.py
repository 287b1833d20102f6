"""Batches on the device: reads, draws, decodes ahead in a thread, normalises on the device, and measures the stall."""

import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from nvidia.dali.plugin.pytorch import feed_ndarray

from pipeline import manifest, storage
from pipeline.errors import UserError
from pipeline.online import augment
from pipeline.online.graph import Inputs, build_graph
from pipeline.online.order import Order
from pipeline.online.samples import SampleReader

VIEWS = ("random", "centre", "ten")


@dataclass(frozen=True)
class Batch:
    """One global batch. `ten` views have one more dimension: images (n, 10, 3, 224, 224)."""

    step: int
    epoch: int
    ids: np.ndarray  # (n,) int64
    labels: torch.Tensor  # (n,) int64; −1: none
    images: torch.Tensor  # (n, 3, 224, 224) float32, RGB grey levels minus the mean image, channels last in memory


def normalise(view: torch.Tensor, mean: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """(n, 224, 224, 3) uint8 → network input (n, 3, 224, 224) float32, on the view's device.

    `mean` (224, 224, 3) float32 in grey levels. `shift` (n, 3) float32: the lighting of a training batch, which is then
    divided by 1.1 as the 2012 code has it; None: none of both. `augment.reference_normalise` is its oracle.
    """
    x = view.to(torch.float32).sub_(mean)
    if shift is not None:
        x.add_(shift[:, None, None, :]).mul_(augment.LIGHTING_SCALE)
    return x.permute(0, 3, 1, 2)


class Loader:
    """Streams one split of a dataset directory to a device, from batch `step` on.

    Training (`views="random"`) shuffles every epoch and goes on for ever; evaluation (`centre`, `ten`) visits every
    sample once in the order of the ids. Use it as a context manager, so that its thread and its files end with it.

    Args:
        data: a dataset directory, or its loaded manifest.
        lighting_until: random views have PCA colour noise and the factor 1/1.1 in the steps below this one; None: in
            all, 0: in none.
        device: where the images go; on a CUDA device DALI decodes there too.
        threads: DALI's; default: as many as this process may use cores.
        depth: batches prepared ahead.
    Raises:
        UserError: a directory that is damaged or not one, an empty split, a size that no view fits in.
    """

    def __init__(
        self,
        data: str | Path | manifest.Manifest,
        split: str = "train",
        *,
        batch_size: int = 128,
        views: str = "random",
        lighting_until: int | None = None,
        seed: int = 2012,
        step: int = 0,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        depth: int = 2,
    ) -> None:
        if views not in VIEWS or batch_size < 1 or depth < 1:
            raise UserError(
                f"views={views!r}, batch_size={batch_size}, depth={depth}: views must be one of {', '.join(VIEWS)}, "
                "the others at least 1"
            )
        self.manifest = data if isinstance(data, manifest.Manifest) else manifest.load(data)
        if storage.is_remote(self.manifest.root):
            raise UserError(f"{self.manifest.root}: the loader reads local shards; copy DATASET to this machine first")
        self.size = self.manifest.recipe.size
        if self.manifest.recipe.crop != "centre":
            raise UserError(
                f"{self.manifest.root}: built with --crop none, whole pictures for other models' augmentation; "
                "build with --crop centre for this one"
            )
        if self.size < augment.VIEW_SIZE:
            raise UserError(
                f"{self.manifest.root}: images of {self.size} pixels; a view needs {augment.VIEW_SIZE}; "
                "build with --size 256"
            )
        self.reader = SampleReader(self.manifest, split)
        if not len(self.reader):
            raise UserError(f"{self.manifest.root}: the split {split!r} is empty")
        self.views, self.device = views, torch.device(device)
        self._lighting_until = lighting_until if views == "random" else 0
        self.order = Order(len(self.reader), batch_size, seed, shuffle=views == "random")
        self.waited = 0.0  # seconds that the consumer, on the host, has waited for batches: the stall
        self._statistics = self.manifest.statistics()
        self._mean = torch.from_numpy(augment.mean_view(self._statistics)).to(self.device)
        self._next_read = step  # the step that the graph reads next
        self._next_asked = step  # the step that the thread is asked for next
        self._end = None if views == "random" else self.order.steps_per_epoch
        self._depth = depth
        self._epoch, self._ids = -1, np.empty(0, np.int64)  # the permutation in use
        self._reading: deque[_Prepared] = deque()  # what the graph is working on
        self._graph = build_graph(
            self._read_next,
            view=self.size if views == "ten" else augment.VIEW_SIZE,
            batch_size=batch_size,
            threads=threads or len(os.sched_getaffinity(0)),
            device_id=None if self.device.type == "cpu" else self.device.index or 0,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="penstock-loader")
        self._ahead: deque[Future[_Prepared]] = deque()
        self._ask()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; what its preparation raised is raised here."""
        if not self._ahead:
            raise StopIteration
        asked = time.perf_counter()
        prepared = self._ahead.popleft().result()
        self.waited += time.perf_counter() - asked
        self._ask()
        return self._finish(prepared)

    def close(self) -> None:
        """End the thread, close the files, and free the graph; there is no next batch after it."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        del self._graph  # it holds a method of ours: without this, only the garbage collector would free both
        self.reader.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self) -> None:
        while len(self._ahead) < self._depth and (self._end is None or self._next_asked < self._end):
            self._ahead.append(self._thread.submit(self._prepare, self._next_asked))
            self._next_asked += 1

    # What follows runs in the thread, so that reading, decoding and the consumer's work overlap.

    def _prepare(self, step: int) -> "_Prepared":
        """Wait for the batch of `step`; the graph has asked for the next one by then."""
        (decoded,) = self._graph.run()
        inputs = self._reading.popleft()
        assert inputs.step == step
        view = torch.empty(decoded.as_tensor().shape(), dtype=torch.uint8, device=self.device)
        if self.device.type == "cuda":
            # on the consumer's stream, as its earlier kernels may still read this memory; and to its end, as DALI
            # takes its own memory back with the next run
            stream = torch.cuda.current_stream(self.device)
            feed_ndarray(decoded.as_tensor(), view, cuda_stream=stream)
            stream.synchronize()
        else:
            feed_ndarray(decoded.as_tensor(), view)
        return replace(inputs, view=view)

    def _read_next(self) -> Inputs:
        """What the graph calls for every batch."""
        if self._next_read == self._end:
            raise StopIteration
        epoch, place = divmod(self._next_read, self.order.steps_per_epoch)
        ids = self._permutation(epoch)[place * self.order.batch_size : (place + 1) * self.order.batch_size]
        if self.views == "random":
            draws = augment.draw(self.order.seed, epoch, ids, self.size)
        else:
            draws = augment.centre(len(ids), self.size)
        shift = augment.lighting_shift(draws.normals, self._statistics)
        self._reading.append(_Prepared(self._next_read, epoch, ids, shift))
        self._next_read += 1
        crop = np.zeros_like(draws.crop) if self.views == "ten" else draws.crop
        return self.reader.read(ids), crop, draws.flip

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._epoch != epoch:
            self._epoch, self._ids = epoch, self.order.permutation(epoch)
        return self._ids

    # What follows runs in the consumer's thread, on the consumer's device.

    def _finish(self, prepared: "_Prepared") -> Batch:
        assert prepared.view is not None
        labels = torch.from_numpy(self.reader.labels(prepared.ids)).to(self.device)
        if self.views == "ten":
            images = torch.stack([normalise(view, self._mean, None) for view in _cut_ten(prepared.view)], dim=1)
        else:
            lit = self._lighting_until is None or prepared.step < self._lighting_until
            shift = torch.from_numpy(prepared.shift).to(self.device) if lit else None
            images = normalise(prepared.view, self._mean, shift)
        return Batch(prepared.step, prepared.epoch, prepared.ids, labels, images)


@dataclass(frozen=True)
class _Prepared:
    step: int
    epoch: int
    ids: np.ndarray
    shift: np.ndarray  # (n, 3) float32
    view: torch.Tensor | None = None  # (n, 224, 224, 3) uint8; the whole images for ten views


def _cut_ten(images: torch.Tensor) -> Iterator[torch.Tensor]:
    """(n, size, size, 3) → ten times (n, 224, 224, 3)."""
    for top, left, flip in augment.ten_views(images.shape[1]):
        view = images[:, top : top + augment.VIEW_SIZE, left : left + augment.VIEW_SIZE]
        yield view.flip(2) if flip else view

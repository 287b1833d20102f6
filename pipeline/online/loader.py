"""A dataset directory, streamed to the device: what users of the online stage use."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import UserError, manifest, storage
from pipeline.online.cache import ShardCache
from pipeline.online.decode import Decoder
from pipeline.online.faults import Replacements
from pipeline.online.feed import Feed
from pipeline.online.graph import GraphOptions
from pipeline.online.meter import Meter, waited
from pipeline.online.normalise import DTYPES, Normaliser
from pipeline.online.options import check_choice, check_counts, devices_of, recipe_of
from pipeline.online.order import Order
from pipeline.online.samples import SampleReader
from pipeline.online.sequence import Sequence

STATE = 1  # the version of what `state_dict` gives


@dataclass(frozen=True)
class Batch:
    """A rank's part of one global batch; it may be empty.

    Several views of each picture have one more dimension: (n, 10, 3, view, view) of `ten`, (n, 9, …) of `nine`.
    """

    step: int
    epoch: int
    place: int  # of its first sample in the global batch
    whole: int  # samples of the global batch
    ids: np.ndarray  # (n,) int64
    labels: Tensor  # (n,) int64, on the first device; −1: none
    replicas: tuple[Tensor, ...]  # the images, on each device

    @property
    def images(self) -> Tensor:
        """(n, 3, view, view) on the first device: RGB grey levels less the mean, or what the recipe makes of them.

        view: 224 pixels, unless the options say otherwise.
        """
        return self.replicas[0]


class Loader:
    """Streams one split of a dataset directory to a device, from batch `step` on.

    Training (`views="random"`) goes on for ever; evaluation (`centre`, `ten`, `nine`) visits every sample once in the
    order of the ids, and is over then. Use it as a context manager, so that its threads and files end with it.

    Args:
        data: a dataset directory (a path or a URL), or its loaded manifest.
        batch_size: of the global batch, all ranks' parts together.
        recipe: "alexnet", whose `options` are those of `augment.Transform` (views, view, mean, lighting, …); or
            "imagenet", what torchvision and timm train with: random resized crop, flip, mean and deviation; its option
            is `views`.
        order, last, window: see `order.Order`. Evaluation has the fixed order.
        rank, ranks: which part of every global batch is ours, of how many.
        device: where the images go; on a CUDA device DALI decodes there too. Several get the same images each.
        feed: with several devices, each decodes its part of the batch ("split"), or all of it ("replicate").
        output: "float32", "bfloat16", "float16"; or "uint8", the views as they were cut, without mean and lighting.
        threads: DALI's; default: as many as this process may use cores.
        readers: samples read at a time.
        depth: batches made ready ahead of use.
        hardware_share: of the pictures, to a GPU's hardware decoder.
        max_bad: samples that may fail in training, and are replaced (`faults.Replacements`); past it, an error.
        cache, cache_bytes: of a remote data set: the folder for its shards, and how much they may take there.
    Raises:
        UserError: a directory that is damaged or not one, an empty split, an impossible option.
    """

    def __init__(
        self,
        data: "str | os.PathLike[str] | manifest.Manifest",
        split: str = "train",
        *,
        batch_size: int = 128,
        recipe: str = "alexnet",
        order: str = "uniform",
        last: str = "short",
        window: int = Order.window,
        seed: int = 2012,
        step: int = 0,
        rank: int = 0,
        ranks: int = 1,
        device: "str | torch.device | list[str] | tuple[str | torch.device, ...]" = "cpu",
        feed: str = "split",
        output: str = "float32",
        threads: int | None = None,
        readers: int = 1,
        depth: int = 2,
        hardware_share: float = 0.9,
        max_bad: int = 0,
        cache: "str | os.PathLike[str] | None" = None,
        cache_bytes: int = 200 * 10**9,
        **options: Any,
    ) -> None:
        check_counts(
            batch_size=batch_size, readers=readers, depth=depth, threads=1 if threads is None else threads, ranks=ranks
        )
        check_choice("feed", feed, ("split", "replicate"))
        check_choice("output", output, tuple(DTYPES))
        for name, number in (("step", step), ("max_bad", max_bad)):
            if number < 0:
                raise UserError(f"{name}={number}: must be at least 0")
        if not 0 <= hardware_share <= 1:
            raise UserError(f"hardware_share={hardware_share}: must be between 0 and 1")
        if not 0 <= rank < ranks:
            raise UserError(f"rank={rank}: must be between 0 and ranks − 1 = {ranks - 1}")
        self.manifest = data if isinstance(data, manifest.Manifest) else manifest.load(data)
        self.split = split
        samples = self.manifest.split(split).samples
        if not samples:
            raise UserError(f"{self.manifest.root}: the split {split!r} is empty")
        self.recipe = recipe_of(self.manifest, recipe, seed, options)
        training = self.recipe.training
        if max_bad and not training:
            raise UserError(f"max_bad={max_bad}: is for training; evaluation is of every image, and none stands in")
        records = self.manifest.split(split).shards
        self.order = Order(
            samples,
            batch_size,
            seed,
            order if training else "fixed",
            last if training else "short",
            tuple(shard.samples for shard in records),
            window,
        )
        self.devices = devices_of(device if isinstance(device, tuple | list) else (device,))
        whole = self.manifest.recipe.crop != "centre"
        size = None if whole else (self.manifest.recipe.size,) * 2
        chunk = options.get("crop_chunk", 1)
        self._sequence = Sequence(self.order, self.recipe, rank, ranks, chunk, size)
        self._cache = self._cached(cache, cache_bytes) if storage.is_remote(self.manifest.root) else None
        self._reader = SampleReader(self.manifest, split, self._cache, readers)
        self._normaliser = Normaliser(self.recipe, self._decoding, output)
        self._graph = GraphOptions(
            self.recipe.decoded,
            self.recipe.resize,
            self._normaliser.in_graph,
            threads or len(os.sched_getaffinity(0)),
            hardware_share,
        )
        self._replicate, self._depth, self._max_bad = feed == "replicate", depth, max_bad
        self._end = None if training else self.order.steps_per_epoch
        self.meter = Meter()
        self._begin(step, ())

    def _begin(self, step: int, bad: "tuple[int, ...] | list[int]") -> None:
        self._next = step
        self._faults = Replacements(self._reader, self._max_bad, bad)
        self._feed = Feed(
            self._sequence,
            self._reader,
            Decoder(self._decoding, self._graph, self._sequence.most, self._replicate),
            self._faults,
            self._normaliser.prepare,
            step=step,
            end=self._end,
            depth=self._depth,
            upcoming=self._upcoming if self._cache else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; what its preparation raised is raised here."""
        device = self.devices[0]
        before = _event(device)
        asked = time.perf_counter()
        ready = self._feed.next()
        if ready is None:
            raise StopIteration
        wait = waited(asked, time.perf_counter(), ready.times)
        after = _event(device)
        batch, images = ready.prepared, {}
        for tensor in (ready.labels, *(tensor for tensors in ready.tensors for tensor in tensors)):
            if tensor.is_cuda:  # made on another stream: not to be freed while this one uses it
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        for each, tensors in zip(self._decoding, ready.tensors):
            images[each] = self._normaliser.images(batch.step, tensors, each)
        replicas = tuple(images[each] for each in self.devices)
        self.meter.add(wait, (before, after) if before and after else None)
        self._next = batch.step + 1
        self._feed.taken()  # only now: what was raised above leaves it the next one
        return Batch(batch.step, batch.epoch, batch.place, batch.whole, batch.ids, ready.labels, replicas)

    @property
    def bad(self) -> list[int]:
        """The ids of the samples that others stood in for."""
        return self._faults.ids

    def state_dict(self) -> dict[str, Any]:
        """Where the run is, after the batches that were taken: plain values. Loading it takes no longer for more steps.

        It holds for any number of ranks, devices, threads. `bad` may name samples of batches that are not taken yet.
        """
        return {**self._described(), "step": self._next, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken: the next batch is that of its step, with the same samples and pixels.

        Raises:
            UserError: it is of another data set, seed, batch size or option; the message names each.
        """
        mine, step = self._described(), state.get("step")
        differing = [key for key in mine if state.get(key) != mine[key]]
        if differing or type(step) is not int or step < 0:
            what = "; ".join(f"{key}: {state.get(key)!r} there, {mine[key]!r} here" for key in differing)
            raise UserError(f"this state is of another loader ({what or f'step {step!r}'}); make the loader as it was")
        self._feed.close()
        self._begin(step, state.get("bad", ()))

    def close(self) -> None:
        """End the threads, close the files, free the graphs; there is no next batch after it."""
        self._reader.stop()
        if self._cache:
            self._cache.stop()  # so that no thread waits for a shard any more
        self._feed.close()
        self._reader.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _decoding(self) -> tuple[torch.device, ...]:
        return tuple(dict.fromkeys(self.devices))

    def _described(self) -> dict[str, Any]:
        """All that the batches are a function of, but for the step."""
        order = self.order
        window = {"window": order.window} if order.kind == "shards" else {}
        return {
            "version": STATE,
            "dataset": self.manifest.identity,
            "split": self.split,
            "seed": order.seed,
            "batch_size": order.batch_size,
            "order": order.kind,
            "last": order.last,
            **window,
            **self.recipe.described(),
        }

    def _cached(self, folder: "str | os.PathLike[str] | None", limit: int) -> ShardCache:
        root, shards = self.manifest.root, self.manifest.split(self.split).shards
        if folder is None:
            raise UserError(f"{root}: is remote; name a folder on this machine for its shards: cache=FOLDER")
        largest = sorted((shard.bytes for shard in shards), reverse=True)
        in_window = -(-self.order.window * len(shards) // self.order.samples) + 1
        used = {"uniform": ("all shards", len(shards)), "shards": ("two windows", 2 * in_window)}
        what, count = used.get(self.order.kind, ("two shards", 2))
        if (needed := sum(largest[:count])) > limit:
            raise UserError(
                f"{root}: order={self.order.kind!r} has {what} in use, {needed:,} bytes, and cache_bytes={limit:,}; "
                "raise that, or take order='shards' with a small window"
            )
        return ShardCache(self.manifest, self.split, Path(folder), limit)

    def _upcoming(self, ids: np.ndarray) -> None:
        """Tell the cache which shards come, in the order of their first use."""
        assert self._cache is not None
        shards = self._reader.records["shard"][ids]
        numbers, first = np.unique(shards, return_index=True)
        self._cache.ahead(numbers[np.argsort(first)].tolist())


def _event(device: torch.device) -> torch.cuda.Event | None:
    """An event on the consumer's stream, now."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event

"""Loader: streams a dataset directory to the device. Its options are checked here, once."""

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from pipeline import UserError, manifest, storage
from pipeline.manifest import Manifest
from pipeline.online import turbo
from pipeline.online.augment import AlexNet, ViewOptions
from pipeline.online.batch import Batch, Transform, require_at_least, require_one_of
from pipeline.online.cache import ShardCache
from pipeline.online.devices import devices_of
from pipeline.online.endpoints import parse
from pipeline.online.normalise import DTYPES, Normaliser
from pipeline.online.order import Order
from pipeline.online.plain import ImageNet
from pipeline.online.prefetch import Decoder, Prefetch, Sampler
from pipeline.online.samples import BadSamples, Pictures, SampleReader
from pipeline.online.stall import Meter, waited
from pipeline.online.supply import TIERS, Supply
from pipeline.online.tuner import Setting, Tuner

_log = logging.getLogger("penstock")
STATE = 1  # version of `Loader.state_dict`


class Loader(Iterator[Batch], AbstractContextManager["Loader"]):
    """Streams one split of a dataset directory to a device, from batch `step` on.

    Training (`views="random"`) goes on for ever; evaluation (`centre`, `ten`, `nine`) visits every sample once in the
    order of the ids, and is over then. Use it as a context manager, so that its threads and files end with it.
    docs/loader.md says what the options do. Raises UserError: a directory that is damaged or not one, an empty split,
    an impossible option.
    """

    def __init__(
        self,
        data: "str | os.PathLike[str] | Manifest",  # a dataset directory (a path or a URL), or its loaded manifest
        split: str = "train",
        *,
        batch_size: int = 128,  # of the global batch, all ranks' parts together
        recipe: str = "alexnet",  # of 2012, with `augment.ViewOptions`; or "imagenet", with `views` alone
        order: str = "uniform",  # these three: see `order.Order`; evaluation has the fixed order
        last: str = "short",
        window: int = Order.window,
        seed: int = 2012,
        step: int = 0,
        rank: int = 0,  # the part of every global batch that this loader gives, of how many:
        ranks: int = 1,
        device: "str | torch.device | list[str] | tuple[str | torch.device, ...]" = "cpu",  # each gets the same images
        feed: str = "split",  # of several GPUs each decodes its part of the batch; or all of it: "replicate"
        output: str = "float32",  # "bfloat16", "float16"; or "uint8", the views as cut, without mean and lighting
        threads: int | None = None,  # that decode, plain ones which sleep when idle; None: as many as usable cores
        readers: int = 1,  # samples read at a time
        depth: int = 2,  # batches made ready ahead of use
        hardware_share: float = 0.9,  # of the pictures, to a GPU's hardware decoder
        max_bad: int = 0,  # samples that may fail, and are replaced (`samples.BadSamples`)
        cache: "str | os.PathLike[str] | None" = None,  # of a remote data set: the folder for its shards
        cache_bytes: int = 200 * 10**9,  # how much they may take there
        tier: str = "auto",  # of pictures: "jpeg", "raw", "device"; auto: the best there is, and it is tuned
        max_stall: float = 0.01,  # share of the time that the consumer may wait before something is turned
        device_bytes: int | None = None,  # of tier "device", on each; None: free memory, less 12 GiB (a CPU's: half)
        workers: Sequence[str] = (),  # addresses of decoding workers (`endpoints.parse`); "local": this process too
        patience: float = 60.0,  # seconds without an answer of any worker, after which the loader gives up
        **options: Any,
    ) -> None:
        threads = len(os.sched_getaffinity(0)) if threads is None else threads
        require_at_least(1, readers=readers, depth=depth, threads=threads, ranks=ranks)
        require_at_least(0, step=step, max_bad=max_bad)
        if depth > 1024:
            raise UserError(f"depth={depth}: must be at most 1024, for each batch takes memory")
        require_one_of(("split", "replicate"), feed=feed)
        require_one_of(TIERS, tier=tier)
        require_one_of(DTYPES, output=output)
        for name, share in {"hardware_share": hardware_share, "max_stall": max_stall}.items():
            if not 0 <= share <= 1:
                raise UserError(f"{name}={share}: must be between 0 and 1")
        if workers and tier not in ("auto", "jpeg"):
            raise UserError(
                f"tier={tier!r}: decoding workers decode the shards' JPEGs; take tier='jpeg', or no workers"
            )
        if not 0 <= rank < ranks:
            raise UserError(f"rank={rank}: must be between 0 and ranks − 1 = {ranks - 1}")
        self.manifest = data if isinstance(data, Manifest) else manifest.load(data, shards=not workers)
        self.split = split
        shards, samples = self.manifest.split(split).shards, self.manifest.split(split).samples
        if not samples:
            raise UserError(f"{self.manifest.root}: the split {split!r} is empty")
        self.recipe = recipe_of(self.manifest, recipe, seed, options)
        if not self.recipe.training:
            order, last = "fixed", "short"
        self.order = Order(samples, batch_size, seed, order, last, tuple(shard.samples for shard in shards), window)
        self.devices = devices_of(device if isinstance(device, tuple | list) else (device,))
        size = self.manifest.recipe.size if self.manifest.recipe.crop == "centre" else None
        self._sampler, self._size = Sampler(self.order, self.recipe, rank, ranks, size or self.recipe.decoded), size
        distant, self._patience = storage.is_remote(self.manifest.root), patience
        self._mixed, self._addresses = parse(workers)
        self._cache = None
        if distant and not (self._addresses and cache is None):
            self._cache = self._shard_cache(cache, cache_bytes)
        self._reader = SampleReader(self.manifest, split, self._cache.lease if self._cache else None, readers)
        if self._mixed and not self._reader.is_here():
            reason = "the shards are not here; leave local out of the workers, or copy them"
            raise UserError(f"{self.manifest.root}: {reason}")
        self._decoding = tuple(dict.fromkeys(self.devices))  # one named twice decodes once
        self._normaliser = Normaliser(
            self.recipe, self._decoding, output, self.manifest.recipe.size, bool(self._addresses)
        )
        most, views = -(-batch_size // ranks), self._normaliser.in_decoder
        own = self.manifest, split, self.recipe, self._decoding, self._reader, most, feed == "replicate", views
        self.news = list[str]()  # lines on what was chosen and turned, which are logged, too; for who empties it
        self._supply = Supply(*own, device_bytes, self._tell)
        first = "jpeg" if self._addresses else self._supply.choose(tier)
        self._setting = Setting(first, threads, readers, depth, hardware_share)
        self._tuner, self._max_bad = None, max_bad
        self._chosen: Setting | None = None  # by the tuner, for the batches to come
        if tier == "auto" and self.recipe.training and not self._addresses:
            cores = max(threads, len(os.sched_getaffinity(0)) // ranks)  # others may be on this machine
            # a damaged JPEG is replaced, and its record is not: with such, the tier that began goes on
            tiers = tuple(each for each in self._supply.tunable(first) if not max_bad or "jpeg" not in (each, first))
            tiers, on_gpu = tiers or (first,), self.devices[0].type == "cuda"
            self._tuner = Tuner(self._setting, tiers=tiers, cores=cores, on_gpu=on_gpu, max_stall=max_stall)
        self.meter = Meter()
        self._begin(step, ())

    def _begin(self, step: int, bad: Iterable[int]) -> None:
        self._next = step
        jpegs = self._setting.tier == "jpeg"
        self._bad = BadSamples(self.manifest, self.split, self._max_bad, bad, self.recipe.training)
        self._prefetch = Prefetch(
            self._sampler,
            None if self._addresses else Pictures(self._reader, self._bad, self.recipe, self._size, jpegs),
            self._remote_decoder() if self._addresses else self._supply.decoder(self._setting),
            self._normaliser.prepare,
            step=step,
            end=None if self.recipe.training else self.order.steps_per_epoch,
            depth=self._setting.depth,
            upcoming=self._cache.ahead if self._cache else None,
        )

    def __len__(self) -> int:
        """Return the number of batches of an epoch, `steps_per_epoch`; training goes on after them."""
        return self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of global batches in a pass over the split: the same in every rank, from any step on."""
        return self.order.steps_per_epoch

    def __next__(self) -> Batch:
        """Return the next batch. An error of its preparation is raised here."""
        if self._chosen:  # now, not before: if that fails, the batch before has been handed over
            self._turn(self._chosen)
        device = self.devices[0]
        before, asked = _event(device), time.perf_counter()
        batch = self._prefetch.next()
        moments = batch.read_at, batch.decoded_at, time.perf_counter()
        wait = waited(asked, *moments, batch.worker, batch.workers)
        after = _event(device)
        for tensor in chain([batch.labels], *batch.tensors):
            if tensor.is_cuda:  # made on another stream: not to be freed while this one uses it
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        images = [self._normaliser.images(batch, *pair) for pair in zip(batch.tensors, self._decoding)]
        batch.replicas = tuple(images[self._decoding.index(device)] for device in self.devices)
        self.meter.add(wait, (before, after) if before and after else None)
        self._next = batch.step + 1
        self._prefetch.taken()  # only now: after an interruption above, this batch is still the next one
        batch.tensors = []
        if self._tuner:
            self._look(self._tuner, batch)
        return batch

    def _tell(self, line: str) -> None:
        self.news.append(line)
        _log.info("%s", line)

    def _look(self, tuner: Tuner, batch: Batch) -> None:
        """Let the tuner look at the waiting so far."""
        total, clock = self.meter.total, self.meter.clock
        self._chosen = tuner.after(batch.step, len(batch.ids), total, time.perf_counter() if clock is None else clock)
        for line in tuner.said:
            self._tell(line)
        tuner.said.clear()

    def _turn(self, chosen: Setting) -> None:
        """Make the batches from now on in another way; they are the same ones."""
        self._setting, self._chosen = chosen, None
        self._prefetch.close()
        self._reader.resize(chosen.readers)
        self._begin(self._next, self._bad.ids)

    @property
    def tier(self) -> str:
        """The tier that batches come from now: "jpeg", "raw" or "device"."""
        return self._setting.tier

    @property
    def bad(self) -> list[int]:
        """The ids of the samples that were replaced."""
        return sorted(self._bad.ids)

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the batches that were taken, for any number of ranks, devices, threads: plain values.

        `bad` may name samples of batches that are not taken yet.
        """
        return {**self._described(), "step": self._next, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises UserError where it is of another data set, seed or other option."""
        state = {"flips": True, **state}  # which earlier versions do not say, for they had no other
        own, step = self._described(), state.get("step")
        differing = [f"{key}: {state.get(key)!r} there, {own[key]!r} here" for key in own if state.get(key) != own[key]]
        if differing or type(step) is not int or not 0 <= step < 2**40:  # so that places fit in 64 bits
            reason = "; ".join(differing) or f"step {step!r}"
            raise UserError(f"this state is of another loader ({reason}); make the loader as it was")
        self._prefetch.close()
        self._begin(step, state.get("bad", ()))

    def close(self) -> None:
        """End the threads, close the files, free the memory; there is no next batch after it."""
        self._chosen = None  # else the next batch would be begun with threads that nobody ends
        self._reader.stop()
        if self._cache:
            self._cache.close()  # so that no thread waits for a shard any more
        self._prefetch.close()
        self._reader.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _described(self) -> dict[str, Any]:
        """Return all that the batches are a function of, but for the step."""
        order = self.order
        return {
            "version": STATE,
            "dataset": self.manifest.identity,
            "split": self.split,
            "seed": order.seed,
            "batch_size": order.batch_size,
            "order": order.kind,
            "last": order.last,
            **({"window": order.window} if order.kind == "shards" else {}),
            **self.recipe.described(),
        }

    def _remote_decoder(self) -> Decoder:
        """Return the decoder that asks workers. Raises UserError: pyarrow is missing."""
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else gRPC prints lines of its own beside our errors
        try:
            from pipeline.online import parts, remote
        except ImportError as error:
            remedy = "pip install 'penstock-imagenet[service]'"
            raise UserError(f"decoding workers need the package pyarrow ({error}): {remedy}") from error
        template = parts.template(self.manifest, self.split, self.recipe, self.order.seed, self._max_bad)

        def local() -> parts.Parts:
            begin = partial(turbo.Decoder, normalised=False, most=parts.MOST, threads=self._setting.threads)
            return parts.Parts(self.manifest, self.split, self.recipe, self._reader, begin)

        return remote.Decoder(
            template,
            self.recipe.decoded,
            self._addresses,
            local if self._reader.is_here() else None,
            self._mixed,
            self._bad,
            self._reader,
            self._decoding,
            self._setting.depth,
            self._patience,
        )

    def _shard_cache(self, folder: "str | os.PathLike[str] | None", limit: int) -> ShardCache:
        root, shards = self.manifest.root, self.manifest.split(self.split).shards
        if folder is None:
            raise UserError(f"{root}: is remote; name a folder on this machine for its shards: cache=FOLDER")
        in_window = -(-self.order.window * len(shards) // self.order.samples) + 1
        used = {"uniform": ("all shards", len(shards)), "shards": ("two windows", 2 * in_window)}
        name, count = used.get(self.order.kind, ("two shards", 2))
        if (needed := sum(sorted(shard.bytes for shard in shards)[-count:])) > limit:
            reason = f"order={self.order.kind!r} has {name} in use, {needed:,} bytes, and cache_bytes={limit:,}"
            raise UserError(f"{root}: {reason}; raise that, or take order='shards' with a small window")
        return ShardCache(self.manifest, self.split, Path(folder), limit)


def _event(device: torch.device) -> torch.cuda.Event | None:
    """Record an event on the consumer's stream."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))


def recipe_of(data: Manifest, name: str, seed: int, options: dict[str, Any]) -> Transform:
    """Return the recipe of a name for a data set. Raises UserError where its pictures do not suit, or there is none."""
    require_one_of(("alexnet", "imagenet"), recipe=name)
    known = tuple(ViewOptions.__dataclass_fields__) if name == "alexnet" else ("views",)
    for option, value in options.items():
        if option not in known:
            raise UserError(f"{option}={value!r}: no such option; this recipe has {', '.join(known)}")
    if name == "imagenet":
        return ImageNet(seed=seed, **options)
    if data.recipe.crop != "centre":
        reason = "built with --crop none, whole pictures for other models' augmentation"
        raise UserError(f"{data.root}: {reason}; take recipe='imagenet', or build with --crop centre")
    return AlexNet(ViewOptions(**options), data.statistics(), data.recipe.size, seed)

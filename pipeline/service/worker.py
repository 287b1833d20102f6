"""The decoding worker: answers requests for parts of batches. It keeps nothing but open files and threads."""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import flight

from pipeline import UserError, manifest, storage
from pipeline.manifest import Manifest
from pipeline.online import turbo
from pipeline.online.batch import Transform
from pipeline.online.cache import ShardCache
from pipeline.online.loader import recipe_of
from pipeline.online.parts import Answer, Parts, Request, parse
from pipeline.online.samples import BadSample, SampleReader
from pipeline.service.guard import Admission, Outgoing, failure

OPENED = 8  # data sets, their splits, and ways to see them, that stay open
KEPT = 4  # arrays of answers that were sent, for later ones

T = TypeVar("T")


class Refused(UserError):
    """A request that this worker will never answer, however often it is asked."""


class Worker(AbstractContextManager["Worker"]):
    """Decodes parts of batches of the data sets below a folder. Threads may share it.

    `cache` is the folder for shards of a remote `root`, at most `cache_bytes` for each split in use.
    """

    def __init__(
        self,
        root: "str | os.PathLike[str]",
        threads: int | None = None,  # that decode; None: as many as usable cores
        readers: int = 1,  # samples that a request reads at a time
        cache: "str | os.PathLike[str] | None" = None,
        cache_bytes: int = 200 * 10**9,
    ) -> None:
        self._root, self._readers = storage.location(root), readers
        if storage.is_remote(self._root) and cache is None:
            raise UserError(f"{self._root}: is remote; name a folder on this machine for its shards: --cache FOLDER")
        self._folder, self._cache_bytes = None if cache is None else Path(cache), cache_bytes
        self._threads = len(os.sched_getaffinity(0)) if threads is None else threads
        self._shared = turbo.Shared(self._threads, KEPT)
        self._opening = threading.Lock()  # held while one is opened, which may take long
        self._lock = threading.Lock()  # guards these, each in the order of the last use
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()
        self._readers_of: OrderedDict[tuple[str, str], SampleReader] = OrderedDict()
        self._parts: OrderedDict[tuple[Any, ...], Parts] = OrderedDict()

    def size(self, request: Request) -> int:
        """Return the bytes of a request's views. Raises Refused where the worker cannot answer it; DatasetError."""
        parts = self._parts_of(request)
        with refusing():
            parts.require(request)
        return len(request.ids) * parts.bytes_per_view

    def answer(self, request: Request) -> Answer:
        """Return the views of a part. Raises as `size`, and as `Parts.decode`."""
        self.size(request)
        return self._parts_of(request).decode(request)

    def status(self) -> dict[str, Any]:
        """Return the threads that decode, and the data sets that are open."""
        with self._lock:
            return {"threads": self._threads, "datasets": sorted(self._manifests)}

    def close(self) -> None:
        """End the threads and close the files."""
        with self._lock:
            for reader in self._readers_of.values():
                reader.close()
            self._readers_of.clear()
            self._parts.clear()
        self._shared.pool.shutdown()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parts_of(self, request: Request) -> Parts:
        way = request.recipe, request.seed, *request.options.values()
        key = (request.data, request.identity, request.split, *way)
        if parts := self._known(self._parts, key):
            return parts
        with self._opening:
            if not (parts := self._known(self._parts, key)):
                data = self._manifest(request)
                with refusing():
                    if not data.split(request.split).samples:
                        raise UserError(f"{request.data}: the split {request.split!r} is empty")
                    recipe = recipe_of(data, request.recipe, request.seed, request.options)
                reader = self._reader(data, request.split)
                parts = self._keep(self._parts, key, Parts(data, request.split, recipe, reader, self._decoder))
            return parts

    def _decoder(self, recipe: Transform) -> turbo.Decoder:
        return turbo.Decoder(recipe, False, 0, self._threads, self._shared)

    def _manifest(self, request: Request) -> Manifest:
        name = request.data
        own = self._known(self._manifests, name)
        if own is None or own.identity != request.identity:  # perhaps it has been built anew
            own = self._keep(self._manifests, name, manifest.load(self._below(name)))
        if own.identity != request.identity:
            theirs = f"yours has the identity {request.identity[:12]}, this worker's {own.identity[:12]}"
            raise Refused(f"{name}: another data set of that name: {theirs}; copy it, or name another")
        return own

    def _below(self, name: str) -> storage.Location:
        """Return the folder of a data set. Raises Refused: it is not below the root."""
        nowhere = f"{name!r:.120}: names no data set below this worker's folder"
        folder = self._root / name
        inside = not name.startswith("/") and name.isprintable() and {"", ".", ".."}.isdisjoint(name.split("/"))
        try:
            if inside and isinstance(folder, Path) and not folder.resolve().is_relative_to(self._root.resolve()):
                inside = False  # a link leads out
            if not inside:
                raise Refused(nowhere)
            if not storage.is_file(folder / manifest.FILE_NAME):
                raise Refused(f"{name}: no such data set below this worker's folder")
        except OSError as error:  # too long a name, a link to itself
            raise Refused(nowhere) from error
        return folder

    def _reader(self, data: Manifest, split: str) -> SampleReader:
        key = data.identity, split
        reader = self._known(self._readers_of, key)
        if reader is None:
            lease = None
            if storage.is_remote(data.root):
                assert self._folder
                cache = ShardCache(data, split, self._folder, self._cache_bytes)
                shards = sorted({int(shard.name[-10:-4]) for shard in data.split(split).shards})
                if sum(shard.bytes for shard in data.split(split).shards) <= self._cache_bytes:
                    cache.ahead(shards)  # all of them, since any may be asked for next
                lease = cache.lease
            reader = self._keep(self._readers_of, key, SampleReader(data, split, lease, self._readers))
        return reader

    def _known(self, table: "OrderedDict[Any, T]", key: Any) -> T | None:
        """Return an entry, which counts as used last."""
        with self._lock:
            if key in table:
                table.move_to_end(key)
            return table.get(key)

    def _keep(self, table: "OrderedDict[Any, T]", key: Any, value: T) -> T:
        """Add an entry; drop the one that has not been used for the longest time."""
        with self._lock:
            table[key] = value
            table.move_to_end(key)
            if len(table) > OPENED:
                table.popitem(last=False)
            return value


@contextmanager
def refusing() -> Iterator[None]:
    """Raise UserError of the block as Refused."""
    try:
        yield
    except UserError as error:
        raise Refused(str(error)) from error


class Server(flight.FlightServerBase):
    """Serves a worker's answers by Arrow Flight, from its construction until `shutdown`.

    `location`: grpc://HOST:PORT (0: a free one, then `port`), grpc+tls://HOST:PORT with `tls`, certificate and key, or
    grpc+unix:///SOCKET. `token`: what clients have to know; None: nothing. Raises UserError: the port is not free.
    """

    def __init__(
        self,
        worker: Worker,
        location: str = "grpc://127.0.0.1:0",
        token: str | None = None,
        tls: tuple[bytes, bytes] | None = None,
    ) -> None:
        self._worker, self._outgoing = worker, Outgoing()
        certificates = None if tls is None else [tls]
        try:
            super().__init__(location, middleware={"admission": Admission(token)}, tls_certificates=certificates)
        except (OSError, flight.FlightError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{location}: cannot serve there ({reason}); name another address or port") from error
        self._outgoing.watch(location.partition("://")[2] if location.startswith("grpc+unix") else self.port)

    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.FlightDataStream:
        """Answer a request; one with no ids is answered by no views, once it has been checked."""
        with _failures():
            with refusing():
                request = parse(ticket.ticket)
            held = self._outgoing.hold(context, self._worker.size(request))
            answer = self._worker.answer(request)
            return self._outgoing.stream(context, answer.to_batch(), held)

    def do_action(self, context: flight.ServerCallContext, action: flight.Action) -> list[flight.Result]:
        """Answer the action `status` with that of this worker as JSON, and refuse all others."""
        if action.type != "status":
            raise failure("refused", f"a worker answers do_get and the action status, not {action.type!r:.50}")
        return [flight.Result(json.dumps(self.status()).encode())]

    def status(self) -> dict[str, Any]:
        """Return seconds, views, rate, queue, bytes_held and clients (see `Outgoing.status`), threads and datasets."""
        return self._outgoing.status() | self._worker.status()

    def shutdown(self) -> None:
        """End the calls under way, and serve no more."""
        with self._outgoing.closing():
            super().shutdown()

    def __exit__(self, *_: object) -> None:
        self.shutdown()


@contextmanager
def _failures() -> Iterator[None]:
    """Raise the errors of a request as Flight's, of a kind that the consumer knows."""
    kinds: tuple[tuple[type[Exception], str], ...] = (
        (Refused, "refused"),
        (BadSample, "bad"),
        (UserError, "data"),
        (OSError, "data"),
        (MemoryError, "busy"),
        (RuntimeError, "busy"),  # closing
    )
    try:
        yield
    except tuple(error for error, _ in kinds) as error:
        kind = next(name for cause, name in kinds if isinstance(error, cause))
        raise failure(kind, " ".join(str(error).split()) or type(error).__name__) from error

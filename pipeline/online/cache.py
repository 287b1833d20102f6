"""Shards of a remote data set, fetched whole and ahead of use into a bounded folder on disk."""

import hashlib
import os
import secrets
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from pipeline import UserError, storage
from pipeline.files import HashingFile
from pipeline.manifest import DatasetError, Manifest
from pipeline.online.samples import shard_numbers

PIECE = 8 * 2**20  # bytes of one request; between two of them a fetch can be ended
PART = ".part"  # ends the name of a shard that is not yet complete
STALE = 3600  # seconds without a change, after which such a file is a dead process's


class ShardCache(AbstractContextManager["ShardCache"]):
    """Keeps some of a split's shards on disk: those in use, and those that are used next. Threads may share it.

    They lie in FOLDER/IDENTITY/SPLIT, also for the next run, which checks each before its first use. Processes may
    share a folder: each uses what others have fetched, and goes on reading what another deletes. `limit`, the bytes of
    shards on disk with those being fetched, binds each process. Raises UserError: an impossible folder.
    """

    def __init__(self, data: Manifest, split: str, folder: Path, limit: int, fetchers: int = 4) -> None:
        names, inside = shard_numbers(data, split), folder / data.identity / split
        self._files = {shard: data.files[name] for shard, name in names.items()}
        self._sources = {shard: str(data.root / name) for shard, name in names.items()}
        self._paths = {shard: inside / Path(name).name for shard, name in names.items()}
        self._limit, self._fetchers = limit, fetchers
        try:
            inside.mkdir(parents=True, exist_ok=True)
            for part in inside.glob(f"*{PART}"):
                if part.stat().st_mtime < time.time() - STALE:
                    part.unlink(missing_ok=True)
            there = [shard for shard, path in self._paths.items() if path.exists()]
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; name another cache folder") from error
        missing = min(limit, self._bytes(self._files)) - self._bytes(there)
        if (free := shutil.disk_usage(folder).free) < missing:
            raise UserError(f"{folder}: {free:,} bytes free, it needs {missing:,}; lower the cache limit or make room")
        self._changed = threading.Condition()  # guards all that follows
        self._closed = False
        self._disk = dict.fromkeys(there, False)  # shards on disk → True: checked
        self._busy: dict[int, Path] = {}  # shards that a thread checks or fetches → the file it writes
        self._errors: dict[int, BaseException] = {}  # why fetches failed, until the next lease
        self._leases: Counter[int] = Counter()
        self._current: set[int] = set()  # shards leased since a lease last began one of those that come
        self._upcoming: dict[int, None] = {}  # shards not yet used, in the order of their first use

    def ahead(self, shards: Sequence[int]) -> None:
        """Fetch these shards in this order, that of their coming first use, as far as the limit permits.

        The list replaces the earlier one; what is being fetched goes on. To make room, the shard goes that will be used
        last, never a leased one. A shard will not be used again once a lease has begun another one of the list.
        """
        with self._changed:
            self._upcoming, self._current = dict.fromkeys(shards), set()
            self._fill()

    @contextmanager
    def lease(self, shards: Collection[int]) -> Iterator[dict[int, int]]:
        """Wait until the shards are there; yield shard → a descriptor for `os.pread`, open until the context ends.

        Each lease tries anew what failed before. Raises DatasetError: a shard that the store lacks or has with wrong
        bytes; UserError: more shards than the limit permits, a full disk; StorageError; RuntimeError: closed.
        """
        leased, descriptors = set(shards), {}
        with self._changed:
            together = leased | self._leases.keys()
            if self._bytes(together) > self._limit:
                used = f"{len(together)} shards in use, {self._bytes(together):,} bytes, and a limit of {self._limit:,}"
                raise UserError(f"{used}; raise it, or take order='shards' with a smaller window")
            self._leases.update(leased)
            self._current = leased if self._upcoming.keys() & leased else self._current | leased
            for shard in leased:
                self._upcoming.pop(shard, None)
                self._errors.pop(shard, None)
        try:
            for shard in leased:
                descriptors[shard] = self._opened(shard)
            yield descriptors
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)
            with self._changed:
                self._leases = self._leases - Counter(leased)
                self._fill()

    def close(self) -> None:
        """End fetches and leases that wait, and delete what is half fetched; a request under way leaves nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for part in self._busy.values():
                part.unlink(missing_ok=True)

    def __exit__(self, *error: object) -> None:
        self.close()

    def _bytes(self, shards: Collection[int]) -> int:
        return sum(self._files[shard].bytes for shard in shards)

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("the shard cache is closed")

    def _opened(self, shard: int) -> int:
        """Return a new descriptor of a leased shard, once it is there."""
        with self._changed:
            while True:
                self._require_open()
                if error := self._errors.pop(shard, None):
                    raise error
                if self._disk.get(shard):
                    try:
                        return os.open(self._paths[shard], os.O_RDONLY)
                    except FileNotFoundError:  # another process deleted it
                        del self._disk[shard]
                self._fill()
                self._changed.wait()

    def _fill(self) -> None:
        """Begin to fetch what leases wait for, then what comes next, while there is room. The lock is held."""
        for shard in [*self._leases, *self._upcoming]:
            if self._closed or len(self._busy) >= self._fetchers:
                return
            if not (self._disk.get(shard) or shard in self._busy or shard in self._errors):
                if not self._make_room(shard):
                    return
                self._disk.pop(shard, None)
                self._busy[shard] = self._paths[shard].with_suffix(f".{secrets.token_hex(4)}{PART}")
                threading.Thread(target=self._fetch, args=(shard,), name="penstock-fetch", daemon=True).start()

    def _make_room(self, shard: int) -> bool:
        """Delete what is used later than this shard, the last first, until it has room. The lock is held."""
        in_order = list(dict.fromkeys([*self._leases, *self._current, *self._upcoming]))
        later = [*in_order[in_order.index(shard) + 1 :], *(self._disk.keys() - in_order)]
        idle = [other for other in later if other in self._disk and other not in self._leases]
        while self._bytes({shard, *self._disk, *self._busy}) > self._limit:
            if not idle:
                return False
            last = idle.pop()
            self._paths[last].unlink(missing_ok=True)
            del self._disk[last]
        return True

    def _fetch(self, shard: int) -> None:
        """Bring a shard, and tell the leases of it, or of the error. Runs in a thread of its own."""
        with suppress(UserError, RuntimeError):  # a lease raises them; of other mistakes the thread too shows a trace
            try:
                self._bring(shard)
            finally:
                with self._changed:
                    del self._busy[shard]
                    if failed := sys.exception():
                        self._errors[shard] = failed
                    else:
                        self._disk[shard] = True
                    self._changed.notify_all()
                    self._fill()

    def _bring(self, shard: int) -> None:
        """Put a shard in the folder, with the bytes that the manifest promises, unless it is there."""
        source, record, path, part = self._sources[shard], self._files[shard], self._paths[shard], self._busy[shard]
        try:
            with suppress(FileNotFoundError), open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == record.sha256:
                    return
                path.unlink()
            for _ in range(2):  # where the store's bytes are others, ask once more
                with open(part, "wb") as file:
                    hashing = HashingFile(file)
                    for at in range(0, record.bytes, PIECE):
                        self._require_open()
                        hashing.write(storage.read_range(source, at, min(PIECE, record.bytes - at)))
                if hashing.sha256() == record.sha256:
                    with self._changed:
                        self._require_open()
                        return os.rename(part, path)  # without fsync: the next run checks what a crash leaves
            raise DatasetError(f"{source}: changed or damaged in the store; verify it with tools/verify_shards.py")
        except OSError as error:
            if error.filename == source:
                raise DatasetError(f"{source}: missing in the store; build it again") from error
            reason = f"{error.filename or path}: {error.strerror}"
            raise UserError(f"{reason}; make room, or name another cache folder") from error
        finally:
            part.unlink(missing_ok=True)

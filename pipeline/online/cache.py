"""Shards of a remote data set, fetched whole and ahead of use into a bounded folder on disk."""

import fcntl
import hashlib
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from math import inf
from pathlib import Path
from typing import BinaryIO

from pipeline import UserError, storage
from pipeline.files import HashingFile
from pipeline.manifest import DatasetError, FileRecord, Manifest
from pipeline.online.samples import shard_numbers

PIECE = 8 * 2**20  # bytes of one request; between two of them a fetch can be ended
PART = ".part"  # how the name of a shard that is not yet whole ends
POLL = 0.05  # seconds between looks at a shard that another process fetches
CLOSING = 1.5  # seconds that `close` waits for requests under way
MAX_OPEN = 256  # shards kept open, if no more are leased; descriptors are a bounded resource


class ShardCache(AbstractContextManager["ShardCache"]):
    """Keeps some of a split's shards on disk: those in use, and those that are used next. Threads may share it.

    They lie in FOLDER/IDENTITY/SPLIT, also for the next run, which checks each before its first use. Processes may
    share a folder: one of them fetches a shard for all, and each goes on reading what another deletes. `limit`, the
    bytes that shards may take on disk with those being fetched, then binds each process, not the folder.

    Raises:
        UserError: a limit below the largest shard, a disk that lacks the room, an unusable folder.
    """

    def __init__(self, data: Manifest, split: str, folder: Path, limit: int, fetchers: int = 4) -> None:
        names = shard_numbers(data, split)
        self._files = {shard: data.files[name] for shard, name in names.items()}
        self._sources = {shard: str(data.root / name) for shard, name in names.items()}
        self._paths = {shard: folder / data.identity / split / Path(name).name for shard, name in names.items()}
        self._limit, self._fetchers = limit, fetchers
        largest = max((record.bytes for record in self._files.values()), default=0)
        assert fetchers >= 1
        if limit < largest:
            raise UserError(f"cache limit {limit:,} bytes: the largest shard has {largest:,}; raise the cache limit")
        try:
            _tidy(folder / data.identity / split)
            there = [shard for shard, path in self._paths.items() if path.exists()]
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; name another cache folder") from error
        missing = min(limit, self._bytes(self._files)) - self._bytes(there)
        if (free := shutil.disk_usage(folder).free) < missing:
            raise UserError(
                f"{folder}: {free:,} bytes free, a cache of up to {limit:,} needs {missing:,}; lower the cache limit, "
                "make room, or name a folder on another disk"
            )
        self._changed = threading.Condition()  # guards all that follows
        self._stop = threading.Event()
        self._disk = dict.fromkeys(there, False)  # shards on disk → whether checked; the least recently released first
        self._busy: dict[int, threading.Thread] = {}  # shards being fetched or checked
        self._parts: set[Path] = set()  # the files that they are fetched into
        self._errors: dict[int, BaseException] = {}  # why fetches failed, until the next lease
        self._leases: Counter[int] = Counter()
        self._open: dict[int, int] = {}  # descriptors
        self._turns: dict[int, int] = {}  # places in the list, of shards whose turn is not over
        self._turn: set[int] = set()  # those whose turn it is

    def ahead(self, shards: Sequence[int]) -> None:
        """Fetch these shards in this order, that of their coming first use, as far as the limit permits.

        Replaces the earlier list; what is being fetched goes on. A shard's turn begins when it is leased, and ends when
        a later lease begins another's turn. To make room, those go first that are not in the list or whose turn is
        over, the least recently released first; then those whose turn is last. What is leased stays, and so does what
        has an earlier turn than the shard to be fetched, unless a lease waits for that.
        """
        with self._changed:
            self._turns, self._turn = {int(shard): place for place, shard in enumerate(dict.fromkeys(shards))}, set()
            self._fill()

    @contextmanager
    def lease(self, shards: Collection[int]) -> Iterator[dict[int, int]]:
        """Shard → a descriptor for `os.pread`, which stays ours; waits until each shard is there.

        Raises:
            DatasetError: a shard that the store lacks, or has with other bytes than the manifest promises, twice.
            StorageError: the store cannot be reached. Each lease tries anew, whatever failed ahead of it or before.
            UserError: more shards leased at a time than the limit permits; no room on the disk.
            RuntimeError: the cache is closed.
        """
        leased = dict.fromkeys(map(int, shards))
        with self._changed:
            together = leased.keys() | self._leases.keys()
            if self._bytes(together) > self._limit:
                raise UserError(
                    f"{len(together)} shards in use at a time, {self._bytes(together):,} bytes: the cache limit is "
                    f"{self._limit:,}; raise it, or take order='shards' with a smaller window"
                )
            self._leases.update(leased.keys())
            self._begin(leased.keys())
        try:
            with self._changed:
                descriptors = {shard: self._descriptor(shard) for shard in leased}
                self._fill()
            yield descriptors
        finally:
            with self._changed:
                self._release(leased.keys())

    def stop(self) -> None:
        """Begin to end: fetches stop, and leases that wait for a shard raise RuntimeError."""
        with self._changed:
            self._stop.set()
            self._changed.notify_all()

    def close(self) -> None:
        """End the fetches within two seconds, delete what is half fetched, close all descriptors, leased ones too."""
        self.stop()
        with self._changed:
            threads = list(self._busy.values())
        for thread in threads:  # one amid a long request is left behind: it can neither write nor rename any more
            thread.join(CLOSING / len(threads))
        with self._changed:
            while self._parts:
                self._parts.pop().unlink(missing_ok=True)
            while self._open:
                os.close(self._open.popitem()[1])

    def __exit__(self, *error: object) -> None:
        self.close()

    def _bytes(self, shards: Collection[int]) -> int:
        return sum(self._files[shard].bytes for shard in shards)

    # What follows is called with the lock held.

    def _begin(self, leased: Collection[int]) -> None:
        first = (self._turns.keys() & leased) - self._turn
        if first:
            for shard in self._turn:
                del self._turns[shard]
            self._turn = first
        for shard in leased:
            self._errors.pop(shard, None)  # it is tried again
            if shard not in self._turns and not self._disk.get(shard):  # it went too early: let it stay for this turn
                self._turns[shard] = -1
                self._turn.add(shard)

    def _descriptor(self, shard: int) -> int:
        while shard not in self._open:
            self._go_on()
            if shard in self._errors:
                raise self._errors.pop(shard)
            if not self._disk.get(shard):
                self._fill()
                self._changed.wait()
                continue
            try:
                self._open[shard] = os.open(self._paths[shard], os.O_RDONLY)
            except FileNotFoundError:  # another process deleted it
                del self._disk[shard]
            except OSError as error:
                raise UserError(f"{error.filename}: {error.strerror}; raise ulimit -n, or use fewer shards") from error
        return self._open[shard]

    def _release(self, leased: Collection[int]) -> None:
        self._leases.subtract(leased)
        self._leases = +self._leases  # without zeros
        for shard in leased & self._disk.keys():
            self._disk[shard] = self._disk.pop(shard)  # to the end
        idle = [shard for shard in self._open if shard not in self._leases]
        for shard in idle[: max(0, len(self._open) - MAX_OPEN)]:
            os.close(self._open.pop(shard))
        self._fill()

    def _fill(self) -> None:
        """Begin to fetch what a lease waits for, then what comes next, while there is room."""
        while not self._stop.is_set() and len(self._busy) < self._fetchers:
            idle = (each for many in (self._leases, self._turns) for each in many if each not in self._busy)
            shard = next((each for each in idle if not self._disk.get(each) and each not in self._errors), None)
            if shard is None or not self._make_room(shard):
                return
            self._disk.pop(shard, None)
            self._busy[shard] = threading.Thread(target=self._fetch, args=(shard,), name="penstock-fetch", daemon=True)
            self._busy[shard].start()

    def _make_room(self, shard: int) -> bool:
        """Delete what is used later than this shard, until it has room. False where that is not enough."""
        turn = -inf if shard in self._leases else self._turns[shard]
        while self._bytes({shard, *self._disk, *self._busy}) > self._limit:
            idle = [each for each in self._disk if each not in self._leases and each != shard]
            victim = max(idle, key=lambda each: self._turns.get(each, inf), default=shard)
            if victim == shard or self._turns.get(victim, inf) <= turn:
                return False
            if victim in self._open:
                os.close(self._open.pop(victim))
            self._paths[victim].unlink(missing_ok=True)
            del self._disk[victim]
        return True

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise RuntimeError("the shard cache is closed")

    # What follows runs in a thread for each shard.

    def _fetch(self, shard: int) -> None:
        with suppress(UserError, RuntimeError):  # a lease raises them; of other mistakes the thread too shows a trace
            try:
                self._bring(shard)
            except OSError as error:
                words = f"{error.filename or self._paths[shard]}: {error.strerror}"
                raise UserError(f"{words}; make room, or name another cache folder") from error
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
        """Let the shard be in the folder, with the bytes that the manifest promises."""
        path, part = self._paths[shard], self._paths[shard].with_suffix(PART)
        while not _is_whole(path, self._files[shard]):
            self._go_on()
            with _claimed(part) as file:
                if file is None:  # another process fetches it
                    self._stop.wait(POLL)
                    continue
                self._parts.add(part)
                try:
                    self._download(shard, file)
                    with self._changed:
                        self._go_on()
                        os.rename(part, path)  # without fsync: the next run checks what a crash leaves
                        self._parts.remove(part)
                        return
                finally:
                    with self._changed:
                        if part in self._parts:
                            self._parts.remove(part)
                            part.unlink(missing_ok=True)

    def _download(self, shard: int, file: BinaryIO) -> None:
        """Write the bytes that the manifest promises; where the store's are others, ask once more."""
        source, record = self._sources[shard], self._files[shard]
        for _ in range(2):
            file.truncate(0)
            hashing, found = HashingFile(file), 0
            for at in range(0, record.bytes + 1, PIECE):  # + 1: a last look where it should end
                self._go_on()
                try:
                    piece = storage.read_range(source, at, PIECE)
                except FileNotFoundError as error:
                    raise DatasetError(f"{source}: missing in the store; build it again") from error
                hashing.write(piece[: record.bytes - at])
                found += len(piece)
            file.flush()
            if FileRecord(found, hashing.sha256()) == record:
                return
        raise DatasetError(f"{source}: changed or damaged in the store; verify it with tools/verify_shards.py")


def _tidy(folder: Path) -> None:
    """Create a folder, or delete what dead processes have left half written there."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob(f"*{PART}"):
        with _claimed(part) as file:
            if file:
                part.unlink()


@contextmanager
def _claimed(part: Path) -> Iterator[BinaryIO | None]:
    """A file to write to, created where it is missing, which ends with its process; None while another has it."""
    ours = False
    with open(part, "ab") as file:
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(file.fileno()), part.stat())  # not renamed or deleted meanwhile
        yield file if ours else None


def _is_whole(path: Path, record: FileRecord) -> bool:
    """Whether a shard is there and right; a wrong one is deleted."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        if record == FileRecord(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()):
            return True
        path.unlink()
    return False

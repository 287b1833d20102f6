"""Raw pictures that a person names to be predicted: files, folders and tars, here or in an object store.

Nothing is unpacked to a path, and few pictures are in memory at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pipeline import SourceError, UserError, archives, manifest, storage
from pipeline.cli import printable
from pipeline.decode import REASONS
from pipeline.manifest import BuildRecipe
from pipeline.storage import Location, Read, StorageError, read_ahead

TARS = (".tar", ".tar.gz", ".tgz")  # of which the packed ones are refused
BESIDE = (  # endings of files that lie beside pictures and are none
    *(".cls", ".csv", ".html", ".idx", ".json", ".jsonl", ".log", ".md", ".npy", ".npz", ".parquet", ".py"),
    *(".safetensors", ".toml", ".tsv", ".txt", ".xml", ".yaml", ".yml"),
)
TAKEN = ("", archives.UNSAFE_NAME, archives.SECOND_OF_NAME)  # no picture is written to a path of its name
SILENT = (archives.FOLDER, archives.DATA_AFTER_END)


@dataclass(frozen=True)
class Raw:
    """A file that should be a picture."""

    name: str  # the file's path or URL; of a member of a tar, after the tar's own
    size: int  # bytes
    read: Callable[[], bytes]  # raises OSError, StorageError; any thread may call it
    stored: bool = False  # a manifest says that the builder stored it: of its own size, it is taken as it is


@dataclass(frozen=True)
class Failure:
    """A picture, a folder or a tar that cannot be predicted."""

    name: str
    code: str  # of pipeline.decode.REASONS, or "unreadable", or "bad_tar"
    reason: str


@dataclass
class LeftOut:
    """Files and places that gave no picture."""

    kinds: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)  # places without a picture

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.kinds.items()))


def useless(name: str, code: str) -> Failure:
    """Return the failure of a picture that is not decoded, for one of pipeline.decode.REASONS."""
    return Failure(name, code, REASONS[code])


def unreadable(name: object, error: OSError) -> Failure:
    return Failure(str(name), "unreadable", error.strerror or str(error))


def locations(words: Sequence[str]) -> list[Location]:
    """Return the locations that paths and URLs name. Raises UserError for one that does not exist."""
    named = [storage.location(word) for word in words]
    for location, exists in read_ahead(named, storage.exists):
        if not exists:
            raise UserError(f"{printable(str(location))}: no such file or folder")
    return named


def pictures(named: Sequence[Location], rules: BuildRecipe, left_out: LeftOut) -> Iterator[Raw | Failure]:
    """Yield every picture at locations that exist, one after the other, in the order of paths and of members.

    In folders and tars, files whose name is hidden or ends as in BESIDE, and what is no file, are counted in
    `left_out`; any other file should be a picture, whatever its name. `rules`: of the data set that the network was
    trained on.

    Raises:
        StorageError: the object store fails.
    """
    for location in named:
        empty = True
        for picture in _at(location, rules, left_out):
            empty = False
            yield picture
        if empty:
            left_out.empty.append(str(location))


def _at(location: Location, rules: BuildRecipe, left_out: LeftOut) -> Iterator[Raw | Failure]:
    try:
        if storage.is_dir(location):
            yield from _below(location, rules, left_out)
        elif storage.is_file(location):
            yield from _file(location, storage.stamp(location)[0], rules, left_out)
        else:
            yield Failure(str(location), "unreadable", "neither a file nor a folder")
    except OSError as error:
        yield unreadable(location, error)


def _below(folder: Location, rules: BuildRecipe, left_out: LeftOut) -> Iterator[Raw | Failure]:
    """Yield the files of a folder and its folders. Links to folders are followed, each folder once."""
    pending = [(folder, -1)]  # bytes of a file; −1: a folder
    seen: set[tuple[int, int]] = set()
    while pending:
        path, size = pending.pop()
        if size >= 0:
            yield from _file(path, size, rules, left_out)
            continue
        if isinstance(path, Path):
            status = path.stat()
            if (status.st_dev, status.st_ino) in seen:
                left_out.kinds["second link to one folder"] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
        try:
            pending += reversed(list(_inside(path, left_out)))
        except OSError as error:
            yield unreadable(path, error)


def _inside(folder: Location, left_out: LeftOut) -> Iterator[tuple[Location, int]]:
    for entry in storage.scan(folder):
        if entry.is_dir and not entry.name.startswith("."):
            yield folder / entry.name, -1
        elif kind := _no_picture(entry.name):
            left_out.kinds[kind] += 1
        elif entry.is_file:
            yield folder / entry.name, entry.size
        else:
            left_out.kinds["link to nothing, pipe or device"] += 1


def _no_picture(name: str) -> str:
    """Return the kind of a file in a folder or a tar that is no picture by its name; else empty."""
    last = name.rpartition("/")[2].lower()
    return "hidden" if last.startswith(".") else next((f"*{end}" for end in BESIDE if last.endswith(end)), "")


def _file(path: Location, size: int, rules: BuildRecipe, left_out: LeftOut) -> Iterator[Raw | Failure]:
    if path.name.lower().endswith(TARS):
        yield from _tarred(path, rules, left_out)
    elif size > rules.max_bytes:  # it is not even read
        yield useless(str(path), "too_many_bytes")
    else:
        yield Raw(str(path), size, lambda: storage.read_range(str(path), 0, size))


def _tarred(tar: Location, rules: BuildRecipe, left_out: LeftOut) -> Iterator[Raw | Failure]:
    """Yield the members that should be pictures; and why there are no more, where the tar is damaged."""
    stored = _is_shard(tar)
    try:
        with storage.opened(tar) as (read, size):
            for member in archives.members(read, 0, size, str(tar)):
                yield from _member(member, read, str(tar), stored, rules, left_out)
    except StorageError:
        raise
    except OSError as error:
        yield unreadable(tar, error)
    except SourceError as error:
        yield Failure(str(tar), "bad_tar", f"not a whole, plain tar ({str(error).removeprefix(f'{tar}: ')})")


def _member(
    member: archives.Member, read: Read, tar: str, stored: bool, rules: BuildRecipe, left_out: LeftOut
) -> Iterator[Raw | Failure]:
    """Yield the picture of a member, if it should be one. Raises SourceError where the tar ends without its mark."""
    name = f"{tar}/{member.name}"
    if member.reason == archives.NO_END:
        raise SourceError(f"cut short at byte {member.offset:,}: it has no end mark; fetch it again")
    if member.reason not in TAKEN:
        if member.reason not in SILENT:
            left_out.kinds["link, device or sparse file in a tar"] += 1
    elif kind := _no_picture(member.name):
        left_out.kinds[kind] += 1
    elif member.size > rules.max_bytes:  # it is not even read
        yield useless(name, "too_many_bytes")
    else:  # read now: other threads would leap about in the tar
        yield Raw(name, member.size, partial(bytes, read(member.size, member.offset)), stored)


def _is_shard(tar: Location) -> bool:
    """Return True if the manifest of a dataset directory lists a tar: the builder has rescaled its pictures already.

    Where a picture comes from decides, not how it looks. For a raw picture may well be a JPEG of size × size, and the
    builder would encode that again.
    """
    path = tar.resolve() if isinstance(tar, Path) else tar
    root = path.parent.parent
    try:
        dataset = manifest.parse(storage.read_bytes(root / manifest.FILE_NAME), root)
    except (OSError, UserError):  # none, or not one of ours: then it vouches for nothing
        return False
    names = {shard.name for split in dataset.splits.values() for shard in split.shards}
    return f"{path.parent.name}/{path.name}" in names

"""The pictures in a tar, read in order with one in memory at a time; nothing is unpacked to a path."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline import SourceError, UserError, archives, manifest, storage
from pipeline.archives import Member
from pipeline.manifest import BuildRecipe
from pipeline.storage import Location, Read, StorageError
from trainer.raw.raws import Failure, LeftOut, Raw, no_picture, unreadable, useless

TAKEN = ("", archives.UNSAFE_NAME, archives.SECOND_OF_NAME)  # no picture is written to a path of its name
SILENT = (archives.FOLDER, archives.DATA_AFTER_END)


def tarred(tar: Location, rules: BuildRecipe, left_out: LeftOut) -> Iterator[Raw | Failure]:
    """Yield the members that should be pictures; and why there are no more, where the tar is damaged.

    `left_out` as in `places.pictures`.

    Raises:
        StorageError: the object store fails.
    """
    stored = is_shard(tar)
    try:
        with storage.opened(tar) as (read, size):
            for member in archives.members(read, 0, size, str(tar)):
                yield from _picture(member, read, str(tar), stored, rules, left_out)
    except StorageError:
        raise
    except OSError as error:
        yield unreadable(tar, error)
    except SourceError as error:
        yield Failure(str(tar), "bad_tar", f"not a whole, plain tar ({str(error).removeprefix(f'{tar}: ')})")


def _picture(
    member: Member, read: Read, tar: str, stored: bool, rules: BuildRecipe, left_out: LeftOut
) -> Iterator[Raw | Failure]:
    """Raises SourceError where the tar ends without its mark."""
    name = f"{tar}/{member.name}"
    if member.reason == archives.NO_END:
        raise SourceError(f"cut short at byte {member.offset:,}: it has no end mark; fetch it again")
    if member.reason not in TAKEN:
        if member.reason not in SILENT:
            left_out.kinds["link, device or sparse file in a tar"] += 1
    elif kind := no_picture(member.name):
        left_out.kinds[kind] += 1
    elif member.size > rules.max_bytes:  # it is not even read
        yield useless(name, "too_many_bytes")
    else:  # read now: other threads would leap about in the tar
        yield Raw(name, member.size, partial(bytes, read(member.size, member.offset)), stored)


def is_shard(tar: Location) -> bool:
    """Return whether the manifest of a dataset directory lists a tar: the builder has rescaled its pictures already.

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

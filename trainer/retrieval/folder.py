"""A folder that appears whole or not at all, in the place of an older one."""

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import UserError
from pipeline.files import ASIDE, sync_folder

HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
CANNOT = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}  # of file systems that do not exchange


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which becomes `folder` when the body has ended well; else it is deleted.

    What it holds is on the disk before it has its name. What writers that were killed left beside it is deleted first:
    each holds a lock on its temporary folder for as long as it lives. A link stays one: what it leads to is replaced.

    Raises:
        OSError: with the older `folder` untouched.
    """
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    aside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{ASIDE}")
    aside.mkdir()
    number = os.open(aside, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield aside
        _synchronise(aside)
        _replace(aside, folder)
        sync_folder(folder.parent)
    except OSError as error:
        error.filename = error.filename or str(folder)  # a full disk does not say where
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # after an exchange, the older one
        os.close(number)


def sweep(folder: Path) -> None:
    """Delete the temporary folders of `folder` that nobody writes any more."""
    ours = re.compile(rf"{re.escape(folder.name)}\.[0-9a-f]{{8}}{re.escape(ASIDE)}")
    for aside in sorted(folder.parent.iterdir()):
        if not ours.fullmatch(aside.name) or aside.is_symlink() or not aside.is_dir():
            continue
        number = os.open(aside, os.O_RDONLY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(aside)
        except BlockingIOError:
            continue
        finally:
            os.close(number)


def require_room(folder: Path, size: int) -> None:
    """Raise UserError where the disk of `folder` has no room for `size` bytes."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise UserError(
            f"{folder}: needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free; make room, or name another --out"
        )


def _synchronise(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _replace(aside: Path, folder: Path) -> None:
    """Give `aside` the name `folder`; an older folder of that name gets the other's."""
    if not folder.exists():
        os.rename(aside, folder)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(HERE, os.fsencode(aside), HERE, os.fsencode(folder), EXCHANGE) == 0:
        return
    if (number := ctypes.get_errno()) not in CANNOT:
        raise OSError(number, os.strerror(number), str(folder))
    older = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{ASIDE}")
    os.rename(folder, older)
    os.rename(aside, folder)
    shutil.rmtree(older, ignore_errors=True)

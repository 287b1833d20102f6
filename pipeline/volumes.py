"""Local files as they may be: links to nothing, pipes; on volumes not mounted, empty, read-only, or another user's."""

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from pipeline import UserError

CONTAINER = "PENSTOCK_CONTAINER"  # set in the images of docker/Dockerfile, where what lies in no volume is soon lost
MOUNTS = Path("/proc/self/mountinfo")
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)  # errors of links
# What file systems, network storage and desktops put into a folder without being asked
JUNK = {"lost+found", "System Volume Information", "$RECYCLE.BIN", "@eaDir", "@Recycle", "#recycle", ".thumbnails"}
JUNK |= {"#snapshot", "@Recently-Snapshot", "@tmp"}
JUNK |= {".DS_Store", "__MACOSX", "Thumbs.db", "desktop.ini", ".ipynb_checkpoints", ".Spotlight-V100", ".fseventsd"}


def explained(error: OSError) -> str:
    """Return an error of the operating system in one line; if it denies access, with both user ids and the remedy."""
    if not isinstance(error.filename, (str, bytes)):
        return str(error.strerror)
    path, plain = Path(os.fsdecode(error.filename)), f"{os.fsdecode(error.filename)}: {error.strerror}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return _unmounted(path) or _denied(path) or plain
    if error.errno == errno.EISDIR:
        return f"{path}: is a directory, where a file should be; move it away, or name another path"
    if error.errno == errno.EEXIST and path.is_symlink() and not path.exists():
        return f"{path}: is a link to nothing; make the folder that it names, or name another place"
    read_only = f"{_nearest(path)}: is read-only; mount the volume without :ro, or name another place"
    return _unmounted(path) or read_only if error.errno == errno.EROFS else plain


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Name `path` in the errors of calls that know no more than the number of an open file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def open_regular(path: str | Path) -> BufferedReader:
    """Open a local file to read. Raises OSError, also for a pipe, whose writer nobody waits for, and for a device."""

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK)
        if stat.S_ISREG(mode := os.fstat(descriptor).st_mode) or stat.S_ISDIR(mode):  # open() refuses folders itself
            return descriptor
        os.close(descriptor)
        raise OSError(errno.ESPIPE, "not a regular file", str(path))

    return open(path, "rb", opener=opener)


def mode_and_size(entry: "os.DirEntry[str]") -> tuple[int, int]:
    """Return the mode of what an entry of a folder is or leads to, 0 for a link to nothing or to itself; and its bytes.

    The bytes of all but a regular file are 0.
    """
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno not in NOWHERE:
            raise
        return 0, 0
    return status.st_mode, status.st_size if stat.S_ISREG(status.st_mode) else 0


def is_junk(name: str) -> bool:
    """Return whether an entry of a folder is one of `JUNK`, of a wastebasket, or macOS's shadow of another file."""
    return name in JUNK or name.startswith((".Trash", "._"))


def hint(path: Path) -> str:
    """Return what to add to a message that `path` lacks its content: "; …" if a volume seems to be missing, or ""."""
    if not isinstance(path, Path):
        return ""
    if unmounted := _unmounted(path):
        return "; " + unmounted
    folder = _nearest(path)
    if any(folder.iterdir()):
        return ""
    return f"; {'the folder' if folder == path else folder} is empty: is the volume mounted?"


def require_kept(path: Path) -> None:
    """Raise UserError in our container if `path` is on no volume: what is written there would be lost."""
    if unmounted := _unmounted(path):
        raise UserError(f"{path}: would be lost with this container; {unmounted}")


def _unmounted(path: Path) -> str:
    """Return what to mount for a `path` that is in our container and on no volume; else ""."""
    if not os.environ.get(CONTAINER):
        return ""
    real = Path(os.path.realpath(path))
    octal = re.compile(r"\\([0-7]{3})")  # the kernel's form of a space is \040
    points = [octal.sub(lambda code: chr(int(code[1], 8)), line.split()[4]) for line in MOUNTS.read_text().splitlines()]
    if any(point != "/" and real.is_relative_to(point) for point in points):
        return ""
    if os.getcwd() != "/" and real.is_relative_to(os.getcwd()):  # the program's own folder: no place to mount at
        return f"{real} is on no volume; name a path on one, such as /data/NAME"
    top = Path(*real.parts[:2])
    return f"no volume is mounted at {top}: docker run --volume FOLDER:{top}"


def _nearest(path: Path) -> Path:
    """Return `path` if it is a folder, else the nearest folder above it."""
    return next(folder for folder in (path, *path.absolute().parents) if os.path.isdir(folder))


def _denied(path: Path) -> str | None:
    """Return who may not do what where, and the remedy; None if the permissions are not the reason."""
    path = path.absolute()
    existing = [step for step in (*reversed(path.parents), path) if os.path.lexists(step)]
    last = existing[-1]
    checks = [(step, os.X_OK, "enter") for step in (existing[:-1] if last == path else existing)]
    checks += [(last, os.R_OK, "read")] if last == path else []
    checks += [(last, os.W_OK, "write to"), (last.parent, os.W_OK, "write to")]
    step, verb = next(((step, verb) for step, mode, verb in checks if not os.access(step, mode)), (None, ""))
    if step is None:
        return None
    status, user, group = os.stat(step), os.geteuid(), os.getegid()
    owner = f"{step}: belongs to user {status.st_uid} (mode {status.st_mode & 0o7777:03o}), and user {user} may not"
    remedy = f"as root, chown -R {user}:{group} {step}"
    if status.st_uid == user:
        remedy = f"chmod -R u+rwX {step}"
    elif status.st_uid:  # to run as root is no remedy
        remedy = f"run this as that user (docker run --user {status.st_uid}:{status.st_gid}), or {remedy}"
    return f"{owner} {verb} it; {remedy}"

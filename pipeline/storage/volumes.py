"""What the volume of a local path keeps from us: not mounted, empty, read-only, another user's; with the remedy."""

import errno
import os
import re
from pathlib import Path

from pipeline import UserError

CONTAINER = "PENSTOCK_CONTAINER"  # set in the images of docker/Dockerfile, where what lies in no volume is soon lost
MOUNTS = Path("/proc/self/mountinfo")


def explained(error: OSError) -> str:
    """The operating system's error in one line; where it denies access, with both user ids and the remedy."""
    if not isinstance(error.filename, (str, bytes)):
        return str(error.strerror)
    name, said = os.fsdecode(error.filename), None
    path = Path(name)
    if error.errno in (errno.EACCES, errno.EPERM):
        said = _unmounted(path) or _denied(path)
    elif error.errno == errno.EROFS:
        what = "mount the volume without :ro, or name another place"
        said = _unmounted(path) or f"{_nearest(path)}: is read-only; {what}"
    return said or f"{name}: {error.strerror}"


def hint(place: Path) -> str:
    """What to add where a `place` to read from lacks what it should hold: "; …" if a volume seems to lack, or ""."""
    if not isinstance(place, Path):
        return ""
    if said := _unmounted(place):
        return "; " + said
    near = _nearest(place)
    if any(near.iterdir()):
        return ""
    return f"; {'the folder' if near == place else near} is empty: is the volume mounted?"


def require_kept(path: Path) -> None:
    """Raises UserError in a container of ours where `path` is on no volume: what is written there would be lost."""
    if said := _unmounted(path):
        raise UserError(f"{path}: would be lost with this container; {said}")


def _unmounted(path: Path) -> str:
    """What to mount for a `path` that is in a container of ours and on no volume; else ""."""
    if not os.environ.get(CONTAINER):
        return ""
    whole = Path(os.path.realpath(path))
    points = [_spelled(line.split()[4]) for line in MOUNTS.read_text().splitlines()]
    if any(point != Path("/") and whole.is_relative_to(point) for point in points):
        return ""
    if os.getcwd() != "/" and whole.is_relative_to(os.getcwd()):  # where the program is: no place to mount at
        return f"{whole} is on no volume; name a path on one, such as /data/NAME"
    top = Path(*whole.parts[:2])
    return f"no volume is mounted at {top}: docker run --volume FOLDER:{top}"


def _spelled(point: str) -> Path:
    """A mount point as the kernel lists it, where a space is \\040."""
    return Path(re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), point))


def _nearest(path: Path) -> Path:
    """`path`, or what is there of the way to it; of a file, its folder."""
    return next(each for each in (path, *path.absolute().parents) if os.path.isdir(each))


def _denied(path: Path) -> str | None:
    """Who may not do what where, and the remedy; None where the permissions are not the reason."""
    whole = path.absolute()
    way = [each for each in (*reversed(whole.parents), whole) if os.path.lexists(each)]
    for each in way[:-1] if len(way) > 1 and way[-1] == whole else way:
        if not os.access(each, os.X_OK):
            return _refusal(each, "enter")
    last = way[-1]
    if not os.access(last, os.R_OK) and last == whole:
        return _refusal(last, "read")
    for each in (last, last.parent):
        if not os.access(each, os.W_OK):
            return _refusal(each, "write to")
    return None


def _refusal(place: Path, verb: str) -> str:
    status = os.stat(place)
    me, group, mode = os.geteuid(), os.getegid(), status.st_mode & 0o7777
    if status.st_uid == me:
        remedy = f"chmod -R u+rwX {place}"
    else:
        remedy = f"as root, chown -R {me}:{group} {place}"
        if status.st_uid:  # to run as root is no remedy
            remedy = f"run this as that user (docker run --user {status.st_uid}:{status.st_gid}), or {remedy}"
    return f"{place}: belongs to user {status.st_uid} (mode {mode:03o}), and user {me} may not {verb} it; {remedy}"

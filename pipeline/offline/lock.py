"""The lock on a dataset directory: DATASET is empty, or holds an unfinished run of this very build, and of no other."""

import errno
import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from pipeline import UserError, storage
from pipeline.files import sweep, write_bytes_aside
from pipeline.manifest import FILE_NAME
from pipeline.offline.plan import Plan, differences
from pipeline.offline.shards import BUILD_FOLDER
from pipeline.storage import Location

PLAN_FILE = "plan.json"
PATIENCE = 5.0  # seconds for which a part waits until another one has deleted temporary files


class BuildError(UserError):
    """A build that cannot begin, or cannot end."""


@contextmanager
def locked(plan: Plan, root: Location, *, alone: bool) -> Iterator[bool]:
    """Reserve `root` for this plan; and for this process if `alone`, else for the parts of a build in several jobs.

    `root` must be empty or absent, or left by an interrupted run of the very same build. However the block ends, no
    half-written file stays, unless another part may be writing it. Stores have no locks: there two runs of the very
    same build may meet, and write equal bytes.

    Yields:
        True if the manifest is written already and only the deletion of the build's state is left, which follows.
    Raises:
        BuildError: one line on what is in the way, or that the disk is full.
    """
    _require_free(root)
    fingerprint = plan.fingerprint()
    with _file_lock(plan, root, alone) if isinstance(root, Path) else nullcontext():
        _require_equal(_put_plan(root, fingerprint), fingerprint, root)
        if alone and not isinstance(root, Path):
            sweep(root)  # uploads without an end are invisible, and are paid for
        yield storage.exists(root / FILE_NAME)
        if storage.exists(root / FILE_NAME):
            _remove_state(root / BUILD_FOLDER)


@contextmanager
def _file_lock(plan: Plan, root: Path, alone: bool) -> Iterator[None]:
    (root / BUILD_FOLDER).mkdir(parents=True, exist_ok=True)
    with open(root / BUILD_FOLDER / "lock", "w") as lock:
        _acquire(lock, root, alone)
        _require_free(root)  # again: a build that ended since then took its lock file with it
        try:
            _sweep_if_alone(lock, plan, root)
            _acquire(lock, root, alone)
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            remedy = "what is finished stays; make room, and the same command goes on"
            raise BuildError(f"{root}: {error.strerror}; {remedy}") from error
        finally:
            _sweep_if_alone(lock, plan, root)


def _put_plan(root: Location, fingerprint: bytes) -> bytes:
    """Write the plan unless another process has done so; return the plan that is there."""
    state = root / BUILD_FOLDER / PLAN_FILE
    if not isinstance(state, Path):
        return storage.put_if_absent(state, fingerprint)
    with open(state.with_name("beginning"), "w") as beginning:
        fcntl.flock(beginning, fcntl.LOCK_EX)  # of parts that begin at the same moment, one writes the plan
        if not state.exists():
            write_bytes_aside(state, fingerprint)
    return state.read_bytes()


def _require_free(root: Location) -> None:
    """Raises BuildError where `root` holds anything but an unfinished build."""
    try:
        names = {entry.name for entry in storage.scan(root)}
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise BuildError(f"{root}: is a file, not a folder; name another DATASET") from error
    if storage.exists(root / BUILD_FOLDER / PLAN_FILE):
        return
    if FILE_NAME in names:
        _remove_state(root / BUILD_FOLDER)  # of a build that was killed in the moment after its end
        raise BuildError(f"{root}: a finished dataset is there already; delete it or name another DATASET")
    if names - {BUILD_FOLDER}:
        raise BuildError(f"{root}: exists and is not an unfinished build; delete it or name another DATASET")


def _remove_state(folder: Location) -> None:
    """Delete the state of an ended build, the plan last: until then the same command still ends this build."""
    with suppress(OSError):  # another process may be about to see that nothing is to do
        for entry in storage.scan(folder):
            if entry.name != PLAN_FILE:
                (storage.remove_tree if entry.is_dir else storage.remove)(folder / entry.name)
        storage.remove_tree(folder)


def _acquire(lock: IO[str], root: Path, alone: bool) -> None:
    """Take the lock, shared with other parts unless `alone`; a part waits while another one has it for itself."""
    deadline = time.monotonic() + (0.0 if alone else PATIENCE)
    while True:
        try:
            return fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise BuildError(f"{root}: another build is writing there; wait for it, or stop it") from error
        except OSError as error:
            raise BuildError(f"{lock.name}: cannot be locked ({error.strerror}); name a DATASET elsewhere") from error
        time.sleep(0.05)


def _sweep_if_alone(lock: IO[str], plan: Plan, root: Path) -> None:
    """Delete what killed writers left half-written, unless other parts are at work. A shared lock is lost."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    ours = ["*.tmp", *(f"{split}/*.tmp" for split in plan.splits)]
    ours += [f"{BUILD_FOLDER}/{name}*.tmp" for name in ("*.npz", "*.tar", PLAN_FILE)]
    for path in (path for pattern in ours for path in root.glob(pattern)):
        path.unlink(missing_ok=True)


def _require_equal(before: bytes, now: bytes, root: Location) -> None:
    """Raises BuildError, which names the difference, where two fingerprints of plans are not of one build."""
    try:
        old, new = _by_words(before), _by_words(now)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise BuildError(f"{root / BUILD_FOLDER / PLAN_FILE}: damaged ({error}); delete {root}; build again") from error
    differing = differences(old, new)
    if old["format"] != new["format"]:
        text, remedy = "of another version of Penstock", "end it with that version"
    elif differing or before != now:
        more = f" and {len(differing) - 4:,} more" * (len(differing) > 4)
        text = f"that differs in {', '.join(differing[:4]) or 'the names of its raw images'}{more}"
        remedy = "run that one again"
    else:
        return
    raise BuildError(f"{root}: holds an unfinished build {text}; {remedy}, or delete {root} and build again")


def _by_words(fingerprint: bytes) -> dict[str, Any]:
    """Return what a fingerprint holds by the user's words for it, but for the names of the raw images."""
    body = json.loads(fingerprint)
    images = {f"raw images of {split}": count for split, count in body["images"].items()}
    names = ((record["label"], dict.fromkeys((record["wnid"], record["words"]))) for record in body["classes"])
    classes = {f"label {label}": " ".join(words) for label, words in names}
    return {"format": body.get("format", 1), **body["recipe"], **body["codecs"], **images, **classes}

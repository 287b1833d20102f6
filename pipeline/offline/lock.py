"""The lock on a dataset directory: DATASET is empty, or holds an unfinished run of this very build, and of no other."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from pipeline import UserError, files, storage
from pipeline.files import full_disk_explained, sweep, write_bytes_aside
from pipeline.manifest import FILE_NAME
from pipeline.offline.plan import Plan, differences
from pipeline.offline.shards import BUILD_FOLDER
from pipeline.storage import Location

PLAN_FILE = "plan.json"
PATIENCE = 5.0  # seconds for which a part waits until another one has deleted temporary files


@contextmanager
def locked(plan: Plan, root: Location, *, alone: bool) -> Iterator[bool]:
    """Reserve `root` for this plan; and for this process if `alone`, else for the parts of a build in several jobs.

    `root` must be empty or absent, or left by an interrupted run of the very same build. However the block ends, no
    half-written file stays, unless another part may be writing it. Stores have no locks: there two runs of the very
    same build may meet, and write equal bytes.

    Yields True if the manifest is written already and only the deletion of the build's state is left, which follows.
    Raises UserError: one line on what is in the way, or that the disk is full.
    """
    _require_free(root)
    fingerprint, state = plan.fingerprint(), root / BUILD_FOLDER / PLAN_FILE
    with _file_lock(plan, root, fingerprint, alone) if isinstance(root, Path) else nullcontext():
        before = storage.read_bytes(state) if isinstance(state, Path) else storage.put_if_absent(state, fingerprint)
        _require_equal(before, fingerprint, root)
        if alone and not isinstance(root, Path):
            sweep(root)  # uploads without an end are invisible, and are paid for
        yield storage.exists(root / FILE_NAME)
        if storage.exists(root / FILE_NAME):
            _remove_state(root / BUILD_FOLDER)


@contextmanager
def _file_lock(plan: Plan, root: Path, fingerprint: bytes, alone: bool) -> Iterator[None]:
    state = root / BUILD_FOLDER / PLAN_FILE
    state.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK  # not to wait for the reader of a pipe of that name
    with open(os.open(state.with_name("lock"), flags, 0o666), "w") as lock:
        # whoever is alone for a moment writes the plan; a part then lets others in, which find it there
        kind = _acquire(lock, root, (fcntl.LOCK_EX,) if alone else (fcntl.LOCK_EX, fcntl.LOCK_SH))
        _require_free(root)  # again: a build that ended since then took its lock file with it
        try:
            with full_disk_explained(root):
                if kind == fcntl.LOCK_EX:
                    _sweep(plan, root)
                if not state.exists():
                    write_bytes_aside(state, fingerprint)
                if kind == fcntl.LOCK_EX and not alone:
                    _acquire(lock, root, (fcntl.LOCK_SH,))
                yield
        finally:
            with suppress(BlockingIOError):  # else other parts are at work
                if files.lock(lock, fcntl.LOCK_EX, root) or alone:
                    _sweep(plan, root)


def _acquire(lock: IO[str], root: Path, kinds: tuple[int, ...]) -> int:
    """Take the first kind of lock that others allow; return it. Where one may be shared, wait for it a little.

    Where there are no locks, the last kind is returned: parts of a build then leave each other's files alone.
    """
    deadline = time.monotonic() + (PATIENCE if fcntl.LOCK_SH in kinds else 0.0)
    while True:
        for kind in kinds:
            try:
                return kind if files.lock(lock, kind, root) else kinds[-1]
            except BlockingIOError:
                continue
        if time.monotonic() >= deadline:
            raise UserError(f"{root}: another build is writing there; wait for it, or stop it")
        time.sleep(0.05)


def _sweep(plan: Plan, root: Path) -> None:
    """Delete what killed writers left half-written."""
    patterns = ["*.tmp", *(f"{split}/*.tmp" for split in plan.splits)]
    patterns += [f"{BUILD_FOLDER}/{name}*.tmp" for name in ("*.npz", "*.tar", PLAN_FILE)]  # a listing may be on its way
    for path in (path for pattern in patterns for path in root.glob(pattern)):
        path.unlink(missing_ok=True)


def _require_free(root: Location) -> None:
    """Raise UserError where `root` holds anything but an unfinished build."""
    try:
        names = files.content(root)
    except NotADirectoryError as error:
        raise UserError(f"{root}: is a file, not a folder; name another DATASET") from error
    if storage.exists(root / BUILD_FOLDER / PLAN_FILE):
        return
    if FILE_NAME in names:
        _remove_state(root / BUILD_FOLDER)  # of a build that was killed in the moment after its end
        raise UserError(f"{root}: a finished dataset is there already; delete it or name another DATASET")
    if names - {BUILD_FOLDER}:
        raise UserError(f"{root}: exists and is not an unfinished build; delete it or name another DATASET")


def _remove_state(folder: Location) -> None:
    """Delete the state of an ended build, the plan last: until then the same command still ends this build."""
    with suppress(OSError):  # another process may be about to see that nothing is to do
        for entry in storage.scan(folder):
            if entry.name != PLAN_FILE:
                (storage.remove_tree if entry.is_dir else storage.remove)(folder / entry.name)
        storage.remove_tree(folder)


def _require_equal(before: bytes, now: bytes, root: Location) -> None:
    """Raise UserError, which names the difference, where two fingerprints of plans are not of one build."""
    try:
        old, new = _by_words(before), _by_words(now)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{root / BUILD_FOLDER / PLAN_FILE}: damaged ({error}); delete {root}; build again") from error
    if before == now:
        return
    text, remedy = "of another version of Penstock", "end it with that version"
    if old["format"] == new["format"]:
        differing = differences(old, new) or ["the names of its raw images"]
        more = f" and {len(differing) - 4:,} more" * (len(differing) > 4)
        text, remedy = f"that differs in {', '.join(differing[:4])}{more}", "run that one again"
    raise UserError(f"{root}: holds an unfinished build {text}; {remedy}, or delete {root} and build again")


def _by_words(fingerprint: bytes) -> dict[str, Any]:
    """Return what a fingerprint holds by the user's words for it, but for the names of the raw images."""
    body = json.loads(fingerprint)
    images = {f"raw images of {split}": count for split, count in body["images"].items()}
    names = ((record["label"], dict.fromkeys((record["wnid"], record["words"]))) for record in body["classes"])
    classes = {f"label {label}": " ".join(words) for label, words in names}
    of = {"the statistics of --classes-of": body.get("statistics", "none")[:12]}
    return {"format": body.get("format", 1), **body["recipe"], **body["codecs"], **images, **classes, **of}

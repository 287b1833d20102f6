"""The claim on a dataset directory: it is empty, or holds an unfinished run of this very build, and of no other."""

import errno
import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pipeline import manifest
from pipeline.errors import UserError
from pipeline.files import write_bytes_aside
from pipeline.offline.plan import Plan
from pipeline.offline.records import BUILD_FOLDER

PLAN_FILE = "plan.json"
PATIENCE = 5.0  # seconds that a part waits for another one to sweep


class BuildError(UserError):
    """A build that cannot begin, or cannot end."""


@contextmanager
def claimed(plan: Plan, root: Path, *, alone: bool) -> Iterator[bool]:
    """Claim `root` for this plan; and for this process, or for the parts of a build that several jobs share.

    `root` must be empty or absent, or left by an interrupted run of the very same build. Yields whether that run had
    finished but for the deletion of its state, which is deleted at the end of a build that has its manifest. However
    the block ends, no half-written file stays, unless another part may be writing it.

    Raises:
        BuildError: one line on what is in the way, or that the disk is full.
    """
    folder = root / BUILD_FOLDER
    _require_free(root)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        _lock(lock, root, alone=alone)
        _require_free(root)  # again: a build that ended since then took its lock file with it
        try:
            _require_same_plan(plan, root, folder)
            _sweep_if_alone(lock, plan, root)
            _lock(lock, root, alone=alone)
            yield (root / manifest.FILE_NAME).exists()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                what = "what is finished stays; make room, and the same command goes on"
                raise BuildError(f"{root}: {error.strerror}; {what}") from error
            raise
        finally:
            _sweep_if_alone(lock, plan, root)
        if (root / manifest.FILE_NAME).exists():
            for entry in folder.iterdir():  # the plan last: until then the same command still ends this build
                if entry.name != PLAN_FILE:
                    entry.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)  # another process may be about to see that nothing is to do


def _require_free(root: Path) -> None:
    """Raises BuildError where `root` holds anything but an unfinished build."""
    folder = root / BUILD_FOLDER
    unfinished = (folder / PLAN_FILE).exists()
    if (root / manifest.FILE_NAME).exists() and not unfinished:
        shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed in the moment after its end
        raise BuildError(f"{root}: a finished dataset is there already; delete it or name another DATASET")
    others = root.exists() and (not root.is_dir() or any(entry.name != BUILD_FOLDER for entry in root.iterdir()))
    if others and not unfinished:
        raise BuildError(f"{root}: exists and is not an unfinished build; delete it or name another DATASET")


def _lock(lock: IO[str], root: Path, *, alone: bool) -> None:
    """Take the lock, shared with other parts unless `alone`; a part waits while another one sweeps."""
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
    # not those of listings, which are written without the lock
    ours += [f"{BUILD_FOLDER}/{name}*.tmp" for name in ("*.npz", "*.tar", PLAN_FILE)]
    for pattern in ours:
        for path in root.glob(pattern):
            path.unlink(missing_ok=True)


def _require_same_plan(plan: Plan, root: Path, folder: Path) -> None:
    state, fingerprint = folder / PLAN_FILE, plan.fingerprint()
    with open(folder / "beginning", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of parts that begin at the same moment, one writes the plan
        if not state.exists():
            write_bytes_aside(state, fingerprint)
    require_equal(state.read_bytes(), fingerprint, root)


def require_equal(before: bytes, now: bytes, root: Path) -> None:
    """Raises BuildError, which names the difference, where two fingerprints of plans are not of one build."""
    state = root / BUILD_FOLDER / PLAN_FILE
    try:
        differing = _differences(json.loads(before), json.loads(now))
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise BuildError(f"{state}: damaged ({error}); delete {root} and build again") from error
    if differing:
        raise BuildError(
            f"{root}: holds an unfinished build that differs in {', '.join(differing)}; "
            f"run that one again, or delete {root}"
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, as the user would say it."""
    told = []
    for part in ("recipe", "codecs", "images"):
        old, new = before[part], now[part]
        what = {"images": "raw images of "}.get(part, "")
        told += [
            f"{what}{key} {old.get(key)} → {new.get(key)}" for key in {**new, **old} if old.get(key) != new.get(key)
        ]
    if before["classes"] != now["classes"]:
        told.append(f"the classes ({_first_difference(before['classes'], now['classes'])})")
    if not told and before["images_sha256"] != now["images_sha256"]:
        told.append("the names of its raw images")
    return told


def _first_difference(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """`1000 → 999 of them`, or the first that differs, by its wnid and words."""
    if len(before) != len(now):
        return f"{len(before):,} → {len(now):,} of them"
    old, new = next((old, new) for old, new in zip(before, now) if old != new)
    differing = [key for key in new if old[key] != new[key]]
    return f"label {old['label']}: " + ", ".join(f"{key} {old[key]} → {new[key]}" for key in differing)

"""The claim on a dataset directory: it is empty, or holds an unfinished run of this very build, and of no other."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import manifest
from pipeline.errors import UserError
from pipeline.files import write_bytes_aside
from pipeline.offline.plan import Plan
from pipeline.offline.records import BUILD_FOLDER

PLAN_FILE = "plan.json"


class BuildError(UserError):
    """A build that cannot begin, or cannot end."""


@contextmanager
def claimed(plan: Plan, root: Path, *, alone: bool) -> Iterator[bool]:
    """Claim `root` for this plan; and for this process, or for the parts of a build that several jobs share.

    `root` must be empty or absent, or left by an interrupted run of the very same build. Yields whether that run had
    finished but for the deletion of its state, which is deleted at the end of a build that has its manifest.

    Raises:
        BuildError: one line on what is in the way.
    """
    folder = root / BUILD_FOLDER
    done = (root / manifest.FILE_NAME).exists()
    if done and not folder.exists():
        raise BuildError(f"{root}: a finished dataset is there already; delete it or name another DATASET")
    others = root.exists() and (not root.is_dir() or any(entry.name != BUILD_FOLDER for entry in root.iterdir()))
    if others and not (folder / PLAN_FILE).exists():
        raise BuildError(f"{root}: exists and is not an unfinished build; delete it or name another DATASET")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildError(f"{root}: another build is writing there; wait for it, or stop it") from error
        _require_same_plan(plan, root, folder / PLAN_FILE)
        if alone:
            _sweep(plan, root)
        yield done
        if (root / manifest.FILE_NAME).exists():
            _sweep(plan, root)
            for entry in folder.iterdir():  # the plan last: until then the same command still ends this build
                if entry.name != PLAN_FILE:
                    entry.unlink()
            shutil.rmtree(folder)


def _sweep(plan: Plan, root: Path) -> None:
    """Delete what killed writers left half-written."""
    for folder in (root, root / BUILD_FOLDER, *(root / split for split in plan.splits)):
        for path in folder.glob("*.tmp"):
            path.unlink()


def _require_same_plan(plan: Plan, root: Path, state: Path) -> None:
    fingerprint = plan.fingerprint()
    if not state.exists():
        write_bytes_aside(state, fingerprint)
    try:
        before, now = json.loads(state.read_bytes()), json.loads(fingerprint)
        differing = _differences(before, now)
    except (ValueError, AttributeError, KeyError) as error:
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
        told.append("the classes")
    if not told and before["images_sha256"] != now["images_sha256"]:
        told.append("the names of its raw images")
    return told

"""The claim on a dataset directory in an object store: as `claim`, by one object that only one build can put there."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline import manifest, storage
from pipeline.files import sweep
from pipeline.offline.claim import PLAN_FILE, BuildError, require_equal
from pipeline.offline.plan import Plan
from pipeline.offline.shards import BUILD_FOLDER
from pipeline.storage import Location


@contextmanager
def claimed_remotely(plan: Plan, root: Location, *, alone: bool) -> Iterator[bool]:
    """Claim `root` for this plan. Stores have no locks: two runs of the very same build may meet, and put equal bytes.

    Raises:
        BuildError: `root` holds something else, or another build.
    """
    folder = root / BUILD_FOLDER
    _require_free(root)
    fingerprint = plan.fingerprint()
    require_equal(storage.put_if_absent(folder / PLAN_FILE, fingerprint), fingerprint, root)
    if alone:
        sweep(root)  # uploads without an end are invisible, and are paid for
    yield storage.exists(root / manifest.FILE_NAME)
    if storage.exists(root / manifest.FILE_NAME):
        for entry in storage.scan(folder):  # the plan last: until then the same command still ends this build
            if entry.name != PLAN_FILE:
                storage.remove(folder / entry.name)
        storage.remove_tree(folder)


def _require_free(root: Location) -> None:
    try:
        names = {entry.name for entry in storage.scan(root)}
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise BuildError(f"{root}: is an object, not a folder; name another DATASET") from error
    unfinished = storage.exists(root / BUILD_FOLDER / PLAN_FILE)
    if manifest.FILE_NAME in names and not unfinished:
        raise BuildError(f"{root}: a finished dataset is there already; delete it or name another DATASET")
    if names - {BUILD_FOLDER} and not unfinished:
        raise BuildError(f"{root}: exists and is not an unfinished build; delete it or name another DATASET")

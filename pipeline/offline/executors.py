"""Who runs the shard tasks: this process, or a pool of processes."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from pipeline.errors import UserError
from pipeline.offline.shards import ShardResult, ShardTask, write_shard

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run(tasks: Sequence[ShardTask], workers: int) -> Iterator[ShardResult]:
    """Yield each task's result as it is finished, in any order.

    Raises:
        UserError: a worker was killed; what is finished stays, and the same command resumes.
    """
    if workers <= 1 or len(tasks) <= 1:
        yield from map(write_shard, tasks)
        return
    context = multiprocessing.get_context("spawn")  # no lock of ours or of a library is copied into the children
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=begin_worker)
    try:
        futures = [pool.submit(write_shard, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory; the finished shards stay, "
            "and the same command resumes (with fewer --workers, if memory was short)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def begin_worker() -> None:
    """Leave Ctrl-C to the parent, and die with it: an orphan would write where the next run writes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before the line above
        os._exit(1)

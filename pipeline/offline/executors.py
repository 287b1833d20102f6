"""Who runs the tasks: this process, or a pool of processes."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from pipeline import UserError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SIGNALS = (signal.SIGINT, signal.SIGTERM)

Task = TypeVar("Task")
Result = TypeVar("Result")


def run(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Yield the result of each task as it is finished, in any order; two tasks a worker are made ahead.

    Where the caller stops, or a task raises, the workers are killed: what they write appears whole or not at all.

    Raises:
        UserError: a worker was killed; what is finished stays.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # no lock of ours or of a library is copied into the children
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, initializer=begin_worker)
    waiting, running, ended = iter(tasks), set[Future[Result]](), False
    try:
        while True:
            for task in islice(waiting, 2 * workers - len(running)):
                with _signals_wait():
                    running.add(pool.submit(function, task))
            if not running:
                ended = True
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended before its task: for the reason above if there is one, else it was killed, perhaps "
            "for lack of memory; what is finished stays, and the same command goes on (fewer --workers: less memory)"
        ) from error
    finally:
        if not ended:
            for worker in set(multiprocessing.active_children()) - before:
                worker.kill()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold back Ctrl-C, which a terminal sends to all, and SIGTERM: both would strike a worker that is half begun."""
    came: list[int] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # which a worker inherits, until `begin_worker`
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in SIGNALS if main}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for held in came:  # by a thread of a library, which no mask of ours reaches
            signal.raise_signal(held)


def begin_worker() -> None:
    """Leave Ctrl-C to the parent, and die with it: an orphan would write where the next run writes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before the line above
        os._exit(1)

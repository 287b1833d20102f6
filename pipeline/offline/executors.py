"""Run the tasks of a build: in this process, in a pool of processes, or on a Ray cluster."""

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from types import ModuleType
from typing import Any, TypeVar

from pipeline import UserError, cluster, process
from pipeline.storage import Location, exists

RETRIES = 5  # of one Ray task, whose worker or node died
WAKES = 0.5  # seconds between two looks at signals and at the cluster, if no Ray task ends

Task = TypeVar("Task")
Result = TypeVar("Result")


def run(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Yield the result of each task as it is finished, in any order; two tasks a worker are made ahead.

    Where the caller stops, or a task raises, the workers are killed: what they write appears whole or not at all.
    Raises UserError where a worker was killed, and whatever a task raises.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")  # no lock of ours or of a library is copied into the children
    before = set(multiprocessing.active_children())
    with _workers_begin():
        pool = ProcessPoolExecutor(workers, context, initializer=begin_worker)
    waiting, running = iter(tasks), set[Future[Result]]()
    try:
        while True:
            for task in islice(waiting, 2 * workers - len(running)):
                with _workers_begin():
                    running.add(pool.submit(function, task))
            if not running:
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
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _workers_begin() -> Iterator[None]:
    """Hold back signals, which would strike a worker that is half begun; explain why it cannot begin."""
    try:
        with process.signals_held():
            yield
    except OSError as error:
        problem, remedy = "/dev/shm, for locks of workers", "make room there (docker run --shm-size 64m)"
        if error.errno in (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            problem, remedy = "a worker cannot begin", "raise the limit (ulimit -a)"
        raise UserError(f"{problem}: {error.strerror}; {remedy}, or take --workers 1") from error


def begin_worker() -> None:
    """Leave a terminal's signals to the parent, and die with it: an orphan would write where the next run writes."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, process.NUMBERS)
    parent = multiprocessing.parent_process()
    process.end_with_parent(signal.SIGKILL, parent.pid if parent and parent.pid else os.getppid())


def run_on_ray(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    address: str | None = None,
    at_once: int | None = None,
    shared: Sequence[Location] = (),
) -> Iterator[Result]:
    """Yield the result of each task as it is finished, in any order, as `run` does. A task has one core.

    Where the caller stops, or a task raises, this process leaves the cluster, and Ray ends its workers. (`ray.cancel`
    would be gentler, but Ray 2.60 aborts this process where a task ends in the same moment.) Tasks of a lost node run
    again elsewhere. One that is only cut off may write a shard that its successor writes too: the same bytes, aside.

    Args:
        address: HOST:PORT of the cluster's head; "auto" or None: RAY_ADDRESS, else the cluster of this machine.
        at_once: how many tasks run at a time, at most; None: one on each CPU of the cluster.
        shared: paths that every node must see.
    Raises:
        UserError: Ray is missing or cannot be reached, a node does not see `shared`, or a task was lost too often;
            and whatever a task raises, with the name of its node. What is finished stays.
    """
    with cluster.connected(address) as ray:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_on_node)
        waiting, running, results = iter(tasks), dict[Any, str](), list[Result]()
        while True:
            with process.signals_held():  # Ray's threads swallow exceptions, so none is raised in its code
                # two tasks for each CPU, so that none waits for us; a cluster that grows on demand must see one
                room = at_once or max(1, 2 * int(ray.cluster_resources().get("CPU", 0)))
                for task in islice(waiting, max(0, room - len(running))):
                    running[remote.remote(function, shared, task)] = getattr(task, "name", "a task")
                done = ray.wait(list(running), timeout=WAKES)[0] if running else []
                results = [_result(ray, reference, running.pop(reference)) for reference in done]
            yield from results
            if not running:
                return


def _on_node(function: Callable[[Task], Result], shared: Sequence[Location], task: Task) -> Result:
    """Run the task on some node, whose name its errors carry."""
    node = os.uname().nodename
    for path in shared:
        if not exists(path):  # else a node that does not share DATASET would make a DATASET of its own
            raise UserError(
                f"{path}: not there on the node {node}; RAW and DATASET must be seen under the same path on every "
                "node of the cluster: a shared file system, or s3://"
            )
    try:
        return function(task)
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(error.errno, f"{error.strerror}, on the node {node}", error.filename) from error
    except UserError as error:
        if node in str(error):
            raise
        raise type(error)(f"{error} (on the node {node})") from error


def _result(ray: ModuleType, reference: Any, name: str) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        problem = f"lost {1 + RETRIES} times with its worker or node: no memory, or one image that took too long?"
        if isinstance(error, ray.exceptions.RayTaskError):
            if not isinstance(error.cause, ray.exceptions.RayError):
                raise error.cause from error
            problem = "could not begin on its node; every node needs the same environment with penstock-imagenet[ray]"
        raise UserError(
            f"{name}: {problem} ({cluster.one_line(error)}); what is finished stays, and the same command goes on"
        ) from error

"""Reading ahead with threads: the results of many reads, in order, with few of them in memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 16  # at some 20 ms a request, 800 requests a second; s3fs needs 1 ms of one core's time for each
AHEAD_BYTES = 64 * 2**20

T = TypeVar("T")
R = TypeVar("R")


def read_ahead(
    tasks: Iterable[T],
    read: Callable[[T], R],
    threads: int = THREADS,
    size: Callable[[T], int] = lambda task: 0,
) -> Generator[tuple[T, R], None, None]:
    """Each task and `read(task)`, in the order of the tasks; up to `threads` reads run at once, ahead of the caller.

    Args:
        size: bytes that a task's result will hold. What is read and not yet taken stays within `AHEAD_BYTES`, a
            single larger result excepted, and within 2 · `threads` results.
    Raises:
        What `read` raises, at its task's place; or what `tasks` raises, at once.
    Closing the generator waits for the reads that run, starts no other, and leaves no thread.
    """
    pool = ThreadPoolExecutor(threads, "read-ahead")
    running: deque[tuple[T, int, Future[R]]] = deque()
    ahead = 0
    try:
        for task in tasks:
            cost = size(task)
            while running and (ahead + cost > AHEAD_BYTES or len(running) >= 2 * threads):
                yield running[0][0], running[0][2].result()
                ahead -= running.popleft()[1]
            running.append((task, cost, pool.submit(read, task)))
            ahead += cost
        while running:
            yield running[0][0], running[0][2].result()
            running.popleft()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

"""Who runs the tasks: a Ray cluster, or a Ray of this machine's own for as long as the build takes.

On a cluster, the command runs on one of its nodes (`ray start` gives each node a part in it), and every node needs

- the same environment: penstock-imagenet[ray], with the same versions of Python, Ray and the codecs (each task checks);
- RAW and DATASET under the same path (a shared file system), or in an object store, whose credentials are then those
  of the environment in which `ray start` was called.

A node may come or go at any time: the tasks of one that is lost run again elsewhere. (Without the head there is no
cluster: a minute after it Ray ends this process too, and the same command goes on later.) A node that is only cut off
may go on for a minute, until Ray ends it there, and write a shard that its successor writes too. Both write the same
bytes, each to a temporary file of its own, and rename it: whoever comes last changes nothing.

Each task has one core, and Ray sets OMP_NUM_THREADS to 1 for it.
"""

import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from types import FrameType, ModuleType
from typing import Any, TypeVar

from pipeline import UserError
from pipeline.storage import Location, exists

RETRIES = 5  # of one task, whose worker or node died
CONNECT = 5.0  # seconds until an address counts as wrong
WITHOUT_CPU = 300.0  # seconds until a cluster without any counts as lost; new nodes may be on their way
WAKES = 0.5  # seconds between two looks at signals and at the cluster, if no task ends
STORE = 128 * 2**20  # bytes for tasks under way, about 1 MB each; Ray spills the rest to disk

Task = TypeVar("Task")
Result = TypeVar("Result")


def run(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    address: str | None = None,
    at_once: int | None = None,
    shared: Sequence[Location] = (),
) -> Iterator[Result]:
    """Yield the result of each task as it is finished, in any order, as `executors.run` does.

    Where the caller stops, or a task raises, we leave the cluster, and Ray ends the workers of those who left: what
    they write appears whole or not at all. (`ray.cancel` would be gentler, but Ray 2.60 aborts this process where a
    task ends in the same moment.) A Ray that was started here ends here; a cluster that was joined goes on.

    Args:
        address: HOST:PORT of a cluster's head, or "auto" for RAY_ADDRESS, else for the cluster to which this machine
            belongs; None starts a Ray here.
        at_once: how many tasks run at a time, at most; None: one on each CPU of the cluster.
        shared: what every node must see under this path.
    Raises:
        UserError: Ray is missing or cannot be reached, a node does not see `shared`, or a task was lost too often;
            and whatever a task raises, with the name of its node. What is finished stays.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    with _signals_kept() as raise_kept, _connected(address, at_once) as ray:
        places = () if address is None else tuple(shared)
        yield from _results(ray, function, tasks, at_once, places, raise_kept)


def _results(
    ray: ModuleType,
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    at_once: int | None,
    places: Sequence[Location],
    raise_kept: Callable[[], None],
) -> Iterator[Result]:
    """As many tasks as may run at once are under way; without a limit two for each CPU, so that none waits for us."""
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_on_node)
    room, waiting, running = _Room(ray, at_once), iter(tasks), dict[Any, str]()
    while True:
        raise_kept()
        for task in islice(waiting, max(0, room.tasks() - len(running))):
            running[remote.remote(function, places, task)] = getattr(task, "name", "a task")
        if not running:
            return
        for reference in ray.wait(list(running), timeout=WAKES)[0]:
            yield _result(ray, reference, running.pop(reference))


class _Room:
    """How many tasks may be under way; a cluster grows and shrinks."""

    def __init__(self, ray: ModuleType, at_once: int | None) -> None:
        self._ray, self._at_once, self._seen = ray, at_once, monotonic()

    def tasks(self) -> int:
        """At least one, so that a cluster that grows on demand sees the demand.

        Raises:
            UserError: for a long time, no node had a CPU.
        """
        cpus = int(self._ray.cluster_resources().get("CPU", 0))
        if cpus:
            self._seen = monotonic()
        elif monotonic() - self._seen > WITHOUT_CPU:
            raise UserError(
                f"the Ray cluster has had no CPU for {WITHOUT_CPU:g} s; what is finished stays, and the same command "
                "goes on once there are nodes again (`ray status`)"
            )
        return self._at_once or max(1, 2 * cpus)


def _result(ray: ModuleType, reference: Any, name: str) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ray.exceptions.RayError):
            raise UserError(
                f"{name}: could not begin on its node ({_line(error)}); every node needs the same environment, with "
                "penstock-imagenet[ray] in it"
            ) from error
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise UserError(
            f"{name}: lost {1 + RETRIES} times with the worker or the node that ran it, perhaps for lack of memory, or "
            f"because one image took too long ({type(error).__name__}: {_line(error)}); what is finished stays, and "
            "the same command goes on"
        ) from error


def _on_node(function: Callable[[Task], Result], places: Sequence[Location], task: Task) -> Result:
    """The task, on some node, whose name its errors carry where there are several.

    Without the look at `places`, a node that does not share DATASET would make a DATASET of its own.
    """
    if not places:
        return function(task)
    node = os.uname().nodename
    for place in places:
        if not exists(place):
            raise UserError(
                f"{place}: not there on the node {node}; RAW and DATASET must be seen under the same path on every "
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


@contextmanager
def _connected(address: str | None, cpus: int | None) -> Iterator[ModuleType]:
    """The package ray, connected. What was started here is gone afterwards, to its last process and file."""
    with ExitStack() as stack:
        if address is None:
            ray = _imported(private=True)
            how = _here(cpus or len(os.sched_getaffinity(0)), stack)
            stack.callback(_end_the_rest, os.environ["RAY_AUTH_TOKEN"])
        else:
            _require_answer(address)
            ray = _imported(private=False)
            how = {"address": address}
        stack.callback(ray.shutdown)
        with _our_sigterm(), _told_in_a_line(ray, address):
            ray.init(**how, log_to_driver=False, logging_level="ERROR")
        yield ray


def _here(cpus: int, stack: ExitStack) -> dict[str, Any]:
    """What `ray.init` is told for a Ray of our own. Its folder is deleted when `stack` ends."""
    # Not in TMPDIR: the path of a socket has 107 bytes at most, of which Ray needs 64.
    folder = stack.enter_context(TemporaryDirectory(prefix="penstock-ray-", dir="/tmp", ignore_cleanup_errors=True))
    started = {"num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False}
    return {"address": "local", "_temp_dir": folder, **started}


def _end_the_rest(token: str) -> None:
    """Kill what `ray.shutdown` does not know of: processes that `ray.init` had begun to start when a signal came."""
    mark = f"RAY_AUTH_TOKEN={token}".encode()
    for _ in range(500):
        found = 0
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # of another user, or gone
                if int(entry.name) != os.getpid() and mark in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
                    found += 1
        if not found:
            return
        sleep(0.01)  # until they are gone; one that was about to start another may have done so


def _imported(*, private: bool) -> ModuleType:
    """The package ray; it reads its environment when it is imported.

    A private Ray listens on the loopback interface alone, and only to those who know a word: whoever can talk to it
    can run code here.
    """
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "1",
        "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # it would print each retry on stdout, between the lines of --json
        "RAY_NUM_REDIS_GET_RETRIES": "1",  # of 40 s each, where something answers at the address that is not Ray
    }
    if private:
        os.environ |= {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # without a cluster it has no address but 127.0.0.1
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
    try:
        import ray
    except ImportError as error:
        raise UserError("--executor ray needs the package ray: pip install 'penstock-imagenet[ray]'") from error
    return ray


def _require_answer(address: str) -> None:
    """Raises UserError where nothing answers at HOST:PORT, at once: Ray itself would try for many minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise UserError(
            f"--ray-address {address}: not HOST:PORT nor auto; run this command on a node of the cluster, and name "
            "the head's port, mostly 6379"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--ray-address {address}: no Ray cluster answers there ({_line(error)})") from error


@contextmanager
def _told_in_a_line(ray: ModuleType, address: str | None) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        what = "no Ray can be started here" if address is None else f"--ray-address {address}: cannot join the cluster"
        raise UserError(f"{what} ({_line(error)})") from error


@contextmanager
def _signals_kept() -> Iterator[Callable[[], None]]:
    """Keep the signals that come, and yield what raises them again: Ray's threads and callbacks swallow exceptions."""
    came: list[int] = []
    before: dict[int, Callable[[int, FrameType | None], Any]] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in handlers.items() if callable(handler)}

    def keep(number: int, frame: FrameType | None) -> None:
        came.append(number)
        before[number](number, frame)

    def raise_kept() -> None:
        if came:
            signal.raise_signal(came[0])

    for number in before:
        signal.signal(number, keep)
    try:
        yield raise_kept
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _our_sigterm() -> Iterator[None]:
    """`ray.init` sets its own handler, which would end the process without a word; put ours back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # raised by that handler
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    signal.signal(signal.SIGTERM, before)


def _line(error: BaseException) -> str:
    """An error's message, on one line of bounded length, without colours or a traceback."""
    text = " ".join(re.sub("\x1b\\[[0-9;]*m", "", str(error)).split()).partition(" traceback: ")[0]
    return text if len(text) <= 300 else f"{text[:300]} …"

"""Decoding workers on this machine, for tests: killed, stopped, and started again on the port that they had.

And batches by way of them, compared with those of the local loader, to the byte.
Most are forked from a process that has imported the worker's code once, which takes a tenth of a second each;
`command=True` starts `python -m pipeline.service feed`, as a user does.
"""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import build
from pipeline.online import Loader
from pipeline.online.batch import Batch

ROOT = Path(__file__).parent.parent
LIFETIME = 900  # seconds
SEED = 3
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "pipeline.online", "pipeline.service.worker"])


class Worker:
    """A worker for the data sets below `root`, on a free port of 127.0.0.1.

    `options` are those of `pipeline.service.worker.Worker`, or the words of the command; `token`: the text.
    """

    def __init__(self, root: object, token: str | None = None, **options: Any) -> None:
        self.root, self.token, self.options, self.port = str(root), token, options, 0
        self.begin()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def begin(self) -> None:
        """Start the process, on the same port as before."""
        self._pipe, theirs = FORKS.Pipe()
        words = (self.root, self.port, self.token, self.options, dict(os.environ), theirs)
        process = FORKS.Process(target=_serve, args=words, daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        assert process.pid
        self.pid, self._wait = process.pid, process.join

    def ready(self) -> None:
        """Wait until it answers."""
        assert self._pipe.poll(60), "no worker within a minute"
        self.port = self._pipe.recv()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process by SIGKILL, unless it has ended, also if it is stopped."""
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self._wait()
        self._pipe.close()

    def restart(self) -> None:
        """Start another one in the place of one that was killed."""
        self.begin()
        self.ready()


class Command(Worker):
    """`python -m pipeline.service feed`."""

    def begin(self) -> None:
        words = [word for name, value in self.options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        line = [sys.executable, "-m", "pipeline.service", "feed", "--root", self.root, "--port", str(self.port), *words]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            line, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True, preexec_fn=lambda: signal.alarm(LIFETIME)
        )
        self.pid, self._wait = self._process.pid, self._process.wait

    def ready(self) -> None:
        assert self._process.stdout
        line = self._process.stdout.readline()
        address = re.search(r" at grpc\S*://127\.0\.0\.1:(\d+) \(pid \d+\)$", line.rstrip())
        assert address, line + self._process.stdout.read()
        self.port = int(address[1])

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def started(root: object, count: int = 1, *, command: bool = False, **options: Any) -> Iterator[list[Worker]]:
    """Start so many workers, which end with the context."""
    kind: Callable[..., Worker] = Command if command else Worker
    workers: list[Worker] = []
    try:
        for _ in range(count):
            workers.append(kind(root, **options))
        for worker in workers:
            worker.ready()
        yield workers
    finally:
        for worker in workers:
            worker.kill()


def addresses(workers: Sequence[Worker]) -> list[str]:
    """Return the texts for `Loader(workers=…)`."""
    return [worker.address for worker in workers]


def _serve(root: str, port: int, token: str | None, options: Any, variables: dict[str, str], pipe: Connection) -> None:
    """Serve until the process at the other end of the pipe ends, or closes it."""
    signal.alarm(LIFETIME)
    os.environ |= variables  # the process that forks has those of the first test
    from pipeline.service.worker import Server
    from pipeline.service.worker import Worker as Decoding

    with Server(Decoding(root, **options), f"grpc://127.0.0.1:{port}", token=token) as server:
        pipe.send(server.port)
        with suppress(EOFError, OSError):
            pipe.recv()
        os._exit(0)


def without_shards(data: Path, to: Path) -> Path:
    """Copy data sets but for their shards, as a host has them that only trains: all that comes is of workers."""
    return Path(shutil.copytree(data, to, ignore=shutil.ignore_patterns("*.tar", "*.idx"), dirs_exist_ok=True))


@pytest.fixture(scope="module", name="served")
def two_data_sets(raw: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two data sets: `dataset`, and `whole` pictures. Read only."""
    root = tmp_path_factory.mktemp("served")
    shutil.copytree(dataset, root / "dataset")
    done = build(raw, root / "whole", "--crop", "none", "--workers", 1, "--samples-per-shard", 16)
    assert done.exit_code == 0, done.output
    return root


@pytest.fixture(scope="module", name="alone")
def two_without_shards(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without_shards(served, tmp_path_factory.mktemp("alone") / "data")


@pytest.fixture(scope="module", name="crew")
def three_workers(served: Path) -> Iterator[list[Worker]]:
    """Three workers. Not to be harmed."""
    with started(served, 3) as workers:
        yield workers


def loader(data: Path, **options: Any) -> Loader:
    """Return a loader of small batches."""
    return Loader(data, **{"batch_size": 8, "seed": SEED, "threads": 2} | options)


def taken(data: Path, steps: int = 14, **options: Any) -> list[Batch]:
    """Return the batches of so many steps, of 41 samples two epochs and a bit; fewer where the loader ends."""
    with loader(data, **options) as batches:
        return list(islice(batches, steps))


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    """Check the bytes of all that a consumer sees, and how they lie in memory."""
    assert len(one) == len(other) > 0
    for local, fed in zip(one, other):
        for name in ("step", "epoch", "position", "global_size"):
            assert getattr(local, name) == getattr(fed, name), name
        assert fed.ids.dtype == local.ids.dtype
        assert fed.ids.tolist() == local.ids.tolist()
        for own, theirs in zip((local.labels, *local.replicas), (fed.labels, *fed.replicas), strict=True):
            assert (theirs.dtype, theirs.shape) == (own.dtype, own.shape)
            assert not own.numel() or theirs.stride() == own.stride()  # nothing lies anywhere
            assert theirs.device == own.device
            assert torch.equal(theirs, own)

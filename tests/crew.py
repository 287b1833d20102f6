"""Processes in place of torchrun's, kept for many short jobs: each imports the trainer once."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

if TYPE_CHECKING:
    from pipeline.online.batch import Batch

ADDRESS, ROOT = "127.0.0.1", Path(__file__).parent.parent


class Ended(NamedTuple):
    """The end of a command in one process."""

    exit_code: int
    output: str


class Crew:
    """Runs `python -m trainer` commands in up to `size` processes of one job."""

    def __init__(self, size: int) -> None:
        line, pipe = [sys.executable, __file__], subprocess.PIPE
        self._workers = [subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True) for _ in range(size)]

    def run(self, *commands: Sequence[object], double: bool = False) -> list[Ended]:
        """Run each command line in a process of its own, all of one job; at most as many as there are processes.

        `double`: weights, images and masks of training are float64; so are its checkpoints, which no command reads.
        """
        workers = self._workers[: len(commands)]
        for worker, command, variables in zip(workers, commands, environments(len(commands))):
            assert worker.stdin
            worker.stdin.write(json.dumps([variables, [str(word) for word in command], double]) + "\n")
            worker.stdin.flush()
        return [Ended(*json.loads(worker.stdout.readline())) for worker in workers if worker.stdout]

    def end(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.communicate()


def environments(count: int) -> list[dict[str, str]]:
    """Return the variables that torchrun sets for each of so many processes on this machine."""
    with socket.socket() as free:
        free.bind((ADDRESS, 0))
        address = {"MASTER_ADDR": ADDRESS, "MASTER_PORT": str(free.getsockname()[1])}
    common = {**address, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **common} for rank in range(count)]


def launched(count: int, words: Sequence[object]) -> list[subprocess.Popen[str]]:
    """Start `python -m trainer` in so many processes, without torchrun."""
    command, pipe = [sys.executable, "-m", "trainer", *map(str, words)], subprocess.PIPE
    return [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=pipe, stderr=pipe, text=True)
        for variables in environments(count)
    ]


def machines(count: int, words: list[str]) -> list[subprocess.Popen[str]]:
    """Start a torchrun of one process for each of so many machines, all of which are this one."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(count), "--nproc-per-node", "1"]
    variables = environments(count)[0]
    where = ["--master-addr", variables["MASTER_ADDR"], "--master-port", variables["MASTER_PORT"]]
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            [*start, *where, "--node-rank", str(i), "-m", "trainer", *words],
            cwd=ROOT,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
        )
        for i in range(count)
    ]


def until(seen: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Return once `seen()`; fail where the process ends before, or after two minutes."""
    deadline = time.monotonic() + 120
    while not seen():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def in_float64() -> Iterator[None]:
    """Make networks and images double; masks have the type of what they multiply."""
    from pipeline.online import Loader
    from trainer.parallel import TwoColumnNet

    def images(loader: Loader) -> "Batch":
        batch = prepared(loader)
        batch.replicas = tuple(images.double() for images in batch.replicas)
        return batch

    prepared = Loader.__next__
    network = mock.patch("trainer.train.TwoColumnNet", lambda *arguments: TwoColumnNet(*arguments).double())
    with network, mock.patch.object(Loader, "__next__", images):
        yield


def main() -> None:
    import torch
    from click.testing import CliRunner

    from trainer.__main__ import main as trainer
    from trainer.figures import page

    torch.set_num_threads(1)
    page.draw = lambda *_: ([], ["not drawn here"])  # type: ignore[attr-defined]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else a library prints goes to stderr
    for line in sys.stdin:
        variables, words, double = json.loads(line)
        os.environ |= variables
        with in_float64() if double else nullcontext():
            result = CliRunner().invoke(trainer, words)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        print(json.dumps([result.exit_code, result.output]), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""Processes that stand for those of torchrun, kept for many short jobs: each imports the trainer once."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ADDRESS, ROOT = "127.0.0.1", Path(__file__).parent.parent


class Ended(NamedTuple):
    """How a command ended in one process."""

    exit_code: int
    output: str


class Crew:
    """Runs `python -m trainer` commands in up to `size` processes of one job."""

    def __init__(self, size: int) -> None:
        line, pipe = [sys.executable, __file__], subprocess.PIPE
        self._workers = [subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True) for _ in range(size)]

    def run(self, *commands: Sequence[object]) -> list[Ended]:
        """Each command line in a process of its own, all of one job; at most as many as there are processes."""
        workers = self._workers[: len(commands)]
        for worker, command, variables in zip(workers, commands, environments(len(commands))):
            assert worker.stdin
            worker.stdin.write(json.dumps([variables, [str(word) for word in command]]) + "\n")
            worker.stdin.flush()
        return [Ended(*json.loads(worker.stdout.readline())) for worker in workers if worker.stdout]

    def end(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.communicate()


def environments(count: int) -> list[dict[str, str]]:
    """What torchrun tells each process of a job of so many on this machine."""
    with socket.socket() as free:
        free.bind((ADDRESS, 0))
        place = {"MASTER_ADDR": ADDRESS, "MASTER_PORT": free.getsockname()[1]}
    counts = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return [
        {key: str(value) for key, value in {"RANK": rank, "LOCAL_RANK": rank, **counts, **place}.items()}
        for rank in range(count)
    ]


def machines(count: int, words: list[str]) -> list[subprocess.Popen[str]]:
    """A torchrun for each of so many machines, all of which this one is; of one process each, in one group."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(count), "--nproc-per-node", "1"]
    place = environments(count)[0]
    where = ["--master-addr", place["MASTER_ADDR"], "--master-port", place["MASTER_PORT"]]
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


def main() -> None:
    import torch
    from click.testing import CliRunner

    from trainer.__main__ import main as trainer
    from trainer.commands import train

    torch.set_num_threads(1)
    train.drawn = lambda *_: [Path("not drawn here")]  # type: ignore[attr-defined]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else a library prints goes to stderr
    for line in sys.stdin:
        variables, words = json.loads(line)
        os.environ |= variables
        result = CliRunner().invoke(trainer, words)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        print(json.dumps([result.exit_code, result.output]), file=answers, flush=True)


if __name__ == "__main__":
    main()

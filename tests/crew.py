"""Processes that stand for those of torchrun, kept for many short jobs: each imports the trainer once."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ADDRESS = "127.0.0.1"


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

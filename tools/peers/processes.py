"""A contestant's process: started in its own Python on as many cores as it has workers, ended where it hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import UserError
from tools.peers.environments import python_of

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE, SLOWEST = 60.0, 5.0  # seconds to start, images per second and worker: what needs longer hangs


def run_module(environment: str, module: str, words: Sequence[object], workers: int, images: int) -> dict[str, Any]:
    """The figures that a program prints as its last line, and "wall", seconds to its exit.

    Raises:
        UserError: as `run_program`, and where the last line is no JSON.
    """
    began = time.monotonic()
    said = run_program(environment, module, words, workers, images)
    wall = time.monotonic() - began
    try:
        figures: dict[str, Any] = json.loads(said.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise UserError(f"printed no figures, but: {said[-200:]!r}") from error
    return figures | {"wall": wall}


def run_program(environment: str, module: str, words: Sequence[object], workers: int, images: int) -> str:
    """What the program tools/peers/MODULE prints.

    Raises:
        UserError: it is not installed, fails, or needs too long for `images` pictures.
    """
    command = _command(environment, module, words)
    with _cores(workers):
        return _output(command, PATIENCE + images / SLOWEST / workers)


def _command(environment: str, module: str, words: Sequence[object]) -> list[str]:
    """Raises UserError where the environment is not installed."""
    return [str(python_of(environment)), "-P", "-m", f"tools.peers.{module}", *map(str, words)]


def _output(command: list[str], seconds: float) -> str:
    """What a command prints. In a session of its own, so that a peer that hangs is ended with all its processes."""
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise UserError(f"hangs: not done after {seconds:,.0f} s") from error
    if process.returncode:
        print(err[-4000:], file=sys.stderr)  # the table holds only its last line
        last = (err.strip() or "nothing on stderr").splitlines()[-1]
        raise UserError(f"failed ({process.returncode}): {last}")
    return out


@contextmanager
def _cores(number: int) -> Iterator[None]:
    """As many cores as workers, for what is started meanwhile: nobody gains from threads beside the workers."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[-number:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)

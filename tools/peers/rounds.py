"""Rounds: every contestant once, with each number of workers, then all of them again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from tools.peers.contestants import Contestant
from tools.peers.environments import python_of
from tools.peers.pictures import Pictures

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE, SLOWEST = 60.0, 5.0  # seconds to start, images per second and worker: what needs longer hangs


@dataclass
class Entry:
    """A contestant with so many workers: its runs so far, or why it is not run."""

    contestant: Contestant
    workers: int
    per_shard: int
    runs: list[dict[str, Any]] = field(default_factory=list)  # job.report's keys, "wall" (seconds), "stored" (bytes)
    not_run: str = ""


def run_rounds(
    contestants: Sequence[Contestant],
    workers: Sequence[int],
    pictures: Pictures,
    repetitions: int,
    say: Callable[[str], None],
) -> list[Entry]:
    """Every contestant with each number of workers, `repetitions` times, interleaved."""
    per_shard = max(1, min(1000, pictures.images // (4 * max(workers))))  # four shards or more for each worker
    entries = [Entry(contestant, number, per_shard) for contestant in contestants for number in workers]
    for repetition in range(repetitions):
        for entry in entries:
            if entry.not_run:
                continue
            try:
                run = _run(entry, pictures)
            except UserError as error:
                entry.runs, entry.not_run = [], str(error)
                say(f"{entry.contestant.name}, workers {entry.workers}: not run: {error}")
                continue
            entry.runs.append(run)
            rate = run["images"] / run["seconds"]
            say(
                f"{repetition + 1}/{repetitions} {entry.contestant.name}, workers {entry.workers}: {rate:,.0f} images/s"
            )
    return entries


def _run(entry: Entry, pictures: Pictures) -> dict[str, Any]:
    """One run in a fresh folder, that is deleted. Raises UserError where it does not end well."""
    out = pictures.folder.parent / "out"
    command = _command(entry, pictures.folder, out)
    os.sync()  # what the one before wrote is not written back on this one's time
    try:
        began = time.monotonic()
        with _cores(entry.workers):
            said = _output(command, PATIENCE + pictures.images / SLOWEST / entry.workers)
        wall = time.monotonic() - began
        run: dict[str, Any] = json.loads(said.splitlines()[-1])
        if run["images"] != pictures.images:
            raise UserError(f"stored {run['images']:,} of {pictures.images:,} pictures")
        stored = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return run | {"wall": wall, "stored": stored}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _command(entry: Entry, folder: Path, out: Path) -> list[str]:
    """Raises UserError where the contestant is not installed."""
    python = str(python_of(entry.contestant))
    job = [str(word) for word in (folder, out, entry.workers, entry.per_shard)]
    return [python, "-P", "-m", f"tools.peers.{entry.contestant.module}", *job, *entry.contestant.arguments]


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

"""Train the runs of an experiment, a few at a time; one that is there already goes on, or stays as it is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import UserError, process
from pipeline.manifest import Manifest
from trainer import checkpoint as checkpoints
from trainer import metrics
from trainer import recipe as recipes
from trainer.reproduce.experiment import Run

POLL = 0.5  # seconds between two looks at the runs
SAVED = 128 + signal.SIGTERM  # exit code of a run that was asked to end
DIVERGED = "training has diverged"  # in the last line of such a run's log
TAIL = 4096  # bytes, at the end of a log, that its last line is in

Line = dict[str, Any]  # of training, in metrics.jsonl
Show = Callable[[str, int, int], None]  # as `cli.progress_bars` yields it
Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """A run that has come as far as it should, with its lines of training up to its last step."""

    run: Run
    lines: tuple[Line, ...]
    diverged: bool


def train(runs: Sequence[Run], dataset: Manifest, jobs: int, device: str | None, show: Show, say: Say) -> list[Outcome]:
    """Train runs, `jobs` at a time, and return their outcomes in the order of the runs.

    A run that is there goes on from its newest checkpoint; one that is done is left alone, and so is one that diverged.
    An interruption asks those that train to save and end, and waits for that.

    Args:
        device: of every column, such as cuda:0; None: as `train` chooses.
        show, say: for bars, and for a line on each run that ends.
    Raises:
        UserError: a folder holds a run of another recipe or data set; a run failed, and its log has the reason.
    """
    for run in runs:
        _require_own(run, dataset)
    waiting, going, asked = list(runs), dict[Run, subprocess.Popen[bytes]](), set[Run]()
    try:
        while waiting or going:
            while waiting and len(going) < jobs:
                if not done(run := waiting.pop(0)):
                    going[run] = _started(run, dataset, jobs, device)
            for run, child in list(going.items()):
                ended, lines = child.poll() is not None, _lines(run)
                show(run.name, lines[-1]["step"] if lines else 0, run.steps)
                if ended:
                    del going[run]
                    _require_success(run, child.returncode)
                    say(f"{run.name}: {lines[-1]['step'] if lines else 0:,} steps{', diverged' * _diverged(run)}")
                elif run not in asked and run.by_log and _reached(run, lines):
                    child.terminate()  # once: a second signal would not wait until the run is saved
                    asked.add(run)
            time.sleep(POLL if going else 0)
    finally:
        for run in going.keys() - asked:
            going[run].terminate()
        for child in going.values():
            child.wait()
    return [Outcome(run, tuple(_lines(run)), _diverged(run)) for run in runs]


def log_file(run: Run) -> Path:
    """Return the file of what a run prints."""
    return run.folder.with_name(f"{run.name}.log")


def _started(run: Run, dataset: Manifest, jobs: int, device: str | None) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "penstock", "train", "--data", str(dataset.root), "--out", str(run.folder)]
    command += ["--no-page"]
    if checkpoints.files(run.folder):
        command += ["--resume"]
    else:
        command += ["--recipe", run.recipe, *(word for setting in run.settings for word in ("--set", setting))]
    if device:
        command += ["--devices", ",".join([device] * run.loaded().model.columns)]
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ} if jobs > 1 else None
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with log_file(run).open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C comes to us alone, and each run gets one signal, of ours
            preexec_fn=partial(process.end_with_parent, signal.SIGTERM, os.getpid()),
        )


def _lines(run: Run) -> list[Line]:
    """Return the lines of training up to the run's last step, or up to the first that reaches `until`."""
    lines: list[Line] = []
    for line in metrics.read(run.folder):
        if line["kind"] == "train" and line["step"] <= run.steps and not _low(run, lines):
            lines.append(line)  # those that it trained before its end was seen would depend on the machine's speed
    return lines


def _low(run: Run, lines: Sequence[Line]) -> bool:
    """Return True if the last line's training error is as low as `until`."""
    return run.until is not None and bool(lines) and lines[-1]["top1_error"] <= run.until


def _reached(run: Run, lines: Sequence[Line]) -> bool:
    """Return True if the log has all that is wanted of it."""
    return _low(run, lines) or (bool(lines) and lines[-1]["step"] == run.steps)


def done(run: Run) -> bool:
    saved = run.by_log or checkpoints.newest_step(run.folder) == run.steps
    return _diverged(run) or (saved and _reached(run, _lines(run)))


def _diverged(run: Run) -> bool:
    return DIVERGED in _last_words(run)


def _last_words(run: Run) -> str:
    """Return the last line that a run printed."""
    if not log_file(run).exists():
        return ""
    with log_file(run).open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL))
        return (log.read().decode(errors="replace").strip().splitlines() or [""])[-1]


def _require_own(run: Run, dataset: Manifest) -> None:
    """Raise UserError if the folder holds a run of another recipe or data set."""
    if not checkpoints.files(run.folder):
        return
    checkpoint = checkpoints.load(run.folder)
    checkpoints.require_same_data(checkpoint, dataset.identity, run.folder, ", or another --out")
    for key, (old, new) in recipes.difference(checkpoint.recipe, run.loaded()).items():
        raise UserError(f"{run.folder}: holds a run with {key} = {old}, not {new}; name another --out")


def _require_success(run: Run, code: int) -> None:
    """Raise UserError unless a run ended well, or diverged, which is an outcome."""
    if code == 0 or _diverged(run) or (code == SAVED and run.by_log and _reached(run, _lines(run))):
        return
    words = _last_words(run).removeprefix("Error: ") if code > 0 else ""
    reason = words or (f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}")
    raise UserError(f"{run.folder}: {reason} ({log_file(run)}); the same command goes on")

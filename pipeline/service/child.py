"""A job's command as a child process that outlives the server: begun, recognised by its successor, and ended.

Each command runs under a small process of this module, the wrapper, which leads a session of its own, holds the lock of
the job's folder while it lives, and leaves the command's exit code in a file. It imports the standard library alone.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

MARK = "PENSTOCK_JOB"  # environment variable of all processes of a job; its value is the job's folder
LOG, LOCK, PROCESS = "log", "lock", "process"
CANNOT_RUN = 126  # exit code, as a shell's
ENDING = 5.0  # seconds for a killed process to give back its files, after it has gone from sight


class Process(NamedTuple):
    """A process, told from a later one of the same pid by the time of its start."""

    pid: int
    started: int  # clock ticks since the machine's start

    def is_alive(self) -> bool:
        return _stat(self.pid) == (self.started, True)

    def signal(self, number: int) -> None:
        """Send a signal to all processes of the group that this one leads."""
        if self.is_alive():
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:  # it has just ended
                return


def start(folder: Path, attempt: int, command: list[str], environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start a command under its wrapper, with `folder` as its working directory, and return the wrapper.

    Raises OSError: a wrapper of the job is alive, or no process, or no file, can be made.
    """
    with open(folder / LOCK, "ab") as lock, open(folder / LOG, "a+b") as log:
        _take(lock)  # which the wrapper inherits: there is no moment without it
        if log.tell() and os.pread(log.fileno(), 1, log.tell() - 1) != b"\n":  # the last line of a killed command
            log.write(b"\n")
        begin = {"event": "begin", "attempt": attempt, "time": time.time(), "command": command[1:]}
        log.write(json.dumps(begin).encode() + b"\n")
        log.flush()
        words = [sys.executable, "-m", __name__, str(attempt), str(lock.fileno()), *command]
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=_environment() | environment | {MARK: str(folder)},
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )


def _take(lock: IO[bytes]) -> None:
    """Lock a file. Raises BlockingIOError: another process keeps it, and is not about to end."""
    until = time.monotonic() + ENDING
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def running(folder: Path) -> Process | None:
    """Return the wrapper that runs in a job's folder, whoever has begun it; None where none does."""
    try:
        with open(folder / LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        pass
    for _ in range(100):  # a wrapper that has just begun
        try:
            process = Process(*json.loads((folder / PROCESS).read_bytes()))
        except FileNotFoundError:
            process = Process(0, 0)
        if process.is_alive():
            return process
        time.sleep(0.05)
    return None


def exit_code(folder: Path, attempt: int) -> int | None:
    """Return the exit code of an attempt, 128 + n after a signal; None where it has left none."""
    try:
        return int((folder / f"exit-{attempt}").read_bytes())
    except FileNotFoundError:
        return None


def end_all(folder: Path) -> list[int]:
    """Kill every process of a job, of whatever group, and return their pids."""
    ended: list[int] = []
    mark, empty = f"{MARK}={folder}".encode(), 0
    while empty < 2:  # for a moment a process that begins another program shows no environment
        left = [pid for pid in _pids() if pid != os.getpid() and mark in _environ(pid)]
        empty = 0 if left else empty + 1
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        ended += [pid for pid in left if pid not in ended]
        time.sleep(0.01)
    return ended


def identity(pid: int) -> Process:
    """Return a process by its pid. Raises ProcessLookupError."""
    if (status := _stat(pid)) is None:
        raise ProcessLookupError(pid)
    return Process(pid, status[0])


def _stat(pid: int) -> tuple[int, bool] | None:
    """Return the time of a process's start, and whether it runs; None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            values = file.read().rpartition(b")")[2].split()  # the name before may hold anything
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(values[19]), values[0] not in (b"Z", b"X")


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _environ(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return file.read().split(b"\0")
    except OSError:  # it has ended, or is another user's
        return []


def _environment() -> dict[str, str]:
    """Return the environment of commands: they find our packages, and import nothing from the job's folder."""
    spec = find_spec("penstock")
    assert spec, "no package penstock beside ours"
    packages = str(Path(str(spec.origin)).parent.parent)
    before = os.environ.get("PYTHONPATH")
    ours = {"PYTHONPATH": f"{packages}:{before}" if before else packages, "PYTHONSAFEPATH": "1"}
    return os.environ | ours | {"PYTHONUNBUFFERED": "1"}


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f"{path.name}.tmp")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(aside, path)


def main(attempt: str, lock: str, *command: str) -> None:
    """Run the command in this process's folder, and leave its exit code there. `lock` is an open file, and held."""
    early: list[int] = []  # signals to the group, which the command may not have been in yet
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, frame: early.append(n))  # no SIG_IGN, which the command would inherit
    folder = Path.cwd()
    _write(folder / PROCESS, json.dumps(identity(os.getpid())))
    try:
        process = subprocess.Popen(command)
        for missed in early:
            process.send_signal(missed)
        code = process.wait()
    except OSError as error:
        print(f"Error: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        code = CANNOT_RUN
    _write(folder / f"exit-{attempt}", str(code if code >= 0 else 128 - code))


if __name__ == "__main__":
    main(*sys.argv[1:])

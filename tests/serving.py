"""A server of `penstock serve` on loopback, as a process of its own, for tests of what it does over HTTP."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx

from conftest import ROOT
from pipeline.service import child

PATIENCE = 60.0  # seconds for anything that a test waits for


class Server:
    """A running server; `client` is an httpx.Client of it."""

    def __init__(self, root: Path, options: tuple[object, ...], environment: dict[str, str], errors: IO[bytes]) -> None:
        self.root, self._options, self._environment, self._errors = root, options, environment, errors
        self.begin()

    def begin(self, port: int = 0) -> None:
        """Start the process, and wait until it serves."""
        command = [sys.executable, "-m", "penstock", "serve", "--root", self.root, "--port", port, *self._options]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | self._environment,
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        match = re.search(r" at (https?://\S+:(\d+)) ", line)
        assert match, f"no server: {line!r} {self.errors()}"
        self.url, self.port = match[1], int(match[2])
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def errors(self) -> str:
        """Return what the process has written to stderr so far."""
        self._errors.seek(0)
        return self._errors.read().decode()

    def end(self, number: int = signal.SIGTERM) -> int:
        """End the process by a signal, and return its exit code; its jobs go on."""
        self.client.close()
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE)
        assert self.process.stdout
        self.process.stdout.close()
        return code

    def again(self) -> None:
        """Kill the process, and start another one on the same folder and port."""
        self.end(signal.SIGKILL)
        self.begin(self.port)

    def submit(self, kind: str, **params: Any) -> dict[str, Any]:
        """Submit a job, which has to be accepted, and return it."""
        answer = self.client.post("/v1/jobs", json={"kind": kind, **params})
        assert answer.status_code == 201, answer.text
        return answer.json()

    def job(self, number: int) -> dict[str, Any]:
        return self.client.get(f"/v1/jobs/{number}").raise_for_status().json()

    def ended(self, number: int, seconds: float = PATIENCE) -> dict[str, Any]:
        """Return a job once it is over."""
        return self.until(lambda: job if (job := self.job(number))["ended"] else None, seconds)

    def log(self, number: int) -> str:
        return self.client.get(f"/v1/jobs/{number}/log", params={"text": True}).raise_for_status().text

    @staticmethod
    def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """Return the first value of `condition` that is true."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "waited for too long"
            time.sleep(0.05)
        return value


@contextmanager
def served(root: Path, *options: object, **environment: str) -> Iterator[Server]:
    """Yield a server of the folder `root`, started with `options`; at the end it and all its jobs are ended."""
    with tempfile.TemporaryFile() as errors:
        server = Server(root, options, environment, errors)
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.end(signal.SIGKILL)
            for folder in (root / "jobs").glob("*"):
                child.end_all(Path(os.path.realpath(folder)))

"""The driver's end of a contestant's process: it is told to take a turn, and ended whatever happens."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from pipeline import UserError
from tools.peers.processes import ROOT
from tools.peers.stepping import StepJob

PATIENCE = 1800.0  # seconds for an answer: what needs longer hangs


class Stepper:
    """A process of its own, in a session of its own: a context manager that leaves none of its processes behind."""

    def __init__(self, job: StepJob) -> None:
        self.job = job
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._unread = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tools.peers.stepping", job.to_json()],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )

    def __enter__(self) -> "Stepper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def turn(self) -> dict[str, Any]:
        """The figures of one turn. Raises UserError as `answer`."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # it has ended: `answer` says of what
            os.write(self._process.stdin.fileno(), b"\n")
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line that it says.

        Raises:
            UserError: it failed, ended or hangs.
        """
        assert self._process.stdout
        deadline, pipe = time.monotonic() + PATIENCE, self._process.stdout.fileno()
        while b"\n" not in self._unread:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise UserError(f"hangs: nothing said for {PATIENCE:,.0f} s")
            read = os.read(pipe, 65536)
            if not read:
                raise UserError(self._ended())
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise UserError(found["error"])
        return found

    def _ended(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read()[-4000:].decode(errors="replace")
        last = (said.strip() or "nothing on stderr").splitlines()[-1]
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"failed ({code}): {last[:200]}"

    def close(self) -> None:
        """End it and all its processes."""
        with suppress(ProcessLookupError):  # it has ended, and left nothing
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()
        self._process.wait()
        self._errors.close()

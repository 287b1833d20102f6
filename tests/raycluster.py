"""A Ray cluster on this machine, and builds in processes that can be watched, stopped and found again.

A test that wants the fixture `head` imports `running_head`.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT

NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="needs the package ray")
COMMAND = [sys.executable, str(ROOT / "tools/build_shards.py")]
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # as cluster.py has it
QUICK = {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1000"}  # to find a node dead


@pytest.fixture(scope="module", name="head")
def running_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Ray cluster of one node with one CPU, on the loopback interface."""
    folder = Path("/tmp") / f"ray-{secrets.token_hex(4)}"  # a socket's path is short
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (LOOPBACK | QUICK | {"RAY_TMPDIR": str(folder)}).items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        started = Cluster()
        try:
            add_node(started)
            yield started
        finally:
            started.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def add_node(started: Any) -> Any:
    return started.add_node(
        num_cpus=1, node_ip_address="127.0.0.1", object_store_memory=80 * 2**20, include_dashboard=False
    )


class Build:
    """The command in a session of its own. Whatever it starts, and that starts, carries a mark in its environment."""

    def __init__(self, *arguments: object, program: tuple[str, ...] = (), **environment: str) -> None:
        self._mark = secrets.token_hex(16)
        words = [sys.executable, *program] if program else COMMAND
        self.process = subprocess.Popen(
            [*words, *map(str, arguments)],
            env=os.environ | LOOPBACK | {"PENSTOCK_TEST_MARK": self._mark} | environment,
            cwd="/",
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(self, seconds: float = 60) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        try:
            out, errors = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, out, errors

    def alive(self) -> list[int]:
        """All its processes."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self._mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found


def until(condition: Callable[[], Any], seconds: float = 40, pause: float = 0.02) -> Any:
    """Wait for a true value, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(pause)
    return found


def dead(pid: int) -> bool:
    """Whether a process is no more, or only its parent's to bury."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def recorded(root: Path) -> set[str]:
    return {path.stem for path in (root / ".build").glob("*.npz")}


def children(pid: int) -> dict[int, str]:
    """The children of a process, with what each calls itself."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child): Path(f"/proc/{child}/cmdline").read_text().partition("\0")[0].strip() for child in pids}


def writes(pid: int, root: Path) -> str:
    """The name of the shard whose tar a process has open under its temporary name; "" if there is none."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(entry)
            if target.startswith(str(root)) and ".tar." in target:
                return Path(target).name.partition(".")[0]
    return ""


def stopped_while_writing(workers: Callable[[], list[int]], root: Path) -> tuple[int, str]:
    """Stop one of these processes while it writes a shard. Returns the process and the shard."""

    def stop() -> tuple[int, str] | None:
        for pid in workers():
            if writes(pid, root):
                os.kill(pid, signal.SIGSTOP)
                if shard := writes(pid, root):  # still, and from now on for ever
                    return pid, shard
                os.kill(pid, signal.SIGCONT)
        return None

    return until(stop, pause=0.001)

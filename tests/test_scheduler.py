"""The scheduler and the wrapper of commands, at the worst moments: in this process, moment by moment."""

import fcntl
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection

from conftest import patched
from pipeline.service import child, scheduler
from pipeline.service.database import Database, Job, url_of
from pipeline.service.kinds import parse
from pipeline.service.progress import fold
from pipeline.service.queue import Queue, Slots
from pipeline.service.scheduler import Scheduler
from pipeline.service.site import Site

PATIENCE = 30.0
PLAN, HALF = '{"event":"plan","steps":2}', '{"event":"progress","task":"work","done":1,"total":2}'
WORK = f"echo '{PLAN}'; echo '{HALF}'; sleep 0.1; echo '{{\"event\":\"done\"}}'"


class Death(BaseException):
    """The end of a server, at this very place."""


class Mortal(Database):
    """A database whose server dies at a transaction of this number, from 0 on, before or after its commit."""

    def __init__(self, url: str, at: int = -1, committed: bool = False) -> None:
        super().__init__(url)
        self.at, self.committed = at, committed

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        self.at -= 1
        with super().writing() as connection:
            yield connection
            if self.at == -1 and not self.committed:
                raise Death
        if self.at == -1:
            raise Death


def begun(root: Path, *death: int) -> tuple[Queue, Scheduler]:
    """Return the queue and the scheduler of a new server of a folder; they run no thread."""
    site = Site(root)
    site.make()
    data = Mortal(url_of(root, None), *death)
    queue = Queue(site, data, Slots(cpu=8))
    return queue, Scheduler(queue, data, grace=PATIENCE)


def over(queue: Queue, server: Scheduler, number: int) -> Job:
    """Let the server look until a job is over."""
    deadline = time.monotonic() + PATIENCE
    while not (job := queue.job(number)).is_over:
        assert time.monotonic() < deadline, job
        server.look()
        time.sleep(0.01)
    return job


def story(root: Path, number: int) -> list[str]:
    data = Database(url_of(root, None))
    return [event.kind for event in data.events(0, number) if event.kind != "progress"]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let each job run this shell script, in place of our command."""
    script = [WORK]
    monkeypatch.setattr(scheduler, "command", lambda words: ["/bin/sh", "-c", script[0]])
    return script


def played(root: Path, at: int, committed: bool, cancel: bool, **params: object) -> tuple[bool, Job]:
    """Run a job under a server that dies once, and then under its successor; return whether it died, and the job."""
    queue, server = begun(root)
    number = queue.submit(parse({"kind": "feed", **params})).id
    queue, server = begun(root, at, committed)
    try:
        while cancel and not queue.job(number).progress.get("done"):
            server.look()
        if cancel:
            queue.cancel(number)
        over(queue, server, number)
    except Death:
        queue, server = begun(root)
        if cancel and not queue.job(number).cancelling:
            queue.cancel(number)
        return True, over(queue, server, number)
    return False, queue.job(number)


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize(
    ("script", "params", "state"),
    [
        (WORK, {}, "succeeded"),
        pytest.param(f"{WORK}; exit 3", {"retries": 0}, "failed", marks=pytest.mark.proof),
        (f"{WORK}; exec sleep 100", {}, "cancelled"),
    ],
)
def test_a_server_may_die_at_any_transaction(
    work: list[str], tmp_path: Path, script: str, params: dict, state: str, committed: bool
):
    """Its successor takes the job over: it ends once, with all its progress, and nothing of it is left."""
    work[0], at, died = script, 0, True
    while died:
        root = tmp_path / str(at)
        died, job = played(root, at, committed, state == "cancelled", **params)
        assert job.state == state, (at, job)
        kinds = story(root, job.id)
        assert (kinds[0], kinds[-1], kinds.count("ended")) == ("queued", "ended", 1), (at, kinds)
        assert kinds.count("resumed") == max(0, job.attempt - 1)
        assert job.attempt <= 2
        assert state == "cancelled" or job.progress["done"] == job.progress["total"] == 2
        assert child.end_all(root / "jobs" / str(job.id)) == []
        at += 1
    assert at > 5


@pytest.mark.parametrize(("script", "attempts"), [("exit 2", 1), (f"{WORK}; exit 2", 2), ("exit 3", 2)])
def test_errors_of_a_user_are_not_tried_again(work: list[str], tmp_path: Path, script: str, attempts: int):
    """Those come before the command begins to work; later ones, as of a lost worker, may pass."""
    work[0] = f"echo 'Error: so it is' >&2; {script}"
    queue, server = begun(tmp_path)
    job = over(queue, server, queue.submit(parse({"kind": "feed", "retries": 1})).id)
    assert (job.state, job.attempt, job.reason) == ("failed", attempts, "so it is" + " (2 attempts)" * (attempts > 1))


SIGNALLED = """
import os, signal, subprocess
popen = subprocess.Popen
def late(*words, **options):
    os.killpg(0, signal.SIGTERM)
    return popen(*words, **options)
subprocess.Popen = late
"""


def test_a_signal_just_before_the_command_begins_reaches_it(tmp_path: Path):
    wrapper = child.start(tmp_path, 1, ["/bin/sleep", "100"], patched(tmp_path, SIGNALLED))
    try:
        assert wrapper.wait(PATIENCE) == 0
        assert child.exit_code(tmp_path, 1) == 128 + signal.SIGTERM
    finally:
        child.end_all(tmp_path)


def test_a_job_cancelled_while_its_loss_is_looked_at_is_not_begun_again(
    work: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    work[0] = "exec sleep 100"
    queue, server = begun(tmp_path)
    number = queue.submit(parse({"kind": "feed"})).id
    server.look()
    process = server._wrappers[0]
    process.kill()
    process.wait()
    end_all = child.end_all

    def interrupted(folder: Path) -> list[int]:
        if queue.job(number).cancelling is None:
            queue.cancel(number)
        return end_all(folder)

    monkeypatch.setattr(child, "end_all", interrupted)
    server.look()
    assert queue.job(number).state == "cancelled"
    assert story(tmp_path, number) == ["queued", "started", "cancelling", "ended"]


def test_a_command_waits_for_the_lock_of_one_that_has_just_been_killed(tmp_path: Path):
    lock = os.open(tmp_path / child.LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Timer(0.3, os.close, [lock]).start()
    assert child.start(tmp_path, 1, ["/bin/true"], {}).wait(PATIENCE) == 0
    assert child.exit_code(tmp_path, 1) == 0


def test_jobs_of_another_version_are_ended_and_others_go_on(work: list[str], tmp_path: Path):
    work[0] = "exec sleep 100"
    queue, server = begun(tmp_path)
    old = queue.submit(parse({"kind": "feed"})).id
    waiting = queue.submit(parse({"kind": "feed"})).id
    server.look()
    with sqlite3.connect(tmp_path / "penstock.db") as connection:
        connection.execute("UPDATE jobs SET params = ?", (json.dumps({"kind": "feed", "colour": 1}),))
    connection.close()
    work[0] = WORK
    new = queue.submit(parse({"kind": "feed"})).id
    assert over(queue, server, new).state == "succeeded"
    for number in (old, waiting):
        assert queue.job(number).state == "failed"
        assert "colour 1" in str(queue.job(number).reason)
        assert child.end_all(tmp_path / "jobs" / str(number)) == []


@pytest.mark.parametrize(
    "line", [b'{"event":"shard"}', b'{"event":"plan","images":[]}', b'{"event":"begin"}', b'{"event":"plan","notes":3}']
)
def test_lines_of_other_programs_are_notes(line: bytes):
    assert fold({}, [line], 0.0)["notes"] == [line.decode()]

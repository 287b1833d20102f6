"""Starts jobs where slots are free, follows their logs, and ends each job once, whatever dies in between."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Connection

from pipeline import UserError
from pipeline.service import child, database
from pipeline.service.database import WAITING, Database, Job, add_event, end_job
from pipeline.service.kinds import Kind, command, parse
from pipeline.service.progress import fold
from pipeline.service.queue import Queue

PERIOD, QUIET = 0.2, 1.0  # seconds between two looks, with and without running jobs
BETWEEN = 0.5  # seconds between two events of the progress of a job
ALL = 10**6  # jobs that are not over: more than there may be
PIECE = 2**20  # bytes of a log that are read at a time
ATTEMPTS = 100  # of a job at most
FAULTS = 2  # the exit code of our commands for an error: of the user, where they have not begun to work
FOUND = {"verify": 1}  # and the exit code of a command that has found what it looked for


class Scheduler:
    """Runs the queued jobs of a database in a thread. At most one scheduler works on a site."""

    def __init__(self, queue: Queue, data: Database, grace: float) -> None:
        """`grace`: seconds from SIGTERM to SIGKILL for a job that is cancelled."""
        self.queue, self.looked = queue, time.monotonic()
        self._database, self._grace, self._stopping = data, grace, False
        self._wrappers: list[subprocess.Popen[bytes]] = []  # that this process has begun, and has to reap
        self._seen: set[int] = set()  # jobs that have been running under this scheduler
        self._signalled: set[int] = set()
        self._not_before: dict[int, float] = {}
        self._written: dict[int, float] = {}  # job → when its progress was written last
        self._writes = 0
        self._thread = threading.Thread(target=self._run, name="penstock-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, jobs_too: bool = False) -> int:
        """End the thread, and return how many jobs go on without the server; its successor takes them over.

        `jobs_too`: they are asked to save and to end first, and are queued again.
        """
        self._stopping = True
        self.queue.changed.set()
        if self._thread.is_alive():
            self._thread.join()
        running, until = self._database.jobs(("running",), limit=ALL), time.monotonic() + self._grace
        if not jobs_too:
            return len(running)
        for job in running:
            self._signal(job, signal.SIGTERM)
        while time.monotonic() < until and any(child.running(self.queue.folder(job.id)) for job in running):
            time.sleep(PERIOD)
        for job in running:
            child.end_all(self.queue.folder(job.id))
            self._read_log(job)
            code = child.exit_code(self.queue.folder(job.id), job.attempt)
            if job.cancelling or code == 0:
                self._finish(job, code)
            else:
                self._queue_again(job, "the server was stopped", failure=False)
        return 0

    # ---- The thread. ----

    def _run(self) -> None:
        while not self._stopping:
            try:
                busy = self.look()
                self.looked = time.monotonic()
            except (sql.exc.SQLAlchemyError, OSError) as error:  # a full disk, a lost database: may pass
                print(f"penstock serve: {str(error).splitlines()[0]}; tries again", file=sys.stderr, flush=True)
                busy = False
            self.queue.changed.wait(PERIOD if busy else QUIET)
            self.queue.changed.clear()

    def look(self) -> bool:
        """Follow the running jobs, start what can be started; return whether jobs run."""
        self._wrappers = [wrapper for wrapper in self._wrappers if wrapper.poll() is None]
        for job in reversed(self._database.jobs(("running",), limit=ALL)):
            self._follow(job)
        unfinished = self._understood(self._database.jobs(WAITING, limit=ALL)[::-1])
        taken, gpus = self._occupied([job for job, _ in unfinished if job.state == "running"])
        busy, before = any(job.state == "running" for job, _ in unfinished), list[tuple[Job, Kind]]()
        blocked: set[str] = set()  # slots that an earlier job waits for, and no later one gets
        for job, kind in unfinished:
            if job.state == "queued":
                reason = self._obstacle(job, kind, before, taken, blocked)
                if reason is None:
                    needs = kind.needs(len(self.queue.slots.gpus))
                    own = tuple(i for i in range(len(self.queue.slots.gpus)) if i not in gpus)[: needs.get("gpu", 0)]
                    self._start(job, kind, own)
                    taken, gpus, busy = taken + Counter(needs), gpus | {*own}, True
                elif reason != job.waits_for:
                    self._set(job, waits_for=reason)
            before.append((job, kind))
        return busy

    def _understood(self, jobs: list[Job]) -> list[tuple[Job, Kind]]:
        """Return jobs with their kinds; end those that another version has queued, and this one does not know."""
        found = []
        for job in jobs:
            try:
                found.append((job, parse(job.params)))
            except UserError as error:
                child.end_all(self.queue.folder(job.id))
                self._end(job, "failed", FAULTS, str(error))
        return found

    def _occupied(self, running: list[Job]) -> tuple[Counter[str], set[int]]:
        taken = sum((Counter(self.queue.needs(job)) for job in running), Counter())
        return taken, {number for job in running for number in job.gpus}

    def _obstacle(
        self, job: Job, kind: Kind, before: list[tuple[Job, Kind]], taken: Counter[str], blocked: set[str]
    ) -> str | None:
        """Return why a queued job cannot start now; None where it can."""
        for other, others in before:
            if others.writes & (kind.reads | kind.writes) or others.reads & kind.writes:
                return f"job {other.id}, {other.kind} {other.target}"
        if (pause := self._not_before.get(job.id, 0) - time.monotonic()) > 0:
            return f"{pause:.0f} s until it is tried again"
        for name, count in kind.needs(len(self.queue.slots.gpus)).items():
            total = self.queue.slots.total()[name]
            if name in blocked or taken[name] + count > total:
                blocked.add(name)
                return f"a free {name} slot; there {'is' if total == 1 else 'are'} {total}"
        return None

    def _start(self, job: Job, kind: Kind, gpus: tuple[int, ...]) -> None:
        table, attempt, now = database.jobs, job.attempt + 1, time.time()
        with self._database.writing() as connection:
            begun = {"state": "running", "attempt": attempt, "started": job.started or now, "waits_for": None}
            same = sql.and_(table.c.id == job.id, table.c.state == "queued")
            changed = connection.execute(sql.update(table).where(same).values(**begun, pid=None, gpus=list(gpus)))
            if not changed.rowcount:  # cancelled since
                return
            add_event(connection, job.id, "resumed" if attempt > 1 else "started", {"attempt": attempt})
        job = replace(job, attempt=attempt, state="running", started=job.started or now, gpus=gpus)
        self._seen.add(job.id)
        try:
            words = kind.words(self.queue.site, job.started if attempt > 1 else None)
            folder = self.queue.folder(job.id)
            folder.mkdir(exist_ok=True)
            own = {"CUDA_VISIBLE_DEVICES": ",".join(self.queue.slots.gpus[i] for i in gpus)}
            own["PENSTOCK_FEED_TOKEN_FILE"] = os.environ.get(
                "PENSTOCK_FEED_TOKEN_FILE", str(self.queue.site.feed_token)
            )
            wrapper = child.start(folder, attempt, command(words), own)
            self._wrappers.append(wrapper)
            process = child.identity(wrapper.pid)
        except UserError as error:
            return self._end(job, "failed", FAULTS, str(error))
        except OSError as error:  # a full disk, no more processes: may pass
            return self._failed(job, None, str(error))
        self._set(job, pid=process.pid, pid_started=process.started)

    def _follow(self, job: Job) -> None:
        """Read a running job's log, and signal it if it is cancelled; end or requeue it where its command ended."""
        folder = self.queue.folder(job.id)
        process = child.Process(job.pid, job.pid_started or 0) if job.pid else child.running(folder)
        alive = process is not None and process.is_alive()
        if process and alive and not job.pid:  # begun by a server that ended before it could write this
            self._set(job, pid=process.pid, pid_started=process.started)
        due = time.monotonic() - self._written.get(job.id, 0) > BETWEEN
        if alive:
            if due:
                self._read_log(job)
            if job.cancelling:
                self._stop(job, time.time() - job.cancelling)
            self._seen.add(job.id)
            return
        left = child.end_all(folder)
        job = self._read_log(job)
        code = child.exit_code(folder, job.attempt)
        if code is not None or job.cancelling:
            self._finish(job, code)
        elif job.id in self._seen:  # lost while the server looked on: that counts as a failure
            killed = f" with {len(left)} of its processes" if left else ""
            self._failed(job, None, f"killed{killed}; out of memory?")
        elif job.attempt >= ATTEMPTS:  # perhaps it takes the server with it each time
            self._end(job, "failed", None, f"lost with the server {job.attempt} times; out of memory?")
        else:
            self._queue_again(job, "lost while no server ran", failure=False)

    def _read_log(self, job: Job) -> Job:
        """Fold the new whole lines of a job's log into its progress; return the job as it is then."""
        progress, position = job.progress, job.log_read
        try:
            with open(self.queue.folder(job.id) / child.LOG, "rb") as log:
                log.seek(position)
                while piece := log.read(PIECE):
                    end = piece.rfind(b"\n") + 1 or (len(piece) if len(piece) == PIECE else 0)
                    if not end:
                        break
                    progress = fold(progress, piece[:end].splitlines(), time.time())
                    position += end
                    log.seek(position)
        except FileNotFoundError:
            return job
        if position == job.log_read:
            return job
        self._written[job.id] = time.monotonic()
        with self._database.writing() as connection:
            self._update(connection, job, progress=progress, log_read=position)
            if progress != job.progress:
                add_event(connection, job.id, "progress", progress)
                self._writes += 1
                if self._writes % 100 == 0:
                    database.forget_progress(connection, job.id)
        return replace(job, progress=progress, log_read=position)

    def _stop(self, job: Job, since: float) -> None:
        """Ask a cancelled job to end; past the grace, kill it."""
        if since > self._grace:
            self._signal(job, signal.SIGKILL)
            child.end_all(self.queue.folder(job.id))
        elif job.id not in self._signalled:
            self._signalled.add(job.id)
            self._signal(job, signal.SIGTERM)

    def _signal(self, job: Job, number: int) -> None:
        if process := child.running(self.queue.folder(job.id)):
            process.signal(number)

    def _finish(self, job: Job, code: int | None) -> None:
        """End a job whose command has ended with `code`; None: it was killed."""
        reason = job.progress.get("error") or f"ended with exit code {code}"
        if code == 0:
            self._end(job, "succeeded", code)
        elif job.cancelling:
            self._end(job, "cancelled", code)
        elif code == FOUND.get(job.kind):
            self._end(job, "failed", code, f"{job.progress.get('failed', 'some')} files failed")
        elif code == FAULTS and not parse(job.params).has_begun(self.queue.site, job.progress):
            self._end(job, "failed", code, reason)
        else:
            self._failed(job, code, reason)

    def _failed(self, job: Job, code: int | None, reason: str) -> None:
        """Try a job again that ended by no fault of its user, or end it where that has been done often enough."""
        if job.failures < job.retries:
            self._not_before[job.id] = time.monotonic() + 2**job.failures
            return self._queue_again(job, reason, failure=True)
        tries = f" ({job.attempt} attempts)" if job.attempt > 1 else ""
        self._end(job, "failed", code, f"{reason}{tries}")

    def _queue_again(self, job: Job, reason: str, failure: bool) -> None:
        again: dict[str, Any] = {"state": "queued", "failures": job.failures + failure, "pid": None, "gpus": None}
        table = database.jobs
        with self._database.writing() as connection:
            wanted = sql.and_(table.c.id == job.id, table.c.cancelling.is_(None))
            if connection.execute(sql.update(table).where(wanted).values(again)).rowcount:
                add_event(connection, job.id, "queued", {"reason": reason})
            else:  # cancelled while its end was looked at
                end_job(connection, job, "cancelled", None, None)

    # ---- Rows. ----

    def _end(self, job: Job, state: str, code: int | None, reason: str | None = None) -> None:
        with self._database.writing() as connection:
            end_job(connection, job, state, code, reason)

    def _set(self, job: Job, **values: Any) -> None:
        with self._database.writing() as connection:
            self._update(connection, job, **values)

    def _update(self, connection: Connection, job: Job, **values: Any) -> None:
        connection.execute(sql.update(database.jobs).where(database.jobs.c.id == job.id).values(values))

"""The queue of jobs: what may be asked for from outside, and the slots in which jobs run."""

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Connection

from pipeline import UserError
from pipeline.service import database, runs
from pipeline.service.database import OVER, Database, Job, add_event, end_job
from pipeline.service.kinds import Kind, Needs, parse
from pipeline.service.site import Missing, Site

MOST_QUEUED = 1_000
FEEDS = 4  # decoding workers at a time


@dataclass(frozen=True)
class Slots:
    """Jobs at a time: `cpu` without a GPU, one on each of `gpus` (in CUDA_VISIBLE_DEVICES' words), `feed` workers."""

    cpu: int = 1
    gpus: tuple[str, ...] = ()
    feed: int = FEEDS

    def total(self) -> dict[str, int]:
        """Return the slots by name: "cpu", "gpu" and "feed"."""
        return {"cpu": self.cpu, "gpu": len(self.gpus), "feed": self.feed}


class Queue:
    """The jobs of a database, which a `Scheduler` runs; `changed` is set where there is something to do for it."""

    def __init__(self, site: Site, data: Database, slots: Slots) -> None:
        self.site, self.slots, self.changed = site, slots, threading.Event()
        self._database = data

    def submit(self, kind: Kind, key: str | None = None) -> Job:
        """Queue a job, and return it, or the earlier job of the same `key`, if there is one.

        Raises UserError: the server cannot run it, or too many wait.
        """
        kind.check(self.site, len(self.slots.gpus))
        with self._database.writing() as connection:
            if key and (known := self._by_key(connection, key)):
                if known.params != kind.model_dump(exclude_none=True):
                    raise UserError(f"Idempotency-Key {key}: belongs to job {known.id}, which has other parameters")
                return known
            waiting = connection.execute(sql.select(sql.func.count()).where(database.jobs.c.state == "queued")).scalar()
            if (waiting or 0) >= MOST_QUEUED:
                raise UserError(f"{waiting:,} jobs wait already; at most {MOST_QUEUED:,}: cancel some, or wait")
            values: dict[str, Any] = {"kind": kind.kind, "state": "queued", "target": kind.target, "key": key}
            values["created"] = time.time()
            values |= {"params": kind.model_dump(exclude_none=True), "retries": kind.retries}
            added = sql.insert(database.jobs).values(values).returning(database.jobs.c.id)
            number = connection.execute(added).scalar_one()
            add_event(connection, number, "queued", {})
        self.changed.set()
        return self.job(number)

    def cancel(self, number: int) -> Job:
        """Cancel a job: at once if it waits; if it runs, its command is asked to save and to end. Raises UserError."""
        table = database.jobs
        with self._database.writing() as connection:
            job = self._locked(connection, number)
            if job.state in OVER:
                raise UserError(f"job {number}: has {job.state} already")
            if job.state == "queued":
                end_job(connection, job, "cancelled", None, None)
            elif not job.cancelling:
                connection.execute(sql.update(table).where(table.c.id == number).values(cancelling=time.time()))
                add_event(connection, number, "cancelling", {})
        self.changed.set()
        return self.job(number)

    def retry(self, number: int) -> Job:
        """Queue a new job like one that failed or was cancelled; it goes on where that ended. Raises UserError."""
        job = self.job(number)
        if job.state not in ("failed", "cancelled"):
            raise UserError(f"job {number}: is {job.state}; only one that failed or was cancelled is run again")
        params = job.params
        if job.kind == "train" and runs.newest(self.site.runs / params["run"]):
            params = {name: value for name, value in params.items() if name not in ("recipe", "init", "set")}
            params["resume"] = True
        return self.submit(parse(params))

    def job(self, number: int) -> Job:
        """Return a job. Raises Missing."""
        if job := self._database.job(number):
            return job
        raise Missing(f"{number}: no such job")

    def taken(self) -> dict[str, int]:
        """Return the slots that running jobs have, by name."""
        running = self._database.jobs(("running",), limit=MOST_QUEUED)
        return dict(sum((Counter(self.needs(job)) for job in running), Counter(dict.fromkeys(self.slots.total(), 0))))

    def folder(self, job: int) -> Path:
        """Return the folder of a job, which has its log."""
        return self.site.jobs / str(job)

    def needs(self, job: Job) -> Needs:
        """Return the slots that a running job has: of GPUs those that it was given."""
        return {"gpu": len(job.gpus)} if job.gpus else parse(job.params).needs(0)

    def _locked(self, connection: Connection, number: int) -> Job:
        row = connection.execute(sql.select(database.jobs).where(database.jobs.c.id == number)).mappings().first()
        if row is None:
            raise Missing(f"{number}: no such job")
        return database.job_of(row)

    def _by_key(self, connection: Connection, key: str) -> Job | None:
        row = connection.execute(sql.select(database.jobs).where(database.jobs.c.key == key)).mappings().first()
        return database.job_of(row) if row else None


def slots_of(text: str | None, visible: Mapping[str, str] = os.environ) -> Slots:
    """Return the slots that `cpu=2,gpu=1,feed=8` names; by default one job on the cores, and one on each GPU.

    Raises UserError: another text, or more GPUs than there are.
    """
    here = visible.get("CUDA_VISIBLE_DEVICES")
    names = here.split(",") if here else [] if here == "" else [str(i) for i in range(len(_devices()))]
    given = dict(part.strip().partition("=")[::2] for part in text.split(",")) if text else {}
    if not given.keys() <= {"cpu", "gpu", "feed"} or not all(
        re.fullmatch("[0-9]{1,9}", value) for value in given.values()
    ):
        raise UserError(f"--slots {text:.80}: not like cpu=1,gpu=0,feed=4")
    cpu, gpu, feed = (int(given.get(name, usual)) for name, usual in (("cpu", 1), ("gpu", len(names)), ("feed", FEEDS)))
    if not 1 <= cpu <= 1024 or gpu > len(names) or feed > 1024:
        raise UserError(f"--slots {text}: at least one cpu slot, and at most {len(names)} of GPUs, which are here")
    return Slots(cpu, tuple(names[:gpu]), feed)


def _devices() -> list[str]:
    return [name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdecimal()]

"""The server's database: jobs, what happened to them, tokens and sessions. SQLite, or PostgreSQL by URL."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import Connection, event

from pipeline import UserError

FILE_NAME = "penstock.db"
KEPT = 2_000  # events of the progress of one job; older ones go
WAITING, OVER = ("queued", "running"), ("succeeded", "failed", "cancelled")

metadata = sql.MetaData()
Big = sql.BigInteger().with_variant(sql.Integer, "sqlite")  # SQLite counts up by itself only an INTEGER
jobs = sql.Table(
    "jobs",
    metadata,
    sql.Column("id", Big, primary_key=True),
    sql.Column("kind", sql.String(16), nullable=False),
    sql.Column("state", sql.String(16), nullable=False, index=True),
    sql.Column("target", sql.String(64), nullable=False),
    sql.Column("params", sql.JSON, nullable=False),
    sql.Column("key", sql.String(200), unique=True),  # Idempotency-Key
    sql.Column("attempt", sql.Integer, nullable=False, default=0),
    sql.Column("retries", sql.Integer, nullable=False, default=0),
    sql.Column("failures", sql.Integer, nullable=False, default=0),  # that count towards `retries`
    sql.Column("cancelling", sql.Float),  # when it was asked for
    sql.Column("created", sql.Float, nullable=False),
    sql.Column("started", sql.Float),
    sql.Column("ended", sql.Float),
    sql.Column("pid", sql.Integer),  # of the child's wrapper, with the time of its start, in clock ticks since boot
    sql.Column("pid_started", Big),
    sql.Column("gpus", sql.JSON),  # numbers of those that it has
    sql.Column("log_read", Big, nullable=False, default=0),  # bytes of the log that are in `progress`
    sql.Column("exit_code", sql.Integer),
    sql.Column("reason", sql.Text),
    sql.Column("waits_for", sql.Text),
    sql.Column("progress", sql.JSON),
)
events = sql.Table(
    "events",
    metadata,
    sql.Column("id", Big, primary_key=True, autoincrement=True),
    sql.Column("job", Big, nullable=False, index=True),
    sql.Column("kind", sql.String(16), nullable=False),
    sql.Column("time", sql.Float, nullable=False),
    sql.Column("data", sql.JSON, nullable=False),
    sqlite_autoincrement=True,  # an id is never used again
)
tokens = sql.Table(
    "tokens",
    metadata,
    sql.Column("id", Big, primary_key=True),
    sql.Column("name", sql.String(200), nullable=False),
    sql.Column("scope", sql.String(8), nullable=False),
    sql.Column("digest", sql.String(64), nullable=False, unique=True),
    sql.Column("created", sql.Float, nullable=False),
    sql.Column("expires", sql.Float),
    sql.Column("revoked", sql.Float),
    sqlite_autoincrement=True,
)
sessions = sql.Table(
    "sessions",
    metadata,
    sql.Column("digest", sql.String(64), primary_key=True),
    sql.Column("token_id", Big, nullable=False),
    sql.Column("expires", sql.Float, nullable=False),
)


@dataclass(frozen=True)
class Job:
    """A command of ours that the server runs. Times are Unix seconds."""

    id: int
    kind: str
    state: str  # "queued", "running", "succeeded", "failed" or "cancelled"
    target: str  # the data set or the run that it makes; "" for none
    params: dict[str, Any]
    attempt: int  # starts so far
    retries: int  # starts anew after a failure, at most
    failures: int
    cancelling: float | None
    created: float
    started: float | None
    ended: float | None
    pid: int | None
    pid_started: int | None
    gpus: tuple[int, ...]
    log_read: int
    exit_code: int | None
    reason: str | None  # one line: why it failed
    waits_for: str | None
    progress: dict[str, Any]

    @property
    def is_over(self) -> bool:
        return self.state in OVER


@dataclass(frozen=True)
class Event:
    """A change of a job: "queued", "started", "progress", "resumed", "cancelling" or "ended"."""

    id: int
    job: int
    kind: str
    time: float
    data: dict[str, Any]


def url_of(root: Path, url: str | None) -> str:
    """Return the URL of a server's database: of the file in its folder, by default."""
    return url or f"sqlite:///{root / FILE_NAME}"


class Database:
    """Transactions on the database at a URL; all writers of this process take turns, so event ids grow in order."""

    def __init__(self, url: str) -> None:
        """Make the tables where they are missing. Raises UserError: the database cannot be reached or written."""
        try:
            self._engine = sql.create_engine(url, pool_pre_ping=True)
            if self._engine.dialect.name == "sqlite":
                event.listen(self._engine, "connect", _prepare_sqlite)
            metadata.create_all(self._engine)
            with self.reading() as connection:  # tables of another version lack a column
                for table in metadata.sorted_tables:
                    connection.execute(sql.select(table).limit(1)).all()
        except (sql.exc.SQLAlchemyError, ImportError, ValueError) as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise UserError(f"--database {_without_password(url)}: {reason}") from error
        self._turn = threading.Lock()
        self.listeners: list[Callable[[], object]] = []  # called after each commit

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection for SELECTs."""
        with self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Yield a connection whose changes are committed together at the end of the block, or not at all."""
        with self._turn, self._engine.begin() as connection:
            yield connection
        for listener in self.listeners:
            listener()

    def close(self) -> None:
        self._engine.dispose()

    def job(self, number: int) -> Job | None:
        with self.reading() as connection:
            row = connection.execute(sql.select(jobs).where(jobs.c.id == number)).mappings().first()
        return job_of(row) if row else None

    def jobs(
        self, states: Sequence[str] = (), kind: str | None = None, before: int | None = None, limit: int = 100
    ) -> list[Job]:
        """Return jobs, the newest first: of these states (none: any), of a kind, with a number below `before`."""
        query = sql.select(jobs).order_by(jobs.c.id.desc()).limit(limit)
        if states:
            query = query.where(jobs.c.state.in_(states))
        if kind:
            query = query.where(jobs.c.kind == kind)
        if before is not None:
            query = query.where(jobs.c.id < before)
        with self.reading() as connection:
            return [job_of(row) for row in connection.execute(query).mappings()]

    def events(self, after: int, job: int | None = None, limit: int = 1000) -> list[Event]:
        """Return the first events, of all jobs or of one, with numbers above `after`, in their order."""
        query = sql.select(events).where(events.c.id > after).order_by(events.c.id).limit(limit)
        if job is not None:
            query = query.where(events.c.job == job)
        with self.reading() as connection:
            return [Event(**row) for row in connection.execute(query).mappings()]

    def last_event(self) -> int:
        """Return the number of the newest event; 0 for none."""
        with self.reading() as connection:
            return connection.execute(sql.select(sql.func.max(events.c.id))).scalar() or 0


def add_event(connection: Connection, job: int, kind: str, data: dict[str, Any]) -> None:
    """Add an event of a job, in the transaction of the change that it tells."""
    connection.execute(sql.insert(events).values(job=job, kind=kind, time=time.time(), data=data))


def end_job(connection: Connection, job: Job, state: str, code: int | None, reason: str | None) -> None:
    """End a job that is not over: that happens once."""
    ended = {"state": state, "exit_code": code, "reason": reason}
    same = sql.and_(jobs.c.id == job.id, jobs.c.state.in_(WAITING))
    values = {**ended, "ended": time.time(), "pid": None, "waits_for": None}
    if connection.execute(sql.update(jobs).where(same).values(values)).rowcount:
        add_event(connection, job.id, "ended", ended)


def forget_progress(connection: Connection, job: int) -> None:
    """Delete the progress of a job but for the newest events."""
    of_job = sql.and_(events.c.job == job, events.c.kind == "progress")
    newest = sql.select(events.c.id).where(of_job).order_by(events.c.id.desc()).offset(KEPT).limit(1)
    last = connection.execute(newest).scalar()
    if last is not None:
        connection.execute(sql.delete(events).where(of_job, events.c.id <= last))


def job_of(row: Any) -> Job:
    """Return the job of a row of the table."""
    values = {name: row[name] for name in Job.__dataclass_fields__}
    return Job(**values | {"gpus": tuple(row["gpus"] or ()), "progress": row["progress"] or {}})


def _prepare_sqlite(connection: Any, record: object) -> None:
    """Let readers and a writer work at once; a commit survives the end of the process, and a loss of power but for its
    last moments."""
    for setting in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {setting}")


def _without_password(url: str) -> str:
    try:
        return sql.make_url(url).render_as_string(hide_password=True)
    except (sql.exc.ArgumentError, ValueError):  # the latter: a port that is no number
        return "URL"

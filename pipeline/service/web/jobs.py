"""Jobs over HTTP: submit, list, cancel, retry; their logs and events."""

import json
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Header, Path, Query, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from typing_extensions import TypedDict  # pydantic takes typing's only from Python 3.12 on

from pipeline.service import child
from pipeline.service.database import Event, Job
from pipeline.service.kinds import AnyKind, Kind
from pipeline.service.kinds import parse as parse_kind
from pipeline.service.progress import describe
from pipeline.service.web.context import Here, Service
from pipeline.service.web.files import sent
from pipeline.service.web.problem import Problem, response, responses
from pipeline.volumes import open_regular

TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Number = Annotated[int, Path(ge=1, le=2**53)]
UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the latter: by nginx
MOST_STREAMS = 128  # of events, open at a time
LATEST = 2**20  # bytes of a log that `text=true` shows: its end
router = APIRouter(prefix="/v1", tags=["jobs"])


class JobView(TypedDict):
    """A job. Times are ISO 8601, UTC."""

    id: int
    kind: Literal["build", "verify", "train", "evaluate", "figures", "feed"]
    state: State
    target: str
    params: dict[str, Any]
    command: list[str]
    attempt: int
    retries: int
    cancelling: bool
    created: str
    started: str | None
    ended: str | None
    exit_code: int | None
    reason: str | None
    waits_for: str | None
    progress: dict[str, Any]


class JobList(TypedDict):
    """Jobs, the newest first, and the number to ask with as `before` for older ones."""

    jobs: list[JobView]
    next: int | None


def view(job: Job) -> JobView:
    """Return a job as the API shows it."""
    return JobView(
        id=job.id,
        kind=job.kind,  # type: ignore[typeddict-item]
        state=job.state,  # type: ignore[typeddict-item]
        target=job.target,
        params=job.params,
        command=job.progress.get("command", []),
        attempt=job.attempt,
        retries=job.retries,
        cancelling=job.cancelling is not None,
        created=_iso(job.created) or "",
        started=_iso(job.started),
        ended=_iso(job.ended),
        exit_code=job.exit_code,
        reason=job.reason,
        waits_for=job.waits_for,
        progress={key: value for key, value in job.progress.items() if key not in ("first", "command")},
    )


@router.post("/jobs", status_code=201, responses=responses(409, 413, 422))
def submit(
    service: Here,
    response: Response,
    params: Annotated[AnyKind, Body()],
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200, pattern="^[!-~]+$")] = None,
) -> JobView:
    """Submit a job. It waits for a slot, and while an earlier job writes what it reads or writes."""
    job = create(service, params, idempotency_key)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return view(job)


def create(service: Service, params: Kind | dict[str, Any], key: str | None = None) -> Job:
    """Queue a job of these parameters, and return it. Raises UserError."""
    kind = parse_kind(params) if isinstance(params, dict) else params
    return service.queue.submit(kind, key)


@router.get("/jobs", responses=responses(422))
def list_jobs(
    service: Here,
    state: State | None = None,
    kind: Annotated[str | None, Query(pattern="^[a-z]{1,16}$")] = None,
    before: Annotated[int | None, Query(ge=1, le=2**53)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> JobList:
    """List jobs, the newest first."""
    found = service.database.jobs((state,) if state else (), kind, before, limit)
    views = [view(job) for job in found]
    return JobList(jobs=views, next=found[-1].id if len(found) == limit else None)


@router.get("/jobs/{number}", responses=responses(404, 422))
def one(service: Here, number: Number) -> JobView:
    """Return a job."""
    return view(service.queue.job(number))


@router.post("/jobs/{number}/cancel", status_code=202, responses=responses(404, 409, 422))
def cancel(service: Here, number: Number) -> JobView:
    """Cancel a job. One that runs is asked to save and to end, and is killed after the server's grace."""
    if service.queue.job(number).is_over:
        raise Problem(409, f"job {number}: is over already")
    return view(service.queue.cancel(number))


@router.post("/jobs/{number}/retry", status_code=201, responses=responses(404, 409, 422))
def retry(service: Here, number: Number, response: Response) -> JobView:
    """Submit a job like one that failed or was cancelled; it goes on where that ended."""
    if service.queue.job(number).state not in ("failed", "cancelled"):
        raise Problem(409, f"job {number}: has not failed, and was not cancelled")
    job = service.queue.retry(number)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return view(job)


@router.get(
    "/jobs/{number}/log",
    responses=responses(404, 416, 422) | TEXT,
    response_class=Response,
)
def log(service: Here, request: Request, number: Number, text: bool = False) -> Response:
    """Return the log of all attempts, by ranges of bytes; with `text` its end as sentences."""
    path = service.queue.folder(service.queue.job(number).id) / child.LOG
    if text or not path.exists():
        return PlainTextResponse("".join(f"{line}\n" for line in tail(service, number)))
    stored = open_regular(path)
    size = os.fstat(stored.fileno()).st_size  # the log grows, and nothing else ever happens to it
    return sent(request, stored, f'"{size}"', "text/plain; charset=utf-8")


def tail(service: Service, number: int, most: int = 10_000) -> list[str]:
    """Return the last lines of a job's log as sentences."""
    try:
        with open(service.queue.folder(number) / child.LOG, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LATEST))
            lines = file.read(LATEST).splitlines()
    except FileNotFoundError:
        return []
    return [describe(line) for line in (lines if size <= LATEST else lines[1:])[-most:]]


EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


@router.get("/jobs/{number}/events", responses=responses(404, 422, 503) | EVENTS, response_class=Response)
async def job_events(
    service: Here,
    number: Number,
    after: Annotated[int, Query(ge=0, le=2**53)] = 0,
    last_event_id: Annotated[str | None, Header(pattern="^[0-9]{1,16}$")] = None,
) -> Response:
    """Stream a job's events (server-sent events) from its first on; it ends with the job."""
    start = int(last_event_id or after)
    if service.queue.job(number).is_over and not service.database.events(start, number, limit=1):
        return Response(status_code=204)  # which ends the reconnections of a browser
    return _streamed(service, start, number)


@router.get("/events", responses=responses(422, 503) | EVENTS, response_class=Response)
async def all_events(
    service: Here,
    after: Annotated[int | None, Query(ge=0, le=2**53)] = None,
    last_event_id: Annotated[str | None, Header(pattern="^[0-9]{1,16}$")] = None,
) -> Response:
    """Stream the events of all jobs, from now on or after a number (server-sent events)."""
    start = int(last_event_id) if last_event_id else after
    return _streamed(service, service.database.last_event() if start is None else start, None)


def _streamed(service: Service, after: int, job: int | None) -> Response:
    async def lines() -> AsyncIterator[str]:
        yield f": events after {after}\n\n"
        async for event in service.stream.after(after, job):
            yield _sse(event) if event else ": alive\n\n"
            if job is not None and event and event.kind == "ended":
                return

    return _Streamed(service, lines())


class _Streamed(StreamingResponse):
    """Server-sent events; a problem where too many streams are open when this one would begin."""

    def __init__(self, service: Service, lines: AsyncIterator[str]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers=UNBUFFERED)
        self._stream = service.stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._stream.readers >= MOST_STREAMS:
            words = f"{MOST_STREAMS} streams of events are open; close some"
            return await response(Request(scope), 503, words, {"Retry-After": "10"})(scope, receive, send)
        self._stream.readers += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.readers -= 1


def _sse(event: Event) -> str:
    value = {"id": event.id, "job": event.job, "kind": event.kind, "time": _iso(event.time), "data": event.data}
    return f"id: {event.id}\nevent: {event.kind}\ndata: {json.dumps(value)}\n\n"


def _iso(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

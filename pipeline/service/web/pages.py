"""The dashboard's pages, whole without JavaScript. They show what the API's own functions return."""

import hashlib
import math
import shlex
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy as sql
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from jinja2 import Environment, FileSystemLoader

from pipeline.service import database
from pipeline.service.database import OVER, WAITING, Job
from pipeline.service.kinds import KINDS
from pipeline.service.site import Site
from pipeline.service.web import charts, datasets, jobs, runs
from pipeline.service.web.context import Here, Service
from pipeline.service.web.problem import Problem

HERE = Path(__file__).parent
STATIC = {"style.css": "text/css", "live.js": "text/javascript", "icon.svg": "image/svg+xml"}
DAY = 86_400  # seconds
LINES = 200  # of a log
RATES = 240  # points of a job's speed
NAMES = 200  # of skipped images
STALL = 0.01  # share of the time; above it a log line names the cause, as online/stall.py has it, with torch
SPEEDS = ("images_per_second", "rate", "megabytes_per_second", "eta")  # of no interest once a job is over
PAGE = 100  # jobs on a page of their list
router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


def render(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Return a page. Buttons are left out for whom the token allows reading alone."""
    state = request.state  # of a request that was refused before its token was looked at: without a scope
    values |= {"writes": getattr(state, "scope", "none") == "write", "signed_in": getattr(state, "session", False)}
    text = PAGES.get_template(template).render(here=request.url.path, version=_version(), now=time.time(), **values)
    return HTMLResponse(text, status, {"Cache-Control": "no-cache, private"})


@cache
def _version() -> str:
    """Return a part of the addresses of our static files, which browsers keep until it changes."""
    return hashlib.sha256(b"".join((HERE / "static" / name).read_bytes() for name in STATIC)).hexdigest()[:12]


def error_page(request: Request, status: int, detail: str) -> Response:
    """Return the page of a problem."""
    return render(request, "error.html", status, code=status, detail=detail, bare=status == 401)


@router.get("/static/{name}")
def static(name: str) -> Response:
    """Return a file of the pages' own."""
    if name not in STATIC:
        raise Problem(404, f"/static/{name:.80}: no such file")
    return FileResponse(HERE / "static" / name, media_type=STATIC[name], headers={"Cache-Control": "max-age=86400"})


@router.get("/")
def overview(request: Request, service: Here) -> Response:
    """Show what runs, what waits, what failed and why; data sets, runs and workers."""
    after = service.database.last_event()  # before anything is read, so that no change falls between
    unfinished = service.database.jobs(WAITING, limit=500)[::-1]
    over = service.database.jobs(OVER, limit=60)
    failed = [job for job in over if job.state == "failed" and time.time() - (job.ended or 0) < DAY]
    newer = {(job.kind, job.target): job.id for job in [*over[::-1], *unfinished]}
    values: dict[str, Any] = {
        "running": [job for job in unfinished if job.state == "running"],
        "waiting": [job for job in unfinished if job.state == "queued"],
        "failed": [job for job in failed if newer[job.kind, job.target] == job.id],  # a later one has not mended it
        "over": [job for job in over if job.state != "failed"][:6],
        "slots": _slots(service),
        "feeds": len(service.settings.feeds),
        "sets": datasets.summaries(service.site),
        "runs": runs.summaries(service),
    }
    values["empty"] = not (unfinished or over or any(values["sets"].values()) or values["runs"])
    place: dict[str, Any] = {"base": str(request.base_url).rstrip("/"), "raw_roots": service.site.raw_roots}
    return render(request, "overview.html", after=after, active=bool(unfinished), **place, **values)


def _slots(service: Service) -> dict[str, tuple[int, int]]:
    """Return the slots in use and all of them, by name; those for feeds only where there is one."""
    taken, total = service.queue.taken(), service.queue.slots.total()
    return {
        name: (taken.get(name, 0), number)
        for name, number in total.items()
        if number and (taken.get(name) or name != "feed")
    }


@router.get("/jobs")
def job_list(
    request: Request,
    service: Here,
    state: jobs.State | None = None,
    before: Annotated[int | None, Query(ge=1, le=2**53)] = None,
) -> Response:
    """Show all jobs, the newest first."""
    after = service.database.last_event()
    found = service.database.jobs((state,) if state else (), before=before, limit=PAGE)
    older = found[-1].id if len(found) == PAGE else None
    active = any(not job.is_over for job in found)
    return render(request, "jobs.html", after=after, active=active, jobs=found, chosen=state or "", older=older)


@router.get("/jobs/{number}")
def job_page(request: Request, service: Here, number: jobs.Number) -> Response:
    """Show a job: how far and how fast it is, its shards, what it skipped, its log."""
    after = service.database.last_event()
    job = service.queue.job(number)
    values: dict[str, Any] = {
        "job": job,
        "stalls": stalls(job),
        "links": _links(service.site, job),
        "rates": charts.spark("Speed", _rates(service, number)),
        "grids": _grids(service.site, job),
        "lines": jobs.tail(service, number, LINES),
        "command": shlex.join(jobs.view(job)["command"]),
        "skipped": job.progress.get("skipped") or {},
        "skipped_files": [],
        "evaluations": [(job.params.get("split") or "val", *row) for row in (job.progress.get("errors") or {}).items()],
    }
    if job.kind == "build" and job.state == "succeeded" and job.target in service.site.dataset_names():
        values["skipped_files"] = datasets.skipped(service.site.dataset(job.target), limit=NAMES)["skipped"]
    return render(request, "job.html", after=after, active=not job.is_over, **values)


def _links(site: Site, job: Job) -> list[tuple[str, str]]:
    """Return addresses and names of what a job makes or reads, where it is there."""
    dataset, run = job.params.get("dataset"), job.params.get("run")
    links = [(f"/runs/{run}", f"Run {run}")] if run in site.run_names() else []
    return links + ([(f"/datasets/{dataset}", f"Data set {dataset}")] if dataset in site.dataset_names() else [])


def _rates(service: Service, number: int) -> list[float]:
    """Return the newest speeds of a job, the oldest first."""
    table = database.events
    query = sql.select(table.c.data).where(table.c.job == number, table.c.kind == "progress")
    with service.database.reading() as connection:
        rows = connection.execute(query.order_by(table.c.id.desc()).limit(RATES)).scalars().all()
    rates = [row.get("images_per_second") or row.get("rate") for row in reversed(rows)]
    return [float(rate) for rate in rates if rate]


def _grids(site: Site, job: Job) -> list[tuple[str, charts.Markup]]:
    """Return for each split of a build a grid of its shards; of other work in shards one grid."""
    progress = job.progress
    if job.kind != "build":
        if progress.get("unit") != "shards" or not progress.get("total"):
            return []
        done = progress.get("done", 0)
        return [("all", charts.grid("Shards", [i < done for i in range(progress["total"])]))]
    done, total = progress.get("shards") or (0, 0)
    size = job.params.get("samples_per_shard") or 4096
    numbers = {split: math.ceil(images / size) for split, images in (progress.get("images") or {}).items() if images}
    if sum(numbers.values()) != total or not total:
        return [("all", charts.grid("Shards", [i < done for i in range(total)]))] if total else []
    grids = []
    for split, number in numbers.items():
        folder = site.datasets / job.target / split
        names = {path.name for path in folder.glob(f"{split}-*.tar")}  # a shard exists whole or not at all
        made = [job.state == "succeeded" or f"{split}-{i:06d}.tar" in names for i in range(number)]
        grids.append((split, charts.grid(f"Shards of {split}", made)))
    return grids


@router.get("/login")
def login(request: Request, next: Annotated[str, Query(max_length=2000)] = "/", error: bool = False) -> Response:
    """Ask for a token."""
    return render(request, "login.html", next=next, failed=error, bare=True)


@router.get("/docs")
def docs(request: Request, service: Here) -> Response:
    """List the operations of the API."""
    operations: dict[str, list[dict[str, Any]]] = {}
    for path, methods in request.app.openapi()["paths"].items():
        for verb, one in methods.items():
            group = (one.get("tags") or ["server"])[0]
            operations.setdefault(group, []).append({"verb": verb.upper(), "path": path, **one})
    kinds = {name: [*kind.model_fields.items()] for name, kind in KINDS.items()}
    return render(request, "docs.html", operations=operations, kinds=kinds, base=str(request.base_url).rstrip("/"))


# ---- How values are shown. ----


def figures(job: Job) -> list[str]:
    """Return how far a job is, in a few short texts."""
    progress = dict(job.progress)
    unit = progress.get("unit", "")
    if job.state != "running":
        progress = {key: value for key, value in progress.items() if key not in SPEEDS}
    if "images_per_second" in progress:
        progress.pop("rate", None)
    progress["skipped"] = sum((progress.get("skipped") or {}).values())
    texts: dict[str, Callable[[Any], str]] = {
        "total": lambda n: f"{progress.get('done', 0):,} of {n:,} {unit}",
        "images_per_second": lambda n: f"{rate(n)} images/s",
        "rate": lambda n: f"{rate(n)} {unit}/s",
        "megabytes_per_second": lambda n: f"{rate(n)} MB/s",
        "eta": lambda n: f"{duration(n)} left",
        "loss": lambda n: f"loss {n:.3f}",
        "top1_error": lambda n: f"top-1 error {n:.1f} %",
        "stall": lambda n: f"stall {100 * n:.1f} %",
        "skipped": lambda n: f"{n:,} skipped",
        "failed": lambda n: f"{n:,} failed",
        "uri": str,
    }
    return [text(progress[key]) for key, text in texts.items() if progress.get(key)]


def stalls(job: Job) -> str:
    """Return what the device of a running training waits for; "" where it does not."""
    waits = job.state == "running" and job.progress.get("stall", 0) > STALL
    return job.progress.get("stall_text", "") if waits else ""


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def size(number: float) -> str:
    """Return bytes with a unit, decimal."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}" if unit != "bytes" else f"{number:,} bytes"
        number /= 1000
    return f"{number:,.3g} TB"


def duration(seconds: float) -> str:
    """Return 42 s, 3 min 12 s, 2 h 5 min or 3 d 4 h."""
    seconds = round(seconds)
    for big, small, names in ((DAY, 3600, "d h"), (3600, 60, "h min"), (60, 1, "min s")):
        if seconds >= big:
            first, second = names.split()
            return f"{seconds // big} {first} {seconds % big // small} {second}"
    return f"{seconds} s"


def ago(seconds: float | None) -> str:
    """Return how long ago a moment was."""
    if seconds is None:
        return "–"
    past = time.time() - seconds
    return "just now" if past < 5 else f"{duration(past).rsplit(' ', 2)[0] if past >= 60 else duration(past)} ago"


def utc(seconds: float | None) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC" if seconds is not None else "–"


def iso(seconds: float | None) -> str:
    return f"{datetime.fromtimestamp(seconds or 0, UTC):%Y-%m-%dT%H:%M:%SZ}"


def number(value: float) -> str:
    return f"{value:,}"


PAGES = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=True,
    auto_reload=False,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.filters |= {f.__name__: f for f in (figures, stalls, rate, size, duration, ago, utc, iso, number)}

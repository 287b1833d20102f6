"""The questions of a monitor: /metrics in Prometheus' format, /healthz, and /readyz."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import sqlalchemy as sql
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.service import database
from pipeline.service.database import OVER, WAITING, Job
from pipeline.service.kinds import KINDS
from pipeline.service.web.context import Here, Service
from pipeline.service.web.problem import Problem, responses

LATE = 30.0  # seconds since the scheduler's last look, after which the server is not ready
BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 30)  # seconds
RATES = {"build": "rate", "train": "images_per_second"}  # in the progress of running jobs: images/s
router = APIRouter(tags=["monitoring"])


@router.head("/healthz", include_in_schema=False, response_class=PlainTextResponse)
@router.get("/healthz", responses=responses(), response_class=PlainTextResponse)
async def health() -> str:
    """Say that the process answers."""
    return "ok"


@router.head("/readyz", include_in_schema=False, response_class=PlainTextResponse)
@router.get("/readyz", responses=responses(503), response_class=PlainTextResponse)
def ready(service: Here) -> str:
    """Say that the database answers and the scheduler works."""
    service.database.last_event()
    if (silent := time.monotonic() - service.scheduler.looked) > LATE:
        raise Problem(503, f"the scheduler has not looked at its jobs for {silent:,.0f} s; start the server again")
    return "ok"


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics", responses=responses(), response_class=PlainTextResponse)
def metrics(request: Request) -> Response:
    """Return all numbers in Prometheus' text format."""
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)


def observe(app: FastAPI, service: Service) -> None:
    """Let the app, which is complete, count its answers, refusals too, and have a registry for `/metrics`."""
    disable_created_metrics()  # no gauge beside each counter
    registry = CollectorRegistry()
    registry.register(_Jobs(service))
    ProcessCollector(registry=registry)
    app.state.registry = registry
    app.add_middleware(Observer, registry=registry)


class _Jobs:
    """Collects, at each scrape, what the database and the scheduler say of jobs."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the families of gauges."""
        service = self._service
        yield from _counted(service)
        slots, taken = service.queue.slots, service.queue.taken()
        sizes = slots.total()
        yield _gauge("penstock_slots", "Jobs that may run at a time.", ["slot"], {(n,): k for n, k in sizes.items()})
        used = {(name,): taken.get(name, 0) for name in sizes}
        yield _gauge("penstock_slots_used", "Slots that running jobs have.", ["slot"], used)
        looked = time.monotonic() - service.scheduler.looked
        yield _gauge("penstock_scheduler_idle_seconds", "Since the scheduler's last look.", [], {(): looked})
        readers = service.stream.readers
        yield _gauge("penstock_event_streams", "Clients that follow events.", [], {(): readers})
        yield from _speeds(service.database.jobs(("running",), limit=1000))

    def describe(self) -> list[GaugeMetricFamily]:
        """Return nothing: the database is not asked when the registry is made."""
        return []


def _counted(service: Service) -> Iterator[GaugeMetricFamily]:
    table = database.jobs
    counting = sql.select(table.c.kind, table.c.state, sql.func.count()).group_by(table.c.kind, table.c.state)
    with service.database.reading() as connection:
        counts = {(kind, state): count for kind, state, count in connection.execute(counting)}
    every = {(kind, state): counts.get((kind, state), 0) for kind in KINDS for state in (*WAITING, *OVER)}
    yield _gauge("penstock_jobs", "Jobs, by kind and state.", ["kind", "state"], every)
    queued = sum(count for (_, state), count in counts.items() if state == "queued")
    yield _gauge("penstock_queue_length", "Jobs that wait.", [], {(): queued})


def _speeds(running: list[Job]) -> Iterator[GaugeMetricFamily]:
    """Yield the speed and the stall of running jobs."""
    labels = ["job", "kind", "target"]

    def of(key: str, jobs: list[Job]) -> dict[tuple[str, ...], float]:
        return {(str(job.id), job.kind, job.target): job.progress[key] for job in jobs if key in job.progress}

    rates: dict[tuple[str, ...], float] = {}
    for kind, key in RATES.items():
        rates |= of(key, [job for job in running if job.kind == kind])
    yield _gauge("penstock_job_images_per_second", "Of running builds and trainings.", labels, rates)
    stall = of("stall", [job for job in running if job.kind == "train"])
    yield _gauge("penstock_job_stall_ratio", "Time in which the device waited for batches.", labels, stall)
    told = {(str(job.id),): job.progress["status"] for job in running if "status" in job.progress}
    for key, name, words in (("rate", "views_per_second", "Of feed jobs."), ("queue", "requests", "Under way.")):
        values = {labels: status[key] for labels, status in told.items() if key in status}
        yield _gauge(f"penstock_feed_{name}", words, ["job"], values)


def _gauge(name: str, words: str, labels: list[str], values: Mapping[Any, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, words, labels=labels)
    for label, value in values.items():
        family.add_metric(list(label), value)
    return family


class Observer:
    """ASGI middleware: counts answers and bytes, and times answers, by the route's template."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        labels = ["method", "route", "status"]
        words = "From a request to the end of its answer; streams of events are left out."
        self._seconds = Histogram(
            "penstock_http_request_duration_seconds", words, labels, registry=registry, buckets=BUCKETS
        )
        words = "Bytes of the bodies of answers."
        self._bytes = Counter("penstock_http_response_bytes", words, ["route"], registry=registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and observe its answer."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, answer = time.perf_counter(), {"status": 500, "bytes": 0, "stream": False}

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer["status"] = message["status"]
                answer["stream"] = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            answer["bytes"] += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST") else "other"
            self._bytes.labels(route).inc(answer["bytes"])
            if not answer["stream"]:
                took = time.perf_counter() - began
                self._seconds.labels(method, route, answer["status"]).observe(took)

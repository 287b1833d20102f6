"""Decoding workers over HTTP: who is there, at what rate, with how many requests under way; or why one is silent."""

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from fastapi import APIRouter
from typing_extensions import TypedDict  # pydantic takes typing's only from Python 3.12 on

from pipeline import UserError
from pipeline.service.database import Job
from pipeline.service.web.context import Here, Service
from pipeline.service.web.problem import responses

if TYPE_CHECKING:
    from pipeline.online.endpoints import Endpoint

PATIENCE = 2.0  # seconds for an answer
KEPT = 2.0  # seconds for which answers are shown again
LATE = 20.0  # seconds without an event of its status, after which a feed job is silent
MOST = 64  # workers that are asked at a time
NUMBERS = ("rate", "queue", "bytes_held", "views", "clients", "threads", "seconds")
FEED = "--feed"  # the source of workers that the server's command names
T = TypeVar("T")
R = TypeVar("R")
router = APIRouter(prefix="/v1", tags=["workers"])
_asking = threading.Lock()


class WorkerView(TypedDict):
    """A decoding worker; the numbers of one that is silent are None."""

    address: str
    source: str  # "job 12", or "--feed"
    state: Literal["serving", "silent"]
    error: str | None  # why it is silent
    rate: float | None  # views/s of the last seconds
    queue: int | None  # requests that it decodes or sends
    bytes_held: int | None  # by their answers
    views: int | None  # answered since it began
    clients: int | None  # connections that ask for views
    threads: int | None  # that decode
    seconds: float | None  # since it began
    datasets: list[str]  # that are open


class WorkerList(TypedDict):
    workers: list[WorkerView]


@router.get("/workers", responses=responses())
def list_workers(service: Here) -> WorkerList:
    """List the decoding workers: the server's feed jobs, and the addresses of --feed."""
    return WorkerList(workers=workers(service))


def workers(service: Service) -> list[WorkerView]:
    """Return the server's running feed jobs, by what they told last, and the workers of --feed, which are asked."""
    jobs = [_of_job(job) for job in service.database.jobs(("running",), "feed", limit=1000)]
    addresses, span = service.settings.feeds, int(time.monotonic() / KEPT)
    if not addresses:
        return jobs
    with _asking:  # who comes meanwhile gets the same answers
        return jobs + list(_asked(addresses, service.site.feed_token, span))


def status(endpoint: "Endpoint", token: str | None = None, ca: bytes | None = None) -> dict[str, Any]:
    """Return a worker's account of itself, `online.connection.Status`. Raises UserError: why it gives none."""
    from pipeline.online.connection import Connection, Failure  # here, because it takes long to import

    try:
        return dict(Connection(endpoint, token, ca).status(PATIENCE))
    except Failure as failure:
        raise UserError(failure.reason) from failure


def _of_job(job: Job) -> WorkerView:
    told, uri, source = job.progress.get("status", {}), job.progress.get("uri"), f"job {job.id}"
    if not uri:
        return _view("", source, {}, "does not serve yet")
    if told and (age := time.time() - told.get("time", 0)) > LATE:
        return _view(uri, source, {}, f"has told nothing for {age:,.0f} s")
    return _view(uri, source, told)


def _view(address: str, source: str, told: dict[str, Any], error: str | None = None) -> WorkerView:
    view: dict[str, Any] = {key: told.get(key) for key in NUMBERS} | {"datasets": told.get("datasets", [])}
    view |= {"address": address, "source": source, "state": "silent" if error else "serving", "error": error}
    return cast(WorkerView, view)


@lru_cache(1)
def _asked(addresses: tuple[str, ...], token_file: Path, span: int) -> tuple[WorkerView, ...]:
    """Ask the workers at these addresses, all at once; `span` numbers the seconds in which the answers are used."""
    from pipeline.online.connection import TOKEN_FILE, secrets
    from pipeline.online.endpoints import parse

    try:
        token, ca = secrets()
        if TOKEN_FILE not in os.environ and token_file.is_file():
            token = token_file.read_text().strip()
    except (UserError, OSError) as error:
        return tuple(_view(address, FEED, {}, str(error)) for address in addresses)

    def resolve(address: str) -> "list[Endpoint]":
        return [endpoint for parsed in parse([address])[1] for endpoint in parsed.endpoints()]

    views, endpoints = list[WorkerView](), list["Endpoint"]()
    for address, resolved in zip(addresses, _outcomes(resolve, addresses)):
        if isinstance(resolved, UserError):
            views.append(_view(address, FEED, {}, str(resolved)))
        else:
            endpoints += resolved
    for endpoint, told in zip(endpoints, _outcomes(lambda one: status(one, token, ca), endpoints)):
        if isinstance(told, UserError):
            views.append(_view(endpoint.name, FEED, {}, str(told)))
        else:
            views.append(_view(endpoint.name, FEED, told))
    return tuple(views)


def _outcomes(ask: Callable[[T], R], items: Sequence[T]) -> list[R | UserError]:
    """Return for each item what `ask` returns, or why it fails; of those that take too long, that."""
    pool = ThreadPoolExecutor(MOST, "penstock-workers")
    futures = [pool.submit(ask, item) for item in items]
    done, _ = wait(futures, PATIENCE + 0.5)
    pool.shutdown(wait=False, cancel_futures=True)
    outcomes = list[R | UserError]()
    for future in futures:
        error = future.exception() if future in done else UserError(f"no answer within {PATIENCE:.0f} s")
        outcomes.append(error if isinstance(error, UserError) else future.result())
    return outcomes

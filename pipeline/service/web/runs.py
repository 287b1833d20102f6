"""Runs over HTTP, from their files alone: what was trained how far, metrics, checkpoints, figures, the page."""

import os
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, cast

import sqlalchemy as sql
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from typing_extensions import TypedDict  # pydantic takes typing's only from Python 3.12 on

from pipeline import UserError
from pipeline.service import curves, database, runs
from pipeline.service.database import Job, job_of
from pipeline.service.runs import CHECKPOINT, Checkpoint, Evaluation, Plan, evaluations, files_of, plan, steps
from pipeline.service.site import Missing, Site
from pipeline.service.web.context import Here, Service
from pipeline.service.web.files import sent
from pipeline.service.web.problem import responses
from pipeline.volumes import explained, open_regular

SHEET, REPORT, METRICS = r"[\w-]+\.png", r"report\.html", r"metrics\.jsonl"
OWN_PAGE = {  # its scripts are inline, and it is nobody's origin
    "Content-Security-Policy": "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:"
}
router = APIRouter(prefix="/v1", tags=["runs"])


class Figure(TypedDict):
    file: str
    bytes: int


class Error(TypedDict):
    """The top-1 error of a validation, in percent."""

    step: int
    top1_error: float


class RunSummary(TypedDict):
    """A run, from its files; None where they do not say."""

    name: str
    state: str | None  # of its newest training here, with its job
    job: int | None
    dataset: str | None  # the server's data set of that identity
    identity: str | None
    step: int
    steps: int | None
    epoch: float | None
    epochs: float | None
    loss: float | None
    lr: float | None
    images_per_second: float | None
    stall: float | None  # share of the time in which the device waited
    top1_error: float | None
    top5_error: float | None
    best: Error | None
    error: str | None  # a file that is damaged
    report: bool


class RunView(RunSummary):
    """A run, with what its files hold as they do."""

    recipe: dict[str, Any]
    history: list[dict[str, Any]]
    evaluations: list[Evaluation]


SUMMARY = frozenset(RunSummary.__annotations__)


class RunList(TypedDict):
    runs: list[RunSummary]


class CheckpointList(TypedDict):
    checkpoints: list[Checkpoint]


class FigureList(TypedDict):
    figures: list[Figure]


# ---- What pages show. ----


def summaries(service: Service) -> list[RunSummary]:
    """Return all runs, by their names."""
    names, views = service.site.run_names(), list[RunSummary]()
    trainings, identities = _trainings(service, names), _identities(service.site) if names else {}
    for name in names:
        try:
            view = _view(service.site.run(name), trainings.get(name), identities)
            views.append(cast(RunSummary, {key: value for key, value in view.items() if key in SUMMARY}))
        except Missing:  # deleted since, or a link that leads out
            continue
        except OSError as error:  # one that cannot be read hides no other
            known = {"name": name, "step": 0, "report": False, "error": explained(error)}
            views.append(cast(RunSummary, dict.fromkeys(SUMMARY) | known))
    return views


def summary(service: Service, name: str) -> RunView:
    """Return a run. Raises Missing."""
    return _view(service.site.run(name), _trainings(service, [name]).get(name), _identities(service.site))


def metrics(site: Site, name: str, after_step: int = 0) -> list[dict[str, Any]]:
    """Return lines of a run's metrics.jsonl by their steps, at most some thousands, without what is not drawn.

    Raises Missing.
    """
    return curves.of(site.run(name)).read().lines(after_step)


def checkpoints(site: Site, name: str) -> list[Checkpoint]:
    """Return the checkpoints of a run, by their steps. Raises Missing."""
    return runs.checkpoints(site.run(name))


def figures(site: Site, name: str) -> list[Figure]:
    """Return the figures of a run, by their names. Raises Missing."""
    files = files_of(site.run(name) / "figures", SHEET)
    return [Figure(file=file, bytes=status.st_size) for file, status in files.items()]


def _view(run: Path, job: Job | None, identities: dict[str, str]) -> RunView:
    lines = curves.of(run).read()
    trained, validated, best = lines.training.last, lines.validation.last, lines.best
    told, rated, error = Plan({}, [], {}, None), list[Evaluation](), lines.error
    try:
        told, rated = plan(run), evaluations(run)
    except UserError as damaged:
        error = error or str(damaged)
    saved = runs.checkpoints(run)
    newest = max((checkpoint["step"] or 0 for checkpoint in saved), default=0)
    return RunView(
        name=run.name,
        state=job.state if job else None,
        job=job.id if job else None,
        dataset=identities.get(told.identity or ""),
        identity=told.identity,
        step=max(newest, trained.step if trained else 0),
        steps=told.timing.get("steps") or (job and job.progress.get("total")) or steps(run, saved),
        epoch=trained.epoch if trained else None,
        epochs=told.timing.get("epochs"),
        loss=trained.loss if trained else None,
        lr=trained.lr if trained else None,
        images_per_second=trained.time.images_per_second if trained else None,
        stall=trained.time.stall if trained else None,
        top1_error=validated.top1_error if validated else None,
        top5_error=validated.top5_error if validated else None,
        best=Error(step=best.step, top1_error=best.top1_error) if best else None,
        error=error,
        report=bool(files_of(run, REPORT)),
        recipe=told.recipe,
        history=told.history,
        evaluations=rated,
    )


def _trainings(service: Service, names: Sequence[str]) -> dict[str, Job]:
    """Return the newest training of each run that has one."""
    table = database.jobs
    of_runs = sql.and_(table.c.kind == "train", table.c.target.in_(names))
    newest = sql.select(sql.func.max(table.c.id)).where(of_runs).group_by(table.c.target)
    with service.database.reading() as connection:
        rows = connection.execute(sql.select(table).where(table.c.id.in_(newest))).mappings()
        return {row["target"]: job_of(row) for row in rows}


def _identities(site: Site) -> dict[str, str]:
    """Return the names of the data sets by their identities."""
    names = dict[str, str]()
    for name in site.dataset_names():
        try:
            names[site.dataset(name).identity] = name
        except (UserError, OSError):  # damaged, or deleted since: its own page says so
            continue
    return names


# ---- The API. ----


@router.get("/runs", responses=responses())
def list_runs(service: Here) -> RunList:
    """List all runs, by their names."""
    return RunList(runs=summaries(service))


@router.get("/runs/{name}", responses=responses(404, 422))
def one(service: Here, name: str) -> RunView:
    """Return a run."""
    return summary(service, name)


FILE: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
Step = Annotated[int, Query(ge=0, le=2**53, description="Only lines past this step.")]


@router.get(
    "/runs/{name}/metrics",
    responses=responses(404, 416, 422) | {200: {"content": {"application/jsonl": {"schema": {"type": "string"}}}}},
    response_class=Response,
)
def metrics_file(service: Here, request: Request, name: str, after_step: Step = 0) -> Response:
    """Return the run's metrics as JSON lines: the whole lines past a step, or ranges of the file."""
    run, kind = service.site.run(name), "application/jsonl"
    if "range" in request.headers:
        return _sent(request, run, curves.FILE_NAME, METRICS, kind)
    return StreamingResponse(curves.newer(_opened(run, curves.FILE_NAME, METRICS), after_step), media_type=kind)


@router.get("/runs/{name}/checkpoints", responses=responses(404, 422))
def list_checkpoints(service: Here, name: str) -> CheckpointList:
    """List a run's checkpoints, by their steps."""
    return CheckpointList(checkpoints=checkpoints(service.site, name))


@router.get(
    "/runs/{name}/checkpoints/{file}",
    responses=responses(404, 416, 422) | {200: {"content": {"application/octet-stream": FILE}}},
    response_class=Response,
)
def checkpoint(service: Here, request: Request, name: str, file: str) -> Response:
    """Return a checkpoint, a safetensors file, by ranges."""
    return _sent(request, service.site.run(name) / "checkpoints", file, CHECKPOINT, "application/octet-stream")


@router.get("/runs/{name}/figures", responses=responses(404, 422))
def list_figures(service: Here, name: str) -> FigureList:
    """List a run's figures, by their names."""
    return FigureList(figures=figures(service.site, name))


@router.get(
    "/runs/{name}/figures/{file}",
    responses=responses(404, 416, 422) | {200: {"content": {"image/png": FILE}}},
    response_class=Response,
)
def figure(service: Here, request: Request, name: str, file: str) -> Response:
    """Return a figure, a PNG."""
    return _sent(request, service.site.run(name) / "figures", file, SHEET, "image/png")


@router.get(
    "/runs/{name}/report",
    responses=responses(404, 416, 422) | {200: {"content": {"text/html": {"schema": {"type": "string"}}}}},
    response_class=Response,
)
def report(service: Here, request: Request, name: str) -> Response:
    """Return the run's page, which shows itself in a sandbox."""
    return _sent(request, service.site.run(name), "report.html", REPORT, "text/html", **OWN_PAGE)


def _sent(request: Request, folder: Path, name: str, pattern: str, kind: str, **more: str) -> Response:
    """Return a file of a run. Its ETag is of its inode, bytes and time: files of a run are replaced, or grow."""
    file = _opened(folder, name, pattern)
    status = os.fstat(file.fileno())
    return sent(request, file, f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"', kind, **more)


def _opened(folder: Path, name: str, pattern: str) -> BufferedReader:
    """Open a file that is among those in the folder. Raises Missing."""
    files = files_of(folder, pattern)
    try:
        if name in files:
            return open_regular(folder / name)
    except FileNotFoundError:  # deleted since
        pass
    raise Missing(f"{name:.80}: no such file of this run; there are: {', '.join(files) or 'none'}")

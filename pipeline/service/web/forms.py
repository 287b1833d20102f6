"""The dashboard's forms: they make and end jobs, and lead to the page of the job."""

import secrets
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, Request
from fastapi.responses import RedirectResponse, Response

from pipeline import UserError
from pipeline.manifest import BuildRecipe
from pipeline.service.kinds import KINDS
from pipeline.service.web import jobs
from pipeline.service.web.context import Here, Service
from pipeline.service.web.pages import render
from pipeline.service.web.problem import Problem

FIELDS = 100  # of a form at most
ON_PAGE = ("build", "train", "verify", "feed")  # kinds with a form on /new; others have a button where they belong
CHOICES = ("crop", "filter", "subsampling", "exif")  # fields of a build recipe that have a few values
RECIPES = Path(__file__).parents[3] / "trainer" / "recipes"  # beside us in the checkout and in a wheel
router = APIRouter(include_in_schema=False)


async def _fields(request: Request) -> dict[str, str]:
    """Return the fields of a form. Raises Problem: they are none."""
    try:
        return dict(parse_qsl((await request.body()).decode(), max_num_fields=FIELDS, errors="strict"))
    except ValueError as error:
        raise Problem(400, "the body is no form: fields in UTF-8, NAME=VALUE, with & between them") from error


Fields = Annotated[dict[str, str], Depends(_fields)]


@router.get("/new")
def new(request: Request, service: Here) -> Response:
    """Show the forms of new jobs, with values of the query."""
    if request.state.scope != "write":
        raise Problem(403, "this token allows reading alone; log in with one of --scope write")
    return _page(request, service, dict(request.query_params))


def _page(request: Request, service: Service, values: dict[str, str], kind: str = "", error: str = "") -> Response:
    """Return the page of the forms: where a form has been refused, with its values, and with the reason beside it."""
    starts = {name: (f"{name} ", f"{name}.", f"{name}:", f"{value}:") for name, value in values.items() if value}
    wrong = next((name for name, words in starts.items() if error.startswith(words)), "")
    site, fields = service.site, BuildRecipe.__dataclass_fields__
    known: dict[str, Any] = {"datasets": site.dataset_names(), "runs": site.run_names(), "raw_roots": site.raw_roots}
    known |= {"choices": {name: fields[name].metadata["choices"] for name in CHOICES}, "key": secrets.token_hex(16)}
    known["recipes"] = sorted(path.stem for path in RECIPES.glob("*.toml"))
    known["gpus"] = len(service.queue.slots.gpus)
    status = 422 if error else 200
    return render(request, "new.html", status, kind=kind, values=values, error=error, wrong=wrong, **known)


@router.post("/new/{kind}")
def submit(request: Request, service: Here, kind: str, fields: Fields) -> Response:
    """Submit the job of a form, and lead to it; a form that is sent twice makes one job."""
    if kind not in KINDS:
        raise Problem(404, f"{kind:.40}: no such kind of job; there are: {', '.join(KINDS)}")
    try:
        job = jobs.create(service, {"kind": kind, **_params(fields)}, fields.get("key"))
    except UserError as error:
        if kind not in ON_PAGE or "resume" in fields:
            raise
        return _page(request, service, fields, kind, str(error))
    return RedirectResponse(f"/jobs/{job.id}", 303)


def _params(fields: dict[str, str]) -> dict[str, Any]:
    """Return a job's parameters of a form's fields: empty ones are left out, lists are taken apart.

    Raises UserError: a line of `set` is no KEY=VALUE.
    """
    params: dict[str, Any] = {name: value.strip() for name, value in fields.items() if value.strip() and name != "key"}
    if "feed" in params:
        params["feed"] = params["feed"].replace(",", " ").split()
    if "set" in params:
        lines = [line.strip() for line in params["set"].splitlines() if line.strip()]
        for line in lines:
            if "=" not in line:
                raise UserError(f"set {line:.100}: no KEY=VALUE; write one a line, such as train.steps=100")
        params["set"] = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    return params


@router.post("/jobs/{number}/cancel")
def cancel(service: Here, number: jobs.Number) -> Response:
    """Cancel a job, and lead back to it."""
    jobs.cancel(service, number)
    return RedirectResponse(f"/jobs/{number}", 303)


@router.post("/jobs/{number}/retry")
def retry(service: Here, number: jobs.Number) -> Response:
    """Submit a job anew, and lead to the new one."""
    return RedirectResponse(f"/jobs/{service.queue.retry(number).id}", 303)

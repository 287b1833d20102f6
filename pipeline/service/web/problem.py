"""Errors as problem details (RFC 9457), in the words of the command line."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict  # pydantic takes typing's only from Python 3.12 on

from pipeline import UserError
from pipeline.service.kinds import explained
from pipeline.service.site import Missing

WORDS = {
    400: "the request cannot be read",
    401: "a token is missing, wrong, or revoked",
    403: "the token allows reading alone, or the request comes from another site",
    404: "there is nothing of that name",
    409: "the state of the thing does not allow it",
    413: "the body is too long",
    416: "the file has no such bytes",
    422: "a value is not allowed",
    429: "too many requests; try again later",
    503: "the server is busy, or not ready",
}


class Details(TypedDict):
    """Problem details, RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what an endpoint declares in OpenAPI about the problems that it may answer with."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Details"}}}
    return {status: {"description": WORDS[status], "content": content} for status in (400, 401, 403, *statuses)}


class Problem(Exception):
    """An answer with a status other than 2xx, and one line that says why and what to do."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


def response(request: Request, status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """Return a problem as JSON; a page that people look at has it as a page."""
    api = request.url.path.startswith("/v1") or "text/html" not in request.headers.get("accept", "")
    render = getattr(request.app.state, "error_page", None)
    if render and not api:
        page: Response = render(request, status, detail)
        page.headers.update(headers or {})
        return page
    content = Details(
        type="about:blank",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        instance=request.url.path,
    )
    return JSONResponse(content, status, headers, media_type="application/problem+json")


def no_database(request: Request, error: SQLAlchemyError) -> Response:
    """Return the problem of a database that is lost, or full."""
    reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
    return response(request, 503, f"the database does not answer: {reason}; try again", {"Retry-After": "1"})


def install(app: FastAPI) -> None:
    """Let every error of the app be a problem."""

    @app.exception_handler(Problem)
    def problem(request: Request, error: Problem) -> Response:
        return response(request, error.status, error.detail, error.headers)

    @app.exception_handler(UserError)
    def user_error(request: Request, error: UserError) -> Response:
        return response(request, 404 if isinstance(error, Missing) else 422, str(error))

    app.exception_handler(SQLAlchemyError)(no_database)

    @app.exception_handler(OSError)
    def no_file(request: Request, error: OSError) -> Response:
        lost = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return response(request, 503, f"a file of the server cannot be used: {lost}", {"Retry-After": "10"})

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        return response(request, 422, explained(error.errors()))

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        detail = f"{request.url.path}: {str(error.detail).lower()}"
        return response(request, error.status_code, detail, dict(error.headers or {}))

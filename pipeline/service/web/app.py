"""The ASGI application: every router, the errors, the OpenAPI document."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from penstock import __version__
from pipeline.service.web import (
    access,
    datasets,
    files,
    forms,
    holdings,
    jobs,
    metrics,
    pages,
    problem,
    runs,
    workers,
)
from pipeline.service.web.context import Service

ROUTERS = (
    *(access.router, jobs.router, datasets.router, runs.router, workers.router, metrics.router),
    *(pages.router, holdings.router, forms.router),
    files.router,  # last: it takes every name in a data set
)


def create(service: Service) -> FastAPI:
    """Return the application of a server, whose scheduler runs while it does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        streaming = asyncio.create_task(service.stream.run())
        service.scheduler.start()
        try:
            yield
        finally:
            streaming.cancel()
            with suppress(asyncio.CancelledError):
                await streaming

    app = FastAPI(
        title="Penstock",
        version=__version__,
        summary="Builds, data sets, runs and workers in one place",
        openapi_url="/v1/openapi.json",
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service, app.state.error_page = service, pages.error_page
    for name in pages.PAGES.list_templates():  # else many first requests compile them at once
        pages.PAGES.get_template(name)
    for router in ROUTERS:
        for route in router.routes:  # FastAPI, unlike Starlette, does not answer HEAD where it answers GET
            if isinstance(route, APIRoute) and route.methods == {"GET"} and not route.include_in_schema:
                route.methods.add("HEAD")
        app.include_router(router)
    problem.install(app)
    access.protect(app, service)
    metrics.observe(app, service)  # outermost, to count refusals too
    _describe_problems(app)
    return app


def _describe_problems(app: FastAPI) -> None:
    """Put the schema of problem details into the OpenAPI document, for every 422 too."""
    made = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schemas = made().setdefault("components", {}).setdefault("schemas", {})
            schemas["Details"] = TypeAdapter(problem.Details).json_schema()
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for operations in made()["paths"].values():
                for operation in operations.values():
                    if "422" in operation["responses"]:
                        operation["responses"]["422"] = problem.responses(422)[422]
        return made()

    app.openapi = document  # type: ignore[method-assign]

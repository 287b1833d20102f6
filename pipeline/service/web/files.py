"""The files of data sets over HTTP: whole and by ranges, each under its SHA-256."""

import hashlib
import html
import os
import re
from contextlib import ExitStack
from io import BufferedReader
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import Message, Receive, Scope, Send
from typing_extensions import TypedDict  # pydantic takes typing's only from Python 3.12 on

from pipeline.manifest import FILE_NAME, DatasetError, FileRecord, Manifest
from pipeline.service.site import Site
from pipeline.service.web.context import Here
from pipeline.service.web.problem import Problem, responses
from pipeline.volumes import open_regular

TYPES = {".tar": "application/x-tar", ".json": "application/json", ".jsonl": "application/jsonl", ".png": "image/png"}
OTHER_TYPE = "application/octet-stream"
CONTENT: dict[str, Any] = {kind: {"schema": {}} for kind in (*TYPES.values(), OTHER_TYPE)}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file, or a folder's page of links", "content": CONTENT | {"text/html": {"schema": {}}}},
    206: {"description": "The ranges asked for", "content": CONTENT | {"multipart/byteranges": {"schema": {}}}},
    304: {"description": "The file has the SHA-256 of If-None-Match"},
    307: {"description": "The folder's own URL, which ends in /"},
}
RANGE = r"([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18})"  # first and last byte; or the number of bytes at the end
TRIES = 3  # while a data set is being replaced
router = APIRouter(prefix="/v1/datasets", tags=["files"])


class File(TypedDict):
    """A file; `name` is its path below the folder listed."""

    name: str
    bytes: int
    sha256: str


class Listing(TypedDict):
    """All files below a folder of a data set."""

    files: list[File]


@router.head("/{name}/", include_in_schema=False)
@router.get("/{name}/", responses=responses(404, 422) | {200: {"model": Listing, "content": {"text/html": {}}}})
def listing(service: Here, request: Request, name: str) -> Response:
    """List a data set's files: as JSON to who accepts that, else as a page of links."""
    return _folder(service.site, request, name, "")


@router.head("/{name}/{path:path}", include_in_schema=False)
@router.get("/{name}/{path:path}", responses=responses(404, 416, 422, 503) | ANSWERS, response_class=Response)
def file(service: Here, request: Request, name: str, path: str) -> Response:
    """Return a file of a data set, whole or by ranges; its ETag is its SHA-256. A path that ends in / is a folder."""
    names = {FILE_NAME, *service.site.dataset(name).files}
    if path not in names:
        if any(file.startswith(f"{path}/") for file in names):
            return RedirectResponse(f"{path.rpartition('/')[2]}/")
        return _folder(service.site, request, name, path)
    stored, record = _opened(service.site, name, path)
    return sent(request, stored, f'"{record.sha256}"', TYPES.get(os.path.splitext(path)[1], OTHER_TYPE))


def sent(request: Request, stored: BufferedReader, etag: str, kind: str, **more: str) -> Response:
    """Return the bytes of an open file, all or some ranges of them, or 304; the answer closes it.

    Raises Problem: it has none of the bytes asked for.
    """
    headers = {"ETag": etag, "Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"} | more
    asked, size = request.headers, os.fstat(stored.fileno()).st_size
    with ExitStack() as stack:
        stack.enter_context(stored)
        if {etag, "*"} & {tag.strip().removeprefix("W/") for tag in asked.get("if-none-match", "").split(",")}:
            return Response(status_code=304, headers=headers)
        heeded = request.method == "GET" and asked.get("if-range", etag) == etag
        answer = _Stored(stored, headers, kind, _satisfiable(asked.get("range", ""), size) if heeded else "")
        stack.pop_all()  # the answer closes the file
        return answer


class _Stored(FileResponse):
    """Bytes of an open file, which stay the same when another takes its name meanwhile."""

    chunk_size = 2**20

    def __init__(self, file: BufferedReader, headers: dict[str, str], kind: str, ranges: str) -> None:
        self._file, self._ranges = file, ranges
        status = os.fstat(file.fileno())
        super().__init__(f"/proc/self/fd/{file.fileno()}", 200, headers, kind, stat_result=status)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        own = [(b"range", self._ranges.encode())] if self._ranges else []
        headers = [pair for pair in scope["headers"] if pair[0] not in (b"range", b"if-range")]
        left = int(self.headers["content-length"])

        async def bounded(message: Message) -> None:
            nonlocal left
            if message["type"] == "http.response.body" and not own:  # of a file that has grown, no more than promised
                message["body"] = message["body"][:left]
                left -= len(message["body"])
            await send(message)

        with self._file:
            await super().__call__(dict(scope) | {"headers": headers + own}, receive, bounded)


def _satisfiable(header: str, size: int) -> str:
    """Return a Range header with those of its ranges that a file of `size` bytes has; "" if it is not to be heeded.

    Raises Problem: the file has none of them.
    """
    if not re.fullmatch(rf"bytes=\s*({RANGE})(\s*,\s*({RANGE}))*\s*", header, re.ASCII | re.IGNORECASE):
        return ""
    ranges = [match.groups() for match in re.finditer(RANGE, header)]
    if any(last and int(last) < int(first) for first, last, _ in ranges):
        return ""
    inside = [f"{a or ''}-{b or c or ''}" for a, b, c in ranges if size and (int(a) < size if a else int(c) > 0)]
    if not inside:
        raise Problem(416, f"{header:.80}: the file has {size} bytes", {"Content-Range": f"bytes */{size}"})
    return f"bytes={','.join(inside)}"


def _opened(site: Site, name: str, path: str) -> tuple[BufferedReader, FileRecord]:
    """Open a file of a data set; return it, and the record that holds for exactly this file."""
    for _ in range(TRIES):
        data = site.dataset(name)
        stored, record = _open(site, name, path, data)
        if site.dataset(name) is data:  # else the file is perhaps that of another data set, and has its length
            return stored, record
        stored.close()
    raise Problem(503, f"{name}: is being replaced; ask again", {"Retry-After": "1"})


def _open(site: Site, name: str, path: str, data: Manifest) -> tuple[BufferedReader, FileRecord]:
    real = os.path.realpath(data.root / path)
    if (path != FILE_NAME and path not in data.files) or not real.startswith(os.path.realpath(site.datasets) + os.sep):
        raise Problem(404, f"{name}/{path}: no such file, or a link that leads out of the server's data sets")
    remedy = "mend it by a job of the kind verify with repair=RAW"
    try:
        stored = open_regular(real)
    except OSError as error:
        raise DatasetError(f"{name}/{path}: {error.strerror}; {remedy}") from error
    size = os.fstat(stored.fileno()).st_size
    record = data.files.get(path) or FileRecord(size, hashlib.file_digest(stored, "sha256").hexdigest())
    if size != record.bytes:
        stored.close()
        raise DatasetError(f"{name}/{path}: has {size} bytes, the manifest promises {record.bytes}; {remedy}")
    return stored, record


def _folder(site: Site, request: Request, name: str, path: str) -> Response:
    """Return a folder's files: all below it as JSON, or a page of links to what is in it."""
    own, record = _opened(site, name, FILE_NAME)
    own.close()
    records = {FILE_NAME: record, **site.dataset(name).files}
    below = {file.removeprefix(path): records[file] for file in sorted(records) if file.startswith(path)}
    if not below or not f"/{path}".endswith("/"):
        raise Problem(404, f"{name}/{path:.120}: no such file; see /v1/datasets/{name}/ for those there are")
    headers = {"Cache-Control": "private, no-cache", "Vary": "Accept"}
    if "application/json" in request.headers.get("accept", ""):
        files = [File(name=file, bytes=entry.bytes, sha256=entry.sha256) for file, entry in below.items()]
        return JSONResponse(Listing(files=files), headers=headers)
    entries = dict.fromkeys("".join(file.partition("/")[:2]) for file in below)  # a folder's name ends in /
    links = "".join(f'<li><a href="{html.escape(entry)}">{html.escape(entry)}</a>\n' for entry in entries)
    title = html.escape(f"{name}/{path}")
    return HTMLResponse(f"<!doctype html><title>{title}</title>\n<ul>\n{links}</ul>\n", headers=headers)

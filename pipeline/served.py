"""The files of an HTTP server: what `storage` calls of an fsspec file system to read, by exact ranges, and no more.

fsspec's own takes a whole file for the range it asked for and every error for a missing file, and lists no sizes.
"""

import errno
import os
import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from http.client import HTTPException
from typing import Any, NoReturn, TypedDict
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit

from pipeline import UserError
from pipeline.typed import Count, from_json

TOKEN, SERVER = "PENSTOCK_TOKEN", "PENSTOCK_URL"  # of the environment; the token is for that server, if it is named
SILENCE = 30.0  # seconds without a byte after which a request has failed
LISTED_BYTES = 64 * 2**20  # of a listing
PORTS = {"http": 80, "https": 443}
_answered = set[tuple[str, str | None, int | None]]()  # servers


class Denied(OSError):
    """An answer of a status that is an error, other than "not found"."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status


class File(TypedDict):
    """A file of a listing; `name` is its path below the folder listed."""

    name: str
    bytes: Count


class Listing(TypedDict):
    """The answer of `penstock serve` to the question what files a data set has."""

    files: list[File]


class ServedFiles:
    """Threads may share it. All methods raise OSError, for what may pass too, and UserError for what lasts."""

    def info(self, url: str) -> dict[str, Any]:
        """Return `type`, `size` in bytes and `ETag` of a file, or of a folder, whose URL ends in "/"."""
        with _head(url) as answer:
            kind = "directory" if answer.url.endswith("/") else "file"
            size = answer.headers.get("Content-Length", "0" if kind == "directory" else "")
            if not size.isdecimal():
                raise UserError(f"{url}: the server does not say how many bytes it has (no Content-Length)")
            return {"type": kind, "size": int(size), "ETag": answer.headers.get("ETag", "")}

    def cat_file(self, url: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`, fewer only at the end of the file."""
        try:
            with _answer(url, Range=f"bytes={start}-{end - 1}") as answer:
                span = re.fullmatch(r"bytes ([0-9]+)-([0-9]+)/.*", answer.headers.get("Content-Range", ""))
                if answer.status != 206 or not span or int(span[1]) != start or int(span[2]) >= end:
                    reason = f"the server answers with other bytes than those asked for (status {answer.status})"
                    raise UserError(f"{url}: {reason}; use one that knows ranges: penstock serve, nginx, Apache")
                data: bytes = answer.read(end - start)
        except Denied as error:
            if error.status == 416:  # nothing is there
                return b""
            raise
        if len(data) != int(span[2]) + 1 - start:
            raise OSError(errno.EIO, f"the answer broke off after {len(data)} bytes")
        return data

    def find(self, url: str, detail: bool = True) -> dict[str, dict[str, int]]:
        """Return the URLs of all files below a folder, with `size`, if the server is one of `penstock serve`."""
        folder = url.rstrip("/")
        with _answer(f"{folder}/", Accept="application/json") as answer:
            if answer.headers.get_content_type() != "application/json":
                raise UserError(f"{url}: the server lists no files; only `penstock serve` does, those of a data set")
            data = answer.read(LISTED_BYTES)
        try:
            files = from_json(data, Listing)["files"]
        except UserError as error:
            raise UserError(f"{url}: the server lists no files ({error})") from error
        return {f"{folder}/{file['name']}": {"size": file["bytes"]} for file in files}

    def ls(self, url: str, detail: bool = True) -> list[dict[str, Any]]:
        """Return `name`, `type` and `size` of the entries of a folder."""
        folder, entries = url.rstrip("/"), dict[str, dict[str, Any]]()
        for file, info in self.find(url).items():
            entry, _, deeper = file[len(folder) + 1 :].partition("/")
            size, kind = (0, "directory") if deeper else (info["size"], "file")
            entries[entry] = {"name": f"{folder}/{entry}", "type": kind, "size": size}
        return list(entries.values())

    def invalidate_cache(self, url: str) -> None:
        """Keep nothing: every answer is new."""

    def _strip_protocol(self, url: str) -> str:
        return url.rstrip("/")

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise UserError("files of an HTTP server can only be read; name a folder, or an object store")

    put_file = pipe_file = rm_file = rmdir = _refuse


def is_restarting(url: str, error: Exception) -> bool:
    """Return whether nobody listens where a server has answered this process before."""
    return isinstance(error, ConnectionRefusedError) and _origin(url) in _answered


@contextmanager
def _head(url: str) -> Iterator[Any]:
    """Yield the answer to HEAD; an error's words, which HEAD does not bring, are those of GET."""
    try:
        with _answer(url, "HEAD") as answer:
            yield answer
    except Denied:
        with _answer(url):
            raise


@contextmanager
def _answer(url: str, method: str = "GET", **headers: str) -> Iterator[Any]:
    """Yield the answer to a request, whose errors are OSError."""
    request = urllib.request.Request(quote(url, safe="%/:?=&#[]@!$'()*+,;~"), headers=headers, method=method)
    if token := _token(url):
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # stays where it was sent to
    try:
        with _opener().open(request, timeout=SILENCE) as answer:
            _answered.add(_origin(url))
            yield answer
    except HTTPError as error:
        with error:
            if error.code in (404, 410):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
            raise Denied(error.code, _detail(error)) from error
    except URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else OSError(errno.EIO, error.reason) from error
    except HTTPException as error:
        raise ConnectionError(errno.EIO, f"the answer broke off ({error!r:.80})") from error


@cache
def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.build_opener()
    opener.addheaders = [("User-Agent", "penstock")]
    return opener


def _token(url: str) -> str:
    """Return the token of the environment if it is meant for the server of `url`; else ""."""
    token, server = os.environ.get(TOKEN, "").strip(), os.environ.get(SERVER, "")
    if not re.fullmatch(r"[!-~]*", token):
        raise UserError(f"{TOKEN}: holds more than the characters of a token; set it to one token alone")
    return token if not server or _origin(server) == _origin(url) else ""


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or PORTS.get(parts.scheme)


def _detail(error: HTTPError) -> str:
    """Return what the server says of an error, by problem details (RFC 9457), else the words of its status."""
    with suppress(OSError, HTTPException, ValueError):
        if error.headers.get_content_type() == "application/problem+json":
            return str(from_json(error.read(2**16), dict[str, Any]).get("detail", error.reason))
    return str(error.reason)

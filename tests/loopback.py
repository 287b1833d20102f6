"""The server's application with a few endpoints more, served on loopback by a thread of the tests' own process."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response

from pipeline.service import tokens
from pipeline.service.database import Database, url_of
from pipeline.service.queue import Queue, Slots
from pipeline.service.scheduler import Scheduler
from pipeline.service.serve import config
from pipeline.service.site import Site
from pipeline.service.web import app
from pipeline.service.web.context import Service, Settings

PATIENCE = 30.0  # seconds for anything that a test waits for
BIG = 32 * 2**20  # bytes of the answer of /v1/big, more than all the buffers of a connection


class Loopback:
    """A running server. `calls` has what its own POST endpoints have been sent; `client` is an httpx.Client of it."""

    def __init__(self, folder: Path, certificate: Path | None, **settings: Any) -> None:
        site = Site(Path(os.path.realpath(folder)), ())
        site.root.mkdir(exist_ok=True)
        site.make()
        self.database = Database(url_of(site.root, None))
        queue = Queue(site, self.database, Slots())
        scheduler = Scheduler(queue, self.database, 1.0)
        self.service = Service(site, self.database, queue, scheduler, Settings(**settings))
        self.calls: list[bytes] = []
        listening = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = listening.getsockname()[1]
        self.app = self._application()
        tls = {"ssl_certfile": certificate, "ssl_keyfile": certificate} if certificate else {}
        self.server = uvicorn.Server(config(self.app, **tls))
        self.thread = threading.Thread(target=self.server.run, args=([listening],))
        self.thread.start()
        self.until(lambda: self.server.started)
        self.client = self.another()

    def another(self, token: str = "", **options: Any) -> httpx.Client:
        """Return a client of its own, with a token."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=PATIENCE, **options)

    def token(self, scope: str = "write", **options: Any) -> str:
        return tokens.create(self.database, scope, **options)[1]

    def _application(self) -> FastAPI:
        web = app.create(self.service)

        async def record(request: Request) -> dict[str, str]:
            self.calls.append(await request.body())
            return {"scope": request.state.scope}

        for path in ("/v1/record", "/record"):
            web.post(path, response_model=None)(record)

        @web.post("/v1/unread", response_model=None)
        def unread(request: Request) -> dict[str, str]:
            self.calls.append(b"")
            return {"scope": request.state.scope}

        @web.get("/v1/scope", response_model=None)
        def scope(request: Request) -> dict[str, str]:
            return {"scope": request.state.scope}

        @web.get("/v1/defect", response_model=None)
        def defect() -> None:
            raise RuntimeError("a defect of the tests")

        @web.get("/v1/big", response_model=None)
        def big() -> Response:
            return Response(bytes(BIG), media_type="application/octet-stream")

        return web

    def connection(self, data: bytes = b"", buffer: int = 0) -> socket.socket:
        """Return a new connection, on which `data` has been sent; `buffer`: bytes that its system keeps unread."""
        raw = socket.socket()
        if buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        raw.settimeout(PATIENCE)
        raw.connect(("127.0.0.1", self.port))
        raw.sendall(data)
        return raw

    def exchange(self, data: bytes) -> bytes:
        """Send bytes, and return all that comes until the server ends the connection."""
        with self.connection(data) as raw:
            return rest(raw)

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self.server.server_state.connections)

    @staticmethod
    def until(condition: Callable[[], Any]) -> None:
        """Wait until a condition is true."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "waited for too long"
            time.sleep(0.01)

    def end(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        self.service.scheduler.stop(False)
        self.database.close()


def rest(raw: socket.socket) -> bytes:
    """Return all that still comes on a connection, until its end; a reset is an end."""
    pieces = []
    try:
        while piece := raw.recv(2**16):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


@contextmanager
def loopback(folder: Path, certificate: Path | None = None, **settings: Any) -> Iterator[Loopback]:
    """Yield a server of `folder`, over TLS with a certificate (PEM, with its key); it has ended afterwards."""
    server = Loopback(folder, certificate, **settings)
    try:
        yield server
    finally:
        server.end()

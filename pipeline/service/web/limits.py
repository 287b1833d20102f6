"""Bounds of connections and requests: how many, how long, how large."""

import asyncio
import json
import math
import socket
from typing import Any

import h11
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol
from uvicorn.protocols.utils import is_ssl

from pipeline.service.web.problem import response

CONNECTIONS = 512
HEADERS = 32 * 2**10  # bytes of a request's headers
BODY = 64 * 2**10  # bytes of a request's body
ASKS_WITHIN = 10.0  # seconds from a connection's start, or the end of an answer, to the end of a request's headers
SENDS_WITHIN = 10.0  # seconds from there to the end of its body
TAKES_WITHIN = 60.0  # seconds in which a client has to take a byte of an answer, if there is one


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with a bound on connections, on slow requests, and on clients that do not read."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._asking: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        # whatever a client has not taken yet pauses the writing, so that nothing is added before it has; TLS's
        # transport would be paused by 0 bytes, too
        transport.set_write_buffer_limits(high=int(is_ssl(transport)), low=0)
        own = transport.get_extra_info("socket")
        # asyncio does this where a socket knows its protocol; without it the body of an answer waits 40 ms for its head
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # a client that vanished without a word: the system would try for a quarter of an hour
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(TAKES_WITHIN * 1000))
        if len(self.connections) > CONNECTIONS:
            self._refuse(503, f"{CONNECTIONS} connections are open; try again later")
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # 5 s, as long as clients keep a connection: they would meet its end
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._asking, self._taking):
            if timer:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_less_than(math.inf)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taking:
            self._taking.cancel()

    def _watch(self) -> None:
        """Wait for a request, not for ever, while none is being answered."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._asking:
            self._asking.cancel()
            self._asking = None
        elif not answering and not self._asking and not self.transport.is_closing():
            self._asking = self.loop.call_later(ASKS_WITHIN, self._end)

    def _end(self) -> None:
        if self.conn.trailing_data[0]:  # it has begun to ask
            self._refuse(408, f"the headers took longer than {ASKS_WITHIN:.0f} s")
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, detail: str) -> None:
        """Answer, unless an answer has begun already, and end the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(_problem(status, detail))
        self.transport.close()

    def _expect_less_than(self, unsent: float) -> None:
        """End the connection unless fewer bytes wait to be sent than at the last look; look again in a while."""
        now = self.transport.get_write_buffer_size()  # which only shrinks, while the writing is paused
        if now >= unsent:
            self.transport.abort()
        else:
            self._taking = self.loop.call_later(TAKES_WITHIN, self._expect_less_than, now)


class Bounded:
    """ASGI middleware: a request reaches the app with its whole body, which is short, and has come in time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            async with asyncio.timeout(SENDS_WITHIN):
                body = await _body(receive)
        except TimeoutError:
            late = f"the body took longer than {SENDS_WITHIN:.0f} s"
            return await response(Request(scope), 408, late, {"Connection": "close"})(scope, receive, send)
        if body is None:
            return
        if len(body) > BODY:  # the connection stays, and what else comes is dropped: a reset would lose the answer
            long = f"the body is longer than {BODY:,} bytes"
            return await response(Request(scope), 413, long)(scope, receive, send)
        whole = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def received() -> Message:
            return next(whole, None) or await receive()

        await self._app(scope, received, send)


async def _body(receive: Receive) -> bytes | None:
    """Return a request's body, of a long one the beginning; None if the client has gone."""
    body, more = b"", True
    while more and len(body) <= BODY:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _problem(status: int, detail: str) -> bytes:
    """Return an answer that is sent before there is a request."""
    reason = STATUS_PHRASES[status].decode()
    body = json.dumps({"type": "about:blank", "title": reason, "status": status, "detail": detail})
    headers = f"Content-Type: application/problem+json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    retry = "Retry-After: 10\r\n" if status == 503 else ""
    return f"HTTP/1.1 {status} {reason}\r\n{headers}{retry}\r\n{body}".encode()

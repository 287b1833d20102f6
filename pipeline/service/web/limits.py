"""Bounds of connections and requests: how many, how long, how large."""

import asyncio
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 512
HEADERS = 32 * 2**10  # bytes of a request's headers
BODY = 64 * 2**10  # bytes of a request's body
ASKS_WITHIN = 10.0  # seconds from the end of an answer, or the connection's start, to a request's last header
SENDS_WITHIN = 10.0  # seconds between two pieces of a request's body
TAKES_WITHIN = 60.0  # seconds in which a client takes what the system buffers of an answer
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 10\r\nConnection: close\r\n"
    b"Content-Type: application/problem+json\r\nContent-Length: 93\r\n\r\n"
    b'{"type":"about:blank","title":"Service Unavailable","status":503,"detail":"too many clients"}'
)


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with a bound on connections, on slow requests, and on clients that do not read."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._asking: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if len(self.connections) >= CONNECTIONS:
            transport.write(BUSY)
            transport.close()
            return
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._asking, self._taking):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = self.loop.call_later(TAKES_WITHIN, self.transport.abort)

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
        elif not answering and not self._asking:
            self._asking = self.loop.call_later(ASKS_WITHIN, self.transport.close)


class Bounded:
    """ASGI middleware: a request's body is short, and comes in time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        received, ended = 0, False

        async def bounded() -> Message:
            nonlocal received, ended
            if ended:  # what is waited for now is the client's end
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), SENDS_WITHIN)
            except TimeoutError:
                raise HTTPException(408, f"the body stood still for {SENDS_WITHIN:.0f} s") from None
            received += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if received > BODY:
                raise HTTPException(413, f"the body is longer than {BODY:,} bytes")
            return message

        await self._app(scope, bounded, send)

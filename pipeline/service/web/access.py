"""Access: tokens and sessions, the request's host and origin, and the headers of every answer."""

import asyncio
import ipaddress
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeAlias
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.service import tokens
from pipeline.service.tokens import SESSION, Token
from pipeline.service.web.context import Here, Service
from pipeline.service.web.limits import BODY, Bounded
from pipeline.service.web.problem import Problem, response

COOKIE = "penstock_session"
OPEN = ("/healthz", "/login", "/static/")  # paths that need no token
SAFE = ("GET", "HEAD", "OPTIONS")
LOGINS, MINUTE = 10, 60.0  # failed ones in so many seconds, of all clients
RECHECK = 10.0  # seconds after which a stream of events looks whether its token is still valid
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain")  # that a foreign page can send
POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:", "connect-src 'self'"),
        *("form-action 'self'", "frame-ancestors 'none'", "base-uri 'none'"),
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
Recheck: TypeAlias = Callable[[], Awaitable[Token | None]]
router = APIRouter(include_in_schema=False)


def protect(app: FastAPI, service: Service) -> None:
    """Let every request pass through `Access` and `Bounded`."""
    app.state.failed_logins = deque(maxlen=LOGINS)
    app.add_middleware(Bounded)
    app.add_middleware(Access, service=service, owner=app)


class Access:
    """ASGI middleware: refuses who may not ask, sets request.state.scope ("read" or "write"), adds HEADERS."""

    def __init__(self, app: ASGIApp, service: Service, owner: FastAPI) -> None:
        self._app, self._service, self._owner = app, service, owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope.setdefault("app", self._owner)
        guarded = _Sender(send)
        try:
            await self._admit(scope, guarded)
        except Problem as refusal:
            answer = self._answer(Request(scope), refusal)
            return await answer(scope, receive, guarded)
        await self._app(scope, receive, guarded)

    async def _admit(self, scope: Scope, sender: "_Sender") -> None:
        headers = Headers(scope=scope)
        self._require_host(headers.get("host", ""))
        if scope["method"] not in SAFE:
            _require_own_origin(headers)
        if int(headers.get("content-length", "0")) > BODY:
            raise Problem(413, f"the body is longer than {BODY:,} bytes", {"Connection": "close"})
        state = scope.setdefault("state", {})
        state["scope"], state["token"] = ("none" if self._service.settings.tokens_required else "write"), None
        if token := await self._token(scope, headers):
            state["scope"], state["token"] = token.scope, token
            sender.recheck = lambda: self._token(scope, headers)
        path = scope["path"]
        if state["scope"] == "none" and not (path in OPEN or path.startswith(OPEN[-1])):
            raise Problem(401, "a token is needed: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        if state["scope"] == "read" and scope["method"] not in SAFE and path not in ("/login", "/logout"):
            raise Problem(403, "this token allows reading alone; ask with one of --scope write")

    async def _token(self, scope: Scope, headers: Headers) -> Token | None:
        """Return the token of a request, or of its session. Raises Problem: it has one that is not valid."""
        given = headers.get("authorization")
        if given is not None:
            kind, _, text = given.partition(" ")
            token = await asyncio.to_thread(tokens.verify, self._service.database, text.strip())
            if kind.lower() != "bearer" or token is None:
                remedy = "see `penstock token list`"
                raise Problem(401, f"the token is wrong, expired or revoked; {remedy}", {"WWW-Authenticate": "Bearer"})
            return token
        secret = Request(scope).cookies.get(COOKIE)
        return await asyncio.to_thread(tokens.session, self._service.database, secret) if secret else None

    def _require_host(self, host: str) -> None:
        """Raise Problem where a name that is not ours leads to a server without tokens (DNS rebinding)."""
        if self._service.settings.tokens_required:
            return
        name = urlsplit(f"//{host}").hostname if host and not set(host) & set("/?#@\\ ") else None
        if name != "localhost" and not _is_loopback(name or ""):
            raise Problem(421, f"Host: {host:.80}: this server is at a loopback address; ask localhost or 127.0.0.1")

    def _answer(self, request: Request, refusal: Problem) -> Response:
        page = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/v1")
        if refusal.status == 401 and page and request.method == "GET":
            target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(f"/login?next={quote(target, safe='')}", 303)
        return response(request, refusal.status, refusal.detail, refusal.headers)


class _Sender:
    """Adds HEADERS to an answer, where it has none of that name; ends a stream whose token is no longer valid."""

    def __init__(self, send: Send) -> None:
        self._send, self._checked, self._streams, self._over = send, time.monotonic(), False, False
        self.recheck: Recheck | None = None

    async def __call__(self, message: Message) -> None:
        if self._over:
            return
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            self._streams = headers.get("content-type", "").startswith("text/event-stream")
        elif self._streams and self.recheck and time.monotonic() - self._checked > RECHECK:
            self._checked = time.monotonic()
            try:
                valid = await self.recheck() is not None
            except Problem:
                valid = False
            if not valid:
                message, self._over = {"type": "http.response.body", "body": b"", "more_body": False}, True
        await self._send(message)


def _require_own_origin(headers: Headers) -> None:
    """Raise Problem where a page of another site makes a browser send this. Programs send no Origin."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    if origin is not None:
        own = urlsplit(origin).netloc.lower() == headers.get("host", "").lower() != ""
    else:
        form = headers.get("content-type", "").partition(";")[0].strip().lower() in FORMS
        own = site in ("same-origin", "none") and not form
    if not own:
        raise Problem(403, f"the request comes from another site ({origin or 'a form without Origin'})")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@router.post("/login")
async def login(service: Here, request: Request) -> Response:
    """Begin a session by a token, in a cookie."""
    failed: deque[float] = request.app.state.failed_logins
    form = parse_qs((await request.body()).decode("ascii", "replace"))
    target = _local(form.get("next", ["/"])[0])
    if len(failed) == LOGINS and time.monotonic() - failed[0] < MINUTE:
        raise Problem(429, f"{LOGINS} logins have failed within a minute; wait", {"Retry-After": "60"})
    token = await asyncio.to_thread(tokens.verify, service.database, form.get("token", [""])[0].strip())
    if token is None:
        failed.append(time.monotonic())
        return RedirectResponse(f"/login?{urlencode({'failed': 1, 'next': target})}", 303)
    secret = await asyncio.to_thread(tokens.begin_session, service.database, token)
    answer = RedirectResponse(target, 303)
    flags = {"httponly": True, "secure": service.settings.tls or request.url.scheme == "https", "path": "/"}
    answer.set_cookie(COOKIE, secret, max_age=int(SESSION), samesite="strict", **flags)  # type: ignore[arg-type]
    return answer


@router.post("/logout")
def logout(service: Here, request: Request) -> Response:
    """End the session."""
    if secret := request.cookies.get(COOKIE):
        tokens.end_session(service.database, secret)
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, path="/")
    return answer


def _local(target: str) -> str:
    """Return a path of this server; "/" for anything else."""
    plain = target.isprintable() and target.isascii() and "\\" not in target
    return target if plain and target.startswith("/") and not target.startswith("//") else "/"

"""Access: tokens and sessions, the request's host and origin, and the headers of every answer."""

import asyncio
import ipaddress
import re
import time
from collections import deque
from urllib.parse import parse_qs, quote, urlencode

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.service import tokens
from pipeline.service.tokens import SESSION, Token
from pipeline.service.web.context import Here, Service
from pipeline.service.web.limits import Bounded
from pipeline.service.web.problem import Problem, no_database, response

COOKIE = "penstock_session"
OPEN = ("/healthz", "/login", "/static/")  # paths that need no token
SAFE = ("GET", "HEAD", "OPTIONS")
LOGINS, MINUTE = 10, 60.0  # failed ones of a client in so many seconds
RECHECK = 5.0  # seconds between two looks whether the token of a stream of events is still valid
FORMS = ("application/x-www-form-urlencoded", "multipart/form-data", "text/plain")  # that a foreign page can send
LOCAL = r"/(?![/\\])[!-\[\]-~]{0,2000}"  # an address on this server: ASCII without spaces and backslashes
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
router = APIRouter(include_in_schema=False)


def protect(app: FastAPI, service: Service) -> None:
    """Let every request pass through `Access`, then through `Bounded`; of what is added later, it comes after that."""
    app.state.failed_logins = deque(maxlen=1000)
    app.add_middleware(Bounded)
    app.add_middleware(Access, service=service)

    @app.exception_handler(500)
    def defect(request: Request, error: Exception) -> Response:  # outside of `Access`; stderr has the traceback
        return response(request, 500, "a defect of the server, whose stderr says more; please report it", HEADERS)


class Access:
    """ASGI middleware: refuses who may not ask, and adds HEADERS to answers that have none of these names.

    It sets request.state.scope ("read", "write", or on paths of OPEN "none"), .token (a Token or None), and .session:
    there is a login. A stream of events ends within RECHECK after its token; other answers under way are finished.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request, over = Request(scope), False

        async def sent(message: Message) -> None:
            nonlocal over
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            over = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        async def received() -> Message:
            return await self._while_valid(request, receive)

        try:
            await self._admit(request)
        except Problem as refusal:
            return await _refusal(request, refusal)(scope, receive, sent)
        except SQLAlchemyError as error:
            return await no_database(request, error)(scope, receive, sent)
        stream = request.state.token is not None and scope["path"].endswith("/events")
        await self._app(scope, received if stream else receive, sent)
        if stream and not over:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _admit(self, request: Request) -> None:
        """Raise Problem unless the request is allowed."""
        path, writes, state = request.scope["path"], request.method not in SAFE, request.state
        needed = self._service.settings.tokens_required
        if not needed:
            _require_local_host(request.headers.get("host", ""))
        if writes:
            _require_own_origin(request.headers)
        if {"content-length", "transfer-encoding"} <= {*request.headers.keys()}:  # two ends of one body
            raise Problem(400, "Content-Length and Transfer-Encoding contradict each other", {"Connection": "close"})
        state.token = await self._token(request)
        state.scope = state.token.scope if state.token else "none" if needed else "write"
        state.session = state.token is not None and "authorization" not in request.headers
        if state.scope == "none" and path not in OPEN and not path.startswith(OPEN[-1]):
            raise _unauthorized("a token is needed: Authorization: Bearer TOKEN")
        if state.scope == "read" and writes and path not in ("/login", "/logout"):
            raise Problem(403, "this token allows reading alone; ask with one of --scope write")

    async def _token(self, request: Request) -> Token | None:
        """Return the token of a request, or of its session. Raises Problem: it has a token that is not valid."""
        database, header = self._service.database, request.headers.get("authorization")
        if header is None:
            secret = request.cookies.get(COOKIE)
            return await asyncio.to_thread(tokens.session, database, secret) if secret else None
        kind, _, text = header.partition(" ")
        token = await asyncio.to_thread(tokens.verify, database, text.strip()) if kind.lower() == "bearer" else None
        if token is None:
            raise _unauthorized("the token is wrong, expired or revoked; see `penstock token list`")
        return token

    async def _while_valid(self, request: Request, receive: Receive) -> Message:
        """Receive what the client sends; its end, too, once its token is no longer valid."""
        message = asyncio.ensure_future(receive())
        try:
            while not (await asyncio.wait({message}, timeout=RECHECK))[0]:
                if await self._token(request) is None:
                    return {"type": "http.disconnect"}
            return message.result()
        except (Problem, SQLAlchemyError):
            return {"type": "http.disconnect"}
        finally:
            message.cancel()


def _require_local_host(host: str) -> None:
    """Raise Problem where a name that is not ours leads to a server without tokens (DNS rebinding)."""
    name = re.fullmatch(r"\[?([0-9A-Za-z.:-]*?)\]?(:\d*)?", host)
    if not name or not (name[1].lower() == "localhost" or _is_loopback(name[1])):
        raise Problem(421, f"Host: {host:.80}: this server is at a loopback address; ask localhost or 127.0.0.1")


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _require_own_origin(headers: Headers) -> None:
    """Raise Problem where a page of another site makes a browser send this; programs send neither Origin nor forms."""
    origin, site, host = headers.get("origin"), headers.get("sec-fetch-site"), headers.get("host", "").lower()
    form = headers.get("content-type", "").partition(";")[0].strip().lower() in FORMS
    if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
        raise Problem(403, f"Origin: {origin:.80}: the request comes from another site")
    if site not in (None, "same-origin", "none"):
        raise Problem(403, f"Sec-Fetch-Site: {site:.80}: the request comes from another site")
    if form and origin is None and site is None:
        raise Problem(403, "a form comes from a page, with an Origin; programs send Content-Type: application/json")


def _unauthorized(detail: str) -> Problem:
    return Problem(401, detail, {"WWW-Authenticate": "Bearer"})


def _refusal(request: Request, refusal: Problem) -> Response:
    """Return the answer to a request that is refused; a page's is the page of the login."""
    path = request.scope["path"]
    page = "text/html" in request.headers.get("accept", "") and not path.startswith("/v1")
    if refusal.status == 401 and page and request.method in ("GET", "HEAD"):
        target = quote(path) + f"?{request.url.query}" * bool(request.url.query)
        return RedirectResponse(f"/login?{urlencode({'next': target})}", 303)
    return response(request, refusal.status, refusal.detail, refusal.headers)


@router.post("/login")
async def login(service: Here, request: Request) -> Response:
    """Begin a session by a token, in a cookie."""
    failed: deque[tuple[float, str]] = request.app.state.failed_logins
    now, client = time.monotonic(), request.client.host if request.client else ""
    if sum(who == client and now - when < MINUTE for when, who in failed) >= LOGINS:
        raise Problem(429, f"{LOGINS} logins have failed within a minute; wait", {"Retry-After": f"{MINUTE:.0f}"})
    form = parse_qs((await request.body()).decode("ascii", "replace"))
    target = form.get("next", [""])[0]
    target = target if re.fullmatch(LOCAL, target) else "/"
    token = await asyncio.to_thread(tokens.verify, service.database, form.get("token", [""])[0].strip())
    if token is None:
        failed.append((now, client))
        return RedirectResponse(f"/login?{urlencode({'error': 1, 'next': target})}", 303)
    secret = await asyncio.to_thread(tokens.begin_session, service.database, token)
    answer = RedirectResponse(target, 303)
    secure = service.settings.tls or request.url.scheme == "https"
    answer.set_cookie(COOKIE, secret, int(SESSION), secure=secure, httponly=True, samesite="strict")
    return answer


@router.post("/logout")
def logout(service: Here, request: Request) -> Response:
    """End the session."""
    if secret := request.cookies.get(COOKIE):
        tokens.end_session(service.database, secret)
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE)
    return answer

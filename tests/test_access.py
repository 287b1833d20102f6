"""Who may ask for what, over real connections: what is refused has changed nothing."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sql
from click.testing import CliRunner, Result

from loopback import Loopback, loopback
from penstock.__main__ import main
from pipeline.service import tokens
from pipeline.service.database import sessions
from pipeline.service.database import tokens as table
from pipeline.service.web import access, app

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
PAGE = {"Accept": "text/html,*/*;q=0.8"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A server that asks for tokens."""
    with loopback(tmp_path_factory.mktemp("guarded"), tokens_required=True) as running:
        yield running


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """A server that asks for none."""
    with loopback(tmp_path_factory.mktemp("local")) as running:
        yield running


@pytest.fixture(autouse=True)
def _counted_anew(guarded: Loopback, local: Loopback):
    for server in (guarded, local):
        server.calls.clear()


def own(server: Loopback) -> dict[str, str]:
    """Return the header of a request that a page of the server makes."""
    return {"Origin": f"http://127.0.0.1:{server.port}"}


def tokens_of(server: Loopback) -> dict[str, str]:
    """Return texts of tokens by what they are."""
    kinds = {"write": server.token(), "read": server.token("read"), "revoked": server.token()}
    kinds |= {"expired": server.token(days=1), "unknown": "pst_" + "x" * 43}
    with server.database.writing() as connection:
        expired = table.c.digest == tokens.digest(kinds["expired"])
        connection.execute(sql.update(table).where(expired).values(expires=time.time() - 0.01))
    tokens.revoke(server.database, number(server, kinds["revoked"]))
    return kinds


def number(server: Loopback, text: str) -> int:
    token = tokens.verify(server.database, text)
    assert token
    return token.id


@contextmanager
def logged_in(server: Loopback, scope: str = "write") -> Iterator[httpx.Client]:
    """Yield a client whose cookie is that of a login."""
    with server.another() as client:
        answer = client.post("/login", data={"token": server.token(scope)}, headers=own(server))
        assert answer.status_code == 303, answer.text
        assert access.COOKIE in client.cookies
        yield client


def cookie(secret: str) -> dict[str, str]:
    return {"Cookie": f"{access.COOKIE}={secret}"}


def test_tokens_decide(guarded: Loopback):
    kinds = tokens_of(guarded)
    for name, text in kinds.items():
        allowed = name in ("read", "write")
        headers = {"Authorization": f"Bearer {text}"}
        answer = guarded.client.get("/v1/scope", headers=headers)
        assert answer.status_code == (200 if allowed else 401), name
        assert not allowed or answer.json() == {"scope": name}
        assert allowed or answer.headers["WWW-Authenticate"] == "Bearer"
        answer = guarded.client.post("/v1/record", headers=headers, content=name)
        assert answer.status_code == {"write": 200, "read": 403}.get(name, 401)
    for header in (kinds["write"], f"Basic {kinds['write']}", f"Bearer {kinds['write']}x", "Bearer", "\xff"):
        answer = guarded.client.post("/v1/record", headers={"Authorization": header.encode("latin-1")})
        assert answer.status_code == 401
    query = {"token": kinds["write"], "access_token": kinds["write"]}
    assert guarded.client.post("/v1/record", params=query).status_code == 401
    assert guarded.client.post("/v1/record", headers=cookie(kinds["write"])).status_code == 401
    assert guarded.calls == [b"write"]


def asked(server: Loopback, method: str, path: str, host: str = "localhost", more: str = "") -> int:
    """Return the status of the answer to a request that is sent as it is."""
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n"
    return int(server.exchange(head.encode()).split(b" ", 2)[1])


def test_every_path_asks_for_a_token(guarded: Loopback):
    paths = {route.path for router in app.ROUTERS for route in router.routes}  # type: ignore[attr-defined]
    assert {"/v1/jobs", "/metrics", "/"} <= paths
    read = f"Authorization: Bearer {guarded.token('read')}\r\n"
    for path in {*paths, "/v1/openapi.json", "/v1/none"} - {"/healthz", "/login", "/static/{name}"}:
        for method in ("GET", "HEAD", "OPTIONS", "POST", "DELETE"):
            assert asked(guarded, method, path) == 401, path
        for method in ("POST", "PUT", "PATCH", "DELETE", "TRACE"):
            assert asked(guarded, method, path, more=read) == 403 or path == "/logout"
    for path in ("/login/", "/login/../v1/scope", "/healthz/x", "//v1/scope", "/LOGIN", "*", "http://localhost/login"):
        for host in ("localhost", "localhost/static/?", "x/healthz#", "[", "a@b"):
            assert asked(guarded, "GET", path, host) == 401
            assert asked(guarded, "POST", path, host) == 401
    for path in ("/static/../v1/scope", "/static/%2e%2e/v1/scope", "/static//v1/scope"):
        assert asked(guarded, "GET", path) == 404
    assert asked(guarded, "GET", "/healthz") == asked(guarded, "GET", "/login") == 200


def foreign(port: int) -> list[dict[str, str]]:
    """Return headers of requests that other pages make a browser send."""
    origins = ["https://evil.example", "null", "", "http://[", "http://127.0.0.1", f"http://127.0.0.1:{port}/"]
    origins += [f"http://127.0.0.1:{port + 1}", f"http://127.0.0.1:{port}.evil.example", f"ftp://127.0.0.1:{port}"]
    origins += [f"http://localhost:{port}", f"http://evil@127.0.0.1:{port}"]
    sites = [{"Sec-Fetch-Site": site} for site in ("cross-site", "same-site", "x")]
    return [*({"Origin": origin} for origin in origins), *sites, own_port(port) | sites[0]]


def own_port(port: int) -> dict[str, str]:
    return {"Origin": f"http://127.0.0.1:{port}"}


def test_other_sites_change_nothing(guarded: Loopback, local: Loopback):
    with logged_in(guarded) as browser, guarded.another(guarded.token()) as program:
        for client in (browser, program, local.client):
            for path in ("/v1/record", "/record", "/v1/unread", "/logout", "/login", "/v1/none"):
                for headers in foreign(int(client.base_url.port or 0)):
                    answer = client.post(path, headers=headers, content=b"{}")
                    assert answer.status_code == 403, (path, headers, answer.text)
                    assert "comes from another site" in answer.json()["detail"]
                for kind in ("application/x-www-form-urlencoded; charset=utf-8", "text/plain", "Multipart/Form-Data"):
                    answer = client.post(path, headers={"Content-Type": kind}, content=b"a=b")
                    assert answer.status_code == 403, (path, kind)
        assert not guarded.calls
        assert not local.calls
        for client in (browser, program, local.client):
            ours = own_port(int(client.base_url.port or 0))
            assert client.post("/record", headers=ours | FORM, content=b"a=b").json() == {"scope": "write"}
            assert client.post("/v1/record", headers={"Sec-Fetch-Site": "same-origin"}, content=b"c").status_code == 200
            assert client.post("/v1/record", content=b"d").status_code == 200
        assert guarded.calls == [b"a=b", b"c", b"d"] * 2
        assert local.calls == [b"a=b", b"c", b"d"]


def test_names_that_lead_here_are_refused(local: Loopback, guarded: Loopback):
    """A page of evil.example, whose name has been made to lead to 127.0.0.1, is told nothing."""
    evil = ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "0.0.0.0")
    for host in (*evil, "[::1", "[", "localhost/", "a:b:c", "10.0.0.1", "[::]", "localhost evil", "ｌocalhost", ""):
        for method in (b"GET", b"POST"):
            head = method + b" /v1/record HTTP/1.1\r\nConnection: close\r\nHost: " + host.encode() + b"\r\n\r\n"
            answer = local.exchange(head)
            assert answer.startswith(b"HTTP/1.1 421 "), (host, answer)
            assert b"application/problem+json" in answer
    assert not local.calls
    for host in ("localhost", "localhost:9", "LOCALHOST:1", "127.0.0.1", "127.9.9.9:80", "[::1]", "[::1]:8080"):
        assert local.client.get("/v1/scope", headers={"Host": host}).status_code == 200
    with guarded.another(guarded.token("read")) as client:  # whose address has a name in the world
        assert client.get("/v1/scope", headers={"Host": "penstock.example"}).status_code == 200


def test_without_tokens_a_wrong_one_is_refused_still(local: Loopback):
    kinds = tokens_of(local)
    assert local.client.get("/v1/scope").json() == {"scope": "write"}
    foreign = cookie("of-another-server-on-this-machine")
    assert local.client.get("/v1/scope", headers=foreign).json() == {"scope": "write"}
    for name, text in kinds.items():
        answer = local.client.post("/v1/record", headers={"Authorization": f"Bearer {text}"})
        assert answer.status_code == {"write": 200, "read": 403}.get(name, 401), name
    assert len(local.calls) == 1


def test_login_and_logout(guarded: Loopback):
    with guarded.another() as browser:
        answer = browser.get("/jobs?state=failed", headers=PAGE)
        assert answer.status_code == 303
        assert answer.headers["Location"] == "/login?next=%2Fjobs%3Fstate%3Dfailed"
        assert browser.get("/v1/scope", headers=PAGE).status_code == 401  # no page
        form = {"token": f" {guarded.token()}\n", "next": "/jobs?state=failed"}
        answer = browser.post("/login", data=form, headers=own(guarded))
        assert (answer.status_code, answer.headers["Location"]) == (303, "/jobs?state=failed")
        flags = answer.headers["Set-Cookie"].split("; ")
        assert flags[0].startswith(f"{access.COOKIE}=")
        assert {flag.lower() for flag in flags[1:]} == {"httponly", "samesite=strict", "path=/", "max-age=43200"}
        secret = browser.cookies[access.COOKIE]
        assert len(secret) >= 43
        assert form["token"].strip() not in answer.headers["Set-Cookie"]
        assert browser.get("/v1/scope").json() == {"scope": "write"}
        answer = browser.post("/logout", headers=own(guarded) | FORM)
        assert (answer.status_code, answer.headers["Location"]) == (303, "/login")
        assert "Max-Age=0" in answer.headers["Set-Cookie"]
        assert access.COOKIE not in browser.cookies
        assert browser.get("/v1/scope", headers=cookie(secret)).status_code == 401  # it is no more
    assert secret.encode() not in written(guarded)


def written(server: Loopback) -> bytes:
    """Return all bytes of the database's files."""
    return b"".join(path.read_bytes() for path in server.service.site.root.glob("penstock.db*"))


def test_a_login_over_tls_has_a_secure_cookie(tmp_path: Path):
    with loopback(tmp_path, tls=True) as server:
        answer = server.client.post("/login", data={"token": server.token()}, headers=own(server))
        assert "; Secure" in answer.headers["Set-Cookie"]


def test_a_session_ends_with_its_token_and_in_time(guarded: Loopback):
    with logged_in(guarded) as first, logged_in(guarded) as second, logged_in(guarded, "read") as reader:
        assert reader.get("/v1/scope").json() == {"scope": "read"}
        assert reader.post("/record", headers=own(guarded)).status_code == 403
        for client in (first, second):
            assert client.get("/v1/scope").status_code == 200
        with guarded.database.reading() as connection:
            row = sql.select(sessions.c.token_id).where(
                sessions.c.digest == tokens.digest(first.cookies[access.COOKIE])
            )
            token = connection.execute(row).scalar_one()
        tokens.revoke(guarded.database, token)
        assert first.get("/v1/scope").status_code == 401
        with guarded.database.writing() as connection:
            connection.execute(sql.update(sessions).values(expires=time.time() - 0.01))
        assert second.get("/v1/scope").status_code == 401
        answer = second.post("/record", headers=own(guarded) | PAGE | FORM, content=b"a=b")
        assert answer.status_code == 401
    assert not guarded.calls
    with logged_in(guarded), guarded.database.reading() as connection:
        assert connection.execute(sql.select(sql.func.count()).select_from(sessions)).scalar_one() == 1  # old ones went


@pytest.mark.parametrize(
    "target",
    [
        *("//evil.example", "https://evil.example/", "evil", "/\\evil.example", "/\t/evil.example", "\\\\evil", " /"),
        *("/a\r\nSet-Cookie: a=b", "/a\nb", "/é", "/ a", "javascript:alert(1)", "/" + "a" * 3000, "/\x00", "///evil"),
    ],
)
def test_a_login_leads_to_no_other_site(guarded: Loopback, target: str):
    with guarded.another() as client:
        form = {"token": guarded.token("read"), "next": target}
        answer = client.post("/login", data=form, headers=own(guarded))
        assert (answer.status_code, answer.headers["Location"]) == (303, "/")
        assert len(answer.headers.get_list("Set-Cookie")) == 1


def test_failed_logins_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with loopback(tmp_path, tokens_required=True) as server:
        attempts = [{"token": "wrong"}, {}, {"token": "é"}, {"token": server.token(days=1) + "x"}] * 3
        for form in attempts[: access.LOGINS]:
            answer = server.client.post("/login", data=form, headers=own(server))
            assert (answer.status_code, answer.headers["Location"]) == (303, "/login?error=1&next=%2F")
            assert "Set-Cookie" not in answer.headers
        right = {"token": server.token()}
        answer = server.client.post("/login", data=right, headers=own(server))
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "60")
        assert server.client.get("/v1/scope", headers={"Authorization": f"Bearer {right['token']}"}).status_code == 200
        monkeypatch.setattr(access, "MINUTE", 0.0)  # later
        assert server.client.post("/login", data=right, headers=own(server)).status_code == 303


def test_all_answers_have_the_headers(guarded: Loopback):
    with guarded.another(guarded.token()) as client:
        cases: list[tuple[int, httpx.Response]] = [
            (200, client.get("/v1/scope")),
            (404, client.get("/none")),
            (404, client.get("/none", headers=PAGE)),
            (
                500,
                httpx.get(client.base_url.join("/v1/defect"), headers=client.headers),
            ),  # after which the server ends the connection
            (405, client.request("OPTIONS", "/v1/scope")),
            (405, client.head("/v1/scope")),
            (413, client.post("/v1/record", content=bytes(70_000))),
            (422, client.post("/v1/jobs", json={})),
            (401, guarded.client.get("/v1/scope")),
            (303, guarded.client.get("/none", headers=PAGE)),
            (403, client.post("/v1/record", headers={"Origin": "null"})),
        ]
    for status, answer in cases:
        assert answer.status_code == status
        for name, value in access.HEADERS.items():
            page = name == "Cache-Control" and "text/html" in answer.headers.get("content-type", "")
            assert answer.headers.get_list(name) == (["no-cache, private"] if page else [value]), (status, name)
        assert "server" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers
    policy = cases[0][1].headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy


@pytest.mark.parametrize("by", ["token", "session"])
def test_a_stream_ends_soon_after_its_token(guarded: Loopback, monkeypatch: pytest.MonkeyPatch, by: str):
    monkeypatch.setattr(access, "RECHECK", 0.1)
    text = guarded.token("read")
    with guarded.another(text if by == "token" else "") as client:
        if by == "session":
            client.post("/login", data={"token": text}, headers=own(guarded))
        with client.stream("GET", "/v1/events") as revoked, guarded.another(guarded.token()) as other:
            pieces = revoked.iter_raw()
            assert next(pieces).startswith(b": events after")
            with other.stream("GET", "/v1/events") as valid:
                guarded.until(lambda: guarded.service.stream.readers == 2)
                tokens.revoke(guarded.database, number(guarded, text))
                assert next(pieces, None) is None  # its end, a regular one, before it says that it is alive
                guarded.until(lambda: guarded.service.stream.readers == 1)
                assert valid.status_code == 200
            assert client.get("/v1/events").status_code == 401
    guarded.until(lambda: guarded.service.stream.readers == 0)


def test_tokens_are_made_listed_and_revoked(tmp_path: Path):
    root = tmp_path / "root"

    def run(*words: Any, code: int = 0) -> Result:
        done = CliRunner().invoke(main, [*map(str, words), "--root", str(root)])
        assert done.exit_code == code, done.output
        return done

    assert "no such folder" in run("token", "create", "--scope", "read", code=2).stderr
    root.mkdir()
    refused = run("serve", "--require-token", "--port", 0, code=2).stderr
    assert refused.count("\n") == 1
    assert "penstock token create" in refused
    made = run("token", "create", "--scope", "read", "--name", "a\x1bb", "--days", 3)
    text = made.stdout.strip()
    assert re.fullmatch(r"pst_[A-Za-z0-9_-]{43}", text)
    assert text not in made.stderr
    long = run("token", "create", "--scope", "read", "--name", "a" * 201, code=2)
    assert long.stderr == "Error: --name has 201 characters; 200 at most\n"
    run("token", "create", "--scope", "all", code=2)
    run("token", "create", "--scope", "read", "--days", "nan", code=2)
    fields = run("token", "list").stdout.strip().split("\t")
    assert fields[:3] == ["1", "read", "valid"]
    assert fields[5] == r"a\x1bb"
    assert text.encode() not in b"".join(path.read_bytes() for path in root.glob("penstock.db*"))
    with loopback(root, tokens_required=True) as server, server.another(text) as client:
        assert client.get("/v1/scope").json() == {"scope": "read"}
        run("token", "revoke", 1)
        assert client.get("/v1/scope").status_code == 401
    assert "revoked" in run("token", "list").stdout
    assert "no such token, or revoked already" in run("token", "revoke", 1, code=2).stderr

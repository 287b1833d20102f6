"""Bounds of the server, over real connections: what is too much is refused, and what it held is free again."""

import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from loopback import BIG, Loopback, loopback, rest
from pipeline.service.web import jobs, limits

HOST = b"Host: localhost\r\n"
GET = b"GET /v1/scope HTTP/1.1\r\n" + HOST + b"\r\n"
LAST = b"GET /v1/scope HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
CHUNKED = b"POST /v1/record HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    with loopback(tmp_path_factory.mktemp("limits")) as running:
        yield running


@pytest.fixture(autouse=True)
def _counted_anew(server: Loopback):
    server.calls.clear()
    server.client.close()
    server.client = server.another()
    server.until(lambda: server.connections == 0)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize("path", ["/v1/record", "/v1/unread"])
@pytest.mark.parametrize("chunked", [False, True])
def test_long_bodies_are_refused(server: Loopback, path: str, chunked: bool):
    def sent(size: int) -> httpx.Response:
        body = bytes(size)
        pieces = (body[i : i + 5000] for i in range(0, size, 5000))
        return server.client.post(path, content=pieces if chunked else body)

    assert sent(limits.BODY).status_code == 200
    assert len(server.calls) == 1
    for size in (limits.BODY + 1, 2_000_000):
        answer = sent(size)
        assert answer.status_code == 413
        assert answer.json()["detail"] == "the body is longer than 65,536 bytes"
    assert len(server.calls) == 1
    assert sent(3).status_code == 200  # on the same connection
    assert server.connections == 1


def test_a_request_that_trickles_in_is_ended(server: Loopback, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "ASKS_WITHIN", 0.3)
    monkeypatch.setattr(limits, "SENDS_WITHIN", 0.3)
    head = b"POST /v1/record HTTP/1.1\r\n" + HOST + b"Content-Length: 1000\r\n\r\n"
    refused = b"POST /v1/record HTTP/1.1\r\n" + HOST + b"Origin: null\r\nContent-Length: 1000\r\n\r\n"
    for start, expected in ((b"GET / HTTP/1.1\r\nX-", 408), (head, 408), (CHUNKED, 408), (GET + b"GET", 200)):
        assert status(trickled(server, start)) == expected
    assert trickled(server, GET + b"GET").count(b" 408 ") == 1  # after the answer of the first request
    answer = trickled(server, refused)  # the answer is there at once, and what follows it has its bound, too
    assert status(answer) == 403
    assert answer.count(b"HTTP/1.1") == 1
    assert server.exchange(b"") == b""  # silence has no answer
    assert not server.calls
    server.until(lambda: server.connections == 0)


def trickled(server: Loopback, start: bytes) -> bytes:
    """Send `start`, then a byte now and then until the server ends the connection; return what it has sent."""
    with server.connection(start) as raw:
        raw.setblocking(False)
        answer, deadline = b"", time.monotonic() + 10
        while time.monotonic() < deadline:
            time.sleep(0.05)
            try:
                if not (piece := raw.recv(2**16)):
                    return answer
                answer += piece
            except BlockingIOError:
                pass
            except ConnectionResetError:
                return answer
            try:
                raw.send(b"1")
            except (BrokenPipeError, ConnectionResetError):
                raw.setblocking(True)
                return answer + rest(raw)
    raise AssertionError("the connection is still open")


def test_a_flood_of_connections_leaves_those_that_are_open(server: Loopback, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "CONNECTIONS", 3)
    assert server.client.get("/v1/scope").status_code == 200
    silent = [server.connection() for _ in range(2)]
    server.until(lambda: server.connections == 3)
    for _ in range(20):
        answer = server.exchange(b"")
        assert status(answer) == 503
        assert b"Retry-After: 10\r\n" in answer
        assert httpx.Response(503, content=answer.partition(b"\r\n\r\n")[2]).json()["status"] == 503
        assert server.client.get("/v1/scope").status_code == 200
    silent.pop().close()
    server.until(lambda: server.connections == 2)
    with server.another() as client:
        assert client.get("/v1/scope").status_code == 200
    silent.pop().close()


def test_a_flood_of_streams_is_refused_and_its_end_frees_them(server: Loopback, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "MOST_STREAMS", 2)
    ask = b"GET /v1/events HTTP/1.1\r\n" + HOST + b"\r\n"
    streams = [server.connection(ask) for _ in range(2)]
    assert all(status(stream.recv(100)) == 200 for stream in streams)
    server.until(lambda: server.service.stream.readers == 2)
    answer = server.client.get("/v1/events")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
    assert server.client.get("/v1/scope").status_code == 200
    for stream in streams:
        stream.close()
    server.until(lambda: server.service.stream.readers == 0)
    server.client.close()
    server.until(lambda: server.connections == 0)


@pytest.mark.parametrize("end", [b"\r\n", b"Connection: close\r\n\r\n"])
def test_a_client_that_does_not_read_is_ended(server: Loopback, monkeypatch: pytest.MonkeyPatch, end: bytes):
    with server.connection(buffer=4096) as raw:
        server.until(lambda: server.connections == 1)  # with the system's own bound as it is
        monkeypatch.setattr(limits, "TAKES_WITHIN", 0.3)
        raw.sendall(b"GET /v1/big HTTP/1.1\r\n" + HOST + end)
        assert status(raw.recv(100)) == 200  # the answer has begun
        server.until(lambda: server.connections == 0 and not server.server.server_state.tasks)
        assert len(rest(raw)) < BIG


def test_a_client_that_reads_slowly_has_all(server: Loopback, monkeypatch: pytest.MonkeyPatch):
    """It takes longer than the bound, but never stands still for so long."""
    monkeypatch.setattr(limits, "TAKES_WITHIN", 0.4)
    ask = b"GET /v1/big HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    with server.connection(ask, buffer=2**20) as raw:
        began, size = time.monotonic(), 0
        while time.monotonic() < began + 1.2:
            size += len(raw.recv(2**16))
            time.sleep(0.01)
        assert size < BIG
        size += len(rest(raw))
    assert size > BIG


@pytest.mark.parametrize("path", [b"/v1/events", b"/v1/big"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_vanishes_is_forgotten(server: Loopback, path: bytes, reset: bool):
    raw = server.connection(b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n", buffer=4096)
    assert status(raw.recv(100)) == 200
    if reset:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.close()
    server.until(lambda: server.connections == 0 and not server.server.server_state.tasks)
    assert server.service.stream.readers == 0


def test_the_system_is_told_to_send_at_once_and_to_give_up_a_host_that_is_gone(server: Loopback):
    with server.connection():
        server.until(lambda: server.connections == 1)
        (protocol,) = server.server.server_state.connections
        assert protocol.transport.get_write_buffer_limits() == (0, 0)  # what is unread is watched to the last byte
        own = protocol.transport.get_extra_info("socket")
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == limits.TAKES_WITHIN * 1000


def test_pipelined_requests_are_answered_in_turn(server: Loopback):
    post = b"POST /v1/record HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\n\r\n"
    answer = server.exchange(post + b"a" + GET + post + b"b" + LAST)
    assert answer.count(b"HTTP/1.1 200 OK") == 4
    assert server.calls == [b"a", b"b"]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET /v1/scope HTTP/1.1\r\n" + HOST + b"X: " + b"x" * 1_000_000 + b"\r\n\r\n", 400),
        (b"GET /v1/scope?" + b"x" * 1_000_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /v1/scope HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
        (b"GET /v1/scope HTTP/1.1\r\n\r\n", 400),
        (b"GET /v1/scope HTTP/1.1\r\n" + HOST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST /v1/record HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n", 400),
        (b"POST /v1/record HTTP/1.1\r\n" + HOST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
        (CHUNKED + b"no number\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    ],
)
def test_what_is_no_request_is_refused(server: Loopback, request_: bytes, expected: int):
    answer = server.exchange(request_)
    assert not answer or status(answer) == expected  # a reset may overtake the answer, where much is unread
    assert len(request_) > 100_000 or (answer and b'"status": 400' in answer)
    assert not server.calls
    assert server.client.get("/v1/scope").status_code == 200


def test_a_body_with_two_ends_is_refused_and_ends_the_connection(server: Loopback):
    """What one reader of the two headers takes for the body's rest is to another one a request of its own."""
    smuggled = b"0\r\n\r\nGET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
    answer = server.exchange(CHUNKED.replace(HOST, HOST + b"Content-Length: 5\r\n") + smuggled)
    assert status(answer) == 400
    assert answer.count(b"HTTP/1.1") == 1
    assert not server.calls


def test_what_follows_an_answer_and_is_no_request_has_none(server: Loopback):
    with server.connection(CHUNKED.replace(HOST, HOST + b"Origin: null\r\n")) as raw:
        answer = raw.recv(2**16)
        assert status(answer) == 403
        raw.sendall(b"no number\r\n")
        assert (answer + rest(raw)).count(b"HTTP/1.1") == 1


def test_old_and_unusual_requests_are_answered(server: Loopback):
    assert status(server.exchange(b"GET /v1/scope HTTP/1.0\r\n" + HOST + b"\r\n")) == 200
    assert status(server.exchange(b"GET /v1/scope HTTP/1.0\r\n\r\n")) == 421  # without a host
    upgrade = LAST.replace(b"close", b"close, Upgrade").replace(b"\r\n\r\n", b"\r\nUpgrade: websocket\r\n\r\n")
    assert status(server.exchange(upgrade)) == 200
    expects = b"POST /v1/record HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    with server.connection(expects) as raw:
        assert status(raw.recv(1000)) == 100
        raw.sendall(b"ok")
        assert status(raw.recv(1000)) == 200
    assert server.calls == [b"ok"]


def test_tls_has_the_same_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pem = tmp_path / "pem"
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    subprocess.run([*words.split(), "-keyout", pem, "-out", pem], check=True, capture_output=True, timeout=60)
    context = ssl.create_default_context(cafile=str(pem))
    context.check_hostname = False
    ask = b"GET /v1/big HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    with loopback(tmp_path / "root", pem) as server:
        with context.wrap_socket(server.connection()) as raw:
            raw.sendall(ask)
            assert len(rest(raw)) > BIG
        monkeypatch.setattr(limits, "ASKS_WITHIN", 0.3)
        with context.wrap_socket(server.connection()) as raw:
            raw.sendall(b"GET /")
            assert status(rest(raw)) == 408
        with context.wrap_socket(server.connection(buffer=4096)) as raw:
            server.until(lambda: server.connections == 1)
            monkeypatch.setattr(limits, "TAKES_WITHIN", 0.3)
            raw.sendall(ask)
            assert status(raw.recv(100)) == 200
            server.until(lambda: server.connections == 0 and not server.server.server_state.tasks)

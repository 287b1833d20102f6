"""Files of HTTP servers that fail, lie, refuse, or send us elsewhere; the token goes to its own server alone."""

import contextlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import UserError, manifest, storage, stores
from pipeline.storage import Entry, StorageError

DATA = bytes(range(256)) * 40
TOKEN = "pst_secret"


class Scripted(http.server.ThreadingHTTPServer):
    """Serves `DATA` at every URL, but for the faults that a test puts into `script`, one for each of the next GETs."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[str] = []
        self.always = ""  # the fault of all requests
        self.listing: object = None
        self.seen: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Scripted

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer(self.server.always, b"", f"bytes 0-0/{len(DATA)}")

    def do_GET(self) -> None:
        fault = self.server.always or (self.server.script.pop(0) if self.server.script else "")
        if self.path.endswith("/"):
            return self.listed(fault)
        first, last = self.headers.get("Range", f"bytes=0-{len(DATA) - 1}").removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last) + 1, len(DATA))
        start, stop = start + (fault == "shifted"), stop - (fault == "fewer")
        if start >= len(DATA):
            fault = "416"
        self.answer(fault, DATA[start:stop], f"bytes {start}-{stop - 1}/{len(DATA)}")

    def answer(self, fault: str, data: bytes, span: str) -> None:
        self.server.seen.append((self.command, self.path, self.headers.get("Authorization")))
        if fault == "closed":
            return self.close()
        if fault.startswith("http"):
            self.send_response(302)
            self.send_header("Location", fault)
        elif fault.isdecimal():
            data = json.dumps({"detail": f"because of {fault}"}).encode()
            self.send_response(int(fault))
            self.send_header("Content-Type", "application/problem+json")
        elif self.command == "HEAD" or fault == "whole":
            self.send_response(200)
            data = DATA if self.command == "GET" else b""
        else:
            self.send_response(206)
            self.send_header("Content-Range", span)
        head = self.command == "HEAD" and not fault.isdecimal()
        self.send_header("Content-Length", str(len(DATA) if head else len(data) - (fault == "short")))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else data[: len(data) // 2] if fault == "broken" else data)

    def listed(self, fault: str) -> None:
        data = json.dumps(self.server.listing).encode()
        self.server.seen.append((self.command, self.path, self.headers.get("Authorization")))
        self.send_response(int(fault) if fault.isdecimal() else 200)
        self.send_header("Content-Type", "application/json" if self.server.listing else "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def close(self) -> None:
        self.close_connection = True


@contextlib.contextmanager
def running() -> Iterator[Scripted]:
    with Scripted() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)
    for name in ("PENSTOCK_TOKEN", "PENSTOCK_URL"):
        monkeypatch.delenv(name, raising=False)
    with running() as server:
        yield server


@pytest.mark.parametrize("fault", ["closed", "broken", "short", "fewer", "500", "503", "429", "408"])
def test_what_fails_for_a_moment_is_asked_for_again(server: Scripted, fault: str):
    server.script = [fault, fault]
    assert storage.read_range(f"{server.url}/a", 100, 300) == DATA[100:400]
    assert [method for method, _, _ in server.seen if method == "GET"] == ["GET"] * 3
    server.script = [fault]
    assert storage.read_bytes(storage.location(f"{server.url}/a")) == DATA


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", r"cannot read: 503 because of 503 \(5 tries in 0 s\); check the network, then run"),
        ("closed", r"cannot read: .*\(5 tries in 0 s\); check the network"),
        ("broken", r"cannot read: .*\(5 tries in 0 s\); check the network"),
        ("401", r"access denied \(401 because of 401\); set PENSTOCK_TOKEN to a token of that server"),
        ("403", r"access denied \(403 because of 403\); set PENSTOCK_TOKEN"),
        ("409", r"cannot read: 409 because of 409$"),
        ("whole", r"answers with other bytes than those asked for \(status 200\); use one that knows ranges"),
        ("shifted", r"answers with other bytes than those asked for \(status 206\)"),
    ],
)
def test_what_lasts_is_one_line(server: Scripted, fault: str, message: str):
    server.always = fault
    with pytest.raises(UserError, match=message) as caught:
        storage.read_range(f"{server.url}/a", 100, 300)
    assert "\n" not in str(caught.value)
    assert len(server.seen) == (5 if "5 tries" in message else 1)


def test_what_is_there(server: Scripted):
    path = storage.location(f"{server.url}/a")
    assert storage.is_remote(path)
    assert storage.is_file(path)
    assert storage.stamp(path)[0] == len(DATA)
    assert storage.read_range(str(path), len(DATA) - 5, 10) == DATA[-5:]
    assert storage.read_range(str(path), len(DATA), 10) == b""
    with storage.opened(path) as (read, size):
        assert (read(7, 1000), read(9, size - 4)) == (DATA[1000:1007], DATA[-4:])
    server.always = "404"
    assert not storage.exists(path)
    assert not storage.is_dir(path)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(path)
    with pytest.raises(UserError, match=r"127.0.0.1:[0-9]+/a: no such directory; correct the URL$"):
        manifest.load(f"{server.url}/a")


def test_who_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)
    with running() as server:
        pass  # nobody listens there any more
    with running() as known:
        assert storage.read_range(f"{known.url}/a", 0, 9) == DATA[:9]
    with pytest.raises(StorageError, match=r"cannot look: .*Connection refused \(5 tries in 0 s\); check the network"):
        manifest.load(f"{server.url}/v1/datasets/d")
    monkeypatch.setattr(stores, "PATIENCE", 0.2)
    with pytest.raises(StorageError) as caught:  # of one that was there a moment ago: it is perhaps started again
        storage.read_range(f"{known.url}/a", 0, 9)
    assert int(re.search(r"\(([0-9]+) tries in", str(caught.value))[1]) > stores.TRIES


def test_listings(server: Scripted):
    """One request where the server lists its files, else one for each; what is no list is refused, not an empty one."""
    root, files = storage.location(f"{server.url}/d"), [{"name": "a", "bytes": 3}, {"name": "b/c", "bytes": 5}]
    server.listing = {"files": files}
    assert storage.sizes(root, ["a", "b/c", "other"]) == {"a": 3, "b/c": 5}
    assert storage.scan(root) == [Entry("a", True, False, 3), Entry("b", False, True, 0)]
    assert [method for method, _, _ in server.seen] == ["GET", "GET"]
    for other in (None, {"files": [{"name": "a", "bytes": -1}]}, {"files": 3}, [1]):
        server.listing = other
        assert storage.sizes(root, ["a", "b"]) == {"a": len(DATA), "b": len(DATA)}
        with pytest.raises(UserError, match=r"/d: the server lists no files"):
            storage.scan(root)
    server.always = "404"
    assert storage.sizes(root, ["a"]) == {}
    with pytest.raises(FileNotFoundError):
        storage.scan(root)


def test_the_token_goes_to_its_server_alone(server: Scripted, monkeypatch: pytest.MonkeyPatch):
    path = storage.location(f"{server.url}/a")

    def sent() -> set[str | None]:
        server.seen.clear()
        storage.read_bytes(path)
        return {token for _, _, token in server.seen}

    assert sent() == {None}
    monkeypatch.setenv("PENSTOCK_TOKEN", f" {TOKEN}\n")
    assert sent() == {f"Bearer {TOKEN}"}
    monkeypatch.setenv("PENSTOCK_URL", f"{server.url}/")
    assert sent() == {f"Bearer {TOKEN}"}
    for other in (
        server.url.replace("127.0.0.1", "localhost"),
        "http://127.0.0.1",
        server.url.replace("http", "https"),
    ):
        monkeypatch.setenv("PENSTOCK_URL", other)
        assert sent() == {None}
    monkeypatch.setenv("PENSTOCK_TOKEN", "two words")
    with pytest.raises(UserError, match=r"^PENSTOCK_TOKEN: holds more than the characters of a token") as caught:
        storage.read_bytes(path)
    assert "words" not in str(caught.value)


def test_the_token_follows_no_redirect(server: Scripted, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PENSTOCK_TOKEN", TOKEN)
    with running() as other:
        server.always = f"{other.url}/elsewhere"
        assert storage.read_bytes(storage.location(f"{server.url}/a")) == DATA
        assert {token for _, _, token in server.seen} == {f"Bearer {TOKEN}"}
        assert {(path, token) for _, path, token in other.seen} == {("/elsewhere", None)}


@pytest.mark.parametrize("url", ["http://h/d?token=x", "http://h/d#x", "https://me:secret@h/d"])
def test_urls_that_name_no_folder(url: str):
    with pytest.raises(UserError, match=r"^https?://h/d: \?, # and USER@ name no folder of an HTTP server$"):
        storage.location(url)


def test_a_server_is_no_place_to_build(server: Scripted, tmp_path: Path):
    source = tmp_path / "a"
    source.write_bytes(DATA)
    for write in (
        lambda path: storage.upload(source, path),
        lambda path: storage.put_if_absent(path, DATA),
        storage.remove,
    ):
        with pytest.raises(UserError, match=r"files of an HTTP server can only be read; name a folder, or an object"):
            write(storage.location(f"{server.url}/d/a"))
    assert not server.seen

"""An S3 server: moto's, in a process of its own, which fails as often and in the way that a test asks for.

Run as a program, it prints its port and serves until its standard input ends, so that it cannot outlive the tests. A
test that wants the fixture `s3` imports `empty_bucket` and `running_server`.
"""

import hashlib
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LIFETIME = 900  # seconds
BUCKETS = itertools.count()
ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"
ANSWERS = {  # instead of doing what was asked
    "slow_down": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "internal": ("500 Internal Server Error", "InternalError", "We encountered an internal error. Please try again."),
    "no_upload": ("404 Not Found", "NoSuchUpload", "The specified upload does not exist."),
    "denied": ("403 Forbidden", "InvalidAccessKeyId", "The AWS Access Key Id does not exist in our records."),
}
KINDS = ("slow_down", "internal", "close", "lost", "cut", "short")


class Faults:
    """WSGI middleware. A share of the requests fails: in one of `ANSWERS`, or the connection is closed before (`close`)
    or after (`lost`) doing what was asked; a body ends early, against its Content-Length (`cut`) or with it (`short`).
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()
        self.set(share=0)

    def set(
        self,
        share: float,
        kinds: Iterable[str] = KINDS,
        seed: int = 0,
        delay: float = 0,
        only: str = "",
        times: int = 10**6,
    ) -> None:
        """Let `only` requests with these words in "METHOD /path?query" fail, so many `times`; answer each after `delay`
        seconds.
        """
        self._share, self._kinds, self._delay, self._only, self._times = share, tuple(kinds), delay, only, times
        self._random = random.Random(seed)
        self.seen: dict[str, Any] = {"requests": [], "faults": 0, "running": 0, "most": 0}

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/-/faults":
            self.set(**json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))))
        if environ["PATH_INFO"].startswith("/-/"):
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self.seen).encode()]
        kind = self._begin(environ)
        try:
            return self._answer(kind, environ, start)
        finally:
            with self._lock:
                self.seen["running"] -= 1

    def _begin(self, environ: dict[str, Any]) -> str:
        """Note the request, and choose what happens to it; "": nothing."""
        request = f"{environ['REQUEST_METHOD']} {environ['RAW_URI']}"
        with self._lock:
            self.seen["requests"].append(request)
            self.seen["running"] += 1
            self.seen["most"] = max(self.seen["most"], self.seen["running"])
            chosen = self._only in request and self.seen["faults"] < self._times
            if not chosen or self._random.random() >= self._share:
                return ""
            self.seen["faults"] += 1
            return self._random.choice(self._kinds)

    def _answer(self, kind: str, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        threading.Event().wait(self._delay)
        if kind == "close":
            _hang_up(environ)
        if kind in ANSWERS:
            status, code, message = ANSWERS[kind]
            start(status, [("Content-Type", "application/xml")])
            return [ERROR.format(code, message).encode() if environ["REQUEST_METHOD"] != "HEAD" else b""]
        started: list[Any] = []
        body = b"".join(self._application(environ, lambda *arguments: started.extend(arguments)))
        status, headers = started[:2]
        if kind in ("cut", "short") and environ["REQUEST_METHOD"] == "GET" and body:
            body = body[: len(body) // 2]
            if kind == "short":
                headers = [(key, value) for key, value in headers if key.lower() != "content-length"]
                headers.append(("Content-Length", str(len(body))))
        elif kind in ("lost", "cut", "short"):
            _hang_up(environ)
        start(status, headers)
        return [body]


def _hang_up(environ: dict[str, Any]) -> None:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


@dataclass(frozen=True)
class Store:
    """A running server, and a bucket of the test's own there."""

    endpoint: str
    bucket: str

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    def faults(self, share: float, **options: object) -> None:
        """Set the faults from now on as `Faults.set` does, and count from nothing."""
        _ask(f"{self.endpoint}/-/faults", {"share": share, **options})

    def seen(self) -> dict[str, Any]:
        """Return since the last `faults`: the "requests", the number of "faults", and the "most" that ran at a time."""
        return _ask(f"{self.endpoint}/-/seen")

    def upload(self, folder: Path, name: str) -> None:
        """Store every file of a folder below `name`."""
        from pipeline import storage

        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            target = storage.location(f"{self.url}/{name}/{path.relative_to(folder).as_posix()}")
            storage.put_if_absent(target, path.read_bytes())

    def digests(self, name: str) -> dict[str, str]:
        """Return the SHA-256 of every object below `name`."""
        from pipeline import storage

        root = storage.location(f"{self.url}/{name}")
        paths = [f"{below}/{entry.name}".lstrip("/") for below, entries in storage.walk(root) for entry in entries]
        files = [path for path in paths if storage.is_file(root / path)]
        return {path: hashlib.sha256(storage.read_bytes(root / path)).hexdigest() for path in files}


def _ask(url: str, body: object = None) -> Any:
    with urllib.request.urlopen(url, None if body is None else json.dumps(body).encode(), timeout=10) as answer:
        return json.load(answer)


@pytest.fixture(scope="session", name="s3_server")
def running_server() -> Iterator[str]:
    """The URL of a running server."""
    pytest.importorskip("moto")
    command = [sys.executable, Path(__file__)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.stdin.close()


@pytest.fixture(name="s3")
def empty_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty bucket on a server without faults, which the environment names; short waits between tries."""
    from botocore.retries.standard import ExponentialBackoff

    from pipeline import storage, stores

    environment(monkeypatch, s3_server)
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda backoff, context: 0.01)
    store = Store(s3_server, f"bucket-{next(BUCKETS)}")
    store.faults(0)
    storage.filesystem("s3").mkdir(store.bucket)
    yield store
    store.faults(0)
    reconnect()


def environment(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Credentials and an endpoint as the environment has them, for this process and those that it starts."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    reconnect()


def reconnect() -> None:
    """Let the next request see the environment as it is now."""
    import s3fs

    from pipeline import storage

    storage.filesystem.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def serve() -> None:
    """Serve on a free port of this machine until standard input ends."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Quiet(MotoRequestHandler):
        def log(self, *arguments: object) -> None:
            pass

    application = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Timer(LIFETIME, lambda: os._exit(1)).start()
    print(server.port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve()

"""Clients of a server that is measured: dashboards, shard readers and a program. None asks twice what failed."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPResponse
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.service.database import Database, url_of
from tools.bench.common import Figures

READ = "read"  # the data set whose shards are read
PAGES = ("/", "/jobs/{job}", "/jobs", "/datasets")  # that dashboards show, in turn
API = (
    *("/v1/jobs", "/v1/jobs/{job}", "/v1/jobs/{job}/log?text=true", "/v1/datasets", f"/v1/datasets/{READ}"),
    *(f"/v1/datasets/{READ}/classes", f"/v1/datasets/{READ}/samples/train/0", "/v1/runs", "/readyz", "/metrics"),
)
BETWEEN = 1.0  # seconds from one look of a dashboard to the next, as in static/live.js
ASKS = 10  # API requests a second
RANGE = 4 * 2**20  # bytes of a shard that a reader asks for at a time
IDLE = 3.0  # seconds after which a client opens a new connection: the server may close the old one any moment
SILENCE = 20.0  # seconds without an answer after which a request fails; a stream says every 10 s that it is alive


class Clients:
    """Threads that ask a server until a job of it is over; what they measure, and each failure by its reason."""

    def __init__(self, port: int, root: Path, dashboards: int, readers: int, rate: float) -> None:
        """`port`, `root`: the server's; `rate`: bytes a second that a reader takes at most."""
        self._port, self._root = port, root
        self._dashboards, self._readers, self._rate = dashboards, readers, rate
        self._over = threading.Event()
        self.job = 0
        self.threads: list[threading.Thread] = []
        self.streams: list[Stream] = []
        self.seconds: dict[str, list[float]] = {"page": [], "api": [], "range": []}  # from request to whole answer
        self._failures: list[str] = []

    def start(self, job: int) -> None:
        """Start all clients; `job` is the one that is looked at."""
        self.job = job
        for page in islice(cycle(PAGES), self._dashboards):
            self.streams.append(stream := Stream())
            self._begin(self._watch, page.format(job=job), stream)
        for number in range(self._readers):
            self._begin(self._read, number)
        self._begin(self._ask)

    def _begin(self, function: Callable[..., None], *words: Any) -> None:
        thread = threading.Thread(target=function, args=words, daemon=True)
        self.threads.append(thread)
        thread.start()

    def end(self) -> None:
        """End all clients; streams are given the time in which they hear of the job's end."""
        self._over.set()
        until = time.monotonic() + 2 * SILENCE
        for thread in self.threads:  # which may grow meanwhile
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                self._failures.append("a client hangs")

    def figures(self, seconds: float) -> Figures:
        """Return what was measured in so many seconds. Events are compared with the database's own."""
        database = Database(url_of(self._root, None))
        told = [event.id for event in database.events(0, limit=10**6) if event.job == self.job]
        database.close()
        streams = [stream for stream in self.streams if stream.after is not None]  # the others are among the failures
        due = [{number for number in told if number > (stream.after or 0)} for stream in streams]
        shares = (0.5, 0.95, 1)
        answers = {kind: [len(times), *np.quantile(times, shares)] for kind, times in self.seconds.items() if times}
        return {
            "seconds": seconds,
            "answers": answers,  # number, median, 95th percentile, most
            "failed": dict(Counter(self._failures)),
            "events": sum(map(len, due)),
            "lost": sum(len(numbers.difference(stream.seen)) for stream, numbers in zip(streams, due, strict=True)),
            "out_of_order": sum(sorted(set(stream.seen)) != stream.seen for stream in streams),  # or doubled
        }

    def _get(self, client: "Client", kind: str, path: str, **headers: str) -> bytes | None:
        """Return an answer's body, and count the request; None where it failed."""
        started = time.perf_counter()
        try:
            answer = client.ask(path, **headers)
            body = answer.read()
        except (OSError, HTTPException) as error:
            client.close()
            self._failures.append(f"{kind}: {error!r}")
            return None
        self.seconds[kind].append(time.perf_counter() - started)
        if answer.status not in (200, 206):
            self._failures.append(f"{kind}: {answer.status} {path}")
            return None
        return body

    def _watch(self, path: str, stream: "Stream") -> None:
        """Do what the dashboard's script does with an open page."""
        client, events = Client(self._port), Client(self._port)
        page = self._get(client, "page", path)
        if page is None:
            return
        if not (match := re.search(rb' data-events="([^"]+)" data-after="(\d+)"', page)):
            self._failures.append(f"page: {path} names no stream")
            return
        stream.after = int(match[2])
        self._begin(self._refresh, client, path, stream)
        try:
            for line in events.ask(f"{match[1].decode()}?after={stream.after}", Accept="text/event-stream"):
                if stream.hear(line, self.job):
                    return
                if self._over.is_set() and line.startswith(b": alive"):
                    break
            self._failures.append("stream: did not tell the job's end")
        except (OSError, HTTPException) as error:
            self._failures.append(f"stream: {error!r}")
        finally:
            stream.over = True
            stream.changed.set()
            events.close()

    def _refresh(self, client: "Client", path: str, stream: "Stream") -> None:
        looked = time.monotonic()
        while not stream.over:
            stream.changed.wait()
            time.sleep(max(0.0, looked + BETWEEN - time.monotonic()))
            stream.changed.clear()
            self._get(client, "page", path)
            looked = time.monotonic()
        client.close()

    def _read(self, number: int) -> None:
        """Read shards by ranges, and compare them with the files."""
        client, due = Client(self._port), time.monotonic()
        shards = sorted((self._root / "datasets" / READ / "train").glob("*.tar"))
        for shard in islice(cycle(shards), number, None):
            content = shard.read_bytes()
            for start in range(0, len(content), RANGE):
                if self._over.wait(max(0.0, due - time.monotonic())):
                    return client.close()
                part = content[start : start + RANGE]
                asked = f"bytes={start}-{start + len(part) - 1}"
                answer = self._get(client, "range", f"/v1/datasets/{READ}/train/{shard.name}", Range=asked)
                if answer not in (None, part):
                    self._failures.append("range: other bytes than the file's")
                due = max(due, time.monotonic() - 1) + len(part) / self._rate

    def _ask(self) -> None:
        """Ask the API in turn for all that it has."""
        client = Client(self._port)
        for path in cycle(API):
            if self._over.wait(1 / ASKS):
                return client.close()
            self._get(client, "api", path.format(job=self.job))


class Stream:
    """Server-sent events, as one reader has got them."""

    def __init__(self) -> None:
        self.after: int | None = None  # number of the last event that the page shows
        self.changed, self.over = threading.Event(), False
        self.seen: list[int] = []  # numbers of events of the job

    def hear(self, line: bytes, job: int) -> bool:
        """Take a line; return whether it tells the job's end."""
        if not line.startswith(b"data: "):
            return False
        event = json.loads(line.removeprefix(b"data: "))
        self.changed.set()
        if event["job"] != job:
            return False
        self.seen.append(event["id"])
        return bool(event["kind"] == "ended")


class Client:
    """A connection to a server, opened anew where it may have been closed."""

    def __init__(self, port: int) -> None:
        self._connection, self._used = HTTPConnection("127.0.0.1", port, timeout=SILENCE), 0.0

    def ask(self, path: str, **headers: str) -> HTTPResponse:
        """Return the answer to a GET; its body has to be read before the next one."""
        now = time.monotonic()
        if now - self._used > IDLE:
            self._connection.close()
        self._used = now
        self._connection.request("GET", path, headers=headers)
        return self._connection.getresponse()

    def close(self) -> None:
        self._connection.close()

"""Guards a worker: which calls it takes, and how much memory and how many files clients may cost it.

An answer counts as long as its memory lives, wherever gRPC keeps it: from before it is decoded until it is sent, or
until its call has ended in another way. gRPC has no limit for a request that pyarrow could set, and lets a client take
forever over reading, or over saying anything at all; so a thread looks at the connections, and ends such ones.
"""

import hmac
import json
import os
import resource
import socket
import struct
import threading
import time
import urllib.parse
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import flight

LIMIT = 2**30  # bytes of all answers together
LEAST = 2**22  # bytes that an answer counts at least, since it has a thread, too
TAKEN_WITHIN = 30.0  # seconds from the end of decoding until a client has read an answer
ASKS_WITHIN = 10.0  # seconds from the beginning of a connection to its first valid request
SILENT = 3600.0  # seconds without a valid request, after which a client is taken for lost
LARGEST = 2**20  # bytes that a client may send without a valid request among them
PERIOD = 0.25  # seconds between two looks
RECENT = 10  # seconds over which the rate of views is the mean
RECEIVED = 128  # offset of tcpi_bytes_received, a u64, in struct tcp_info of Linux's tcp.h


def failure(kind: str, message: str) -> flight.FlightError:
    """Return the error that a call raises: its kind is refused, data, bad or busy, its message one line."""
    detail = json.dumps({"kind": kind, "message": message}).encode()
    return flight.FlightServerError(message, extra_info=detail)


class Admission(flight.ServerMiddlewareFactory):
    """Refuses calls without the token, if there is one, and all but two kinds, before a byte of their data is used."""

    def __init__(self, token: str | None) -> None:
        super().__init__()
        self._expected = None if token is None else f"Bearer {token}".encode()

    def start_call(self, info: flight.CallInfo, headers: dict[str, list[str] | list[bytes]]) -> None:
        """Raise FlightError for a call that is refused."""
        if self._expected is not None:
            values = [v if isinstance(v, bytes) else v.encode() for v in headers.get("authorization", [])]
            if not values:
                raise failure("refused", "this worker asks for a token: set PENSTOCK_FEED_TOKEN_FILE to its file")
            if len(values) > 1 or not hmac.compare_digest(values[0], self._expected):
                raise failure("refused", "this worker has another token: give both sides the same file")
        if info.method not in (flight.FlightMethod.DO_GET, flight.FlightMethod.DO_ACTION):
            raise failure("refused", f"a worker answers do_get and the action status, not {info.method.name.lower()}")


class Held:
    """Bytes that count as an answer's until nothing refers to this object."""

    def __init__(self, freed: deque[int], size: int) -> None:
        self._freed, self._size = freed, size

    def __del__(self) -> None:
        self._freed.append(self._size)  # atomic: a lock might be held by the statement that this interrupts


class Outgoing:
    """Bounds the memory of a server's answers, and ends the connections of clients that do not read or ask."""

    def __init__(self) -> None:
        self._bytes, self._lock = 0, threading.Lock()
        self._freed: deque[int] = deque()
        self._sent: deque[tuple[float, str, weakref.ref[Held]]] = deque()  # by time
        self._asked: set[str] = set()  # clients with a valid request since the last look
        self._connections: dict[str, _Connection] = {}
        self._closing, self._closed = False, threading.Event()
        self._began, self._requests, self._views, self._clients = time.monotonic(), 0, 0, 0
        self._recent: deque[list[int]] = deque(maxlen=RECENT)  # the last seconds with views, each with their number

    def hold(self, context: flight.ServerCallContext, size: int) -> Held:
        """Count an answer of `size` bytes, of a valid request, from now on.

        Raises FlightError: refused where it is larger than all may be, busy where the others leave too little.
        """
        self._asked.add(_client(context))
        if size > LIMIT:
            raise failure("refused", f"the answer would have {size:,} bytes; at most {LIMIT:,}: ask for fewer samples")
        size = max(size, LEAST)
        with self._lock:
            if self._under_way() + size > LIMIT:
                under_way = f"answers under way: {self._bytes:,} bytes, this one: {size:,}, allowed: {LIMIT:,}"
                raise failure("busy", f"{under_way}; ask again later, or start more workers")
            self._bytes += size
            self._requests += 1
        return Held(self._freed, size)

    def stream(self, context: flight.ServerCallContext, batch: pa.RecordBatch, held: Held) -> flight.FlightDataStream:
        """Return `batch` as the result of do_get. The memory of its first column, fixed-size binary, keeps `held`."""
        self._count(batch.num_rows)
        views = batch.column(0)
        memory = views.buffers()[1]
        owned = pa.foreign_buffer(memory.address, memory.size, base=(held, memory))
        views = pa.FixedSizeBinaryArray.from_buffers(views.type, len(views), [None, owned])
        batch = batch.set_column(0, batch.schema.field(0), views)
        self._sent.append((time.monotonic(), _client(context), weakref.ref(held)))
        return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(batch.schema, [batch]))

    def status(self) -> dict[str, float]:
        """Return seconds served, views answered, their rate per second, requests under way, bytes held, and clients.

        Under way is what is being decoded or sent. Clients are the connections with a valid request, at the last look.
        """
        now = time.monotonic()
        with self._lock:
            held, first = self._under_way(), max(self._began, int(now) - RECENT + 1)
            views = sum(number for second, number in self._recent if second > int(now) - RECENT)
            values = {"views": self._views, "rate": views / max(now - first, 1.0), "queue": self._requests}
        return {"seconds": now - self._began, **values, "bytes_held": held, "clients": self._clients}

    def watch(self, address: int | str) -> None:
        """Watch the connections to a port, or to the path of a Unix socket, until the block of `closing` ends.

        Let this process open as many files as the system allows it: connections are files until they are ended.
        """
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        threading.Thread(target=self._watch, args=(address,), name="penstock-guard", daemon=True).start()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """End `watch` after the block, in which the server shuts down: that waits for its clients.

        Once no answer is under way, the connections of all are ended.
        """
        self._closing = True
        try:
            yield
        finally:
            self._closed.set()

    def _count(self, views: int) -> None:
        second = int(time.monotonic())
        with self._lock:
            self._views += views
            if not self._recent or self._recent[-1][0] < second:
                self._recent.append([second, 0])
            self._recent[-1][1] += views

    def _under_way(self) -> int:
        """Return the bytes of all answers; `_lock` is held."""
        while self._freed:
            self._bytes -= self._freed.popleft()
            self._requests -= 1
        return self._bytes

    def _watch(self, address: int | str) -> None:
        while not self._closed.wait(PERIOD):
            with self._lock:
                over = self._closing and not self._under_way()
            late = self._late()
            asked, self._asked = self._asked, set()
            before, self._connections, clients = self._connections, {}, 0
            for client, connection in _connections(address):
                known = self._connections[client] = before.get(client) or _Connection(time.monotonic())
                lost = client and known.overdue(_received(connection), client in asked)
                clients += not client or known.valid
                if over or lost or client in late:
                    with suppress(OSError):  # the client has just ended it
                        connection.shutdown(socket.SHUT_RDWR)
            self._clients = clients

    def _late(self) -> set[str]:
        """Return the clients that have not read an answer in time."""
        late, limit = set(), time.monotonic() - TAKEN_WITHIN
        while self._sent and (self._sent[0][0] < limit or self._sent[0][2]() is None):
            _, client, held = self._sent.popleft()
            if held() is not None:
                late.add(client)
        return late


@dataclass
class _Connection:
    since: float  # when it began, or when a look last showed a valid request
    received: int = 0  # bytes until then
    valid: bool = False  # one of its requests was valid

    def overdue(self, received: int, asked: bool) -> bool:
        """Return whether its client has sent too much, or nothing for too long, without a valid request."""
        now = time.monotonic()
        if asked:
            self.since, self.received, self.valid = now, received, True
        return now - self.since > (SILENT if self.valid else ASKS_WITHIN) or received - self.received > LARGEST


def _client(context: flight.ServerCallContext) -> str:
    """Return the address and port of a call's client; "" for each client of a Unix socket."""
    host, _, port = urllib.parse.unquote(context.peer()).partition(":")[2].rpartition(":")
    return _name(host.strip("[]"), port)


def _name(host: str, port: int | str) -> str:
    return f"{host.removeprefix('::ffff:').partition('%')[0]} {port}" if host else ""


def _connections(address: int | str) -> Iterator[tuple[str, socket.socket]]:
    """Yield the clients that are connected to `address`, with duplicates of the sockets, which gRPC owns."""
    for number in map(int, os.listdir("/proc/self/fd")):
        # closed since, no socket, a listening one, or its client is gone
        with suppress(OSError), _duplicate(number) as connection:
            own, client, unix = connection.getsockname(), connection.getpeername(), connection.family == socket.AF_UNIX
            if (own if unix else own[1]) == address:
                yield "" if unix else _name(*client[:2]), connection


def _duplicate(number: int) -> socket.socket:
    duplicate = os.dup(number)
    try:
        return socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise


def _received(connection: socket.socket) -> int:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, RECEIVED + 8)
    (received,) = struct.unpack_from("Q", info, RECEIVED)
    return int(received)

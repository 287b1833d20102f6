"""A worker in this process; its clients: Arrow Flight's, and bytes on a socket as no library would send them."""

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import flight

from damaged import canonical, mutate
from pipeline import manifest
from pipeline.online.parts import PROTOCOL
from pipeline.online.turbo import fingerprint
from pipeline.service import guard
from pipeline.service.worker import Server, Worker

JsonObject = dict[str, Any]
SAMPLES = 41  # of the training split of `dataset`
WINDOW = 2**31 - 1  # bytes that a client lets the worker send before it reads
ENDS, ENDS_HEADERS = 1, 4  # flags
DATA, HEADERS, SETTINGS, WINDOW_UPDATE = 0, 1, 4, 8  # types of frames
SERVICE = b"/arrow.flight.protocol.FlightService/"


@pytest.fixture(name="good", scope="session")
def right_request(dataset: Path) -> JsonObject:
    """A right request."""
    identity, options = manifest.load(dataset).identity, {"recipe": "alexnet", "views": "random", "positions": "code"}
    versions = {"protocol": PROTOCOL, "codec": fingerprint()}
    numbers = {
        "view": 224,
        "seed": 3,
        "max_bad": 0,
        "step": 5,
        "epoch": 1,
        "ids": [0, 40, 7],
        "owners": None,
        "bad": [],
    }
    return {**versions, "data": dataset.name, "identity": identity, "split": "train", **options, **numbers}


@pytest.fixture(name="server")
def running(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A worker of the data sets beside `dataset`."""
    monkeypatch.setattr(guard, "PERIOD", 0.02)
    with serving(dataset.parent) as server:
        yield server


@contextmanager
def serving(root: Path, location: str = "grpc://127.0.0.1:0", **options: Any) -> Iterator[Server]:
    """Serve the data sets of a folder in this process."""
    with Worker(root) as worker, Server(worker, location, **options) as server:
        yield server


def sized(good: JsonObject, count: int) -> bytes:
    """Return the request with so many ids."""
    return json.dumps(good | {"ids": [number % SAMPLES for number in range(count)]}).encode()


def client(address: int | str) -> flight.FlightClient:
    """Return a client, with a connection of its own, of a port or a Unix socket."""
    location = f"grpc+unix://{address}" if isinstance(address, str) else f"grpc://127.0.0.1:{address}"
    return flight.FlightClient(location, generic_options=[("grpc.use_local_subchannel_pool", 1)])


def options(token: str | None = None) -> flight.FlightCallOptions:
    return flight.FlightCallOptions(
        timeout=20, headers=[(b"authorization", f"Bearer {token}".encode())] if token else []
    )


def answered(asking: flight.FlightClient, data: bytes, token: str | None = None) -> pa.Table | tuple[str, str]:
    """Return the worker's answer, or the kind and the message of its error, both empty where there is neither."""
    try:
        return asking.do_get(flight.Ticket(data), options(token)).read_all()
    except flight.FlightError as error:
        detail = json.loads(error.extra_info or '{"kind": "", "message": ""}')
        return detail["kind"], detail["message"]


def ask(asking: flight.FlightClient, data: bytes, token: str | None = None) -> int | tuple[str, str]:
    """Return the number of views in an answer, or the error."""
    answer = answered(asking, data, token)
    return answer if isinstance(answer, tuple) else answer.num_rows


def waited(condition: Callable[[], bool]) -> bool:
    """Return, after at most 20 seconds, whether it is so."""
    deadline = time.monotonic() + 20
    while not (outcome := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return outcome


def frame(kind: int, flags: int, stream: int, data: bytes = b"") -> bytes:
    """Return an HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(data))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + data


def preface() -> bytes:
    """Return the beginning of a connection."""
    settings = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, WINDOW))  # SETTINGS_INITIAL_WINDOW_SIZE
    return (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW - 65535))
    )


def headers(method: bytes = b"DoGet", stream: int = 1, more: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """Return the beginning of a call; HPACK's literals, at most 126 bytes each (RFC 7541, section 6.2.2)."""
    first = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", SERVICE + method), (b":authority", b"x"))
    fields = (*first, (b"te", b"trailers"), (b"content-type", b"application/grpc"), *more)
    lines = [b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in fields]
    return frame(HEADERS, ENDS_HEADERS, stream, b"".join(lines))


def ticket(data: bytes, stream: int = 1) -> bytes:
    """Return the message of DoGet, a protobuf with the field 1; at most 16 kB of data."""
    length, varint = len(data), b""
    while length > 127:
        length, varint = length >> 7, varint + bytes([length & 127 | 128])
    message = b"\x0a" + varint + bytes([length]) + data
    return frame(DATA, ENDS, stream, b"\0" + struct.pack(">I", len(message)) + message)


def connected(address: int | str, data: bytes = b"", room: int = 2**12) -> socket.socket:
    """Return a connection to a port or a Unix socket, on which `data` is sent; the client's buffer has `room` bytes."""
    client = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    client.settimeout(20)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    client.connect(address if isinstance(address, str) else ("127.0.0.1", address))
    client.sendall(data)
    return client


def received(client: socket.socket, count: int) -> bool:
    """Read so many bytes; return whether they came before the connection's end."""
    while count > 0 and (data := client.recv(min(count, 2**16))):
        count -= len(data)
    return count <= 0


def ended(client: socket.socket) -> bool:
    """Return whether the worker has ended the connection after at most 20 seconds."""
    try:
        while client.recv(2**16):
            pass
    except TimeoutError:
        return False
    except OSError:  # reset, since there was more to read
        pass
    return True


STRANGERS = {
    "silence": b"",
    "half a preface": preface()[:10],
    "a preface": preface(),
    "a call without its message": preface() + headers(),
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n",
    "TLS": bytes.fromhex("160301010001000100fc0303") + bytes(248),
    "noise": bytes(range(256)) * 8,
}
NAMES = (
    "..",
    "../dataset",
    "/etc",
    "dataset/..",
    "./dataset",
    "dataset/train",
    "dataset/\0",
    "",
    "é" * 200,
    "a/" * 240 + "a",
)
OUTSIDE = Path("/nowhere/for/a/case")


def mutated(draw: Random, good: dict[str, Any]) -> bytes:
    """Draw a request with a value of another type or range, one missing or new, another name, or other bytes."""
    kind = draw.choice(("value", "value", "value", "name", "bytes"))
    if kind == "value":
        return canonical(mutate(draw, good)[0], OUTSIDE)
    if kind == "name":
        return json.dumps(good | {"data": draw.choice(NAMES)}).encode()
    return flipped(draw, json.dumps(good).encode())


def flipped(draw: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(changed[: draw.randrange(len(data))] if draw.random() < 0.2 else changed)


def strange(draw: Random, port: int, call: bytes) -> socket.socket:
    """Return a connection with anything but a whole call on it, or whose client is gone."""
    kind = draw.choice(("half", "flipped", "foreign", "noise", "vanishes"))
    if kind == "half":
        return connected(port, call[: draw.randrange(len(call))])
    if kind == "flipped":
        return connected(port, flipped(draw, call))
    if kind == "foreign":
        return connected(port, draw.choice(list(STRANGERS.values())))
    if kind == "noise":
        return connected(port, preface() * draw.randrange(2) + draw.randbytes(draw.randrange(1, 3000)))
    with connected(port, call) as vanishing:
        received(vanishing, draw.randrange(1, 20_000))
    return vanishing

"""What a worker refuses, and what clients that are no consumers of ours can do to it: no harm to others."""

import json
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("pyarrow.flight")

import pyarrow as pa
from pyarrow import flight

from conftest import patched
from pipeline import UserError, manifest
from pipeline.online.parts import PROTOCOL, parse
from pipeline.online.samples import BadSample
from pipeline.online.turbo import fingerprint
from pipeline.service import guard
from pipeline.service.worker import Server, Worker
from wire import STRANGERS, connected, ended, headers, mutated, preface, received, strange, ticket
from workers import started

TOKEN = "0123456789abcdef"
VIEW = 224 * 224 * 3  # bytes
SAMPLES = 41  # of the training split
JsonObject = dict[str, Any]
OTHER_TOKEN = "this worker has another token: give both sides the same file"


@pytest.fixture
def server(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A worker of the data sets beside `dataset`."""
    monkeypatch.setattr(guard, "PERIOD", 0.02)
    with serving(dataset.parent) as server:
        yield server


@pytest.fixture(scope="session")
def good(dataset: Path) -> JsonObject:
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


# Who may ask


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ([], "this worker asks for a token: set PENSTOCK_FEED_TOKEN_FILE to its file"),
        (["Bearer 0123456789abcdeX"], OTHER_TOKEN),
        (["Bearer 0123456789abcdef "], OTHER_TOKEN),
        (["0123456789abcdef"], OTHER_TOKEN),
        ([""], OTHER_TOKEN),
        (["Bearer 0123456789abcdef", "x"], OTHER_TOKEN),
    ],
)
def test_wrong_tokens(dataset: Path, good: JsonObject, sent: list[str], message: str):
    with serving(dataset.parent, token=TOKEN) as server, client(server.port) as asking:
        wrong = flight.FlightCallOptions(timeout=20, headers=[(b"authorization", value.encode()) for value in sent])
        with pytest.raises(flight.FlightError) as caught:
            asking.do_get(flight.Ticket(sized(good, 1)), wrong).read_all()
        assert json.loads(caught.value.extra_info) == {"kind": "refused", "message": message}
        assert ask(asking, sized(good, 1), TOKEN) == 1


POINT = flight.FlightDescriptor.for_path("dataset")
MEBIBYTE = pa.record_batch([pa.array([b"x" * 2**20])], names=["view"])


def put(writer: flight.FlightStreamWriter, reader: object) -> None:
    """Send 100 MiB."""
    for _ in range(100):
        writer.write_batch(MEBIBYTE)
    writer.close()


def exchange(writer: flight.FlightStreamWriter, reader: object) -> None:
    writer.begin(MEBIBYTE.schema)
    put(writer, reader)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("do_action", lambda asking: list(asking.do_action(flight.Action("x", b"y"), options()))),
        ("list_actions", lambda asking: list(asking.list_actions(options()))),
        ("list_flights", lambda asking: list(asking.list_flights(b"", options()))),
        ("get_flight_info", lambda asking: asking.get_flight_info(POINT, options())),
        ("handshake", lambda asking: asking.authenticate_basic_token("a", "b", options())),
        ("do_put", lambda asking: put(*asking.do_put(POINT, MEBIBYTE.schema, options()))),
        ("do_exchange", lambda asking: exchange(*asking.do_exchange(POINT, options()))),
    ],
)
def test_other_calls(server: Server, name: str, call: Callable[[flight.FlightClient], Any]):
    with client(server.port) as asking:
        with pytest.raises(flight.FlightError) as caught:
            call(asking)
        message = f"a worker answers do_get alone, not {name}"
        assert json.loads(caught.value.extra_info) == {"kind": "refused", "message": message}


def test_encrypted(dataset: Path, good: JsonObject, tmp_path: Path):
    """With a certificate, a client that does not encrypt gets nothing."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    if not shutil.which("openssl"):
        pytest.skip("no openssl here to make a certificate")
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=worker"
    line = [*words.split(), "-addext", "subjectAltName=DNS:worker", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(line, check=True, capture_output=True, timeout=60)
    tls = (certificate.read_bytes(), key.read_bytes())
    with serving(dataset.parent, "grpc+tls://127.0.0.1:0", token=TOKEN, tls=tls) as server:
        trust = {"tls_root_certs": certificate.read_bytes(), "override_hostname": "worker"}
        with flight.FlightClient(f"grpc+tls://127.0.0.1:{server.port}", **trust) as asking:
            assert ask(asking, sized(good, 2), TOKEN) == 2
        with client(server.port) as asking:
            assert ask(asking, sized(good, 1), TOKEN) == ("", "")
        with flight.FlightClient(f"grpc+tls://127.0.0.1:{server.port}", **trust) as asking:
            assert ask(asking, sized(good, 1), "fedcba9876543210") == ("refused", OTHER_TOKEN)


# What clients cost


def hung(address: int | str, good: JsonObject) -> socket.socket:
    """Return a connection on which the worker has begun to send an answer of 64 views, which nobody reads."""
    slow = connected(address, preface() + headers() + ticket(sized(good, 64)))
    assert received(slow, 2000)  # more than the settings
    return slow


@pytest.mark.parametrize("unix", [False, True])
def test_an_answer_that_nobody_reads(
    dataset: Path, good: JsonObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unix: bool
):
    """It leaves no room for others, who are told at once, until its connection is ended."""
    monkeypatch.setattr(guard, "LIMIT", 100 * VIEW)
    path = str(tmp_path / "worker")
    with serving(dataset.parent, f"grpc+unix://{path}" if unix else "grpc://127.0.0.1:0") as server:
        address = path if unix else server.port
        with client(address) as asking, hung(address, good) as slow:
            size = f"{64 * VIEW:,}"
            under_way = f"answers under way: {size} bytes, this one: {size}, allowed: {100 * VIEW:,}"
            assert ask(asking, sized(good, 64)) == ("busy", f"{under_way}; ask again later, or start more workers")
            monkeypatch.setattr(guard, "TAKEN_WITHIN", 0.2)
            assert waited(lambda: ask(asking, sized(good, 64)) == 64)
            assert ended(slow)


@pytest.mark.parametrize("reset", [False, True])
def test_clients_that_vanish_amid_an_answer(
    server: Server, good: JsonObject, monkeypatch: pytest.MonkeyPatch, reset: bool
):
    """Their memory is free again."""
    monkeypatch.setattr(guard, "LIMIT", 100 * VIEW)
    with client(server.port) as asking:
        for _ in range(10):
            with hung(server.port, good) as lost:
                assert ask(asking, sized(good, 64))[0] == "busy"
                if reset:
                    lost.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            assert waited(lambda: ask(asking, sized(good, 64)) == 64)


@pytest.mark.parametrize("data", STRANGERS.values(), ids=STRANGERS)
def test_connections_without_a_request_are_ended(
    server: Server, good: JsonObject, monkeypatch: pytest.MonkeyPatch, data: bytes
):
    """One that has asked is kept."""
    with connected(server.port, preface() + headers() + ticket(sized(good, 0))) as kept:
        assert len(kept.recv(2**16)) > 0
        monkeypatch.setattr(guard, "ASKS_WITHIN", 0.3)
        with connected(server.port, data) as stranger:
            assert ended(stranger)
        kept.sendall(headers(stream=3) + ticket(sized(good, 64), 3))
        assert received(kept, 10**6)


def test_a_request_without_end(server: Server, good: JsonObject):
    """Its connection is ended long before the worker has it all in memory."""
    with client(server.port) as huge, pytest.raises(flight.FlightUnavailableError):
        huge.do_get(flight.Ticket(b"x" * 2**27), options()).read_all()
    with client(server.port) as asking:
        assert ask(asking, sized(good, 1)) == 1


# Mutated requests, foreign protocols, connections that end anywhere

GROWTH = 1.05  # of a worker's memory
TRIM = """
import ctypes, threading, time

def trim():
    while not time.sleep(0.5):
        ctypes.CDLL(None).malloc_trim(0)

threading.Thread(target=trim, daemon=True).start()
"""  # of freed memory, which the C library keeps


@contextmanager
def good_client(port: int, data: bytes, right: pa.Table | str) -> Iterator[list[bool]]:
    """Ask all the while; yield what grows by an entry for every answer: True for the right one."""
    outcomes, over = list[bool](), threading.Event()

    def ask_on() -> None:
        with client(port) as asking:
            while not over.wait(0.01):
                outcomes.append(same(answered(asking, data), right))

    thread = threading.Thread(target=ask_on)
    thread.start()
    try:
        yield outcomes
    finally:
        over.set()
        thread.join()


def reference(worker: Worker, data: bytes) -> pa.Table | str:
    """Return the answer of a worker that nobody attacks, or the kind of its error."""
    try:
        return pa.Table.from_batches([worker.answer(parse(data)).to_batch()])
    except UserError as error:
        return "bad" if isinstance(error, BadSample) else "refused"


def same(answer: pa.Table | tuple[str, str], right: pa.Table | str) -> bool:
    if isinstance(answer, tuple):
        kind, message = answer
        return kind == right and 0 < len(message) < 600 and "\n" not in message
    return isinstance(right, pa.Table) and answer.equals(right, check_metadata=True)


def memory(pid: int) -> int:
    """Return the kilobytes that a process has in memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.proof)])
def test_attacks(dataset: Path, good: JsonObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int):
    """No crash, refusals or right answers alone, no growth; and a good client gets right answers all the while."""
    monkeypatch.setenv("PYTHONPATH", patched(tmp_path, TRIM)["PYTHONPATH"])
    data, call = json.dumps(good).encode(), preface() + headers() + ticket(sized(good, 16))
    strangers, wrong, before = deque[socket.socket](maxlen=64), [], 0
    with (
        Worker(dataset.parent) as own,
        started(dataset.parent, command=count > 200) as (worker,),
        client(worker.port) as asking,
        good_client(worker.port, data, reference(own, data)) as outcomes,
    ):
        for number in range(count):
            draw = Random(number)
            if draw.random() < 0.3:
                strangers.append(strange(draw, worker.port, call))
                continue
            attack = mutated(draw, good)
            if not same(answer := answered(asking, attack), reference(own, attack)):
                wrong.append((number, attack[:500], answer))
            if number <= 3000:  # by then it has the threads and open splits that it may have
                before = memory(worker.pid)
        for stranger in strangers:
            stranger.close()
        assert not wrong
        assert len(outcomes) > count // 50
        assert all(outcomes)
        assert count == 200 or waited(lambda: memory(worker.pid) < GROWTH * before)

"""What clients that are no consumers of ours can do to a worker: no harm to others."""

import json
import re
import shutil
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("pyarrow.flight")

import pyarrow as pa
from pyarrow import flight

from conftest import patched
from pipeline import UserError
from pipeline.online.parts import parse
from pipeline.online.samples import BadSample
from pipeline.service import guard
from pipeline.service.worker import Server, Worker
from stored import damage
from wire import (  # noqa: F401 – two are fixtures
    STRANGERS,
    JsonObject,
    answered,
    ask,
    client,
    connected,
    ended,
    headers,
    mutated,
    options,
    preface,
    received,
    right_request,
    running,
    serving,
    sized,
    strange,
    ticket,
    waited,
)
from workers import started

VIEW = 224 * 224 * 3  # bytes


# What clients cost


def hung(address: int | str, good: JsonObject, room: int = 2**12) -> socket.socket:
    """Return a connection on which the worker has begun to send an answer of 64 views, which nobody reads."""
    slow = connected(address, preface() + headers() + ticket(sized(good, 64)), room)
    assert received(slow, 2000)  # more than the settings
    return slow


@pytest.mark.parametrize("unix", [False, True])
def test_an_answer_that_nobody_reads(
    dataset: Path, good: JsonObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unix: bool
):
    """It leaves no room for others, who are told at once, until its connection is ended."""
    limit = 64 * VIEW + guard.LEAST - 1
    monkeypatch.setattr(guard, "LIMIT", limit)
    path = str(tmp_path / "worker")
    with serving(dataset.parent, f"grpc+unix://{path}" if unix else "grpc://127.0.0.1:0") as server:
        address = path if unix else server.port
        with client(address) as asking, hung(address, good) as slow:
            under_way = f"answers under way: {64 * VIEW:,} bytes, this one: {guard.LEAST:,}, allowed: {limit:,}"
            assert ask(asking, sized(good, 1)) == ("busy", f"{under_way}; ask again later, or start more workers")
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


def test_errors_leave_no_memory_taken(dataset: Path, good: JsonObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(guard, "LIMIT", 100 * VIEW)
    copy = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    damage(copy, 17)
    broken, whole = json.dumps(good | {"ids": [17] * 64}).encode(), json.dumps(good | {"ids": [0] * 64}).encode()
    with serving(tmp_path) as server, client(server.port) as asking:
        for _ in range(5):
            kind, message = ask(asking, broken)
            assert kind == "bad"
            assert "train-000001.tar: damaged at sample 17" in message
        assert ask(asking, whole) == 64
        monkeypatch.setattr(guard, "LIMIT", 50 * VIEW)
        most = f"the answer would have {64 * VIEW:,} bytes; at most {50 * VIEW:,}: ask for fewer samples"
        assert ask(asking, whole) == ("refused", most)


@pytest.mark.parametrize("reads", [False, True])
def test_a_worker_ends_after_its_answers(dataset: Path, good: JsonObject, monkeypatch: pytest.MonkeyPatch, reads: bool):
    """And does not wait longer for a client that does not read than before."""
    monkeypatch.setattr(guard, "TAKEN_WITHIN", 20.0 if reads else 1.0)
    with serving(dataset.parent) as server, hung(server.port, good, 2**18) as slow:
        ending = threading.Thread(target=server.shutdown, daemon=True)
        ending.start()
        ending.join(3 * guard.PERIOD)
        assert ending.is_alive()
        if reads:
            assert received(slow, 64 * VIEW)
        ending.join(20)
        assert not ending.is_alive()
        assert ended(slow)


def test_a_worker_ends_though_connections_are_open(dataset: Path, good: JsonObject):
    """At once, of clients that have asked, and of others."""
    kept = preface() + headers() + ticket(sized(good, 0))
    with serving(dataset.parent) as server, connected(server.port, kept) as client:
        assert received(client, 500)
        client.sendall(headers(stream=3))  # a call that will never be whole
        with connected(server.port, preface() + headers()), connected(server.port):
            began = time.monotonic()
            server.shutdown()
            assert time.monotonic() - began < guard.ASKS_WITHIN / 2


@pytest.mark.parametrize("data", STRANGERS.values(), ids=STRANGERS)
def test_connections_without_a_request_are_ended(
    server: Server, good: JsonObject, monkeypatch: pytest.MonkeyPatch, data: bytes
):
    """One that has asked is kept."""
    with connected(server.port, preface() + headers() + ticket(sized(good, 0))) as kept:
        assert len(kept.recv(2**16)) > 0
        monkeypatch.setattr(guard, "ASKS_WITHIN", 0.3)
        monkeypatch.setattr(guard, "LARGEST", 2000)
        with connected(server.port, data) as stranger:
            assert ended(stranger)
        for stream in range(5, 25, 2):  # more than that, but with requests
            time.sleep(0.05)
            kept.sendall(headers(stream=stream) + ticket(sized(good, 0), stream))
        kept.sendall(headers(stream=25) + ticket(sized(good, 64), 25))
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
    strangers, wrong, before = deque[socket.socket](maxlen=512), [], 0
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

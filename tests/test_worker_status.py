"""A worker's account of itself, against what a trainer received of it."""

import json
from pathlib import Path

import pytest

pytest.importorskip("pyarrow.flight")

from pipeline import manifest
from pipeline.online.connection import Connection, Failure, Status
from pipeline.online.endpoints import parse
from pipeline.service.worker import Server
from wire import (  # noqa: F401 – two are fixtures
    JsonObject,
    ask,
    client,
    connected,
    headers,
    preface,
    received,
    right_request,
    running,
    sized,
    ticket,
    waited,
)
from workers import loader, started

TOKEN = "0123456789abcdef"
VIEW = 224 * 224 * 3  # bytes


def status(address: str, token: str | None = None, timeout: float = 20) -> Status:
    """Ask a worker as the control plane does."""
    _, (parsed,) = parse([address])
    (endpoint,) = parsed.endpoints()
    return Connection(endpoint, token, None).status(timeout)


def test_views_are_those_that_a_consumer_received(dataset: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setenv("PENSTOCK_FEED_TOKEN_FILE", str(tmp_path / "token"))
    with started(dataset.parent, token=TOKEN, threads=2) as (worker,):
        before = status(worker.address, TOKEN)
        assert [before[key] for key in ("views", "rate", "queue", "bytes_held", "datasets")] == [0, 0.0, 0, 0, []]
        assert before["threads"] == 2
        with loader(
            dataset, split="val", views="centre", order="fixed", batch_size=1, workers=[worker.address]
        ) as batches:
            ids = [number for batch in batches for number in batch.ids.tolist()]
            assert waited(lambda: status(worker.address, TOKEN)["clients"] == 1)
            after = status(worker.address, TOKEN)
        assert after["views"] == len(ids) == manifest.load(dataset).split("val").samples > 0
        assert after["datasets"] == [dataset.name]
        assert len(ids) / (after["seconds"] + 1) <= after["rate"] <= len(ids)
        assert after["seconds"] > before["seconds"] > 0
        assert waited(lambda: status(worker.address, TOKEN)["clients"] == 0)
        with pytest.raises(Failure, match="this worker asks for a token") as refused:
            status(worker.address)
        assert refused.value.kind == "refused"
    with pytest.raises(Failure) as silent:
        status(worker.address, TOKEN)
    assert silent.value.kind == "unreachable"


def test_requests_under_way(server: Server, good: JsonObject):
    """An answer that is not read yet counts, with its bytes; one that failed does not."""
    with client(server.port) as asking:
        assert ask(asking, json.dumps(good | {"ids": [10**6]}).encode())[0] == "refused"
    address = f"127.0.0.1:{server.port}"
    assert status(address)["queue"] == 0
    with connected(server.port, preface() + headers() + ticket(sized(good, 64))) as slow:
        assert received(slow, 2000)  # more than the settings
        now = status(address)
        assert (now["queue"], now["bytes_held"], now["views"]) == (1, 64 * VIEW, 64)
        assert received(slow, 64 * VIEW)
        assert waited(lambda: status(address)["queue"] == 0)
    assert status(address)["bytes_held"] == 0

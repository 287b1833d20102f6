"""Batches by way of decoding workers: those of the local loader, byte for byte; who is left; answers that are none."""

import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import flight

from conftest import one_line
from pipeline import UserError
from workers import (  # noqa: F401 – three are fixtures
    Worker,
    addresses,
    assert_same,
    loader,
    started,
    taken,
    three_workers,
    two_data_sets,
    two_without_shards,
)

OPTIONS: dict[str, dict[str, Any]] = {  # 41 samples in batches of 8: the last of an epoch has one
    "plain": {},
    "uint8": {"output": "uint8"},
    "float16": {"output": "float16"},
    "aligned": {"mean": "aligned"},
    "colour": {"mean": "colour", "lighting": "off"},
    "paper": {"lighting": "paper", "positions": "paper"},
    "neither crops nor flips": {"positions": "centre", "flips": False},
    "until": {"lighting_until": 5, "view": 64},
    "chunk": {"crop_chunk": 4, "batch_size": 40, "depth": 1},
    "shards": {"order": "shards", "window": 8, "seed": 2**64 - 1},
    "fixed": {"order": "fixed", "step": 10**9},
    "drop": {"last": "drop"},
    "one": {"batch_size": 1, "depth": 9},
    "whole epochs, in uneven parts": {"batch_size": 41, "depth": 1},
    "more than an epoch": {"batch_size": 500, "depth": 1, "output": "uint8"},
    "ranks, the last batch empty": {"rank": 1, "ranks": 3, "crop_chunk": 3},
    "ranks, most of them empty": {"rank": 7, "ranks": 8, "output": "uint8"},
    "two devices": {"device": ("cpu:0", "cpu:1")},
    "centre": {"views": "centre", "step": 2},
    "ten": {"views": "ten"},
    "ten, aligned": {"views": "ten", "mean": "aligned", "view": 64, "batch_size": 41, "depth": 1},
    "validation": {"split": "val", "views": "centre", "mean": "aligned", "batch_size": 2},
    "nine": {"views": "nine", "view": 128, "output": "uint8"},
    "imagenet": {"recipe": "imagenet"},
    "imagenet, uint8": {"recipe": "imagenet", "output": "uint8", "batch_size": 41, "depth": 1},
    "imagenet, centre": {"recipe": "imagenet", "views": "centre"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batches_are_those_of_the_local_loader(served: Path, alone: Path, crew: list[Worker], options: dict):
    data = "whole" if "recipe" in options else "dataset"
    steps = 2 + 100 // options.get("batch_size", 8)
    local = taken(served / data, steps, **options)
    for count in (1, 2, 3):
        assert_same(local, taken(alone / data, steps, workers=addresses(crew[:count]), **options))


@pytest.mark.parametrize("options", [{"flips": False}, {"positions": "centre"}, {"view": 64}, {"seed": 9}], ids=str)
def test_a_worker_takes_consumers_of_different_views_at_once(served: Path, crew: list[Worker], options: dict):
    data, one = served / "dataset", addresses(crew[:1])
    with loader(data, workers=one) as plain, loader(data, workers=one, **options) as other:
        pairs = [(next(plain), next(other)) for _ in range(3)]
    assert_same(taken(data, 3), [batch for batch, _ in pairs])
    assert_same(taken(data, 3, **options), [batch for _, batch in pairs])


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 3), (3, 1)])
def test_a_run_goes_on_with_other_workers(served: Path, alone: Path, crew: list[Worker], before: int, after: int):
    """None, too: a state does not say who decoded."""
    whole = taken(served / "dataset")
    data = {0: served / "dataset"}
    with loader(data.get(before, alone / "dataset"), workers=addresses(crew[:before])) as batches:
        first = list(islice(batches, 5))
        state = batches.state_dict()
        assert_same(whole[5:7], list(islice(batches, 2)))
        batches.load_state_dict(state)
        assert_same(whole[5:7], list(islice(batches, 2)))
    with loader(data.get(after, alone / "dataset"), workers=addresses(crew[:after])) as batches:
        batches.load_state_dict(state)
        assert_same(whole, first + list(islice(batches, 9)))
    with loader(served / "dataset") as batches:
        list(islice(batches, 5))
        assert state == batches.state_dict()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_have_the_batches_of_one(served: Path, alone: Path, crew: list[Worker], ranks: int):
    whole = taken(served / "dataset", crop_chunk=3)
    parts = [
        taken(alone / "dataset", crop_chunk=3, rank=rank, ranks=ranks, workers=addresses(crew)) for rank in range(ranks)
    ]
    for one, *theirs in zip(whole, *parts, strict=True):
        assert torch.equal(one.images, torch.cat([part.images for part in theirs]))
        assert torch.equal(one.labels, torch.cat([part.labels for part in theirs]))
        assert np.concatenate([part.ids for part in theirs]).tolist() == one.ids.tolist()


def test_batches_name_their_workers(alone: Path, served: Path, crew: list[Worker]):
    batches = taken(alone / "dataset", 60, workers=addresses(crew))
    names = {batch.worker for batch in batches}
    assert all(any(worker.address in name for name in names) for worker in crew), names
    assert batches[-1].workers == 3
    assert {(batch.worker, batch.workers) for batch in taken(served / "dataset")} == {("", 0)}


@pytest.mark.parametrize("depth", [1, 4])
def test_workers_and_local_decoding_share_the_work(served: Path, crew: list[Worker], depth: int):
    options = {"batch_size": 40, "depth": depth, "output": "uint8"}
    fed = taken(served / "dataset", 20, workers=["local", *addresses(crew[:1])], **options)
    assert_same(taken(served / "dataset", 20, **options), fed)
    assert len({batch.worker for batch in fed}) == 2, {batch.worker for batch in fed}


# Who is left


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of what takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_one_that_answers_is_enough(served: Path, alone: Path, crew: list[Worker], silent: str, closed: str):
    fed = taken(alone / "dataset", workers=[silent, closed, crew[0].address])
    assert_same(taken(served / "dataset"), fed)
    assert {batch.workers for batch in fed} <= {1, 2, 3}


@pytest.mark.parametrize("kill", [0, 4])
def test_nobody_left_who_decodes(served: Path, alone: Path, kill: int, closed: str):
    """Before the first batch, and amid a run; without shards here. The patience over, each one's failure is named."""
    with started(served, 2) as workers, pytest.raises(UserError) as caught:
        names, began = [*addresses(workers), closed], time.monotonic()
        if not kill:
            for worker in workers:
                worker.kill()
        with loader(alone / "dataset", workers=names, patience=1) as batches:
            list(islice(batches, kill))
            for worker in workers:
                worker.kill()
            while True:
                began = time.monotonic()
                next(batches)
    assert 0.5 < time.monotonic() - began < 8
    one_line(caught, *names, "patience")


@pytest.mark.parametrize("kill", [0, 4])
def test_nobody_left_but_the_shards_are_here(served: Path, kill: int, caplog: pytest.LogCaptureFixture):
    """The loader decodes, says so once, and has the workers decode again once they are back."""
    with started(served, 2) as workers, caplog.at_level(logging.WARNING, "penstock"):
        if not kill:
            for worker in workers:
                worker.kill()
        with loader(served / "dataset", workers=addresses(workers), patience=30) as batches:
            fed = list(islice(batches, kill))
            for worker in workers:
                worker.kill()
            fed += islice(batches, 30)
            lines = [record.getMessage() for record in caplog.records if "local" in record.getMessage()]
            for worker in workers:
                worker.restart()
            deadline = time.monotonic() + 20
            while workers[0].address not in fed[-1].worker:
                assert time.monotonic() < deadline
                fed.append(next(batches))
                time.sleep(0.01)
    assert len(lines) == 1, caplog.text
    assert_same(taken(served / "dataset", len(fed)), fed)


def test_all_workers_start_again(served: Path, alone: Path):
    """The loader waits for them, and goes on."""
    with started(served, 2) as workers, loader(alone / "dataset", workers=addresses(workers), patience=30) as batches:
        fed = list(islice(batches, 4))
        for _ in range(2):
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.restart()
            fed += islice(batches, 8)
    assert_same(taken(served / "dataset", len(fed)), fed)


@pytest.mark.parametrize("taken", [0, 3])
def test_closing_ends_the_threads(served: Path, alone: Path, taken: int, silent: str):
    """Also while a worker is stopped amid a request, and another one never answers."""
    before = {thread.ident for thread in threading.enumerate()}
    with started(served, 1) as (worker,):
        with loader(alone / "dataset", workers=[worker.address, silent], depth=4, patience=2) as batches:
            list(islice(batches, taken))
            worker.signal(signal.SIGSTOP)
            time.sleep(0.2)
            began = time.monotonic()
        assert time.monotonic() - began < 5
        deadline = time.monotonic() + 10  # a request under way ends with the patience
        while not {thread.ident for thread in threading.enumerate()} <= before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(RuntimeError, match="the loader is closed"):
            next(batches)


# Answers that are none


def spoiled(batch: pa.RecordBatch, how: str) -> pa.RecordBatch:
    """Return an answer with one thing in it changed."""
    columns = dict(zip(batch.schema.names, batch.columns))
    metadata = batch.schema.metadata
    if how == "fewer":
        columns = {name: column[1:] for name, column in columns.items()}
    elif how == "order":
        columns["id"] = columns["id"][::-1]
    elif how == "id":
        columns["id"] = pa.array([10**6] * len(batch))
    elif how == "label":
        columns["label"] = pa.array([2**40] * len(batch))
    elif how == "type":
        columns["label"] = columns["label"].cast(pa.float64())
    elif how == "null":
        columns["label"] = pa.array([None] * len(batch), pa.int64())
    elif how == "width":
        columns["view"] = pa.array([bytes(150)] * len(batch), pa.binary(150))
    elif how == "column":
        del columns["view"]
    else:
        metadata = {b"bad": how.encode()}
    made = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    return made.replace_schema_metadata(metadata)


@pytest.mark.parametrize(
    "how", ["fewer", "order", "id", "label", "type", "null", "width", "column", "nonsense", '[{"id": -1}]', "[" * 10**5]
)
def test_what_is_no_answer_is_not_mixed_in(served: Path, alone: Path, crew: list[Worker], how: str):
    """A worker in between spoils it: beside another one it is left alone; by itself it is named."""

    class Spoiler(flight.FlightServerBase):
        def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.GeneratorStream:
            with flight.FlightClient(f"grpc://{crew[0].address}") as client:
                batch = client.do_get(ticket).read_chunk().data
            answer = spoiled(batch, how) if len(batch) else batch
            return flight.GeneratorStream(answer.schema, iter([answer]))

    with Spoiler("grpc://127.0.0.1:0") as server:
        address = f"127.0.0.1:{server.port}"
        fed = taken(alone / "dataset", workers=[address, crew[1].address])
        assert_same(taken(served / "dataset"), fed)
        assert not any(address in batch.worker for batch in fed)
        with (
            pytest.raises(UserError) as caught,
            loader(alone / "dataset", workers=[address], patience=1) as batches,
        ):
            next(batches)
        one_line(caught, address)

"""Faults of workers and of what they read: bad samples, kills, stops; no batch differs, and none is missing."""

import gc
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import pytest

from conftest import build, one_line
from pipeline import UserError, manifest
from pipeline.manifest import DatasetError
from runs import assert_same_end, options, resumed, trainer
from s3 import Store, empty_bucket, running_server  # noqa: F401 – two are fixtures
from stored import damage, forge, misstate
from workers import Worker, addresses, assert_same, loader, started, taken, without_shards

BAD = (17, 18, 40)  # of 41
Harm = Callable[..., None]


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """A data set to harm, in a worker's folder of its own."""
    return Path(shutil.copytree(dataset, tmp_path / "copy" / "dataset"))


def bare(root: Path) -> Path:
    """Return a copy of a data set without its shards."""
    return without_shards(root, root.parent.parent / "bare" / root.name)


# Bad samples


@pytest.mark.parametrize("harm", [damage, forge])
@pytest.mark.parametrize(
    "more", [{}, {"views": "ten"}, {"batch_size": 40, "depth": 1, "crop_chunk": 3}, {"rank": 1, "ranks": 3}], ids=str
)
def test_bad_samples_are_those_of_the_local_loader(
    copy: Path, harm: Harm, more: dict, caplog: pytest.LogCaptureFixture
):
    """And so are what stands in for them, their count, and the warnings; whether the shards are here, too, or not."""
    harm(copy, *BAD)
    caplog.set_level(logging.WARNING, "penstock")
    seen = []
    with started(copy.parent, 2) as crew:
        for data, workers in ((copy, ()), (copy, addresses(crew)), (bare(copy), addresses(crew))):
            caplog.clear()
            with loader(data, max_bad=3, workers=workers, **more) as batches:
                taken = list(islice(batches, 14))
                texts = (record.getMessage().partition("; ")[0] for record in caplog.records)
                lines = {re.sub("^[^/]*: ", "", text) for text in texts}  # but for the worker's name
                seen.append((taken, batches.bad, batches.state_dict(), lines, len(caplog.records)))
    local, *fed = seen
    for taken, *rest in fed:
        assert_same(local[0], taken)
        assert rest == list(local[1:])


def test_pictures_whose_headers_lie(raw: Path, tmp_path: Path):
    """Whole pictures: one that stands in for another has a window of its own size."""
    root = tmp_path / "copy" / "whole"
    assert build(raw, root, "--crop", "none", "--workers", 1, "--samples-per-shard", 16).exit_code == 0
    forge(root, 1)
    damage(root, 17)
    misstate(root, 5, 30)
    options = {"recipe": "imagenet", "max_bad": 4}
    with started(root.parent, 2) as workers, loader(bare(root), workers=addresses(workers), **options) as batches:
        fed = list(islice(batches, 14))
        assert batches.bad == [1, 5, 17, 30]
    assert_same(taken(root, **options), fed)


@pytest.mark.parametrize("harm", [damage, forge])
@pytest.mark.parametrize("limit", [0, 2])
def test_more_bad_samples_than_may_be(copy: Path, harm: Harm, limit: int):
    """The error is of the local loader's kind, and comes again; a worker does not suffer from it."""
    harm(copy, *BAD[: limit + 1])
    with loader(copy, max_bad=limit) as batches, pytest.raises(DatasetError) as local:
        list(islice(batches, 6))
    shard = f"train-{manifest.load(copy).samples('train')['shard'][17]:06d}.tar"
    with started(copy.parent, 2) as workers:
        with loader(bare(copy), max_bad=limit, workers=addresses(workers)) as batches:
            for _ in range(2):
                with pytest.raises(DatasetError) as caught:
                    list(islice(batches, 6))
                assert type(caught.value) is type(local.value)
                count = f"samples that failed: {limit + 1}, allowed: max_bad={limit}"
                words = ("damaged at sample 17 (key",) if harm is damage and not limit else (count,)
                one_line(caught, shard if not limit else ".tar", *words, "verify_shards")
        whole = {"batch_size": 8, "max_bad": 3}
        assert_same(taken(copy, **whole), taken(bare(copy), workers=addresses(workers), **whole))


def test_all_samples_are_bad(copy: Path):
    damage(copy, *range(41))
    with (
        started(copy.parent, 2) as workers,
        loader(bare(copy), batch_size=4, max_bad=1000, workers=addresses(workers)) as batches,
    ):
        for _ in range(2):  # and again
            with pytest.raises(DatasetError, match="samples that failed: 41, allowed: max_bad=1000"):
                next(batches)


@pytest.mark.parametrize("limit", [0, 3])
@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_what_another_worker_reads_is_not_bad(dataset: Path, copy: Path, harm: str, limit: int):
    """One worker's copy is damaged, another's is whole."""
    whole = Path(shutil.copytree(dataset, copy.parent.parent / "whole" / "dataset"))
    with started(copy.parent) as damaged, started(whole.parent) as others:
        if harm == "flip":
            damage(copy, *BAD)
        else:
            for shard in (copy / "train").glob("*.tar"):
                os.truncate(shard, 2000)
        texts = addresses([*damaged, *others])
        with loader(bare(whole), batch_size=40, depth=1, max_bad=limit, workers=texts) as batches:
            fed = list(islice(batches, 6))
            assert batches.bad == []
    assert_same(taken(dataset, 6, batch_size=40), fed)


def test_no_worker_can_read_its_shards(copy: Path):
    """Cut short after a worker had opened them: its name and the shard's, once the patience is over."""
    with started(copy.parent) as workers, loader(bare(copy), workers=addresses(workers), patience=1) as batches:
        next(batches)
        for shard in (copy / "train").glob("*.tar"):
            os.truncate(shard, 2000)
        with pytest.raises(UserError) as caught:
            list(islice(batches, 20))
    one_line(caught, workers[0].address, "cut short at sample", ".tar")


def test_the_count_goes_on_after_a_resume(copy: Path):
    damage(copy, *BAD)
    with started(copy.parent, 2) as workers:
        options = {"batch_size": 41, "max_bad": 3, "workers": addresses(workers)}
        with loader(bare(copy), **options) as batches:
            next(batches)
            state = batches.state_dict()
        assert state["bad"] == list(BAD)
        damage(copy, 5)
        with loader(bare(copy), **options) as batches:
            batches.load_state_dict(state)
            with pytest.raises(DatasetError, match=r"sample 5 .*samples that failed: 4"):
                next(batches)


# Kills and stops


@pytest.mark.parametrize(("kills", "steps"), [(3, 60), pytest.param(50, 500, marks=pytest.mark.proof)])
def test_kills_cost_no_batch(dataset: Path, copy: Path, kills: int, steps: int):
    """SIGKILL of a random worker, another one in its place; no step waits longer than the patience."""
    draw, patience, waits = random.Random(kills), 20, []
    with (
        started(copy.parent, 3) as workers,
        loader(dataset) as local,
        loader(bare(copy), workers=addresses(workers), patience=patience, depth=3) as fed,
    ):
        victim = None
        for step in range(steps):
            began = time.monotonic()
            batch = next(fed)
            waits.append(time.monotonic() - began)
            if step % (steps // kills) == steps // kills // 2:
                if victim:
                    victim.ready()
                victim = draw.choice(workers)
                victim.kill()
                victim.begin()
            assert_same([next(local)], [batch])
        assert victim
        victim.ready()
    assert max(waits) < patience


def test_a_stopped_worker_is_left_out_and_comes_back(dataset: Path, copy: Path):
    """Its parts are served by the others soon, long before the patience is over."""
    with (
        started(copy.parent, 3) as workers,
        loader(dataset, batch_size=40) as local,
        loader(bare(copy), batch_size=40, workers=addresses(workers), patience=60, depth=2) as fed,
    ):
        stopped = workers[1]

        def step() -> tuple[float, str]:
            began = time.monotonic()
            batch = next(fed)
            waited = time.monotonic() - began
            assert_same([next(local)], [batch])
            return waited, batch.worker

        for _ in range(10):
            step()
        stopped.signal(signal.SIGSTOP)
        steps = [step() for _ in range(20)]
        assert max(waited for waited, _ in steps) < 10
        assert all(stopped.address not in name for _, name in steps[8:]), steps
        stopped.signal(signal.SIGCONT)
        deadline = time.monotonic() + 45
        while stopped.address not in step()[1]:
            assert time.monotonic() < deadline


def test_a_worker_that_comes_back_with_other_data_is_announced(
    small: Path, dataset: Path, copy: Path, caplog: pytest.LogCaptureFixture
):
    """The batches go on without it, and its refusal is logged once, after its failure."""
    shutil.copytree(small, copy.parent.parent / "other" / "dataset")
    with (
        started(copy.parent, 2) as workers,
        caplog.at_level(logging.WARNING, "penstock"),
        loader(bare(copy), workers=addresses(workers)) as batches,
    ):
        fed = []

        def go_on(text: str) -> None:
            deadline = time.monotonic() + 20
            while text not in caplog.text:
                assert time.monotonic() < deadline
                fed.extend(islice(batches, 4))

        go_on("")
        workers[0].kill()
        go_on(f"{workers[0].address}: ")
        workers[0].root = str(copy.parent.parent / "other")
        workers[0].restart()
        go_on("another data set")
        fed += islice(batches, 100)
    assert caplog.text.count(f"{workers[0].address}: dataset: another data set of that name: ") == 1
    assert_same(taken(dataset, len(fed)), fed)


def test_closed_loaders_leave_no_connections(dataset: Path, copy: Path):
    """At once, without the garbage collector."""

    def opened() -> int:
        for thread in threading.enumerate():
            if thread.name == "penstock-puller":  # of an answer that nobody waits for
                thread.join(20)
        return len(os.listdir("/proc/self/fd"))

    with started(copy.parent) as workers:
        taken(bare(copy), 1, workers=addresses(workers))
        gc.collect()
        before = opened()
        gc.disable()
        try:
            for _ in range(12):
                taken(bare(copy), 1, workers=addresses(workers))
            deadline = time.monotonic() + 10
            while (after := opened()) > before + 3:
                assert time.monotonic() < deadline, f"{before} files were open, and now {after}"
                time.sleep(0.05)
        finally:
            gc.enable()


# Proofs


@pytest.mark.proof
def test_the_batches_ahead_have_one_patience(copy: Path):
    """As the end of a program shows, which waits for their threads."""
    with started(copy.parent) as (worker,):
        address = worker.address
    code = f"""from pipeline.online import Loader
Loader({str(bare(copy))!r}, batch_size=1, depth=400, patience=4, workers=[{address!r}])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.proof
@pytest.mark.parametrize("consumer", ["bare", "url"])
def test_workers_read_an_object_store(copy: Path, s3: Store, tmp_path: Path, consumer: str):
    """Each with a cache of its own; the consumer has no shards, and no cache; a third of the store's answers fail."""
    s3.upload(copy, "below/dataset")
    data = bare(copy) if consumer == "bare" else f"{s3.url}/below/dataset"
    s3.faults(0.3, seed=7)
    with (
        started(f"{s3.url}/below", cache=tmp_path / "one", cache_bytes=10**9) as first,
        started(f"{s3.url}/below", cache=tmp_path / "other", cache_bytes=10**9) as second,
    ):
        fed = taken(data, workers=addresses([*first, *second]))
    assert_same(taken(copy), fed)
    shards = [path for cache in ("one", "other") for path in (tmp_path / cache).rglob("train-*.tar")]
    assert shards  # a worker whose requests the store fails may be left alone for all of so few steps


@contextmanager
def killing(workers: list[Worker]) -> Iterator[None]:
    """Kill a random worker, and start another in its place, again and again."""
    over, draw = threading.Event(), random.Random(0)

    def kill() -> None:
        while not over.wait(0.1):
            victim = draw.choice(workers)
            victim.kill()
            victim.restart()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.proof
@pytest.mark.parametrize("kill", [False, True])
def test_a_run_with_workers_ends_with_the_bytes_of_one_without(dataset: Path, copy: Path, tmp_path: Path, kill: bool):
    """By `--feed`, and gone on with; workers are those of the command, killed or not. There are no shards here."""
    with started(copy.parent, 2, command=True) as workers, killing(workers) if kill else nullcontext():
        feed = ("--feed", ",".join(addresses(workers)))
        for name, data, more in (("local", dataset, ()), ("fed", bare(copy), feed)):
            for words in (
                options(data, tmp_path / name, "train.steps=8"),
                resumed(data, tmp_path / name, "train.steps=16"),
            ):
                done = trainer("train", *words, *more, page=False)
                assert done.exit_code == 0, done.output
    assert_same_end(tmp_path / "local", tmp_path / "fed")

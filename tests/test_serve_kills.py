"""SIGKILL at random moments of a queue: of `penstock serve`, of the commands that it runs, and of their wrappers."""

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from conftest import digests
from pipeline.service import child
from runs import TINY, assert_same_end, train
from serving import Server, served

BUILD = {"samples_per_shard": 16, "workers": 2, "retries": 10}
LASTING = 240.0  # seconds for a whole queue
ACTS = ("", "kill", "cancel")  # what happens shortly before a server is killed


def submit_build(server: Server, raw: Path, name: str) -> int:
    return int(server.submit("build", dataset=name, raw=str(raw), **BUILD)["id"])


def processes(root: Path) -> list[int]:
    """Return the living processes of all jobs of a server's folder."""
    mark, found = f"{child.MARK}={root}/".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            found += [int(path.name)] if mark in (path / "environ").read_bytes() else []
    return sorted(found)


def kill_one(root: Path, draw: random.Random) -> None:
    """Kill a process of a running job, if any: its wrapper, its command, or a child of that."""
    if living := processes(root):
        with suppress(ProcessLookupError):
            os.kill(draw.choice(living), signal.SIGKILL)


def events(server: Server, number: int) -> list[tuple[str, dict]]:
    """Return the events of a job that is over."""
    text = server.client.get(f"/v1/jobs/{number}/events").raise_for_status().text
    found = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert [event["id"] for event in found] == sorted({event["id"] for event in found})
    return [(event["kind"], event["data"]) for event in found]


def assert_ended_once(server: Server, number: int, state: str) -> None:
    """Check the story of a job that is over: queued, started once, resumed for each further attempt, ended once."""
    job, told = server.job(number), events(server, number)
    kinds = [kind for kind, _ in told]
    assert (kinds[0], kinds[-1]) == ("queued", "ended")
    assert (kinds.count("ended"), kinds.count("started")) == (1, min(1, job["attempt"])), (job, kinds)
    assert kinds.count("resumed") == max(0, job["attempt"] - 1), (job, kinds)
    assert told[-1][1]["state"] == job["state"]
    assert job["state"] == state, (job, server.log(number))


def unfinished(server: Server) -> list[int]:
    jobs = server.client.get("/v1/jobs", params={"limit": 1000}).raise_for_status().json()["jobs"]
    return [job["id"] for job in jobs if not job["ended"]]


def disturbed(server: Server, raw: Path, kills: int, draw: random.Random, builds: int) -> tuple[int, list[int]]:
    """Kill a server so often, always while jobs run; return how many builds there are now, and the cancelled jobs."""
    cancelled: list[int] = []
    for number in range(kills):
        if not unfinished(server):
            submit_build(server, raw, f"d{builds}")
            builds += 1
        act = ACTS[number % len(ACTS)]
        if act == "cancel":
            cancelled.append(int(server.submit("feed")["id"]))
        time.sleep(draw.choice((0.3, 1.5)) * draw.random())  # many of the kills within the server's first moments
        if act == "kill":
            kill_one(server.root, draw)
        elif act == "cancel":
            assert server.client.post(f"/v1/jobs/{cancelled[-1]}/cancel").status_code == 202
        time.sleep(draw.choice((0, 0.5)) * draw.random())
        server.again()
    return builds, cancelled


@pytest.mark.parametrize(
    ("kills", "builds", "runs", "count"), [(3, 3, 1, 8), pytest.param(30, 10, 2, 60, marks=pytest.mark.proof)]
)
def test_kills(raw: Path, dataset: Path, tmp_path: Path, kills: int, builds: int, runs: int, count: int):
    """Every job ends once, with the bytes of a direct build or run, and no process of it is left."""
    draw, deadline = random.Random(seed := int(os.environ.get("PENSTOCK_SEED", kills))), time.monotonic() + LASTING
    print(f"PENSTOCK_SEED={seed}")
    settings, site = (*TINY, f"train.steps={count}", "train.checkpoint_every=2"), tmp_path / "site"
    as_json = {"recipe": "tiny", "retries": 10, "set": dict(word.split("=") for word in settings)}
    shutil.copytree(dataset, site / "datasets" / "there")  # for jobs of the kind feed
    with served(site, "--raw-root", raw, "--slots", "cpu=2") as server:
        for i in range(builds):
            submit_build(server, raw, f"d{i}")
        for i in range(runs):
            server.submit("train", dataset="d0", run=f"r{i}", **as_json)
        builds, cancelled = disturbed(server, raw, kills, draw, builds)
        server.until(lambda: not unfinished(server), max(1, deadline - time.monotonic()))
        newest = server.client.get("/v1/jobs").json()["jobs"][0]["id"]
        for number in range(1, newest + 1):
            assert_ended_once(server, number, "cancelled" if number in cancelled else "succeeded")
        assert processes(site) == []
        assert server.errors() == ""
    whole, direct = digests(dataset), tmp_path / "direct"
    assert all(digests(site / "datasets" / f"d{i}") == whole for i in range(builds))
    assert train(dataset, direct, 0, *settings).exit_code == 0
    for i in range(runs):
        assert_same_end(site / "runs" / f"r{i}", direct)

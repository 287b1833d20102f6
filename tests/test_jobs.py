"""Jobs of `penstock serve`: their states, slots, order, cancellation, retries and events, against a real server."""

import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import members
from pipeline import manifest
from pipeline.service import child
from serving import PATIENCE, Server, served

BUILD = {"samples_per_shard": 16, "size": 32}


@pytest.fixture(scope="module")
def server(raw: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a server that has a data set, "there", for jobs that need one."""
    root = tmp_path_factory.mktemp("server")
    shutil.copytree(small, root / "datasets" / "there")
    with served(root, "--raw-root", raw) as server:
        yield server


@pytest.fixture
def site(small: Path, tmp_path: Path) -> Path:
    """Return the folder of a server, with a data set."""
    shutil.copytree(small, tmp_path / "datasets" / "there")
    return tmp_path


def events(server: Server, number: int) -> list[dict]:
    """Return all events of a job that is over, from its stream, which ends with it."""
    text = server.client.get(f"/v1/jobs/{number}/events").raise_for_status().text
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def endless(server: Server) -> dict:
    """Return a running job that ends only when it is cancelled."""
    job = server.submit("feed")
    server.until(lambda: server.job(job["id"])["progress"].get("uri"))
    return job


def test_a_build_and_what_needs_it(server: Server, raw: Path):
    """All are submitted at once; each waits for what it needs."""
    build = server.submit("build", dataset="d", raw=str(raw), **BUILD)
    verify = server.submit("verify", dataset="d")
    bad = server.submit("train", dataset="d", run="r", recipe="tiny", set={"train.steps": "x"})
    jobs = [server.ended(job["id"]) for job in (build, verify, bad)]
    assert [job["state"] for job in jobs] == ["succeeded", "succeeded", "failed"]
    assert "train.steps" in jobs[2]["reason"]
    assert jobs[2]["exit_code"] == 2
    assert jobs[2]["attempt"] == 1
    data = manifest.load(server.root / "datasets/d")
    assert jobs[0]["progress"]["done"] == jobs[0]["progress"]["total"] == 51  # one of them skipped
    assert jobs[0]["progress"]["shards"] == [sum(len(split.shards) for split in data.splits.values())] * 2
    assert jobs[1]["started"] >= jobs[0]["ended"]
    kinds = [event["kind"] for event in events(server, build["id"])]
    assert kinds[:2] == ["queued", "started"]
    assert kinds[-1] == "ended"
    assert {*kinds[2:-1]} == {"progress"}


def test_slots_are_kept_and_jobs_start_in_order(server: Server, raw: Path):
    jobs = [server.submit("build", dataset=f"slot-{i}", raw=str(raw), **BUILD) for i in range(3)]
    done = [server.ended(job["id"]) for job in jobs]
    assert [job["state"] for job in done] == ["succeeded"] * 3
    assert done[0]["ended"] <= done[1]["started"]
    assert done[1]["ended"] <= done[2]["started"]


def test_a_waiting_job_says_what_it_waits_for(server: Server, raw: Path):
    first = server.submit("build", dataset="w", raw=str(raw), **BUILD)
    same = server.submit("build", dataset="w", raw=str(raw), **BUILD)
    other = server.submit("build", dataset="w2", raw=str(raw), **BUILD)
    assert server.until(lambda: server.job(same["id"])["waits_for"]) == f"job {first['id']}, build w"
    assert server.job(other["id"])["waits_for"] == "a free cpu slot; there is 1"
    assert server.ended(same["id"])["reason"].endswith("delete it or name another DATASET")  # the first of its attempts
    assert server.ended(other["id"])["state"] == "succeeded"
    again = server.client.post("/v1/jobs", json={"kind": "build", "dataset": "w", "raw": str(raw)})
    assert again.status_code == 422


def test_a_job_is_cancelled_while_it_waits_and_while_it_runs(server: Server, raw: Path):
    first = server.submit("build", dataset="c", raw=str(raw), **BUILD)
    waiting = server.submit("build", dataset="c2", raw=str(raw), **BUILD)
    assert server.client.post(f"/v1/jobs/{waiting['id']}/cancel").json()["state"] == "cancelled"
    assert server.client.post(f"/v1/jobs/{waiting['id']}/cancel").status_code == 409
    running = endless(server)
    answer = server.client.post(f"/v1/jobs/{running['id']}/cancel")
    assert (answer.status_code, answer.json()["cancelling"]) == (202, True)
    job = server.ended(running["id"])
    assert (job["state"], job["exit_code"]) == ("cancelled", 128 + signal.SIGTERM)
    told = [event["kind"] for event in events(server, running["id"]) if event["kind"] != "progress"]
    assert told == ["queued", "started", "cancelling", "ended"]
    assert not (server.root / "datasets/c2").exists()
    server.ended(first["id"])


def test_who_does_not_end_within_the_grace_is_killed(site: Path):
    with served(site, "--grace", 0.5) as server:
        job = endless(server)
        process = child.running(site / "jobs" / str(job["id"]))
        for pid in members(process.pid):
            os.kill(pid, signal.SIGSTOP)  # none of them hears SIGTERM
        server.client.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status()
        over = server.ended(job["id"])
        assert (over["state"], over["exit_code"]) == ("cancelled", None)
        assert not members(process.pid)


def test_a_killed_command_is_started_again_and_then_fails(server: Server):
    job = server.submit("feed", retries=1)
    for attempt in (1, 2):
        server.until(
            lambda: (now := server.job(job["id"]))["attempt"] == attempt and now["progress"].get("uri"),  # noqa: B023
        )
        process = child.running(server.root / "jobs" / str(job["id"]))
        victim = process.pid if attempt == 1 else members(process.pid)[-1]  # the wrapper, then the command
        os.kill(victim, signal.SIGKILL)
    over = server.ended(job["id"])
    assert (over["state"], over["attempt"], over["exit_code"]) == ("failed", 2, 128 + signal.SIGKILL)
    kinds = [event["kind"] for event in events(server, job["id"]) if event["kind"] != "progress"]
    assert kinds == ["queued", "started", "queued", "resumed", "ended"]
    again = server.client.post(f"/v1/jobs/{job['id']}/retry").json()
    assert again["kind"] == "feed"
    assert again["id"] > job["id"]
    server.client.post(f"/v1/jobs/{again['id']}/cancel").raise_for_status()


def test_a_restarted_server_takes_over_what_runs(site: Path):
    with served(site) as server:
        job = endless(server)
        before = child.running(site / "jobs" / str(job["id"]))
        server.again()
        assert child.running(site / "jobs" / str(job["id"])) == before
        assert server.job(job["id"])["state"] == "running"
        server.client.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status()
        assert server.ended(job["id"])["state"] == "cancelled"
        assert [event["kind"] for event in events(server, job["id"])].count("ended") == 1


def test_what_was_lost_without_a_server_is_resumed(site: Path):
    with served(site) as server:
        job = server.submit("feed", retries=0)
        server.until(lambda: server.job(job["id"])["progress"].get("uri"))
        server.end(signal.SIGKILL)
        child.end_all(site / "jobs" / str(job["id"]))
        server.begin()
        now = server.until(lambda: now if (now := server.job(job["id"]))["attempt"] == 2 else None)
        assert now["state"] == "running"


def test_stopped_jobs_go_on_with_the_next_server(site: Path):
    with served(site, "--stop-jobs") as server:
        job = endless(server)
        assert server.end() == 128 + signal.SIGTERM
        assert child.running(site / "jobs" / str(job["id"])) is None
        with sqlite3.connect(site / "penstock.db") as database:
            assert database.execute("SELECT state FROM jobs WHERE id = ?", (job["id"],)).fetchall() == [("queued",)]
        database.close()
        server.begin()
        server.until(lambda: server.job(job["id"])["attempt"] == 2)


def test_no_event_is_lost_or_doubled_by_a_reconnect(server: Server, raw: Path):
    job = server.submit("build", dataset="heard", raw=str(raw), **BUILD | {"samples_per_shard": 1})
    heard: list[tuple[int, str]] = []
    deadline = time.monotonic() + PATIENCE
    while not (heard and heard[-1][1] == "ended"):
        assert time.monotonic() < deadline
        last = {"Last-Event-ID": str(heard[-1][0])} if heard else {}
        with server.client.stream("GET", f"/v1/jobs/{job['id']}/events", headers=last) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    heard.append((event["id"], event["kind"]))
                    break  # and connect anew
    whole = [(event["id"], event["kind"]) for event in events(server, job["id"])]
    assert heard == whole
    after = {"Last-Event-ID": str(whole[-1][0])}
    assert server.client.get(f"/v1/jobs/{job['id']}/events", headers=after).status_code == 204


def test_a_key_makes_one_job(server: Server):
    request = {"json": {"kind": "feed"}, "headers": {"Idempotency-Key": "k1"}}
    first, second = (server.client.post("/v1/jobs", **request) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    other = server.client.post("/v1/jobs", json={"kind": "feed", "port": 1}, headers={"Idempotency-Key": "k1"})
    assert other.status_code == 422
    assert f"belongs to job {first.json()['id']}, " in other.json()["detail"]
    server.client.post(f"/v1/jobs/{first.json()['id']}/cancel").raise_for_status()


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"kind": "build", "dataset": "../x", "raw": "RAW"}, "dataset '../x'"),
        ({"kind": "build", "dataset": "x.tmp", "raw": "RAW"}, "take another name"),
        ({"kind": "build", "dataset": "x", "raw": "/etc"}, "not below a folder of raw images"),
        ({"kind": "build", "dataset": "x", "raw": "RAW/../.."}, "not below a folder of raw images"),
        ({"kind": "build", "dataset": "x", "raw": "RAW", "labels": "/etc/passwd"}, "not below a folder"),
        ({"kind": "build", "dataset": "x", "raw": "RAW", "size": 8}, "size 8"),
        ({"kind": "build", "dataset": "x", "raw": "RAW", "sise": 8}, "sise 8"),
        ({"kind": "train", "dataset": "x", "run": "y", "recipe": "/tmp/recipe.toml"}, "recipe '/tmp/recipe.toml'"),
        ({"kind": "train", "dataset": "x", "run": "y", "gpus": 1}, "this server has slots for 0"),
        ({"kind": "train", "dataset": "x", "run": "y", "set": {"--init": "/etc/passwd"}}, "set"),
        ({"kind": "shell"}, "shell"),
    ],
)
def test_what_is_refused_is_not_queued(server: Server, raw: Path, params: dict, words: str):
    newest = server.client.get("/v1/jobs", params={"limit": 1}).json()["next"]
    text = json.dumps(params).replace("RAW", str(raw))
    answer = server.client.post("/v1/jobs", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert words in answer.json()["detail"]
    assert server.client.get("/v1/jobs", params={"limit": 1}).json()["next"] == newest

"""Workers and numbers over HTTP: against a loader that was fed, and against what was asked of the server."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("pyarrow.flight")

import httpx
import sqlalchemy as sql
from prometheus_client.parser import text_string_to_metric_families

from pipeline import manifest
from pipeline.service.database import Database
from pipeline.service.queue import Queue, Slots
from pipeline.service.scheduler import Scheduler
from pipeline.service.site import Site
from pipeline.service.web import app, metrics
from pipeline.service.web.context import Service
from serving import Server, served
from workers import loader, started

TOKEN = "0123456789abcdef"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(data: Path, address: str) -> int:
    """Read every validation image from a worker, and return their number."""
    with loader(data, split="val", views="centre", order="fixed", batch_size=1, workers=[address]) as batches:
        number = sum(len(batch.ids) for batch in batches)
    assert number == manifest.load(data).split("val").samples > 0
    return number


def workers(server: Server) -> list[dict]:
    return server.client.get("/v1/workers").raise_for_status().json()["workers"]


def by_address(server: Server) -> dict[str, dict]:
    return {row["address"]: row for row in workers(server)}


def scraped(server: Server) -> Samples:
    """Return the samples of /metrics, by name and labels."""
    answer = server.client.get("/metrics").raise_for_status()
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.text)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


@pytest.fixture(name="server", scope="module")
def feeding(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the data set, without jobs."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(dataset, root / "datasets/d")
    with served(root) as server:
        yield server


def test_a_feed_job_tells_the_views_that_a_loader_read(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PENSTOCK_FEED_TOKEN_FILE", str(server.root / "feed.token"))
    job = server.submit("feed", threads=1)
    address = server.until(lambda: server.job(job["id"])["progress"].get("uri"))
    (worker,) = workers(server)
    assert (worker["address"], worker["source"], worker["state"]) == (address, f"job {job['id']}", "serving")
    number = read(server.root / "datasets/d", address)
    told = server.until(lambda: (rows := workers(server))[0]["views"] and rows[0])
    assert (told["views"], told["threads"], told["error"]) == (number, 1, None)
    assert told["datasets"] == ["d"]
    assert_numbers_of_jobs(server)
    assert scraped(server)["penstock_feed_requests", (("job", str(job["id"])),)] == 0
    server.client.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status()
    server.ended(job["id"])
    assert workers(server) == []
    assert_numbers_of_jobs(server)


def assert_numbers_of_jobs(server: Server) -> None:
    """Compare /metrics with the list of jobs."""
    jobs, now = server.client.get("/v1/jobs").json()["jobs"], scraped(server)
    for kind in ("build", "verify", "train", "evaluate", "figures", "feed"):
        for state in ("queued", "running", "succeeded", "failed", "cancelled"):
            number = len([job for job in jobs if (job["kind"], job["state"]) == (kind, state)])
            assert now["penstock_jobs", (("kind", kind), ("state", state))] == number
    assert now["penstock_queue_length", ()] == 0
    assert now["penstock_slots", (("slot", "cpu"),)] == 1
    feeding = len([job for job in jobs if (job["kind"], job["state"]) == ("feed", "running")])
    used = {dict(labels)["slot"]: value for (name, labels), value in now.items() if name == "penstock_slots_used"}
    assert used == {"cpu": 0, "gpu": 0, "feed": feeding}
    assert 0 <= now["penstock_scheduler_idle_seconds", ()] < metrics.LATE
    assert now["process_resident_memory_bytes", ()] > 10**6


def test_workers_of_other_machines_are_asked(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One that does not answer is there with the reason."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    monkeypatch.setenv("PENSTOCK_FEED_TOKEN_FILE", str(token))
    with started(dataset.parent, 2, token=TOKEN, threads=2) as (one, other):
        feeds = ["--feed", one.address, "--feed", f"grpc://{other.address}", "--feed", "nowhere.invalid"]
        with served(tmp_path / "root", *feeds) as server:
            assert sorted(row["state"] for row in workers(server)) == ["serving", "serving", "silent"]
            number = read(dataset, one.address)
            other.kill()
            rows = server.until(lambda: (rows := by_address(server))[feeds[3]]["error"] and rows)
            assert sorted(rows) == sorted(feeds[1::2])
            assert {row["source"] for row in rows.values()} == {"--feed"}
            serving, killed, nowhere = (rows[address] for address in feeds[1::2])
            assert (serving["state"], serving["views"], serving["error"]) == ("serving", number, None)
            assert (killed["state"], killed["views"]) == (nowhere["state"], nowhere["views"]) == ("silent", None)
            assert "refused" in killed["error"].lower()
            assert nowhere["error"]
            token.write_text(TOKEN[::-1])
            refused = server.until(lambda: by_address(server)[one.address]["error"])
            assert refused == "this worker has another token: give both sides the same file"


def test_numbers_of_answers(server: Server):
    """As many as there were, under the route's template, with the bytes of their bodies."""
    before = scraped(server)
    texts = [server.client.get(f"/v1/runs/{name}").text for name in ("a", "b", "c")]
    assert server.client.get("/nowhere").status_code == 404
    listed = server.client.get("/v1/jobs").text
    after = scraped(server)

    def grown(name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0)

    count, size = "penstock_http_request_duration_seconds_count", "penstock_http_response_bytes_total"
    assert grown(count, method="GET", route="/v1/runs/{name}", status="404") == 3
    assert grown(count, method="GET", route="/v1/jobs", status="200") == 1
    assert grown(count, method="GET", route="other", status="404") == 1
    assert grown(size, route="/v1/runs/{name}") == sum(len(text.encode()) for text in texts)
    assert grown(size, route="/v1/jobs") == len(listed.encode())
    assert not [key for key in after if "nowhere" in str(key)]


def test_streams_are_counted_while_they_last(server: Server):
    assert scraped(server)["penstock_event_streams", ()] == 0
    with server.client.stream("GET", "/v1/events") as stream:
        assert stream.status_code == 200
        server.until(lambda: scraped(server)["penstock_event_streams", ()] == 1)
    server.until(lambda: scraped(server)["penstock_event_streams", ()] == 0)
    timed = [key for key in scraped(server) if key[0].endswith("seconds_count") and "/v1/events" in str(key)]
    assert timed == []


def test_health(server: Server):
    for path in ("/healthz", "/readyz"):
        answer = server.client.get(path)
        assert (answer.status_code, answer.text) == (200, "ok")


def test_a_server_that_is_not_ready(tmp_path: Path):
    """Its scheduler hangs; then its database fails, too. It is alive all the same."""
    site, data = Site(tmp_path), Database(f"sqlite:///{tmp_path / 'penstock.db'}")
    queue = Queue(site, data, Slots())
    scheduler = Scheduler(queue, data, 1)
    transport = httpx.ASGITransport(app.create(Service(site, data, queue, scheduler)))

    def get(path: str) -> httpx.Response:
        async def asked() -> httpx.Response:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.get(path)

        return asyncio.run(asked())

    assert get("/readyz").status_code == 200
    scheduler.looked -= 2 * metrics.LATE
    hung = get("/readyz")
    assert hung.status_code == 503
    assert hung.json()["detail"].startswith("the scheduler has not looked at its jobs for 60 s")
    with data.writing() as connection:
        connection.execute(sql.text("DROP TABLE events"))
    assert get("/readyz").json()["detail"].startswith("the database does not answer: ")
    assert get("/healthz").text == "ok"
    data.close()

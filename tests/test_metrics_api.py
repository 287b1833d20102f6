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
from workers import Worker, loader, started

TOKEN, NOWHERE = "0123456789abcdef", "nowhere.invalid"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(data: Path, address: str) -> int:
    """Read every validation image from a worker, and return their number."""
    with loader(data, split="val", views="centre", order="fixed", batch_size=1, workers=[address]) as batches:
        number = sum(len(batch.ids) for batch in batches)
    assert number == manifest.load(data).split("val").samples > 0
    return number


def workers(server: Server) -> dict[str, dict]:
    """Return the workers by their addresses."""
    return {row["address"]: row for row in server.client.get("/v1/workers").raise_for_status().json()["workers"]}


def scraped(server: Server) -> Samples:
    """Return the samples of /metrics, by name and labels."""
    answer = server.client.get("/metrics").raise_for_status()
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.text)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


@pytest.fixture(name="crew", scope="module")
def two_workers(dataset: Path) -> Iterator[list[Worker]]:
    with started(dataset.parent, 2, token=TOKEN, threads=2) as workers:
        yield workers


@pytest.fixture(name="server", scope="module")
def observing(dataset: Path, crew: list[Worker], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the data set, that knows the workers, and one that is nowhere."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(dataset, root / "datasets/d")
    (root / "token").write_text(TOKEN)
    feeds = [word for worker in crew for word in ("--feed", worker.address)]
    with served(root, *feeds, "--feed", NOWHERE, PENSTOCK_FEED_TOKEN_FILE=str(root / "token")) as server:
        yield server


@pytest.fixture(name="token", autouse=True)
def token_of_the_loader(server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSTOCK_FEED_TOKEN_FILE", str(server.root / "token"))
    return server.root / "token"


def test_a_feed_job_tells_the_views_that_a_loader_read(server: Server):
    job = server.submit("feed", threads=1)
    source, address = f"job {job['id']}", server.until(lambda: server.job(job["id"])["progress"].get("uri"))
    worker = workers(server)[address]
    assert (worker["source"], worker["state"]) == (source, "serving")
    number = read(server.root / "datasets/d", address)
    told = server.until(lambda: (row := workers(server)[address])["views"] and row)
    assert (told["views"], told["threads"], told["error"]) == (number, 1, None)
    assert told["datasets"] == ["d"]
    assert_numbers_of_jobs(server)
    assert scraped(server)["penstock_feed_requests", (("job", str(job["id"])),)] == 0
    server.client.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status()
    server.ended(job["id"])
    assert source not in {row["source"] for row in workers(server).values()}
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


def test_workers_of_other_machines_are_asked(server: Server, dataset: Path, crew: list[Worker], token: Path):
    """One that does not answer is there with the reason."""
    one, other = crew
    assert sorted(row["state"] for row in workers(server).values()) == ["serving", "serving", "silent"]
    number = read(dataset, one.address)
    other.kill()
    rows = server.until(lambda: (rows := workers(server))[other.address]["error"] and rows)
    assert {row["source"] for row in rows.values()} == {"--feed"}
    serving, killed, nowhere = (rows[address] for address in (one.address, other.address, NOWHERE))
    assert (serving["state"], serving["views"], serving["error"]) == ("serving", number, None)
    assert (killed["state"], killed["views"]) == (nowhere["state"], nowhere["views"]) == ("silent", None)
    assert "refused" in killed["error"].lower()
    assert nowhere["error"]
    token.write_text(TOKEN[::-1])
    refused = server.until(lambda: workers(server)[one.address]["error"])
    assert refused == "this worker has another token: give both sides the same file"
    token.write_text(TOKEN)


def test_numbers_of_answers(server: Server):
    """As many as there were, under the route's template, with the bytes of their bodies."""
    before = scraped(server)
    texts = [server.client.get(f"/v1/runs/{name}").text for name in ("a", "b", "c")]
    assert server.client.get("/nowhere").status_code == 404
    assert server.client.get("/v1/jobs", headers={"Authorization": "Bearer wrong"}).status_code == 401
    listed = server.client.get("/v1/jobs").text
    after = scraped(server)

    def grown(name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0)

    count, size = "penstock_http_request_duration_seconds_count", "penstock_http_response_bytes_total"
    assert grown(count, method="GET", route="/v1/runs/{name}", status="404") == 3
    assert grown(count, method="GET", route="/v1/jobs", status="200") == 1
    assert grown(count, method="GET", route="other", status="404") == 1
    assert grown(count, method="GET", route="other", status="401") == 1  # refused before a route is looked for
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
        head = server.client.head(path)
        assert (head.status_code, head.headers["content-length"], head.content) == (200, "2", b"")


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

"""`penstock serve` on a PostgreSQL server of its own: a queue with kills, and the order of events."""

import json
import os
import pwd
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from conftest import ROOT, digests
from pipeline.service.database import Database
from serving import Server, served

BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(BINARIES is None, reason="no PostgreSQL server is installed (Debian: postgresql)"),
]


AS = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}


def run(*words: object) -> None:
    """Run a program of PostgreSQL's, which does not work as root, as `nobody` there."""
    line = [str(BINARIES / str(words[0])), *map(str, words[1:])]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, **AS)
    assert done.returncode == 0, done.stdout + done.stderr


def control(folder: Path, word: str) -> None:
    """Start, stop or restart the server; "immediate" is as a crash."""
    settings = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    mode = ("-o", settings, "-l", folder / "log") if word != "stop" else ()
    run("pg_ctl", "-D", folder / "data", "-w", "-m", "immediate", *mode, word)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Return the folder of a running PostgreSQL, with its Unix socket."""
    with tempfile.TemporaryDirectory(prefix="pg-") as name:
        folder = Path(name)
        if AS:
            os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
        run("initdb", "-D", folder / "data", "--auth=trust", "--username=penstock", "--no-sync", "--encoding=UTF8")
        control(folder, "start")
        try:
            yield folder
        finally:
            control(folder, "stop")


def listen(server: Server, heard: list[dict], over: threading.Event) -> None:
    """Gather the events of all jobs, each once, through all losses of the connection, until `over`."""
    while not over.is_set():
        last = {"Last-Event-ID": str(heard[-1]["id"] if heard else 0)}
        with suppress(httpx.TransportError), httpx.stream("GET", f"{server.url}/v1/events", headers=last) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    heard.append(json.loads(line.removeprefix("data: ")))
                if over.is_set():
                    break
        time.sleep(0.05)


def test_a_queue_with_kills_of_both_servers(folder: Path, raw: Path, dataset: Path, tmp_path: Path):
    url, heard, over = f"postgresql+psycopg://penstock@/postgres?host={folder}", list[dict](), threading.Event()
    with served(tmp_path, "--raw-root", raw, "--database", url) as server:
        listener = threading.Thread(target=listen, args=(server, heard, over))
        listener.start()
        try:
            jobs = []
            for name in ("a", "b", "c"):
                jobs.append(server.submit("build", dataset=name, raw=str(raw), workers=1, samples_per_shard=16)["id"])
                jobs.append(server.submit("verify", dataset=name)["id"])
            for number in jobs[:4:2]:
                server.until(lambda: server.job(number)["state"] == "running")  # noqa: B023
                server.again()
            control(folder, "stop")
            away = server.client.get("/v1/jobs")
            assert (away.status_code, "does not answer" in away.json()["detail"]) == (503, True)
            control(folder, "start")
            assert [server.ended(number)["state"] for number in jobs] == ["succeeded"] * 6
            data = Database(url)
            stored = data.events(0)
            data.close()
            server.until(lambda: heard and heard[-1]["id"] >= stored[-1].id)
        finally:
            over.set()
            server.submit("verify", dataset="none")  # whose events wake the listener
            listener.join(60)
        assert not listener.is_alive()
    told = [(event["id"], event["job"], event["kind"]) for event in heard]
    assert told[: len(stored)] == [(event.id, event.job, event.kind) for event in stored]
    assert sorted(event.job for event in stored if event.kind == "ended") == jobs
    for name in ("a", "b", "c"):
        assert digests(tmp_path / "datasets" / name) == digests(dataset)


def test_tokens(folder: Path, tmp_path: Path):
    url = f"postgresql+psycopg://penstock@/postgres?host={folder}"
    line = [sys.executable, "-m", "penstock", "token", "create", "--root", tmp_path, "--database", url]
    made = subprocess.run([*line, "--scope", "read"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    (token,) = (word for word in made.stdout.split() if word.startswith("pst_"))
    with served(tmp_path, "--database", url, "--require-token") as server:
        answers = [
            server.client.request(method, "/v1/jobs", headers={"Authorization": f"Bearer {text}"}).status_code
            for method, text in (("GET", token), ("GET", token + "x"), ("POST", token))
        ]
    assert answers == [200, 401, 403]


def test_a_database_that_is_not_there_is_one_line(tmp_path: Path):
    line = [sys.executable, "-m", "penstock", "serve", "--root", tmp_path, "--port", "0", "--database"]
    url = f"postgresql+psycopg://penstock:secret@/postgres?host={tmp_path}"
    done = subprocess.run([*line, url], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "secret" not in done.stderr

"""The command `penstock serve` itself: what it refuses in one line, its port and folder, and how it ends."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from serving import PATIENCE, served

START = [sys.executable, "-m", "penstock", "serve", "--port", "0"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
NO_PACKAGE = """import runpy, sys
sys.modules["{0}"] = None
sys.argv[0] = "penstock"
runpy.run_module("penstock", run_name="__main__", alter_sys=True)
"""


def refused(*options: object, start: list[str] = START) -> str:
    """Run a `serve` that has to end at once with code 2 and one line, and return the line."""
    words = [*start, *map(str, options)]
    ended = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=PATIENCE)
    assert (ended.returncode, ended.stdout) == (2, ""), ended
    assert ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Return a folder of things that no server works with."""
    (tmp_path / "file").write_text("no PEM")
    for name in ("good", "damaged", "other", "blocked"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged/penstock.db").write_bytes(bytes(range(256)) * 64)
    with sqlite3.connect(tmp_path / "other/penstock.db") as other:
        other.execute("CREATE TABLE jobs (id INTEGER PRIMARY KEY, name TEXT)")
    other.close()
    (tmp_path / "blocked/datasets").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("root", "options", "said"),
    [
        ("file", (), "file: is a file, not a directory"),
        ("blocked", (), "datasets: File exists"),
        ("damaged", (), "penstock.db: file is not a database"),
        ("other", (), "penstock.db: no such column: jobs."),
        ("good", ("--slots", "cpu=0"), "at least one cpu slot"),
        ("good", ("--slots", "nonsense"), "--slots nonsense: not like cpu=1"),
        ("good", ("--slots", "cpu=" + 5000 * "9"), "not like cpu=1"),
        ("good", ("--raw-root", "/nowhere/raw"), "--raw-root /nowhere/raw: no such folder"),
        ("good", ("--database", "nonsense"), "--database URL: "),
        ("good", ("--database", "postgresql://[::1"), "--database URL: "),
        ("good", ("--database", "postgresql://me:secret@127.0.0.1:1/x"), "me:***@127.0.0.1:1/x: "),
        ("good", ("--host", "0.0.0.0"), "penstock token create --root "),
        ("good", ("--host", "no-such-host.invalid"), "no address of that name"),
        ("good", ("--require-token",), "Error: --require-token: no token is valid"),
        ("good", ("--tls-key", "{odd}/file"), "--tls-key needs --tls-cert"),
        ("good", ("--tls-cert", "{odd}/none"), "--tls-cert {odd}/none: No such file or directory"),
        ("good", ("--tls-cert", "{odd}/file"), "--tls-cert {odd}/file: not a certificate"),
    ],
)
def test_refusals(root: str, options: tuple[str, ...], said: str, odd: Path):
    line = refused("--root", odd / root, *(word.format(odd=odd) for word in options))
    assert said.format(odd=odd) in line
    assert "secret" not in line


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "sqlalchemy"])
def test_a_package_that_is_not_installed(package: str, tmp_path: Path):
    line = refused("--root", tmp_path, start=[sys.executable, "-c", NO_PACKAGE.format(package), "serve"])
    assert f"serve needs the package {package}: pip install" in line


def test_a_port_and_a_folder_serve_once(tmp_path: Path):
    with served(tmp_path / "one") as server, socket.create_server(("127.0.0.1", 0)) as other:
        busy = other.getsockname()[1]
        assert f"--port {busy}: Address already in use" in refused("--root", tmp_path / "two", "--port", busy)
        assert "another server works there" in refused("--root", tmp_path / "one")
        assert server.client.get("/healthz").text == "ok"


@pytest.mark.parametrize("options", [(), ("--stop-jobs",)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_end_by_a_signal(number: int, options: tuple[str, ...], tmp_path: Path):
    """Its words tell of jobs only where some are left."""
    with served(tmp_path, *options) as server:
        code = server.end(number)
        assert (code, server.errors().count("\n")) == (128 + number, 1), server.errors()
        assert "job" not in server.errors()


def test_jobs_that_go_on_are_told(small: Path, tmp_path: Path):
    shutil.copytree(small, tmp_path / "datasets/d")
    with served(tmp_path) as server:
        job = server.submit("feed")
        server.until(lambda: server.job(job["id"])["progress"].get("uri"))
        server.end()
        assert "1 jobs go on; the next server of" in server.errors()


def test_a_refusal_names_the_parameter_in_one_line(tmp_path: Path):
    with served(tmp_path / "site", "--raw-root", tmp_path) as server:
        train = {"kind": "train", "dataset": "d", "run": "r", "feed": ["--option"]}
        assert server.client.post("/v1/jobs", json=train).json()["detail"].startswith("feed.0 '--option': ")
        build = {"kind": "build", "dataset": "d", "raw": f"{tmp_path}/a\nb"}
        assert "\n" not in server.client.post("/v1/jobs", json=build).json()["detail"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with served(tmp_path) as server:
        (tmp_path / "runs/odd/metrics.jsonl").mkdir(parents=True)
        answer = server.client.get("/v1/runs/odd")
        assert answer.status_code == 503
        assert answer.json()["detail"].endswith("runs/odd/metrics.jsonl: Is a directory")
        assert "Traceback" not in server.errors()


def test_nohup(tmp_path: Path):
    """A hang-up that the start ignores is ignored by the server, too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with served(tmp_path) as server:
            server.process.send_signal(signal.SIGHUP)
            assert server.client.get("/healthz").text == "ok"
            assert server.end() == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)

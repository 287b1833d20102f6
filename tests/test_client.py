"""The commands submit, jobs, logs, cancel and retry: with a real server, and with one that misbehaves as told."""

import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from pipeline.service import client, tokens
from pipeline.service.kinds import KINDS, parse
from serving import Server, served
from tools.make_raw import main as make_raw

JOB: dict[str, Any] = {
    "id": 7,
    "kind": "train",
    "target": "first",
    "state": "running",
    "exit_code": None,
    "reason": None,
}
Answer = tuple[int, dict[str, str], bytes]


def run(command: click.Command, *words: object, url: str, token: str = "") -> Result:
    """Run a command in this process."""
    environment = {"PENSTOCK_URL": url, "PENSTOCK_TOKEN": token}
    result = CliRunner().invoke(command, [str(word) for word in words], env=environment)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(result: Result, *parts: str) -> None:
    """One line, with these parts, and the exit code of a mistake."""
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    for part in parts:
        assert part in line


# ---- A real server. ----


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("client")
    made = CliRunner().invoke(make_raw, [str(root / "raw"), "--classes", "2", "--train", "6", "--val", "2"])
    assert made.exit_code == 0
    with served(root / "site", "--raw-root", root / "raw") as server:
        yield server


def test_a_build_is_submitted_followed_listed_and_read(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(server.root.parent)  # where RAW is a path of this folder
    result = run(client.submit, "build", "raw", "set", "--size", 32, "--holdout", 0, "--wait", url=server.url)
    assert result.exit_code == 0, result.output
    number = int(re.match(r"job (\d+), build set: (queued|running)\n", result.output)[1])
    job = server.job(number)
    assert (job["params"]["raw"], job["params"]["holdout"]) == (str(server.root.parent / "raw"), 0)
    log = (server.root / "jobs" / str(number) / "log").read_bytes()
    assert result.output.splitlines()[1:] == server.log(number).splitlines()
    assert run(client.logs, number, url=server.url).output == server.log(number)
    assert run(client.logs, number, "--json", "-f", url=server.url).output.encode() == log
    shown = run(client.jobs, number, "--json", url=server.url).output
    assert json.loads(shown) == job
    row = run(client.jobs, "--kind", "build", "--state", "succeeded", url=server.url).output.splitlines()[-1]
    assert row.split()[:4] == [str(number), "build", "set", "succeeded"]
    assert run(client.jobs, "--kind", "feed", url=server.url).output.count("\n") == 1
    detail = run(client.jobs, number, url=server.url).output
    assert f"\nended:       {job['ended']}\n" in detail
    assert "reason:" not in detail


def test_a_job_that_fails_ends_the_client_as_its_command_did(server: Server):
    raw = server.root.parent / "raw" / "empty"
    raw.mkdir()
    result = run(client.submit, "build", raw, "none", "--wait", "--json", url=server.url)
    job = server.job(json.loads(result.stdout.splitlines()[0])["id"])
    assert (result.exit_code, job["state"], job["exit_code"]) == (2, "failed", 2)
    assert result.stderr == f"Error: job {job['id']} failed: {job['reason']}\n"
    last = run(client.jobs, "--limit", 1, url=server.url)
    assert last.stderr == "the newest 1; there are more (--limit)\n"
    row = last.stdout.splitlines()[-1]
    assert row.split()[3] == "failed"
    assert job["reason"][:60] in row
    again = run(client.retry, job["id"], "--wait", url=server.url)
    assert again.exit_code == 2
    assert f"job {job['id'] + 1}, build none: " in again.stdout


def test_the_servers_refusals_are_shown_in_its_words(server: Server):
    outside = run(client.submit, "build", "/etc", "set", url=server.url)
    refused(outside, "/etc: not below a folder of raw images of this server")
    refused(run(client.submit, "build", server.root.parent / "raw", "..", url=server.url), "dataset '..'")
    refused(run(client.logs, 999, url=server.url), "999: no such job")
    refused(run(client.logs, 999, "-f", url=server.url), "999: no such job")
    refused(run(client.cancel, 999, url=server.url), "999: no such job")


def test_a_log_is_followed_while_the_server_is_killed(server: Server):
    """Before the server is there again, the connection is refused."""
    raw = server.root.parent / "raw"
    number = server.submit("build", dataset="killed", raw=str(raw), size=32, samples_per_shard=1)["id"]
    server.until(lambda: server.log(number))
    killer = threading.Thread(target=server.again)
    killer.start()
    result = run(client.logs, number, "-f", "--json", url=server.url)
    killer.join()
    assert result.exit_code == 0, result.output
    assert result.stdout.encode() == (server.root / "jobs" / str(number) / "log").read_bytes()


def test_a_queued_job_is_cancelled(server: Server):
    raw = str(server.root.parent / "raw")
    first = server.submit("build", dataset="busy", raw=raw, size=32, samples_per_shard=1)["id"]
    result = run(client.submit, "verify", "busy", "--quick", url=server.url)
    number = first + 1
    assert result.output == f"job {number}, verify busy: queued; penstock logs -f {number} follows it\n"
    assert run(client.cancel, number, url=server.url).output.startswith(f"job {number}, verify busy: cancelled")
    ended = run(client.logs, number, "-f", url=server.url)
    assert (ended.exit_code, ended.stderr) == (1, f"Error: job {number} cancelled\n")
    refused(run(client.cancel, number, url=server.url), f"job {number}: is over already")
    assert run(client.cancel, first, url=server.url).exit_code == 0
    assert server.ended(first)["state"] == "cancelled"


def test_a_server_that_asks_for_a_token(tmp_path: Path):
    def token(*words: str) -> str:
        made = CliRunner().invoke(tokens.token, [*words, "--root", str(tmp_path)])
        assert made.exit_code == 0
        return made.stdout.strip()

    read, write = (token("create", "--scope", scope) for scope in ("read", "write"))
    with served(tmp_path, "--require-token") as server:
        refused(run(client.jobs, url=server.url), "a token is needed", "put one into PENSTOCK_TOKEN")
        refused(run(client.jobs, url=server.url, token="pst_other"), "PENSTOCK_TOKEN")
        assert run(client.jobs, url=server.url, token=read).exit_code == 0
        refused(run(client.submit, "feed", url=server.url, token=read), "write", "PENSTOCK_TOKEN")
        assert run(client.submit, "verify", "none", url=server.url, token=write).stdout.startswith("job 1, verify none")
        token("revoke", "2")
        refused(run(client.logs, 1, url=server.url, token=write), "PENSTOCK_TOKEN")


# ---- A server that misbehaves. ----


@contextmanager
def stub(answer: Callable[[str, str, dict[str, str], bytes], Answer | None]) -> Iterator[str]:
    """Yield the URL of a server that answers (method, path, headers, body) by a function: None cuts the connection.

    A body that is shorter than its Content-Length cuts it, too.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            given = answer(self.command, self.path, headers, body)
            self.close_connection = True
            if given is None:
                return
            status, more, content = given
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | more).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, format: str, *values: object) -> None:
            return

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def as_json(value: object, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def ranged(content: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
    """Return status and body of an answer to a request with a Range `bytes=N-`."""
    start = int(re.fullmatch(r"bytes=(\d+)-", headers["range"])[1])
    return (206, content[start:]) if start < len(content) else (416, b"")


@pytest.mark.parametrize("seed", range(3))
def test_no_byte_of_a_log_is_lost_or_doubled_however_connections_end(seed: int, monkeypatch: pytest.MonkeyPatch):
    """Before the answer, in its head, within a line or a letter; the log grows by any number of bytes."""
    monkeypatch.setattr(client, "PAUSE", 0.001)
    monkeypatch.setattr(client, "PATIENCE", 20)
    draw = random.Random(seed)
    lines = ["".join(draw.choices("abc é√ {}", k=draw.choice([0, 1, 30, 3000]))) for _ in range(60)]
    content, seen, faults = "\n".join([*lines, "the last line, which has no end"]).encode(), 0, []

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        nonlocal seen
        if draw.random() < 0.2:
            faults.append(path)
            return draw.choice([None, (503, {}, b"busy"), (502, {}, b""), (429, {}, b"")])
        seen = min(len(content), seen + draw.choice([0, 1, 300, 3_000]))
        if path == "/v1/jobs/7":
            if seen > 0.7 * len(content):  # the job writes its last lines, and is over
                seen = len(content)
            return as_json(JOB | {"state": "succeeded" if seen == len(content) else "running"})
        assert path == "/v1/jobs/7/log"
        assert headers["accept-encoding"] == "identity"  # a range is one of the log's own bytes
        status, part = ranged(content[:seen], headers)
        cut = draw.randrange(len(part) + 1) if draw.random() < 0.3 else len(part)
        return status, {"Content-Length": str(len(part))}, part[:cut]

    with stub(answer) as url:
        result = run(client.logs, 7, "-f", "--json", url=url)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == content.decode() + "\n"
    assert {"/v1/jobs/7", "/v1/jobs/7/log"} == {*faults}


def test_control_characters_of_a_log_are_escaped():
    event = {"event": "note", "text": "\x1b[2Jred"}
    log = b"\x1b]0;title\x07 plain \xff\n" + json.dumps(event).encode() + b"\n"

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        return (206, {}, log) if path.endswith("/log") else as_json(JOB)

    with stub(answer) as url:
        assert run(client.logs, 7, url=url).stdout == "\\x1b]0;title\\x07 plain �\n\\x1b[2Jred\n"
        assert "\x1b" not in run(client.logs, 7, "--json", url=url).stdout


def test_a_range_that_a_proxy_ignores_is_refused():
    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        return (200, {}, b"a line\n") if path.endswith("/log") else as_json(JOB)

    with stub(answer) as url:
        result = run(client.logs, 7, "-f", url=url)
    assert (result.exit_code, result.stdout) == (2, "a line\n")
    assert "answers a range of the log with all of it" in result.stderr


@pytest.mark.parametrize("times", [1, 2])
def test_a_submission_that_is_lost_is_sent_once_more_and_is_one_job(times: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client, "PAUSE", 0.001)
    keys: list[str] = []

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer | None:
        keys.append(headers["idempotency-key"])
        return None if len(keys) <= times else as_json(JOB | {"state": "queued"}, 201)

    with stub(answer) as url:
        result = run(client.submit, "evaluate", "set", "first", url=url)
    assert len(keys) == 2
    assert len({*keys}) == 1
    assert len(keys[0]) >= 16
    if times == 1:
        assert result.output == "job 7, train first: queued; penstock logs -f 7 follows it\n"
    else:
        refused(result, url, "PENSTOCK_URL")


def test_who_follows_gives_up_after_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(client, "PAUSE", 0.001)
    monkeypatch.setattr(client, "PATIENCE", 0.05)
    with stub(lambda *request: (503, {}, b"")) as url:
        refused(run(client.logs, 7, "-f", url=url), f"{url}: Service Unavailable; the job may go on")


def test_a_token_is_sent_to_its_server_and_to_no_other():
    seen: list[str | None] = []

    def other(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        seen.append(headers.get("authorization"))
        return as_json({"jobs": [], "next": None})

    with stub(other) as there:
        moved = stub(lambda *request: (302, {"Location": f"{there}/v1/jobs"}, b""))
        with moved as url:
            refused(run(client.jobs, url=url, token="pst_secret"), f"sends us to {there}/v1/jobs", "PENSTOCK_URL")
        assert seen == []
        assert run(client.jobs, url=there, token=" pst_secret\n").exit_code == 0
        assert run(client.jobs, url=f"{there}/").exit_code == 0
    assert seen == ["Bearer pst_secret", None]


@pytest.mark.parametrize(
    ("answered", "parts"),
    [
        ((200, {}, b"<html>"), ("200 OK, but not as `penstock serve` answers", "PENSTOCK_URL")),
        (as_json(["jobs"]), ("200 OK, but not as",)),
        (as_json({"items": []}), ("200 OK, but not as",)),
        ((404, {}, b"<html>"), ("404 Not Found, but not as",)),
        (as_json({"detail": 3}, 500), ("500 Internal Server Error, but not as",)),
        (as_json({"detail": "a token is missing"}, 401), ("a token is missing; put one into PENSTOCK_TOKEN",)),
        (as_json({"detail": "a token for reading"}, 403), ("a token for reading; put one into PENSTOCK_TOKEN",)),
        (as_json({"detail": "one\ntwo\x1b"}, 422), (r"Error: one\ntwo\x1b",)),
        (None, ("Server disconnected", "`penstock serve`", "PENSTOCK_URL")),
    ],
)
def test_answers_that_are_refused(answered: Answer | None, parts: tuple[str, ...]):
    with stub(lambda *request: answered) as url:
        refused(run(client.jobs, url=url), *parts)


@pytest.mark.parametrize(
    ("url", "token", "parts"),
    [
        ("http://127.0.0.1:1", "", ("http://127.0.0.1:1: Connection refused; run `penstock serve` there",)),
        ("localhost:8080", "", ("localhost:8080: not the address of a server, such as http://",)),
        ("ftp://host", "", ("ftp://host: not the address",)),
        ("http://host:x", "", ("http://host:x: no URL",)),
        ("http://host/?a", "", ("not the address",)),
        ("http://user:secret@host", "", ("PENSTOCK_URL: has a user name or a password",)),
        ("http://127.0.0.1:1", "a b", ("PENSTOCK_TOKEN: holds characters",)),
        ("http://127.0.0.1:1", "é", ("PENSTOCK_TOKEN: holds characters",)),
    ],
)
def test_a_server_that_cannot_be_asked(url: str, token: str, parts: tuple[str, ...]):
    result = run(client.jobs, url=url, token=token)
    refused(result, *parts)
    assert "secret" not in result.stderr


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (
            "build /raw set --keep-labels --holdout 0 --retries 0 --filter area --labels s3://bucket/t.csv --size 64",
            {"dataset": "set", "raw": "/raw", "keep_labels": True, "holdout": 0, "retries": 0, "filter": "area"}
            | {"labels": "s3://bucket/t.csv", "size": 64},
        ),
        ("verify set --repair /raw", {"dataset": "set", "repair": "/raw"}),
        (
            "train set first --set optim.lr=0.1 --set data.workers=a=b --feed a:1,b --resume --gpus 0",
            {"dataset": "set", "run": "first", "set": {"optim.lr": "0.1", "data.workers": "a=b"}}
            | {"feed": ["a:1", "b"], "resume": True, "gpus": 0},
        ),
        ("evaluate set first --split val", {"dataset": "set", "run": "first", "split": "val"}),
        ("figures set first --only-errors", {"dataset": "set", "run": "first", "only_errors": True}),
        ("feed --port 0 --threads 2", {"port": 0, "threads": 2}),
    ],
)
def test_options_are_the_parameters_of_the_job(words: str, body: dict[str, Any]):
    sent: list[dict[str, Any]] = []

    def answer(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        sent.append(json.loads(body))
        assert (method, path, headers["content-type"]) == ("POST", "/v1/jobs", "application/json")
        return as_json(JOB, 201)

    with stub(answer) as url:
        result = run(client.submit, *words.split(), url=url)
    assert result.exit_code == 0, result.output
    kind = words.split()[0]
    assert sent == [body | {"kind": kind}]
    parse(sent[0])


def test_each_parameter_of_each_kind_has_an_option_or_an_argument():
    for name, kind in KINDS.items():
        params = {param.name for param in client.submit.get_command(None, name).params}
        assert params == {*kind.model_fields} - {"kind"} | {"wait", "as_json"}


def test_an_option_without_a_value_is_refused_before_anything_is_sent():
    result = run(client.submit, "train", "set", "first", "--set", "optim.lr", url="http://127.0.0.1:1")
    assert result.exit_code == 2
    assert "Invalid value for '--set': optim.lr: has no value; write KEY=VALUE" in result.stderr

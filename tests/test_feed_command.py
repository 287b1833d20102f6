"""The command `feed`, and the addresses by which a trainer names its workers; each mistake is one line."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner, Result

from conftest import ROOT, begun, one_line, patched, until
from pipeline import UserError
from pipeline.online import Loader
from pipeline.online.endpoints import PORT, Endpoint, parse
from pipeline.service import feed as module
from pipeline.service.feed import feed

TOKEN = "0123456789abcdef"
FORMS = "write HOST:PORT, grpc://HOST:PORT/DATASET, grpc+tls://HOST:PORT, grpc+unix:///SOCKET, ray://NAME or local"
NAMELESS = "names no data set; name its folder below the worker's DIR, such as imagenet-256"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# Addresses


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("localhost", Endpoint("grpc://127.0.0.1:8815", "", "localhost", "localhost")),
        ("127.0.0.1:99", Endpoint("grpc://127.0.0.1:99", "", "127.0.0.1", "127.0.0.1:99")),
        ("[::1]:99", Endpoint("grpc://[::1]:99", "", "::1", "[::1]:99")),
        ("grpc://127.0.0.1/a/b-1/", Endpoint("grpc://127.0.0.1:8815", "a/b-1", "127.0.0.1", "grpc://127.0.0.1/a/b-1/")),
        ("grpc+tls://localhost:1", Endpoint("grpc+tls://127.0.0.1:1", "", "localhost", "grpc+tls://localhost:1")),
        ("grpc+unix:///run/a", Endpoint("grpc+unix:///run/a", "", "", "grpc+unix:///run/a")),
    ],
)
def test_an_address_names_a_worker(text: str, endpoint: Endpoint):
    for option, locally in ((text, False), (f"local+{text}", True)):
        local, (address,) = parse([option])
        assert (local, address.endpoints()) == (locally, [endpoint])


def test_local_is_this_process():
    assert parse([]) == (False, ())
    assert parse(["local"]) == (True, ())
    local, addresses = parse(["a:1", "local", "ray://b/c"])
    assert (local, [(address.scheme, address.host, address.data) for address in addresses]) == (
        True,
        [("grpc", "a", ""), ("ray", "b", "c")],
    )


def test_a_name_has_a_worker_at_each_address(monkeypatch: pytest.MonkeyPatch):
    """As the replicas of a service have, which come and go; a machine's IPv6 address is no second machine."""
    ips = ["10.0.0.9", "fd00::9", "10.0.0.10", "10.0.0.9"]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", (ip, 0)) for ip in ips])
    address = parse(["feed:7"])[1][0]
    assert address.endpoints() == [
        Endpoint("grpc://10.0.0.10:7", "", "feed", "feed:7 (10.0.0.10)"),
        Endpoint("grpc://10.0.0.9:7", "", "feed", "feed:7 (10.0.0.9)"),
    ]
    ips[:] = ["fd00::9"]
    assert address.endpoints() == [Endpoint("grpc://[fd00::9]:7", "", "feed", "feed:7")]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        *[
            ([text], f"{text!r}: no address of a worker; {FORMS}")
            for text in ("", "a b", "http://a", "a:x", "a\0", "ü")
        ],
        (["grpc+unix://run"], f"'grpc+unix://run': no address of a worker; {FORMS}"),
        (["ray://a:1"], f"'ray://a:1': no address of a worker; {FORMS}"),
        (["a:0"], "a:0: port 0 must be between 1 and 65535"),
        (["local+a:65536"], "a:65536: port 65536 must be between 1 and 65535"),
        (["a/../b"], f"a/../b: ../b {NAMELESS}"),
        (["grpc://a:1/b//c"], f"grpc://a:1/b//c: b//c {NAMELESS}"),
        (["[1:2]"], f"[1:2]: At least 3 parts expected in '1:2'; {FORMS}"),
        (["a:1", "b", "local+a:1"], "a:1: is among the workers twice; name it once"),
    ],
)
def test_other_texts_are_refused(texts: list[str], message: str):
    with pytest.raises(UserError) as caught:
        parse(texts)
    assert str(caught.value) == message


def test_a_name_without_an_address_is_one_line():
    with pytest.raises(UserError) as caught:
        parse(["grpc://nowhere.invalid/a"])[1][0].endpoints()
    words = ("the name nowhere.invalid has no address (", "correct it, or start the workers")
    one_line(caught, *words)


# The command


@pytest.fixture(scope="module")
def folder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DIR with the data sets one and deep/in/two, and folders that are none. Read only."""
    root = tmp_path_factory.mktemp("feeding")
    for name in ("one", "deep/in/two"):
        shutil.copytree(dataset, root / name)
    for name in ("too/deep/in/three", ".hidden", "empty"):
        (root / name).mkdir(parents=True)
    for name in ("too/deep/in/three", ".hidden"):
        (root / name / "dataset.json").touch()
    (root / "token").write_text(f"{TOKEN}\n")
    (root / "short").write_text(TOKEN[1:])
    return root


def run(*words: object) -> Result:
    """Run the command in this process."""
    result = CliRunner().invoke(feed, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


OPTIONS: dict[str, Any] = {"batch_size": 8, "seed": 3, "threads": 1, "output": "uint8", "patience": 20}
AFTER = "nothing is lost: a trainer asks elsewhere, and Ray keeps its actors"


def served(consumer: Callable[[], list[torch.Tensor]], *words: object) -> tuple[str, list[torch.Tensor]]:
    """Run the command in this process, with a consumer beside it, until that one ends it by SIGINT.

    Return what the command prints, and what the consumer returns.
    """
    ended = threading.Event()

    def interrupting() -> list[torch.Tensor]:
        try:
            return consumer()
        finally:
            if not ended.wait(0.1):
                os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        batches = pool.submit(interrupting)
        try:
            result = run(*words)
        finally:
            ended.set()
        assert (result.exit_code, result.stderr) == (130, f"Error: interrupted; {AFTER}\n")
        return result.stdout, batches.result()


def views(data: Path, *workers: str) -> list[torch.Tensor]:
    """Return the views of three batches."""
    with Loader(data, workers=workers, **OPTIONS) as loader:
        return [batch.images for batch in islice(loader, 3)]


@pytest.fixture(scope="module")
def local(dataset: Path) -> list[torch.Tensor]:
    return views(dataset)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for the name localhost, and in the same folder its key."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    extension = ["-addext", "subjectAltName=DNS:localhost", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run([*words.split(), *extension], check=True, capture_output=True)
    return folder / "cert.pem"


@pytest.mark.parametrize("way", ["tcp", "token", "tls", "socket"])
def test_a_trainer_gets_its_views(
    way: str, folder: Path, local: list[Any], monkeypatch: pytest.MonkeyPatch, request: Any, tmp_path: Path
):
    port = free_port()
    address, words = f"localhost:{port}/deep/in/two", ["--port", port]
    uri = f"grpc://127.0.0.1:{port}"
    if way == "token":
        words += ["--token-file", folder / "token", "--threads", 1]
        monkeypatch.setenv("PENSTOCK_FEED_TOKEN_FILE", str(folder / "token"))
    elif way == "tls":
        file = request.getfixturevalue("certificate")
        words += ["--tls-cert", file, "--tls-key", file.with_name("key.pem")]
        address, uri = f"grpc+tls://{address}", f"grpc+tls://127.0.0.1:{port}"
        monkeypatch.setenv("PENSTOCK_FEED_CA", str(file))
    elif way == "socket":
        words = ["--socket", tmp_path / "s"]
        address = uri = f"grpc+unix://{tmp_path}/s"
        socket.socket(socket.AF_UNIX).bind(str(tmp_path / "s"))  # left by a worker that was killed
    data = folder / ("one" if way == "socket" else "deep/in/two")
    output, batches = served(lambda: views(data, address), "--root", folder, *words)
    assert output == f"serving 2 data sets below {folder} at {uri} (pid {os.getpid()})\n"
    assert all(map(torch.equal, batches, local))
    assert len(batches) == len(local) == 3


def test_a_remote_folder_is_served_by_way_of_a_cache(dataset: Path, local: list[Any], tmp_path: Path):
    store, port = fsspec.filesystem("memory"), free_port()
    store.put(str(dataset), "/shards/dataset", recursive=True)
    words = ("--root", "memory://shards", "--cache", tmp_path / "cache", "--port", port)
    output, batches = served(lambda: views(dataset, f"127.0.0.1:{port}"), *words)
    assert output.startswith("serving 1 data set below memory://shards at grpc://127.0.0.1:")
    assert all(map(torch.equal, batches, local))
    assert len(batches) == 3


def test_the_default_port_is_that_of_an_address(folder: Path):
    assert next(option.default for option in module.OPTIONS if option.name == "port") == PORT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--root {0}/one", "{0}/one: is a data set itself; name the folder above it, {0}"),
        ("--root {0}/empty", "{0}/empty: no data set (a folder with dataset.json) is within 3 folders below; "
         "the folder is empty: is the volume mounted?"),
        ("--root {0}/nothing", "{0}/nothing: No such file or directory"),
        ("--root {0}/token", "{0}/token: Not a directory"),
        ("--host 0.0.0.0", "--host 0.0.0.0: other machines can ask there; name a --token-file, or stay at 127.0.0.1"),
        ("--host :: --port 0", "--host ::: other machines can ask there; name a --token-file, or stay at 127.0.0.1"),
        ("--host 192.0.2.1 --port 0 --token-file {0}/token", "--host 192.0.2.1 --port 0: Cannot assign requested "
         "address; name another host or port (0: a free one)"),
        ("--token-file {0}/short", "{0}/short: holds no token (15 characters); put 16 to 4,096 letters, digits or "
         "signs there: openssl rand -hex 32 > {0}/short"),
        ("--token-file {0}/no", "{0}/no: No such file or directory"),
        ("--tls-key {0}/token", "--tls-cert and --tls-key belong together; name both files"),
        ("--tls-cert {0}/token --tls-key {0}/short", "{0}/token, {0}/short: no certificate and its key, without a "
         "password, in PEM ([SSL] PEM lib (_ssl.c:"),
        ("--socket s --tls-cert {0}/token --port 1", "--socket s: is an address on this machine alone; leave out "
         "--port, --tls-cert"),
        ("--socket {0}/no/s", "--socket {0}/no/s: No such file or directory; name another path"),
        ("--socket {0}/token", "--socket {0}/token: Address already in use; name another path"),
        ("--cache {0}", "--cache {0}: means something only for a remote DIR"),
        ("--root memory://x", "memory://x: is remote; name a folder on this machine for its shards: --cache FOLDER"),
        ("--workers 2", "--workers 2: means something only with --executor ray"),
        ("--executor ray --port 99", "--port 99: means something only with --executor here"),
        ("--executor ray --name a/b", "--name a/b: letters, digits, and . _ - after the first of them, for ray://NAME"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words: str, message: str, folder: Path):
    arguments = words.format(folder).split()
    result = run(*(() if "--root" in arguments else ("--root", folder)), *arguments)
    (line,) = result.output.splitlines()
    assert result.exit_code == 2
    expected = f"Error: {message.format(folder)}"
    assert line.startswith(expected) if message.endswith(("(", ":")) else line == expected


def test_an_address_in_use_is_one_line(folder: Path, tmp_path: Path):
    """gRPC itself would share the port, and take the socket away."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as server, socket.socket(socket.AF_UNIX) as other:
        port, path = server.getsockname()[1], tmp_path / "s"
        other.bind(str(path))
        other.listen()
        result = run("--root", folder, "--port", port)
        line = f"--host 127.0.0.1 --port {port}: Address already in use; name another host or port (0: a free one)"
        assert (result.exit_code, result.output) == (2, f"Error: {line}\n")
        result = run("--root", folder, "--socket", path)
        assert (result.exit_code, result.output) == (
            2,
            f"Error: --socket {path}: Address already in use; name another path\n",
        )
        assert path.is_socket()


def test_missing_packages_are_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("--root", folder, "--port", 0)
    line = "Error: feed needs the package pyarrow: pip install 'penstock-imagenet[service]'\n"
    assert (result.exit_code, result.output) == (2, line)
    result = run("--root", folder, "--executor", "ray")
    line = "Error: feed --executor ray needs the package ray: pip install 'penstock-imagenet[ray]'\n"
    assert (result.exit_code, result.output) == (2, line)


SLOW = """
import os, time
from pathlib import Path
from pipeline.service.worker import Worker
answer = Worker.answer
def slow(worker, request):
    if request.ids:
        Path(os.environ["ASKED"] + str(request.step)).touch()
        time.sleep(1)
    return answer(worker, request)
Worker.answer = slow
"""


@pytest.mark.proof
def test_a_signal_waits_for_the_answers_under_way(folder: Path, local: list[Any], tmp_path: Path):
    data = shutil.copytree(folder / "one", tmp_path / "one", ignore=shutil.ignore_patterns("*.tar", "*.idx"))
    asked, port = tmp_path / "asked0", free_port()
    line = [sys.executable, "-m", "pipeline.service", "feed", "--root", str(folder), "--port", str(port)]
    process = begun(line, patched(tmp_path, SLOW, ASKED=tmp_path / "asked"))
    try:
        with Loader(data, workers=[f"127.0.0.1:{port}"], **OPTIONS) as loader:
            until(process, asked.exists)  # the first batch: a later one may be asked for before it
            process.send_signal(signal.SIGTERM)
            assert torch.equal(next(loader).images, local[0])
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


@pytest.mark.proof
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_it_serves_until_a_signal(number: signal.Signals, folder: Path):
    """And again on the same port, at once."""
    line = [sys.executable, "-m", "pipeline.service", "feed", "--root", str(folder), "--port"]
    port, pipe = 0, subprocess.PIPE
    for _ in range(2):
        with subprocess.Popen([*line, str(port)], cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                assert process.stdout
                first = process.stdout.readline()
                match = re.fullmatch(
                    rf"serving 2 data sets below {folder} at grpc://127.0.0.1:(\d+) \(pid (\d+)\)\n", first
                )
                assert match, first
                assert int(match[2]) == process.pid
                port = int(match[1])
                assert len(views(folder / "one", f"127.0.0.1:{port}")) == 3
                process.send_signal(number)
                output, errors = process.communicate(timeout=30)
            finally:
                process.kill()
        words = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}.get(number)
        assert output == ""
        assert errors == (f"Error: {words}; {AFTER}\n" if words else "")
        assert process.returncode == (128 + number if words else -number)

"""A Ray cluster here: the same bytes with a node lost on the way, and errors of one line that name the node."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT, SHARDS, build, digests, gone, one_line, until
from pipeline import UserError, cluster
from pipeline.online import Loader
from pipeline.online.endpoints import parse
from serving import served

pytestmark = [pytest.mark.skipif(find_spec("ray") is None, reason="needs the package ray"), pytest.mark.proof]
COMMAND = (str(ROOT / "tools/build_shards.py"),)
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 80 * 2**20, "include_dashboard": False}
QUICK = {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1000"}  # to notice a dead node


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A Ray cluster of one node with one CPU, on the loopback interface."""
    folder = Path("/tmp") / f"ray-{secrets.token_hex(4)}"  # a socket's path is short
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (LOOPBACK | QUICK | {"RAY_TMPDIR": str(folder)}).items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        try:
            cluster.add_node(**NODE)
            yield cluster
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def begun(*arguments: object, program: tuple[str, ...] = COMMAND, **environment: str) -> subprocess.Popen[str]:
    """Start the command, or another program, in a session of its own and from another folder."""
    words = [sys.executable, *program, *map(str, arguments)]
    pipe, variables = subprocess.PIPE, os.environ | LOOPBACK | environment
    return subprocess.Popen(words, env=variables, cwd="/", start_new_session=True, stdout=pipe, stderr=pipe, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr."""
    out, errors = process.communicate(timeout=60)
    return process.returncode, out, errors


FEED = ("-m", "pipeline.service", "feed")


def feed(head: Any, root: object, workers: int, *options: object) -> tuple[int, str, str]:
    """Run the command that begins or ends workers of the name `feed`, until there are so many."""
    line = ("--root", root, "--executor", "ray", "--ray-address", head.address, "--workers", workers)
    return ended(begun(*line, *options, program=FEED, PYTHONPATH=str(ROOT)))


def views(data: Path, *workers: str) -> list[torch.Tensor]:
    """Return the views of three batches."""
    with Loader(data, batch_size=8, threads=1, output="uint8", workers=workers) as loader:
        return [batch.images for batch in islice(loader, 3)]


def refused(*arguments: object, **options: Any) -> str:
    """Return the only line of stderr of a command that ends with exit code 2."""
    code, _, errors = ended(begun(*arguments, "--executor", "ray", **options))
    assert code == 2, errors
    (line,) = errors.splitlines()
    return line


def recorded(root: Path) -> set[str]:
    return {path.stem for path in (root / ".build").glob("*.npz")}


@pytest.mark.parametrize("address", [None, "127.0.0.1:{closed}", "head", "auto"])
def test_a_wrong_address_is_one_line(raw: Path, tmp_path: Path, address: str | None):
    """The first test: where no address is named, Ray would find the cluster that the fixture starts here."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"
    named = address.replace("127.0.0.1:{closed}", closed) if address else "auto"
    option = ("--ray-address", named) if address else ()
    line = refused(raw, tmp_path / "dataset", *option, RAY_ADDRESS=closed if address else "")
    named = closed if address == "auto" else named  # of RAY_ADDRESS
    assert f"--ray-address {named}: no Ray cluster answers there" in line
    assert "ray start --head" in line
    assert not (tmp_path / "dataset" / "dataset.json").exists()


def test_without_the_package_or_the_executor_it_is_one_line(raw: Path, tmp_path: Path):
    program = ("-c", "import sys; sys.modules['ray'] = None; from tools.build_shards import main; main()")
    line = refused(raw, tmp_path / "dataset", program=program)
    assert line == "Error: --executor ray needs the package ray: pip install 'penstock-imagenet[ray]'"
    done = build(raw, tmp_path / "other", "--ray-address", "auto")
    assert (done.exit_code, "means something only with --executor ray" in done.output) == (2, True)
    assert not (tmp_path / "other").exists()


def test_a_node_is_killed_in_the_middle_of_a_build_and_the_bytes_are_the_same(
    pictures: Path, plain: Path, head: Any, tmp_path: Path
):
    root, node = tmp_path / "dataset", head.add_node(**NODE)
    raylet = node.all_processes["raylet"][0].process.pid
    options = ("--samples-per-shard", 8, "--executor", "ray", "--ray-address", head.address, "--json")
    process = begun(pictures, root, *options)

    try:
        until(process, lambda: bool(recorded(root)) and any(root.rglob("*.tmp")))
        assert len(recorded(root)) < SHARDS - 1
        workers = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
        for pid in (raylet, *map(int, workers)):
            os.kill(pid, signal.SIGKILL)
        code, out, errors = ended(process)
    finally:
        head.remove_node(node, allow_graceful=False)
    assert code == 0, errors
    events = [json.loads(line) for line in out.splitlines()]
    assert sorted(event["name"] for event in events if event["event"] == "shard") == sorted(
        path.relative_to(plain).with_suffix("").as_posix() for path in plain.rglob("*.tar")
    )
    assert digests(root) == digests(plain)
    assert gone(process.pid)


def test_a_build_on_a_cluster_is_a_job_that_survives_its_server(pictures: Path, plain: Path, head: Any, tmp_path: Path):
    cluster = {"executor": "ray", "ray_address": head.address, "samples_per_shard": 8}
    with served(tmp_path, "--raw-root", pictures) as server:
        job = server.submit("build", dataset="d", raw=str(pictures), **cluster)
        server.until(lambda: (server.job(job["id"])["progress"].get("shards") or [0])[0] > 0)
        server.again()
        over = server.ended(job["id"], 120)
    assert (over["state"], over["attempt"]) == ("succeeded", 1), over["reason"]
    assert digests(tmp_path / "datasets/d") == digests(plain)


def test_workers_are_found_by_their_name_and_come_back_after_a_kill(
    dataset: Path, head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    node = head.add_node(**NODE)
    (address,) = parse([f"ray://feed/{dataset.name}"])[1]
    raylets = [node.all_processes["raylet"][0].process.pid for node in head.list_all_nodes()]
    try:
        code, out, errors = feed(head, dataset.parent, 2)
        assert (code, errors) == (0, "")
        uris = out.splitlines()
        assert sorted(endpoint.uri for endpoint in address.endpoints()) == sorted(uris)
        names = {f"{address.text} ({uri.removeprefix('grpc://')})" for uri in uris}
        assert {endpoint.name for endpoint in address.endpoints()} == names
        expected = views(dataset)
        assert all(map(torch.equal, views(dataset, address.text), expected))

        children = [
            pid for raylet in raylets for pid in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
        ]
        actors = [int(pid) for pid in children if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::Actor")]
        assert len(actors) == 2
        os.kill(actors[0], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while len(again := {endpoint.uri for endpoint in address.endpoints()}) < 2 or again == {*uris}:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(again & {*uris}) == 1  # the other is on a port of its own
        assert all(map(torch.equal, views(dataset, address.text), expected))

        (tmp_path / "token").write_text("0123456789abcdef")
        code, _, errors = feed(head, dataset.parent, 1, "--token-file", tmp_path / "token")
        line = f"Error: feed-0: serves {dataset.parent} with other options; end these workers first: --workers 0\n"
        assert (code, errors) == (2, line)
        code, out, errors = feed(head, dataset.parent, 1)
        assert (code, [endpoint.uri for endpoint in address.endpoints()]) == (0, out.splitlines()), errors
    finally:
        code, out, errors = feed(head, dataset.parent, 0)
        head.remove_node(node, allow_graceful=False)
    assert (code, out, errors) == (0, "feed: no worker is left\n", "")
    with pytest.raises(UserError) as caught:
        address.endpoints()
    remedy = "start them: penstock feed --executor ray --name feed --workers N"
    assert str(caught.value) == f"no worker of the name feed answers; {remedy}"


def test_workers_without_a_cluster_is_one_line(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"
    code, _, errors = ended(
        begun("--root", dataset.parent, "--executor", "ray", program=FEED, RAY_ADDRESS=closed, PYTHONPATH=str(ROOT))
    )
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith(f"Error: --ray-address {closed}: no Ray cluster answers there (")
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with pytest.raises(UserError) as caught:
        cluster.Registry().addresses("feed")
    one_line(caught, f"RAY_ADDRESS {closed}: no Ray cluster answers there (")


def test_a_signal_while_ray_is_imported_ends_the_build(raw: Path, tmp_path: Path):
    """A Cython module swallows what is raised while it is imported."""
    arguments = (raw, tmp_path / "dataset", "--executor", "ray", "--ray-address", "127.0.0.1:1")
    code, _, errors = ended(begun(*arguments, program=("-c", SWALLOWING)))
    assert (code, errors.count("\n")) == (128 + signal.SIGINT, 1), errors
    assert "the finished shards stay" in errors


SWALLOWING = """
import contextlib, signal, sys
class Finder:
    def find_spec(name, *more):
        if name == "ray":
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder)
from tools.build_shards import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_may_be_interrupted_at_any_moment(pictures: Path, head: Any, tmp_path: Path, number: signal.Signals):
    """While it joins the cluster, and while tasks end every few milliseconds."""
    for trial in range(0, 12, 2):
        root = tmp_path / str(trial)
        options = ("--samples-per-shard", 1, "--executor", "ray", "--ray-address", head.address)
        process = begun(pictures, root, *options)
        pattern = ".build/*.npz" if trial > 5 else ".build/plan.json"
        until(process, lambda root=root, pattern=pattern: any(root.glob(pattern)))
        time.sleep(0.07 * (trial - 5) if trial > 5 else 0.3 * trial)
        send = os.killpg if number == signal.SIGINT else os.kill  # a terminal sends Ctrl-C to all
        send(process.pid, number)
        code, _, errors = ended(process)
        assert code == 128 + number, (trial, errors)
        (line,) = [line for line in errors.splitlines() if "task_manager.cc" not in line]  # a line of Ray's own log
        assert line.startswith("Error: ")
        assert "the finished shards stay" in line
        assert gone(process.pid)
        assert not list(root.rglob("*.tmp"))


def test_errors_of_tasks_end_the_run_and_lost_workers_do_not(head: Any, tmp_path: Path):
    code, out, errors = ended(begun(head.address, tmp_path, program=("-c", RUNS)))
    assert code == 0, errors
    report, node = json.loads(out), os.uname().nodename
    assert report["results"] == [0, 1, 4, 9, 16, 25]
    assert report["ahead"] <= 2  # for the one CPU
    assert report["full"] == ["OSError", f"[Errno 28] no room, on the node {node}: '/some/file'"]
    assert report["numberless"] == ["OSError", "without a number"]
    assert report["changed"] == ["SourceError", f"changed (on the node {node})"]
    assert report["bug"] == ["KeyError", "'a key'"]
    assert report["dies"][1].startswith("task 1: lost 3 times")
    assert report["tries"] == {"dies twice": 3, "full": 1, "dies": 3}
    assert report["apart"][1].startswith(f"{tmp_path}/apart: not there on the node {node}; RAW and DATASET must be")
    assert not (tmp_path / "apart").exists()
    kind, line = report["missing"]
    assert line.startswith("task 9: could not begin on its node; every node needs the same environment")
    assert "No module named 'onlyhere')" in line
    assert (kind, line.isprintable()) == ("UserError", True)
    assert report["swallowed"] == ["KeyboardInterrupt", ""]
    assert report["handler"]
    assert report["stopped"]


RUNS = """
import json, signal, os, sys, time, types
from dataclasses import dataclass
from pathlib import Path
from pipeline import SourceError, UserError
from pipeline.offline import executors

address, folder = sys.argv[1], Path(sys.argv[2])
executors.RETRIES = 2
made, ahead, report = 0, [], {}

@dataclass
class Task:
    name: str
    number: int
    how: str = "ends"

def tries(how, more=""):
    with open(folder / how, "a+") as file:
        file.write(more)
        file.seek(0)
        return len(file.read())

def square(task):
    count = tries(task.how, ".")
    errors = {"full": OSError(28, "no room", "/some/file"), "numberless": OSError("without a number"),
              "changed": SourceError("changed"), "bug": KeyError("a key")}
    if task.how in errors:
        raise errors[task.how]
    if task.how == "dies" or task.how == "dies twice" and count < 3:
        os._exit(1)
    while task.how == "long":
        tries(task.how, ".")
        time.sleep(0.01)
    return task.number ** 2

def tasks():
    global made
    for number in range(6):
        made += 1
        yield Task(f"task {number}", number, "dies twice" if number == 3 else "ends")

def run(tasks, shared=folder, function=square):
    return executors.run_on_ray(function, iter(tasks), address, None, [shared])

def failing(name, *arguments):
    try:
        list(run(*arguments))
    except (Exception, KeyboardInterrupt) as error:
        report[name] = [type(error).__name__, str(error)]

results = []
for result in run(tasks()):
    results.append(result)
    ahead.append(made - len(results))
report["results"], report["ahead"] = sorted(results), max(ahead)
for how in ("full", "numberless", "changed", "bug", "dies"):
    failing(how, [Task("task 1", 1, how)])
report["tries"] = {how: tries(how) for how in ("dies twice", "full", "dies")}
failing("apart", [Task("task 1", 1)], folder / "apart")
exec("def f(task): pass", (onlyhere := types.ModuleType("onlyhere")).__dict__)
sys.modules["onlyhere"] = onlyhere
failing("missing", [Task("task 9", 9)], folder, onlyhere.f)

def swallowing():
    yield Task("task 0", 0)
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass  # as a callback or a logger of Ray's may
    yield from tasks()

failing("swallowed", swallowing())
report["handler"] = signal.getsignal(signal.SIGINT) is signal.default_int_handler
running = run([Task("task 0", 0), Task("task 2", 2, "long")])
next(running)
while tries("long") < 3:
    time.sleep(0.01)
running.close()
time.sleep(1)
before = tries("long")
time.sleep(0.5)
report["stopped"] = before == tries("long")
print(json.dumps(report))
"""

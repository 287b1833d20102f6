"""A Ray cluster: the same bytes with a node lost on the way, and what goes wrong there is one line that names it."""

import json
import multiprocessing
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, SHARDS, build, digests
from pipeline import SourceError
from pipeline.image import codec_versions
from pipeline.manifest import BuildRecipe
from pipeline.offline import executors
from pipeline.offline.build import shard_tasks
from pipeline.offline.plan import make_plan, slots
from pipeline.offline.shards import ShardTask, write_shard
from pipeline.offline.sources import find_sources
from raycluster import NEEDS_RAY, Build, add_node, children, dead, recorded, running_head, stopped_while_writing, until  # noqa: F401 – one is a fixture

pytestmark = [NEEDS_RAY, pytest.mark.proof]


def test_without_a_cluster_on_this_machine_it_is_one_line(raw: Path, tmp_path: Path):
    """The first test, before the fixture starts a cluster here."""
    started = Build(raw, tmp_path / "dataset", "--executor", "ray", RAY_ADDRESS="")
    code, _, errors = started.ended(60)
    (line,) = errors.splitlines()
    assert code == 2
    assert "--ray-address auto: no Ray cluster answers there" in line


def test_a_node_is_killed_in_the_middle_of_a_build_and_the_bytes_are_the_same(
    pictures: Path, plain: Path, head: Any, tmp_path: Path
):
    root, node = tmp_path / "dataset", add_node(head)
    raylet = node.all_processes["raylet"][0].process.pid
    started = Build(
        pictures, root, "--samples-per-shard", 8, "--executor", "ray", "--ray-address", head.address, "--json"
    )

    def workers() -> list[int]:
        return [pid for pid, name in children(raylet).items() if name == "ray::_on_node"]

    try:
        until(lambda: recorded(root))
        victim, shard = stopped_while_writing(workers, root)
        before = recorded(root)
        assert shard not in before
        assert len(before) < SHARDS - 1
        assert len(head.global_state._live_node_ids()) == 2
        for pid in (raylet, *children(raylet)):
            os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        code, out, errors = started.ended()
    finally:
        head.remove_node(node, allow_graceful=False)
    assert code == 0, errors
    assert dead(victim)
    until(lambda: len(head.global_state._live_node_ids()) == 1)
    events = [json.loads(line) for line in out.splitlines()]
    assert sorted(event["name"] for event in events if event["event"] == "shard") == sorted(
        path.relative_to(plain).with_suffix("").as_posix() for path in plain.rglob("*.tar")
    )
    assert digests(root) == digests(plain)
    assert not started.alive()
    print(f"killed after {len(before)} of {SHARDS} shards; ended {time.monotonic() - killed:.1f} s later")


def test_a_worker_with_other_codecs_is_refused(pictures: Path, head: Any, tmp_path: Path):
    """Here it is the command that has others than the workers of the cluster."""
    (tmp_path / "sitecustomize.py").write_text("import simplejpeg; simplejpeg.__version__ = '0.0.1'")
    arguments = (pictures, tmp_path / "dataset", "--executor", "ray", "--ray-address", head.address)
    started = Build(*arguments, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    code, _, errors = started.ended()
    assert code == 2, errors
    (line,) = errors.splitlines()
    assert f"a worker on {os.uname().nodename} has other codecs than the build began with" in line
    assert f"(simplejpeg 0.0.1 → {codec_versions()['simplejpeg']})" in line
    assert line.endswith("install the same environment there")
    assert not list((tmp_path / "dataset").rglob("*.tar"))


@pytest.mark.parametrize("address", ["127.0.0.1:{closed}", "ray://127.0.0.1:10001", "head", "auto", None])
def test_a_wrong_address_is_one_line(raw: Path, tmp_path: Path, address: str | None):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    option = ("--ray-address", address.format(closed=closed)) if address else ()
    started = Build(raw, tmp_path / "dataset", "--executor", "ray", *option, RAY_ADDRESS=f"127.0.0.1:{closed}")
    code, _, errors = started.ended(20)
    (line,) = errors.splitlines()
    assert code == 2
    named = address if address and address != "auto" else "127.0.0.1:{closed}"  # of RAY_ADDRESS
    assert f"--ray-address {named.format(closed=closed)}: no Ray cluster answers there" in line
    assert "ray start --head" in line
    assert not (tmp_path / "dataset" / "dataset.json").exists()


def test_without_the_package_the_remedy_is_named(raw: Path, tmp_path: Path):
    program = "import sys; sys.modules['ray'] = None; from tools.build_shards import main; main()"
    code, _, errors = Build(raw, tmp_path / "dataset", "--executor", "ray", program=("-c", program)).ended(20)
    assert code == 2
    assert errors == "Error: --executor ray needs the package ray: pip install 'penstock-imagenet[ray]'\n"


def ended(started: Build) -> bool:
    return not started.alive()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_may_be_interrupted_at_any_moment(pictures: Path, head: Any, tmp_path: Path, number: signal.Signals):
    """While it joins the cluster, and while tasks end every few milliseconds."""
    for trial in range(0, 12, 2):
        root = tmp_path / str(trial)
        options = ("--samples-per-shard", 1, "--executor", "ray", "--ray-address", head.address)
        started = Build(pictures, root, *options)
        if trial < 5:
            until((root / ".build" / "plan.json").exists)
            time.sleep(0.3 * trial)
        else:
            until(partial(recorded, root))
            time.sleep(0.07 * (trial - 5))
        send = os.killpg if number == signal.SIGINT else os.kill  # a terminal sends Ctrl-C to all
        send(started.process.pid, number)
        code, _, errors = started.ended()
        assert code == 128 + number, (trial, errors)
        (line,) = [line for line in errors.splitlines() if "task_manager.cc" not in line]  # a line of Ray's own log
        assert line.startswith("Error: ")
        assert "the finished shards stay" in line
        until(partial(ended, started), seconds=5)
        assert not list(root.rglob("*.tmp"))


def test_an_address_without_ray_is_refused(raw: Path, tmp_path: Path):
    result = build(raw, tmp_path / "dataset", "--ray-address", "auto")
    assert result.exit_code == 2
    assert "means something only with --executor ray" in result.output
    assert not (tmp_path / "dataset").exists()


def test_what_a_task_raises_ends_the_run_and_a_lost_worker_does_not(head: Any, tmp_path: Path):
    started = Build(head.address, tmp_path, program=("-c", CONTRACT))
    code, out, errors = started.ended()
    assert code == 0, errors
    found = json.loads(out)
    assert found["results"] == [0, 1, 4, 9, 16, 25]
    assert found["tries"] == 3
    assert found["ahead"] <= 2  # for the one CPU
    assert found["raised"] == ["OSError", 28, "no room, on the node " + os.uname().nodename, "/some/file"]
    assert found["raised_tries"] == 1
    assert found["stopped"]
    assert found["lost"].startswith("task 7: lost 3 times")
    assert found["lost_tries"] == 3
    assert found["bug"] == "KeyError"
    assert found["missing"].startswith("task 9: could not begin on its node; every node needs the same environment")
    assert "No module named 'onlyhere')" in found["missing"]
    assert "127.0.0.1" in found["missing"]
    assert found["missing"].isprintable()
    assert found["swallowed"] == "raised again"
    assert found["handler"]


CONTRACT = """
import json, os, signal, sys, time, types
from dataclasses import dataclass
from pathlib import Path
from pipeline import UserError
from pipeline.offline import executors

address, folder = sys.argv[1], Path(sys.argv[2])
executors.RETRIES = 2
made, ahead, found = 0, [], {}

@dataclass
class Task:
    name: str
    number: int
    how: str = ""

def tries(task, count=False):
    with open(folder / f"{task.name}.{task.how}", "a+") as file:
        file.write("." if count else "")
        file.seek(0)
        return len(file.read())

def square(task):
    count = tries(task, True)
    if task.how == "dies" or (task.how == "dies twice" and count < 3):
        os._exit(1)
    if task.how == "full":
        raise OSError(28, "no room", "/some/file")
    if task.how == "bug":
        raise KeyError(task.name)
    while task.how == "long":
        tries(task, True)
        time.sleep(0.01)
    return task.number ** 2

def tasks(hows):
    global made
    for number in range(6):
        made += 1
        yield Task(f"task {number}", number, hows.get(number, ""))

def run(made_tasks):
    return executors.run_on_ray(square, made_tasks, address, None, [folder])

results = []
for result in run(tasks({3: "dies twice"})):
    results.append(result)
    ahead.append(made - len(results))
found["results"], found["ahead"] = sorted(results), max(ahead)
found["tries"] = tries(Task("task 3", 3, "dies twice"))
try:
    list(run(iter([Task("task 1", 1, "full")])))
except OSError as error:
    found["raised"] = [type(error).__name__, error.errno, error.strerror, error.filename]
found["raised_tries"] = tries(Task("task 1", 1, "full"))
try:
    list(run(iter([Task("task 7", 7, "dies")])))
except UserError as error:
    found["lost"] = str(error)
found["lost_tries"] = tries(Task("task 7", 7, "dies"))
try:
    list(run(iter([Task("task 8", 8, "bug")])))
except KeyError as error:
    found["bug"] = type(error).__name__
exec("def f(task): pass", (onlyhere := types.ModuleType("onlyhere")).__dict__)
sys.modules["onlyhere"] = onlyhere
try:
    list(executors.run_on_ray(onlyhere.f, iter([Task("task 9", 9)]), address))
except UserError as error:
    found["missing"] = str(error)
def swallowed():
    yield Task("task 0", 0)
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass  # as a callback or a logger of Ray's may
    yield from tasks({})
try:
    found["swallowed"] = len(list(run(swallowed())))
except KeyboardInterrupt:
    found["swallowed"] = "raised again"
found["handler"] = signal.getsignal(signal.SIGINT) is signal.default_int_handler
long = Task("task 2", 2, "long")
running = run(iter([Task("task 0", 0), long]))
next(running)
while tries(long) < 3:
    time.sleep(0.01)
running.close()
before, deadline = -1, time.monotonic() + 5
while before != (now := tries(long)) and time.monotonic() < deadline:
    before = now
    time.sleep(0.3)
found["stopped"] = before == now
print(json.dumps(found))
"""


def test_errors_on_a_cluster_name_the_node(tmp_path: Path):
    node = os.uname().nodename

    def failing(error: Exception) -> None:
        raise error

    with pytest.raises(FileNotFoundError, match=f"No such file or directory, on the node {node}") as caught:
        executors._on_node(failing, (tmp_path,), FileNotFoundError(2, "No such file or directory", "/data/1.tar"))
    assert caught.value.filename == "/data/1.tar"
    with pytest.raises(SourceError, match=rf"changed \(on the node {node}\)"):
        executors._on_node(failing, (tmp_path,), SourceError("changed"))
    with pytest.raises(OSError, match="without a number"):
        executors._on_node(failing, (tmp_path,), OSError("without a number"))


def test_a_node_that_does_not_share_the_dataset_makes_none_of_its_own(raw: Path, tmp_path: Path):
    for place in (tmp_path / "gone" / ".build" / "plan.json", raw / "gone"):
        with pytest.raises(ValueError, match=f"{place}: not there on the node .*under the same path on every node"):
            executors._on_node(lambda task: pytest.fail("it ran"), (raw, place), None)
    assert not (tmp_path / "gone").exists()


def test_a_node_cut_off_writes_the_same_shard_again_and_harms_nothing(pictures: Path, tmp_path: Path):
    """Two write one shard: the first is stopped in the middle, and goes on when the second has ended."""
    task = first_task(pictures, tmp_path)
    cut_off = multiprocessing.get_context("spawn").Process(target=write_shard, args=(task,))
    cut_off.start()
    assert cut_off.pid
    pid, _ = stopped_while_writing(lambda: [cut_off.pid], tmp_path)
    try:
        assert write_shard(task).resumed is False
        once = digests(tmp_path)
        assert {Path(name).suffix for name in once} == {".tar", ".idx", ".npz", ".tmp"}
        assert sum(name.endswith(".tmp") for name in once) == 1
    finally:
        os.kill(pid, signal.SIGCONT)
        cut_off.join(30)
    assert cut_off.exitcode == 0
    assert digests(tmp_path) == {name: digest for name, digest in once.items() if not name.endswith(".tmp")}
    assert write_shard(task).resumed


def first_task(raw: Path, root: Path) -> ShardTask:
    plan = make_plan(find_sources(raw), BuildRecipe(samples_per_shard=40))
    return next(shard_tasks(plan, root, slots(plan)))

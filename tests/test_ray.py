"""--executor ray: the same bytes with a node lost on the way, and nothing of ours left behind, however it ends."""

import contextlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, build, picture
from pipeline.errors import SourceError
from pipeline.image import codec_versions
from pipeline.manifest import BuildRecipe
from pipeline.offline import cluster
from pipeline.offline.build import shard_tasks, slots
from pipeline.offline.plan import make_plan
from pipeline.offline.shards import ShardTask, write_shard
from pipeline.offline.sources import find_sources
from test_build import digests

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="needs the package ray")

COMMAND = [sys.executable, str(ROOT / "tools/build_shards.py")]
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # as cluster.py has it
QUICK = {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1000"}  # to find a node dead
SHARDS = 11 + 2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight large pictures under 100 names: 88 for training, 12 for validation."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        picture(f"large{i}", 1500 + 8 * i, 1100).save(folder / f"{i}.jpg", quality=90)
    for split, count in (("train", 44), ("val", 6)):
        for name in ("a", "b"):
            (folder / "raw" / split / name).mkdir(parents=True)
            for i in range(count):
                os.link(folder / f"{i % 8}.jpg", folder / "raw" / split / name / f"{i:04d}.jpg")
    return folder / "raw"


@pytest.fixture(scope="module")
def plain(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pictures`, built without Ray."""
    root = tmp_path_factory.mktemp("plain") / "dataset"
    result = build(pictures, root, "--workers", 2, "--samples-per-shard", 8)
    assert result.exit_code == 0, result.output
    assert len(list(root.rglob("*.tar"))) == SHARDS
    return root


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Ray cluster of one node with one CPU, on the loopback interface."""
    folder = Path("/tmp") / f"ray-{secrets.token_hex(4)}"  # a socket's path is short
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (LOOPBACK | QUICK | {"RAY_TMPDIR": str(folder)}).items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        started = Cluster()
        try:
            add_node(started)
            yield started
        finally:
            started.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def add_node(started: Any) -> Any:
    return started.add_node(
        num_cpus=1, node_ip_address="127.0.0.1", object_store_memory=80 * 2**20, include_dashboard=False
    )


class Build:
    """The command in a session of its own. Whatever it starts, and that starts, carries a mark in its environment."""

    def __init__(self, *arguments: object, program: tuple[str, ...] = (), **environment: str) -> None:
        self._mark = secrets.token_hex(16)
        words = [sys.executable, *program] if program else COMMAND
        self.process = subprocess.Popen(
            [*words, *map(str, arguments)],
            env=os.environ | LOOPBACK | {"PENSTOCK_TEST_MARK": self._mark} | environment,
            cwd="/",
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(self, seconds: float = 60) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        try:
            out, errors = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, out, errors

    def alive(self) -> list[int]:
        """All its processes."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self._mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found


def until(condition: Callable[[], Any], seconds: float = 40, pause: float = 0.02) -> Any:
    """Wait for a true value, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(pause)
    return found


def dead(pid: int) -> bool:
    """Whether a process is no more, or only its parent's to bury."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def recorded(root: Path) -> set[str]:
    return {path.stem for path in (root / ".build").glob("*.npz")}


def children(pid: int) -> dict[int, str]:
    """The children of a process, with what each calls itself."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child): Path(f"/proc/{child}/cmdline").read_text().partition("\0")[0].strip() for child in pids}


def writes(pid: int, root: Path) -> str:
    """The name of the shard whose tar a process has open under its temporary name; "" if there is none."""
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(entry)
            if target.startswith(str(root)) and ".tar." in target:
                return Path(target).name.partition(".")[0]
    return ""


def stopped_while_writing(workers: Callable[[], list[int]], root: Path) -> tuple[int, str]:
    """Stop one of these processes while it writes a shard. Returns the process and the shard."""

    def stop() -> tuple[int, str] | None:
        for pid in workers():
            if writes(pid, root):
                os.kill(pid, signal.SIGSTOP)
                if shard := writes(pid, root):  # still, and from now on for ever
                    return pid, shard
                os.kill(pid, signal.SIGCONT)
        return None

    return until(stop, pause=0.001)


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


def test_a_ray_of_our_own_gives_the_same_bytes_hears_only_this_machine_and_leaves_nothing(
    pictures: Path, plain: Path, tmp_path: Path
):
    root = tmp_path / "dataset"
    before = set(Path("/tmp").glob("penstock-ray-*"))
    started = Build(
        pictures, root, "--samples-per-shard", 8, "--executor", "ray", "--workers", 2, "--json", HOME=str(tmp_path)
    )
    until(lambda: recorded(root))
    hears = {address for pid in started.alive() for address in listening(pid)}
    code, out, errors = started.ended()
    assert (code, errors) == (0, "")
    assert hears
    assert hears <= {"0100007F", "0000000000000000FFFF00000100007F"}, "not only 127.0.0.1"
    events = [json.loads(line)["event"] for line in out.splitlines()]
    assert events == ["plan", *["shard"] * SHARDS, "done"]
    assert digests(root) == digests(plain)
    until(lambda: not started.alive(), seconds=5)
    assert set(Path("/tmp").glob("penstock-ray-*")) == before
    assert not (tmp_path / ".ray").exists()


def listening(pid: int) -> set[str]:
    """The addresses, in the kernel's hex, at which a process listens."""
    found = set()
    with contextlib.suppress(OSError):
        sockets = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                    found.add(fields[1].partition(":")[0])
    return found


def require_interrupted(started: Build, root: Path, number: signal.Signals) -> None:
    """Send a signal: Ctrl-C to all processes, as a terminal does. What the command promises then must hold."""
    (os.killpg if number == signal.SIGINT else os.kill)(started.process.pid, number)
    code, _, errors = started.ended()
    assert code == 128 + number, errors
    (line,) = errors.splitlines()
    assert line.startswith("Error: ")
    assert "the finished shards stay" in line
    until(lambda: not started.alive(), seconds=5)
    assert not list(root.rglob("*.tmp"))


def test_an_interrupted_build_leaves_no_process_and_goes_on_without_ray(pictures: Path, plain: Path, tmp_path: Path):
    root, before = tmp_path / "dataset", set(Path("/tmp").glob("penstock-ray-*"))
    started = Build(pictures, root, "--samples-per-shard", 8, "--executor", "ray", "--workers", 1)
    until(lambda: recorded(root))
    require_interrupted(started, root, signal.SIGINT)
    assert set(Path("/tmp").glob("penstock-ray-*")) == before
    assert len(recorded(root)) < SHARDS
    result = build(pictures, root, "--workers", 1, "--samples-per-shard", 8)
    assert result.exit_code == 0, result.output
    assert digests(root) == digests(plain)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_may_be_interrupted_at_any_moment(pictures: Path, tmp_path: Path, number: signal.Signals):
    """While Ray starts, and while tasks end every few milliseconds."""
    for trial in range(12):
        root = tmp_path / str(trial)
        started = Build(pictures, root, "--samples-per-shard", 1, "--executor", "ray", "--workers", 2)
        if trial < 5:
            until((root / ".build" / "plan.json").exists)
            time.sleep(0.6 * trial)
        else:
            until(partial(recorded, root))
            time.sleep(0.07 * (trial - 5))
        require_interrupted(started, root, number)


def test_a_worker_with_other_codecs_is_refused(pictures: Path, head: Any, tmp_path: Path):
    """Here it is the command that has others than the workers of the cluster."""
    (tmp_path / "sitecustomize.py").write_text("import simplejpeg; simplejpeg.__version__ = '0.0.1'")
    arguments = (pictures, tmp_path / "dataset", "--executor", "ray", "--ray-address", head.address)
    started = Build(*arguments, PYTHONPATH=str(tmp_path))
    code, _, errors = started.ended()
    assert code == 2
    (line,) = errors.splitlines()
    assert f"a worker on {os.uname().nodename} has other codecs than the build began with" in line
    assert f"(simplejpeg 0.0.1, here {codec_versions()['simplejpeg']})" in line
    assert line.endswith("install the same environment there")
    assert not list((tmp_path / "dataset").rglob("*.tar"))


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1:{closed}", "no Ray cluster answers there"),
        ("no-such-host.invalid:6379", "no Ray cluster answers there"),
        ("127.0.0.1:99999", "no Ray cluster answers there"),
        ("ray://127.0.0.1:10001", "not HOST:PORT"),
        ("head", "not HOST:PORT"),
        ("auto", "no Ray cluster answers there"),
    ],
)
def test_a_wrong_address_is_one_line(raw: Path, tmp_path: Path, address: str, why: str):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    started = Build(
        raw,
        tmp_path / "dataset",
        "--executor",
        "ray",
        "--ray-address",
        address.format(closed=closed),
        RAY_ADDRESS=f"127.0.0.1:{closed}",  # which "auto" means
    )
    code, _, errors = started.ended(20)
    (line,) = errors.splitlines()
    assert code == 2
    assert why in line
    assert address.replace("auto", "127.0.0.1:{closed}").format(closed=closed) in line
    assert not (tmp_path / "dataset" / "dataset.json").exists()


def test_an_address_without_ray_is_refused(raw: Path, tmp_path: Path):
    result = build(raw, tmp_path / "dataset", "--ray-address", "auto")
    assert result.exit_code == 2
    assert "means something only with --executor ray" in result.output
    assert not (tmp_path / "dataset").exists()


def test_without_the_package_the_remedy_is_named(raw: Path, tmp_path: Path):
    program = "import sys; sys.modules['ray'] = None; from tools.build_shards import main; main()"
    code, _, errors = Build(raw, tmp_path / "dataset", "--executor", "ray", program=("-c", program)).ended(20)
    assert code == 2
    assert errors == "Error: --executor ray needs the package ray: pip install 'penstock[ray]'\n"


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
    assert found["missing"].startswith("task 9: could not begin on its node (")
    assert "No module named 'onlyhere'); every node needs the same environment" in found["missing"]
    assert "127.0.0.1" in found["missing"]
    assert found["missing"].isprintable()


CONTRACT = """
import json, os, sys, time, types
from dataclasses import dataclass
from pathlib import Path
from pipeline.errors import UserError
from pipeline.offline import cluster

address, folder = sys.argv[1], Path(sys.argv[2])
cluster.RETRIES = 2
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
    return cluster.run(square, made_tasks, address, None, [folder])

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
    list(cluster.run(onlyhere.f, iter([Task("task 9", 9)]), address))
except UserError as error:
    found["missing"] = str(error)
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
        cluster._on_node(failing, (tmp_path,), FileNotFoundError(2, "No such file or directory", "/data/1.tar"))
    assert caught.value.filename == "/data/1.tar"
    with pytest.raises(SourceError, match=rf"changed \(on the node {node}\)"):
        cluster._on_node(failing, (tmp_path,), SourceError("changed"))
    with pytest.raises(OSError, match="without a number"):
        cluster._on_node(failing, (tmp_path,), OSError("without a number"))


def test_a_node_that_does_not_share_the_dataset_makes_none_of_its_own(raw: Path, tmp_path: Path):
    for place in (tmp_path / "gone" / ".build" / "plan.json", raw / "gone"):
        with pytest.raises(ValueError, match=f"{place}: not there on the node .*under the same path on every node"):
            cluster._on_node(lambda task: pytest.fail("it ran"), (raw, place), None)
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

"""--executor ray with a Ray of its own: the same bytes, and nothing of ours left behind, however it ends."""

import contextlib
import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from conftest import SHARDS, build
from raycluster import NEEDS_RAY, Build, recorded, until


pytestmark = NEEDS_RAY


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
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("Error: ")
    assert "the finished shards stay" in errors
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


def test_without_the_package_the_remedy_is_named(raw: Path, tmp_path: Path):
    program = "import sys; sys.modules['ray'] = None; from tools.build_shards import main; main()"
    code, _, errors = Build(raw, tmp_path / "dataset", "--executor", "ray", program=("-c", program)).ended(20)
    assert code == 2
    assert errors == "Error: --executor ray needs the package ray: pip install 'penstock[ray]'\n"

"""Killed builds: all processes, the parent or a worker, at any moment. The same command goes on to the same bytes."""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from conftest import LITTLE, begun, build, command, digests, finish, gone, members, until

pytestmark = pytest.mark.proof
MERGED = ("train/samples.npy*", "val/samples.npy*", "statistics.npz*", "mean.png*", "skipped.jsonl*", "dataset.json*")


def workers_of(group: int) -> list[int]:
    return [pid for pid in members(group) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def recorded(root: Path) -> int:
    return len(list((root / ".build").glob("*-*.npz")))


def is_finished(root: Path) -> bool:
    return (root / "dataset.json").exists() and not (root / ".build").exists()


def wait_for_a_moment(process: subprocess.Popen[str], root: Path, moments: random.Random) -> None:
    """Return in the start of the programs, while shards are written, or in the merge."""
    kind = moments.choices(("start", "shards", "merge"), (1, 5, 2))[0]
    if kind == "start":
        time.sleep(moments.uniform(0, 0.8))
    elif kind == "shards":
        wanted = recorded(root) + moments.randint(1, 3)
        until(process, lambda: recorded(root) >= wanted)
        time.sleep(moments.uniform(0, 0.05))
    else:
        pattern = moments.choice(MERGED)
        until(process, lambda: any(root.glob(pattern)))
        time.sleep(moments.uniform(0, 0.005))


def kill_often(kills: int, folder: Path, raw: Path, whole: dict[str, str], moments: random.Random) -> int:
    """Kill so many running builds; return the number of datasets that were finished."""
    root, datasets = folder / "0", 0
    while kills or root.exists():
        whole_before = (root / "dataset.json").exists()
        process = begun(command(raw, root, "--workers", (1, 2, 8)[datasets % 3]))
        if kills:
            wait_for_a_moment(process, root, moments)
            with contextlib.suppress(ProcessLookupError):  # it has ended before its moment
                os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
        # a build that was killed in the moment after its end is tidied up by the next, which has nothing else to do
        tidied = whole_before and process.returncode == 2 and "a finished dataset is there already" in errors
        ended = process.returncode == 0 or tidied
        assert process.returncode == -signal.SIGKILL or (ended and is_finished(root)), errors
        assert gone(process.pid)
        if is_finished(root):
            assert digests(root) == whole
            datasets += 1
            root = folder / str(datasets)
        elif process.returncode and root.exists():
            kills -= 1
    return datasets


def test_a_build_that_is_killed_goes_on_to_the_same_bytes(little: Path, little_dataset: dict[str, str], tmp_path: Path):
    assert kill_often(15, tmp_path, little, little_dataset, random.Random(2)) >= 1


def test_a_parent_that_is_killed_takes_its_workers_along(little: Path, little_dataset: dict[str, str], tmp_path: Path):
    root = tmp_path / "dataset"
    process = begun(command(little, root, "--workers", 2))
    until(process, lambda: recorded(root) >= 2)
    assert len(workers_of(process.pid)) == 2
    process.kill()
    assert gone(process.pid)
    assert process.wait() == -signal.SIGKILL
    assert not is_finished(root)
    done = finish(little, root, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert digests(root) == little_dataset


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_killed_ends_the_build(
    little: Path, little_dataset: dict[str, str], tmp_path: Path, number: signal.Signals
):
    root = tmp_path / "dataset"
    process = begun(command(little, root, "--workers", 2))
    until(process, lambda: recorded(root) >= 2)
    os.kill(workers_of(process.pid)[0], number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("Error: a worker process ended before its task")
    assert len(errors.splitlines()) == 1
    assert "the same command goes on" in errors
    assert gone(process.pid)
    finished = {name: digest for name, digest in digests(root).items() if not name.startswith(".build/")}
    assert finished.items() <= little_dataset.items()  # no torn file and no *.tmp
    assert build(little, root, *LITTLE, "--workers", 1).exit_code == 0
    assert digests(root) == little_dataset

"""Faults of the machine in a build: kills and signals, a full disk, unreadable files, decodes without end.

The build ends with one line; the same command goes on to the same bytes. A run that has ended loses only its page.
"""

import contextlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import LITTLE, ROOT, begun, build, command, digests, finish, gone, members, patched, until
from reported import short_run

MERGED = ("train/samples.npy*", "val/samples.npy*", "statistics.npz*", "mean.png*", "skipped.jsonl*", "dataset.json*")
SLOW = """
import os, re, time
from pipeline.offline import shards
rescaled = shards.rescaled
def slow(*picture):
    eval(os.environ["BEFORE_DECODE"])
    return rescaled(*picture)
shards.rescaled = slow
shards.SECONDS = float(os.environ.get("SECONDS", shards.SECONDS))
"""
SLOW_PAGE = """
import time
from trainer.figures import gather
gather.features = lambda *network: iter([time.sleep(60)])
"""
FULL = """
import builtins, contextlib, os
from pathlib import Path
real = builtins.open
def opened(file, mode="r", *more, **options):
    if {*mode} & {*"wx"} and os.environ["FULL_AT"] in str(file):
        with real(os.environ["BALLAST"], "ab", buffering=0) as ballast:
            for size in (2**16, 2**12):
                with contextlib.suppress(OSError):
                    while True:
                        ballast.write(bytes(size))
    return real(file, mode, *more, **options)
builtins.open = opened
"""
MEDDLED = """
import os, sys
from pathlib import Path
from tools import build_shards
real = build_shards.build
def build(plan, *more, **options):
    (last,) = plan.part("train", len(plan.splits["train"]) - 1, len(plan.splits["train"]))
    victim = Path(last.raw.file)
    print(victim, file=sys.stderr)
    {meddle}
    return real(plan, *more, **options)
build_shards.build = build
build_shards.main(sys.argv[1:])
"""


# A file system whose inode numbers are all the same, in the eyes of a child process.
ONE_INODE = """
import os
from contextlib import contextmanager
def same(status):
    kind, (values, named) = status.__reduce__()
    return kind((values[0], 1, 1, *values[3:]), named)
class Entry:
    def __init__(self, real):
        self.stat = lambda **options: same(real.stat(**options))
        self.name, self.path, self.is_file, self.is_dir = real.name, real.path, real.is_file, real.is_dir
        self.inode = lambda: 1
@contextmanager
def scandir(folder, real=os.scandir):
    with real(folder) as entries:
        yield map(Entry, entries)
for name in ("stat", "lstat", "fstat"):
    setattr(os, name, lambda *path, real=getattr(os, name), **options: same(real(*path, **options)))
os.scandir = scandir
"""


def only_line(errors: str) -> str:
    """Return stderr's only line."""
    assert errors.startswith("Error: "), errors
    assert len(errors.splitlines()) == 1, errors
    return errors


def recorded(root: Path) -> int:
    return len(list((root / ".build").glob("*-*.npz")))


def is_finished(root: Path) -> bool:
    return (root / "dataset.json").exists() and not (root / ".build").exists()


def assert_no_torn_file(root: Path, expected: dict[str, str]) -> None:
    """Compare every file of an unfinished build, but for its state, with the finished build's."""
    files = digests(root)
    assert not [name for name in files if name.endswith(".tmp")]
    assert {name: file for name, file in files.items() if not name.startswith(".build/")}.items() <= expected.items()


def assert_goes_on(raw: Path, root: Path, expected: dict[str, str]) -> None:
    done = build(raw, root, *LITTLE, "--workers", 1)
    assert done.exit_code == 0, done.output
    assert digests(root) == expected


# Kills and signals


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


@pytest.mark.proof
def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(
    little: Path, little_dataset: dict[str, str], tmp_path: Path
):
    root, datasets, kills, moments = tmp_path / "0", 0, 15, random.Random(2)
    while kills or root.exists():
        ended_before = (root / "dataset.json").exists()
        process = begun(command(little, root, "--workers", (1, 2, 8)[datasets % 3]))
        if kills:
            wait_for_a_moment(process, root, moments)
            with contextlib.suppress(ProcessLookupError):  # it has ended before its moment
                os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
        # a build that was killed in the moment after its end is tidied up by the next, which has nothing else to do
        tidied = ended_before and process.returncode == 2 and "a finished dataset is there already" in errors
        ended = process.returncode == 0 or tidied
        assert process.returncode == -signal.SIGKILL or (ended and is_finished(root)), errors
        assert gone(process.pid)
        if is_finished(root):
            assert digests(root) == little_dataset
            datasets += 1
            root = tmp_path / str(datasets)
        elif process.returncode and root.exists():
            kills -= 1
    assert datasets


@pytest.mark.proof
@pytest.mark.parametrize("victim", ["parent", "worker"])
def test_the_kill_of_one_process_ends_all(little: Path, little_dataset: dict[str, str], tmp_path: Path, victim: str):
    root = tmp_path / "dataset"
    process = begun(command(little, root, "--workers", 2))
    until(process, lambda: recorded(root) >= 2)
    pids = members(process.pid)
    workers = [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(process.pid if victim == "parent" else workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert gone(process.pid)
    if victim == "parent":
        assert process.returncode == -signal.SIGKILL
        assert not is_finished(root)
    else:
        assert process.returncode == 2
        assert only_line(errors).startswith("Error: a worker process ended before its task")
        assert "the same command goes on" in errors
        assert_no_torn_file(root, little_dataset)
    assert_goes_on(little, root, little_dataset)


@pytest.mark.proof
@pytest.mark.parametrize(
    ("number", "to", "workers"),
    [
        (signal.SIGINT, "group", 1),  # as a terminal does
        (signal.SIGINT, "group", 2),
        (signal.SIGTERM, "parent", 2),
        (signal.SIGTERM, "group", 2),
    ],
)
def test_a_signal_ends_a_build_at_once(little: Path, tmp_path: Path, workers: int, number: signal.Signals, to: str):
    """The shard in hand would take minutes."""
    root = tmp_path / "dataset"
    env = patched(tmp_path, SLOW, BEFORE_DECODE=f"time.sleep({1 if workers == 1 else 40})")
    process = begun(command(little, root, "--workers", workers, "--samples-per-shard", 144), env=env)
    until(process, lambda: any(root.glob("train/*.tmp")))
    for _ in range(2):  # the user is impatient
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if to == "group" else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number, errors
    assert "the finished shards stay, and the same command goes on" in only_line(errors)
    assert gone(process.pid)
    assert not list(root.rglob("*.tmp"))
    assert not list(root.rglob("*.tar"))


@pytest.mark.proof
@pytest.mark.parametrize("change", ["size=4k,nr_inodes=1", "ro"])
def test_shared_memory_that_takes_no_locks_is_named(little: Path, tmp_path: Path, change: str):
    line = command(little, tmp_path / "dataset", "--workers", 2)
    mounted = f'mount -t tmpfs -o {change} penstock /dev/shm && exec "$@"'
    before = ("unshare", "--mount", "sh", "-c", mounted, "sh")
    if subprocess.run([*before, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    done = subprocess.run([*before, *line], capture_output=True, text=True, check=False)
    reason = "Read-only file system" if change == "ro" else "No space left on device"
    remedy = "make room there (docker run --shm-size 64m), or take --workers 1"
    assert (done.returncode, done.stderr) == (2, f"Error: /dev/shm, for locks of workers: {reason}; {remedy}\n")


# Full disks and files that cannot be read


@pytest.mark.proof
def test_a_disk_that_is_full_at_any_file(little: Path, little_dataset: dict[str, str], disk: Path, tmp_path: Path):
    root, ballast = disk / "dataset", disk / "ballast"
    shards = ("train-000003.tar", "train-000012.idx", "train-000021.npz")  # far apart: a second worker is ahead
    moments = ("plan.json", *shards, "val/samples.npy", "statistics.npz", "dataset.json")
    for n, moment in enumerate(moments):
        env = patched(tmp_path, FULL, FULL_AT=moment, BALLAST=ballast)
        full = finish(little, root, "--workers", 1 + n % 2, env=env)
        assert full.returncode == 2, moment
        assert f"{root}: No space left on device; what is finished stays" in only_line(full.stderr)
        assert_no_torn_file(root, little_dataset)
        ballast.unlink()
    assert_goes_on(little, root, little_dataset)


@pytest.mark.parametrize(
    ("meddle", "message", "workers"),
    [
        ("victim.unlink()", "No such file or directory", 1),
        ("os.truncate(victim, 100)", "changed since the build began", 2),
        ("victim.unlink(), victim.symlink_to('/proc/self/mem')", "Input/output error", 2),  # nothing is at address 0
    ],
)
def test_a_raw_file_that_cannot_be_read(
    little: Path, little_dataset: dict[str, str], tmp_path: Path, workers: int, meddle: str, message: str
):
    """It changes between the listing and the reading. The build goes on once it is back."""
    raw, root = Path(shutil.copytree(little, tmp_path / "raw")), tmp_path / "dataset"
    line = [sys.executable, "-c", MEDDLED.format(meddle=meddle), *command(raw, root, "--workers", workers)[2:]]
    failed = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    victim, _, errors = failed.stderr.partition("\n")
    assert failed.returncode == 2, failed.stderr
    assert f"{victim}: {message}" in only_line(errors)
    assert recorded(root) >= 20
    assert_no_torn_file(root, little_dataset)
    Path(victim).unlink(missing_ok=True)
    shutil.copy(little / Path(victim).relative_to(raw), victim)
    assert_goes_on(raw, root, little_dataset)


def test_inode_numbers_may_be_all_the_same(little: Path, little_dataset: dict[str, str], tmp_path: Path):
    """As mergerfs may have them; some class folders are links."""
    raw, root = tmp_path / "raw", tmp_path / "dataset"
    shutil.copytree(little, tmp_path / "disk")
    (raw / "train").mkdir(parents=True)
    (raw / "val").symlink_to(tmp_path / "disk/val")
    for folder in sorted((tmp_path / "disk/train").iterdir()):
        (raw / "train" / folder.name).symlink_to(folder)
    done = finish(raw, root, "--workers", 1, env=patched(tmp_path, ONE_INODE))
    assert done.returncode == 0, done.stderr
    assert digests(root) == little_dataset


# Decodes without end


@pytest.mark.proof
@pytest.mark.parametrize("workers", [1, 2])
def test_a_decode_without_end_fails_the_build_and_skips_nothing(
    half: tuple[Path, Path], little_dataset: dict[str, str], tmp_path: Path, workers: int
):
    """Also one that lets no thread run: the kernel's timer ends a process whose C code holds the interpreter's lock."""
    raw, root = half[0], Path(shutil.copytree(half[1], tmp_path / "dataset"))
    before = digests(root)
    env = patched(tmp_path, SLOW, BEFORE_DECODE="time.sleep(30)", SECONDS=0.3)
    failed = finish(raw, root, "--workers", workers, env=env)
    assert failed.returncode == 2
    first, *more = failed.stderr.splitlines()
    assert first.startswith("Error: ")
    assert ".jpg: still decoding after 0.3 s, which fails the build (a time never skips an image)" in first
    assert all("still decoding" in line or line.startswith("Error: a worker process ended") for line in more), more
    env |= {"BEFORE_DECODE": "re.match('(a|aa)+$', 'a' * 99 + 'b')", "SECONDS": "0.5"}  # for years
    failed = finish(raw, root, "--workers", workers, env=env)
    assert failed.returncode == (-signal.SIGPROF if workers == 1 else 2), failed.stderr
    assert workers == 1 or "a worker process ended before its task" in only_line(failed.stderr)
    assert before.items() <= digests(root).items()
    assert_goes_on(raw, root, little_dataset)


@pytest.mark.proof
def test_a_build_stopped_for_longer_than_a_decode_may_take_goes_on(
    little: Path, little_dataset: dict[str, str], tmp_path: Path
):
    """As by Ctrl-Z and fg, or by a cluster that suspends a job."""
    root = tmp_path / "dataset"
    env = patched(tmp_path, SLOW, BEFORE_DECODE="time.sleep(0.05)", SECONDS=2)
    process = begun(command(little, root, "--workers", 1), env=env)
    until(process, lambda: recorded(root) >= 1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert digests(root) == little_dataset


# The page at the end of training


@pytest.mark.proof
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, None])
def test_a_run_that_has_ended_loses_only_its_page(number: signal.Signals | None, disk: Path, tmp_path: Path):
    """By a signal, or for a disk of 3 MB, which has no room for a page. The command that is named draws it later."""
    words = [str(word) for word in short_run(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1}, "train.steps=2")]
    words[words.index("--out") + 1] = run = str((tmp_path if number else disk) / "run")
    process = begun([sys.executable, "-m", "trainer", *words], env=patched(tmp_path, SLOW_PAGE) if number else None)
    assert any("the run is complete and saved; drawing its page" in line for line in process.stderr or ())
    if number:
        process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    line, _, later = errors.partition("draw its page by: " if number else "draw it by: ")
    full = f"no page: {run}/report.html: No space left on device; "
    assert line == (f"Error: {number.name}: the run is complete and saved; " if number else full)
    assert process.returncode == (128 + number if number else 0)
    assert not list(Path(run).rglob("*.tmp"))
    drawn = subprocess.run([sys.executable, *shlex.split(later)[1:]], cwd=ROOT, check=False)
    assert (drawn.returncode, Path(run, "report.html").exists()) == ((0, True) if number else (2, False))

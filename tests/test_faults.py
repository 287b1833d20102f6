"""What a machine does to a build: a full disk, files that cannot be read, Ctrl-C, decodes without end."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import LITTLE, ROOT, begun, build, command, digests, finish, gone, until

SLOW = """
import os, re, time
from pipeline.offline import shards
rescaled = shards.rescaled
def slow(data, recipe):
    eval(os.environ["BEFORE_DECODE"])
    return rescaled(data, recipe)
shards.rescaled = slow
shards.SECONDS = float(os.environ.get("SECONDS", shards.SECONDS))
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


def patched(folder: Path, code: str, **variables: object) -> dict[str, str]:
    """The environment of a Python, and of its workers, that begins with `code`."""
    (folder / "patch").mkdir(exist_ok=True)
    (folder / "patch" / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(folder / "patch"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in variables.items()}}


def only_line(errors: str) -> str:
    """Return stderr's only line."""
    assert errors.startswith("Error: "), errors
    assert len(errors.splitlines()) == 1, errors
    return errors


def assert_whole(root: Path, whole: dict[str, str]) -> None:
    """Every file of an unfinished build is one of the whole one's, or its state; none is half-written."""
    found = digests(root)
    assert not [name for name in found if name.endswith(".tmp")]
    assert {name: digest for name, digest in found.items() if not name.startswith(".build/")}.items() <= whole.items()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "penstock", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.proof
@pytest.mark.parametrize("workers", [1, 2])
def test_a_small_disk(little: Path, little_dataset: dict[str, str], disk: Path, workers: int):
    root = disk / "dataset"
    full = finish(little, root, "--workers", workers)
    assert full.returncode == 2
    assert f"{root}: No space left on device; what is finished stays" in only_line(full.stderr)
    assert list(root.rglob("*.npz"))
    assert_whole(root, little_dataset)
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    done = finish(little, root, "--workers", workers)
    assert done.returncode == 0, done.stderr
    assert digests(root) == little_dataset


@pytest.mark.proof
def test_a_disk_that_is_full_at_any_file(little: Path, little_dataset: dict[str, str], disk: Path, tmp_path: Path):
    subprocess.run(["mount", "-o", "remount,size=3m", str(disk)], check=True)
    root, ballast = disk / "dataset", disk / "ballast"
    shards = ("train-000003.tar", "train-000012.idx", "train-000021.npz")  # far apart: a second worker is ahead
    moments = ("plan.json", *shards, "val/samples.npy", "statistics.npz", "dataset.json")
    for n, moment in enumerate(moments):
        env = patched(tmp_path, FULL, FULL_AT=moment, BALLAST=ballast)
        full = finish(little, root, "--workers", 1 + n % 2, env=env)
        assert full.returncode == 2, moment
        assert f"{root}: No space left on device; what is finished stays" in only_line(full.stderr)
        assert_whole(root, little_dataset)
        ballast.unlink()
    assert build(little, root, *LITTLE, "--workers", 1).exit_code == 0
    assert digests(root) == little_dataset


@pytest.mark.parametrize(
    ("meddle", "message", "workers"),
    [
        ("victim.unlink()", "No such file or directory", 1),
        ("victim.unlink(), victim.mkdir()", "Is a directory", 2),
        ("os.truncate(victim, 100)", "changed since the build began", 2),
        ("victim.unlink(), victim.symlink_to('/proc/self/mem')", "Input/output error", 2),  # nothing is at address 0
    ],
)
def test_a_raw_file_that_cannot_be_read(
    little: Path, little_dataset: dict[str, str], tmp_path: Path, workers: int, meddle: str, message: str
):
    """It changes between the listing and the reading. The build goes on once it is back."""
    raw, root = tmp_path / "raw", tmp_path / "dataset"
    shutil.copytree(little, raw)
    line = [sys.executable, "-c", MEDDLED.format(meddle=meddle), *command(raw, root, "--workers", workers)[2:]]
    failed = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    victim, _, errors = failed.stderr.partition("\n")
    assert failed.returncode == 2, failed.stderr
    assert f"{victim}: {message}" in only_line(errors)
    assert len(list((root / "train").glob("*.tar"))) >= 20
    assert_whole(root, little_dataset)
    subprocess.run(["rm", "-rf", victim], check=True)
    shutil.copy(little / Path(victim).relative_to(raw), victim)
    assert build(raw, root, *LITTLE, "--workers", 1).exit_code == 0
    assert digests(root) == little_dataset


@pytest.mark.proof
@pytest.mark.parametrize(
    ("number", "to", "workers"),
    [
        (signal.SIGINT, "group", 1),  # as a terminal does
        (signal.SIGINT, "group", 2),
        (signal.SIGINT, "parent", 2),
        (signal.SIGTERM, "parent", 1),
        (signal.SIGTERM, "parent", 2),
        (signal.SIGTERM, "group", 2),
    ],
)
def test_a_signal_ends_a_build_at_once(
    little: Path, little_dataset: dict[str, str], tmp_path: Path, workers: int, number: signal.Signals, to: str
):
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
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_goes_on_after_a_signal(
    little: Path, little_dataset: dict[str, str], tmp_path: Path, number: signal.Signals
):
    root = tmp_path / "dataset"
    process = begun(command(little, root, "--workers", 2))
    until(process, lambda: len(list(root.rglob("*.npz"))) >= 3)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number, errors
    only_line(errors)
    assert_whole(root, little_dataset)
    assert build(little, root, *LITTLE, "--workers", 1).exit_code == 0
    assert digests(root) == little_dataset


@pytest.mark.parametrize("workers", [1, 2])
def test_a_decode_without_end_fails_the_build_and_skips_nothing(
    half: tuple[Path, Path], little_dataset: dict[str, str], tmp_path: Path, workers: int
):
    raw, root = half[0], Path(shutil.copytree(half[1], tmp_path / "dataset"))
    before = digests(root)
    env = patched(tmp_path, SLOW, BEFORE_DECODE="time.sleep(30)", SECONDS=0.3)
    failed = finish(raw, root, "--workers", workers, env=env)
    assert failed.returncode == 2
    first, *more = failed.stderr.splitlines()
    assert first.startswith("Error: ")
    assert ".jpg: still decoding after 0.3 s, which fails the build (a time never skips an image)" in first
    assert all("still decoding" in line or line.startswith("Error: a worker process ended") for line in more)
    assert before.items() <= digests(root).items()
    assert build(raw, root, *LITTLE, "--workers", 1).exit_code == 0
    assert digests(root) == little_dataset


@pytest.mark.proof
@pytest.mark.parametrize("workers", [1, 2])
def test_a_decoder_that_lets_no_thread_run_is_ended_too(half: tuple[Path, Path], tmp_path: Path, workers: int):
    """A regular expression in C holds the interpreter's lock for years: the kernel's timer ends the process."""
    raw, root = half[0], Path(shutil.copytree(half[1], tmp_path / "dataset"))
    env = patched(tmp_path, SLOW, BEFORE_DECODE="re.match('(a|aa)+$', 'a' * 99 + 'b')", SECONDS=1)
    failed = finish(raw, root, "--workers", workers, env=env)
    if workers == 1:
        assert failed.returncode == -signal.SIGPROF, failed.stderr
    else:
        assert failed.returncode == 2
        assert "a worker process ended before its task" in only_line(failed.stderr)


@pytest.mark.proof
def test_a_build_that_is_stopped_for_longer_than_a_decode_may_take_goes_on(
    little: Path, little_dataset: dict[str, str], tmp_path: Path
):
    """As by Ctrl-Z and fg, or by a cluster that suspends a job."""
    root = tmp_path / "dataset"
    env = patched(tmp_path, SLOW, BEFORE_DECODE="time.sleep(0.05)", SECONDS=2)
    process = begun(command(little, root, "--workers", 1), env=env)
    for shard in (1, 2):
        until(process, lambda shard=shard: len(list(root.rglob("*.npz"))) >= shard)
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert digests(root) == little_dataset

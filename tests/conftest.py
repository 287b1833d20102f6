"""Fixtures: a folder of pictures drawn here, a dataset built from it, and the real data beside the checkout, if any."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tools.build_shards import main as build_shards

ROOT = Path(__file__).parent.parent
CLASSES = ("blobs", "checks", "stripes")


def picture(name: str, width: int, height: int) -> Image.Image:
    """A smooth random picture with some grain, a function of its name."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    coarse = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray(np.clip(smooth + random.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8))


def build(*arguments: object) -> Result:
    """Run tools/build_shards.py in this process."""
    return CliRunner().invoke(build_shards, [str(argument) for argument in arguments])


LITTLE = ("--size", 32, "--samples-per-shard", 6)  # of `little`: 24 training and 4 validation shards


def command(raw: Path, root: Path, *options: object) -> list[str]:
    """The command line of tools/build_shards.py on `little`."""
    return [sys.executable, str(ROOT / "tools/build_shards.py"), *map(str, (raw, root, *LITTLE, *options))]


def finish(
    raw: Path, root: Path, *options: object, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `command` to its end, in a process of its own. (`build` is faster, where that is not needed.)"""
    line = command(raw, root, *options)
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, env=env)


def begun(line: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A process that leads a group of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL, stderr=pipe, text=True, env=env)


def until(process: subprocess.Popen[str], seen: Callable[[], bool]) -> None:
    """Return once `seen`, or once the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not seen():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def members(group: int) -> list[int]:
    """The living processes of a process group, by their start."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(words[2]) == group and words[0] not in "ZX":
            found.append((int(words[19]), int(stat.parent.name)))
    return [pid for _, pid in sorted(found)]


def gone(group: int) -> bool:
    """Whether no process of the group is left, soon."""
    deadline = time.monotonic() + 20
    while members(group) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not members(group)


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file below `root`."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def drawn(kind: str, name: str, width: int, height: int) -> Image.Image:
    """`picture` with the class's pattern in it: nothing, a checkerboard, or stripes."""
    y, x = np.ogrid[:height, :width]
    dark = {"blobs": 0 * x * y, "checks": (x // 24 + y // 24) % 2, "stripes": y // 12 % 2 + 0 * x}[kind]
    return Image.fromarray((np.asarray(picture(name, width, height)) * (1 - 0.6 * dark[..., None])).astype(np.uint8))


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of three classes: 42 and 9 pictures, the same file names in every class, one truncated."""
    folder = tmp_path_factory.mktemp("raw")
    for split, count in (("train", 14), ("val", 3)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                sides = (300 + 10 * i, 280) if i % 2 else (260, 300 + 7 * i)
                drawn(name, f"{split}{name}{i}", *sides).save(folder / split / name / f"{i:04d}.jpg", quality=90)
    victim = folder / "train" / "checks" / "0003.jpg"
    victim.write_bytes(victim.read_bytes()[:4000])
    (folder / "train" / "checks" / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="session")
def dataset(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw`, built in shards of 16. Read only: a test that damages a dataset copies it."""
    root = tmp_path_factory.mktemp("built") / "dataset"
    result = build(raw, root, "--workers", 1, "--samples-per-shard", 16)
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture(scope="session")
def little(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of three classes: 144 and 24 small pictures, two of them truncated. Read only."""
    folder = tmp_path_factory.mktemp("little")
    for split, count in (("train", 48), ("val", 8)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                picture(f"{split}{name}{i}", 160, 120).save(folder / split / name / f"{name}_{split}{i}.jpg")
    for victim in (folder / "train" / "checks" / "checks_train7.jpg", folder / "val" / "blobs" / "blobs_val3.jpg"):
        victim.write_bytes(victim.read_bytes()[:2000])
    return folder


@pytest.fixture(scope="session")
def little_dataset(little: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an uninterrupted build of `little`, by their SHA-256."""
    root = tmp_path_factory.mktemp("little_built") / "dataset"
    done = build(little, root, *LITTLE, "--workers", 1)
    assert done.exit_code == 0, done.output
    return digests(root)


@pytest.fixture(scope="session")
def half(little: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A copy of `little`, and an unfinished build of it: some shards are recorded. Read only."""
    folder = tmp_path_factory.mktemp("half")
    raw, root = Path(shutil.copytree(little, folder / "raw")), folder / "dataset"
    process = begun(command(raw, root, "--workers", 1))
    until(process, lambda: len(list(root.rglob("*.npz"))) >= 5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    return raw, root


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout."""
    folder = Path(os.environ.get("PENSTOCK_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data at {folder} (set PENSTOCK_SHARED)")
    return folder / "data"

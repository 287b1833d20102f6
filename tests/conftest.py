"""Fixtures: pictures drawn here, what is built and made of them, and the real data beside the checkout, if any."""

import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# small networks on busy cores: two threads wait for each other far longer than they compute
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # processes of a job talk to this machine alone

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from pipeline import storage
from pipeline.decode import ImageError, decode
from pipeline.storage import Location
from s3 import Store
from tools.build_shards import main as build_shards
from tools.make_raw import main as make_raw
from tools.raw_tier import main as raw_tier
from tools.verify_shards import main as verify_shards

if TYPE_CHECKING:
    from reported import Written

ROOT = Path(__file__).parent.parent
CLASSES = ("blobs", "checks", "stripes")
LIMITS = {"max_bytes": 32 * 2**20, "max_pixels": 64 * 10**6, "max_scans": 100}
SHARDS = 11 + 2  # of `plain`
DATA = np.random.default_rng(0).bytes(300_000)


def pytest_configure(config: pytest.Config) -> None:
    """Take SIGINT again: a shell's `&` has it ignored, which children inherit, and tests of Ctrl-C would fail."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def picture(name: str, width: int, height: int) -> Image.Image:
    """A smooth random picture with some grain, a function of its name."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    coarse = random.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray(np.clip(smooth + random.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def reason(data: bytes, **limits: Any) -> str:
    """Why `decode` leaves a picture out."""
    with pytest.raises(ImageError) as caught:
        decode(data, **{**LIMITS, **limits})
    return caught.value.code


def build(*arguments: object) -> Result:
    """Run tools/build_shards.py in this process."""
    return CliRunner().invoke(build_shards, [str(argument) for argument in arguments])


def verify(*arguments: object) -> Result:
    """Run tools/verify_shards.py in this process."""
    result = CliRunner().invoke(verify_shards, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def make_tier(root: object, *options: object) -> Result:
    """Run tools/raw_tier.py in this process."""
    result = CliRunner().invoke(raw_tier, [str(root), "--workers", "1", *map(str, options)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


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


def patched(folder: Path, code: str, **variables: object) -> dict[str, str]:
    """Return the environment of a Python, and of its workers, that begins with `code`."""
    (folder / "patch").mkdir(exist_ok=True)
    (folder / "patch" / "sitecustomize.py").write_text(code)
    path = os.pathsep.join([str(folder / "patch"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **{name: str(value) for name, value in variables.items()}}


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


def one_line(error: pytest.ExceptionInfo[BaseException], *words: str) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    for word in words:
        assert word in text
    return text


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file below `root`."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def drawn(kind: str, name: str, width: int, height: int) -> Image.Image:
    """`picture` with the class's pattern in it: nothing, a checkerboard, or stripes."""
    y, x = np.ogrid[:height, :width]
    dark = {"blobs": 0 * x * y, "checks": (x // 24 + y // 24) % 2, "stripes": y // 12 % 2 + 0 * x}[kind]
    return Image.fromarray((np.asarray(picture(name, width, height)) * (1 - 0.6 * dark[..., None])).astype(np.uint8))


def normal(name: str) -> str:
    """Return the name of a distribution in the form in which names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Return the pinned versions by normal name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}


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
def small(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw` in pictures of 32 pixels: quick to check. Read only."""
    root = tmp_path_factory.mktemp("small") / "dataset"
    assert build(raw, root, "--workers", 1, "--samples-per-shard", 16, "--size", 32).exit_code == 0
    return root


@pytest.fixture
def root(small: Path, tmp_path: Path) -> Path:
    """A copy of `small` to damage."""
    return Path(shutil.copytree(small, tmp_path / "dataset"))


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


@pytest.fixture(scope="session")
def plain(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pictures`, built without Ray."""
    root = tmp_path_factory.mktemp("plain") / "dataset"
    result = build(pictures, root, "--workers", 2, "--samples-per-shard", 8)
    assert result.exit_code == 0, result.output
    assert len(list(root.rglob("*.tar"))) == SHARDS
    return root


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official archives of four classes: 24 and 12 pictures. Read only."""
    folder = tmp_path_factory.mktemp("official") / "raw"
    result = CliRunner().invoke(make_raw, [str(folder), "--classes", "4", "--train", "6", "--val", "3"])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> "Written":
    """The page of a report, and what it is of. Read only."""
    from reported import write  # which takes a second

    return write(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout."""
    folder = Path(os.environ.get("PENSTOCK_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data at {folder} (set PENSTOCK_SHARED)")
    return folder / "data"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=3m", "penstock", str(folder)]
    mounted = subprocess.run(line, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # tensors of a checkpoint may still map its file


@pytest.fixture
def bucket(s3: Store) -> Location:
    return storage.location(s3.url)

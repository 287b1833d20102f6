"""Who may go on with an unfinished build: whoever would give the same bytes, and one at a time."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT, begun, command, digests, finish, until

OTHER_CODECS = """
import sys
from pipeline import image
codec_versions = image.codec_versions
image.codec_versions = lambda: codec_versions() | {"jpeg": "9.9.9"}
from tools.build_shards import main
main(sys.argv[1:])
"""


def half_built(raw: Path, root: Path, *options: object) -> None:
    """An unfinished build: five training shards and more are recorded."""
    process = begun(command(raw, root, "--workers", 1, *options))
    until(process, lambda: len(list(root.rglob("*.npz"))) >= 5)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors


def refusal(raw: Path, root: Path, *options: object) -> str:
    """The one line of a command that ends before it changes anything."""
    before = digests(root)
    refused = finish(raw, root, *options)
    assert refused.returncode == 2, refused.stderr
    assert len(refused.stderr.splitlines()) == 1, refused.stderr
    assert digests(root) == before
    return refused.stderr


@pytest.fixture(scope="module")
def half(little: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A copy of `little`, and an unfinished build of it. A test that changes one of them copies it."""
    folder = tmp_path_factory.mktemp("half")
    raw = Path(shutil.copytree(little, folder / "raw"))
    half_built(raw, folder / "dataset")
    return raw, folder / "dataset"


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--quality", 80, "quality 95 → 80"),
        ("--size", 33, "size 32 → 33"),
        ("--seed", 7, "seed 2012 → 7"),
        ("--samples-per-shard", 7, "samples_per_shard 6 → 7"),
        ("--limit", 100, "limit 0 → 100, raw images of train 144 →"),
    ],
)
def test_another_recipe_is_refused(half: tuple[Path, Path], option: str, value: int, told: str):
    error = refusal(*half, option, value)
    assert f"holds an unfinished build that differs in {told}" in error
    assert "run that one again, or delete" in error


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda raw: shutil.copy(raw / "val/blobs/blobs_val1.jpg", raw / "val/blobs/new.jpg"), "images of val 24 → 25"),
        (lambda raw: (raw / "train/blobs/blobs_train1.jpg").unlink(), "images of train 144 → 143"),
        (lambda raw: (raw / "val/blobs/blobs_val1.jpg").rename(raw / "val/blobs/new.jpg"), "names of its raw images"),
        (lambda raw: [(raw / s / "checks").rename(raw / s / "squares") for s in ("train", "val")], "checks → squares"),
        (lambda raw: shutil.rmtree(raw / "train" / "checks"), "images of train 144 → 96"),
    ],
)
def test_other_raw_images_are_refused(
    half: tuple[Path, Path], tmp_path: Path, change: Callable[[Path], object], told: str
):
    raw = Path(shutil.copytree(half[0], tmp_path / "raw"))
    change(raw)
    assert told in refusal(raw, half[1])


def test_a_raw_file_of_another_size_is_refused_where_its_shard_is_finished(
    half: tuple[Path, Path], little_dataset: dict[str, str], tmp_path: Path
):
    """Nothing that is finished changes; once the file is as it was, the build goes on."""
    raw, root = Path(shutil.copytree(half[0], tmp_path / "raw")), Path(shutil.copytree(half[1], tmp_path / "dataset"))
    files = sorted((raw / "train").rglob("*.jpg"))
    for path in files:
        path.write_bytes(path.read_bytes() + b"more")
    shard = r"train/train-000000: built by an earlier run when its raw images"
    assert shard in refusal(raw, root, "--workers", 1)
    for path in files:
        path.write_bytes(path.read_bytes()[:-4])
    assert finish(raw, root, "--workers", 2).returncode == 0
    assert digests(root) == little_dataset


@pytest.mark.parametrize("workers", [1, 2])
def test_other_codecs_are_refused(half: tuple[Path, Path], tmp_path: Path, workers: int):
    """In the process that resumes; and in its workers, as on another machine."""
    root = half[1]
    before = digests(root)
    line = [sys.executable, "-c", OTHER_CODECS, *command(*half, "--workers", workers)[2:]]
    refused = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert refused.returncode == 2, refused.stderr
    assert "differs in jpeg " in refused.stderr
    assert "→ 9.9.9;" in refused.stderr
    assert digests(root) == before
    if workers > 1:  # the parent alone has them, in a new build: `-c` leaves workers as they are
        line = [sys.executable, "-c", OTHER_CODECS, *command(half[0], tmp_path / "new", "--workers", workers)[2:]]
        failed = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
        assert failed.returncode == 2
        assert len(failed.stderr.splitlines()) == 1
        assert "other codecs than the build began with (jpeg 9.9.9, here" in failed.stderr
        assert not list((tmp_path / "new").rglob("*.tar"))


def test_a_second_build_of_one_dataset_is_refused(little: Path, little_dataset: dict[str, str], tmp_path: Path):
    root = tmp_path / "dataset"
    first = begun(command(little, root, "--workers", 1))
    until(first, lambda: len(list(root.rglob("*.npz"))) >= 2)
    os.kill(first.pid, signal.SIGSTOP)
    for options in ((), ("--part", "1/2"), ("--merge",), ("--workers", 1)):
        assert "another build is writing there; wait for it, or stop it" in refusal(little, root, *options)
    os.kill(first.pid, signal.SIGCONT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 0, errors
    assert digests(root) == little_dataset
    assert "a finished dataset is there already" in refusal(little, root)


def test_a_build_is_refused_while_a_part_is_built(little: Path, little_dataset: dict[str, str], tmp_path: Path):
    root = tmp_path / "dataset"
    part = begun(command(little, root, "--workers", 1, "--part", "1/2"))
    until(part, lambda: len(list(root.rglob("*.npz"))) >= 2)
    os.kill(part.pid, signal.SIGSTOP)
    assert "another build is writing there" in refusal(little, root)
    assert finish(little, root, "--workers", 2, "--part", "2/2").returncode == 0
    os.kill(part.pid, signal.SIGCONT)
    _, errors = part.communicate(timeout=60)
    assert part.returncode == 0, errors
    assert finish(little, root, "--merge").returncode == 0
    assert digests(root) == little_dataset


def test_the_last_moments_of_a_build_are_no_obstacle(little: Path, little_dataset: dict[str, str], tmp_path: Path):
    """A kill may leave a whole dataset with all of its state, with the plan alone, or with an empty folder."""
    root = tmp_path / "dataset"
    half_built(little, root)
    state = tmp_path / "state"
    shutil.copytree(root / ".build", state)
    assert finish(little, root, "--workers", 1).returncode == 0
    for keep in ("*", "plan.json"):
        (root / ".build").mkdir()
        for path in state.glob(keep):
            shutil.copy(path, root / ".build")
        done = finish(little, root)
        assert done.returncode == 0, done.stderr
        assert digests(root) == little_dataset
        assert not (root / ".build").exists()
    for leftover in ((), ("lock", "beginning")):
        (root / ".build").mkdir()
        for name in leftover:
            (root / ".build" / name).touch()
        done = finish(little, root)
        assert done.returncode == 2
        assert "a finished dataset is there already" in done.stderr
        assert not (root / ".build").exists()
        assert digests(root) == little_dataset

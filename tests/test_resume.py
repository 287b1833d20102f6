"""Who may go on with an unfinished build: whoever would give the same bytes, and one at a time."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import LITTLE, ROOT, begun, build, command, digests, until
from pipeline import manifest
from pipeline.manifest import DatasetError
from pipeline.offline import lock
from pipeline.offline.shards import load_record

OTHER_CODECS = """
import sys
from pipeline import image
codec_versions = image.codec_versions
image.codec_versions = lambda: codec_versions() | {"jpeg": "9.9.9"}
from tools.build_shards import main
main(sys.argv[1:])
"""


def refusal(raw: Path, root: Path, *options: object) -> str:
    """The one line of a command that ends before it changes anything."""
    before = digests(root)
    refused = build(raw, root, *LITTLE, *options)
    assert refused.exit_code == 2, refused.output
    assert len(refused.stderr.splitlines()) == 1, refused.stderr
    assert digests(root) == before
    return refused.stderr


def resumed(raw: Path, root: Path, *options: object) -> dict[str, str]:
    """The files of a dataset that the command makes whole."""
    done = build(raw, root, *LITTLE, *options)
    assert done.exit_code == 0, done.output
    return digests(root)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--quality", 80, "quality 95 → 80"),
        ("--size", 33, "size 32 → 33"),
        ("--seed", 7, "seed 2012 → 7"),
        ("--samples-per-shard", 7, "samples_per_shard 6 → 7"),
        ("--limit", 100, "limit 0 → 100, raw images of train 144 →"),
    ],
)
def test_another_recipe_is_refused(half: tuple[Path, Path], option: str, value: int, words: str):
    error = refusal(*half, option, value)
    assert f"holds an unfinished build that differs in {words}" in error
    assert "run that one again, or delete" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: shutil.copy(raw / "val/blobs/blobs_val1.jpg", raw / "val/blobs/new.jpg"), "images of val 24 → 25"),
        (lambda raw: (raw / "train/blobs/blobs_train1.jpg").unlink(), "images of train 144 → 143"),
        (lambda raw: (raw / "val/blobs/blobs_val1.jpg").rename(raw / "val/blobs/new.jpg"), "names of its raw images"),
        (lambda raw: [(raw / s / "checks").rename(raw / s / "squares") for s in ("train", "val")], "checks → squares"),
        (lambda raw: shutil.rmtree(raw / "train" / "checks"), "images of train 144 → 96"),
    ],
)
def test_other_raw_images_are_refused(
    half: tuple[Path, Path], tmp_path: Path, change: Callable[[Path], object], words: str
):
    raw = Path(shutil.copytree(half[0], tmp_path / "raw"))
    change(raw)
    assert words in refusal(raw, half[1])


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
    assert resumed(raw, root, "--workers", 1) == little_dataset


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
        assert "other codecs than the build began with (jpeg 9.9.9 → " in failed.stderr
        assert not list((tmp_path / "new").rglob("*.tar"))


def test_a_second_build_of_one_dataset_is_refused(
    little: Path, little_dataset: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)  # of a part
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
    resumed(little, root, "--workers", 1, "--part", "2/2")
    os.kill(part.pid, signal.SIGCONT)
    _, errors = part.communicate(timeout=60)
    assert part.returncode == 0, errors
    assert resumed(little, root, "--merge") == little_dataset


def test_finished_shards_are_not_built_again(half: tuple[Path, Path], little_dataset: dict[str, str], tmp_path: Path):
    root = Path(shutil.copytree(half[1], tmp_path / "dataset"))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.tar")}
    with pytest.raises(DatasetError, match="its build has not finished"):
        manifest.load(root)
    assert resumed(half[0], root, "--workers", 1) == little_dataset
    assert before
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("cut", ["nothing is left", "half is left", "zeros at the end", "a letter of its JSON"])
def test_a_damaged_record_costs_its_shard_and_nothing_else(
    half: tuple[Path, Path], little_dataset: dict[str, str], tmp_path: Path, cut: str
):
    root = Path(shutil.copytree(half[1], tmp_path / "dataset"))
    record = root / ".build" / "train-000001.npz"
    data = record.read_bytes()
    damaged = {
        "nothing is left": b"",
        "half is left": data[: len(data) // 2],
        "zeros at the end": data[:-30] + bytes(30),
        "a letter of its JSON": data.replace(b'"raw"', b'"row"', 1),
    }[cut]
    assert damaged != data
    record.write_bytes(damaged)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.tar")}
    assert resumed(half[0], root, "--workers", 1) == little_dataset
    assert [path.name for path, when in before.items() if path.stat().st_mtime_ns != when] == ["train-000001.tar"]


def test_a_torn_or_missing_shard_is_built_again(
    half: tuple[Path, Path], little_dataset: dict[str, str], tmp_path: Path
):
    root = Path(shutil.copytree(half[1], tmp_path / "dataset"))
    os.truncate(root / "train" / "train-000000.tar", 1024)
    (root / "train" / "train-000001.idx").unlink()
    assert resumed(half[0], root, "--workers", 1) == little_dataset


def test_a_damaged_plan_is_named(half: tuple[Path, Path], tmp_path: Path):
    root = Path(shutil.copytree(half[1], tmp_path / "dataset"))
    for damaged in ("", "{", "[]", "{}", '{"recipe": 1}'):
        (root / ".build" / "plan.json").write_text(damaged)
        assert "plan.json: damaged" in refusal(half[0], root)


def test_a_build_that_an_older_version_began_is_refused(half: tuple[Path, Path], tmp_path: Path):
    """The state of version 1 had no format number; everything else in it was as it is now."""
    root = Path(shutil.copytree(half[1], tmp_path / "dataset"))
    state = root / ".build" / "plan.json"
    body = json.loads(state.read_text())
    assert body.pop("format") == 2
    assert body.keys() == {"recipe", "codecs", "classes", "images", "images_sha256"}
    state.write_bytes(manifest.canonical_json(body))
    error = refusal(half[0], root)
    assert "holds an unfinished build of another version of Penstock; end it with that version, or delete" in error


def test_a_kill_before_the_plan_was_written_is_no_obstacle(
    little: Path, little_dataset: dict[str, str], tmp_path: Path
):
    root = tmp_path / "dataset"
    (root / ".build").mkdir(parents=True)
    (root / ".build" / "plan.json.tmp").write_text("torn")
    assert resumed(little, root, "--workers", 1) == little_dataset


def test_the_last_moments_of_a_build_are_no_obstacle(
    half: tuple[Path, Path], little_dataset: dict[str, str], tmp_path: Path
):
    """A kill may leave a whole dataset with all of its state, with the plan alone, or with a folder without it."""
    raw, root = half[0], Path(shutil.copytree(half[1], tmp_path / "dataset"))
    state = shutil.copytree(root / ".build", tmp_path / "state")
    assert resumed(raw, root, "--workers", 1) == little_dataset
    for keep in ("*", "plan.json"):
        (root / ".build").mkdir()
        for path in state.glob(keep):
            shutil.copy(path, root / ".build")
        assert resumed(raw, root) == little_dataset
        assert not (root / ".build").exists()
    for leftover in ((), ("lock", "beginning")):
        (root / ".build").mkdir()
        for name in leftover:
            (root / ".build" / name).touch()
        done = build(raw, root, *LITTLE)
        assert done.exit_code == 2
        assert "a finished dataset is there already" in done.stderr
        assert not (root / ".build").exists()
        assert digests(root) == little_dataset


def test_a_damaged_record_is_no_record(half: tuple[Path, Path], tmp_path: Path):
    """Flipped bits in the headers of its zip: encryption, other compression, wrong places."""
    root = Path(shutil.copytree(half[1], tmp_path / "dataset"))
    file = min((root / ".build").glob("*.npz"))
    name, good = f"{file.stem.partition('-')[0]}/{file.stem}", file.read_bytes()
    assert load_record(root, name) is not None
    damaged = 0
    for case in range(400):
        chance, data = random.Random(case), bytearray(good)
        data[chance.choice([*range(600), *range(len(good) - 800, len(good))])] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        damaged += load_record(root, name) is None
    assert damaged > 200

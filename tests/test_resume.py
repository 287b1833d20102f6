"""Unfinished builds: the same command goes on where the bytes would be the same, one at a time; others are refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import LITTLE, ROOT, begun, build, command, digests, until
from pipeline import manifest
from pipeline.manifest import DatasetError
from pipeline.offline import lock
from pipeline.offline.shards import load_record
from s3 import Store, empty_bucket, running_server  # noqa: F401 – two are fixtures

OTHER_CODECS = """
import sys
from pipeline import image
codec_versions = image.codec_versions
image.codec_versions = lambda: codec_versions() | {"jpeg": "9.9.9"}
from tools.build_shards import main
main(sys.argv[1:])
"""


def refusal(raw: Path, root: Path, *options: object) -> str:
    """Return the one line of a command that ends before it changes anything."""
    before = digests(root)
    refused = build(raw, root, *LITTLE, *options)
    assert refused.exit_code == 2, refused.output
    assert len(refused.stderr.splitlines()) == 1, refused.stderr
    assert digests(root) == before
    return refused.stderr


@pytest.fixture
def root(half: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the unfinished build."""
    return Path(shutil.copytree(half[1], tmp_path / "dataset"))


def times(root: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in sorted(root.rglob("*.tar"))}


def resumed(raw: Path, root: Path, *options: object) -> dict[str, str]:
    """Return the files of the dataset that the command completes."""
    done = build(raw, root, *LITTLE, *options)
    assert done.exit_code == 0, done.output
    return digests(root)


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        (("--quality", 80), str, "holds an unfinished build that differs in quality 95 → 80; run that one again, or"),
        (
            ("--size", 33, "--seed", 7, "--samples-per-shard", 7),
            str,
            "samples_per_shard 6 → 7, seed 2012 → 7, size 32 → 33",
        ),
        (("--limit", 100), str, "differs in limit 0 → 100, raw images of train 144 →"),
        ((), lambda raw: shutil.copy(raw / "val/blobs/blobs_val1.jpg", raw / "val/blobs/new.jpg"), "of val 24 → 25"),
        ((), lambda raw: (raw / "val/blobs/blobs_val1.jpg").rename(raw / "val/blobs/new.jpg"), "names of its raw"),
        ((), lambda raw: [(raw / s / "checks").rename(raw / s / "dots") for s in ("train", "val")], "checks → dots"),
    ],
)
def test_another_build_is_refused(
    half: tuple[Path, Path], tmp_path: Path, options: tuple[object, ...], change: Callable[[Path], object], words: str
):
    raw = Path(shutil.copytree(half[0], tmp_path / "raw"))
    change(raw)
    assert words in refusal(raw, half[1], *options)


def test_a_raw_file_of_another_size_is_refused_where_its_shard_is_finished(
    half: tuple[Path, Path], root: Path, little_dataset: dict[str, str], tmp_path: Path
):
    """Nothing that is finished changes; once the file is as it was, the build goes on."""
    raw = Path(shutil.copytree(half[0], tmp_path / "raw"))
    files = sorted((raw / "train").rglob("*.jpg"))
    for path in files:
        path.write_bytes(path.read_bytes() + b"more")
    shard = r"train/train-000000: built by an earlier run when its raw images"
    assert shard in refusal(raw, root, "--workers", 1)
    for path in files:
        path.write_bytes(path.read_bytes()[:-4])
    assert resumed(raw, root, "--workers", 1) == little_dataset


def test_other_codecs_are_refused(half: tuple[Path, Path], root: Path, tmp_path: Path):
    """In the process that resumes; and in the workers of a new build, as on another machine."""
    before = digests(root)
    for dataset, words in (
        (root, "differs in jpeg "),
        (tmp_path / "new", "other codecs than the build began with (jpeg 9.9.9 → "),  # `-c` leaves workers as they are
    ):
        line = [sys.executable, "-c", OTHER_CODECS, *command(half[0], dataset, "--workers", 2)[2:]]
        refused = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert words in refused.stderr
    assert digests(root) == before
    assert not list((tmp_path / "new").rglob("*.tar"))


def test_a_second_build_of_one_dataset_is_refused(
    little: Path, little_dataset: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Another part of the same build may run beside a part."""
    monkeypatch.setattr(lock, "PATIENCE", 0.1)  # of a part
    for options, others in ((("--part", "1/2"), [(), ("--merge",)]), ((), [(), ("--merge",), ("--part", "1/2")])):
        root = tmp_path / f"dataset{len(options)}"
        first = begun(command(little, root, "--workers", 1, *options))
        until(first, lambda root=root: len(list(root.rglob("*.npz"))) >= 2)
        os.kill(first.pid, signal.SIGSTOP)
        for other in others:
            assert "another build is writing there; wait for it, or stop it" in refusal(little, root, *other)
        if options:
            resumed(little, root, "--workers", 1, "--part", "2/2")
        os.kill(first.pid, signal.SIGCONT)
        _, errors = first.communicate(timeout=60)
        assert first.returncode == 0, errors
        if options:
            resumed(little, root, "--merge")
        assert digests(root) == little_dataset
        assert "a finished dataset is there already" in refusal(little, root)


def test_damage_to_a_record_or_a_shard_costs_this_shard_and_nothing_else(
    half: tuple[Path, Path], root: Path, little_dataset: dict[str, str]
):
    empty, changed, torn, lacking, *others = finished = sorted(path.stem for path in (root / ".build").glob("*-*.npz"))
    before = {name: time for name, time in times(root).items() if name in finished}  # one may have a tar and no record
    assert others
    (root / ".build" / f"{empty}.npz").write_bytes(b"")
    data = (root / ".build" / f"{changed}.npz").read_bytes()
    (root / ".build" / f"{changed}.npz").write_bytes(data.replace(b'"raw"', b'"row"', 1))
    os.truncate(root / "train" / f"{torn}.tar", 1024)
    (root / "train" / f"{lacking}.idx").unlink()
    assert b'"raw"' in data
    with pytest.raises(DatasetError, match="its build has not finished"):
        manifest.load(root)
    assert resumed(half[0], root, "--workers", 1) == little_dataset
    after = times(root)
    assert {name for name in before if after[name] != before[name]} == {empty, changed, torn, lacking}


def test_a_flipped_bit_makes_a_record_invalid(root: Path):
    """In the headers of its zip: encryption, other compression, wrong positions."""
    file = min((root / ".build").glob("*.npz"))
    name, good = f"{file.stem.partition('-')[0]}/{file.stem}", file.read_bytes()
    assert load_record(root, name) is not None
    invalid = 0
    for case in range(400):
        chance, data = random.Random(case), bytearray(good)
        data[chance.choice([*range(600), *range(len(good) - 800, len(good))])] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        invalid += load_record(root, name) is None
    assert invalid > 200


def test_records_of_the_version_before_warnings_were_counted_go_on(
    half: tuple[Path, Path], root: Path, little_dataset: dict[str, str]
):
    for path in (root / ".build").glob("*-*.npz"):
        with np.load(path) as record:
            arrays = dict(record)
        meta = json.loads(arrays["meta"].tobytes())
        assert meta.pop("warned") == {}
        np.savez(path, **arrays | {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)})
    before = times(root)
    assert resumed(half[0], root, "--workers", 1) == little_dataset
    assert before.items() <= times(root).items()


def test_a_damaged_plan_or_one_of_an_older_version_is_refused(half: tuple[Path, Path], root: Path):
    """The state of version 1 had no format number; everything else in it was as it is now."""
    state = root / ".build" / "plan.json"
    body = json.loads(state.read_text())
    assert body.pop("format") == 2
    assert body.keys() == {"recipe", "codecs", "classes", "images", "images_sha256"}
    other = "holds an unfinished build of another version of Penstock; end it with that version, or delete"
    for text, words in (
        *((text, "plan.json: damaged") for text in ("", "{", "[]", '{"recipe": 1}')),
        (manifest.canonical_json(body).decode(), other),
    ):
        state.write_text(text)
        assert words in refusal(half[0], root)


def test_the_first_and_the_last_moments_of_a_build_are_no_obstacle(
    half: tuple[Path, Path], root: Path, little_dataset: dict[str, str], tmp_path: Path
):
    """A kill may leave no plan; or a whole dataset with all of its state, the plan alone, or a folder without it."""
    raw = half[0]
    state = shutil.copytree(root / ".build", tmp_path / "state")
    shutil.rmtree(root)
    (root / ".build").mkdir(parents=True)
    (root / ".build" / "plan.json.tmp").write_text("torn")
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


@pytest.mark.proof
def test_an_interrupted_build_in_a_store_goes_on_and_another_recipe_is_refused(s3: Store, raw: Path, dataset: Path):
    s3.upload(raw, "raw")
    arguments = (f"{s3.url}/raw", f"{s3.url}/parts", "--workers", 1, "--samples-per-shard", 16)
    part = build(*arguments, "--part", "1/2")
    assert part.exit_code == 0, part.output
    with pytest.raises(DatasetError, match="its build has not finished"):
        manifest.load(f"{s3.url}/parts")
    other = build(*arguments, "--quality", 50)
    assert other.exit_code == 2
    assert "quality 95 → 50" in other.output
    assert "not built yet" in build(*arguments, "--merge").output
    assert build(*arguments).exit_code == 0
    assert s3.digests("parts") == digests(dataset)

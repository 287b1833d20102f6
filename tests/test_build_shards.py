"""tools/build_shards.py: parts, skips, dry runs, JSON, a bar; and builds from parquet files, which are copied first."""

import contextlib
import json
import os
import pty
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import Result

from conftest import LITTLE, begun, build, command, digests, verify
from pipeline import UserError, manifest, storage
from pipeline.offline import parquet
from pipeline.offline.build import SKIP_LIMIT, SkipLimit
from s3 import Store, empty_bucket, running_server  # noqa: F401  # fixtures
from tools import build_progress, build_shards

PLAIN = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def built(raw: Path, root: Path, *options: object) -> dict[str, str]:
    """Return the digests of the files that a command leaves."""
    done(build(raw, root, *LITTLE, *options))
    return digests(root)


def error_of(raw: object, root: object, *options: object) -> str:
    """Return the line on stderr of a command that fails."""
    failed = build(raw, root, *LITTLE, *options)
    assert failed.exit_code == 2, failed.output
    *usage, line = [line for line in failed.stderr.splitlines() if "note: " not in line]
    assert not usage or usage[0].startswith("Usage: ")  # click's, before what it refuses itself
    return line


def shards(root: Path) -> dict[str, int]:
    """Return the time at which each shard was written."""
    return {path.name: path.stat().st_mtime_ns for path in root.rglob("*.tar")}


def damage(raw: Path, names: Sequence[str], size: int = 700) -> None:
    for name in names:
        path = raw / name
        path.write_bytes(path.read_bytes()[:size])


def test_parts_built_at_once_and_merged(little: Path, little_dataset: dict[str, str], tmp_path: Path):
    root = tmp_path / "dataset"
    jobs = ((3, 1), (1, 2), (2, 1))  # part, workers
    lines = [command(little, root, "--part", f"{part}/3", "--workers", workers) for part, workers in jobs]
    for process in [begun(line) for line in lines]:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert len(shards(root)) == 28
    assert not (root / "dataset.json").exists()
    assert built(little, root, "--merge") == little_dataset


def test_parts_one_after_the_other(little: Path, little_dataset: dict[str, str], tmp_path: Path):
    root = tmp_path / "dataset"
    output = done(build(little, root, *LITTLE, "--part", "2/2", "--workers", 1))
    assert "part 2 of 2: 14 shards are built; end the build with --merge" in output
    before = digests(root)
    for _ in range(2):
        error = error_of(little, root, "--merge")
        assert "14 of 28 shards are not built yet, such as train/train-000000, train/train-000002" in error
        assert digests(root) == before
    built(little, root, "--part", "1/2", "--workers", 1)
    built(little, root, "--part", "1/2", "--workers", 1)  # once more is no harm
    assert "part 29 of 40: 0 shards" in done(build(little, root, *LITTLE, "--part", "29/40"))
    for part in ("0/3", "4/3", "²/3"):
        assert f"{part}: not K/N with K from 1 to N, such as 3/16" in error_of(little, root, "--part", part)
    error = error_of(little, root, "--merge", "--max-skipped", 0)
    assert "train: 1 images skipped so far (1 truncated), at most 0" in error
    assert built(little, root, "--merge", "--max-skipped", 1) == little_dataset


def test_too_many_skipped_images_fail_a_build(little: Path, tmp_path: Path):
    """One of the 144 training images is truncated to begin with; at most ten may be skipped by default."""
    raw, root = Path(shutil.copytree(little, tmp_path / "raw")), tmp_path / "dataset"
    damage(raw, [f"train/blobs/blobs_train{i}.jpg" for i in range(8)])
    (raw / "train/stripes/stripes_train0.jpg").write_bytes(b"")
    built(raw, tmp_path / "ten", "--workers", 1)
    damage(raw, ["train/blobs/blobs_train8.jpg"])
    error = error_of(raw, root, "--workers", 1)
    assert "train: 11 images skipped so far (1 empty, 10 truncated), at most 10 may be" in error
    assert "the finished shards stay" in error
    before = shards(root)
    assert before
    assert not (root / "dataset.json").exists()
    assert "at most 5 may be" in error_of(raw, root, "--workers", 1, "--max-skipped", 5)
    assert "11 images skipped so far" in error_of(raw, root, "--workers", 1, "--max-skipped", "7.5%")
    assert before.items() <= shards(root).items()
    assert built(raw, root, "--workers", 1, "--max-skipped", 11) == built(
        raw, tmp_path / "fresh", "--workers", 1, "--max-skipped", "8%"
    )
    assert before.items() <= shards(root).items()


def test_limits_of_skipped_images():
    assert [SKIP_LIMIT.allowed(n) for n in (1, 10_000, 11_000, 50_000, 1_281_167)] == [10, 10, 11, 50, 1281]
    assert [SkipLimit.parse("0.5%").allowed(n) for n in (199, 200, 1000)] == [0, 1, 5]
    assert [SkipLimit.parse(text).allowed(1000) for text in ("0", "25", "0%", "100%", " 7 ")] == [0, 25, 0, 1000, 7]
    for text in ("x", "-1", "101%", "0.5", "%", "1e3", "5 %x", "١"):
        with pytest.raises(UserError, match="neither a number of images"):
            SkipLimit.parse(text)


def test_skipped_images_are_tried_again_once_they_are_mended(little: Path, tmp_path: Path):
    """The truncated file is replaced by the whole one, of another size, in the middle of a build."""
    raw, root = Path(shutil.copytree(little, tmp_path / "raw")), tmp_path / "dataset"
    assert "train: 1 images skipped" in error_of(raw, root, "--workers", 1, "--max-skipped", 0)
    before = shards(root)
    shutil.copy(raw / "train/checks/checks_train8.jpg", raw / "train/checks/checks_train7.jpg")
    assert "built by an earlier run when its raw images" in error_of(raw, root, "--workers", 1)
    again = built(raw, root, "--workers", 1, "--retry-skipped")
    assert again == built(raw, tmp_path / "fresh", "--workers", 1)
    changed = [name for name, when in shards(root).items() if name in before and before[name] != when]
    assert len(changed) == 1
    assert [split.skipped for split in manifest.load(root).splits.values()] == [0, 1]


@pytest.mark.parametrize("size", [32, 256])
def test_a_dry_run_writes_nothing_and_foretells_the_bytes(little: Path, tmp_path: Path, size: int):
    options = ("--size", size, "--workers", 1)
    output = done(build(little, tmp_path / "dataset", *options, "--dry-run"))
    assert not (tmp_path / "dataset").exists()
    assert "would write 2 shards, about 0.0 GB, in about" in output
    lines = done(build(little, tmp_path / "dataset", *options, "--dry-run", "--json")).splitlines()
    plan, estimate = map(json.loads, lines)
    assert (plan["event"], estimate["event"], estimate["shards"]) == ("plan", "estimate", 2)
    done(build(little, tmp_path / "dataset", *options))
    splits = manifest.load(tmp_path / "dataset").splits.values()
    written = sum(shard.bytes for split in splits for shard in split.shards)
    assert 0.8 * written <= estimate["bytes"] <= 1.2 * written


def test_json_lines(little: Path, tmp_path: Path):
    root = tmp_path / "dataset"
    result = build(little, root, *LITTLE, "--workers", 1, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    plan, *middle, last = map(json.loads, result.stdout.splitlines())
    dataset = manifest.load(root)
    assert [plan[key] for key in ("event", "images", "classes", "shards")] == ["plan", {"train": 144, "val": 24}, 3, 28]
    assert all(line["event"] == "shard" for line in middle)
    names = [shard.name.removesuffix(".tar") for split in dataset.splits.values() for shard in split.shards]
    assert [line["name"] for line in middle] == names
    assert sum(line["images"] for line in middle) == 168
    assert sum(line["skipped"].get("truncated", 0) for line in middle) == 2
    assert (last["event"], last["identity"]) == ("done", dataset.identity)
    assert {name: split["samples"] for name, split in last["splits"].items()} == {"train": 143, "val": 23}
    part = build(little, tmp_path / "part", *LITTLE, "--workers", 1, "--json", "--part", "1/14")
    assert [json.loads(line)["event"] for line in part.stdout.splitlines()] == ["plan", "shard", "shard", "part"]


def test_plain_lines_without_a_terminal(little: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build_progress, "SECONDS_BETWEEN_LINES", 0.0)
    result = build(little, tmp_path / "dataset", *LITTLE, "--workers", 1)
    assert (result.exit_code, result.stderr) == (0, "")
    assert not {"\x1b", "\r"} & set(result.output)
    assert "12 of 168 images (7.1 %), " in result.stdout
    assert "168 of 168 images (100.0 %), " in result.stdout


def test_a_bar_on_a_terminal(little: Path, tmp_path: Path):
    screen, terminal = pty.openpty()
    line = command(little, tmp_path / "dataset", "--workers", 1)
    env = PLAIN | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=terminal, env=env)
    os.close(terminal)
    seen = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while block := os.read(screen, 4096):
            seen += block
    os.close(screen)
    assert process.stdout
    assert b"\x1b" not in process.stdout.read()
    assert process.wait() == 0
    process.stdout.close()
    assert b"168/168" in seen
    assert "━".encode() in seen
    assert b"images/s" in seen
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")  # the cursor is back


def test_recipe_options_are_the_fields_of_the_build_recipe():
    options = {option.name: option for option in build_shards.main.params}
    recipe = manifest.BuildRecipe()
    for name in build_shards.RECIPE_HELP:
        assert options[name].default == getattr(recipe, name), name
        assert options[name].opts == [f"--{name.replace('_', '-')}"]
    assert {field.name for field in fields(recipe)} - set(options) == {"max_bytes", "max_pixels", "max_scans"}
    for option, value in (("--size", 15), ("--size", 1025), ("--crop", "left"), ("--holdout", 0.6), ("--seed", -1)):
        failed = build("raw", "dataset", option, value)
        assert failed.exit_code == 2
        assert option in failed.stderr.splitlines()[-1]
    assert "Examples:\n    python tools/build_shards.py /data/imagenet /data/imagenet-256\n" in build("--help").output


# Raw data in parquet files


def write_rows(file: Path, rows: Sequence[tuple[bytes, str, str]]) -> None:
    """Write rows of bytes, path and label."""
    images = [{"bytes": data, "path": path} for data, path, _ in rows]
    pq.write_table(pa.table({"image": images, "label": [label for _, _, label in rows]}), file, row_group_size=30)


def rewrite(file: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Write the rows of a file again with other bytes, a function of the path and the bytes."""
    rows = [(row["image"]["path"], row["image"]["bytes"], row["label"]) for row in pq.read_table(file).to_pylist()]
    write_rows(file, [(change(path, data), path, label) for path, data, label in rows])


@pytest.fixture(scope="module")
def rows(little: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of `little` in parquet files: two for training, one for validation. Read only."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "data").mkdir()
    for name, cuts in (("train", (0, 100, 144)), ("val", (0, 24))):
        table = [(path.read_bytes(), path.name, path.parent.name) for path in sorted((little / name).rglob("*.jpg"))]
        random.Random(name).shuffle(table)
        for number, (start, stop) in enumerate(pairwise(cuts)):
            write_rows(folder / "data" / f"{name}-{number}.parquet", table[start:stop])
    return folder


@pytest.fixture(scope="module")
def expected(little_dataset: dict[str, str]) -> dict[str, str]:
    """The files of `little_dataset`, by their SHA-256, without those that name the files of RAW."""
    return {name: sha for name, sha in little_dataset.items() if name not in ("skipped.jsonl", "dataset.json")}


def test_an_interrupted_build_goes_on_with_the_copies_that_are_there(
    rows: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root, copies, limit = tmp_path / "dataset", list[Path](), 1
    write_aside = parquet.write_aside

    def interrupted(path: Path, write: Callable[..., Any]) -> None:
        if len(copies) == limit:
            raise KeyboardInterrupt
        copies.append(path)
        write_aside(path, write)

    monkeypatch.setattr(parquet, "write_aside", interrupted)
    assert build(rows, root, *LITTLE, "--workers", 1).exit_code == 130
    assert [*(root / ".build").glob("*.tar")] == copies
    written = copies[0].stat().st_mtime_ns
    (root / ".build" / f"{copies[0].name}.12345678.tmp").write_bytes(b"what a kill left")
    limit = 3
    done(build(rows, root, *LITTLE, "--part", "1/2"))
    assert sorted((root / ".build").glob("*.tar*")) == sorted(copies)
    assert copies[0].stat().st_mtime_ns == written
    before = {name: time for name, time in shards(root).items() if "-" in name}  # without the copies
    assert len(before) == 14
    assert built(rows, root, "--workers", 1).items() >= expected.items()  # a command without parts builds the rest
    assert before.items() <= shards(root).items()
    assert not (root / ".build").exists()


def test_raw_that_changed_since_the_first_shards_is_noticed(rows: Path, tmp_path: Path):
    raw, root = Path(shutil.copytree(rows, tmp_path / "raw")), tmp_path / "dataset"
    done(build(raw, root, *LITTLE, "--part", "1/2"))
    rewrite(raw / "data" / "train-0.parquet", lambda path, data: data + b"longer")
    error = error_of(raw, root, "--workers", 1)
    assert re.search("had other sizes or other places.* restore RAW, or delete DATASET", error)


def test_a_dry_run_of_parquet_files_writes_nothing(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    output = done(build(rows, tmp_path / "dataset", *LITTLE, "--dry-run"))
    assert "144 train, 24 val, 3 classes" in output
    assert "from 64 images tried here" in output
    assert "note: a build first copies the pictures of the parquet files to DATASET/.build" in output
    assert not [*tmp_path.iterdir()]


def test_without_room_for_the_copy_a_build_does_not_begin(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    error = error_of(rows, tmp_path / "dataset")
    problem = (
        r"dataset/.build: a copy of RAW's pictures takes \d MB, and 0 MB are free; make room or name another DATASET"
    )
    assert re.search(problem, error)
    assert not [*tmp_path.rglob("*.tar")]


def test_repair_and_retry_read_the_rows_that_they_need(rows: Path, little: Path, tmp_path: Path):
    raw, root = Path(shutil.copytree(rows, tmp_path / "raw")), tmp_path / "dataset"
    options = ("--size", 32, "--samples-per-shard", 40, "--workers", 1)
    done(build(raw, root, *options))
    before = digests(root)
    (root / "train" / "train-000001.tar").write_bytes(b"damaged")
    (root / "val" / "samples.npy").unlink()
    assert verify(root, "--repair", raw, "--workers", 1).exit_code == 0
    assert digests(root) == before
    twice = (little / "train" / "checks" / "checks_train8.jpg").read_bytes()
    for path in (raw / "data").glob("train-*"):
        rewrite(path, lambda name, data: twice if name == "checks_train7.jpg" else data)
    output = done(build(raw, root, *options, "--retry-skipped"))
    assert "1 images that were skipped are samples now; 1 are skipped still" in output
    done(build(raw, tmp_path / "fresh", *options))
    assert digests(root) == digests(tmp_path / "fresh")


@pytest.mark.proof
def test_copies_lie_in_a_store_where_the_dataset_does(s3: Store, rows: Path, expected: dict[str, str]):
    for path in rows.rglob("*.parquet"):
        storage.put_if_absent(storage.location(f"{s3.url}/raw/data/{path.name}"), path.read_bytes())
    urls = f"{s3.url}/raw", f"{s3.url}/out"
    s3.faults(0.1, seed=1)
    done(build(*urls, *LITTLE, "--part", "1/2"))
    s3.faults(0.0)
    state = storage.location(f"{s3.url}/out/.build")
    assert sum(entry.name.endswith(".tar") for entry in storage.scan(state)) == 3
    done(build(*urls, *LITTLE, "--workers", 1))
    assert not storage.exists(state)
    dataset = manifest.load(f"{s3.url}/out")
    assert {name: file.sha256 for name, file in dataset.files.items()}.items() >= expected.items()

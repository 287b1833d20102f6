"""The options of tools/build_shards.py that do not determine the bytes: parts, skips, dry runs, JSON, a bar."""

import contextlib
import json
import os
import pty
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest

from conftest import LITTLE, begun, build, command, digests
from pipeline import UserError, manifest
from pipeline.offline.build import SKIP_LIMIT, SkipLimit
from tools import build_progress, build_shards

PLAIN = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}


def built(raw: Path, root: Path, *options: object) -> dict[str, str]:
    """The files that a command in this process leaves."""
    done = build(raw, root, *LITTLE, *options)
    assert done.exit_code == 0, done.output
    return digests(root)


def error_of(raw: Path, root: Path, *options: object) -> str:
    """The line on stderr of a command that fails."""
    failed = build(raw, root, *LITTLE, *options)
    assert failed.exit_code == 2, failed.output
    assert len(failed.stderr.splitlines()) == 1, failed.stderr
    return failed.stderr


def shards(root: Path) -> dict[str, int]:
    """When each shard was written."""
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
    done = build(little, root, *LITTLE, "--part", "2/2", "--workers", 1)
    assert "part 2 of 2: 14 shards are built; end the build with --merge" in done.output
    before = digests(root)
    for _ in range(2):
        missing = error_of(little, root, "--merge")
        assert "14 of 28 shards are not built yet, such as train/train-000000, train/train-000002" in missing
        assert digests(root) == before
    built(little, root, "--part", "1/2", "--workers", 1)
    built(little, root, "--part", "1/2", "--workers", 1)  # once more is no harm
    assert built(little, root, "--merge") == little_dataset


def test_a_command_without_parts_builds_the_rest(little: Path, little_dataset: dict[str, str], tmp_path: Path):
    root = tmp_path / "dataset"
    built(little, root, "--part", "2/3", "--workers", 1)
    before = shards(root)
    assert len(before) == 9
    assert built(little, root, "--workers", 1) == little_dataset
    assert before.items() <= shards(root).items()


def test_more_parts_than_shards(little: Path, tmp_path: Path):
    assert "part 29 of 40: 0 shards" in build(little, tmp_path / "dataset", *LITTLE, "--part", "29/40").output


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "1/2/3", "-1/3", "", "²/3"])
def test_no_such_part(little: Path, tmp_path: Path, part: str):
    failed = build(little, tmp_path / "dataset", *LITTLE, "--part", part)
    assert failed.exit_code == 2
    assert f"{part}: not K/N with K from 1 to N, such as 3/16" in failed.stderr.splitlines()[-1]
    assert not (tmp_path / "dataset").exists()


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


def test_a_merge_counts_the_skipped_images_of_all_parts(little: Path, little_dataset: dict[str, str], tmp_path: Path):
    root = tmp_path / "dataset"
    for part in ("1/2", "2/2"):
        built(little, root, "--part", part, "--workers", 1)
    assert "train: 1 images skipped so far (1 truncated), at most 0" in error_of(
        little, root, "--merge", "--max-skipped", 0
    )
    assert built(little, root, "--merge", "--max-skipped", 1) == little_dataset


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
    assert manifest.load(root).split("train").skipped == 0
    assert manifest.load(root).split("val").skipped == 1


@pytest.mark.parametrize("size", [32, 256])
def test_a_dry_run_writes_nothing_and_foretells_the_bytes(little: Path, tmp_path: Path, size: int):
    options = ("--size", size, "--workers", 1)
    told = build(little, tmp_path / "dataset", *options, "--dry-run")
    assert told.exit_code == 0, told.output
    assert not (tmp_path / "dataset").exists()
    assert "would write 2 shards, about 0.0 GB, in about" in told.output
    found = build(little, tmp_path / "dataset", *options, "--dry-run", "--json")
    plan, estimate = map(json.loads, found.stdout.splitlines())
    assert (plan["event"], estimate["event"], estimate["shards"]) == ("plan", "estimate", 2)
    assert build(little, tmp_path / "dataset", *options).exit_code == 0
    written = sum(
        shard.bytes for split in manifest.load(tmp_path / "dataset").splits.values() for shard in split.shards
    )
    assert 0.8 * written <= estimate["bytes"] <= 1.2 * written


def test_json_lines(little: Path, tmp_path: Path):
    root = tmp_path / "dataset"
    done = build(little, root, *LITTLE, "--workers", 1, "--json")
    assert done.exit_code == 0
    assert done.stderr == ""
    plan, *middle, last = map(json.loads, done.stdout.splitlines())
    found = manifest.load(root)
    assert plan["event"] == "plan"
    assert (plan["images"], plan["classes"], plan["shards"]) == ({"train": 144, "val": 24}, 3, 28)
    assert all(line["event"] == "shard" for line in middle)
    names = [shard.name.removesuffix(".tar") for split in found.splits.values() for shard in split.shards]
    assert [line["name"] for line in middle] == names
    assert sum(line["images"] for line in middle) == 168
    assert sum(line["skipped"].get("truncated", 0) for line in middle) == 2
    assert last["event"] == "done"
    assert last["identity"] == found.identity
    assert {name: split["samples"] for name, split in last["splits"].items()} == {"train": 143, "val": 23}
    part = build(little, tmp_path / "part", *LITTLE, "--workers", 1, "--json", "--part", "1/14")
    assert [json.loads(line)["event"] for line in part.stdout.splitlines()] == ["plan", "shard", "shard", "part"]


def test_plain_lines_without_a_terminal(little: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build_progress, "SECONDS_BETWEEN_LINES", 0.0)
    done = build(little, tmp_path / "dataset", *LITTLE, "--workers", 1)
    assert done.exit_code == 0
    assert "\x1b" not in done.output
    assert "\r" not in done.output
    assert done.stderr == ""
    assert "12 of 168 images (7.1 %), " in done.stdout
    assert "168 of 168 images (100.0 %), " in done.stdout


def test_a_bar_on_a_terminal(little: Path, tmp_path: Path):
    ours, theirs = pty.openpty()
    line = command(little, tmp_path / "dataset", "--workers", 1)
    env = PLAIN | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=theirs, env=env)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while block := os.read(ours, 4096):
            seen += block
    os.close(ours)
    assert process.stdout
    told = process.stdout.read()
    assert process.wait() == 0
    process.stdout.close()
    assert b"\x1b" not in told
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
        refused = build("raw", "dataset", option, value)
        assert refused.exit_code == 2
        assert option in refused.stderr.splitlines()[-1]


def test_help_shows_examples():
    told = build("--help").output
    assert "Examples:\n    python tools/build_shards.py /data/imagenet /data/imagenet-256\n" in told
    for option in ("--part", "--merge", "--max-skipped", "--retry-skipped", "--dry-run", "--json"):
        assert f"  {option}" in told

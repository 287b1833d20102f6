"""Shards of a finished dataset directory built again: verify_shards.py --repair and build_shards.py --retry-skipped.

The bytes are those of a build from whole pictures, and no other file is touched; or nothing is changed.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import ROOT, build, digests, drawn, verify
from pipeline import UserError, manifest
from pipeline.offline import repair
from pipeline.offline.build import build as write
from pipeline.offline.verify import load
from s3 import Store, empty_bucket, running_server  # noqa: F401 – two are fixtures
from stored import SHARD, evaluation_plan, remake

OPTIONS = ("--workers", 1, "--samples-per-shard", 4, "--size", 32, "--holdout", 0)


def state(root: Path) -> dict[str, tuple[str, int]]:
    return {name: (digest, (root / name).stat().st_mtime_ns) for name, digest in digests(root).items()}


@pytest.mark.parametrize(
    "names",
    [
        [f"{SHARD}.idx"],
        ["train/samples.npy"],
        ["mean.png", "skipped.jsonl"],
        ["statistics.npz", f"{SHARD}.tar", "val/val-000000.tar", "val/val-000000.idx"],
    ],
)
def test_repair_gives_the_same_bytes_and_touches_nothing_else(root: Path, raw: Path, names: list[str]):
    before = state(root)
    for name in names:
        (root / name).write_bytes(b"damaged")
    (root / names[0]).unlink()
    result = verify(root, "--repair", raw, "--quick", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert f"repaired: {', '.join(sorted(names))}\n" in result.output
    after = state(root)
    assert {name for name in before if after.get(name) != before[name]} == set(names)
    assert digests(root) == {name: digest for name, (digest, _) in before.items()}
    assert not (root / ".repair").exists()


def test_repair_names_unlisted_files_and_leaves_them(root: Path, raw: Path):
    (root / "val" / "notes.txt").write_text("notes")
    options = ("--repair", raw, "--quick", "--workers", 1)
    result = verify(root, *options)
    assert (result.exit_code, "nothing that RAW could repair" in result.output) == (1, True)
    (root / "mean.png").unlink()
    result = verify(root, *options)
    assert (result.exit_code, "repaired: mean.png" in result.output) == (1, True)
    assert result.output.count("val/notes.txt: not listed") == 2
    assert (root / "val" / "notes.txt").read_text() == "notes"


def test_repair_from_other_pictures_or_codecs_is_refused(
    root: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = Path(shutil.copytree(raw, tmp_path / "other"))
    for folder in (other / "train").iterdir():
        (folder / "0000.jpg").write_bytes((folder / "0001.jpg").read_bytes())
    (root / f"{SHARD}.tar").unlink()
    (root / "statistics.npz").write_bytes(b"")
    before = state(root)
    result = verify(root, "--repair", other, "--quick", "--workers", 2)
    assert result.exit_code == 2
    assert re.search(r"tar: RAW gives other bytes .*: RAW is not what it was built from; nothing was", result.output)
    monkeypatch.setattr(repair, "codec_versions", lambda: {**load(root).built_with, "jpeg": "9.9"})
    assert "it was built with other codecs (jpeg " in verify(root, "--repair", other, "--quick").output
    for split in ("train", "val"):
        shutil.rmtree(other / split / "blobs")
    result = verify(root, "--repair", other, "--quick")
    assert result.exit_code == 2
    assert "RAW has other classes or splits" in result.output
    assert state(root) == before
    assert not (root / ".repair").exists()


def test_repair_takes_the_layout_and_the_classes_of_the_build(raw: Path, tmp_path: Path):
    """Two classes of three of `raw`, whose train/ is read as plain class folders."""
    classes = tmp_path / "classes.txt"
    classes.write_text("blobs\nstripes\n")
    source = ("--layout", "class-folders", "--classes", classes)
    root = tmp_path / "dataset"
    assert build(raw / "train", root, *OPTIONS, *source).exit_code == 0
    before = (root / f"{SHARD}.tar").read_bytes()
    (root / f"{SHARD}.tar").write_bytes(b"torn")
    result = verify(root, "--repair", raw / "train", *source, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert (root / f"{SHARD}.tar").read_bytes() == before


@pytest.mark.proof
def test_a_dataset_in_a_store_is_verified_and_not_repaired_there(s3: Store, raw: Path, root: Path):
    shard = root / f"{SHARD}.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (root / "notes.txt").write_text("not listed")
    s3.upload(root, "damaged")
    result = verify(f"{s3.url}/damaged", "--quick")
    assert result.exit_code == 1
    assert f"{SHARD}.tar: its SHA-256 is not that of the manifest" in result.output
    assert "notes.txt: not listed" in result.output
    refused = verify(f"{s3.url}/damaged", "--quick", "--repair", raw)
    assert refused.exit_code == 2
    assert "works on a local folder" in refused.output


# A set for evaluation alone: its statistics are another data set's

ONLY = {"samples_per_shard": 4, "holdout": 0.0}


@pytest.mark.parametrize("names", [["val/val-000001.tar"], ["statistics.npz", "mean.png"], ["val/samples.npy"]])
def test_repair_of_a_set_for_evaluation_alone(small: Path, raw: Path, tmp_path: Path, names: list[str]):
    root, plan = tmp_path / "alone", evaluation_plan(raw, small, **ONLY)
    write(plan, root)
    before, built = digests(root), manifest.load(root)
    other = replace(plan.statistics, n=plan.statistics.n + 1)
    for name in names:
        (root / name).write_bytes(b"damaged")
    damaged = digests(root)
    with pytest.raises(UserError, match=r"has the statistics of another --classes-of DATASET; nothing was changed$"):
        repair.repair(built, names, replace(plan, statistics=other), 1)
    with pytest.raises(
        UserError, match=r"other classes or splits \(built with --classes-of DATASET: name that again\)"
    ):
        repair.repair(built, names, replace(plan, splits={"train": plan.splits["val"]}), 1)
    assert digests(root) == damaged
    repair.repair(built, names, plan, 1)
    assert digests(root) == before


def test_mended_pictures_of_a_set_for_evaluation_alone(cut_short: Path, tmp_path: Path):
    of, root, fresh = tmp_path / "of", tmp_path / "alone", tmp_path / "fresh"
    assert build(cut_short, of, *OPTIONS).exit_code == 0
    before = write(evaluation_plan(cut_short, of, **ONLY), root)
    assert before.splits["val"].skipped == 4
    mend(cut_short, "val/blobs/valblobs2.png")
    plan = evaluation_plan(cut_short, of, **ONLY)
    with pytest.raises(UserError, match=r"differs in the statistics; nothing was changed$"):
        repair.retry(before, replace(plan, statistics=replace(plan.statistics, n=1)), 1)
    after, gained = repair.retry(before, plan, 1)
    assert (gained, after.splits["val"].skipped) == (1, 3)
    write(plan, fresh)
    assert digests(root) == digests(fresh)
    assert (root / "statistics.npz").read_bytes() == (of / "statistics.npz").read_bytes()


# --retry-skipped


@pytest.fixture
def cut_short(tmp_path: Path) -> Path:
    """train/ and val/ of two classes; three pictures are cut short, and the first validation shard is all of those."""
    for split, count in (("train", 10), ("val", 4)):
        for name in ("blobs", "checks"):
            (tmp_path / "whole" / split / name).mkdir(parents=True)
            for i in range(count):
                path = tmp_path / "whole" / split / name / f"{split}{name}{i}.png"
                drawn(name, path.stem, 60, 50).save(path)
    raw = Path(shutil.copytree(tmp_path / "whole", tmp_path / "raw"))
    for name in ("train/blobs/trainblobs3", "train/checks/trainchecks7", *(f"val/blobs/valblobs{i}" for i in range(4))):
        path = raw / f"{name}.png"
        path.write_bytes(path.read_bytes()[:200])
    return raw


def mend(raw: Path, *names: str | Path) -> None:
    for name in names:
        shutil.copy(raw.parent / "whole" / name, raw / name)


def test_mended_pictures_get_the_positions_that_they_would_have_had(cut_short: Path, tmp_path: Path):
    root = tmp_path / "dataset"
    assert build(cut_short, root, *OPTIONS).exit_code == 0
    assert sum(split.skipped for split in manifest.load(root).splits.values()) == 6
    before = digests(root)
    result = build(cut_short, root, *OPTIONS, "--retry-skipped")
    assert result.exit_code == 0
    assert "0 images that were skipped are samples now; 6 are skipped still" in result.output
    assert digests(root) == before
    some = ["train/blobs/trainblobs3.png", "val/blobs/valblobs2.png"]
    for count, names in ((2, some), (4, [path.relative_to(cut_short) for path in cut_short.rglob("*.png")])):
        mend(cut_short, *names)
        result = build(cut_short, root, *OPTIONS, "--retry-skipped")
        assert result.exit_code == 0, result.output
        assert f"{count} images that were skipped are samples now" in result.output
        assert build(cut_short, tmp_path / f"fresh{count}", *OPTIONS).exit_code == 0
        assert digests(root) == digests(tmp_path / f"fresh{count}")


def test_another_recipe_or_other_samples_are_refused(cut_short: Path, tmp_path: Path):
    root = tmp_path / "dataset"
    assert build(cut_short, root, *OPTIONS).exit_code == 0
    before = digests(root)
    mend(cut_short, "train/blobs/trainblobs3.png")
    result = build(cut_short, root, *OPTIONS, "--retry-skipped", "--quality", 50)
    assert result.exit_code == 2
    assert "quality 95 → 50" in result.output
    for path in (cut_short / "train").rglob("*.png"):
        if path.name != "trainblobs3.png":
            drawn("stripes", path.name, 60, 50).save(path)
    result = build(cut_short, root, *OPTIONS, "--retry-skipped")
    assert result.exit_code == 2
    assert "RAW gives other samples" in result.output or "nothing was changed" in result.output
    assert digests(root) == before


@pytest.mark.parametrize(
    "content", [b"[]\n", b"[" * 10**5, b'{"key": "a"}\n', b'{"key": 1, "split": "val"}\n', b"\xff"]
)
def test_a_list_of_skipped_images_that_lies_is_named(cut_short: Path, tmp_path: Path, content: bytes):
    root = tmp_path / "dataset"
    assert build(cut_short, root, *OPTIONS).exit_code == 0
    (root / "skipped.jsonl").write_bytes(content)
    remake(root)
    before = digests(root)
    result = build(cut_short, root, *OPTIONS, "--retry-skipped")
    assert result.exit_code == 2
    problem = rf"Error: {root}/skipped.jsonl: no list of skipped images \(.*\); build the data set again\n$"
    assert re.search(problem, result.output)
    assert digests(root) == before


KILLED = """
import os, sys
from pipeline.offline import repair
replace, left = os.replace, [int(sys.argv.pop(1))]
def stopping(*paths):
    if not left[0]:
        os._exit(9)
    left[0] -= 1
    replace(*paths)
repair.os.replace = stopping
from tools.build_shards import main
main()
"""


@pytest.mark.parametrize("after", [0, 3, 9])
def test_after_a_kill_while_files_are_moved_the_same_command_goes_on(cut_short: Path, tmp_path: Path, after: int):
    root = tmp_path / "dataset"
    assert build(cut_short, root, *OPTIONS).exit_code == 0
    mend(cut_short, "train/blobs/trainblobs3.png", "val/blobs/valblobs2.png")
    words = [sys.executable, "-c", KILLED, after, cut_short, root, *OPTIONS, "--retry-skipped"]
    killed = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, cwd=ROOT)
    assert killed.returncode == 9, killed.stderr
    assert "--retry-skipped was killed" in verify(root, "--quick").output
    result = build(cut_short, root, *OPTIONS, "--retry-skipped")
    assert result.exit_code == 0, result.output
    assert build(cut_short, tmp_path / "fresh", *OPTIONS).exit_code == 0
    assert digests(root) == digests(tmp_path / "fresh")
    assert not (root / ".retry").exists()

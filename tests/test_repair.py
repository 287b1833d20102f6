"""Repair gives the same bytes and touches nothing else, or changes nothing."""

import re
import shutil
from pathlib import Path

import pytest

from conftest import build, digests, verify
from forgery import SHARD
from pipeline.offline import repair
from pipeline.offline.verify import load


def state(root: Path) -> dict[str, tuple[str, int]]:
    return {name: (digest, (root / name).stat().st_mtime_ns) for name, digest in digests(root).items()}


@pytest.mark.parametrize(
    "names",
    [
        [f"{SHARD}.tar"],
        [f"{SHARD}.idx"],
        ["train/train-000002.tar", "train/train-000002.idx", "val/samples.npy"],
        ["train/samples.npy"],
        ["statistics.npz"],
        ["mean.png"],
        ["skipped.jsonl"],
        ["mean.png", "skipped.jsonl", "statistics.npz", f"{SHARD}.tar", "val/val-000000.tar"],
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
    (root / "val" / "mine.txt").write_text("mine")
    result = verify(root, "--repair", raw, "--quick", "--workers", 1)
    assert result.exit_code == 1
    assert "nothing that RAW could repair" in result.output
    (root / "mean.png").unlink()
    result = verify(root, "--repair", raw, "--quick", "--workers", 1)
    assert result.exit_code == 1
    assert result.output.count("val/mine.txt: not listed") == 2
    assert "repaired: mean.png" in result.output
    assert (root / "val" / "mine.txt").read_text() == "mine"


def test_repair_from_other_pictures_or_codecs_is_refused(
    root: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = Path(shutil.copytree(raw, tmp_path / "other"))
    for folder in (other / "train").iterdir():
        (folder / "0000.jpg").write_bytes((folder / "0001.jpg").read_bytes())
    (root / f"{SHARD}.tar").unlink()
    (root / "statistics.npz").write_bytes(b"")
    before = state(root)
    for workers in (1, 2):
        result = verify(root, "--repair", other, "--quick", "--workers", workers)
        assert result.exit_code == 2
        assert re.search(
            r"tar: RAW gives other bytes .*: RAW is not what it was built from; nothing was", result.output
        )
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
    """Of `raw`, whose train/ is read as plain class folders, two classes of three."""
    classes = tmp_path / "classes.txt"
    classes.write_text("blobs\nstripes\n")
    source = ("--layout", "class-folders", "--classes", classes)
    root = tmp_path / "dataset"
    assert build(raw / "train", root, *source, "--size", 32, "--samples-per-shard", 16, "--workers", 1).exit_code == 0
    before = (root / f"{SHARD}.tar").read_bytes()
    (root / f"{SHARD}.tar").write_bytes(b"torn")
    refused = verify(root, "--repair", raw / "train", "--workers", 1)
    assert refused.exit_code == 2
    assert "RAW has other classes or splits" in refused.output
    result = verify(root, "--repair", raw / "train", *source, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert (root / f"{SHARD}.tar").read_bytes() == before

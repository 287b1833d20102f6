"""Skipped images tried again, in a finished dataset directory: as if they had been whole from the start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, build, digests, drawn, verify
from pipeline import manifest

OPTIONS = ("--workers", 1, "--samples-per-shard", 4, "--size", 32, "--holdout", 0)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """train/ and val/ of two classes; three pictures are cut short, and the first validation shard is all of those."""
    for split, count in (("train", 10), ("val", 4)):
        for name in ("blobs", "checks"):
            (tmp_path / "whole" / split / name).mkdir(parents=True)
            for i in range(count):
                drawn(name, f"{split}{name}{i}", 60, 50).save(
                    tmp_path / "whole" / split / name / f"{split}{name}{i}.png"
                )
    raw = Path(shutil.copytree(tmp_path / "whole", tmp_path / "raw"))
    for name in ("train/blobs/trainblobs3", "train/checks/trainchecks7", *(f"val/blobs/valblobs{i}" for i in range(4))):
        path = raw / f"{name}.png"
        path.write_bytes(path.read_bytes()[:200])
    return raw


def mend(raw: Path, *names: str) -> None:
    for name in names:
        shutil.copy(raw.parent / "whole" / name, raw / name)


def test_mended_pictures_get_the_place_that_they_would_have_had(damaged: Path, tmp_path: Path):
    root = tmp_path / "dataset"
    assert build(damaged, root, *OPTIONS).exit_code == 0
    assert sum(split.skipped for split in manifest.load(root).splits.values()) == 6
    before = digests(root)
    result = build(damaged, root, *OPTIONS, "--retry-skipped")
    assert result.exit_code == 0
    assert "0 images that were skipped are samples now; 6 are skipped still" in result.output
    assert digests(root) == before
    for step, names in enumerate((["train/blobs/trainblobs3.png", "val/blobs/valblobs2.png"], before)):
        mend(damaged, *(names if step == 0 else [str(p.relative_to(damaged)) for p in damaged.rglob("*.png")]))
        result = build(damaged, root, *OPTIONS, "--retry-skipped")
        assert result.exit_code == 0, result.output
        assert f"{[2, 4][step]} images that were skipped are samples now" in result.output
        assert build(damaged, tmp_path / f"fresh{step}", *OPTIONS).exit_code == 0
        assert digests(root) == digests(tmp_path / f"fresh{step}")


def test_another_recipe_or_other_samples_are_refused(damaged: Path, tmp_path: Path):
    root = tmp_path / "dataset"
    assert build(damaged, root, *OPTIONS).exit_code == 0
    before = digests(root)
    mend(damaged, "train/blobs/trainblobs3.png")
    result = build(damaged, root, *OPTIONS, "--retry-skipped", "--quality", 50)
    assert result.exit_code == 2
    assert "quality 95 → 50" in result.output
    for path in (damaged / "train").rglob("*.png"):
        if path.name != "trainblobs3.png":
            drawn("stripes", path.name, 60, 50).save(path)
    result = build(damaged, root, *OPTIONS, "--retry-skipped")
    assert result.exit_code == 2
    assert "RAW gives other samples" in result.output or "nothing was changed" in result.output
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
def test_a_kill_while_files_are_put_into_place_is_mended_by_the_same_command(damaged: Path, tmp_path: Path, after: int):
    root = tmp_path / "dataset"
    assert build(damaged, root, *OPTIONS).exit_code == 0
    mend(damaged, "train/blobs/trainblobs3.png", "val/blobs/valblobs2.png")
    words = [sys.executable, "-c", KILLED, after, damaged, root, *OPTIONS, "--retry-skipped"]
    killed = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, cwd=ROOT)
    assert killed.returncode == 9, killed.stderr
    assert (root / ".retry").exists()
    assert "--retry-skipped was killed" in verify(root, "--quick").output
    result = build(damaged, root, *OPTIONS, "--retry-skipped")
    assert result.exit_code == 0, result.output
    assert build(damaged, tmp_path / "fresh", *OPTIONS).exit_code == 0
    assert digests(root) == digests(tmp_path / "fresh")
    assert not os.path.exists(root / ".retry")

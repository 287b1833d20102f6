"""Long proofs, run by `make slow`: a network that learns real photographs, and CIFAR-10 at the full size."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT, build
from pipeline import manifest

pytestmark = pytest.mark.slow


def run(*words: object) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)


def test_tiny_learns_photographs(shared: Path, tmp_path: Path):
    """Ten classes of clothing; guessing gives 90 %, the bound is 70 %."""
    data, out = tmp_path / "data", tmp_path / "run"
    run("tools/build_shards.py", shared / "clothing10", data, "--samples-per-shard", 256)
    run("-m", "trainer", "train", "--data", data, "--recipe", "tiny", "--out", out, "--devices", "cpu,cpu")
    run("-m", "trainer", "evaluate", "--data", data, "--checkpoint", out, "--devices", "cpu,cpu")
    found = json.loads((out / "evaluation.json").read_text())
    assert found["centre"]["samples"] == found["ten"]["samples"] == 290
    assert found["centre"]["top1_error"] <= 70
    assert found["ten"]["top1_error"] <= 70


def test_cifar10_at_256_pixels(shared: Path, tmp_path: Path):
    with zipfile.ZipFile(shared / "cifar10.zip") as archive:
        archive.extractall(tmp_path / "raw")
    result = build(tmp_path / "raw", tmp_path / "out")
    assert result.exit_code == 0, result.output
    splits = manifest.load(tmp_path / "out").splits
    assert sum(split.samples for split in splits.values()) == 60_000
    assert splits["test"].samples == 10_000
    assert sum(split.skipped for split in splits.values()) == 0

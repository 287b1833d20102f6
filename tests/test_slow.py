"""Long proofs, run by `make slow`: a network that learns real photographs, and CIFAR-10 at the full size."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT, build
from pipeline import manifest
from trainer.metrics import read

pytestmark = pytest.mark.slow


def run(*words: object) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)


@pytest.mark.parametrize(("recipe", "bound"), [("tiny", 60), ("quarter", 36)])
def test_photographs_are_learned(
    recipe: str, bound: int, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ten classes of clothing, of which guessing has 90 % wrong; `quarter` takes a quarter of an hour."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    data, out = tmp_path / "data", tmp_path / "run"
    run("tools/build_shards.py", shared / "clothing10", data, "--samples-per-shard", 256)
    run("-m", "trainer", "train", "--data", data, "--recipe", recipe, "--out", out, "--devices", "cpu,cpu")
    run("-m", "trainer", "evaluate", "--data", data, "--checkpoint", out, "--devices", "cpu,cpu")
    found = json.loads((out / "evaluation.json").read_text())
    assert found["centre"]["samples"] == found["ten"]["samples"] == 290
    assert found["centre"]["top1_error"] < bound
    assert found["ten"]["top1_error"] < bound


def test_cifar10_at_256_pixels(shared: Path, tmp_path: Path):
    with zipfile.ZipFile(shared / "cifar10.zip") as archive:
        archive.extractall(tmp_path / "raw")
    result = build(tmp_path / "raw", tmp_path / "out")
    assert result.exit_code == 0, result.output
    splits = manifest.load(tmp_path / "out").splits
    assert sum(split.samples for split in splits.values()) == 60_000
    assert splits["test"].samples == 10_000
    assert sum(split.skipped for split in splits.values()) == 0


def test_a_cifar10_network_learns(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Unshared layers and all, two epochs of 350: guessing has 90 % wrong."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with zipfile.ZipFile(shared / "cifar10.zip") as archive:
        archive.extractall(tmp_path / "raw")
    data, out = tmp_path / "data", tmp_path / "run"
    how = ("--size", 32, "--subsampling", "4:4:4", "--quality", 100, "--holdout", 0.2)
    run("tools/build_shards.py", tmp_path / "raw", data, *how)
    short = ("--set", "train.steps=640", "--set", "train.validate_every=640", "--set", "train.checkpoint_every=640")
    run("-m", "trainer", "train", "--data", data, "--recipe", "cifar-11", "--out", out, "--devices", "cpu", *short)
    (found,) = (line for line in read(out) if line["kind"] == "validation")
    assert found["top1_error"] < 65

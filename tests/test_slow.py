"""Long proofs, run by `make slow`: networks that learn real photographs and CIFAR-10."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT
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
    evaluation = json.loads((out / "evaluation.json").read_text())
    for views in ("centre", "ten"):
        assert evaluation[views]["samples"] == 290
        assert evaluation[views]["top1_error"] < bound


def test_a_cifar10_network_learns(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Unshared layers and all, two epochs of 350: guessing has 90 % wrong."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with zipfile.ZipFile(shared / "cifar10.zip") as archive:
        archive.extractall(tmp_path / "raw")
    data, out = tmp_path / "data", tmp_path / "run"
    options = ("--size", 32, "--subsampling", "4:4:4", "--quality", 100, "--holdout", 0.2)
    run("tools/build_shards.py", tmp_path / "raw", data, *options)
    short = ("--set", "train.steps=640", "--set", "train.validate_every=640", "--set", "train.checkpoint_every=640")
    run("-m", "trainer", "train", "--data", data, "--recipe", "cifar-11", "--out", out, "--devices", "cpu", *short)
    (validation,) = (line for line in read(out) if line["kind"] == "validation")
    assert validation["top1_error"] < 65

"""What a user can get wrong with a run, by its commands: one clear line, and nothing lost."""

import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import CLASSES, build
from runs import assert_same_end, one_line, options, resume, start, train, trainer
from trainer import checkpoint as checkpoints
from trainer.metrics import read
from trainer.run import _locked as claimed


def test_data_that_lacks_something_is_refused_before_anything_is_written(raw: Path, dataset: Path, tmp_path: Path):
    data = tmp_path / "data"
    for lost in ("statistics.npz", "dataset.json", "train/samples.npy"):
        shutil.copytree(dataset, data)
        (data / lost).unlink()
        one_line(train(data, tmp_path / "run", 1), lost if lost != "dataset.json" else str(data))
        assert not (tmp_path / "run").exists()
        shutil.rmtree(data)
    assert build(raw, tmp_path / "whole", "--workers", 1, "--crop", "none").exit_code == 0
    one_line(train(tmp_path / "whole", tmp_path / "run", 1), "--crop none")
    assert build(raw, tmp_path / "small", "--workers", 1, "--size", 64).exit_code == 0
    one_line(train(tmp_path / "small", tmp_path / "run", 1), "images of 64 pixels", "224")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_is_one_processs_and_holds_nothing_else(dataset: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.write_text("a file")
    one_line(train(dataset, run, 1), "is a file")
    one_line(resume(dataset, run), "is a file; name the run directory")
    run.unlink()
    run.mkdir()
    (run / "thesis.txt").write_text("mine")
    one_line(train(dataset, run, 1), "is not a run directory (it has thesis.txt)")
    (run / "thesis.txt").unlink()
    (run / "recipe.json.0a1b.tmp").write_text("{")  # as a kill in the first second leaves it
    (run / "tensorboard").mkdir()
    with claimed(run):
        one_line(train(dataset, run, 1), "another process trains there")
    assert train(dataset, run, 1).exit_code == 0
    assert not list(run.glob("*.tmp"))
    for file in checkpoints.files(run):
        file.unlink()
    before = checkpoints.best_file(run).read_bytes()
    one_line(train(dataset, run, 1), "exists already")  # of which only the best checkpoint is left
    assert checkpoints.best_file(run).read_bytes() == before


@pytest.mark.proof
def test_a_change_holds_though_the_run_is_killed_before_its_next_checkpoint(dataset: Path, tmp_path: Path):
    assert train(dataset, tmp_path / "run", 2).exit_code == 0
    rare = ("train.steps=500", "train.checkpoint_every=500", "train.validate_every=500", "optim.lr=0.003")
    words = [word for setting in rare for word in ("--set", setting)]
    going = start("--data", dataset, "--out", tmp_path / "run", "--devices", "cpu,cpu", "--resume", *words)
    end = time.monotonic() + 60
    while going.poll() is None and read(tmp_path / "run")[-1]["step"] <= 2 and time.monotonic() < end:
        time.sleep(0.01)
    going.kill()
    going.communicate()
    saved = checkpoints.load(tmp_path / "run")
    assert (saved.step, saved.recipe.optim.lr) == (2, 0.003)


@pytest.mark.proof
def test_a_listener_that_leaves_does_not_end_the_run(dataset: Path, tmp_path: Path):
    process = start(*options(dataset, tmp_path / "run", "train.steps=6"))
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert checkpoints.load(tmp_path / "run").step == 6


def test_the_page_of_any_recipe(dataset: Path, tmp_path: Path):
    """Mean aligned with the view; a first layer of another name."""
    assert train(dataset, tmp_path / "aligned", 1, 'data.mean="aligned"').exit_code == 0
    text = (
        "[model]\nsize = 32\ncolumns = 1\norder = ['only']\n[model.layers.only]\nkind = 'linear'\n[train]\nsteps = 1\n"
    )
    (tmp_path / "mine.toml").write_text(text)
    new = (
        "train",
        "--data",
        dataset,
        "--recipe",
        tmp_path / "mine.toml",
        "--out",
        tmp_path / "mine",
        "--devices",
        "cpu",
    )
    result = trainer(*new)
    assert result.exit_code == 0, result.output
    assert "only, has no kernels to look at" in (tmp_path / "mine" / "report.html").read_text()


def test_without_validation_images_a_run_ends_and_says_so(raw: Path, tmp_path: Path):
    assert build(raw / "train", tmp_path / "data", "--workers", 1, "--holdout", 0).exit_code == 0
    result = train(tmp_path / "data", tmp_path / "run", 2)
    assert result.exit_code == 0, result.output
    assert "not validated" in result.output
    plateau = train(tmp_path / "data", tmp_path / "other", 2, 'optim.schedule="plateau"')
    one_line(plateau, "plateau", "no labelled validation images")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ('train.precision="fp8"', "train.precision = 'fp8': must be one of fp32, tf32, bf16"),
        ("optim.schedule=plateau", "a text stands in quotes"),
        ("optim.lr=nan", "optim.lr"),
        ("optim.lr=inf", "optim.lr"),
        ("optim.lr=-1", "optim.lr = -1.0: must be a number above 0"),
        ("model.order=[]", "model.order"),
        ("model.layers.conv2.kernel=99", "model.layers.conv2.kernel = 99: must be at most"),
        ("model.layers.conv2.width=7", "model.layers.conv2.width = 7"),
        ("model.layers.fc8.width=10", "model.layers.fc8.width"),
        ("model.layers.conv2.widht=8", "unknown key model.layers.conv2.widht; known: model.layers.conv2.kind"),
        ('data.lighting="on"', "data.lighting = 'on': must be one of code, paper, off"),
        ("train.keep=0", "train.keep = 0: must be between 1 and"),
        ("optim", "not of the form section.key=value"),
    ],
)
def test_impossible_settings(setting: str, words: str, dataset: Path, tmp_path: Path):
    one_line(train(dataset, tmp_path / "run", 1, setting), words)
    assert not (tmp_path / "run").exists()


def test_recipes_that_are_not_there(dataset: Path, tmp_path: Path):
    new = ("train", "--data", dataset, "--out", tmp_path / "run", "--devices", "cpu,cpu", "--recipe")
    one_line(trainer(*new, "huge"), "huge: no such recipe; there are automatic,", "original", "tiny")
    (tmp_path / "mine.toml").write_text("base = 'tiny'\n[modle]\n")
    one_line(trainer(*new, tmp_path / "mine.toml"), "mine.toml: unknown key modle; known: model, optim, data, train")
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    one_line(trainer(*new, tmp_path / "mine.toml"), "mine.toml: not TOML")


def test_a_corrupt_newest_checkpoint_is_named_and_an_older_one_serves(dataset: Path, tmp_path: Path):
    every = ("train.checkpoint_every=2",)
    assert train(dataset, tmp_path / "whole", 6, *every).exit_code == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    newest = checkpoints.files(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    one_line(resume(dataset, tmp_path / "run"), newest.name, "delete it to use step-00000004.safetensors")
    newest.unlink()
    assert resume(dataset, tmp_path / "run").exit_code == 0
    assert_same_end(tmp_path / "whole", tmp_path / "run")


@pytest.mark.proof
def test_a_disk_that_is_full_at_a_checkpoint_loses_nothing(dataset: Path, tmp_path: Path):
    """A file system with room for three checkpoints of 114 kB, and not for a fourth."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=440k", "penstock", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        habits = ("train.checkpoint_every=3", "train.keep=9", "train.steps=12", "train.validate_every=100")
        process = start(*options(dataset, small / "run", *habits))
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 2, said
        last = said.strip().splitlines()[-1]
        assert "No space left on device" in last
        assert "Traceback" not in said
        kept = checkpoints.load(small / "run").step
        assert kept > 0
        assert f"the checkpoint of step {kept} stays" in last
        shutil.copytree(small / "run", tmp_path / "moved")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert resume(dataset, tmp_path / "moved").exit_code == 0
    assert train(dataset, tmp_path / "whole", 12, *habits).exit_code == 0
    assert_same_end(tmp_path / "whole", tmp_path / "moved")


def test_a_network_of_other_classes_is_not_resumed(raw: Path, dataset: Path, tmp_path: Path):
    assert train(dataset, tmp_path / "run", 1).exit_code == 0
    for name in CLASSES[:2]:
        shutil.copytree(raw / "train" / name, tmp_path / "raw" / name)
    assert build(tmp_path / "raw", tmp_path / "two", "--workers", 1).exit_code == 0
    told = resume(tmp_path / "two", tmp_path / "run", "train.steps=2", more=("--other-data",))
    one_line(told, "has learned 3 classes", "has 2", "--init")


def test_a_run_is_whole_without_the_page_that_a_damaged_sample_prevents(dataset: Path, tmp_path: Path):
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    record = np.load(data / "train" / "samples.npy")[5]
    shard = data / "train" / f"train-{record['shard']:06d}.tar"
    content = bytearray(shard.read_bytes())
    content[int(record["offset"]) + int(record["size"]) // 2] ^= 255
    shard.write_bytes(content)
    result = train(data, tmp_path / "run", 1, "data.max_bad=1", page=True)
    assert result.exit_code == 0, result.output
    assert f"no page: {shard}: damaged at sample 5 " in result.output
    assert checkpoints.load(tmp_path / "run").step == 1

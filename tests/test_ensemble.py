"""`python -m trainer ensemble` against plain numpy and scipy: means, fitted weights, submissions, refusals."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.optimize import minimize

from conftest import build, picture
from networks import drawn
from pipeline import manifest
from pipeline.online import Loader
from runs import one_line, trainer
from tars import tar_bytes
from tools.make_raw import main as make_raw
from trainer import checkpoint as checkpoints
from trainer import probabilities
from trainer import recipe as recipes
from trainer.checkpoint import Checkpoint
from trainer.ensemble import fitted_weights
from trainer.model import Grouped
from trainer.probabilities import Origin

WIDTHS = {"conv1": 4, "conv2": 4, "conv3": 4, "conv4": 4, "conv5": 4, "fc6": 8, "fc7": 8}
RECIPE = recipes.load("original", [f"model.layers.{name}.width={width}" for name, width in WIDTHS.items()])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ILSVRC2012 of six classes with their devkit ids: 12 training, 12 validation and 5 unlabelled test pictures."""
    folder = tmp_path_factory.mktemp("ilsvrc")
    made = CliRunner().invoke(make_raw, [str(folder / "raw"), "--classes", "6", "--train", "2", "--val", "2"])
    assert made.exit_code == 0, made.output
    members = []
    for i in range(1, 6):
        picture(f"test{i}", 300, 280).save(folder / "test.jpg")
        members.append((f"ILSVRC2012_test_{i:08d}.JPEG", (folder / "test.jpg").read_bytes()))
    (folder / "raw" / "ILSVRC2012_img_test_v10102019.tar").write_bytes(tar_bytes(members))
    done = build(folder / "raw", folder / "data", "--workers", 1, "--allow-incomplete")
    assert done.exit_code == 0, done.output
    return folder / "data"


@pytest.fixture(scope="module")
def networks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs of one checkpoint each, with different weights, unsure enough to err differently."""
    dataset, runs = manifest.load(data), []
    classes = tuple(record.wnid for record in dataset.classes)
    for seed in range(3):
        torch.manual_seed(seed)
        weights = drawn(RECIPE.model, len(classes), torch.float32)
        weights["fc8.weight"] = torch.randn(weights["fc8.weight"].shape) * 0.02
        weights["fc8.bias"] *= 0
        velocity = {name: torch.zeros_like(value) for name, value in weights.items()}
        run = tmp_path_factory.mktemp("runs") / f"run-{seed}"
        checkpoints.save(run, Checkpoint(7, RECIPE, classes, dataset.identity, weights, velocity, {}, {"steps": 7}, ()))
        runs.append(run)
    return runs


def chances(run: Path, data: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels and the ten views' mean probabilities, by a grouped network and numpy."""
    checkpoint = checkpoints.load(run)
    network = Grouped(RECIPE.model, len(checkpoint.classes))
    network.load(checkpoint.weights)
    labels, found = [], []
    with Loader(data, split, batch_size=4, views="ten") as loader, torch.no_grad():
        for batch in loader:
            logits = network(batch.images.flatten(0, 1)).double().numpy()
            odds = np.exp(logits - logits.max(1, keepdims=True))
            found.append((odds / odds.sum(1, keepdims=True)).reshape(len(batch.ids), 10, -1).mean(1))
            labels.append(batch.labels.numpy())
    return np.concatenate(labels), np.concatenate(found)


def ensemble(*words: object) -> dict:
    result = trainer("ensemble", *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def save(
    path: Path,
    dataset: str = "0",
    split: str = "val",
    classes: str = "abc",
    labels: tuple = (0, 1),
    views: str = "ten",
) -> Path:
    origin = Origin(dataset * 64, split, views, ("a run",), tuple(classes))
    n = len(labels)
    probabilities.save(path, origin, n, lambda add: add(np.array(labels), np.full((n, 3), 1 / 3)))
    return path


def wrong(labels: np.ndarray, values: np.ndarray, k: int) -> float:
    """In percent; of values without ties."""
    return 100 * float(np.mean([label not in np.argsort(row)[-k:] for label, row in zip(labels, values)]))


def assert_errors(found: dict, labels: np.ndarray, values: np.ndarray) -> None:
    assert found["samples"] == len(labels)
    assert found["top1_error"] == pytest.approx(wrong(labels, values, 1))
    assert found["top5_error"] == pytest.approx(wrong(labels, values, 5))
    assert found["nll"] == pytest.approx(-np.log(values[np.arange(len(labels)), labels]).mean(), abs=1e-6)


def test_equal_weights(networks: list[Path], data: Path):
    found = ensemble(*networks, "--data", data)
    each = [chances(run, data, "val") for run in networks]
    for network, (labels, values) in zip(found["networks"], each):
        assert network["weight"] == pytest.approx(1 / 3)
        assert_errors(network["errors"], labels, values)
    labels = each[0][0]
    assert_errors(found["together"], labels, sum(values for _, values in each) / 3)
    assert len({network["errors"]["nll"] for network in found["networks"]}) == 3


def test_given_weights_and_saved_probabilities(networks: list[Path], data: Path, tmp_path: Path):
    files = []
    for i, run in enumerate(networks[:2]):
        files.append(tmp_path / f"{i}.npz")
        done = trainer("evaluate", "--data", data, "--checkpoint", run, "--save-probabilities", files[-1])
        assert done.exit_code == 0, done.output
    labels, first = chances(networks[0], data, "val")
    second = chances(networks[1], data, "val")[1]
    found = ensemble(*files, "--weights", "3,1", "--save-probabilities", tmp_path / "both.npz")
    assert [network["weight"] for network in found["networks"]] == [0.75, 0.25]
    assert_errors(found["together"], labels, 0.75 * first + 0.25 * second)
    saved = probabilities.load(tmp_path / "both.npz")
    np.testing.assert_allclose(saved.values, 0.75 * first + 0.25 * second, atol=1e-6)
    assert saved.labels.tolist() == labels.tolist()
    mixed = ensemble(files[0], networks[1], "--data", data, "--weights", "0.75,0.25")
    assert mixed["together"]["nll"] == pytest.approx(found["together"]["nll"], abs=1e-9)


def test_fitted_weights_are_the_likeliest(networks: list[Path], data: Path):
    each = [chances(run, data, "train") for run in networks]
    true = np.stack([values[np.arange(len(labels)), labels] for labels, values in each])

    def nll(weights: np.ndarray) -> float:
        return -float(np.log(weights @ true).mean())

    sum_to_1 = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
    best = minimize(nll, np.full(3, 1 / 3), bounds=[(0, 1)] * 3, constraints=sum_to_1, tol=1e-12)
    found = ensemble(*networks, "--data", data, "--fit", "train")
    weights = np.array([network["weight"] for network in found["networks"]])
    assert weights.sum() == pytest.approx(1)
    assert nll(weights) <= best.fun + 1e-7
    assert nll(weights) < nll(np.full(3, 1 / 3))
    labels = chances(networks[0], data, "val")[0]
    mean = sum(weight * chances(run, data, "val")[1] for weight, run in zip(weights, networks))
    assert_errors(found["together"], labels, mean)
    itself = ensemble(*networks, "--data", data, "--fit", "train", "--split", "train")
    assert itself["together"]["nll"] == pytest.approx(nll(weights), abs=1e-6)


def test_fitting_knows_the_answer_of_drawn_mixtures():
    generator = np.random.default_rng(4)
    true = generator.uniform(0.05, 1, (4, 3000))
    grid = np.linspace(0, 1, 101)
    two = fitted_weights(true[:2])
    best = max(grid, key=lambda weight: np.log(weight * true[0] + (1 - weight) * true[1]).sum())
    assert two[0] == pytest.approx(best, abs=0.01)
    assert fitted_weights(np.stack([true[0], true[0] / 2])).tolist() == pytest.approx([1, 0], abs=1e-3)
    assert fitted_weights(true[:1]).tolist() == [1]
    assert np.isfinite(fitted_weights(np.zeros((2, 5)))).all()


def test_submission_of_a_split_without_labels(networks: list[Path], data: Path, tmp_path: Path):
    out, saved = tmp_path / "test.txt", tmp_path / "test.npz"
    more = ("--split", "test", "--submission", out, "--save-probabilities", saved)
    found = ensemble(*networks, "--data", data, *more)
    assert found["together"] is None
    assert found["samples"] == 5
    labels, _ = chances(networks[0], data, "test")
    assert labels.tolist() == [-1] * 5
    mean = sum(chances(run, data, "test")[1] for run in networks) / 3
    devkit = [record.devkit_id for record in manifest.load(data).classes]
    lines = [[int(word) for word in line.split()] for line in out.read_text().splitlines()]
    assert lines == [[devkit[label] for label in np.argsort(-row)[:5]] for row in mean]
    assert all(1 <= number <= 6 for line in lines for number in line)
    said = trainer("ensemble", saved, "--split", "test")
    assert "no errors" in said.output
    one_line(trainer("ensemble", *networks, "--data", data, "--fit", "test"), "without a label", "fit on one")


def test_what_a_person_sees(networks: list[Path], data: Path):
    result = trainer("ensemble", *networks[:2], "--data", data, "--fit", "val")
    assert result.exit_code == 0, result.output
    for word in ("val, 12 images", "together", "top-1 error", "itself"):
        assert word in result.output


def test_names_of_any_length_and_letters_leave_the_numbers_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    long, strange = save(tmp_path / f"{'a' * 60}.npz"), save(tmp_path / "[red]\udcff\x1b[31m.npz")
    result = trainer("ensemble", long, strange)
    assert result.exit_code == 0, result.output
    numbers = "0.500       66.7 %        0.0 %         -1.0986"
    lines = result.output.splitlines()
    assert [line.strip() for line in lines[1:3]] == [
        f"{numbers}   {long}",
        f"{numbers}   {tmp_path}/[red]\\udcff\\x1b[31m.npz",
    ]
    assert lines[3].split() == ["66.7", "%", "0.0", "%", "-1.0986", "together"]


def test_what_a_mean_of_different_views_says_of_itself(tmp_path: Path):
    files = [save(tmp_path / f"{i}.npz", views=views) for i, views in enumerate(("centre", "ten", "centre"))]
    ensemble(*files, "--save-probabilities", tmp_path / "mean.npz")
    assert probabilities.load(tmp_path / "mean.npz").origin.views == "centre, ten"


def test_a_full_disk_does_not_keep_the_errors_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    file = save(tmp_path / "a.npz")
    monkeypatch.setattr("trainer.probabilities.save", full)
    result = trainer("ensemble", file, "--save-probabilities", tmp_path / "mean.npz")
    assert result.exit_code == 2
    assert result.stdout.splitlines()[-1].endswith("together")
    assert result.stderr == f"Error: {tmp_path}/mean.npz: No space left on device\n"


def test_what_will_be_refused_is_refused_before_anything_is_computed(
    networks: list[Path], data: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("trainer.ensemble.predictions", never)
    run, more = networks[0], ("--data", data, "--devices", "cpu,cpu")
    one_line(trainer("ensemble", run, *more, "--split", "tset", "--fit", "train"), "no split named 'tset'")
    one_line(trainer("ensemble", run, *more, "--fit", "test"), "'test' has images without a label", "fit on one")
    one_line(trainer("ensemble", run, *more, "--devices", "cpu"), "two columns")
    (tmp_path / "file").write_bytes(b"")
    for option, name in (("--submission", "out.txt"), ("--save-probabilities", "out.npz")):
        one_line(trainer("ensemble", run, *more, option, tmp_path / "file" / name), "file is a file, not a directory")
    one_line(trainer("ensemble", run, *more, "--split", "train", "--submission", tmp_path / "x.txt"), "is shuffled")
    checkpoint = checkpoints.load(run)
    names = tuple(record.wnid for record in manifest.load(small).classes)
    weights = drawn(RECIPE.model, len(names), torch.float32)
    other = Checkpoint(7, RECIPE, names, checkpoint.dataset, weights, weights, {}, {}, ())
    checkpoints.save(tmp_path / "run", other)
    one_line(trainer("ensemble", tmp_path / "run", "--data", small), "images of 32 pixels, and the network sees 224")


def test_refusals(networks: list[Path], data: Path, dataset: Path, tmp_path: Path):
    first, second = networks[:2]
    one_line(trainer("ensemble", first, second), "--data")
    one_line(trainer("ensemble", first, tmp_path, "--data", data), "no checkpoint")
    one_line(trainer("ensemble", first, "--data", dataset), "network of 6 classes", "3 others")
    one_line(trainer("ensemble", first, "--data", data, "--split", "other"), "no split named 'other'")
    one_line(trainer("ensemble", first, second, "--data", data, "--weights", "1"), "1 numbers for 2 networks")
    for weights in ("1,x", "-1,2", "0,0", "nan,1", "inf,1"):
        one_line(trainer("ensemble", first, second, "--data", data, "--weights", weights), f"--weights {weights}")
    one_line(trainer("ensemble", first, "--data", data, "--weights", "1", "--fit", "val"), "one of the two")
    one_line(trainer("ensemble", first, "--submission", "x.txt"), "--data")

    a = save(tmp_path / "a.npz")
    one_line(trainer("ensemble", a, save(tmp_path / "b.npz", classes="abd")), "label 2 is d, there c")
    one_line(trainer("ensemble", a, save(tmp_path / "b.npz", split="train")), "split 'train', not of 'val'")
    other = save(tmp_path / "b.npz", dataset="1")
    one_line(trainer("ensemble", a, other), "data set 111111111111, not of 000000000000")
    other = save(tmp_path / "b.npz", labels=(1, 1))
    for fit in ((), ("--fit", "val")):
        one_line(trainer("ensemble", a, other, *fit), "b.npz: has other labels than", "a.npz")
    one_line(trainer("ensemble", a, save(tmp_path / "b.npz", labels=(0, 1, 2)), "--fit", "val"), "other labels")
    (tmp_path / "folder.npz").mkdir()
    one_line(trainer("ensemble", a, "--save-probabilities", tmp_path / "folder.npz"), "folder.npz: is a directory")
    a.write_bytes(a.read_bytes()[:200])
    one_line(trainer("ensemble", a), "not saved probabilities, or damaged", "a.npz")


def test_a_submission_needs_devkit_ids_and_every_image(networks: list[Path], data: Path, dataset: Path, tmp_path: Path):
    from stored import remake

    root = Path(shutil.copytree(data, tmp_path / "data"))
    remake(root, lambda body: body["splits"]["test"].update(skipped=1))
    more = ("--split", "test", "--submission", tmp_path / "out.txt")
    one_line(trainer("ensemble", networks[0], "--data", root, *more), "not whole", "1 of its images were skipped")
    remake(root, lambda body: [body["splits"]["test"].update(skipped=0), body["recipe"].update(limit=5)])
    one_line(trainer("ensemble", networks[0], "--data", root, *more), "not whole", "--limit 5")
    remake(root, lambda body: [record.update(devkit_id=None) for record in body["classes"]])
    one_line(trainer("ensemble", networks[0], "--data", root, *more), "no devkit ids")
    assert not (tmp_path / "out.txt").exists()

"""What a run takes over and notes: changed hyper-parameters, other data, the layers of another network, plateaus."""

import json
from pathlib import Path

import pytest
import torch

from conftest import CLASSES, build
from pipeline import manifest
from runs import one_line, resume, train, trainer
from trainer import checkpoint as checkpoints
from trainer import recipe as recipes
from trainer.metrics import read
from trainer.model import initial_weights


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(dataset, folder, 4).exit_code == 0
    return folder


def rates(run: Path) -> list[float]:
    return [line["lr"] for line in read(run) if line["kind"] == "train"]


def test_a_changed_rate_holds_from_the_resumed_step_and_is_noted(dataset: Path, tmp_path: Path):
    assert train(dataset, tmp_path / "run", 2, "optim.lr_steps=1").exit_code == 0
    result = resume(dataset, tmp_path / "run", "train.steps=5", "optim.lr=0.001", "optim.layers.conv1.lr=0.5")
    assert result.exit_code == 0, result.output
    assert rates(tmp_path / "run") == [0.01, 0.01, 0.001, 0.001, 0.001]
    assert "from step 2: optim.lr 0.01 → 0.001" in result.output
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert [entry["step"] for entry in history] == [0, 2]
    assert history[0]["changed"] == {}
    assert history[1]["changed"]["optim.lr"] == [0.01, 0.001]
    assert history[1]["changed"]["train.steps"] == [2, 5]
    assert history[1]["changed"]["optim.layers.conv1.lr"] == [1.0, 0.5]
    saved = checkpoints.load(tmp_path / "run")
    assert list(saved.history) == history
    assert saved.recipe.optim.lr == 0.001


def test_another_number_of_threads_is_said(dataset: Path, tmp_path: Path):
    assert train(dataset, tmp_path / "run", 1).exit_code == 0
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        result = resume(dataset, tmp_path / "run", "train.steps=2")
    finally:
        torch.set_num_threads(before)
    assert f"threads {before} → {before + 1}: the last bits of the weights may differ" in result.output


def test_other_data_is_refused_unless_told(run: Path, raw: Path, dataset: Path, tmp_path: Path):
    assert train(dataset, tmp_path / "run", 2).exit_code == 0
    assert build(raw, tmp_path / "other", "--workers", 1, "--seed", 7).exit_code == 0
    one_line(resume(tmp_path / "other", tmp_path / "run", "train.steps=3"), "trained on the data set", "--other-data")
    told = resume(tmp_path / "other", tmp_path / "run", "train.steps=3", more=("--other-data",))
    assert told.exit_code == 0, told.output
    identity = manifest.load(tmp_path / "other").identity
    assert f"→ {identity}" in told.output
    assert (checkpoints.load(tmp_path / "run").step, checkpoints.load(tmp_path / "run").dataset) == (3, identity)


def test_fine_tuning_takes_over_the_layers_that_fit(run: Path, dataset: Path, tmp_path: Path):
    """At a rate of next to nothing, weights stay as they began: some as in the other run, some as drawn."""
    still = ("optim.lr=1e-30", "optim.bias_lr=1e-30", "model.layers.fc7.width=16", "train.seed=5")
    assert train(dataset, tmp_path / "all", 1, *still).exit_code == 0
    for name, more in (("fit", ()), ("named", ("--init-layers", "conv1,fc6"))):
        words = ["--data", dataset, "--recipe", "tiny", "--out", tmp_path / name, "--devices", "cpu,cpu", "--init", run]
        recipe = json.loads((tmp_path / "all" / "recipe.json").read_text())
        settings = recipes.difference(recipes.load("tiny"), recipes.from_dict(recipe, recipes.Recipe(), ""))
        for key, (_, value) in settings.items():
            words += ["--set", recipes.as_setting(key, value)]
        result = trainer("train", *words, *more)
        assert result.exit_code == 0, result.output
    source, drawn = checkpoints.load(run).weights, checkpoints.load(tmp_path / "all").weights
    taken = {"fit": {"conv1", "conv2", "conv3", "conv4", "conv5", "fc6"}, "named": {"conv1", "fc6"}}
    for name, layers in taken.items():
        found = checkpoints.load(tmp_path / name)
        for key, value in found.weights.items():
            expected = source[key] if key.partition(".")[0] in layers else drawn[key]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-12, msg=f"{name}: {key}")
        assert found.history[0]["init"]["step"] == 4
        assert all(not v.any() or v.abs().max() < 1e-20 for v in found.velocity.values())


def test_what_cannot_be_taken_over_is_named(run: Path, dataset: Path, tmp_path: Path):
    new = ("train", "--data", dataset, "--recipe", "tiny", "--out", tmp_path / "r", "--devices", "cpu,cpu")
    one_line(trainer(*new, "--init", run), "no layer of that network has the name and shape")
    one_line(trainer(*new, "--init", run, "--init-layers", "conv1"), "--init-layers conv1", "shape")
    one_line(trainer(*new, "--init", run, "--init-layers", "conv9"), "--init-layers conv9", "not in both")
    one_line(trainer(*new, "--init-layers", "conv1"), "--init CHECKPOINT")
    one_line(trainer(*new, "--init", tmp_path), "no checkpoint")
    one_line(trainer(*new, "--other-data"), "--resume")
    assert not (tmp_path / "r").exists()


def test_the_classes_must_be_those_that_the_recipe_is_meant_for(dataset: Path, tmp_path: Path):
    result = train(dataset, tmp_path / "r", 1, "model.classes=10184")
    one_line(result, f"has {len(CLASSES)} classes", "10,184", "model.classes")
    assert not (tmp_path / "r").exists()


def test_a_plateau_lowers_the_rates_and_at_last_ends_the_run(dataset: Path, tmp_path: Path):
    """With a rate of next to nothing the error stays: the first validation is the best, every other one a plateau."""
    plateau = ('optim.schedule="plateau"', "optim.lr=1e-20", "optim.patience=2", "optim.most_drops=2")
    habits = ("optim.bias_lr=1e-20", "train.validate_every=1", "train.checkpoint_every=2")
    result = train(dataset, tmp_path / "run", 20, *plateau, *habits)
    assert result.exit_code == 0, result.output
    assert rates(tmp_path / "run") == pytest.approx([1e-20] * 3 + [1e-21] * 2 + [1e-22] * 2, rel=1e-9)
    assert result.output.count("a plateau: the learning rate falls") == 2
    assert checkpoints.load(tmp_path / "run").step == 7
    one_line(resume(dataset, tmp_path / "run"), "last plateau")
    for late in checkpoints.files(tmp_path / "run")[1:]:
        late.unlink()
    assert checkpoints.load(tmp_path / "run").step == 4  # in the middle of a plateau: what it knows is saved too
    assert resume(dataset, tmp_path / "run").exit_code == 0
    assert rates(tmp_path / "run") == pytest.approx([1e-20] * 3 + [1e-21] * 2 + [1e-22] * 2, rel=1e-9)


def test_the_best_checkpoint_stays(dataset: Path, tmp_path: Path):
    habits = ("train.validate_every=1", "train.checkpoint_every=1", "train.keep=1")
    assert train(dataset, tmp_path / "run", 6, *habits).exit_code == 0
    errors = {line["step"]: line["top1_error"] for line in read(tmp_path / "run") if line["kind"] == "validation"}
    first = min(errors, key=lambda step: (errors[step], step))
    assert checkpoints.load(checkpoints.best_file(tmp_path / "run")).step == first
    assert [checkpoints.load(file).step for file in checkpoints.files(tmp_path / "run")] == [6]


def test_layers_are_reported_as_the_original_did(run: Path):
    """Mean |w| at the start is 0.8 of its deviation (that of a normal)."""
    line = read(run)[0]
    recipe = checkpoints.load(run).recipe
    drawn = initial_weights(recipe.model, len(CLASSES), recipe.train.seed)
    for name, found in line["layers"].items():
        first = float(drawn[f"{name}.weight"].abs().mean())
        assert found["weight"] == pytest.approx(first, rel=0.2), name
        assert found["ratio"] == pytest.approx(found["update"] / found["weight"])
        assert found["update"] > 0

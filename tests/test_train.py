"""Whole runs through the command line: learning, exact resume, changes on resume, fine-tuning, plateaus, divergence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import CLASSES, build, picture
from pipeline import manifest
from pipeline.online import Loader
from runs import assert_same_end, of_november_2026, one_line, resume, train
from trainer import checkpoint as checkpoints
from trainer import data as loaders
from trainer import recipe as recipes
from trainer.dropout import masks
from trainer.metrics import read
from trainer.model import Grouped, initial_weights
from trainer.train import train_step
from workers import started, without_shards


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps; the schedule is that of 6 steps. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    result = train(dataset, folder, 6, page=True)
    assert result.exit_code == 0, result.output
    return folder


def rates(run: Path) -> list[float]:
    return [line["lr"] for line in read(run) if line["kind"] == "train"]


def test_a_run_leaves_recipe_metrics_and_checkpoint(run: Path, dataset: Path):
    assert json.loads((run / "recipe.json").read_text())["train"]["steps"] == 6
    lines = read(run)
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in trained] == [0, 0, 0, 0, 1, 1]  # 41 samples in batches of 12: 4 steps
    for line in trained:
        assert np.isfinite(line["loss"])
        assert 0 <= line["time"]["stall"] <= 1
        assert sorted(line["time"]["stall_by"]) == ["decoding", "reading", "transfer", "workers"]
        assert sum(line["time"]["stall_by"].values()) == pytest.approx(line["time"]["stall"])
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [3, 6]
    assert (run / "report.html").stat().st_size > 10_000
    assert list((run / "tensorboard").glob("*tfevents*"))
    saved = checkpoints.load(run)
    assert (saved.step, saved.classes, saved.dataset) == (6, CLASSES, manifest.load(dataset).identity)


def test_the_first_line_is_that_of_a_plain_grouped_network(run: Path, dataset: Path):
    """The loss; and the weights of each layer, which are hardly changed yet."""
    recipe, line = checkpoints.load(run).recipe, read(run)[0]
    network, weights = Grouped(recipe.model, 3), initial_weights(recipe.model, 3, recipe.train.seed)
    network.load(weights)
    with Loader(dataset, "train", batch_size=12, seed=recipe.train.seed) as loader:
        batch = next(loader)
    drop = masks(recipe.train.seed, 0, 12, {"fc6": 32, "fc7": 32}, 0.5)
    odds = np.exp(network(batch.images, drop).detach().double().numpy())
    expected = -np.log(odds[np.arange(12), batch.labels.numpy()] / odds.sum(1)).mean()
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert line["top1_error"] == pytest.approx(100 * (odds.argmax(1) != batch.labels.numpy()).mean())
    for name, layer in line["layers"].items():
        assert layer["weight"] == pytest.approx(float(weights[f"{name}.weight"].abs().mean()), rel=0.2), name
        assert layer["ratio"] == pytest.approx(layer["update"] / layer["weight"]) != 0, name


def test_a_resumed_run_ends_with_the_same_bytes(dataset: Path, tmp_path: Path):
    """Lost after 3 of 8 steps, between log lines; an epoch's end, drops of the rate and lighting's end are to come.

    It goes on from a checkpoint as earlier code wrote it.
    """
    every = ("train.checkpoint_every=3", "train.log_every=2", "data.lighting_until=45")
    assert train(dataset, tmp_path / "whole", 8, *every).exit_code == 0
    assert train(dataset, tmp_path / "parts", 8, *every).exit_code == 0
    first, *newer = checkpoints.files(tmp_path / "parts")
    assert [file.stem for file in (first, *newer)] == ["step-00000003", "step-00000006", "step-00000008"]
    newer[1].unlink()
    newer[0].write_bytes(newer[0].read_bytes()[:-100])
    one_line(resume(dataset, tmp_path / "parts"), newer[0].name, f"delete it to use {first.name}")
    newer[0].unlink()
    saved = checkpoints.load(first)
    assert saved.progress.keys() == {"schedule", "window", "steps", "over", "pending"}  # the last one came later
    first.write_bytes(of_november_2026(saved))
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as lines:
        lines.write('{"kind": "tra')  # a kill in the middle of a line
    result = resume(dataset, tmp_path / "parts")
    assert result.exit_code == 0, result.output
    assert checkpoints.load(tmp_path / "whole").recipe == checkpoints.load(tmp_path / "parts").recipe
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_a_run_whose_workers_are_gone_is_saved_and_goes_on_here(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without shards until then; it ends with the bytes of a run that had no workers."""
    bare, run = without_shards(dataset, tmp_path / dataset.name), tmp_path / "run"
    assert train(dataset, tmp_path / "whole", 6).exit_code == 0
    with started(dataset.parent) as (worker,):

        def killing(*arguments: Any) -> torch.Tensor:
            if arguments[2].step == 1:
                worker.kill()
            return train_step(*arguments)

        monkeypatch.setattr("trainer.train.train_step", killing)
        result = train(bare, run, 6, more=("--feed", worker.address, "--patience", "1"))
    saved = checkpoints.load(run)
    assert 2 <= saved.step < 6
    assert saved.recipe.data.workers == (worker.address,)
    assert result.exit_code == 2
    page, line = result.stderr.splitlines()[-2:]
    later = f"draw it by: python -m trainer figures {run} --data {bare}"
    assert page == f"no page: {bare}: not all shards are here, whose pictures it shows; {later}"
    assert line.startswith(f"Error: no decoding worker has answered for 1 s: {worker.address}: ")
    remedy = "go on by --resume, with --feed for other workers, or --set 'data.workers=[]' for none"
    assert line.endswith(f"; the run is saved after step {saved.step}: {remedy}")
    one_line(resume(bare, run, "data.workers=[]"), f"{bare}/", "missing, or not a regular file", "--repair RAW")
    result = resume(dataset, run, "data.workers=[]")
    assert f"\nfrom step {saved.step}: data.workers ('{worker.address}',) → ()\n" in result.output
    history = json.loads((run / "history.json").read_text())
    assert [entry["changed"] for entry in history] == [{}, {"data.workers": [[worker.address], []]}]
    assert_same_end(tmp_path / "whole", run)


def test_doubtful_data_is_warned_of_on_stderr_and_trained_on(dataset: Path, tmp_path: Path):
    """Of a data set without doubts nothing is printed there."""
    assert train(dataset, tmp_path / "sound", 1, more=("--no-page",)).stderr == ""
    for folder, count in (("train/a", 5), ("train/b", 5), ("val/b", 2)):
        (tmp_path / "raw" / folder).mkdir(parents=True)
        for i in range(count):
            picture(f"{folder}{i}", 256, 256).save(tmp_path / "raw" / folder / f"{i}.png")
    assert build(tmp_path / "raw", tmp_path / "data", "--workers", 1).exit_code == 0
    result = train(tmp_path / "data", tmp_path / "run", 1, more=("--no-page",))
    assert result.exit_code == 0, result.output
    line = "warning: the validation split is of one class alone, b; its error tells little"
    assert result.stderr.splitlines() == [line]


def test_lighting_ends_when_the_recipe_says(dataset: Path):
    """At 45 of 90 epochs, which stretch to 8 steps: from the fifth on, batches are those without lighting."""
    recipe = recipes.load("tiny", ["train.steps=8", "train.epochs=90", "train.batch_size=12", "data.lighting_until=45"])
    plain = Loader(dataset, batch_size=12, lighting="off")
    with loaders.training(manifest.load(dataset), recipe) as ours, plain:
        same = [torch.equal(next(ours).images, next(plain).images) for _ in range(8)]
    assert same == [False] * 4 + [True] * 4


@pytest.mark.proof
def test_training_learns(dataset: Path, tmp_path: Path):
    """150 steps of 12 pictures: from guessing (ln 3 = 1.1, 67 %) to telling patterns apart.

    Seeds 1, 2, 7 and 2012 do in 120, to less than 0.03 nats. At higher rates the loss leaps, and last bits decide.
    """
    widths = {"conv1": 24, "conv2": 64, "conv3": 96, "conv4": 96, "conv5": 64, "fc6": 256, "fc7": 256}
    wide = [f"model.layers.{name}.width={width}" for name, width in widths.items()]
    settings = [*wide, "model.dropout=0.0", "optim.lr=0.002", "optim.bias_lr=0.002", "train.validate_every=150"]
    assert train(dataset, tmp_path / "run", 150, *settings).exit_code == 0
    lines = read(tmp_path / "run")
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert abs(losses[0] - np.log(3)) < 0.3
    assert np.mean(losses[-10:]) < 0.3
    assert lines[-1]["top1_error"] < 25


def test_what_is_changed_on_resume_holds_and_is_noted(
    raw: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Hyper-parameters; then the data set, only when allowed, and the number of threads."""
    run = tmp_path / "run"
    assert train(dataset, run, 2, "optim.lr_steps=1").exit_code == 0
    result = resume(dataset, run, "train.steps=5", "optim.lr=0.001", "optim.layers.conv1.lr=0.5")
    assert "from step 2: optim.lr 0.01 → 0.001" in result.output
    assert build(raw, tmp_path / "other", "--workers", 1, "--seed", 7).exit_code == 0
    one_line(resume(tmp_path / "other", run, "train.steps=6"), "trained on the data set", "--other-data")
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 1)
    result = resume(tmp_path / "other", run, "train.steps=6", more=("--other-data",))
    identities = [manifest.load(data).identity for data in (dataset, tmp_path / "other")]
    assert f"from step 5: dataset {' → '.join(identities)}: the last bits of the weights may differ" in result.output
    assert f"threads {before} → {before + 1}: the last bits of the weights may differ" in result.output
    assert f"checkpoint: {checkpoints.step_file(run, 6)}" in result.output
    assert rates(run) == [0.01, 0.01, 0.001, 0.001, 0.001, 0.001]
    history = json.loads((run / "history.json").read_text())
    assert [entry["step"] for entry in history] == [0, 2, 5]
    changes = {"optim.lr": [0.01, 0.001], "train.steps": [2, 5], "optim.layers.conv1.lr": [1.0, 0.5]}
    assert [entry["changed"] for entry in history] == [{}, changes, {"train.steps": [5, 6]}]
    saved = checkpoints.load(run)
    assert (saved.step, saved.recipe.optim.lr, saved.dataset) == (6, 0.001, identities[1])
    assert list(saved.history) == history


def test_fine_tuning_takes_over_the_layers_that_fit(run: Path, dataset: Path, tmp_path: Path):
    """At a rate of next to nothing, weights stay as they began: some as in the other run, some as drawn."""
    still = ("optim.lr=1e-30", "optim.bias_lr=1e-30", "model.layers.fc7.width=16", "train.seed=5")
    assert train(dataset, tmp_path / "all", 1, *still).exit_code == 0
    source, drawn = checkpoints.load(run).weights, checkpoints.load(tmp_path / "all").weights
    fitting = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6"]
    differing = {"fc7": "its shape differs", "fc8": "its shape differs"}
    left = dict.fromkeys(fitting[1:5], "not in --init-layers")
    for name, layers, more, new in (
        ("fit", fitting, (), differing),
        ("named", ["conv1", "fc6"], ("--init-layers", "conv1,fc6"), differing | left),
    ):
        result = train(dataset, tmp_path / name, 1, *still, more=("--init", run, *more))
        assert result.exit_code == 0, result.output
        reasons = ", ".join(f"{layer} ({reason})" for layer, reason in new.items())
        assert f"\ntaken: {', '.join(layers)}; new: {reasons}\n" in result.output
        (entry,) = json.loads((tmp_path / name / "history.json").read_text())
        assert (entry["init"]["taken"], entry["init"]["new"]) == (layers, new)
        tuned = checkpoints.load(tmp_path / name)
        for key, value in tuned.weights.items():
            expected = source[key] if key.partition(".")[0] in layers else drawn[key]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-12, msg=f"{name}: {key}")
        assert tuned.history[0]["init"]["step"] == 6
        assert all(float(v.abs().max()) < 1e-20 for v in tuned.velocity.values())


def test_a_plateau_lowers_the_rates_and_at_last_ends_the_run(dataset: Path, tmp_path: Path):
    """With a rate of next to nothing the error stays: the first validation is the best, every other one a plateau."""
    plateau = ('optim.schedule="plateau"', "optim.lr=1e-20", "optim.patience=2", "optim.most_drops=2")
    habits = ("optim.bias_lr=1e-20", "train.validate_every=1", "train.checkpoint_every=2")
    expected = pytest.approx([1e-20] * 3 + [1e-21] * 2 + [1e-22] * 2, rel=1e-9)
    result = train(dataset, tmp_path / "run", 20, *plateau, *habits)
    assert result.exit_code == 0, result.output
    assert rates(tmp_path / "run") == expected
    assert result.output.count("a plateau: the learning rate falls") == 2
    reason = "after 2 drops of the learning rate (optim.most_drops) the validation error has not improved for 2 valid"
    assert f"\nended at step 7 of 20: {reason}ations\n" in result.output
    plateaus = {line["step"]: line["plateau"] for line in read(tmp_path / "run") if "plateau" in line}
    assert plateaus == {3: "drop", 5: "drop", 7: "end"}
    assert checkpoints.load(tmp_path / "run").step == 7
    assert checkpoints.load(checkpoints.best_file(tmp_path / "run")).step == 1
    one_line(resume(dataset, tmp_path / "run"), "last plateau")
    checkpoints.files(tmp_path / "run")[-1].unlink()
    assert checkpoints.load(tmp_path / "run").step == 6  # in the middle of a plateau: what it knows is saved too
    assert resume(dataset, tmp_path / "run").exit_code == 0
    assert rates(tmp_path / "run") == expected


def test_numbers_that_are_not_finite_stop_the_run(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Within nonfinite.EVERY steps, far from any log line, validation or checkpoint."""
    steps: list[int] = []
    monkeypatch.setattr("trainer.nonfinite.EVERY", 5)
    monkeypatch.setattr("trainer.train.train_step", lambda *given: steps.append(given[2].step) or train_step(*given))
    rare = [f"train.{name}=1000" for name in ("log_every", "validate_every", "checkpoint_every")]
    assert train(dataset, tmp_path / "r", 7, *rare).exit_code == 0
    result = resume(dataset, tmp_path / "r", "train.steps=1000", "optim.lr=1e38")
    assert result.exit_code == 2
    assert "step 9: the output of" in result.output.splitlines()[-1]
    assert max(steps) < 8 + 5
    assert checkpoints.load(tmp_path / "r").step == 7


@pytest.mark.parametrize(("steps", "message"), [(1, "the network's outputs are"), (3, "step 2: the output of conv")])
def test_divergence_is_named_and_leaves_a_checkpoint_from_before(
    dataset: Path, tmp_path: Path, steps: int, message: str
):
    """After one step the loss is finite, the weights are not. What stays is good to go on from, at a lower rate."""
    result = train(dataset, tmp_path / "r", steps, "optim.lr=1e38", "train.log_every=20", "train.validate_every=20")
    assert result.exit_code == 2
    last = result.output.splitlines()[-1]
    for words in (message, "diverged", "the checkpoint of step 0 is from before"):
        assert words in last
    assert [file.stem for file in checkpoints.files(tmp_path / "r")] == ["step-00000000"]
    again = resume(dataset, tmp_path / "r", "optim.lr=0.01")
    assert again.exit_code == 0, again.output
    assert "optim.lr 1e+38 → 0.01" in again.output
    assert [line["step"] for line in read(tmp_path / "r") if line["kind"] == "train"] == [steps]

"""`python -m trainer ensemble` against plain numpy and scipy: means, fitted weights, submissions, refusals."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from evaluated import CLASSES, FLOAT32, Made, equal, errors, known, save_run, shared_made, stored, weights  # noqa: F401  # a fixture
from runs import one_line, trainer
from stored import remake
from trainer import probabilities
from trainer.ensemble import fitted_weights
from trainer.probabilities import Origin, Probabilities


@pytest.fixture(scope="module")
def runs(made: Made, tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    """Three networks that err differently, on a data set with devkit ids from 1 on, not in the order of the labels."""
    folder = tmp_path_factory.mktemp("ensemble")
    own = replace(made, data=Path(shutil.copytree(made.data, folder / "data")))
    remake(own.data, lambda body: [record.update(devkit_id=7 - label) for label, record in enumerate(body["classes"])])
    for seed in range(3):
        save_run(folder / f"run-{seed}", own.data, weights(own.data, seed))
    return [replace(own, run=folder / f"run-{seed}") for seed in range(3)]


def ensemble(runs: list[Made], *words: object) -> dict:
    """What --json says."""
    members = [run.run for run in runs]
    data = ("--data", runs[0].data, "--devices", "cpu,cpu") if runs else ()
    result = trainer("ensemble", *members, *words, *data, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(runs: list[Made], *words: object, expected: tuple[str, ...]) -> None:
    options = ("--data", runs[0].data, "--devices", "cpu,cpu")
    one_line(trainer("ensemble", *(run.run for run in runs), *options, *words), *expected)


def save(
    path: Path, dataset: str = "0", split: str = "val", views: str = "ten", classes: str = "abc", labels: tuple = (0, 1)
) -> Path:
    origin = Origin(dataset * 64, split, views, ("a run",), tuple(classes))
    probabilities.save(path, Probabilities(origin, np.array(labels), np.full((len(labels), 3), 1 / 3)))
    return path


def test_equal_weights(runs: list[Made]):
    result = ensemble(runs)
    labels, values = np.array(stored(runs[0].data, "val")[1]), [known(run, "val", "ten") for run in runs]
    for run, network, each in zip(runs, result["networks"], values):
        assert network["network"] == f"{run.run}, step 40"
        assert network["weight"] == pytest.approx(1 / 3)
        equal(network["errors"], errors(labels, each), FLOAT32)
    equal(result["together"], errors(labels, sum(values) / 3), FLOAT32)
    assert len({network["errors"]["nll"] for network in result["networks"]}) == 3


def test_given_weights_and_saved_probabilities(runs: list[Made], tmp_path: Path):
    files = [tmp_path / "0.npz", tmp_path / "1.npz"]
    for run, file in zip(runs, files):
        assert trainer("evaluate", *run.options, "--save-probabilities", file).exit_code == 0
    labels = np.array(stored(runs[0].data, "val")[1])
    mean = 0.75 * known(runs[0], "val", "ten") + 0.25 * known(runs[1], "val", "ten")
    result = ensemble([], *files, "--weights", "3,1", "--save-probabilities", tmp_path / "both.npz")
    assert [network["weight"] for network in result["networks"]] == [0.75, 0.25]
    equal(result["together"], errors(labels, mean), FLOAT32)
    both = probabilities.load(tmp_path / "both.npz")
    np.testing.assert_allclose(both.values, mean, atol=FLOAT32)
    assert both.labels.tolist() == labels.tolist()
    assert both.origin.networks == tuple(map(str, files))
    mixed = ensemble(runs[1:2], files[0], "--weights", "1,3")
    assert mixed["together"]["nll"] == pytest.approx(result["together"]["nll"], abs=1e-9)


def test_fitted_weights_are_the_likeliest(runs: list[Made]):
    labels = np.array(stored(runs[0].data, "train")[1])
    true = np.stack([known(run, "train", "centre")[np.arange(len(labels)), labels] for run in runs])

    def nll(weights: np.ndarray) -> float:
        return -float(np.log(weights @ true).mean())

    sum_to_1 = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
    best = minimize(nll, np.full(3, 1 / 3), bounds=[(0, 1)] * 3, constraints=sum_to_1, tol=1e-12)
    result = ensemble(runs, "--fit", "train", "--views", "centre")
    fitted = np.array([network["weight"] for network in result["networks"]])
    assert fitted.sum() == pytest.approx(1)
    assert nll(fitted) <= best.fun + 1e-6
    assert nll(fitted) < nll(np.full(3, 1 / 3))
    mean = sum(weight * known(run, "val", "centre") for weight, run in zip(fitted, runs))
    equal(result["together"], errors(np.array(stored(runs[0].data, "val")[1]), mean), FLOAT32)
    itself = ensemble(runs, "--fit", "train", "--split", "train", "--views", "centre")
    assert itself["together"]["nll"] == pytest.approx(nll(fitted), abs=FLOAT32)
    assert np.isfinite(fitted_weights(np.zeros((2, 5)))).all()


def test_submission_of_a_split_without_labels(runs: list[Made], tmp_path: Path):
    out, file = tmp_path / "test.txt", tmp_path / "test.npz"
    more = ("--split", "test", "--views", "centre")
    result = ensemble(runs, *more, "--submission", out, "--save-probabilities", file)
    assert (result["together"], result["samples"]) == (None, 5)
    mean = sum(known(run, "test", "centre") for run in runs) / 3
    lines = [[int(word) for word in line.split()] for line in out.read_text().splitlines()]
    assert lines == [[7 - label for label in np.argsort(-row)[:5]] for row in mean]
    assert "no errors" in trainer("ensemble", file, "--split", "test").output
    one_line(trainer("ensemble", file, "--split", "test", "--fit", "test"), "without a label", "fit on one")


def test_what_a_person_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Names of any length and letters leave the numbers whole; the mean of different views is one of both."""
    monkeypatch.setenv("COLUMNS", "40")
    long = save(tmp_path / f"{'a' * 60}.npz", views="centre")
    strange = save(tmp_path / "[red]\udcff\x1b[31m.npz")
    result = trainer("ensemble", long, strange, "--fit", "val", "--save-probabilities", tmp_path / "mean.npz")
    assert "fitted on 'val' itself" in result.output
    assert "(val, 2 images)" in result.output.splitlines()[0]
    assert probabilities.load(tmp_path / "mean.npz").origin.views == "centre, ten"
    assert result.exit_code == 0, result.output
    numbers = "0.500       66.7 %        0.0 %         -1.0986"
    lines = result.output.splitlines()
    names = long, f"{tmp_path}/[red]\\udcff\\x1b[31m.npz"
    assert [line.strip() for line in lines[1:3]] == [f"{numbers}   {name}" for name in names]
    assert lines[3].split() == ["66.7", "%", "0.0", "%", "-1.0986", "together"]


def test_a_full_disk_does_not_keep_the_errors_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    file = save(tmp_path / "a.npz")
    monkeypatch.setattr("trainer.probabilities.save", full)
    result = trainer("ensemble", file, "--save-probabilities", tmp_path / "mean.npz")
    assert result.exit_code == 2
    assert result.stdout.splitlines()[-1].endswith("together")
    assert result.stderr == f"Error: {tmp_path}/mean.npz: No space left on device\n"


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_will_be_refused_is_refused_before_anything_is_computed(
    runs: list[Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("trainer.ensemble.predictions", never)
    one = runs[:1]
    refused(one, "--split", "tset", "--fit", "train", expected=("no split named 'tset'",))
    refused(one, "--fit", "test", expected=("'test' has images without a label", "fit on one"))
    refused(one, "--devices", "cpu", expected=("two columns",))
    (tmp_path / "file").write_bytes(b"")
    for option, name in (("--submission", "out.txt"), ("--save-probabilities", "out.npz")):
        refused(one, option, tmp_path / "file" / name, expected=("file: is a file, not a directory",))
    refused(one, tmp_path, expected=("no checkpoint",))
    for text in ("1", "1,x", "-1,2", "0,0", "nan,1", "1e308,1e308"):
        refused(runs[:2], "--weights", text, expected=(f"--weights {text}",))
    refused(one, "--weights", "1", "--fit", "val", expected=("one of the two",))
    one_line(trainer("ensemble", one[0].run), "--data")
    one_line(trainer("ensemble", one[0].run, "--submission", "x.txt"), "--data")
    save_run(tmp_path / "run", one[0].data, weights(one[0].data), ("ant", *CLASSES[1:]))
    refused(one, tmp_path / "run", expected=("network of 7 classes", "label 0 is ant, there [bold]ant"))

    a = save(tmp_path / "a.npz")
    for changed, words in (
        ({"classes": "abd"}, ("label 2 is d, there c",)),
        ({"split": "train"}, ("split 'train', not of 'val'",)),
        ({"dataset": "1"}, ("data set 111111111111, not of 000000000000",)),
        ({"labels": (1, 1)}, ("b.npz: has other labels than", "a.npz")),
        ({"labels": (0, 1, 2)}, ("other labels",)),
    ):
        for fit in ((), ("--fit", "val")):
            one_line(trainer("ensemble", a, save(tmp_path / "b.npz", **changed), *fit), *words)
    a.write_bytes(a.read_bytes()[:200])
    one_line(trainer("ensemble", a), "not saved probabilities, or damaged", "a.npz")


def test_a_submission_needs_devkit_ids_and_every_image_in_order(runs: list[Made], tmp_path: Path):
    own = [replace(runs[0], data=Path(shutil.copytree(runs[0].data, tmp_path / "data")))]
    more = ("--split", "test", "--submission", tmp_path / "out.txt")
    refused(own, *more, "--split", "train", expected=("is shuffled",))
    remake(own[0].data, lambda body: body["splits"]["test"].update(skipped=1))
    refused(own, *more, expected=("not whole", "1 of its images were skipped"))
    remake(own[0].data, lambda body: [body["splits"]["test"].update(skipped=0), body["recipe"].update(limit=5)])
    refused(own, *more, expected=("not whole", "--limit 5"))
    remake(own[0].data, lambda body: [record.update(devkit_id=None) for record in body["classes"]])
    refused(own, *more, expected=("no devkit ids",))
    assert not (tmp_path / "out.txt").exists()

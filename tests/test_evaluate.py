"""`evaluate` against tarfile, Pillow, numpy and a float64 network; error rates of drawn probabilities against numpy."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result

from conftest import ROOT, build
from evaluated import (
    CLASSES,
    FLOAT32,
    PLACES,
    STEP,
    VAL,
    Made,
    equal,
    errors,
    evaluate,
    known,
    save_run,
    shared_made,  # noqa: F401  # a fixture
    weights,
)
from pipeline import manifest
from pipeline.manifest import ClassRecord
from pipeline.offline.build import build as write
from reference import png
from runs import one_line, trainer
from stored import damage, evaluation_plan, remake
from tars import tree
from trainer import checkpoint as checkpoints
from trainer import probabilities
from trainer import recipe as recipes
from trainer.evaluate import VIEWS, Tally, top_k_errors
from trainer.probabilities import Origin
from workers import started, without_shards

WRITTEN = shutil.ignore_patterns("evaluation.json")
LABELS = np.repeat(range(7), VAL)


@pytest.fixture(scope="module")
def expected(made: Made) -> dict[str, np.ndarray]:
    """Views → (31, classes) float64; their errors differ."""
    values = {views: known(made, "val", views) for views in PLACES}
    assert len({errors(LABELS, value)["top5_error"] for value in values.values()}) == 3
    return values


@pytest.fixture
def own(made: Made, tmp_path: Path) -> Made:
    """With a run of its own."""
    return replace(made, run=Path(shutil.copytree(made.run, tmp_path / "run", ignore=WRITTEN)))


def test_the_default_is_the_centre_and_ten_views(own: Made, expected: dict[str, np.ndarray]):
    result = trainer("evaluate", *own.options, "--confused", "2")
    assert result.exit_code == 0, result.output
    written = json.loads((own.run / "evaluation.json").read_text())
    assert written == evaluate(own)
    assert (written["step"], written["split"], written["details_of"]) == (STEP, "val", "ten")
    assert written["dataset"] == manifest.load(own.data).identity
    lines = result.output.splitlines()
    assert "(val, 31 images, step 40)" in lines[0]
    for line, views in zip(lines[1:], ("centre", "ten")):
        wanted = errors(LABELS, expected[views])
        equal(written[views], wanted, FLOAT32)
        said = f"{wanted['top1_error']:.1f} % {wanted['top5_error']:.1f} % {-wanted['nll']:.4f}"
        assert " ".join(line.split()) == f"{VIEWS[views]} {said}"


def test_details_are_those_of_the_last_of_the_views(made: Made, expected: dict):
    """A class without images has no errors."""
    result, values = evaluate(made, "--views", "centre,nine"), expected["nine"]
    assert result["details_of"] == "nine"
    for label, about in enumerate(result["classes"][:-1]):
        own = label == LABELS
        equal(
            {name: about[name] for name in about.keys() - {"label", "wnid", "words"}},
            errors(LABELS[own], values[own]),
            FLOAT32,
        )
    assert result["classes"][-1] == {"label": 6, "wnid": CLASSES[6], "words": CLASSES[6], "samples": 0}
    pairs = {(pair["true"], pair["predicted"]): pair["images"] for pair in result["confused"]}
    assert pairs == Counter((true, guess) for true, guess in zip(LABELS, values.argmax(1)) if true != guess)


def test_what_is_printed_of_classes_and_pairs(made: Made):
    """Names as they are: what is a terminal's markup is none here."""
    result = trainer("evaluate", *made.options, "--views", "nine", "--per-class", "--confused", 3)
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    content, expected = evaluate(made, "--views", "nine"), []
    assert "6 of 7 classes present; predictions are among all 7\n" in result.output
    for record in content["classes"][:6]:
        percents = [f"{record[name]:.1f} %" for name in ("top1_error", "top5_error")]
        expected.append([record["words"], str(record["samples"]), *percents])
    for pair in content["confused"][:3]:
        percent = f"{pair['share']:.1f} %"
        expected.append([str(pair["images"]), percent, pair["true_words"], pair["predicted_words"]])
    assert rows == expected
    assert "│" not in trainer("evaluate", *made.options, "--views", "nine", "--confused", 0).output


@pytest.mark.parametrize(("views", "batch"), [("centre", 31), ("nine", 1), ("ten, centre", 7), ("centre,nine", 1000)])
def test_probabilities_of_every_image_once(made: Made, tmp_path: Path, views: str, batch: int, expected: dict):
    """In the order of the shards, of the last of the views; errors of each view, whatever the batches."""
    names, file = {name.strip() for name in views.split(",")}, tmp_path / "new" / "a.npz"
    last = max(names, key=list(VIEWS).index)
    result = evaluate(made, "--views", views, "--batch-size", batch, "--save-probabilities", file)
    assert set(result) & set(VIEWS) == names
    for name in names:
        equal(result[name], errors(LABELS, expected[name]), FLOAT32)
    np.testing.assert_allclose(probabilities.load(file).values, expected[last], rtol=0, atol=FLOAT32)
    loaded = probabilities.load(file)
    assert loaded.labels.tolist() == LABELS.tolist()
    assert loaded.origin == Origin(result["dataset"], "val", last, (f"{made.run}, step {STEP}",), CLASSES)


def test_workers_change_no_digit(own: Made, tmp_path: Path):
    """Those of --feed, on a host without shards; those that the run had are not asked."""
    local, saved = evaluate(own), checkpoints.load(own.run)
    recipe = recipes.override(saved.recipe, ["data.workers=['127.0.0.1:9']"])
    checkpoints.save(own.run, replace(saved, recipe=recipe))
    assert evaluate(own) == local
    bare = without_shards(own.data, tmp_path / own.data.name)
    with started(own.data.parent) as (worker,):
        assert evaluate(replace(own, data=bare), "--feed", worker.address) == local
    result = trainer("evaluate", *replace(own, data=bare).options)
    one_line(result, "missing, or not a regular file, the manifest promises", "--repair RAW")


def test_a_failure_half_way_leaves_the_old_files(own: Made, tmp_path: Path):
    data, file = Path(shutil.copytree(own.data, tmp_path / "data")), tmp_path / "saved" / "a.npz"
    evaluate(own, "--views", "ten")
    (checkpoint,) = (own.run / "checkpoints").iterdir()
    evaluate(replace(own, run=checkpoint))
    assert not (own.run / "evaluation.json").exists()  # neither was the run's own evaluation
    evaluate(own, "--save-probabilities", file)
    before = file.read_bytes(), (own.run / "evaluation.json").read_bytes()
    damage(data, 25, split="val")  # of the last batch
    options = ("--checkpoint", own.run, "--devices", "cpu,cpu", "--batch-size", 7, "--save-probabilities", file)
    one_line(trainer("evaluate", "--data", data, *options), "damaged at sample 25")
    assert (file.read_bytes(), (own.run / "evaluation.json").read_bytes()) == before
    assert list(file.parent.iterdir()) == [file]


def test_a_split_without_labels(own: Made, tmp_path: Path):
    """Its probabilities are saved, and nothing is said of errors; without that option there is nothing to do."""
    refused = trainer("evaluate", *own.options, "--split", "test")
    one_line(refused, "the split 'test' has images without a label", "--save-probabilities")
    file = tmp_path / "test.npz"
    result = trainer("evaluate", *own.options, "--split", "test", "--save-probabilities", file)
    assert result.exit_code == 0, result.output
    text = f"{file}: the probabilities of 5 images; not all have a label, so there are no errors"
    assert result.output.splitlines() == [text]
    np.testing.assert_allclose(probabilities.load(file).values, known(own, "test", "ten"), rtol=0, atol=FLOAT32)
    assert probabilities.load(file).labels.tolist() == [-1] * 5
    about = evaluate(own, "--split", "test", "--save-probabilities", file)
    assert about == {"step": STEP, "split": "test", "dataset": about["dataset"], "samples": 5}
    assert not (own.run / "evaluation.json").exists()


def test_weights_that_are_not_finite(own: Made, tmp_path: Path):
    values = weights(own.data)
    values["fc7.weight"][0, 0] = np.nan
    save_run(own.run, own.data, values)
    result = trainer("evaluate", *own.options, "--save-probabilities", tmp_path / "a.npz")
    one_line(result, str(own.run), "weights.fc7.weight is not finite: its training has diverged; name another")
    assert not list(tmp_path.glob("a.npz*"))
    assert not (own.run / "evaluation.json").exists()


def test_mistakes_are_one_clear_line(made: Made, own: Made, tmp_path: Path):
    def told(run: Path, *options: object, data: Path = made.data) -> Result:
        return trainer("evaluate", "--data", data, "--checkpoint", run, "--devices", "cpu,cpu", *options)

    for views in ("five", "ten,nine", "centre,centre"):
        one_line(told(made.run, "--views", views), f"--views {views}: give centre, ten or nine")
    assert f"'--batch-size': {10**21} is not in the range" in told(made.run, "--batch-size", 10**21).output
    one_line(told(tmp_path), "no checkpoint", str(tmp_path))
    one_line(told(made.run, "--split", "dev"), "no split named 'dev'; there are: ")
    one_line(told(made.run, "--save-probabilities", tmp_path / "a.csv"), "a.csv: give a name that ends in .npz")
    (tmp_path / "file").write_bytes(b"")
    one_line(told(made.run, "--save-probabilities", tmp_path / "file" / "a.npz"), str(tmp_path / "file"))
    (tmp_path / "a.npz").mkdir()
    one_line(told(made.run, "--save-probabilities", tmp_path / "a.npz"), str(tmp_path / "a.npz"), "directory")
    save_run(own.run, made.data, weights(made.data), classes=("ant", *CLASSES[1:]))
    one_line(told(own.run), "a network of 7 classes", "label 0 is ant, there [bold]ant")


def test_weights_of_another_network(own: Made):
    """As one number for all classes a bias would fit, and be wrong."""
    values = weights(own.data)
    save_run(own.run, own.data, values | {"fc8.bias": values["fc8.bias"][:1]})
    one_line(trainer("evaluate", *own.options), "damaged", "fc8.bias is (1,), its recipe says (7,)")


def test_a_reader_that_leaves_does_not_keep_the_evaluation_from_being_written(
    own: Made, monkeypatch: pytest.MonkeyPatch
):
    def leave(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("trainer.evaluate.click.echo", leave)
    trainer("evaluate", *own.options)
    assert json.loads((own.run / "evaluation.json").read_text())["ten"]["samples"] == sum(VAL)


@pytest.mark.proof
def test_a_terminal_that_lacks_letters(own: Made, tmp_path: Path):
    root = Path(shutil.copytree(own.data, tmp_path / "data"))
    remake(root, lambda body: [record.update(words="ânè") for record in body["classes"]])
    command = [sys.executable, "-m", "trainer", "evaluate", *map(str, replace(own, data=root).options), "--per-class"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "?n?" in done.stdout) == (0, True)
    assert done.stderr.startswith(f"note: {root}: another data set than the run's")


def test_an_empty_split(made: Made, tmp_path: Path):
    """Its only picture was skipped."""
    files = {"train/a/0.png": png(40, 40, 2), "train/b/0.png": png(40, 40, 2), "val/a/1.png": b"none"}
    raw = tree(tmp_path / "raw", files)
    assert build(raw, tmp_path / "data", "--workers", 1, "--size", 32, "--max-skipped", 1).exit_code == 0
    result = trainer("evaluate", *replace(made, data=tmp_path / "data").options)
    one_line(result, "the split 'val' is empty; there is nothing to evaluate")


# A set for evaluation alone, of two classes of seven

PRESENT = np.isin(range(7), (2, 3))


@pytest.fixture(scope="module", name="alone")
def shared_alone(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Read only."""
    root = tmp_path_factory.mktemp("alone") / "data"
    write(evaluation_plan(made.raw, made.data, CLASSES[2:4]), root)
    return replace(made, data=root)


@pytest.mark.parametrize(("options", "among"), [((), "all 7"), (["--among-present"], "these 2 alone")])
def test_a_set_for_evaluation_alone_is_of_the_classes_present(
    made: Made, alone: Made, tmp_path: Path, options: list[str], among: str
):
    """Its evaluation does not take the place of that of the data set that the network was trained on."""
    chosen, values = PRESENT[LABELS], known(made, "val", "centre")[PRESENT[LABELS]]
    own = replace(alone, run=Path(shutil.copytree(made.run, tmp_path / "run", ignore=WRITTEN)))
    if options:
        values = values * PRESENT / values[:, PRESENT].sum(1, keepdims=True)
    result = trainer("evaluate", *own.options, "--per-class", *options)
    assert result.exit_code == 0, result.output
    assert f"2 of 7 classes present; predictions are among {among}\n" in result.output
    assert [name for name in CLASSES if f" {name} " in result.output.partition("most confused")[0]] == ["cow", "dog"]
    (written,) = own.run.glob("evaluation*")
    identity = manifest.load(own.data).identity
    assert written.name == f"evaluation-{identity[:12]}{'-among-present' if options else ''}.json"
    content = json.loads(written.read_text())
    equal(content["centre"], errors(LABELS[chosen], values), FLOAT32)
    about = (identity, 2, bool(options))
    assert (content["dataset"], content["classes_present"], content["among_present"]) == about


def test_a_set_for_evaluation_alone_has_the_statistics_of_its_data_set(made: Made, alone: Made):
    """So `predict` names the same labels by either, bit for bit."""
    picture = next((made.raw / "val" / "cow").iterdir())
    results = [trainer("predict", picture, *one.options, "--json") for one in (made, alone)]
    assert [result.exit_code for result in results] == [0, 0]
    assert results[0].stdout == results[1].stdout
    names = [manifest.load(one.data).identity[:12] for one in (alone, made)]
    note = f"another data set than the run's ({names[0]}…, not {names[1]}…); its own mean is used"
    assert [result.stderr for result in results] == ["", f"note: {alone.data}: {note}\n"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "train --data {data} --out {out} --recipe tiny",
            "{data}: no split named 'train'; there are: val; it is for "
            "evaluation alone: name the data set whose classes it has",
        ),
        ("index {run} {data} --devices cpu,cpu", "{data}: no split named 'train'; there are: val; it is for "),
        ("figures {run} --data {data} --devices cpu,cpu", "name the DATASET that it was trained on"),
        ("evaluate --split train --checkpoint {run} --data {data} --devices cpu,cpu", "no split named 'train'"),
    ],
)
def test_what_needs_training_pictures_refuses_a_set_for_evaluation_alone(
    alone: Made, tmp_path: Path, words: str, message: str
):
    names = {"data": alone.data, "run": alone.run, "out": tmp_path / "run"}
    one_line(trainer(*words.format(**names).split()), message.format(**names))
    assert not (tmp_path / "run").exists()


# Error rates of drawn probabilities: many ties, few classes, classes without images


@pytest.mark.parametrize("seed", range(12))
def test_errors_and_confused_pairs_are_those_of_numpy(seed: int):
    """Pairs: the most frequent first, then by label; of classes that are level the first one counts as predicted."""
    random = np.random.default_rng(seed)
    classes, n = 2 + seed % 11, int(random.integers(1, 60))
    values = random.integers(0, 4, (n, classes))  # many ties, many zeros
    values[values.sum(1) == 0] = 1
    values = values / values.sum(1, keepdims=True)
    labels = random.choice(np.flatnonzero(np.arange(classes) % 3 != 2), n)  # no image of one class in three
    matrix = np.zeros((classes, classes), int)
    np.add.at(matrix, (labels, values.argmax(1)), 1)
    images = matrix.sum(1)
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix.ravel(), kind="stable")[: np.count_nonzero(matrix)]
    records = [ClassRecord(label, f"n{label}", f"w{label}", None) for label in range(classes)]
    for batch in (1, 7, 100):
        tally = Tally(classes)
        for start in range(0, n + batch, batch):  # the last one is empty
            tally.add(*(torch.from_numpy(array[start : start + batch]) for array in (labels, values)))
        assert asdict(tally.errors()) == pytest.approx(errors(labels, values), abs=1e-10)
        details = tally.details(records)
        for label, result in enumerate(details["classes"]):
            own = labels == label
            assert [result.pop(name) for name in ("label", "wnid", "words")] == [label, f"n{label}", f"w{label}"]
            expected = errors(labels[own], values[own]) if own.any() else {"samples": 0}
            assert result == pytest.approx(expected, abs=1e-10)
        for pair, position in zip(details["confused"], order, strict=True):
            true, other = divmod(int(position), classes)
            assert pair["share"] == pytest.approx(100 * matrix[true, other] / images[true])
            assert [pair[name] for name in ("true", "predicted", "images")] == [true, other, matrix[true, other]]
            assert (pair["true_words"], pair["predicted_words"]) == (f"w{true}", f"w{other}")


def test_the_rule_of_2012_by_hand():
    """Wrong where k classes or more are strictly larger; of those that are level, each has its part of what is left."""
    values = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.4, 0.2, 0.2, 0.2], [0.7, 0.1, 0.2, 0.0]], dtype=torch.float64)
    for k, wrong in ((1, [3 / 4, 1, 1]), (2, [1 / 2, 2 / 3, 1]), (3, [1 / 4, 1 / 3, 0]), (4, [0, 0, 0])):
        assert top_k_errors(values, torch.tensor([3, 1, 1]), k).tolist() == pytest.approx(wrong)

"""`evaluate` against tarfile, Pillow, numpy and a float64 network: any views, and batches of any size."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
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
    make,
    save_run,
    saved,
    spoil,
    stored,
    weights,
)
from pipeline import manifest
from reference import png
from runs import one_line, trainer
from tars import tree
from trainer import probabilities

WRITTEN = shutil.ignore_patterns("evaluation.json")
TOLD = {"centre": "centre view", "ten": "ten views", "nine": "nine views"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Read only."""
    return make(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def expected(made: Made) -> dict[str, np.ndarray]:
    """Views → (31, classes) float64."""
    return {views: known(made, "val", views) for views in PLACES}


@pytest.fixture(scope="module")
def labels(made: Made) -> np.ndarray:
    return np.array(stored(made.data, "val")[1])


@pytest.fixture
def own(made: Made, tmp_path: Path) -> Made:
    """With a run of its own."""
    return Made(made.data, Path(shutil.copytree(made.run, tmp_path / "run", ignore=WRITTEN)))


def test_what_is_expected_can_tell(labels: np.ndarray, expected: dict[str, np.ndarray]):
    """The views differ in every number, and no error hangs on the last digits of a float32."""
    assert np.bincount(labels, minlength=len(CLASSES)).tolist() == list(VAL)
    found = [errors(labels, expected[views]) for views in ("centre", "ten", "nine")]
    assert len({each["top5_error"] for each in found}) == 3
    assert 0 < found[0]["top5_error"] < found[0]["top1_error"] < 100
    for chances in expected.values():
        apart = np.abs(chances - chances[np.arange(31), labels][:, None])
        apart[np.arange(31), labels] = 1
        assert apart.min() > FLOAT32


def test_the_default_is_the_centre_and_ten_views(own: Made, labels: np.ndarray, expected: dict[str, np.ndarray]):
    result = trainer("evaluate", *own.options, "--confused", "2")
    assert result.exit_code == 0, result.output
    written = json.loads((own.run / "evaluation.json").read_text())
    assert written == evaluate(own)
    assert (written["step"], written["split"], written["details_of"]) == (STEP, "val", "ten")
    assert written["dataset"] == manifest.load(own.data).identity
    lines = result.output.splitlines()
    assert "(val, 31 images, step 40)" in lines[0]
    for line, views in zip(lines[1:], ("centre", "ten")):
        wanted = errors(labels, expected[views])
        equal(written[views], wanted, FLOAT32)
        said = f"{wanted['top1_error']:.1f} % {wanted['top5_error']:.1f} % {-wanted['nll']:.4f}"
        assert " ".join(line.split()) == f"{TOLD[views]} {said}"


def test_the_errors_of_each_class_and_the_confused_pairs(made: Made, labels: np.ndarray, expected: dict):
    """Of the last of the views; a class without images has no errors."""
    found = evaluate(made, "--views", "centre,nine")
    assert found["details_of"] == "nine"
    matrix = np.zeros((len(CLASSES),) * 2, int)
    np.add.at(matrix, (labels, expected["nine"].argmax(1)), 1)
    for label, each in enumerate(found["classes"]):
        mine = labels == label
        about = {name: each.pop(name) for name in ("label", "wnid", "words")}
        assert about == {"label": label, "wnid": CLASSES[label], "words": CLASSES[label]}
        if mine.any():
            equal(each, errors(labels[mine], expected["nine"][mine]), FLOAT32)
        else:
            assert each == {"samples": 0}
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix.ravel(), kind="stable")[: np.count_nonzero(matrix)]
    assert len(order) > 5
    for pair, place in zip(found["confused"], order, strict=True):
        true, other = divmod(int(place), len(CLASSES))
        assert (pair["true"], pair["predicted"], pair["images"]) == (true, other, matrix[true, other])
        assert (pair["true_words"], pair["predicted_words"]) == (CLASSES[true], CLASSES[other])
        assert pair["share"] == pytest.approx(100 * matrix[true, other] / VAL[true])


def test_what_is_printed_of_classes_and_pairs(made: Made):
    """Names as they are: what is a terminal's markup is none here."""
    result = trainer("evaluate", *made.options, "--views", "nine", "--per-class", "--confused", 3)
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    found = evaluate(made, "--views", "nine")
    for row, each in zip(rows[:7], found["classes"]):
        said = [f"{each[name]:.1f} %" if each["samples"] else "" for name in ("top1_error", "top5_error")]
        name = each["words"] if each["wnid"] == each["words"] else f"{each['wnid']} {each['words']}"
        assert row == [name, str(each["samples"]), *said]
    assert rows[7:] == [
        [str(pair["images"]), f"{pair['share']:.1f} %", pair["true_words"], pair["predicted_words"]]
        for pair in found["confused"][:3]
    ]
    assert len(rows) == 10
    none = trainer("evaluate", *made.options, "--views", "nine", "--confused", 0)
    assert "│" not in none.output


@pytest.mark.parametrize("views", ["centre", "nine", "ten", "ten, centre"])
def test_probabilities_of_every_image_once(made: Made, tmp_path: Path, views: str, labels: np.ndarray, expected: dict):
    """In the order of the shards, within float32's rounding of float64, of the last of the views; and the same bytes
    each time."""
    first, second, last = tmp_path / "first.npz", tmp_path / "new" / "second.npz", views.split(",")[0]
    for file in (first, second):
        found = evaluate(made, "--views", views, "--save-probabilities", file)
        equal(found[last], errors(labels, expected[last]), FLOAT32)
    assert first.read_bytes() == second.read_bytes()
    np.testing.assert_allclose(saved(first), expected[last], rtol=0, atol=FLOAT32)
    with np.load(first, allow_pickle=False) as arrays:
        assert arrays["labels"].tolist() == labels.tolist()
        assert arrays["classes"].tolist() == list(CLASSES)
    origin = probabilities.load(first).origin
    assert (origin.split, origin.views, origin.networks) == ("val", last, (f"{made.run}, step {STEP}",))
    assert origin.dataset == found["dataset"]


@pytest.mark.parametrize("other", ["ten", "nine"])
def test_the_centre_of_several_views_is_that_of_one(made: Made, tmp_path: Path, other: str):
    together, alone = evaluate(made, "--views", f"centre,{other}"), evaluate(made, "--views", "centre")
    assert set(alone) & set(TOLD) == {"centre"}
    equal(together["centre"], alone["centre"])
    assert not math.isclose(together["centre"]["nll"], together[other]["nll"], abs_tol=1e-3)


@pytest.mark.parametrize("batch", [1, 7, 31, 1000])
def test_any_batch_size(made: Made, tmp_path: Path, batch: int, labels: np.ndarray, expected: dict):
    found = evaluate(made, "--batch-size", batch, "--save-probabilities", tmp_path / "a.npz")
    alone = evaluate(made)
    for views in ("centre", "ten"):
        equal(found[views], errors(labels, expected[views]), FLOAT32)
        equal(found[views], alone[views])
    np.testing.assert_allclose(saved(tmp_path / "a.npz"), expected["ten"], rtol=0, atol=FLOAT32)


def test_a_failure_half_way_leaves_the_old_files(own: Made, tmp_path: Path):
    data, file = Path(shutil.copytree(own.data, tmp_path / "data")), tmp_path / "saved" / "a.npz"
    evaluate(own, "--save-probabilities", file)
    before = file.read_bytes(), (own.run / "evaluation.json").read_bytes()
    spoil(data, 25)  # of the last batch
    options = ("--checkpoint", own.run, "--devices", "cpu,cpu", "--batch-size", 7, "--save-probabilities", file)
    one_line(trainer("evaluate", "--data", data, *options), "damaged at sample 25")
    assert (file.read_bytes(), (own.run / "evaluation.json").read_bytes()) == before
    assert list(file.parent.iterdir()) == [file]


def test_a_split_without_labels(own: Made, tmp_path: Path):
    """Its probabilities are saved, and nothing is said of errors; without that option there is nothing to do."""
    refused = trainer("evaluate", *own.options, "--split", "test")
    one_line(refused, "the split 'test' has images without a label", "--save-probabilities")
    options = (*own.options, "--split", "test", "--save-probabilities", tmp_path / "test.npz")
    result = trainer("evaluate", *options)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        f"{tmp_path / 'test.npz'}: the probabilities of 5 images; not all have a label, so there are no errors"
    ]
    np.testing.assert_allclose(saved(tmp_path / "test.npz"), known(own, "test", "ten"), rtol=0, atol=FLOAT32)
    assert probabilities.load(tmp_path / "test.npz").labels.tolist() == [-1] * 5
    told = evaluate(own, *options[len(own.options) :])
    assert (told["split"], told["samples"]) == ("test", 5)
    assert not {"centre", "ten", "classes"} & set(told)
    assert not (own.run / "evaluation.json").exists()


def test_what_is_not_the_runs_own_evaluation_leaves_it_alone(own: Made):
    evaluate(own, "--views", "ten")
    (checkpoint,) = (own.run / "checkpoints").iterdir()
    evaluate(Made(own.data, checkpoint))
    assert not (own.run / "evaluation.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(own: Made, tmp_path: Path, value: float):
    values = weights(own.data)
    values["fc7.weight"][0, 0] = value
    save_run(own.run, own.data, values)
    result = trainer("evaluate", *own.options, "--save-probabilities", tmp_path / "a.npz")
    one_line(result, "not finite numbers", "diverged")
    assert not list(tmp_path.glob("a.npz*"))
    assert not (own.run / "evaluation.json").exists()


@pytest.mark.parametrize("views", ["", "five", "ten,nine", "centre,ten,nine", "centre,centre", "centre;ten", "Ten"])
def test_views_that_there_are_not(made: Made, views: str):
    one_line(trainer("evaluate", *made.options, "--views", views), f"--views {views}: give centre, ten or nine")


def test_mistakes_are_one_clear_line(made: Made, own: Made, tmp_path: Path):
    def told(run: Path, *options: object, data: Path = made.data) -> Result:
        return trainer("evaluate", "--data", data, "--checkpoint", run, "--devices", "cpu,cpu", *options)

    one_line(told(tmp_path), "no checkpoint", str(tmp_path))
    one_line(told(made.run, data=tmp_path / "none"), "no such directory")
    one_line(told(made.run, "--split", "dev"), "no split named 'dev'; there are: ")
    one_line(told(made.run, "--save-probabilities", tmp_path / "a.csv"), "a.csv: give a name that ends in .npz")
    (tmp_path / "file").write_bytes(b"")
    one_line(told(made.run, "--save-probabilities", tmp_path / "file" / "a.npz"), str(tmp_path / "file"))
    url = told(made.run, "--save-probabilities", "s3://bucket/a.npz")
    assert (url.exit_code, "s3://bucket/a.npz: is a URL" in url.output) == (2, True)
    (tmp_path / "a.npz").mkdir()
    one_line(told(made.run, "--save-probabilities", tmp_path / "a.npz"), str(tmp_path / "a.npz"), "directory")
    save_run(own.run, made.data, weights(made.data), classes=("ant", *CLASSES[1:]))
    one_line(told(own.run), "a network of 7 classes", "label 0 is ant, there [bold]ant")


def test_weights_of_another_network(own: Made):
    """As one number for all classes they would fit, and be wrong."""
    whole = weights(own.data)
    lacking = {name: value for name, value in whole.items() if name != "fc8.bias"}
    for found, words in (
        (lacking, "fc8.bias is missing, its recipe says (7,)"),
        (whole | {"fc8.bias": whole["fc8.bias"][:1]}, "fc8.bias is (1,), its recipe says (7,)"),
        (whole | {"fc9.bias": whole["fc8.bias"]}, "fc9.bias is (7,), its recipe says none"),
    ):
        save_run(own.run, own.data, found)
        one_line(trainer("evaluate", *own.options), "damaged", words)


def test_a_run_that_cannot_be_written_to_is_told_all_the_same(own: Made):
    """A directory stands where evaluation.json would."""
    (own.run / "evaluation.json").mkdir()
    result = trainer("evaluate", *own.options)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert "evaluation.json" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    for word in ("centre view", "ten views", "most confused"):
        assert word in result.stdout


def test_a_reader_who_leaves_does_not_keep_the_run_from_its_evaluation(own: Made, monkeypatch: pytest.MonkeyPatch):
    def leave(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("trainer.commands.evaluate.click.echo", leave)
    trainer("evaluate", *own.options)
    assert json.loads((own.run / "evaluation.json").read_text())["ten"]["samples"] == sum(VAL)


def test_a_terminal_that_lacks_letters(made: Made, tmp_path: Path):
    from stored import remake

    root = Path(shutil.copytree(made.data, tmp_path / "data"))
    remake(root, lambda body: [record.update(words="ânè") for record in body["classes"]])
    options = Made(root, made.run).options
    command = [sys.executable, "-m", "trainer", "evaluate", *map(str, options), "--views", "centre", "--per-class"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "?n?" in done.stdout


def test_an_empty_split(made: Made, tmp_path: Path):
    """Whose only picture is none, and was skipped."""
    picture = png(40, 40, 2)
    files = {"train/a/0.png": picture, "train/b/0.png": picture, "val/a/1.png": b"none"}
    raw = tree(tmp_path / "raw", files)
    assert build(raw, tmp_path / "data", "--workers", 1, "--size", 32, "--max-skipped", 1).exit_code == 0
    result = trainer("evaluate", *Made(tmp_path / "data", made.run).options)
    one_line(result, "the split 'val' is empty; there is nothing to evaluate")

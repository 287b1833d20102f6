"""Experiments of trainer/reproduce: all are possible, bad ones are refused; estimates by numpy, curves by pixels."""

import math
import os
import re
import shlex
import shutil
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image, ImageColor

from conftest import build, drawn
from pipeline import UserError, manifest
from runs import one_line, trainer
from trainer.__main__ import load as load_command
from trainer.figures.curves import curves, step
from trainer.figures.sheets import paragraph
from trainer.recipe import difference
from trainer.reproduce import experiment, measure

SETTING = r"--set (?:'[^']*'|\S+)"
HEAD = 'claim = "A claim"\nmeasure = "error"\nviews = "ten"\nseeds = [3, 4]\n'
COLUMNS = HEAD.replace('"error"', '"columns"')
RELU = "relu = { recipe = 'tiny' }\n"
BOTH = f"[variants]\n{RELU}tanh = {{ recipe = 'tanh' }}\n"
SEARCH = '[search]\nepochs = [1]\n[search.choices]\ntame = ["optim.lr=0.001"]\n'


def reproduce(folder: Path, data: Path, text: str, *more: object) -> Result:
    """Run the command on an experiment of this text."""
    (folder / "try.toml").write_text(text)
    return trainer("reproduce", folder / "try.toml", "--data", data, "--out", folder / "runs", *more)


def command_of(path: Path) -> dict[str, Any]:
    """Return the parameters of the command in the comment that a file begins with, and of every `--set` there."""
    comment = re.match(r"# (python -m trainer reproduce .*)\n((?:#.*\n)*)", path.read_text())
    assert comment
    words = [*shlex.split(comment[1], comments=True)[4:], *shlex.split(" ".join(re.findall(SETTING, comment[2])))]
    return load_command("reproduce").make_context("reproduce", words).params


@pytest.mark.parametrize("name", experiment.names())
def test_every_experiment_is_possible_and_names_its_command(name: str, small: Path):
    own, dataset, params = experiment.load(name), manifest.load(small), command_of(experiment.FOLDER / f"{name}.toml")
    assert params["name"] == name
    for settings in {(), params["settings"]}:
        left = {variant: list(own.search.choices) for variant in own.variants} if own.search else {}
        trials = experiment.searched(own, dataset, Path("out"), own.seeds[0], settings, left, 1)
        runs = {}
        for choice in own.search.choices if own.search else [""]:
            chosen = dict.fromkeys(own.variants, choice)
            planned = experiment.planned(own, dataset, Path("out"), own.seeds, settings, chosen)
            assert [run.seed for run in planned] == [seed for seed in own.seeds for _ in own.variants]
            runs |= {run.folder: run.loaded() for run in planned}
        assert len(runs) == len(own.seeds) * max(len(trials), len(own.variants))
        assert all(difference(one, other) for one, other in combinations(runs.values(), 2))
        assert all(run.loaded() == runs[run.folder] for run in trials)  # the chosen one goes on


def variant(settings: str) -> str:
    return f"[variants]\na = {{ recipe = 'tiny', settings = ['{settings}'] }}\n"


BAD = {
    "no TOML": ("claim = ", (), "try.toml: not an experiment (Invalid value"),
    "no claim": (BOTH, (), "missing required field claim"),
    "unknown measure": (HEAD.replace('"error"', '"speed"') + BOTH, (), "measure: invalid enum value 'speed'"),
    "unknown key": ("seed = [1]\n" + HEAD + BOTH, (), "unknown key seed; known: claim, measure, variants,"),
    "unknown key of a variant": (HEAD + '[variants]\na = { recipes = "a", recipe = "tiny" }', (), "variants.a.recipes"),
    "unknown key of the search": (HEAD + BOTH + "[search]\nepoch = 1\n" + SEARCH[9:], (), "unknown key search.epoch;"),
    "no variants": (HEAD + "[variants]\n", (), "variants: expected object of length >= 1"),
    "no choices": (HEAD + BOTH + SEARCH[: SEARCH.index("tame")], (), "search.choices: expected object of length >= 1"),
    "no seeds": (HEAD.replace("[3, 4]", "[]") + BOTH, (), "seeds: expected array of length >= 1"),
    "a seed twice": (HEAD.replace("[3, 4]", "[3, 3]") + BOTH, (), "seeds = [3, 3]: must be numbers, each once"),
    "one folder for two": (
        HEAD + BOTH + RELU.replace("relu =", "relu-tame =") + SEARCH + "tame-tame = []\n", (), "relu-tame-tame: must be"
    ),
    "unknown recipe": (HEAD + '[variants]\na = { recipe = "nosuch" }', (), "nosuch: no such recipe; there are auto"),
    "bad setting": (HEAD + variant("model.columns=3"), (), "--set model.columns=3: model.columns = 3: must be one of"),
    "unknown key of --set": (HEAD + BOTH, ("--set", "train.epoch=3"), "unknown key train.epoch; known: train.seed,"),
    "a plateau": (HEAD + variant('optim.schedule="plateau"'), (), "a: optim.schedule = plateau: must be"),
    "one column": (COLUMNS + variant("model.columns=1"), (), "a: model.columns = 1: must be 2"),
    "local": (COLUMNS + variant('model.layers.conv1.kind="local"'), (), "layers.conv1.kind = local: must be conv"),
    "no split": (HEAD + BOTH, ("--split", "nosuch"), "no split named 'nosuch'"),
    "none done": (HEAD + BOTH, ("--no-train",), "no run is done; leave out --no-train"),
    "no search done": (HEAD + BOTH + SEARCH, ("--no-train",), "the search for rates is not finished"),
    **{
        f"variant {name!r}": (HEAD + f"[variants]\n'{name}' = {{ recipe = 'tiny' }}", (), "matching regex")
        for name in ("../x", "a/b", "", ".a", "-a", "A", "a b", "a" * 50)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_an_impossible_experiment_is_refused_in_one_line(small: Path, tmp_path: Path, case: str):
    text, more, words = BAD[case]
    one_line(reproduce(tmp_path, small, text, *more), words)
    assert not (tmp_path / "runs").exists()


def test_what_is_no_experiment_is_refused_in_one_line(small: Path, tmp_path: Path):
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    options = ("--data", small, "--out", tmp_path / "runs")
    for name, words in (
        ("nosuch", "there are ablations, ablations-cifar, columns,"),
        ("no/such", "no such experiment"),
    ):
        one_line(trainer("reproduce", name, *options), f"{name}: no such experiment", words)
    for name in ("folder.toml", "pipe.toml"):
        one_line(trainer("reproduce", tmp_path / name, *options), f"{name}: not a regular file; name a .toml file")


def test_a_split_without_labels_is_neither_taken_nor_measured(raw: Path, tmp_path: Path):
    """Before anything is trained."""
    shutil.copytree(raw, tmp_path / "raw")
    (tmp_path / "raw/test").mkdir()
    drawn("blobs", "a", 90, 90).save(tmp_path / "raw/test/0.png")
    assert build(tmp_path / "raw", tmp_path / "data", "--workers", 1, "--size", 32).exit_code == 0
    data = tmp_path / "data"
    one_line(reproduce(tmp_path, data, HEAD + BOTH, "--split", "test"), "the split 'test' has images without a label")
    one_line(reproduce(tmp_path, data, HEAD + BOTH, "--no-train"), "no run is done")  # val is what it would measure


# ---- Measures ----


def test_estimates_are_those_of_numpy():
    values = [3.0, 4.5, 7.25, 5.0]
    estimate = measure.mean(values)
    assert estimate == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1) / 2), 4)
    assert estimate.text(" %") == "4.94 ± 0.88 %"
    assert measure.mean([2.0]) == (2, None, 1)
    assert measure.mean([2.0]).text(" %") == "2.00 % (one run: no standard error)"
    with pytest.raises(UserError, match="no values"):
        measure.mean([])


def test_epochs_to_a_target_are_where_a_fine_grid_reaches_it():
    random = np.random.default_rng(1)
    for _ in range(20):
        errors = np.sort(random.uniform(0, 100, 9))[::-1] + random.uniform(-15, 15, 9)  # not always falling
        lines = [{"step": 7 * (i + 1), "top1_error": float(error)} for i, error in enumerate(errors)]
        grid = np.linspace(1, 9, 800_001)
        low = np.interp(grid, range(1, 10), errors) <= 40
        found = measure.epochs_to(lines, 7, 40)
        assert found == (pytest.approx(grid[low.argmax()] - 0.5, abs=1e-4) if low.any() else None)
    assert measure.epochs_to([{"step": 7, "top1_error": 40.0}], 7, 40) == 0.5
    assert measure.epochs_to([], 7, 40) is None


@pytest.mark.parametrize(("k", "chi2", "tail"), [(1, 5.991, 0.05), (2, 13.277, 0.01), (3, 10.645, 0.1)])  # tables
def test_combined_p_values_are_tails_of_chi_square(k: int, chi2: float, tail: float):
    assert measure.combined([math.exp(-chi2 / (2 * k))] * k) == pytest.approx(tail, rel=1e-3)


def test_combined_p_values_of_nothing_are_uniform():
    n = 20_000
    together = np.sort([measure.combined(ps) for ps in 1 - np.random.default_rng(2).random((n, 3))])
    assert np.abs(together - (np.arange(n) + 0.5) / n).max() < 1.63 / math.sqrt(n)  # Kolmogorov's 1 %


# ---- Curves: the plot is 544 × 375 pixels, 64 from the left, 25 below the top of its part ----


def sheet_of(courses: dict[str, list[tuple[float, float]]], line: float = 25.0) -> np.ndarray:
    """(height, 640, 3) uint8: the plot with its margin above, below the title."""
    image = np.asarray(curves(courses, "Error", "Epochs", line, "A title"))
    return image[32 + paragraph("A title", 22, bold=True).height :]


def near(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Return where pixels are more of a colour than of white."""
    return np.abs(pixels.astype(int) - ImageColor.getrgb(colour)).sum(-1) < 60


def position(x: float, y: float, x_end: float, y_end: float) -> tuple[float, float]:
    """Return column and row in pixels."""
    return 64 + 544 * x / x_end, 25 + 375 * (1 - y / y_end)


BLUE, ORANGE, GREEN = "#1f5f8b", "#b4530f", "#3b7d3b"


def test_a_solid_curve_is_where_its_points_are():
    """Axes end at the tick after the greatest point: 8 epochs and 80 %."""
    points = [(1.0, 80.0), (3.0, 35.0), (4.0, 50.0), (8.0, 20.0)]
    drawn_pixels = near(sheet_of({"one": points}), BLUE)
    for column in range(round(position(1, 0, 8, 80)[0]) + 2, 540):  # then the name comes, above the end
        row = position(0, np.interp((column + 0.5 - 64) / 68, *zip(*points)), 8, 80)[1]
        rows = np.flatnonzero(drawn_pixels[25:401, column]) + 25.5
        assert 0 < len(rows) < 9, column
        assert abs(rows.mean() - row) < 2, column
    assert not drawn_pixels[25:401, 65 : int(position(1, 0, 8, 80)[0]) - 2].any()


def test_a_curve_that_ends_in_zigzag_is_named_above_it():
    points = [(0.0, 80.0), (7.4, 20.0), (7.5, 50.0), (7.6, 20.0), (8.0, 20.0)]
    drawn_pixels, spike, end = near(sheet_of({"one": points}), BLUE), *(position(8, y, 8, 80)[1] for y in (50, 20))
    named = 0
    for column in range(round(position(7.65, 0, 8, 80)[0]), 600):
        rows = np.flatnonzero(drawn_pixels[:401, column]) + 0.5
        assert ((abs(rows - end) < 4) | (rows < spike)).all(), column
        named += (rows < spike).sum()
    assert named > 50


def strokes(course: np.ndarray) -> list[int]:
    """Return the lengths of the runs of True, but those at the ends."""
    edges = np.flatnonzero(np.diff(course.astype(int)))
    return [int(b - a) for a, b in pairwise(edges) if course[a + 1]]


def test_curves_are_told_apart_without_colour():
    level = {"one": 60.0, "two": 40.0, "three": 20.0}
    pixels = sheet_of({name: [(0.0, y), (8.0, y)] for name, y in level.items()} | {"up": [(0.0, 80.0)]})
    courses = []
    for y, colour in zip(level.values(), (BLUE, ORANGE, GREEN)):
        row = int(position(0, y, 8, 80)[1])
        courses.append(near(pixels[row, 66:606], colour))
    solid, dashed, dotted = courses
    assert solid.all()
    assert set(strokes(dashed)) <= {13, 14, 15}
    assert len(strokes(dashed)) == pytest.approx(540 / 22, abs=2)
    assert set(strokes(dotted)) <= {2, 3, 4}
    assert len(strokes(dotted)) == pytest.approx(540 / 9, abs=2)


def test_the_target_is_a_dotted_line():
    row = int(position(0, 34, 8, 80)[1])  # where no grid is
    with_line, without = (sheet_of({"one": [(8.0, 80.0)]}, line)[row, 66:606] for line in (34.0, 55.0))
    assert len(strokes(with_line.min(-1) < 200)) == pytest.approx(540 / 9, abs=2)
    assert (without == 255).all()


@pytest.mark.parametrize("courses", [{}, {"one": []}, {"one": [], "two": [(2.0, 0.0)]}, {"one": [(0.0, 0.0)]}])
def test_a_sheet_of_no_or_few_points_is_drawn(courses: dict[str, list[tuple[float, float]]]):
    image = curves(courses, "Error", "Epochs", 25, "A title")
    assert isinstance(image, Image.Image)
    assert image.width == 640


@pytest.mark.parametrize("end", [0.03, 1, 7.9, 8, 8.1, 40, 79, 81, 90, 161, 370, 12345])
def test_ticks_are_at_most_eight_of_a_round_step(end: float):
    rounds = [times * 10.0**power for power in range(-5, 6) for times in (1, 2, 5)]
    assert step(end) == pytest.approx(min(size for size in rounds if 8 * size >= end * (1 - 1e-9)))

"""The command reproduce: measures against numpy; runs that are trained once, go on after kills, and end with it."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from safetensors.numpy import load_file

from conftest import ROOT, gone, until
from runs import assert_same_end, one_line, trainer
from stored import damage
from trainer import checkpoint as checkpoints
from trainer import metrics
from trainer.figures.curves import curves
from trainer.reproduce import crew

EPOCH = 4  # steps: 41 pictures in batches of 12
RECIPE = """
[model]
size = 24
order = ["conv1", "fc2"]
dropout = 0.0
[model.layers]
conv1 = { width = 8, kernel = 5, stride = 2, then = ["relu", "pool"] }
fc2 = { kind = "linear" }
[optim]
batch_size = 12
schedule = "drops"
lr = 0.001
bias_lr = 0.001
[data]
lighting = "off"
positions = "centre"
flips = false
[train]
batch_size = 12
steps = 8
log_every = 4
"""
HEAD = 'claim = "A claim"\nmeasure = "error"\nviews = "ten"\nseeds = [3, 4]\n'
VARIANT = """%s = { recipe = "RECIPE", settings = ['model.layers.conv1.then=["pool", "%s"]', "optim.momentum=%s"] }\n"""
RELU, TANH = VARIANT % ("relu", "relu", 0.9), VARIANT % ("tanh", "tanh", 0.5)  # which learns more slowly
BOTH = f"[variants]\n{RELU}{TANH}"
SEARCH = '[search]\nepochs = [2, 3]\n[search.choices]\ntame = ["optim.lr=0.001"]\nwild = ["optim.lr=1e30"]\n'
RARELY = ("--set", "train.checkpoint_every=4", "--set", "train.validate_every=1000000")


class Files(NamedTuple):
    """A data set, a folder of runs, and the runs' experiments."""

    folder: Path
    data: Path

    @property
    def out(self) -> Path:
        return self.folder / "runs"

    def file(self, text: str, name: str = "try") -> Path:
        (self.folder / "network.toml").write_text(RECIPE)
        path = self.folder / f"{name}.toml"
        path.write_text(text.replace("RECIPE", str(self.folder / "network.toml")))
        return path

    def reproduce(self, text: str, *more: object, name: str = "try") -> Result:
        return trainer("reproduce", self.file(text, name), "--data", self.data, "--out", self.out, *more)

    def start(self, text: str, *more: object) -> "subprocess.Popen[str]":
        words = map(str, (self.file(text), "--data", self.data, "--out", self.out, *more))
        line = [sys.executable, "-m", "trainer", "reproduce", *words]
        return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def record(self, name: str = "try") -> dict[str, Any]:
        return json.loads((self.out / f"{name}.json").read_text())


def written(out: Path) -> dict[str, int]:
    """Return when the checkpoints, and the logs, of runs were written, in nanoseconds."""
    files = [*out.glob("*/checkpoints/*"), *out.glob("*/metrics.jsonl"), *out.glob("*.log")]
    return {str(file.relative_to(out)): file.stat().st_mtime_ns for file in files}


def errors_of(run: Path) -> list[float]:
    """Return the training errors in a run's log, of an epoch each."""
    return [line["top1_error"] for line in metrics.read(run) if line["kind"] == "train"]


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # children import from there
    monkeypatch.setattr(crew, "POLL", 0.05)


@pytest.fixture
def files(small: Path, tmp_path: Path) -> Files:
    return Files(tmp_path, small)


@pytest.fixture(scope="module")
def compared(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Two variants of two seeds, trained and measured. Read only."""
    own = Files(tmp_path_factory.mktemp("compared"), small)
    result = own.reproduce(HEAD + BOTH, "--jobs", 2)
    assert result.exit_code == 0, result.output
    ended, table = result.output.splitlines()[:4], result.output.splitlines()[4:]
    assert sorted(ended) == [f"{name}-{seed}: 8 steps" for name in ("relu", "tanh") for seed in (3, 4)]
    assert table == [*own.record()["table"], str(own.out / "try.json")]
    return own


# ---- Measures ----


def test_error_rates_are_those_of_evaluate(compared: Files):
    rows = compared.record()["runs"]
    assert [(row["variant"], row["seed"], row["step"]) for row in rows] == [
        (variant, seed, 2 * EPOCH) for seed in (3, 4) for variant in ("relu", "tanh")
    ]
    for row in rows:
        run = compared.out / f"{row['variant']}-{row['seed']}"
        result = trainer("evaluate", "--data", compared.data, "--checkpoint", run, "--views", "ten", "--json")
        expected = json.loads(result.output.splitlines()[-1])["ten"]
        assert {key: row[key] for key in expected} == pytest.approx(expected), row


def test_the_table_has_means_and_differences_of_the_rows(compared: Files):
    record = compared.record()
    claim, header, *table = record["table"]
    assert claim == record["claim"] == "A claim"
    assert header.split("  ")[-1] == "less that of relu, by seed"
    relu, tanh = (
        np.array([row["top1_error"] for row in record["runs"] if row["variant"] == name]) for name in ("relu", "tanh")
    )
    estimates = [(values.mean(), values.std(ddof=1) / math.sqrt(2)) for values in (relu, tanh, tanh - relu)]
    numbers = [[float(number) for number in re.findall(r"-?\d+\.\d+", line)] for line in table]
    for shown, exact in zip(numbers, [estimates[0], (*estimates[1], *estimates[2])], strict=True):
        assert shown == pytest.approx(exact, abs=0.006)


def test_columns_are_measured_as_plain_numpy_does(compared: Files):
    """In the folder of other experiments' runs, which are not trained again; of p against every halving."""
    before = written(compared.out)
    columns = HEAD.replace('"error"', '"columns"') + "[variants]\n" + RELU
    result = compared.reproduce(columns, "--seed", 4, "--no-train", name="columns")
    assert result.exit_code == 0, result.output
    assert written(compared.out) == before
    (row,) = compared.record("columns")["runs"]
    kernels = load_file(checkpoints.files(compared.out / "relu-4")[-1])["weights.conv1.weight"].astype(float)
    energy = (kernels**2).sum((1, 2, 3))
    grey = 3 * (kernels.mean(1) ** 2).sum((1, 2))

    def colour(half: Any) -> float:
        return 1 - grey[half].sum() / energy[half].sum()

    assert row["colour"] == pytest.approx([colour(slice(0, 4)), colour(slice(4, 8))], rel=1e-5)
    y, x = np.mgrid[-10:10, -10:10]
    inside = (x**2 + y**2 > 0) & (x**2 + y**2 < 100)
    shares = []
    for kernel in kernels - kernels.mean((2, 3), keepdims=True):
        power = (np.abs(np.fft.fftshift(np.fft.fft2(kernel, s=(20, 20)), axes=(1, 2))) ** 2).sum(0)
        shares.append(abs((power * np.exp(2j * np.arctan2(y, x)))[inside].sum()) / power[inside].sum())
    means = [np.average(shares[half], weights=energy[half]) for half in (slice(0, 4), slice(4, 8))]
    assert row["orientation"] == pytest.approx(means, rel=1e-5)
    halves = [(list(half), [i for i in range(8) if i not in half]) for half in combinations(range(8), 4)]
    apart = np.array([abs(colour(one) - colour(other)) for one, other in halves])
    assert row["p"] == pytest.approx((apart >= apart[0] - 1e-12).mean(), abs=0.02)
    assert [line.split()[-1] for line in compared.record("columns")["table"][2:]] == 2 * [f"{row['p']:.3g}"]


# ---- Runs ----


def test_runs_are_trained_once_and_measure_the_same(compared: Files):
    before, record = written(compared.out), compared.record()
    assert len(before) >= 4 * 3
    for more in ((), ("--no-train",)):
        result = compared.reproduce(HEAD + BOTH, *more)
        assert result.exit_code == 0, result.output
        assert result.output.splitlines()[:-1] == record["table"]
        assert (written(compared.out), compared.record()) == (before, record)
    result = compared.reproduce(HEAD + BOTH, "--json", "--seed", 4, "--seed", 4, name="again")
    *events, done = [json.loads(line) for line in result.output.splitlines()]
    assert {event["event"] for event in events} == {"note", "progress"}
    assert done["runs"] == compared.record("again")["runs"] == [row for row in record["runs"] if row["seed"] == 4]
    assert done["files"] == [str(compared.out / "again.json")]
    assert written(compared.out) == before


def test_one_job_trains_the_same_runs_as_two(compared: Files, files: Files):
    result = files.reproduce(HEAD + BOTH, "--seed", 4)
    assert result.exit_code == 0, result.output
    assert files.record()["runs"] == [row for row in compared.record()["runs"] if row["seed"] == 4]
    for name in ("relu-4", "tanh-4"):
        assert_same_end(compared.out / name, files.out / name)


def test_another_runs_folder_is_refused(compared: Files, dataset: Path):
    before = written(compared.out)
    refused = compared.reproduce(HEAD + BOTH, "--set", "optim.lr=0.002", "--jobs", 2)
    one_line(refused, "relu-3: holds a run with optim.lr = 0.001, not 0.002; name another --out")
    other = Files(compared.folder, dataset)
    one_line(other.reproduce(HEAD + BOTH), "relu-3: ", "or another --out")
    assert written(compared.out) == before


def test_without_training_what_is_done_is_measured(compared: Files, files: Files):
    shutil.copytree(compared.out, files.out)
    checkpoints.files(files.out / "relu-3")[-1].unlink()  # its log is complete, its network is not
    (files.out / "try.json").unlink()
    before = written(files.out)
    assert files.reproduce(HEAD + BOTH, "--no-train").exit_code == 0
    assert files.record()["runs"] == compared.record()["runs"][1:]
    assert written(files.out) == before
    one_line(files.reproduce(HEAD + BOTH, "--no-train", "--seed", 5), "no run is done")


def test_a_target_that_is_not_reached_is_no_number(compared: Files, files: Files):
    """Nor does another variant take the place of the first one, which all are compared with."""
    shutil.copytree(compared.out, files.out)
    for seed in (3, 4):
        shutil.copytree(files.out / f"relu-{seed}", files.out / f"same-{seed}")
    relu, tanh = ([errors_of(files.out / f"{name}-{seed}")[-1] for seed in (3, 4)] for name in ("relu", "tanh"))
    target = (max(relu) + min(tanh)) / 2
    epochs = HEAD.replace('"error"', f'"epochs"\ntarget = {target}') + "[variants]\n"
    same = RELU.replace("relu =", "same =")
    for order, estimates in ((TANH + RELU + same, 1), (RELU + TANH + same, 2)):  # the second one: a ratio to relu
        result = files.reproduce(epochs + order, "--no-train")
        assert result.exit_code == 0, result.output
        assert f"its ratio to {order[:4]}, by seed\n" in result.output
        assert re.search(r"^same +2 .*$", result.output, re.MULTILINE)[0].count("±") == estimates
        assert re.search(rf"^tanh +2 +not reached; {min(tanh):.1f} % at the end$", result.output, re.MULTILINE)
    assert [row["epochs"] for row in files.record()["runs"] if row["variant"] == "tanh"] == [None, None]


def test_the_target_ends_runs_whose_rate_was_searched(files: Files):
    """The wild rate diverges and is the worst; the target, which the tame one reaches soon, ends a run without end."""
    epochs = HEAD.replace('"error"', '"epochs"\ntarget = 30.0').replace("[3, 4]", "[3]") + BOTH + SEARCH
    forever = ("--set", "train.steps=1000000", *RARELY)
    result = files.reproduce(epochs, *forever, "--jobs", 2)
    assert result.exit_code == 0, result.output
    record = files.record()
    assert [(row["variant"], row["choice"]) for row in record["runs"]] == [("relu", "tame"), ("tanh", "tame")]
    assert [trial["diverged"] for trial in record["search"]] == [False, True] * 2
    assert len(re.findall(r" wild +training has diverged +0$", "\n".join(record["table"]), re.MULTILINE)) == 2
    courses = {}
    for row, trial in zip(record["runs"], record["search"][::2]):
        errors = errors_of(files.out / f"{row['variant']}-tame-3")
        first = next(i for i, error in enumerate(errors) if error <= 30)
        assert [line["top1_error"] for line in trial["lines"]] == errors[: min(first + 1, 3)]
        grid = np.linspace(1, len(errors), 10_001)
        expected = grid[(np.interp(grid, range(1, len(errors) + 1), errors) <= 30).argmax()]
        assert row["epochs"] == pytest.approx(expected - 0.5, abs=1e-3 * len(errors))
        assert (row["step"], row["top1_error"]) == (EPOCH * (first + 1), errors[first])
        courses[row["variant"]] = [(i + 0.5, error) for i, error in enumerate(errors[: first + 1])]
    assert len(courses["relu"]) < 3 < len(courses["tanh"])  # cut, and gone on with
    sheet = Image.open(files.out / "try.png").convert("RGB")
    assert sheet == curves(courses, "Training error rate (%)", "Epochs", 30, "A claim")
    before = written(files.out)
    assert files.reproduce(epochs, *forever).exit_code == 0
    assert (written(files.out), files.record()) == (before, record)
    mild = epochs.replace("tame =", "mild =")  # of whose two choices one is there
    one_line(files.reproduce(mild, *forever, "--no-train"), "the search for rates is not finished")
    alone = re.sub("tame = .*\n", "", epochs)
    one_line(files.reproduce(alone, *forever), "every choice of the search has diverged; give it lower rates")
    wild = epochs[: epochs.index("[variants]")] + "[variants]\n" + RELU.replace("relu =", "relu-wild =")
    refused = files.reproduce(wild, *forever, "--set", "optim.lr=1e30")
    one_line(refused, "relu-wild-3: training has diverged; lower its rates, and delete the folder and relu-wild-3.log")
    assert written(files.out) == before


def test_a_run_that_diverged_is_named_below_the_table_of_the_others(compared: Files, files: Files):
    shutil.copytree(compared.out, files.out)
    wild = VARIANT.replace("momentum", "lr") % ("wild", "relu", 1e30)
    result = files.reproduce(HEAD + BOTH + wild, "--seed", 3)
    assert result.exit_code == 0, result.output
    record = files.record()
    assert record["runs"] == compared.record()["runs"][:2]
    assert "wild-3: training has diverged; it counts in no mean\n" in result.output
    assert [line[:5] for line in record["table"] if "wild" in line] == ["wild-"]
    result = files.reproduce(HEAD + "[variants]\n" + wild + RELU, "--seed", 3)  # relu does not take its place
    assert "less that of wild, by seed\nrelu " in result.output
    assert " points" not in result.output


def test_a_run_that_fails_is_named_with_its_log_and_goes_on_once_mended(root: Path, tmp_path: Path):
    files, kept = Files(tmp_path, root), tmp_path / "kept"
    shutil.copytree(root, kept)
    damage(root, *range(41))
    one = HEAD + "[variants]\n" + RELU
    result = files.reproduce(one)
    one_line(result, f"{files.out}/relu-3: ", " damaged ", f"({files.out}/relu-3.log); the same command goes on")
    assert result.output.count("Error") == 1
    assert not (files.out / "relu-4.log").exists()
    shutil.copytree(kept, root, dirs_exist_ok=True)
    assert files.reproduce(one, "--seed", 3).exit_code == 0


# ---- Signals ----


def children_of(parent: int, name: str) -> list[int]:
    """Return the process of the run of this name, which a command has started; none if the run has ended."""
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            words = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(words[1]) == parent and f"/{name}\0" in (folder / "cmdline").read_text():
                children.append(int(folder.name))
    return children


@pytest.mark.proof
def test_kills_and_signals_leave_no_orphans_and_the_same_bytes(files: Files, tmp_path: Path):
    """Of a run, of the command, and of both: each time the same command goes on."""
    long = HEAD.replace("[3, 4]", "[3]") + BOTH
    options = ("--set", "train.steps=160", *RARELY)
    whole = Files(tmp_path / "whole", files.data)
    whole.folder.mkdir()
    assert whole.reproduce(long, *options, "--jobs", 2).exit_code == 0
    run, log = files.out / "relu-3", files.out / "relu-3.log"
    for number, whom, code in (
        (signal.SIGKILL, "run", 2),
        (signal.SIGTERM, "command", 143),
        (signal.SIGINT, "command", 130),
        (signal.SIGKILL, "command", -9),
    ):
        command, due = files.start(long, *options, "--jobs", 2), (checkpoints.newest_step(run) or 0) + 1
        until(command, lambda due=due: (checkpoints.newest_step(run) or 0) >= due)
        children = [*children_of(command.pid, "relu-3"), *children_of(command.pid, "tanh-3")]
        os.kill(children[0] if whom == "run" else command.pid, number)
        errors = command.communicate(timeout=60)[1]
        assert command.returncode == code, errors
        assert all(map(gone, children))
        last = log.read_text().splitlines()[-1]
        if whom == "run":
            assert errors == f"Error: {run}: ended by SIGKILL ({log}); the same command goes on\n"
        else:
            step = checkpoints.newest_step(run)
            assert last == f"Error: SIGTERM: stopped and saved after step {step}; go on by --resume"
            ended = {143: "Error: terminated", 130: "Error: interrupted", -9: ""}[code]
            assert errors == ended + "; runs that trained are saved; the same command goes on\n" * bool(ended)
        assert not (files.out / "try.json").exists()
    result = files.reproduce(long, *options, "--jobs", 2)  # so many threads as before, on which the last bits depend
    assert result.exit_code == 0, result.output
    assert files.record()["runs"] == whole.record()["runs"]
    for name in ("relu-3", "tanh-3"):
        assert_same_end(whole.out / name, files.out / name)

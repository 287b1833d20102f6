"""Runs of a network of a few hundred weights, for the tests: in this process, or in one of their own."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from click.testing import CliRunner, Result

from conftest import ROOT
from trainer import checkpoint as checkpoints
from trainer.__main__ import main
from trainer.metrics import read

WIDTHS = {"conv1": 4, "conv2": 8, "conv3": 8, "conv4": 8, "conv5": 8, "fc6": 32, "fc7": 32}
TINY = (
    *(f"model.layers.{name}.width={width}" for name, width in WIDTHS.items()),
    "train.batch_size=12",
    "optim.batch_size=12",
    "train.log_every=1",
    "train.validate_every=3",
)


def trainer(*arguments: object, page: bool = True) -> Result:
    """A command of the trainer; of training without its last act, the page, which takes longer than a few steps."""
    not_drawn = mock.patch("trainer.train.drawn", return_value=[Path("not drawn")])
    with nullcontext() if page else not_drawn:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])


def options(data: Path, run: Path, *settings: str, recipe: str = "tiny") -> list[str]:
    """The options of `train` for a new run."""
    words = ["--data", str(data), "--recipe", recipe, "--out", str(run), "--devices", "cpu,cpu"]
    return [*words, *(word for setting in (*TINY, *settings) for word in ("--set", setting))]


def train(data: Path, run: Path, steps: int, *settings: str, recipe: str = "tiny", page: bool = False) -> Result:
    """A new run of so many steps."""
    return trainer("train", *options(data, run, f"train.steps={steps}", *settings, recipe=recipe), page=page)


def resume(data: Path, run: Path, *settings: str, more: tuple[str, ...] = ()) -> Result:
    """Go on with a run."""
    words = (word for setting in settings for word in ("--set", setting))
    return trainer("train", "--data", data, "--out", run, "--devices", "cpu,cpu", "--resume", *words, *more, page=False)


def start(*words: object) -> subprocess.Popen[str]:
    """`python -m trainer train` in a process of its own."""
    command = [sys.executable, "-m", "trainer", "train", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def one_line(result: Result, *words: str) -> None:
    """A mistake of the user's, reported as it should be."""
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) == 1, result.output
    for word in words:
        assert word in result.output


def without_time(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in read(run)]


def assert_same_end(one: Path, other: Path) -> None:
    """Both runs ended with the same bytes of weights and velocities, and with the same metrics but for times."""
    mine, theirs = checkpoints.load(one), checkpoints.load(other)
    assert mine.step == theirs.step
    assert (mine.loader, mine.progress) == (theirs.loader, theirs.progress)
    for kind in ("weights", "velocity"):
        for name, value in getattr(mine, kind).items():
            assert torch.equal(value, getattr(theirs, kind)[name]), (kind, name)
    assert without_time(one) == without_time(other)

"""Runs of a network of a few hundred weights, for the tests: in this process, or in one of their own."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner, Result

from conftest import ROOT
from crew import Crew, Ended
from trainer import checkpoint as checkpoints
from trainer.__main__ import main
from trainer.checkpoint import Checkpoint
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
    """Run a command of the trainer; of training without its last act, the page, which takes longer than a few steps."""
    not_drawn = mock.patch("trainer.figures.page.draw", return_value=([], ["not drawn"]))
    with nullcontext() if page else not_drawn:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])


Runs = Callable[[int, list[str]], list[Ended]]


@pytest.fixture(scope="module", name="runs")
def shared_runs() -> Iterator[Runs]:
    """Return a function that runs a command in so many processes."""
    crew: list[Crew] = []

    def run(processes: int, line: list[str]) -> list[Ended]:
        if processes == 1:
            result = trainer(*line, page=False)
            return [Ended(result.exit_code, result.output)]
        crew.extend([] if crew else [Crew(3)])
        return crew[0].run(*[line] * processes)

    yield run
    for one in crew:
        one.end()


def options(data: Path, run: Path, *settings: str, recipe: str = "tiny") -> list[str]:
    """Return the options of `train` for a new run."""
    words = ["--data", str(data), "--recipe", recipe, "--out", str(run), "--devices", "cpu,cpu"]
    return [*words, *(word for setting in (*TINY, *settings) for word in ("--set", setting))]


def train(
    data: Path, run: Path, steps: int, *settings: str, page: bool = False, more: tuple[object, ...] = ()
) -> Result:
    """Begin a run of so many steps."""
    return trainer("train", *options(data, run, f"train.steps={steps}", *settings), *more, page=page)


def resume(data: Path, run: Path, *settings: str, more: tuple[object, ...] = ()) -> Result:
    """Go on with a run."""
    return trainer("train", *resumed(data, run, *settings), *more, page=False)


def resumed(data: Path, run: Path, *settings: str) -> list[str]:
    """Return the options of `train` that go on with a run."""
    words = ["--data", str(data), "--out", str(run), "--devices", "cpu,cpu", "--resume"]
    return [*words, *(word for setting in settings for word in ("--set", setting))]


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Start `python -m trainer train` in a process of its own."""
    command = [sys.executable, "-m", "trainer", "train", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def one_line(result: Result, *words: str) -> None:
    """Check that a mistake of the user's is reported in one line."""
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) == 1, result.output
    for word in words:
        assert word in result.output


def of_november_2026(checkpoint: Checkpoint, recipe: dict[str, Any] | None = None) -> bytes:
    """Return the bytes of a checkpoint as the code of November 2026 wrote it; `recipe`: other values than its own."""
    values = {"format": 2, "step": checkpoint.step, "recipe": recipe or asdict(checkpoint.recipe)}
    values |= {"classes": checkpoint.classes, "dataset": checkpoint.dataset, "loader": checkpoint.loader}
    progress = {key: value for key, value in checkpoint.progress.items() if key != "pending"}
    values |= {"progress": progress, "history": checkpoint.history, "tensors": sorted(checkpoint.weights)}
    header: dict[str, Any] = {"__metadata__": {"penstock": json.dumps(values)}}
    data = b""
    for kind, tensors in (("weights", checkpoint.weights), ("velocity", checkpoint.velocity)):
        for name, value in sorted(tensors.items()):
            start, data = len(data), data + value.numpy().tobytes()
            shape = list(value.shape)
            header[f"{kind}.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def beginning(step: int, steps: int | None = None) -> tuple[dict[str, Any], dict[str, Any], tuple[()]]:
    """Return loader, progress and history of a checkpoint that no training wrote."""
    schedule, window = {"best": None, "since": 0, "fallen": 0}, {"losses": 0.0, "images": 0}
    progress = {"schedule": schedule, "window": window, "steps": step if steps is None else steps, "over": False}
    return {"step": step, "bad": []}, progress, ()


def assert_same_end(one: Path, other: Path) -> None:
    """Check that two runs ended with the same bytes of weights and velocities, and the same metrics but for times.

    And that they have the same best checkpoint.
    """
    for path in (Path(), Path("checkpoints/best.safetensors")):
        first, second = checkpoints.load(one / path), checkpoints.load(other / path)
        assert first.step == second.step, path
        assert (first.loader, first.progress) == (second.loader, second.progress), path
        for kind in ("weights", "velocity"):
            for name, value in getattr(first, kind).items():
                assert torch.equal(value, getattr(second, kind)[name]), (path, kind, name)
    metrics = [[{**line, "time": None} for line in read(run)] for run in (one, other)]
    assert metrics[0] == metrics[1]

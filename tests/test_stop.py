"""Runs that end before their time: killed at any moment, or asked to end, they go on to the same bytes."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from runs import assert_same_end, options, resume, start, train
from trainer import checkpoint as checkpoints
from trainer.metrics import read

# log lines, validations and checkpoints fall on different steps
HABITS = ("train.log_every=4", "train.validate_every=10", "train.checkpoint_every=7", "data.lighting_until=40")


def written(run: Path) -> int:
    """The last step that a run has told of."""
    lines = read(run)
    return lines[-1]["step"] if lines else 0


def wait_for(step: int, run: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while process.poll() is None and written(run) < step and time.monotonic() < end:
        time.sleep(0.005)


def killed(data: Path, run: Path, steps: int, kills: int, chance: random.Random) -> int:
    """Start a run, kill it at so many random moments, resume it each time. → how often it was killed."""
    happened = 0
    words = options(data, run, f"train.steps={steps}", *HABITS)
    for _ in range(kills):
        process = start(*words)
        wait_for(written(run) + chance.randrange(1, 2 * steps // kills), run, process)
        time.sleep(chance.random() / 20)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        happened += process.returncode == -signal.SIGKILL
        if checkpoints.files(run):  # else the first, of step 0, was not whole: the same command starts anew
            words = ["--data", data, "--out", run, "--devices", "cpu,cpu", "--resume"]
    return happened


@pytest.mark.proof
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_steps_ends_with_the_same_bytes(kills: int, dataset: Path, tmp_path: Path):
    steps = 30 * kills
    done = start(*options(dataset, tmp_path / "whole", f"train.steps={steps}", *HABITS)).communicate(timeout=600)[0]
    assert "checkpoint" in done
    assert killed(dataset, tmp_path / "parts", steps, kills, random.Random(kills)) >= kills * 3 // 4
    lost = written(tmp_path / "parts") - checkpoints.load(tmp_path / "parts").step
    assert lost <= 2 * 7 + 4  # the steps since the last checkpoint; one more may have been in the making
    if checkpoints.load(tmp_path / "parts").step < steps:
        last = start("--data", dataset, "--out", tmp_path / "parts", "--devices", "cpu,cpu", "--resume")
        last.communicate(timeout=600)
        assert last.returncode == 0
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.proof
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(number: int, code: int, dataset: Path, tmp_path: Path):
    habits = ("train.log_every=1", "train.validate_every=1000", "train.checkpoint_every=1000")
    process = start(*options(dataset, tmp_path / "run", "train.steps=1000", *habits))
    wait_for(3, tmp_path / "run", process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    step = checkpoints.load(tmp_path / "run").step
    assert step == written(tmp_path / "run") >= 3
    last = output.strip().splitlines()[-1]
    assert f"stopped and saved after step {step}; go on by --resume" in last
    assert signal.Signals(number).name in last
    assert "Traceback" not in output


@pytest.mark.proof
def test_what_was_under_way_at_a_signal_is_not_lost(dataset: Path, tmp_path: Path):
    """A run asked to end in the middle of a log line's steps ends, resumed, as one that was not."""
    assert train(dataset, tmp_path / "whole", 12, *HABITS).exit_code == 0
    process = start(*options(dataset, tmp_path / "parts", "train.steps=12", *HABITS))
    wait_for(4, tmp_path / "parts", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    if process.returncode == 143:  # else it was faster than the signal
        assert resume(dataset, tmp_path / "parts").exit_code == 0
    assert_same_end(tmp_path / "whole", tmp_path / "parts")

"""Runs that end before their time: killed at any moment, asked to end, out of disk; they go on to the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from crew import environments
from pipeline import manifest
from pipeline.online.samples import SampleReader
from runs import Runs, assert_same_end, options, resume, resumed, shared_runs, start, train  # noqa: F401 – a fixture
from stored import damage
from trainer import checkpoint as checkpoints
from trainer import data as loaders
from trainer import validation
from trainer.evaluate import predictions
from trainer.metrics import read

# log lines, validations and checkpoints fall on different steps
HABITS = ("train.log_every=4", "train.validate_every=10", "train.checkpoint_every=7", "data.lighting_until=40")


def written(run: Path) -> int:
    """Return the last step in a run's metrics."""
    lines = read(run)
    return lines[-1]["step"] if lines else 0


def wait_for(step: int, run: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while process.poll() is None and written(run) < step and time.monotonic() < end:
        time.sleep(0.005)


@pytest.mark.proof
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_steps_ends_with_the_same_bytes(kills: int, dataset: Path, tmp_path: Path):
    """Each time at a random moment; between two log lines, too."""
    steps, chance, killed = 30 * kills, random.Random(kills), 0
    assert train(dataset, tmp_path / "whole", steps, *HABITS).exit_code == 0
    run = tmp_path / "parts"
    words = options(dataset, run, f"train.steps={steps}", *HABITS)
    for _ in range(kills):
        process = start(*words)
        wait_for(written(run) + chance.randrange(1, 2 * steps // kills), run, process)
        time.sleep(chance.random() / 20)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        killed += process.returncode == -signal.SIGKILL
        if checkpoints.files(run):  # else the first, of step 0, was not whole: the same command starts anew
            words = resumed(dataset, run)
    assert killed >= kills * 3 // 4
    newest = checkpoints.load(run)
    assert written(run) - newest.step <= 2 * 7 + 4  # since the last checkpoint; one more may have been in the making
    if newest.step < steps or newest.progress["pending"]:
        assert resume(dataset, run).exit_code == 0
    assert_same_end(tmp_path / "whole", run)


@pytest.mark.proof
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends(number: int, code: int, dataset: Path, tmp_path: Path):
    run, habits = tmp_path / "run", ("train.log_every=1", "train.validate_every=1000", "train.checkpoint_every=1000")
    process = start(*options(dataset, run, "train.steps=1000", *habits))
    wait_for(3, run, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    step = checkpoints.load(run).step
    assert step == written(run) >= 3
    last = output.strip().splitlines()[-1]
    assert f"{signal.Signals(number).name}: stopped and saved after step {step}; go on by --resume" in last
    assert "Traceback" not in output


def interrupted(act: Callable[[int], object], after: int) -> Callable[..., Iterator[Any]]:
    """Return `predictions` that calls act(batch) before each batch of the validations after the first `after` ones."""
    validations: list[int] = []

    def slow(*arguments: Any, **options: Any) -> Iterator[Any]:
        validations.append(0)
        for batch, rows in enumerate(predictions(*arguments, **options)):
            if len(validations) > after:
                act(batch)
            yield rows

    return slow


@pytest.mark.parametrize(("after", "step"), [(0, 2), (1, 4), (2, 5)])  # the last one is at the end of the run
def test_a_signal_ends_a_validation_at_once_and_resume_repeats_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, step: int
):
    """It has nine batches, and two of them are seen. Nothing is lost, and nothing counts twice."""
    settings, seen = ("train.validate_every=2", "train.log_every=2"), []
    monkeypatch.setitem(loaders.BATCH_SIZE, "centre", 1)
    assert train(dataset, tmp_path / "whole", 5, *settings).exit_code == 0

    def act(batch: int) -> None:
        seen.append(batch)
        if batch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "predictions", interrupted(act, after))
        result = train(dataset, tmp_path / "run", 5, *settings)
        ended = f"Error: SIGTERM: stopped and saved after step {step}"
        line = f"{ended}; its validation was not finished, --resume repeats it"
        assert (result.exit_code, result.stderr.splitlines(), seen) == (143, [line], [0, 1])
        newest = checkpoints.load(tmp_path / "run")
        assert (newest.step, newest.progress["pending"]) == (step, True)
        assert [entry["step"] for entry in read(tmp_path / "run") if entry["kind"] == "validation"] == [2, 4][:after]
    result = resume(dataset, tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert_same_end(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    ("split", "end"),
    [
        ("train", "after step 0; go on by --resume"),
        ("val", "after step 5; its validation was not finished, --resume repeats it"),
    ],
)
def test_a_signal_ends_a_wait_for_data(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, end: str
):
    """As for workers that are gone, or a disk that stands still: until the loader is closed."""
    samples, read = manifest.load(dataset).split(split).samples, SampleReader.read
    closed = threading.Event()

    def blocked(reader: SampleReader, *arguments: Any) -> Any:
        if len(reader) == samples and not closed.is_set():
            threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
            assert closed.wait(20)
        return read(reader, *arguments)

    monkeypatch.setattr(SampleReader, "read", blocked)
    monkeypatch.setattr(SampleReader, "stop", lambda reader: closed.set())
    result = train(dataset, tmp_path / "run", 5, "train.validate_every=5")
    assert (result.exit_code, result.stderr) == (143, f"Error: SIGTERM: stopped and saved {end}\n")


def test_a_network_that_diverges_in_a_validation_leaves_one_from_before(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Even where one checkpoint alone is kept; a checkpoint that diverges again would be of no use."""
    assert train(dataset, tmp_path / "run", 2, "train.keep=1", "train.validate_every=1").exit_code == 0
    result = resume(dataset, tmp_path / "run", "train.steps=3", "optim.lr=1e38")
    assert result.exit_code == 2
    assert "the checkpoint of step 2 is from before: lower optim.lr" in result.stderr
    assert [path.stem for path in checkpoints.files(tmp_path / "run")] == ["step-00000002"]


SLOW = """
import sys, time
from trainer import data, figures, validation
from trainer.__main__ import main
from trainer.evaluate import predictions
from trainer.figures import page

def slow(*arguments, **options):
    for rows in predictions(*arguments, **options):
        print("validating", flush=True)
        time.sleep(0.5)
        yield rows

data.BATCH_SIZE["centre"], validation.predictions, page.draw = 1, slow, lambda *_: ([], ["not drawn"])
main(["train", *sys.argv[1:]])
"""


@pytest.mark.proof
@pytest.mark.parametrize(("count", "number", "code"), [(1, "SIGKILL", -9), (2, "SIGTERM", 143), (3, "SIGINT", 130)])
def test_processes_that_end_in_a_validation_go_on(
    dataset: Path, tmp_path: Path, runs: Runs, count: int, number: str, code: int
):
    """The signal goes to the last of them. Of three the last bits may differ after a resume."""
    words = options(dataset, tmp_path / "run", "train.steps=5")
    ended = runs(count, ["train", *options(dataset, tmp_path / "whole", "train.steps=5")])
    assert [process.exit_code for process in ended] == [0] * count, ended
    command, pipe = [sys.executable, "-c", SLOW, *words], subprocess.PIPE
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=pipe, stderr=pipe, text=True)
        for variables in environments(count)
    ]
    assert processes[-1].stdout is not None
    assert list(islice((line for line in processes[-1].stdout if line == "validating\n"), 2))
    processes[-1].send_signal(signal.Signals[number])
    errors = [process.communicate(timeout=60)[1] for process in processes]
    if number != "SIGKILL":
        end = "stopped and saved after step 3; its validation was not finished, --resume repeats it"
        assert [error.splitlines() for error in errors] == [
            [f"Error: another process was asked to end: {end}"],
            *[[]] * (count - 1),
        ]
    assert processes[-1].returncode == code, errors
    assert checkpoints.load(tmp_path / "run").progress["pending"]
    ended = runs(count, ["train", *resumed(dataset, tmp_path / "run")])
    assert [process.exit_code for process in ended] == [0] * count, ended
    if count < 3:
        assert_same_end(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=pytest.mark.proof)])
def test_more_bad_pictures_than_may_be_end_a_validation(dataset: Path, tmp_path: Path, processes: int, runs: Runs):
    """One in each of two processes of three: they see nothing of each other's."""
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    damage(copy, 1, 4, split="val")
    line = ["train", *options(copy, tmp_path / "run", "train.steps=2", "data.max_bad=1")]
    ended = runs(processes, line)
    assert {process.exit_code for process in ended} == {2}
    count = "samples that failed: 2, allowed: max_bad=1"
    if processes > 1:
        count = f"Error: {copy}: 2 samples of val failed in all processes, allowed: data.max_bad=1"
    assert f"{count}; mend it: python tools/verify_shards.py {copy} --repair RAW; the run is saved" in ended[0].output
    assert checkpoints.load(tmp_path / "run").progress["pending"]


@pytest.mark.proof
def test_a_change_holds_though_the_run_is_killed_before_its_next_checkpoint(dataset: Path, tmp_path: Path):
    assert train(dataset, tmp_path / "run", 2).exit_code == 0
    rare = ("train.steps=500", "train.checkpoint_every=500", "train.validate_every=500", "optim.lr=0.003")
    process = start(*resumed(dataset, tmp_path / "run", *rare))
    wait_for(3, tmp_path / "run", process)
    process.kill()
    process.communicate()
    saved = checkpoints.load(tmp_path / "run")
    assert (saved.step, saved.recipe.optim.lr) == (2, 0.003)


@pytest.mark.proof
def test_a_listener_that_leaves_does_not_end_the_run(dataset: Path, tmp_path: Path):
    process = start(*options(dataset, tmp_path / "run", "train.steps=6"))
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert checkpoints.load(tmp_path / "run").step == 6


@pytest.mark.proof
def test_a_disk_that_is_full_at_a_checkpoint_loses_nothing(dataset: Path, tmp_path: Path):
    """A file system with room for three checkpoints of 114 kB, and not for a fourth."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=440k", "penstock", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    habits = ("train.checkpoint_every=3", "train.keep=9", "train.validate_every=100")
    try:
        process = start(*options(dataset, small / "run", *habits, "train.steps=12"))
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 2, output
        kept, last = checkpoints.load(small / "run").step, output.strip().splitlines()[-1]
        assert kept > 0
        assert "No space left on device" in last
        assert f"the checkpoint of step {kept} stays; make room, then go on by --resume" in last
        assert "Traceback" not in output
        shutil.copytree(small / "run", tmp_path / "moved")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert resume(dataset, tmp_path / "moved").exit_code == 0
    assert train(dataset, tmp_path / "whole", 12, *habits).exit_code == 0
    assert_same_end(tmp_path / "whole", tmp_path / "moved")


@pytest.mark.proof
@pytest.mark.parametrize(
    ("own", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_threads_spin_briefly_unless_the_user_chose(own: dict[str, str], spins: str):
    """As libgomp displays its settings: beside busy programs long spins cost most of a step."""
    others = {name: text for name, text in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    process = start("--help", env=others | {"OMP_DISPLAY_ENV": "VERBOSE"} | own)
    assert f"GOMP_SPINCOUNT = '{spins}'" in process.communicate(timeout=60)[0]

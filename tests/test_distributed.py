"""Training and evaluation in several processes against one process; a run saved with two goes on with any number."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import runs
from conftest import ROOT
from crew import Crew, Ended, launched, machines, until
from evaluated import Made, shared_made  # noqa: F401  # a fixture
from stored import damage
from trainer import checkpoint as checkpoints
from trainer.metrics import read
from trainer.recipe import flat
from workers import started, without_shards

pytestmark = pytest.mark.proof  # processes of torchrun

Pair = tuple[Path, list[Ended]]  # a run of two processes, and how each ended
STEPS, SAVED, FEW = 20, 8, 4
# first weights and rates that move the loss, and not so far that rounding grows; conv1 is frozen half-way; of 41
# samples the last batch of an epoch has one, for the first process; SAVED is between two log lines
SETTINGS = (
    *(f"model.layers.{name}.sd=0.1" for name in runs.WIDTHS),
    *("optim.lr=0.003", "optim.bias_lr=0.003", "optim.layers.conv1={drops=[], frozen_from=45}"),
    *("train.batch_size=8", "optim.batch_size=8", "data.max_bad=3", "train.seed=11"),
    *("train.log_every=3", "train.validate_every=10", f"train.checkpoint_every={SAVED}", "train.keep=9"),
)
ENDED = "Error: another process of this job has ended before its time; the reason is in its own line"
ON = "go on by --resume"
BAD = (5, 30)  # samples whose bytes are damaged


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    crew = Crew(3)
    yield crew
    crew.end()


@pytest.fixture(scope="module")
def data(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dataset` with two damaged samples. Read only."""
    root = Path(shutil.copytree(dataset, tmp_path_factory.mktemp("damaged") / "dataset"))
    damage(root, *BAD)
    return root


@pytest.fixture(scope="module")
def alone(data: Path, crew: Crew, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process. Read only."""
    run = tmp_path_factory.mktemp("alone") / "run"
    (ended,) = crew.run(training(data, run))
    assert ended.exit_code == 0, ended.output
    return run


@pytest.fixture(scope="module")
def pair(data: Path, crew: Crew, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """That of two processes. Read only."""
    run = tmp_path_factory.mktemp("pair") / "run"
    return run, crew.run(*[training(data, run)] * 2)


def training(data: Path, run: Path, *settings: str, steps: int = STEPS) -> list[str]:
    return ["train", *runs.options(data, run, f"train.steps={steps}", *SETTINGS, *settings)]


def resumed(data: Path, run: Path) -> list[str]:
    return ["train", *runs.resumed(data, run)]


def exit_codes(ended: list[Ended]) -> list[int]:
    return [process.exit_code for process in ended]


def assert_equal_at_first(run: Path, other: Path, start: int = 0) -> None:
    """Check the same steps, and FEW of them from `start` on to 1e-5.

    From then on float32's rounding may grow, on some data a thousandfold in five steps, as it does with another number
    of threads. Plain averaging of gradients over unequal parts would be off by 1 % at once.
    """
    lines, expected_lines = read(run), read(other)
    assert [(line["kind"], line["step"]) for line in lines] == [(line["kind"], line["step"]) for line in expected_lines]
    near = [pair for pair in zip(lines, expected_lines) if start < pair[0]["step"] <= start + FEW]
    assert near
    for line, expected in near:
        for key in {"loss", "top1_error", "nll"} & line.keys():
            assert line[key] == pytest.approx(expected[key], rel=1e-5)
    for step in (SAVED, STEPS):
        saved, expected = (checkpoints.load(checkpoints.step_file(folder, step)) for folder in (run, other))
        assert saved.progress["schedule"].keys() == expected.progress["schedule"].keys()
        assert saved.loader == expected.loader


@pytest.mark.parametrize("name", ["data", "plain"])
def test_several_processes_train_as_one_in_float64(
    request: pytest.FixtureRequest, crew: Crew, tmp_path: Path, name: str
):
    """Losses, errors and weights, over all steps: with dropout, uneven and empty parts, a frozen layer."""
    root, run = request.getfixturevalue(name), [tmp_path / str(count) for count in range(4)]
    for count in (1, 2, 3):
        ended = crew.run(*[training(root, run[count])] * count, double=True)
        assert exit_codes(ended) == [0] * count, ended
    first = load_file(checkpoints.step_file(run[1], 0))
    for count in (2, 3):
        for line, expected in zip(read(run[count]), read(run[1]), strict=True):
            one, other = (flat({**values, "time": 0, "kind": len(values["kind"])}) for values in (line, expected))
            assert one == pytest.approx(other, rel=1e-14, abs=0)
        for step in (SAVED, STEPS):
            values, expected = (load_file(checkpoints.step_file(folder, step)) for folder in (run[count], run[1]))
            for key, value in expected.items():
                assert value.dtype == torch.float64
                assert float((values[key] - value).norm()) <= 1e-14 * float(value.norm()), (count, step, key)
                assert step < STEPS or not torch.equal(value, first[key])


def test_two_processes_train_as_one(alone: Path, pair: Pair):
    run, (first, second) = pair
    assert (first.exit_code, second.exit_code) == (0, 0), first.output
    assert all(line.endswith("stands in") for line in second.output.splitlines())  # of what it met itself
    assert all(f": sample {sample} (key " in first.output + second.output for sample in BAD)
    assert "two columns on cpu and cpu, in each of 2 processes" in first.output
    assert_equal_at_first(run, alone)
    spread = [line["loss"] for line in read(alone) if line["kind"] == "train"]
    assert max(spread) - min(spread) > 0.01  # else it would prove little
    assert checkpoints.load(run).loader["bad"] == list(BAD)


def test_three_processes_train_as_one(data: Path, alone: Path, crew: Crew, tmp_path: Path):
    ended = crew.run(*[training(data, tmp_path / "run")] * 3)
    assert exit_codes(ended) == [0, 0, 0], ended
    assert_equal_at_first(tmp_path / "run", alone)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_saved_with_two_processes_goes_on(
    data: Path, alone: Path, pair: Pair, crew: Crew, tmp_path: Path, count: int
):
    run = Path(shutil.copytree(pair[0], tmp_path / "run"))
    for path in checkpoints.files(run):
        if path > checkpoints.step_file(run, SAVED):
            path.unlink()
    first, *others = ended = crew.run(*[resumed(data, run)] * count)
    assert exit_codes(ended) == [0] * count, ended
    assert all(line.endswith("stands in") for other in others for line in other.output.splitlines())  # read ahead
    assert_equal_at_first(run, alone, SAVED)
    assert (f"from step {SAVED}: processes 2 → {count}" in first.output) == (count != 2)
    assert [entry["processes"] for entry in checkpoints.load(run).history] == [2, count]
    if count == 2:
        runs.assert_same_end(run, pair[0])


def test_processes_that_differ_are_refused(data: Path, dataset: Path, plain: Path, crew: Crew, tmp_path: Path):
    run = tmp_path / "run"
    for other, *messages in (
        (training(data, run, "optim.momentum=0.5"), "has optim.momentum 0.5, and the first process", "has 0.9"),
        (training(plain, run), "has the data set ", "has ", "start all processes alike"),
        (resumed(data, run), "has --resume True", "has False"),
    ):
        first, second = crew.run(training(data, run), other)
        assert (first.exit_code, second.exit_code, second.output) == (2, 2, "")
        assert first.output.startswith("Error: process 1, on ")
        assert len(first.output.splitlines()) == 1, first.output
        for word in messages:
            assert word in first.output
        assert not run.exists()


def test_what_one_process_cannot_do_all_refuse(data: Path, crew: Crew, tmp_path: Path):
    run, nowhere = tmp_path / "run", tmp_path / "nowhere"
    first, second, third = ended = crew.run(training(data, run), training(nowhere, run), training(nowhere, run))
    assert exit_codes(ended) == [2, 2, 2]
    assert second.output.startswith(f"Error: {nowhere}")  # once by who met it, and once where people look
    assert first.output == second.output.replace("Error: ", "Error: process 1: ")
    assert third.output == ""
    assert not run.exists()


def test_bad_samples_of_all_processes_count(data: Path, crew: Crew, tmp_path: Path):
    """Each process meets one, and one may fail: what is saved counts no more, for the other may be mended."""
    run = tmp_path / "run"
    first, second = crew.run(*[training(data, run, "data.max_bad=1", "train.seed=2012")] * 2)
    assert (first.exit_code, second.exit_code) == (2, 2)
    message = f"Error: {data}: 2 samples of train failed in all processes, allowed: data.max_bad=1; mend it: python "
    assert message in first.output
    assert f"; the run is saved after step {SAVED}: go on by --resume, or unmended by --resume --set " in first.output
    assert "Error" not in second.output
    saved = checkpoints.load(run)
    assert (saved.step, len(saved.loader["bad"])) == (SAVED, 1)
    ended = crew.run(*[[*resumed(data, run), "--set", "data.max_bad=2", "--set", f"train.steps={SAVED + 1}"]] * 2)
    assert exit_codes(ended) == [0, 0], ended
    assert checkpoints.load(run).loader["bad"] == list(BAD)


@pytest.mark.parametrize(("count", "batch_size"), [(2, 7), (3, 15)])  # of the last batch of 15 two have no image
def test_evaluation_in_several_processes_is_that_of_one(
    made: Made, crew: Crew, tmp_path: Path, count: int, batch_size: int
):
    def evaluation(processes: int) -> tuple[dict[str, Any], np.ndarray]:
        file = tmp_path / f"{processes}.npz"
        words = ["evaluate", *made.options, "--json", "--batch-size", batch_size, "--save-probabilities", file]
        first, *others = crew.run(*[words] * processes)
        assert first.exit_code == 0, first.output
        assert others == [Ended(0, "")] * (processes - 1)
        with np.load(file, allow_pickle=False) as arrays:
            return json.loads(first.output.splitlines()[-1]), arrays["probabilities"]

    (one, expected), (several, probabilities) = evaluation(1), evaluation(count)
    for views in ("centre", "ten"):
        assert several.pop(views) == pytest.approx(one.pop(views), abs=1e-5)
    for own, other in zip(several.pop("classes"), one.pop("classes"), strict=True):
        assert own == pytest.approx(other, abs=1e-6)
    assert several == one
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-7)


def test_evaluation_refuses_once_and_before_it_begins(made: Made, crew: Crew, tmp_path: Path):
    words = ["evaluate", *made.options]
    for first, second, message in (
        ([*words, "--checkpoint", tmp_path], [*words, "--checkpoint", tmp_path], f"Error: {tmp_path}: no checkpoint"),
        (words, [*words, "--batch-size", "5"], "has --batch-size 5, and the first process, on "),
    ):
        ended = crew.run(first, second)
        assert exit_codes(ended) == [2, 2]
        assert len(ended[0].output.splitlines()) == 1, ended
        assert message in ended[0].output
        assert ended[1].output == ""


def test_where_one_process_fails_the_other_ends_in_a_line_too(made: Made, crew: Crew, tmp_path: Path):
    damaged = replace(made, data=Path(shutil.copytree(made.data, tmp_path / "damaged")))
    damage(damaged.data, 4, split="val")  # of the first batch of 7, and the second process
    words = ["evaluate", *damaged.options, "--batch-size", 7, "--save-probabilities", tmp_path / "a.npz"]
    first, second = crew.run(words, words)
    assert (first, second.exit_code) == (Ended(2, f"{ENDED}\n"), 2)
    assert second.output.startswith(f"Error: {damaged.data}/val/val-000000.tar: damaged at sample 4 ")
    assert not list(tmp_path.glob("a.npz*"))


def test_processes_that_nobody_started(made: Made, monkeypatch: pytest.MonkeyPatch):
    for size, message in (("2", "the processes do not find each other"), ("", "not a number")):
        monkeypatch.setenv("WORLD_SIZE", size)
        result = runs.trainer("evaluate", *made.options)
        runs.one_line(result, f"WORLD_SIZE={size}", message, "start them with torchrun, or unset WORLD_SIZE")


def test_numbers_that_are_not_finite_are_reported_once(dataset: Path, crew: Crew, tmp_path: Path):
    first, second = crew.run(*[training(dataset, tmp_path / "run", "optim.lr=1e30", "train.log_every=5")] * 2)
    assert (first.exit_code, second.exit_code, second.output) == (2, 2, "")
    assert "is not a finite number" in first.output
    assert "the checkpoint of step 0 is from before" in first.output


def test_a_signal_to_one_process_ends_and_saves(dataset: Path, tmp_path: Path):
    run = tmp_path / "run"
    first, second = launched(2, training(dataset, run, steps=10**6))
    until(lambda: len(checkpoints.files(run)) > 1, first)
    second.send_signal(signal.SIGTERM)
    (output, errors), others = first.communicate(timeout=60), second.communicate(timeout=60)
    assert (first.returncode, second.returncode, others) == (143, 143, ("", ""))
    saved = checkpoints.load(run)
    reason = f"another process was asked to end: stopped and saved after step {(step := saved.step)}"
    remedy = (
        "its validation was not finished, --resume repeats it" if saved.progress["pending"] else "go on by --resume"
    )
    assert errors == f"Error: {reason}; {remedy}\n"
    assert f"checkpoint: {checkpoints.step_file(run, step)}" in output


def test_a_killed_process_ends_the_job_and_the_run_goes_on(dataset: Path, tmp_path: Path):
    run, pipe = tmp_path / "run", subprocess.PIPE
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trainer"]
    words = training(dataset, run, steps=10**6)
    job = subprocess.Popen([*start, *words], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    try:
        until(lambda: len(checkpoints.files(run)) > 1, job)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        second = next(pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(int(second), signal.SIGKILL)
        _, errors = job.communicate(timeout=60)  # a minute, from then
    finally:
        job.terminate()
    assert job.returncode == 1  # torchrun's
    assert sum(line.startswith(f"{ENDED}; {ON}") for line in errors.splitlines()) == 1, errors
    saved = checkpoints.load(run).step
    result = runs.resume(dataset, run, f"train.steps={saved + 2}")
    assert result.exit_code == 0, result.output
    assert checkpoints.load(run).step == saved + 2


def test_processes_that_have_no_worker_any_more_end_together(dataset: Path, tmp_path: Path):
    """Their patience with workers is over before that with each other."""
    bare, run = without_shards(dataset, tmp_path / dataset.name), tmp_path / "run"
    with started(dataset.parent) as (worker,):
        words = [*training(bare, run, steps=10**6), "--feed", worker.address, "--patience", "4"]
        processes = launched(2, words)
        until(lambda: len(checkpoints.files(run)) > 1, processes[0])
        worker.kill()
        errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    line = errors[0].splitlines()[-1]
    assert line.startswith("Error: ")
    assert worker.address in line
    saved = f"; the run is saved after step {checkpoints.load(run).step}: {ON}, with --feed for other workers, or --set"
    assert line.endswith(f"{saved} 'data.workers=[]' for none")


@pytest.mark.slow
def test_two_machines_train_as_one(data: Path, alone: Path, tmp_path: Path):
    jobs = machines(2, training(data, tmp_path / "run"))
    ended = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], ended
    assert "step" not in ended[1][0]
    assert_equal_at_first(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 1000])  # waited for at log lines; in the gradients' exchange, after the vote's
def test_a_process_that_hangs_ends_the_others(dataset: Path, tmp_path: Path, every: int):
    """Stopped, it neither answers nor closes its connections, like a machine without power."""
    run, settings = tmp_path / "run", (f"train.log_every={every}", f"train.validate_every={every}")
    first, second = launched(2, [*training(dataset, run, *settings, steps=10**6), "--patience", "5"])
    until(lambda: len(checkpoints.files(run)) > 1, first)
    second.send_signal(signal.SIGSTOP)
    _, errors = first.communicate(timeout=60)
    second.kill()
    second.communicate()
    assert first.returncode == 2
    assert errors.startswith("Error: another process of this job has not answered for 5 s; go on by --resume"), errors

"""tools/bench.py train: every contestant takes its turns, and what is said follows from the figures. No times."""

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from pipeline.online.meter import CAUSES
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT, gone, members
from networks import drawn, images, narrow
from pipeline import UserError
from tools import plain_alexnet
from tools.bench import main
from tools.failures import FAILURES, reason
from tools.gpu_training import Training, restored
from tools.operations import of_step
from tools.peers import training
from tools.peers.stepping import AHEAD, StepJob, Turns, prepare
from tools.peers.trainers import COLUMNS, FED, GROUPED, LOADER, MATRIX, PLAIN, PLAIN_FED, TRAINERS
from tools.peers.training import Group, Trained
from tools.peers.training_table import HEADER, rows, said
from tools.plain_alexnet import alexnet, multiply_adds
from trainer.layers import plan
from trainer.parallel import Columns

BATCH, STEPS, ROUNDS = 2, 2, 3
FAILED = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")


@contextmanager
def said_in_a_line() -> Iterator[None]:
    try:
        yield
    except FAILURES as error:
        raise UserError(reason(error)) from error


class Here:
    """A contestant that lives in this process, for it has imported everything already."""

    def __init__(self, job: StepJob) -> None:
        self._job, self._stack = job, ExitStack()

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def answer(self) -> dict[str, Any]:
        with said_in_a_line():
            self._turns, facts = prepare(self._job, self._stack)
        return facts

    def turn(self) -> dict[str, Any]:
        with said_in_a_line():
            return self._turns.take()

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Contestants in this process, torchvision's network at a sixteenth of its width."""
    monkeypatch.setattr(training, "Stepper", Here)
    thin = tuple((width // 16, *rest) for width, *rest in plain_alexnet.CONVOLUTIONS)
    monkeypatch.setattr(plain_alexnet, "CONVOLUTIONS", thin)
    monkeypatch.setattr(plain_alexnet, "UNITS", 64)
    with restored():
        yield


def bench(*words: object) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, words)])


def small(dataset: Path, *more: object) -> list[object]:
    turns = ("--steps", STEPS, "--seconds", 0, "--repetitions", ROUNDS)
    return [dataset, "--recipe", "tiny", "--devices", "cpu,cpu", *turns, *more]


def test_every_contestant_takes_its_turns(here: None, dataset: Path, tmp_path: Path):
    file, recipe = tmp_path / "train.json", tmp_path / "small.toml"
    recipe.write_text('base = "tiny"\n[model]\norder = ["conv1", "fc8"]\nsize = 72\nlayers.conv1 = { width = 8 }\n')
    words = ("--recipe", recipe, "--batch", BATCH, "--precision", "fp32", "--json", file, "--markdown")
    done = bench(*small(dataset, *words))
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    assert found.items() >= {"recipe": str(recipe), "devices": ["cpu", "cpu"], "repetitions": ROUNDS}.items()
    (group,) = found["groups"]
    assert (group["precision"], group["batch"]) == ("fp32", BATCH)
    results = {result["contestant"]: result for result in group["results"]}
    assert list(results) == list(TRAINERS)
    matrix = results[MATRIX]["operations_per_second"]
    for name, result in results.items():
        assert "not_run" not in result
        assert [turn["steps"] for turn in result["turns"]] == [STEPS] * ROUNDS
        if name == MATRIX:
            continue
        assert [turn["done"] for turn in result["turns"]] == [STEPS * BATCH] * ROUNDS
        rates = [turn["done"] / turn["seconds"] for turn in result["turns"]]
        assert result["images_per_second"] == rates
        assert result["peak_bytes"] > 50 * 2**20
        for turn in result["turns"]:
            assert list(turn["stall_by"]) == (list(CAUSES) if TRAINERS[name].loads else [])
            assert 0 <= sum(turn["stall_by"].values()) <= 1
        if name == LOADER:
            continue
        per_second = [rate * result["operations"] for rate in rates]
        assert result["operations_per_second"] == per_second
        assert result["share_of_matrix_rate"] == [made / most for made, most in zip(per_second, matrix)]
    # one network; the other has more to do, though it is narrow here
    assert results[COLUMNS]["operations"] == results[FED]["operations"] == results[GROUPED]["operations"]
    assert results[PLAIN]["operations"] == results[PLAIN_FED]["operations"] != results[FED]["operations"]
    assert group["ratios"] == {
        f"{one}/{other}": [
            a / b for a, b in zip(results[one]["images_per_second"], results[other]["images_per_second"])
        ]
        for one, other in ((COLUMNS, GROUPED), (COLUMNS, PLAIN), (FED, COLUMNS), (PLAIN_FED, PLAIN))
    }
    for supply, (fed, step) in zip(group["supply"], ((FED, COLUMNS), (PLAIN_FED, PLAIN)), strict=True):
        assert supply["contestant"] == fed
        assert supply["supply"] == statistics.median(results[LOADER]["images_per_second"])
        assert supply["demand"] == statistics.median(results[step]["images_per_second"])
        assert f"\n- fp32, batch {BATCH}, {fed}: the supply, " in done.output
    assert f"| {' | '.join(HEADER)} |" in done.output
    for name in TRAINERS:
        assert f"\n| {name} | fp32 | {BATCH} |" in done.output


def test_one_contestant_may_fail(here: None, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At its start, or in a later turn; the others go on, and nothing is compared with it."""
    steps = iter(range(100))

    def fail(*_: object, **more: object) -> None:
        if more.get("whole"):
            raise FAILED
        raise RuntimeError("never mind")

    def step(self: object, given: object) -> int:
        if next(steps) > 3:
            raise RuntimeError("the device is gone")
        return BATCH

    monkeypatch.setattr(Training, "__init__", fail)
    monkeypatch.setattr(plain_alexnet.PlainTraining, "step", step)
    only = [word for name in (MATRIX, GROUPED, PLAIN) for word in ("--only", name)]
    file = tmp_path / "train.json"
    done = bench(*small(dataset, "--batch", BATCH, "--json", file, "--markdown", *only))
    assert done.exit_code == 0, done.output
    (group,) = json.loads(file.read_text())["groups"]
    matrix, grouped, plain = group["results"]
    assert len(matrix["turns"]) == ROUNDS
    assert grouped == {"contestant": GROUPED, "not_run": "CUDA out of memory."}
    assert plain == {"contestant": PLAIN, "not_run": "the device is gone"}
    assert (group["ratios"], group["supply"]) == ({}, [])
    assert done.output.count("not run: the device is gone") == 2  # when it fails, and in the table


def test_an_interruption_leaves_no_process(dataset: Path):
    """Nor does a contestant that is killed end the others."""
    words = small(dataset, "--batch", BATCH, "--only", MATRIX, "--only", COLUMNS, "--repetitions", 10**6)
    command = [sys.executable, str(ROOT / "tools/bench.py"), "train", *map(str, words)]
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        lines = iter(process.stderr.readline, "")
        assert next(line for line in lines if COLUMNS in line).startswith(f"1/1000000 fp32, batch {BATCH}, {COLUMNS}: ")
        children = {pid: named(pid) for pid in children_of(process.pid)}
        assert sorted(children.values()) == [COLUMNS, MATRIX]
        assert all(os.getpgid(pid) == pid for pid in children)
        (columns,) = (pid for pid, name in children.items() if name == COLUMNS)
        os.kill(columns, signal.SIGKILL)
        assert "not run: killed by SIGKILL" in next(line for line in lines if f"{COLUMNS}: not" in line)
        assert next(lines)  # of the other one
        process.send_signal(signal.SIGINT)
        *_, last = lines
        assert (process.wait(timeout=60), last) == (130, "Error: interrupted\n")
    assert all(gone(pid) for pid in children)


def children_of(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def named(pid: int) -> str:
    """The contestant that a process is."""
    name: str = json.loads(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[-2])["contestant"]
    assert members(pid)[0] == pid
    return name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--precision", "fp64"), ("fp64", "fp32, tf32, bf16")),
        (("--compile", "all"), ("'all'", "no, segments, graphs")),
        (("--devices", "cpu"), ("--devices cpu", "two")),
        (("--devices", "cuda:97,cuda:97"), ("cuda:97",)),
        (("--recipe", "wide"), ("wide", "original")),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], said: tuple[str, ...], dataset: Path):
    done = bench(*small(dataset), *words)
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert all(word in done.output for word in said), done.output


def test_operations_are_those_that_torch_counts():
    """Of two columns: of a grouped convolution's gradient torch counts too many."""
    recipe, classes, size = narrow("original").model, 7, 3
    columns, counter = Columns(recipe, classes, (torch.device("cpu"),) * 2), FlopCounterMode(display=False)
    columns.load(drawn(recipe, classes))
    with counter:
        F.cross_entropy(columns(images(recipe, size).float()), torch.tensor([0, 2, 4])).backward()
    layers = [layer.multiply_adds for layer in plan(recipe, classes)]
    assert size * of_step(layers) == counter.get_total_flops()


def test_the_plain_network_is_torchvisions():
    """Its published parameters; its operations as torch counts them, on a device that computes nothing."""
    with torch.device("meta"):
        network, x = alexnet(1000), torch.empty(5, 3, 224, 224)
    assert sum(parameter.numel() for parameter in network.parameters()) == 61_100_840
    assert sum(multiply_adds(1000)) == 714_188_480  # a forward pass
    counter = FlopCounterMode(display=False)
    with counter:
        network(x).sum().backward()
    assert counter.get_total_flops() == 5 * of_step(multiply_adds(1000))


def known(**rates: list[float]) -> Group:
    """Contestants of so many images/s; those that are fed waited a tenth of the time, mostly for decoding."""
    stall = {"reading": 0.02, "decoding": 0.08, "transfer": 0.0}
    facts = {"operations": 10**9, "devices": 2}
    contestants = {}
    for name, each in rates.items():
        fed = stall if TRAINERS[name].loads else {}
        turns = [{"done": rate, "seconds": 1.0, "stall_by": fed, "peak": 2**20} for rate in each]
        contestants[name] = Trained(name, {} if name in (MATRIX, LOADER) else facts, turns)
    return Group("bf16", 8, contestants)


def test_ratios_survive_a_machine_that_slows_down():
    group = known(matrix=[8e12, 4e12, 2e12], columns=[800.0, 400.0, 200.0], grouped=[1000.0, 500.0, 250.0])
    cells = [dict(zip(HEADER, row)) for row in rows(group)]
    columns = cells[1]
    assert columns["images/s, median (min to max)"] == "400 (200 to 800)"
    assert columns["compared, round by round"] == "0.80 × grouped (0.80 to 0.80)"
    assert (columns["GFLOP/s"], columns["of the matrix rate"]) == ("400", "5.0 %")  # of that of both devices
    assert (cells[0]["GFLOP/s"], cells[0]["images/s, median (min to max)"]) == ("4,000", "")


def test_supply_and_demand():
    beyond = known(loader=[90.0, 110.0, 100.0], columns=[50.0, 50.0, 40.0], fed=[45.0, 45.0, 40.0])
    begins, shares = "bf16, batch 8, fed: the supply, 100 images/s, ", "(reading 2.0 %, decoding 8.0 %, transfer 0.0 %)"
    assert said(beyond) == [f"{begins}exceeds the demand, 50.0; stall 10.0 % {shares}: should be 1 %"]
    short = known(loader=[100.0], columns=[400.0], fed=[90.0])
    assert said(short) == [f"{begins}falls short of the demand, 400; stall 10.0 % {shares}: the shortfall is 75 %"]
    for turn in beyond.contestants[FED].turns:
        turn["stall_by"] = dict.fromkeys(CAUSES, 0.001)
    assert said(beyond)[0].endswith("transfer 0.1 %): at most 1 %, as it should be")


def test_a_turn_begins_as_a_long_run_stands(dataset: Path):
    """What the loader made ready meanwhile is used first; the steps that are counted are those after it."""
    steps = list[int]()
    job = StepJob(LOADER, str(dataset), "tiny", "fp32", BATCH, ("cpu", "cpu"), "no", False, STEPS, 0.0)
    with ExitStack() as stack:
        turns, _ = prepare(job, stack)
        turns._step, turns._refill = lambda: steps.append(BATCH) or BATCH, 60.0  # faster than the loader could be
        turns._settle()
        assert len(steps) == AHEAD
        turns._refill = 0.0  # so slow that the loader is always ahead
        figures = turns.take()
    assert len(steps) == AHEAD + 1 + STEPS
    assert figures["done"] == STEPS * BATCH
    assert isinstance(turns, Turns)

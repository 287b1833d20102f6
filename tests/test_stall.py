"""The stall meter: what was waited for, how long, and what is said of it."""

import ast
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from pipeline import manifest
from pipeline.online import Loader
from pipeline.online.normalise import Normaliser
from pipeline.online.samples import SampleReader
from pipeline.online.stall import Meter, Wait, waited
from pipeline.online.turbo import Decoder
from runs import resume, train
from trainer import checkpoint as checkpoints
from trainer import data as loaders
from trainer import recipe as recipes

CAUSES = ("reading", "decoding", "transfer")
NEAR, FAR = "grpc://10.0.0.6:8815", "grpc://10.0.0.7:8815"


@pytest.mark.parametrize(
    ("read", "decoded", "expected"),
    [
        (12, 15, Wait(2, 3, 1)),
        (8, 15, Wait(0, 5, 1)),
        (8, 9, Wait(0, 0, 6)),
        (15, 15, Wait(5, 0, 1)),
    ],
)
def test_waiting_is_split_by_cause(read: float, decoded: float, expected: Wait):
    """Views of workers have come when a local loader's samples have been read."""
    assert waited(10, read, decoded, 16) == expected
    seconds, by_workers = expected.reading, waited(10, read, decoded, 16, FAR, 3)
    assert by_workers == replace(expected, reading=0, by_worker={FAR: seconds}, worker_seconds=3 * seconds)


def test_sums_shares_and_words():
    meter = Meter()
    for wait in (Wait(1, 2, 0), Wait(0, 3, 1)):
        meter.add(wait)
    assert meter.total == Wait(1, 5, 1)
    assert (meter.total - Wait(1, 2, 0)) == Wait(0, 3, 1)
    shares = {"reading": 1 / 70, "decoding": 5 / 70, "transfer": 1 / 70, "workers": 0}
    assert meter.total.shares(70) == pytest.approx(shares)
    assert meter.total.text(70).startswith("stall 10.0 % (decoding: a raw tier (tools/raw_tier.py), more CPU cores, or")
    assert meter.total.text(1000) == "stall  0.7 %"
    assert Wait().text(0) == "stall  0.0 %"


def test_on_a_gpu_the_devices_time_counts():
    """2 seconds without work for the device, while the host waited 3 for reading and 1 for decoding."""
    wait = Wait(3, 1, 0, device=2)
    assert wait.seconds == 2
    assert wait.shares(10) == pytest.approx({"reading": 0.15, "decoding": 0.05, "transfer": 0, "workers": 0})
    assert Wait(device=2).shares(10) == pytest.approx({"reading": 0, "decoding": 0, "transfer": 0.2, "workers": 0})
    assert (wait + Wait(1, 1, 1)).device == 2
    assert (wait - Wait(0, 0, 0, device=0.5)).device == 1.5


@pytest.mark.parametrize(
    ("seconds", "workers", "lacking"),
    [
        ((10, 23), 4, "2 more beside 4"),  # in 0.67 of the time, what 4 make in all of it: by 5.97
        ((0.5, 1), 4, "1 more beside 4"),
        ((30, 20), 3, "3 more beside 3"),
        ((100, 0), 2, "198 more beside 2"),
        ((20, 30), 0, "1 more beside 0"),
    ],
)
def test_the_workers_that_are_lacking_are_counted(seconds: tuple[float, float], workers: int, lacking: str):
    """In 100 s, which follow some in which others were waited for; on a GPU, too, whose host waits longer than it."""
    meter = Meter()
    meter.add(waited(0, 50, 51, 52, "grpc://10.0.0.5:8815", 9))
    before = meter.total
    for worker, wait in zip((NEAR, FAR), seconds):
        meter.add(waited(0, wait, wait, wait, worker, workers))
    slowest = NEAR if seconds[0] > seconds[1] else FAR
    text = (
        f"stall {sum(seconds):4.1f} % (workers: {lacking} at this rate, or a faster network; waited most for {slowest})"
    )
    interval = meter.total - before
    assert interval.text(100) == interval.text(100, loaders.STALLED) == text
    assert (interval + interval + Wait(device=sum(seconds))).text(100) == text


class Event:
    """A CUDA event at a known time, which the device has come to or not."""

    def __init__(self, milliseconds: float, reached: bool = True) -> None:
        self.milliseconds, self.reached = milliseconds, reached

    def query(self) -> bool:
        return self.reached

    def elapsed_time(self, other: "Event") -> float:
        return other.milliseconds - self.milliseconds


def test_events_count_once_the_device_has_come_to_them():
    meter, late = Meter(), Event(900, reached=False)
    meter.add(Wait(1, 0, 0), (Event(100), Event(350)))  # type: ignore[arg-type]
    assert meter.total == meter.total == Wait(1, 0, 0, device=0.25)
    assert meter.clock == 0.25
    meter.add(Wait(0, 2, 0), (Event(400), late))  # type: ignore[arg-type]
    assert meter.total == Wait(1, 2, 0, device=0.25)
    assert meter.clock == 0.25
    late.reached = True
    assert meter.total == Wait(1, 2, 0, device=0.75)
    assert meter.clock == 0.8  # of the device, from the first batch on


@pytest.mark.parametrize(
    ("owner", "name", "cause"),
    [(SampleReader, "read", "reading"), (Decoder, "result", "decoding"), (Normaliser, "prepare", "decoding")],
)
def test_the_slow_stage_is_named(dataset: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, cause: str):
    stage: Callable[..., object] = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: time.sleep(0.2) or stage(*arguments))
    with Loader(dataset, batch_size=4) as loader:
        list(islice(loader, 3))
        before, began = loader.meter.total, time.perf_counter()
        list(islice(loader, 6))
        wall, wait = time.perf_counter() - began, loader.meter.total - before
    shares = wait.shares(wall)
    assert shares[cause] > 0.5
    assert max(shares, key=lambda each: shares[each]) == cause
    assert sum(shares.values()) == pytest.approx(wait.seconds / wall)
    assert wait.seconds <= wall
    assert f"({cause}: " in wait.text(wall)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(dataset, folder, 1).exit_code == 0
    return folder


def cause(name: str) -> Wait:
    return Wait(**{name: 1.0})


@pytest.mark.parametrize("name", CAUSES)
def test_every_remedy_of_a_log_line_can_be_pasted(dataset: Path, run: Path, tmp_path: Path, name: str):
    """To the command that begins a run, or goes on with one; what begins with no option is advice."""
    recipe = recipes.load("tiny", ["data.readers=64", 'data.tier="jpeg"'])  # the most that there may be
    text = cause(name).text(2.0, loaders.stall_remedies(recipe, manifest.load(dataset)))
    assert (
        text
        == {
            "reading": "stall 50.0 % (reading: --set data.readers=64, or a faster disk)",
            "decoding": f"stall 50.0 % (decoding: python tools/raw_tier.py {dataset} --format rgb, or more CPU cores)",
            "transfer": "stall 50.0 % (transfer: --set data.depth=4)",
        }[name]
    )
    options = [word for pair in re.findall(r"(--set) (\S+?)[,)]", text) for word in pair]
    assert len(options) == 2 * text.count("--set")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    before = checkpoints.load(run)
    for result in (
        train(dataset, tmp_path / "new", 1, more=tuple(options)),
        resume(dataset, copy, "train.steps=2", more=tuple(options)),
    ):
        assert result.exit_code == 0, result.output
    after = checkpoints.load(tmp_path / "new").weights
    assert all(torch.equal(value, after[key]) for key, value in before.weights.items())


@pytest.mark.parametrize("name", CAUSES)
def test_every_option_in_the_text_of_a_loader_can_be_pasted(dataset: Path, name: str):
    options = dict(re.findall(r"(\w+)=([^\s,)]+)", cause(name).text(2.0)))
    assert (
        options.keys() == {"reading": {"readers", "order"}, "decoding": {"hardware_share"}, "transfer": {"depth"}}[name]
    )
    with Loader(dataset, batch_size=4, **{key: ast.literal_eval(value) for key, value in options.items()}) as loader:
        assert len(next(loader).ids) == 4


@pytest.mark.parametrize("name", CAUSES)
def test_a_command_without_options_for_the_loader_names_none(name: str):
    assert not re.search("[-=]", cause(name).text(2.0, loaders.STALLED))


def test_a_consumer_slower_than_the_loader_does_not_wait(dataset: Path):
    with Loader(dataset, batch_size=4) as loader:
        next(loader)
        before = loader.meter.total
        for _ in range(5):
            time.sleep(0.2)
            next(loader)
        assert (loader.meter.total - before).seconds < 0.2

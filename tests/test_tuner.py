"""The tuner on simulated machines: consumers of any speed, any supply, noise, and a clock that nobody waits for."""

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from pipeline.online.stall import Wait, waited
from pipeline.online.tuner import NONE, Setting, Tuner

BATCH = 128
START = Setting("jpeg", threads=2, readers=1, depth=2, hardware_share=0.9)
SETTLED = 200  # steps


@dataclass
class Machine:
    """Stages that work side by side, each with its images/s; the slowest one makes the consumer wait."""

    stages: Callable[[Setting], dict[str, float]]  # images/s by cause, of a setting
    consumer: float  # images/s
    noise: float = 0.0
    random: Random = field(default_factory=lambda: Random(1))
    now: float = 0.0
    wait: Wait = NONE
    ready: deque[float] = field(default_factory=deque)  # when batches that are made ahead are there
    made: float = 0.0  # when the last of them is

    def rate(self, setting: Setting) -> float:
        return min(self.consumer, *self.stages(setting).values())

    def step(self, setting: Setting) -> None:
        """Take a batch, which may have to be waited for, and consume it."""
        stages = self.stages(setting)
        slowest = min(stages, key=lambda name: stages[name])
        while len(self.ready) < setting.depth:
            self.made = max(self.made, self.now) + BATCH / stages[slowest] * self.noisy()
            self.ready.append(self.made)
        there = self.ready.popleft()
        if there > self.now:
            self.wait += Wait(**{slowest: there - self.now})
            self.now = there
        self.now += BATCH / self.consumer * self.noisy()

    def restart(self) -> None:
        """Begin with no batch ahead, as the loader does."""
        self.ready.clear()

    def noisy(self) -> float:
        return 1 + self.noise * self.random.uniform(-1, 1)


@dataclass
class Pipeline(Machine):
    """Stages of which each has a batch at a time, and waits for room behind it; the loader's own meter names the cause.

    It sees what is left to do when the consumer asks: often not the slowest stage, but those behind it.
    """

    ends: list[float] = field(default_factory=lambda: [0.0] * 3)  # of the latest batch, by stage
    taken: list[float] = field(default_factory=list)

    def restart(self) -> None:
        self.ends, self.taken = [self.now] * 3, []

    def step(self, setting: Setting) -> None:
        moment, stages, moments = 0.0, self.stages(setting), list[float]()
        for stage, name in enumerate(("reading", "decoding", "transfer")):
            behind = len(self.taken) - setting.depth - 2 + stage
            moment = max(moment, self.ends[stage], self.taken[behind] if behind >= 0 else 0.0)
            moment += BATCH / stages[name] * self.noisy()
            moments.append(moment)
        asked, self.now, self.ends = self.now, max(self.now, moment), moments
        self.taken.append(self.now)
        self.wait += waited(asked, moments[0], moments[1], self.now)
        self.now += BATCH / self.consumer * self.noisy()


def run(machine: Machine, tuner: Tuner, steps: int, first: int = 0) -> dict[int, Setting]:
    """Return the settings that the tuner chose, by the step after which it did."""
    changes = {}
    for step in range(first, first + steps):
        machine.step(tuner.setting)
        if changed := tuner.after(step, BATCH, machine.wait, machine.now):
            changes[step] = changed
            machine.restart()
    return changes


def tuner(*, tiers: tuple[str, ...] = ("jpeg", "raw"), start: Setting = START, on_gpu: bool = False) -> Tuner:
    return Tuner(start, tiers=tiers, cores=8, on_gpu=on_gpu, max_stall=0.01)


def usual(setting: Setting) -> dict[str, float]:
    """A machine whose decoding is slow, reading slower the larger the records, and no transfer."""
    readers = setting.readers if setting.tier == "jpeg" else max(setting.readers, setting.threads)
    decoding = 900.0 * setting.threads if setting.tier == "jpeg" else 20_000.0 * setting.threads
    return {"decoding": decoding, "reading": readers * (50_000.0 if setting.tier == "jpeg" else 8_000.0)}


@pytest.mark.parametrize("consumer", [100, 1_000, 1_700, 2_500, 10_000, 20_000, 39_000, 200_000])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_it_settles_near_the_best_that_is_to_be_had(consumer: float, noise: float):
    machine, tuned = Machine(usual, consumer, noise), tuner()
    changes = run(machine, tuned, 700)
    assert not [step for step in changes if step > SETTLED], tuned.said
    best = max(machine.rate(setting) for setting in possible())
    began, waited = machine.now, machine.wait.seconds
    run(machine, tuned, 300, first=700)
    stall = (machine.wait.seconds - waited) / (machine.now - began)
    assert stall <= 0.015 or machine.rate(tuned.setting) >= 0.95 * best, (tuned.setting, tuned.said)


def possible() -> list[Setting]:
    """All settings that a machine without a GPU may come to."""
    return [
        Setting(tier, threads, readers, 2, 0.9)
        for tier in ("jpeg", "raw")
        for threads in (2, 4, 8)
        for readers in (1, 2, 4, 8, 16)
    ]


def test_a_slow_consumer_is_left_alone():
    machine, tuned = Machine(usual, 1_000, 0.1), tuner()
    assert not run(machine, tuned, 1_000)
    assert not tuned.said


@pytest.mark.parametrize("seed", range(25))
def test_random_machines_come_to_rest(seed: int):
    """Nothing that was tried in vain comes back, and no setting that was left for a better one."""
    random = Random(seed)
    speeds = {cause: 10 ** random.uniform(2.5, 4.5) for cause in ("decoding", "reading", "transfer")}
    raw, device, helps = random.uniform(0.5, 20), random.uniform(0.5, 20), random.choice([0.0, 0.5, 1.0])

    def stages(setting: Setting) -> dict[str, float]:
        factor = {"jpeg": 1.0, "raw": raw, "device": raw * device}[setting.tier]
        return {
            "decoding": speeds["decoding"]
            * factor
            * setting.threads**helps
            * (1.3 if setting.hardware_share == 0.5 else 1),
            "reading": speeds["reading"] * setting.readers**helps / factor,
            "transfer": speeds["transfer"] * setting.depth**0.2,
        }

    machine = Machine(stages, 10 ** random.uniform(2.5, 4.5), noise=0.1, random=random)
    tuned = tuner(tiers=("jpeg", "raw", "device"), on_gpu=True)
    changes = run(machine, tuned, 500)
    assert not [step for step in changes if step > SETTLED], tuned.said
    visited = [START, *changes.values()]
    assert machine.rate(tuned.setting) >= 0.85 * max(map(machine.rate, visited)), tuned.said  # no better one was left
    for number, setting in enumerate(visited):
        better = [other for other in visited[:number] if machine.rate(other) > 1.1 * machine.rate(setting)]
        assert not any(setting in visited[: visited.index(other)] for other in better), tuned.said
    tiers = [line for line in tuned.said if ": tier " in line]
    assert len(tiers) <= 2


@pytest.mark.parametrize("seed", range(40))
def test_a_slow_stage_is_found_behind_those_that_the_meter_names(seed: int):
    """Reading, decoding and transfer in any proportion, each up to 4 times as fast: no turn is left that gives more."""
    random = Random(seed)
    speeds = {cause: 10 ** random.uniform(2, 3) for cause in ("reading", "decoding", "transfer")}

    def stages(setting: Setting) -> dict[str, float]:
        turned = {"reading": setting.readers, "decoding": setting.threads / 2, "transfer": setting.depth / 2}
        return {cause: speeds[cause] * min(turned[cause], 4) for cause in speeds}

    machine = Pipeline(stages, 10 ** random.uniform(2, 3.5), noise=0.1, random=random)
    tuned = tuner(tiers=("jpeg",))
    changes = run(machine, tuned, 500)
    assert not [step for step in changes if step > SETTLED], tuned.said
    began, before = machine.now, machine.wait.seconds
    run(machine, tuned, 200, first=500)
    stall = (machine.wait.seconds - before) / (machine.now - began)
    setting = tuned.setting
    more = [replace(setting, **{knob: 2 * getattr(setting, knob)}) for knob in ("readers", "threads", "depth")]
    left = max(machine.rate(other) for other in more) / machine.rate(setting)
    assert stall <= 0.03 or left < 1.1, (setting, tuned.said)


def test_it_says_what_it_turned_and_what_that_gave():
    machine, tuned = Machine(usual, 10_000), tuner()
    run(machine, tuned, 400)
    first, *_ = tuned.said
    assert first.endswith("images/s"), first
    assert "tier jpeg → raw: stall 82.0 %, 1,800 images/s → 0.0 %, 10,000 images/s" in first
    assert len(tuned.said) == 1


def test_what_gave_nothing_is_taken_back_and_the_rest_is_told_once():
    machine, tuned = Machine(lambda setting: {"reading": 2_000.0, "decoding": 5_000.0}, 4_000), tuner(tiers=("jpeg",))
    run(machine, tuned, 1_000)
    assert tuned.setting == START
    *vain, told = tuned.said
    turned = [re.search(r": (.*) gave nothing \(stall", line) for line in vain]
    assert [match and match[1] for match in turned] == ["readers 1 → 2", "threads 2 → 4", "depth 2 → 4"]
    assert "images/s, reading; what is left: a faster disk" in told


def test_pauses_of_the_consumer_are_no_verdict():
    """Validations amid the measurements: the same settings as without."""
    quiet, tuned = Machine(usual, 10_000), tuner()
    run(quiet, tuned, 400)
    paused, other = Machine(usual, 10_000), tuner()
    for step in range(400):
        run(paused, other, 1, first=step)
        if step % 7 == 3:
            paused.now += 20
    assert other.setting == tuned.setting
    assert [line.partition(":")[2][:20] for line in other.said] == [line.partition(":")[2][:20] for line in tuned.said]


def test_a_stall_that_comes_later_begins_another_episode():
    machine, tuned = Machine(usual, 1_000), tuner()
    run(machine, tuned, 2_000)
    machine.consumer = 15_000
    changes = run(machine, tuned, 1_000, first=2_000)
    assert changes
    assert max(changes) < 2_000 + SETTLED
    assert tuned.setting.tier == "raw"

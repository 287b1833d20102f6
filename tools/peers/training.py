"""Rounds of `train`: every contestant takes a turn, in one order and then in the other; all the others are idle."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from pipeline import UserError
from tools.peers.stepper import Stepper
from tools.peers.stepping import StepJob
from tools.peers.trainers import MATRIX

Figures = dict[str, Any]


@dataclass
class Trained:
    """A contestant: what it says of itself, its turns so far, or why it is not run."""

    name: str
    facts: Figures = field(default_factory=dict)
    turns: list[Figures] = field(default_factory=list)
    not_run: str = ""

    @property
    def rates(self) -> list[float]:
        """Images/s of each turn; of the matrix product, operations/s."""
        return [turn["done"] / turn["seconds"] for turn in self.turns]

    @property
    def stalls(self) -> list[float]:
        return [sum(turn["stall_by"].values()) for turn in self.turns]


@dataclass(frozen=True)
class Group:
    """The contestants of one precision and batch size, which run side by side."""

    precision: str
    batch: int
    contestants: dict[str, Trained]

    def entry(self, name: str) -> Trained | None:
        """A contestant that was run."""
        found = self.contestants.get(name)
        return found if found and found.turns else None

    def paired(self, name: str, than: str) -> list[float]:
        """One's rate over another's, round by round: what a machine's drift leaves alone. None: one was not run."""
        one, other = self.entry(name), self.entry(than)
        return [a / b for a, b in zip(one.rates, other.rates)] if one and other else []


def run_group(base: StepJob, names: Sequence[str], repetitions: int, say: Callable[[str], None]) -> Group:
    """Start the contestants, each in a process of its own, and let each take so many turns.

    One that fails is not run, and its other turns do not count; the others go on.
    """
    group = Group(base.precision, base.batch, {name: Trained(name) for name in names})
    with ExitStack() as stack:
        steppers = {name: stack.enter_context(Stepper(replace(base, contestant=name))) for name in names}
        where = f"{base.precision}, batch {base.batch:,}"

        def ask(name: str, what: Callable[[], Figures]) -> Figures:
            """Its answer; nothing where it fails."""
            entry = group.contestants[name]
            if entry.not_run:
                return {}
            try:
                return what()
            except UserError as error:
                entry.turns, entry.not_run = [], str(error)
                steppers[name].close()
                say(f"{where}, {name}: not run: {error}")
                return {}

        for name, stepper in steppers.items():
            group.contestants[name].facts = ask(name, stepper.answer)
        for repetition in range(repetitions):
            for name in list(names)[:: -1 if repetition % 2 else 1]:
                entry = group.contestants[name]
                if figures := ask(name, steppers[name].turn):
                    entry.turns.append(figures)
                    say(f"{repetition + 1}/{repetitions} {where}, {name}: {_rate(entry)}")
    return group


def _rate(entry: Trained) -> str:
    rate = entry.rates[-1]
    return f"{rate / 1e9:,.1f} GFLOP/s" if entry.name == MATRIX else f"{rate:,.1f} images/s"


def middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None

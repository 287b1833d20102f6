"""What the rounds of `train` say: rates, shares, ratios, supply and demand; as a record, and as rows of text."""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from pipeline.online.meter import CAUSES, LIMIT

from tools.peers.table import print_rows
from tools.peers.trainers import LOADER, MATRIX, TRAINERS
from tools.peers.training import Figures, Group, Trained, middle

HEADER = (
    "contestant",
    "precision",
    "batch",
    "images/s, median (min to max)",
    "GFLOP/s",
    "of the matrix rate",
    "stall",
    "peak memory",
    "compared, round by round",
)


def record(group: Group) -> Figures:
    """For JSON. Lists have a value a round; ratios and shares are of the two rates of a round."""
    return {
        "precision": group.precision,
        "batch": group.batch,
        "results": [_result(group, entry) for entry in group.contestants.values()],
        "ratios": {
            f"{name}/{than}": group.paired(name, than)
            for name, trainer in TRAINERS.items()
            for than in trainer.than
            if group.paired(name, than)
        },
        "supply": supplies(group),
    }


def _result(group: Group, entry: Trained) -> Figures:
    if entry.not_run:
        return {"contestant": entry.name, "not_run": entry.not_run}
    found: Figures = {"contestant": entry.name, **entry.facts, "turns": entry.turns}
    if entry.name == MATRIX:
        return found | {"operations_per_second": entry.rates}
    found |= {"images_per_second": entry.rates, "peak_bytes": max(turn["peak"] for turn in entry.turns)}
    if TRAINERS[entry.name].loads:
        found |= {"stall": entry.stalls}
    if "operations" in entry.facts:
        found |= {"operations_per_second": operations(entry), "share_of_matrix_rate": shares(group, entry)}
    return found


def operations(entry: Trained) -> list[float]:
    """Of each turn, per second."""
    return [rate * entry.facts["operations"] for rate in entry.rates]


def shares(group: Group, entry: Trained) -> list[float]:
    """Of the matrix rate of all devices that it uses, round by round; none where that was not measured."""
    if not (matrix := group.entry(MATRIX)):
        return []
    return [made / most / entry.facts["devices"] for made, most in zip(operations(entry), matrix.rates)]


def supplies(group: Group) -> list[Figures]:
    """For each network that the loader feeds: medians of its supply, alone, and of the demand; the stall, by stage."""
    found = []
    for name, trainer in TRAINERS.items():
        fed, supply, demand = group.entry(name), group.entry(LOADER), group.entry(trainer.step)
        if fed and supply and demand:
            stages = {cause: median(turn["stall_by"][cause] for turn in fed.turns) for cause in CAUSES}
            found.append(
                {
                    "contestant": name,
                    "supply": median(supply.rates),
                    "demand": median(demand.rates),
                    "stall": median(fed.stalls),
                    "stall_by": stages,
                }
            )
    return found


def said(group: Group) -> list[str]:
    """Supply and demand in words; at most `LIMIT` stall is asked for where the supply exceeds the demand."""
    lines = []
    for found in supplies(group):
        stages = ", ".join(f"{cause} {100 * share:.1f} %" for cause, share in found["stall_by"].items())
        supply, demand, stall = found["supply"], found["demand"], found["stall"]
        if supply > demand:
            verdict = "exceeds"
            judged = f"at most {100 * LIMIT:g} %, as it should be" if stall <= LIMIT else f"should be {100 * LIMIT:g} %"
        else:
            verdict, judged = "falls short of", f"the shortfall is {100 * (1 - supply / demand):.0f} %"
        lines.append(
            f"{group.precision}, batch {group.batch:,}, {found['contestant']}: the supply, {_short(supply)} images/s, "
            f"{verdict} the demand, {_short(demand)}; stall {100 * stall:.1f} % ({stages}): {judged}"
        )
    return lines


def rows(group: Group) -> list[tuple[str, ...]]:
    return [_row(group, entry) for entry in group.contestants.values()]


def _row(group: Group, entry: Trained) -> tuple[str, ...]:
    trainer = TRAINERS[entry.name]
    start = (entry.name, group.precision, f"{group.batch:,}")
    if entry.not_run:
        return (*start, f"not run: {entry.not_run}", "", "", "", "", "")
    made = entry.rates if entry.name == MATRIX else operations(entry) if "operations" in entry.facts else []
    share = middle(shares(group, entry)) if "operations" in entry.facts else None
    compared = (_compared(group, entry.name, than) for than in trainer.than)
    return (
        *start,
        "" if entry.name == MATRIX else _spread(entry.rates),
        _short(median(made) / 1e9) if made else "",
        "" if share is None else f"{100 * share:.1f} %",
        f"{100 * median(entry.stalls):.1f} %" if trainer.step else "",
        f"{max(turn['peak'] for turn in entry.turns) / 2**20:,.0f} MiB",
        ", ".join(filter(None, compared)),
    )


def _compared(group: Group, name: str, than: str) -> str:
    if not (ratios := group.paired(name, than)):
        return ""
    return f"{median(ratios):.2f} × {than} ({min(ratios):.2f} to {max(ratios):.2f})"


def _spread(rates: Sequence[float]) -> str:
    return f"{_short(median(rates))} ({_short(min(rates))} to {_short(max(rates))})"


def _short(rate: float) -> str:
    return f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}"


def print_groups(groups: Sequence[Group], facts: Sequence[str], markdown: bool, say: Callable[[str], Any]) -> None:
    """Facts, the table, supply and demand, and what each contestant does."""
    names = list(dict.fromkeys(name for group in groups for name in group.contestants))
    lines = [line for group in groups for line in said(group)]
    does = [f"{name}: {TRAINERS[name].title}: {TRAINERS[name].does}." for name in names]
    print_rows(HEADER, [row for group in groups for row in rows(group)], facts, [*lines, *does], markdown, say)

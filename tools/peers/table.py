"""Medians and ratios of the rounds: rows of text, printed plain or as Markdown."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.peers.contestants import CEILING, OURS
from tools.peers.rounds import Entry

HEADER = ("contestant", "workers", "images/s, median (min to max)", "of decode + encode", "ours is", "largest process")


def rates(entry: Entry, seconds: str = "seconds") -> list[float]:
    """Images per second of each run, over the job itself ("seconds") or from start to exit ("wall")."""
    return [run["images"] / run[seconds] for run in entry.runs]


def rows(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """One row for each contestant and number of workers, and a second one for ours, from start to exit."""
    found: list[tuple[str, ...]] = []
    for entry in entries:
        if entry.not_run:
            found.append((entry.contestant.title, str(entry.workers), f"not run: {entry.not_run}", "", "", ""))
            continue
        found.append(_row(entries, entry, entry.contestant.title, "seconds"))
        if entry.contestant.name == OURS:
            found.append(_row(entries, entry, f"{entry.contestant.title}, start to exit", "wall"))
    return found


def _row(entries: Sequence[Entry], entry: Entry, title: str, seconds: str) -> tuple[str, ...]:
    mine = rates(entry, seconds)
    median = statistics.median(mine)
    ceiling, ours = _median_of(entries, CEILING, entry.workers), _median_of(entries, OURS, entry.workers)
    return (
        title,
        str(entry.workers),
        f"{median:,.0f} ({min(mine):,.0f} to {max(mine):,.0f})",
        f"{100 * median / ceiling:.0f} %" if ceiling else "",
        f"{ours / median:.2f} ×" if ours and entry.contestant.name != OURS else "",
        f"{max(run['rss'] for run in entry.runs) / 2**20:,.0f} MiB",
    )


def _median_of(entries: Sequence[Entry], name: str, workers: int) -> float:
    """0 where it was not run."""
    found = [entry for entry in entries if entry.contestant.name == name and entry.workers == workers and entry.runs]
    return statistics.median(rates(found[0])) if found else 0.0


def print_plain(entries: Sequence[Entry], facts: Sequence[str], say: Callable[[str], Any]) -> None:
    table = Table(*HEADER)
    for row in rows(entries):
        table.add_row(*row)
    for fact in facts:
        say(fact)
    Console(width=max(140, Console().width)).print(table)
    for title, does in _notes(entries).items():
        say(f"{title}: {does}.")


def print_markdown(entries: Sequence[Entry], facts: Sequence[str], say: Callable[[str], Any]) -> None:
    say("\n".join(f"- {fact}" for fact in facts) + "\n")
    for row in (HEADER, ("---",) * len(HEADER), *rows(entries)):
        say(f"| {' | '.join(row)} |")
    say("")
    for title, does in _notes(entries).items():
        say(f"- {title}: {does}.")


def _notes(entries: Sequence[Entry]) -> dict[str, str]:
    return {entry.contestant.title: entry.contestant.does for entry in entries}

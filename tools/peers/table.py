"""Medians and ratios of the rounds: rows of text, printed plain or as Markdown."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.peers import contestants, loaders
from tools.peers.rounds import Entry

Say = Callable[[str], Any]


@dataclass(frozen=True)
class Columns:
    """What differs between tables: the second column, and the contestant that is the ceiling, with its column."""

    second: str
    cell: Callable[[Entry], str]
    ceiling: str
    share: str

    @property
    def header(self) -> tuple[str, ...]:
        rate = "images/s, median (min to max)"
        return ("contestant", self.second, rate, self.share, "ours is", "largest process")


def _gives(entry: Entry) -> str:
    """As "float32, 3 × 224 × 224"."""
    if not entry.runs:
        return ""
    *shape, dtype = entry.runs[0]["gives"]
    return f"{dtype}, {' × '.join(map(str, shape))}"


BUILD = Columns("workers", lambda entry: str(entry.workers), contestants.CEILING, "of decode + encode")
LOAD = Columns("gives", _gives, loaders.CEILING, "of the ceiling")


def rates(entry: Entry, seconds: str = "seconds") -> list[float]:
    """Images per second of each run, over the job itself ("seconds") or from start to exit ("wall")."""
    return [run["images"] / run[seconds] for run in entry.runs]


def rows(columns: Columns, entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """One row for each contestant and number of workers, and a second one for our builder, from start to exit."""
    found: list[tuple[str, ...]] = []
    for entry in entries:
        title = entry.contestant.title
        if entry.not_run:
            found.append((title, columns.cell(entry), f"not run: {entry.not_run}", "", "", ""))
            continue
        found.append(_row(columns, entries, entry, title, "seconds"))
        if entry.contestant.name == contestants.OURS:
            found.append(_row(columns, entries, entry, f"{title}, start to exit", "wall"))
    return found


def _row(columns: Columns, entries: Sequence[Entry], entry: Entry, title: str, seconds: str) -> tuple[str, ...]:
    mine = rates(entry, seconds)
    median = statistics.median(mine)
    ceiling = _median_of(entries, columns.ceiling, entry.workers)
    ours = _median_of(entries, entry.contestant.ours, entry.workers)
    return (
        title,
        columns.cell(entry),
        f"{median:,.0f} ({min(mine):,.0f} to {max(mine):,.0f})",
        f"{100 * median / ceiling:.0f} %" if ceiling else "",
        f"{ours / median:.2f} ×" if ours else "",
        f"{max(run['rss'] for run in entry.runs) / 2**20:,.0f} MiB",
    )


def _median_of(entries: Sequence[Entry], name: str, workers: int) -> float:
    """0 where it was not run."""
    found = [entry for entry in entries if entry.contestant.name == name and entry.workers == workers and entry.runs]
    return statistics.median(rates(found[0])) if found else 0.0


def print_table(columns: Columns, entries: Sequence[Entry], facts: Sequence[str], markdown: bool, say: Say) -> None:
    """Facts, the table, and what each contestant does."""
    titles = {entry.contestant.title: entry.contestant.does for entry in entries}
    does = [f"{title}: {text}." for title, text in titles.items()]
    print_rows(columns.header, rows(columns, entries), facts, does, markdown, say)


def print_rows(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    facts: Sequence[str],
    notes: Sequence[str],
    markdown: bool,
    say: Say,
) -> None:
    """Facts, a table, and notes."""
    if markdown:
        say("\n".join(f"- {fact}" for fact in facts) + "\n")
        for row in (header, ("---",) * len(header), *rows):
            say(f"| {' | '.join(row)} |")
        say("")
    else:
        for fact in facts:
            say(fact)
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        Console(width=max(140, Console().width)).print(table)
    for note in notes:
        say(f"{'- ' if markdown else ''}{note}")

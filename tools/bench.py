"""Measurements against others: the builder beside the ceiling of its codec and beside its peers, in one run."""

import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipeline.cli import Command
from pipeline.errors import UserError
from tools.peers import environments
from tools.peers.contestants import CONTESTANTS, Contestant
from tools.peers.pictures import Pictures, prepare
from tools.peers.rounds import Entry, run_rounds
from tools.peers.table import print_markdown, print_plain, rates

PEERS = [contestant.name for contestant in CONTESTANTS.values() if contestant.is_peer]
CORES = len(os.sched_getaffinity(0))


@click.group()
def main() -> None:
    """Measure, and say what was measured: hardware, versions, repetitions, medians."""


@main.command(cls=Command)
@click.argument("names", nargs=-1, type=click.Choice(PEERS), metavar="[NAME]...")
def peers(names: tuple[str, ...]) -> None:
    """Make the environments of the peers, or of those NAMED, in the user's cache folder.

    \b
    Example:
      python tools/bench.py peers
    """
    failed = []
    for name in names or PEERS:
        click.echo(f"{name}: installing {', '.join(CONTESTANTS[name].requirements)}")
        try:
            environments.make(CONTESTANTS[name])
        except UserError as error:
            click.echo(str(error), err=True)
            failed.append(name)
    if failed:
        raise UserError(f"not installed: {', '.join(failed)}; `build` reports those as not run")


@main.command(cls=Command)
@click.argument("raw", type=click.Path(path_type=Path))
@click.option("--images", type=click.IntRange(min=1), default=2000, show_default=True, help="Pictures in each run.")
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(1, CORES),
    multiple=True,
    default=sorted({1, CORES}),
    show_default="1, and all cores",
    help="Processes, on as many cores; may be given more than once.",
)
@click.option(
    "--only",
    type=click.Choice(list(CONTESTANTS)),
    multiple=True,
    metavar="NAME",
    help="Leave the other contestants out.",
)
@click.option("--markdown", is_flag=True, help="The table as Markdown.")
@click.option(
    "--json", "record", type=click.Path(path_type=Path, dir_okay=False), help="Every run's figures to a file."
)
def build(
    raw: Path,
    images: int,
    repetitions: int,
    workers: tuple[int, ...],
    only: tuple[str, ...],
    markdown: bool,
    record: Path | None,
) -> None:
    """Measure the builder on pictures of RAW, beside JPEG decoding and encoding alone, and beside its peers.

    Rates are those of the job itself: from the first picture to the last file closed, without the start of
    interpreters and workers. The same pictures for all, warm in memory; repetitions are interleaved.

    \b
    Examples:
      python tools/bench.py build /data/imagenet --images 8000 --json bench.json
      python tools/bench.py build photos/ --only penstock --only decode-encode
    """
    chosen = [CONTESTANTS[name] for name in only or CONTESTANTS]
    cache = environments.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=cache) as scratch:
        pictures = prepare(raw, Path(scratch) / "pictures", images)
        entries = run_rounds(
            chosen, sorted(set(workers)), pictures, repetitions, lambda line: click.echo(line, err=True)
        )
    facts = _facts(pictures, repetitions, entries)
    (print_markdown if markdown else print_plain)(entries, facts, click.echo)
    if record:
        record.write_text(json.dumps(_record(pictures, repetitions, entries), indent=1) + "\n")


def _facts(pictures: Pictures, repetitions: int, entries: Sequence[Entry]) -> list[str]:
    versions = _versions(entries)
    return [
        f"{_processor()}, {CORES} cores; Python {platform.python_version()}, Linux {platform.release()}",
        f"{pictures.images:,} pictures ({pictures.distinct:,} distinct; {pictures.left_out:,} left out: no "
        f"whole JPEG), {pictures.mean_bytes / 1e3:.1f} kB and {pictures.mean_pixels / 1e6:.3f} megapixels on average",
        f"{repetitions} repetitions, interleaved; as many cores as workers; {entries[0].per_shard:,} pictures a shard",
        "; ".join(
            f"{name}: " + ", ".join(f"{key} {value}" for key, value in versions[name].items()) for name in versions
        ),
    ]


def _versions(entries: Sequence[Entry]) -> dict[str, dict[str, str]]:
    return {entry.contestant.name: entry.runs[0]["versions"] for entry in entries if entry.runs}


def _record(pictures: Pictures, repetitions: int, entries: Sequence[Entry]) -> dict[str, Any]:
    return {
        "machine": {"processor": _processor(), "cores": CORES, "python": platform.python_version()},
        "pictures": {key: value for key, value in asdict(pictures).items() if key != "folder"},
        "repetitions": repetitions,
        "contestants": {entry.contestant.name: _described(entry.contestant) for entry in entries},
        "results": [_result(entry) for entry in entries],
    }


def _described(contestant: Contestant) -> dict[str, Any]:
    return {"title": contestant.title, "does": contestant.does, "requirements": contestant.requirements}


def _result(entry: Entry) -> dict[str, Any]:
    result: dict[str, Any] = {
        "contestant": entry.contestant.name,
        "workers": entry.workers,
        "per_shard": entry.per_shard,
    }
    if entry.not_run:
        return result | {"not_run": entry.not_run}
    return result | {"images_per_second": rates(entry), "runs": entry.runs}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()

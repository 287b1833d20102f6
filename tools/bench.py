"""Measurements against others: the builder and the loader, each beside a ceiling and beside its peers, in one run."""

import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from pipeline import UserError
from pipeline.cli import Command
from tools.bench_train import train
from tools.peers import environments, facts
from tools.peers.building import Building
from tools.peers.contestants import CONTESTANTS
from tools.peers.datasets import of_images
from tools.peers.environments import ENVIRONMENTS
from tools.peers.facts import CORES
from tools.peers.loaders import LOADERS
from tools.peers.loading import Loading
from tools.peers.made_up import make_up
from tools.peers.pictures import prepare
from tools.peers.processes import run_module
from tools.peers.rounds import Entry, Figures, run_rounds
from tools.peers.table import BUILD, LOAD, print_table

repetitions_option = click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True)
batch_option = click.option("--batch", type=click.IntRange(min=1), default=128, show_default=True)
markdown_option = click.option("--markdown", is_flag=True, help="The table as Markdown.")
json_option = click.option(
    "--json", "record", type=click.Path(path_type=Path, dir_okay=False), help="Every run's figures to a file."
)


def only_option(names: list[str]) -> Callable[..., Any]:
    return click.option(
        "--only", type=click.Choice(names), multiple=True, metavar="NAME", help="Leave the other contestants out."
    )


@click.group()
def main() -> None:
    """Measure, and say what was measured: hardware, versions, repetitions, medians."""


main.add_command(train)


@main.command(cls=Command)
@click.argument("names", nargs=-1, type=click.Choice(list(ENVIRONMENTS)), metavar="[NAME]...")
def peers(names: tuple[str, ...]) -> None:
    """Make the environments of the peers, or of those NAMED, in the user's cache folder.

    \b
    Example:
      python tools/bench.py peers
    """
    failed = []
    for name in names or ENVIRONMENTS:
        click.echo(f"{name}: installing {', '.join(ENVIRONMENTS[name].requirements)}")
        try:
            environments.make(ENVIRONMENTS[name])
        except UserError as error:
            click.echo(str(error), err=True)
            failed.append(name)
    if failed:
        raise UserError(f"not installed: {', '.join(failed)}; `build` and `load` report those as not run")


@main.command(cls=Command)
@click.argument("raw", type=click.Path(path_type=Path))
@click.option("--images", type=click.IntRange(min=1), default=2000, show_default=True, help="Pictures in each run.")
@repetitions_option
@click.option(
    "--workers",
    type=click.IntRange(1, CORES),
    multiple=True,
    default=sorted({1, CORES}),
    show_default="1, and all cores",
    help="Processes, on as many cores; may be given more than once.",
)
@only_option(list(CONTESTANTS))
@markdown_option
@json_option
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
    entries = [Entry(CONTESTANTS[name], number) for name in only or CONTESTANTS for number in sorted(set(workers))]
    with _scratch() as scratch:
        pictures = prepare(raw, scratch / "pictures", images)
        building = Building.of(pictures, workers)
        run_rounds(entries, building.run, repetitions, _say)
    lines = [
        facts.machine(),
        f"{pictures.images:,} pictures ({pictures.distinct:,} distinct; {pictures.left_out:,} left out: no "
        f"whole JPEG), {pictures.mean_bytes / 1e3:.1f} kB and {pictures.mean_pixels / 1e6:.3f} megapixels on average",
        f"{repetitions} repetitions, interleaved; as many cores as workers; {building.per_shard:,} pictures a shard",
        facts.versions(entries),
    ]
    print_table(BUILD, entries, lines, markdown, click.echo)
    described = {key: value for key, value in asdict(pictures).items() if key != "folder"}
    measured = {"pictures": described, "per_shard": building.per_shard, "repetitions": repetitions}
    _save(record, facts.record(measured, entries))


@main.command(cls=Command)
@click.argument("dataset", type=click.Path(path_type=Path))
@batch_option
@click.option("--batches", type=click.IntRange(min=1), default=100, show_default=True, help="Batches in each run.")
@repetitions_option
@only_option(list(LOADERS))
@markdown_option
@json_option
def load(
    dataset: Path,
    batch: int,
    batches: int,
    repetitions: int,
    only: tuple[str, ...],
    markdown: bool,
    record: Path | None,
) -> None:
    """Measure how fast training views of DATASET come on this machine's cores, beside DALI's decoder, and peers.

    Rates are those of batches after a warm-up, that nobody looks at: without the start of interpreters, workers and
    compilers. The same pictures for all, warm in memory: as many as a run takes, repeated where there are fewer;
    repetitions are interleaved. Peers that have formats of their own get those written first, untimed.

    \b
    Examples:
      python tools/bench.py load /data/imagenet-256 --json load.json
      python tools/bench.py load /data/imagenet-256 --only decode --only penstock-uint8
    """
    entries = [Entry(LOADERS[name], CORES) for name in only or LOADERS]
    with _scratch() as scratch:
        loading = Loading(scratch / "dataset", scratch, batch, batches, _say)
        selected = of_images(dataset, loading.taken(CORES), loading.dataset)
        stored = np.unique(selected.samples("train"))
        run_rounds(entries, loading.run, repetitions, _say)
    lines = [
        facts.machine(),
        f"{batches:,} batches of {batch:,} views of 224 × 224, after a warm-up; from {len(stored):,} pictures of "
        f"{selected.recipe.size} × {selected.recipe.size}, {stored['size'].mean() / 1e3:.1f} kB on average",
        f"{repetitions} repetitions, interleaved; {CORES} threads or processes each",
        facts.versions(entries),
    ]
    print_table(LOAD, entries, lines + facts.waits(entries), markdown, click.echo)
    measured = {"batch": batch, "batches": batches, "samples": len(stored), "repetitions": repetitions}
    _save(record, facts.record(measured, entries))


@main.command("first-batch", cls=Command)
@click.option("--samples", type=click.IntRange(min=1), default=1281167, show_default=True)
@click.option("--shards", type=click.IntRange(min=1), default=1000, show_default=True)
@batch_option
@repetitions_option
@json_option
def first_batch(samples: int, shards: int, batch: int, repetitions: int, record: Path | None) -> None:
    """Measure the seconds from nothing to our loader's first batch, in a fresh process, once it has imported it.

    The dataset directory is made up: so many records and shards, that repeat a few drawn pictures, warm in memory.

    \b
    Example:
      python tools/bench.py first-batch --samples 1281167 --shards 1000
    """
    with _scratch() as scratch:
        root = make_up(scratch, samples, shards).root
        runs = [run_module("", "first_batch", (root, batch), CORES, batch) for _ in range(repetitions)]
    for line in (
        facts.machine(),
        f"{samples:,} made-up samples in {shards:,} shards, batches of {batch:,}; {repetitions} repetitions, medians",
        ", ".join(f"{key} {value}" for key, value in runs[0]["versions"].items()),
        *(f"{stage}: {statistics.median(run['stages'][stage] for run in runs):.3f} s" for stage in runs[0]["stages"]),
        f"in all: {statistics.median(run['seconds'] for run in runs):.3f} s",
    ):
        click.echo(line)
    measured = {"samples": samples, "shards": shards, "batch": batch, "repetitions": repetitions}
    _save(record, {"machine": facts.machine_record(), **measured, "runs": runs})


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in the cache, deleted afterwards."""
    cache = environments.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=cache) as folder:
        yield Path(folder)


def _save(record: Path | None, figures: Figures) -> None:
    if record:
        record.write_text(json.dumps(figures, indent=1) + "\n")


def _say(line: str) -> None:
    click.echo(line, err=True)


if __name__ == "__main__":
    main()

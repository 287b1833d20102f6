"""Draws the validation curves of runs into one PNG: python tools/curve.py RUN … --out docs/quarter.png"""

from pathlib import Path

import click

from pipeline import UserError
from pipeline.cli import Command
from pipeline.files import write_bytes_aside
from trainer.figures.charts import Band, Line, chart
from trainer.figures.drawing import COLOURS, png, stacked
from trainer.metrics import read

HEIGHT = 480  # pixels


@click.command(cls=Command)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The PNG to write.")
@click.option("--limit", type=click.FloatRange(0, 100), help="A level to mark, in percent.")
def main(runs: tuple[Path, ...], out: Path, limit: float | None) -> None:
    """Top-1 error of validation (centre view) over the steps of each of RUNS."""
    lines = [curve(run, COLOURS[i % len(COLOURS)]) for i, run in enumerate(runs)]
    band = None if limit is None else Band(f"{limit:g} %", limit, limit)
    drawn = chart("Top-1 error of validation on the centre view, % of images", lines, HEIGHT, band=band)
    write_bytes_aside(out, png(stacked(drawn)))
    click.echo(out)


def curve(run: Path, colour: str) -> Line:
    """Raises UserError where a run was not validated."""
    points = [(line["step"], line["top1_error"]) for line in read(run) if "top1_error" in line]
    if not points:
        raise UserError(f"{run.name}: no validation in its metrics.jsonl; name run directories that were validated")
    steps, errors = zip(*points)
    return Line(f"{run.name}: {errors[-1]:.1f} %", steps, errors, colour)


if __name__ == "__main__":
    main()

"""Draws the validation curves of runs into one PNG: python tools/curve.py RUN … --out docs/quarter.png"""

from pathlib import Path

import click
from PIL import Image, ImageDraw, ImageFont

from pipeline.cli import Command
from pipeline.errors import UserError
from trainer.metrics import read

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 960, 520, 70, 50, 30, 60  # pixels; the last four are margins
COLOURS = ("#1f5f8b", "#b4530f", "#3b7d3b", "#7a3e9d")
INK, LINE = "#1c2733", "#d5dce2"


@click.command(cls=Command)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The PNG to write.")
@click.option("--limit", type=float, help="A level to mark, in percent.")
def main(runs: tuple[Path, ...], out: Path, limit: float | None) -> None:
    """Top-1 error of validation (centre view) over the steps of each of RUNS."""
    curves = {
        run.name: [(line["step"], line["top1_error"]) for line in read(run) if "top1_error" in line] for run in runs
    }
    for name, points in curves.items():
        if not points:
            raise UserError(f"{name}: no validation in its metrics.jsonl; name run directories that were validated")
    draw(curves, limit).save(out)
    click.echo(out)


def draw(curves: dict[str, list[tuple[int, float]]], limit: float | None) -> Image.Image:
    """(step, percent) by name → a picture."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=17)
    last = max(points[-1][0] for points in curves.values())

    def place(step: float, percent: float) -> tuple[float, float]:
        x = LEFT + step / last * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - percent / 100 * (HEIGHT - TOP - BOTTOM)

    for percent in range(0, 101, 20):
        pen.line([place(0, percent), place(last, percent)], LINE)
        pen.text((LEFT - 10, place(0, percent)[1]), f"{percent} %", INK, font, "rm")
    for quarter in range(5):
        step = last * quarter // 4
        pen.text((place(step, 0)[0], HEIGHT - BOTTOM + 10), f"{step:,}", INK, font, "ma")
    pen.text((WIDTH // 2, HEIGHT - 12), "steps", INK, font, "ms")
    pen.text((LEFT, 14), "top-1 error of validation, centre view", INK, font)
    if limit is not None:
        pen.line([place(0, limit), place(last, limit)], INK)
        pen.text((LEFT + 6, place(0, limit)[1] + 4), f"{limit:g} %", INK, font)
    for i, (name, points) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        pen.line([place(*point) for point in points], colour, 3, "curve")
        pen.text((WIDTH - RIGHT, TOP + 24 * i), f"{name}: {points[-1][1]:.1f} %", colour, font, "ra")
    return image


if __name__ == "__main__":
    main()

"""`make demo`: raw pictures → shards → training → evaluation → a page, by the very commands of the README."""

if __name__ == "__main__":  # before the imports that take long
    from pipeline import process

    process.begin()

import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from pipeline import UserError, manifest
from pipeline.cli import Command
from trainer.metrics import read

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("demo")


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("raw", type=click.Path(path_type=Path), required=False)
@click.option("--limit", type=click.IntRange(min=10), default=5000, help="Use at most this many of your pictures.")
@click.option("--out", type=click.Path(path_type=Path), help="Where NAME is made.  [default: demo]")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As for `trainer train`; may be repeated.")
def main(raw: Path | None, limit: int, out: Path | None, settings: tuple[str, ...]) -> None:
    """Run the whole chain on RAW, or without RAW on pictures that are drawn for it. Everything goes to demo/NAME."""
    folder = _demo_folder(raw, FOLDER if out is None else Path(os.path.realpath(out)))
    for name in ("raw", "dataset", "run"):  # all of an earlier demo on the same RAW; nothing else is ever touched
        shutil.rmtree(ROOT / folder / name, ignore_errors=True)
    seconds: dict[str, float] = {}

    def step(title: str, *command: object) -> None:
        words = [str(word) for word in command]
        click.secho(f"\n{title}: python {shlex.join(words)}", bold=True)
        started = time.monotonic()
        if subprocess.run([sys.executable, *words], check=False, cwd=ROOT).returncode:
            raise UserError(f"demo: stopped at this step ({title.lower()}), for the reason above")
        seconds[title] = time.monotonic() - started

    if raw:
        source = Path(os.path.realpath(raw))
        click.echo(f"demo: at most {limit:,} pictures of {raw}, drawn evenly over it (LIMIT=N for more)")
    else:
        source = folder / "raw"
        step("Draw raw pictures", "tools/make_raw.py", source)
    dataset, run = folder / "dataset", folder / "run"
    step("Build shards", "tools/build_shards.py", source, dataset, "--samples-per-shard", 256, "--limit", limit)
    if not manifest.load(ROOT / dataset).splits.get("val"):
        raise UserError(f"{raw}: too few pictures to hold some out for validation; give 50 or more, or a val/ folder")
    overrides = [f"--set={setting}" for setting in settings]
    step("Train", "-m", "trainer", "train", "--data", dataset, "--recipe", "tiny", "--out", run, *overrides)
    step("Evaluate", "-m", "trainer", "evaluate", "--data", dataset, "--checkpoint", run)
    step("Draw figures", "-m", "trainer", "figures", run, "--data", dataset)
    _print_table(ROOT / dataset, ROOT / run, seconds)


def _demo_folder(raw: Path | None, out: Path) -> Path:
    """Return OUT/drawn, or OUT/NAME-DIGEST for RAW, from ROOT. Raises UserError where RAW is missing or in the way."""
    if raw is None:
        return out / "drawn"
    resolved = Path(os.path.realpath(raw))
    if not resolved.is_dir():
        raise UserError(f"{raw}: no such directory; RAW is the folder with your raw images or archives")
    if resolved.is_relative_to(ROOT / out) or ROOT.is_relative_to(resolved):
        raise UserError(f"{raw}: holds the project, or lies in {out}/, where demos are written; move it elsewhere")
    digest = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:6]
    return out / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', resolved.name).strip('-')}-{digest}"


def _print_table(dataset: Path, run: Path, seconds: dict[str, float]) -> None:
    built, lines = manifest.load(dataset), read(run)
    samples = sum(split.samples for split in built.splits.values())
    skipped = sum(split.skipped for split in built.splits.values())
    times = [line["time"] for line in lines if line["kind"] == "train"]
    speed, stall = (statistics.median(time[key] for time in times) for key in ("images_per_second", "stall"))
    errors = json.loads((run / "evaluation.json").read_text())
    centre, ten = errors["centre"]["top1_error"], errors["ten"]["top1_error"]
    chance = 100 - 100 / len(built.classes)
    rate = samples / seconds["Build shards"]
    results = {
        "Build shards": f"{samples:,} samples, {skipped} skipped, {len(built.classes)} classes, {rate:,.0f} images/s",
        "Train": f"{lines[-1]['step']} steps, {speed:,.0f} images/s, stall {100 * stall:.1f} % (medians)",
        "Evaluate": f"centre view top-1 error {centre:.1f} %, ten views {ten:.1f} % (guessing: {chance:.0f} %)",
    }
    table = Table("step", "seconds", "result", title="demo")
    for title, duration in (seconds | {"total": sum(seconds.values())}).items():
        table.add_row(title, f"{duration:.0f}", results.get(title, ""))
    Console(width=max(100, Console().width)).print(table)
    click.echo(f"The page: {run / 'report.html'}")


if __name__ == "__main__":
    main()

"""The harness of every benchmark: rows, jobs, interleaved repetitions, medians and ratios, one table; peers."""

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import click

from pipeline import UserError
from pipeline.cli import Command

ROOT = Path(__file__).resolve().parents[2]
CORES = len(os.sched_getaffinity(0))
COUNT = click.IntRange(min=1)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
PATIENCE = 3600.0  # seconds after which a job hangs
HEADER = ("row", "workers", "images/s, median (min to max)", "of the ceiling", "ours is", "largest process")
PIP = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet")
READY = "penstock-bench"  # file in a complete environment: the requirements that it was made with
TORCH, NUMPY, PILLOW = "torch==2.13.0", "numpy==2.4.6", "pillow==13.0.0"
IMG2DATASET = ("img2dataset==1.47.0", "opencv-python-headless==4.14.0.94", "albumentations==1.4.24")
ENVIRONMENTS = {
    "img2dataset": (*IMG2DATASET, "webdataset==0.2.111", "pyarrow==26.0.1", NUMPY),
    "litdata": ("litdata==0.2.76", TORCH, "torchvision==0.28.0", PILLOW, NUMPY),
    "webdataset": ("webdataset==1.0.2", TORCH, PILLOW, NUMPY),
    "ffcv": ("ffcv==1.0.2", TORCH, "opencv-python==5.0.0.93", PILLOW, "numba==0.68.1", NUMPY),
    "grain": ("grain==0.2.18", "simplejpeg==1.9.0", NUMPY),
    "opencv": ("opencv-python-headless==5.0.0.93", NUMPY),
    "tensorflow": ("tensorflow-cpu==2.21.0", NUMPY),
}
ADVICE = "ffcv is compiled: apt-get install libopencv-dev libturbojpeg0-dev pkg-config build-essential"
Figures = dict[str, Any]
Texts = Sequence[str]


@dataclass
class Row:
    """A row of a benchmark, and the figures of its repetitions so far: of each at least "images" and "seconds"."""

    name: str  # for --only and in the record
    title: str
    function: str = ""  # of the script that measures it
    options: Figures = field(default_factory=dict)  # of the function
    environment: str = ""  # of ENVIRONMENTS; none: our own Python
    against: list[str] = field(default_factory=list)  # rows that it is compared with
    workers: int = CORES
    facts: Figures = field(default_factory=dict)
    runs: list[Figures] = field(default_factory=list)
    failed: str = ""  # the reason

    def fresh(self, **changes: Any) -> "Row":
        """Return the row without figures, and with changes."""
        return replace(self, runs=[], facts={}, **changes)

    def rates(self, seconds: str = "seconds") -> list[float]:
        """Return the images/s of each repetition."""
        return [run["images"] / run[seconds] for run in self.runs]

    def fail(self, reason: str) -> None:
        """Keep the reason of a failure; the figures so far do not count."""
        self.runs, self.failed = [], reason
        click.echo(f"{self.name}, workers {self.workers}: not run: {reason}", err=True)


def interleave(rows: Sequence[Row], run: Callable[[Row], Figures], repetitions: int, images: int | None = None) -> None:
    """Run all rows once, then all again in the other order, and so on: the machine's drift meets every row alike.

    A row for which `run` raises UserError, or gives another number of images, fails; the others go on.
    """
    for repetition in range(repetitions):
        for row in list(rows)[:: -1 if repetition % 2 else 1]:
            if row.failed:
                continue
            try:
                figures = run(row)
            except UserError as error:
                row.fail(str(error))
                continue
            if images not in (None, figures["images"]):
                row.fail(f"gave {figures['images']:,} of {images:,} pictures")
                continue
            row.runs.append(figures)
            rate = number(row.rates()[-1])
            click.echo(f"{repetition + 1}/{repetitions} {row.name}, workers {row.workers}: {rate}/s", err=True)


def find_row(rows: Sequence[Row], name: str, workers: int = CORES) -> Row | None:
    """Return the row of that name and number of workers if it was measured."""
    return next((row for row in rows if row.name == name and row.workers == workers and row.runs), None)


def ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    """Return the ratio of the medians."""
    return median(rates) / median(others)


def ratio_text(rates: Sequence[float], others: Sequence[float]) -> str:
    """Return the ratio of the medians, and the range of the ratios of single repetitions."""
    pairs = [rate / other for rate, other in zip(rates, others)]
    return f"{ratio(rates, others):.2f} × ({min(pairs):.2f} to {max(pairs):.2f})"


def spread(rates: Sequence[float]) -> str:
    """Return median, minimum and maximum as text."""
    return f"{number(median(rates))} ({number(min(rates))} to {number(max(rates))})"


def number(rate: float) -> str:
    """Return a rate with three digits or more."""
    return f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}"


def cells(rows: Sequence[Row], row: Row, ceiling: str, detail: str) -> tuple[str, ...]:
    """Return the row's cells below HEADER; `detail` is that of the second column."""
    if row.failed:
        return row.title, detail, f"not run: {row.failed}", "", "", ""
    best, ours = find_row(rows, ceiling, row.workers), find_row(rows, "".join(row.against[:1]), row.workers)
    share = f"{100 * ratio(row.rates(), best.rates()):.0f} %" if best else ""
    compared = ratio_text(ours.rates(), row.rates()) if ours else ""
    memory = f"{max(run['rss'] for run in row.runs) / 2**20:,.0f} MiB"
    return row.title, detail, spread(row.rates()), share, compared, memory


def publish(
    header: Texts, table: Sequence[Texts], rows: Sequence[Row], facts: Texts, notes: Texts, **report: Any
) -> None:
    """Print facts, a table and notes as Markdown, and write the record of the rows; `report` is of report_options."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    processor = models[0].partition(":")[2].strip() if models else platform.machine()
    packages: dict[str, dict[str, str]] = {}
    for row in rows:
        for run in row.runs[:1]:
            packages.setdefault(row.environment or "here", {}).update(run.get("versions", {}))
    facts = [
        f"{processor}, {CORES} cores; Python {platform.python_version()}, Linux {platform.release()}",
        shlex.join(["python", "tools/bench", *sys.argv[1:]]),
        f"n = {report['repetitions']} repetitions, interleaved; medians",
        *facts,
        *(f"{name}: {', '.join(map(' '.join, versions.items()))}" for name, versions in packages.items() if versions),
    ]
    table = [header, ["---"] * len(header), *table]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in table]
    for line in (*(f"- {fact}" for fact in facts), "", *lines, "", *(f"- {note}" for note in notes)):
        click.echo(line)
    write_record(report["record"], facts, rows)


def write_record(file: Path | None, facts: Sequence[str], rows: Sequence[Row]) -> None:
    """Write the figures of every repetition as JSON, if a file was named."""
    if file:
        records = [{key: value for key, value in asdict(row).items() if value} for row in rows]
        file.write_text(json.dumps({"facts": facts, "rows": records}, indent=1) + "\n")


def report_options(names: Sequence[str] = ()) -> Callable[[Any], Any]:
    """Return a decorator that adds --only, unless there is nothing to choose, and the options which `publish` takes."""
    rows = f"Rows to measure: {', '.join(names)}."
    file = click.Path(path_type=Path, dir_okay=False)
    only = click.option("--only", type=click.Choice(names), multiple=True, metavar="NAME", help=rows)
    record = click.option("--json", "record", type=file, help="Write the figures of every repetition to a file.")
    repetitions = click.option("--repetitions", type=COUNT, default=5, show_default=True, help="Of each row.")
    return lambda command: repetitions(only(record(command)) if names else record(command))


baseline_option = click.option(
    "--baseline",
    type=FOLDER,
    metavar="DIR",
    help="Measure our own code of another checkout as well, and print the ratio of the medians.",
)


def with_baseline(rows: Sequence[Row], baseline: Path | None) -> list[Row]:
    """Return the rows, and after each row of our own code the same one for another checkout."""
    result = []
    for row in rows:
        result.append(row)
        if baseline and "checkout" in row.options:
            options = row.options | {"checkout": str(baseline.resolve())}
            result.append(row.fresh(name=f"{row.name}-baseline", title=f"{row.title}, of {baseline}", options=options))
    return result


def baseline_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line for each row that has a baseline: the ratio of the medians, and its range over repetitions."""
    pairs = [(row, find_row(rows, f"{row.name}-baseline", row.workers)) for row in rows if row.runs]
    return [
        f"{row.name}, workers {row.workers}: {ratio_text(row.rates(), other.rates())} the baseline's rate"
        for row, other in pairs
        if other
    ]


def run_job(script: str, row: Row, job: Figures) -> Figures:
    """Run the row's function of tools/bench/SCRIPT in the row's Python; return the figures that it prints last.

    The job has a session of its own, so that one that hangs is ended with all its processes.

    Raises:
        UserError: the environment is missing; the function fails, or takes longer than PATIENCE.
    """
    words = json.dumps(job | {"function": row.function, "workers": row.workers, "options": row.options})
    command = [str(python_of(row.environment)), "-P", str(ROOT / "tools/bench" / script), words]
    streams: Figures = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, start_new_session=True, **streams) as process:
        try:
            out, errors = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"hangs: not done after {PATIENCE:,.0f} s") from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        click.echo(errors[-4000:], err=True)  # the table has the last line only
        raise UserError(f"failed ({process.returncode}): {(errors.strip() or 'nothing on stderr').splitlines()[-1]}")
    try:
        return dict(json.loads(out.splitlines()[-1]))
    except (IndexError, ValueError) as error:
        raise UserError(f"printed no figures, but {out.strip()[-200:]!r}") from error


def environment_folder(name: str) -> Path:
    """Return the folder of a peer's virtual environment, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock" / "bench" / name


def python_of(environment: str) -> Path:
    """Return the Python of an environment. Raises UserError where it is not installed, or with other versions."""
    if not environment:
        return Path(sys.executable)
    folder = environment_folder(environment)
    if not (folder / READY).is_file() or (folder / READY).read_text().split() != list(ENVIRONMENTS[environment]):
        raise UserError(f"not installed; python tools/bench peers {environment}")
    return folder / "bin" / "python"


@click.command(cls=Command)
@click.argument("names", nargs=-1, type=click.Choice(list(ENVIRONMENTS)), metavar="[NAME]...")
def peers(names: tuple[str, ...]) -> None:
    """Make the virtual environments of the peers, or of those NAMED, in the user's cache folder.

    \b
    Example:
      python tools/bench peers webdataset litdata
    """
    failed = []
    for name in names or ENVIRONMENTS:
        folder, packages = environment_folder(name), ENVIRONMENTS[name]
        click.echo(f"{name}: installing {', '.join(packages)}", err=True)
        venv = [sys.executable, "-m", "venv", "--clear", str(folder)]
        pip = [str(folder / "bin" / "python"), *PIP, *packages]
        if any(subprocess.run(command, check=False, stdout=sys.stderr).returncode for command in (venv, pip)):
            failed.append(name)
        else:
            (folder / READY).write_text("\n".join(packages))
    if failed:
        raise UserError(
            f"not installed: {', '.join(failed)}; `build` and `load` report their rows as not run; {ADVICE}"
        )

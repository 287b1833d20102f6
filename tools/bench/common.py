"""The harness of every benchmark: rows, interleaved repetitions, medians and ratios, one table, peers' environments."""

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
PATIENCE, SLOWEST = 60.0, 5.0  # seconds to start; images/s and worker: a job that takes longer than both hangs
READY = "penstock-bench"  # file in a complete environment: the requirements that it was made with
TORCH, NUMPY, PILLOW = "torch==2.13.0", "numpy==2.4.6", "pillow==13.0.0"
ENVIRONMENTS = {
    "img2dataset": (
        "img2dataset==1.47.0",
        "opencv-python-headless==4.14.0.94",
        "albumentations==1.4.24",
        "webdataset==0.2.111",
        "pyarrow==26.0.1",
        NUMPY,
    ),
    "litdata": ("litdata==0.2.76", TORCH, "torchvision==0.28.0", PILLOW, NUMPY),
    "webdataset": ("webdataset==1.0.2", TORCH, PILLOW, NUMPY),
    "ffcv": ("ffcv==1.0.2", TORCH, "opencv-python==5.0.0.93", PILLOW, "numba==0.68.1", NUMPY),
    "opencv": ("opencv-python-headless==5.0.0.93", NUMPY),
}
ADVICE = {"ffcv": "it is compiled: apt-get install libopencv-dev libturbojpeg0-dev pkg-config build-essential"}
Figures = dict[str, Any]


@dataclass
class Row:
    """A row of a benchmark, and the figures of its repetitions so far: of each at least "images" and "seconds"."""

    name: str  # for --only and in the record
    title: str
    function: str = ""  # of peers_build.py, peers_load.py or train.py; default: the name. Its docstring is the note.
    options: Figures = field(default_factory=dict)  # of the function
    environment: str = ""  # of ENVIRONMENTS; none: our own Python
    against: list[str] = field(default_factory=list)  # rows that it is compared with
    prepare: str = ""  # a function that runs once, untimed, before the first repetition
    workers: int = CORES
    facts: Figures = field(default_factory=dict)
    runs: list[Figures] = field(default_factory=list)
    failed: str = ""  # the reason

    def __post_init__(self) -> None:
        self.function = self.function or self.name

    def fresh(self, **changes: Any) -> "Row":
        """Return the row without figures, and with changes."""
        return replace(self, runs=[], facts={}, **changes)

    def rates(self, seconds: str = "seconds") -> list[float]:
        """Return the images/s of each repetition."""
        return [run["images"] / run[seconds] for run in self.runs]

    def record(self) -> Figures:
        """Return the row for the JSON record."""
        kept = {key: value for key, value in asdict(self).items() if value}
        return kept | ({"images_per_second": self.rates()} if self.runs else {})


def interleave(rows: Sequence[Row], run: Callable[[Row], Figures], repetitions: int) -> None:
    """Run all rows once, then all again in the other order, and so on: the machine's drift meets every row alike.

    A row for which `run` raises UserError keeps the reason and is not run again; the others go on.
    """
    for repetition in range(repetitions):
        for row in list(rows)[:: -1 if repetition % 2 else 1]:
            if row.failed:
                continue
            try:
                row.runs.append(run(row))
            except UserError as error:
                fail(row, str(error))
            else:
                rate = row.rates()[-1]
                text = f"{rate / 1e9:,.1f} G/s" if rate > 1e7 else f"{rate:,.1f}/s"
                log(f"{repetition + 1}/{repetitions} {row.name}, workers {row.workers}: {text}")


def fail(row: Row, reason: str) -> None:
    """Mark a row as failed; its figures so far do not count."""
    row.runs, row.failed = [], reason
    log(f"{row.name}, workers {row.workers}: not run: {reason}")


def log(line: str) -> None:
    """Write a line of progress to stderr."""
    click.echo(line, err=True)


def find_row(rows: Sequence[Row], name: str, workers: int = 0) -> Row | None:
    """Return the row of that name (and number of workers, unless 0) if it was measured."""
    return next((row for row in rows if row.name == name and workers in (0, row.workers) and row.runs), None)


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


def hardware() -> str:
    """Return the processor, the cores, and the versions of Python and Linux."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    system = f"Python {platform.python_version()}, Linux {platform.release()}"
    return f"{models[0] if models else platform.machine()}, {CORES} cores; {system}"


def limit(images: int, workers: int) -> float:
    """Return the seconds after which a job hangs."""
    return PATIENCE + images / SLOWEST / workers


def versions(rows: Sequence[Row]) -> str:
    """Return the versions of each row's packages; rows of equal versions share an entry."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.runs and (packages := row.runs[0].get("versions")):
            text = ", ".join(f"{key} {value}" for key, value in packages.items())
            names.setdefault(text, []).append(row.name)
    return "; ".join(f"{', '.join(dict.fromkeys(users))}: {text}" for text, users in names.items())


def notes_of(rows: Sequence[Row], functions: Mapping[str, Callable[..., Any]]) -> list[str]:
    """Return a line for each function: the title of its first row, and its docstring."""
    titles = {row.function: row.title for row in reversed(rows) if not row.name.endswith("-baseline")}
    notes = {title: functions[function].__doc__ or "" for function, title in reversed(titles.items())}
    return [f"{title}: {' '.join(text.split())}" for title, text in notes.items()]


def publish(
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    rows: Sequence[Row],
    facts: Sequence[str],
    notes: Sequence[str],
    *,
    repetitions: int,
    markdown: bool,
    record: Path | None,
) -> None:
    """Print facts, a table and notes, and write the record of the rows."""
    command = shlex.join(["python", "tools/bench", *sys.argv[1:]])
    measured = f"n = {repetitions} repetitions, interleaved; medians"
    facts = [hardware(), command, measured, *facts, versions(rows)]
    bullet, edge, between = ("- ", "|", " | ") if markdown else ("", "", "  ")
    cells = [header, *[["---"] * len(header)] * markdown, *cells]
    widths = [0 if markdown else max(map(len, column)) for column in zip(*cells)]
    lines = [f"{edge} {between.join(map(str.ljust, line, widths)).rstrip()} {edge}".strip() for line in cells]
    for line in (*(bullet + fact for fact in facts if fact), "", *lines, "", *(bullet + note for note in notes)):
        click.echo(line)
    write_record(record, facts, rows)


def write_record(file: Path | None, facts: Sequence[str], rows: Sequence[Row]) -> None:
    """Write the figures of every repetition as JSON, if a file was named."""
    if file:
        file.write_text(json.dumps({"facts": facts, "rows": [row.record() for row in rows]}, indent=1) + "\n")


def report_options(names: Sequence[str]) -> Callable[[Any], Any]:
    """Return a decorator that adds --only, and the options which `publish` takes."""
    file = click.Path(path_type=Path, dir_okay=False)
    rows = f"Rows to measure: {', '.join(names)}."
    options = (
        click.option("--repetitions", type=COUNT, default=5, show_default=True, help="Of each row."),
        click.option("--only", type=click.Choice(names), multiple=True, metavar="NAME", help=rows),
        click.option("--markdown", is_flag=True, help="Print the table as Markdown."),
        click.option("--json", "record", type=file, help="Write the figures of every repetition to a file."),
    )

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


baseline_option = click.option(
    "--baseline",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Measure our own code of another checkout as well, and print the ratio of the medians.",
)


def with_baseline(rows: Sequence[Row], baseline: Path | None) -> list[Row]:
    """Return the rows, and before each row of our own code the same one for another checkout."""
    found = []
    for row in rows:
        if baseline and "checkout" in row.options:
            options = row.options | {"checkout": str(baseline.resolve())}
            title = f"{row.title}, of {baseline}"
            found.append(row.fresh(name=f"{row.name}-baseline", title=title, options=options))
        found.append(row)
    return found


def baseline_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line for each row that has a baseline: the ratio of the medians, and its range over repetitions."""
    pairs = [(row, find_row(rows, f"{row.name}-baseline", row.workers)) for row in rows if row.runs]
    return [
        f"{row.name}, workers {row.workers}: {ratio_text(row.rates(), other.rates())} the baseline's rate"
        for row, other in pairs
        if other
    ]


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder in the user's cache; it is deleted afterwards."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=cache_folder()) as folder:
        yield Path(folder)


def run_job(script: str, row: Row, job: Figures, seconds: float, function: str = "") -> Figures:
    """Run a function of tools/bench/SCRIPT in the Python of its row; return the figures that it prints last.

    Raises:
        UserError: the environment is missing; the function fails, or takes longer than `seconds`.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job | {"function": function or row.function, "workers": row.workers, "options": row.options}, file)
        file.flush()
        command = [str(python_of(row.environment)), "-P", str(ROOT / "tools/bench" / script), file.name]
        lines = _output(command, seconds).splitlines()
    if function:  # it has no figures
        return {}
    try:
        figures: Figures = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise UserError(f"printed no figures, but {''.join(lines[-1:])[-200:]!r}") from error
    return figures


def _output(command: Sequence[str], seconds: float) -> str:
    """Run a command in a session of its own, so that one that hangs is ended with all its processes."""
    pipe, path = subprocess.PIPE, {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=os.environ | path, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        try:
            out, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"hangs: not done after {seconds:,.0f} s") from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        log(errors[-4000:])  # the table has the last line only
        raise UserError(f"failed ({process.returncode}): {(errors.strip() or 'nothing on stderr').splitlines()[-1]}")
    return out


def cache_folder() -> Path:
    """Return the folder of environments and scratch files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock" / "bench"


def python_of(environment: str) -> Path:
    """Return the Python of an environment. Raises UserError where it is not installed, or with other versions."""
    if not environment:
        return Path(sys.executable)
    folder = cache_folder() / environment
    with suppress(FileNotFoundError):
        if (folder / READY).read_text() == _requirements(environment):
            return folder / "bin" / "python"
    raise UserError(f"not installed; python tools/bench peers {environment}")


def _requirements(environment: str) -> str:
    return "\n".join((f"python {sys.version}", *ENVIRONMENTS[environment], ""))


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
        log(f"{name}: installing {', '.join(ENVIRONMENTS[name])}")
        folder = cache_folder() / name
        pip = [str(folder / "bin/python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], [*pip, *ENVIRONMENTS[name]]):
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                log("\n".join((done.stderr or done.stdout).strip().splitlines()[-15:]))
                failed.append(f"{name} ({ADVICE[name]})" if name in ADVICE else name)
                break
        else:
            (folder / READY).write_text(_requirements(name))
    if failed:
        raise UserError(f"not installed: {', '.join(failed)}; `build` and `load` report their rows as not run")

"""`bench serve`: a build by `penstock serve`, alone and while others ask the server."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
import httpx

from pipeline import UserError
from pipeline.cli import Command
from tools.bench import common
from tools.bench.build import prepare
from tools.bench.clients import ASKS, PAGES, READ, SILENCE, Clients
from tools.bench.common import COUNT, PATIENCE, ROOT, Figures, Row, find_row, ratio_text

BUILT = "built"  # the data set
COMMAND, ALONE, WATCHED = "command", "alone", "watched"
ROWS = (
    Row(COMMAND, "the command, without a server", "", {}),
    Row(ALONE, "a job that nobody watches", "", {}, against=[COMMAND]),
    Row(WATCHED, "the job, with all clients", "", {}, against=[ALONE]),
)
HEADER = ("row", "images/s, median (min to max)", "compared", "server, core-seconds", "clients, core-seconds", "server")
EVENTS = 240  # shards of the build, each of which is an event


@click.command(cls=Command)
@click.argument("raw", type=click.Path(path_type=Path))
@click.option("--images", type=COUNT, default=30_000, show_default=True, help="Pictures in each build.")
@click.option("--dashboards", type=click.IntRange(0, 100), default=30, show_default=True, help="Open pages.")
@click.option("--readers", type=click.IntRange(0, 100), default=4, show_default=True, help="Readers of shards.")
@click.option("--megabytes", type=COUNT, default=20, show_default=True, help="MB/s that each reader takes at most.")
@common.report_options([row.name for row in ROWS])
def serve(
    raw: Path, images: int, dashboards: int, readers: int, megabytes: int, only: tuple[str, ...], **report: Any
) -> None:
    """Measure a build of pictures of RAW by `penstock serve`, alone and while clients on the same cores ask the server.

    A dashboard does what its script does: it keeps a stream of events open, and fetches its page anew after an event,
    at most once a second. Readers take shards by ranges of 4 MiB, and compare them with the files. A program asks the
    API ten times a second. No request is tried twice. Rates are those of the build itself, as in `bench build`.

    \b
    Examples:
      python tools/bench serve /data/imagenet --json serve.json
      python tools/bench serve photos/ --images 3000 --repetitions 1 --only alone --only watched
    """
    rows = [row.fresh() for row in ROWS if not only or row.name in only]
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        source, root, per_shard = Path(scratch, "pictures"), Path(scratch, "site"), max(1, images // EVENTS)
        pictures = prepare(raw, source, images)
        with served(root, source) as server:
            server.build(READ, limit=4096, samples_per_shard=1024)

        def run(row: Row) -> Figures:
            os.sync()  # what the row before wrote is not written back during this one
            built, load = root / "datasets" / BUILT, (dashboards, readers, megabytes) if row.name == WATCHED else ()
            try:
                if row.name == COMMAND:
                    return by_command(source, built, per_shard)
                with served(root, source) as server:
                    return measured(server, per_shard, *load)
            except (httpx.HTTPError, subprocess.SubprocessError) as error:
                raise UserError(f"{type(error).__name__}: {error}") from error
            finally:
                shutil.rmtree(built, ignore_errors=True)

        common.interleave(rows, run, report["repetitions"], images)
    facts = [
        f"{pictures}; {per_shard:,} a shard; build, server and clients on the same {common.CORES} cores",
        f"{dashboards} dashboards ({', '.join(PAGES)}), {readers} readers of at most {megabytes} MB/s, "
        f"{ASKS} API requests a second",
    ]
    common.publish(HEADER, [cells(rows, row) for row in rows], rows, facts, notes(rows), **report)


# ---- The build and its server. ----


class Server:
    """A running `penstock serve` on loopback, with the raw images that it builds of."""

    def __init__(self, process: "subprocess.Popen[str]", port: int, root: Path, source: Path) -> None:
        self.process, self.port, self.root, self.source = process, port, root, source
        self.url = f"http://127.0.0.1:{port}"

    def build(self, name: str, watch: Callable[[int], None] | None = None, **options: Any) -> Figures:
        """Build a data set by a job, call `watch` with its number, and return what the command printed last.

        Raises UserError: the job fails, or takes longer than PATIENCE.
        """
        params = {"kind": "build", "dataset": name, "raw": str(self.source), "retries": 0, **options}
        job = httpx.post(f"{self.url}/v1/jobs", json=params, timeout=SILENCE).raise_for_status().json()
        path, started = f"{self.url}/v1/jobs/{job['id']}", time.monotonic()
        if watch:
            watch(job["id"])
        with httpx.stream("GET", f"{path}/events", timeout=SILENCE) as events:  # which ends with the job
            for _ in events.iter_lines():
                if time.monotonic() - started > PATIENCE:
                    raise UserError(f"hangs: not done after {PATIENCE:,.0f} s")
        job = httpx.get(path, timeout=SILENCE).raise_for_status().json()
        if job["state"] != "succeeded":
            raise UserError(f"the job {job['state']}: {job['reason']}")
        return result(httpx.get(f"{path}/log", timeout=SILENCE).raise_for_status().text)

    def processor_seconds(self) -> float:
        """Return the processor time of the server's own process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Return the most bytes that the server's own process has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@contextmanager
def served(root: Path, source: Path) -> Iterator[Server]:
    """Yield a server of a folder; at the end it and its jobs are ended. Raises UserError: it does not start."""
    command = [sys.executable, "-m", "penstock", "serve", "--root", str(root), "--port", "0", "--raw-root", str(source)]
    command += ["--slots", "cpu=1", "--stop-jobs", "--grace", "10"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = process.stdout.readline()
            if not (match := re.search(r" at http://127\.0\.0\.1:(\d+) ", line)):
                raise UserError(f"penstock serve does not start: {line!r}")
            yield Server(process, int(match[1]), root, source)
        finally:
            process.terminate()


def by_command(source: Path, built: Path, per_shard: int) -> Figures:
    """Return images, seconds and memory of a build by the command that the server's job runs, too."""
    words = ["penstock", "build", "--samples-per-shard", str(per_shard), "--json", "--", str(source), str(built)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe: Figures = {"stdout": subprocess.PIPE, "text": True, "timeout": PATIENCE}
    done = subprocess.run([sys.executable, "-m", *words], check=False, env=environment, **pipe)
    if done.returncode:
        raise UserError(f"penstock build failed ({done.returncode})")
    last = result(done.stdout)
    return {"images": last["done"], "seconds": last["seconds"]}


def result(lines: str) -> Figures:
    """Return the last of a command's JSON lines."""
    return dict(json.loads(lines.splitlines()[-1]))


def measured(server: Server, per_shard: int, dashboards: int = 0, readers: int = 0, megabytes: int = 0) -> Figures:
    """Return the figures of a build by a job of the server, and of the clients that ask meanwhile, if there are any."""
    clients = Clients(server.port, server.root, dashboards, readers, 1e6 * megabytes)
    before, own, began = server.processor_seconds(), time.process_time(), time.monotonic()
    try:
        watch = clients.start if dashboards or readers else None
        done = server.build(BUILT, watch, samples_per_shard=per_shard)
        clock = {"server_cpu": server.processor_seconds() - before, "clients_cpu": time.process_time() - own}
    finally:
        seconds = time.monotonic() - began
        clients.end()
    figures = {"images": done["done"], "seconds": done["seconds"], "rss": server.memory(), **clock}
    return figures | ({"clients": clients.figures(seconds)} if clients.threads else {})


# ---- What is printed. ----


def cells(rows: Sequence[Row], row: Row) -> tuple[str, ...]:
    """Return the row's cells below HEADER."""
    if row.failed:
        return row.title, f"not run: {row.failed}", *[""] * 4
    others = ((name, find_row(rows, name)) for name in row.against)
    compared = ", ".join(f"{ratio_text(row.rates(), other.rates())} {name}" for name, other in others if other)
    watched = any("clients" in run for run in row.runs)
    if row.name == COMMAND:
        return row.title, common.spread(row.rates()), compared, *[""] * 3
    return (
        row.title,
        common.spread(row.rates()),
        compared,
        f"{median(run['server_cpu'] for run in row.runs):.1f}",
        f"{median(run['clients_cpu'] for run in row.runs):.1f}" if watched else "",
        f"{max(run['rss'] for run in row.runs) / 2**20:,.0f} MiB",
    )


def notes(rows: Sequence[Row]) -> list[str]:
    """Return how the server answered: requests, failures, events, and the time that answers took."""
    runs = [run["clients"] for row in rows for run in row.runs if "clients" in run]
    if not runs:
        return []
    failed = sum((Counter(run["failed"]) for run in runs), Counter[str]())
    streams = [f"{sum(run[key] for run in runs):,}" for key in ("events", "lost", "out_of_order")]
    lines = [
        f"clients asked for {common.spread([run['seconds'] for run in runs])} s in each repetition",
        "; ".join([f"failed requests: {failed.total():,}", *(f"{count:,} × {why}" for why, count in failed.items())]),
        f"events that streams had to tell: {streams[0]}; lost: {streams[1]}; streams out of order: {streams[2]}",
    ]
    for kind in ("api", "page", "range"):
        answers = [run["answers"][kind] for run in runs if kind in run["answers"]]
        if answers:
            number, *times = ([figures[i] for figures in answers] for i in range(4))
            shown = [common.spread([1e3 * value for value in values]) for values in times]
            text = f"ms: median {shown[0]}, 95th percentile {shown[1]}, most {shown[2]}"
            lines.append(f"{kind}: {sum(number):,} answers; {text}")
    return lines

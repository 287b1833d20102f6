"""`bench train` and `bench gpu`: groups of rows, each of one precision and batch size, and their table."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import click
import nvidia.dali
import torch

from pipeline import UserError
from pipeline.cli import Command
from pipeline.manifest import Manifest
from tools.bench import common
from tools.bench.common import COUNT, Figures, Row, find_row, number, ratio, ratio_text
from tools.bench.load import made_up, of_images
from tools.bench.steps import NOTES, Variant
from trainer import feed
from trainer import recipe as recipes
from trainer.devices import placed

BATCHES = 20  # of an epoch, so that no batch is short
PATIENCE = 3600.0  # seconds for a group
FP32, BF16, LAST, SEGMENTS = Variant(), Variant("bf16"), Variant("bf16", True), Variant("bf16", True, "segments")
TF32, MORE = (Variant("tf32"), Variant("tf32", True)), (Variant("fp32", True), Variant("bf16", True, "graphs"))
VARIANTS = {"cuda": (FP32, BF16, LAST, SEGMENTS, *TF32, *MORE), "cpu": (FP32, BF16)}
FED, BESIDE = (FP32, BF16, SEGMENTS), (FP32, BF16, LAST, SEGMENTS)  # of `gpu`: fed by the loader; beside other networks
# of `gpu`: batch sizes, shares of the hardware decoder, recipe
PLANS = {"cuda": ((128, 512, 1024), (0, 0.5, 0.65, 0.9, 1), "original"), "cpu": ((8,), (0,), "tiny")}
FLOATS: tuple[Figures, ...] = ({"output": "float32"}, {"output": "bfloat16"})
LOADS: tuple[Figures, ...] = ({"output": "uint8"}, *FLOATS, *(options | {"mean": "colour"} for options in FLOATS))
MATRIX, SUPPLY, COLUMNS, GROUPED, TORCHVISION, PLAIN = "matrix", "loader", "columns", "grouped", "torchvision", "fp32"
ROWS = (
    Row(MATRIX, "ceiling: a matrix product"),
    Row(SUPPLY, "supply: the loader alone", "supply"),
    Row(COLUMNS, "Penstock's step, synthetic tensors", against=[SUPPLY, GROUPED, TORCHVISION, PLAIN]),
    Row("fed", "Penstock's step, fed by the loader", COLUMNS, {"fed": True}, against=[COLUMNS]),
    Row(GROUPED, "the plain grouped network, synthetic tensors"),
    Row(TORCHVISION, "torchvision's AlexNet in plain torch, synthetic tensors", against=[SUPPLY]),
    Row(
        "torchvision-fed", "torchvision's AlexNet, fed by our loader", TORCHVISION, {"fed": True}, against=[TORCHVISION]
    ),
)
NAMES = [row.name for row in ROWS]
RATES = ("row", "group", "batch", "images/s, median (min to max)", "GFLOP/s", "of the matrix rate")
HEADER = (*RATES, "stall", "host cores", "peak memory", "compared")


@dataclass
class Group:
    """Rows that take turns in one process; `rows` have their figures once it is measured."""

    title: str
    batch: int
    devices: list[str]
    variant: Variant
    rows: list[Row]


@click.command(cls=Command)
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--recipe", default="original", show_default=True, help="The trainer's, by name or path.")
@click.option("--precision", multiple=True, metavar="NAME", help="fp32, tf32 or bf16.  [default: the recipe's]")
@click.option("--batch", type=COUNT, multiple=True, help="[default: the recipe's]")
@click.option("--devices", metavar="DEVICE,DEVICE", help="One for each column.  [default: as `trainer train`]")
@click.option("--compile", "compiled", default="no", show_default=True, help="no, segments or graphs.")
@click.option("--channels-last", is_flag=True, help="As train.channels_last.")
@click.option("--steps", type=COUNT, default=4, show_default=True, help="Of a turn, at least.")
@click.option("--seconds", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Of a turn, at least.")
@common.report_options(NAMES)
def train(
    dataset: Path,
    recipe: str,
    precision: tuple[str, ...],
    batch: tuple[int, ...],
    devices: str | None,
    compiled: str,
    channels_last: bool,
    steps: int,
    seconds: float,
    **report: Any,
) -> None:
    """Measure steps of training: on synthetic tensors, and fed with pictures of DATASET by the loader.

    For each precision and batch size the rows take turns of a few steps; the others are idle meanwhile. All are in
    memory at once; --only leaves some out. At most 1 % stall is expected of a fed step where the supply exceeds the
    demand, the rate on synthetic tensors.

    \b
    Examples:
      python tools/bench train /data/imagenet-256 --precision fp32 --precision bf16 --batch 128 --batch 1024
      python tools/bench train /data/imagenet-256 --only columns --only grouped --devices cuda:0,cuda:0
    """
    plan = recipes.load(recipe)
    names = [str(device) for device in placed(devices, plan.model.columns)]
    variants = [Variant(name, channels_last, compiled) for name in precision or (plan.train.precision,)]
    groups = [
        Group(str(variant), size, names, variant, [row.fresh() for row in ROWS])
        for size, variant in product(batch or (plan.train.batch_size,), variants)
    ]
    for group in groups:  # impossible values end the command before anything is started
        recipes.override(plan, (*group.variant.settings(), f"train.batch_size={group.batch}"))

    def data(folder: Path, images: int) -> Manifest:
        made = of_images(dataset, images, folder)
        feed.require_pictures(made, plan)
        return made

    run_groups(groups, data, {"recipe": recipe, "steps": steps, "seconds": seconds}, **report)


@click.command(cls=Command)
@click.argument("dataset", type=click.Path(path_type=Path), required=False)
@click.option("--device", help="A GPU; or cpu, which runs the same, smaller.  [default: cuda:0]")
@click.option("--seconds", type=click.FloatRange(min=0), default=0.4, show_default=True, help="Of a turn, at least.")
@common.report_options(["decode", "load", *NAMES, PLAIN])
def gpu(dataset: Path | None, device: str | None, seconds: float, **report: Any) -> None:
    """Measure a GPU: decoding alone, our loader, the trainer's step in every variant, and both at once.

    Without DATASET pictures are drawn. It takes about a quarter of an hour.

    \b
    Examples:
      python tools/bench gpu /data/imagenet-256 --markdown --json gpu.json
      python tools/bench gpu --device cpu --only columns --only fed
    """
    if not device and not torch.cuda.is_available():
        click.echo("no CUDA device; --device cpu runs the same, smaller")
        return
    first = placed(f"{device or 'cuda:0'},{device or 'cuda:0'}", 2)[0]

    def data(folder: Path, images: int) -> Manifest:
        return of_images(dataset, images, folder) if dataset else made_up(folder, images, BATCHES)

    settings = {"recipe": PLANS[first.type][2], "steps": 1, "seconds": seconds}
    run_groups(gpu_groups(first), data, settings, **report)


def gpu_groups(device: torch.device) -> Generator[Group, None, None]:
    """Yield the groups of `bench gpu`. A group is measured before the next one is made."""
    sizes, shares, _ = PLANS[device.type]
    one, ends, best = [str(device)] * 2, sorted({sizes[0], sizes[-1]}), 0.0
    for batch in sizes:
        group = Group("decode", batch, one, FP32, [decode_row(share) for share in shares])
        yield group
        measured = {row.options["hardware_share"]: median(row.rates()) for row in group.rows if row.runs}
        best = max(measured, key=lambda share: measured[share], default=best)
        if batch in ends:
            loads = [load_row({**options, "hardware_share": best}) for options in LOADS]
            yield Group("supply", batch, one, FP32, [decode_row(best), *loads])
    for batch, variant in product(ends, VARIANTS[device.type]):
        names = {MATRIX, COLUMNS} | ({GROUPED, TORCHVISION} if variant in BESIDE else set())
        names |= {SUPPLY, "fed", "torchvision-fed"} if variant in FED else set()
        rows = [row.fresh() for row in ROWS if row.name in names]
        plain = Row(PLAIN, "Penstock's step in plain fp32", COLUMNS, {"variant": asdict(FP32)})
        yield Group(str(variant), batch, one, variant, [*rows, plain] if variant != FP32 else rows)
    if device.type == "cuda" and (count := torch.cuda.device_count()) > 1:
        two = [str(device), f"cuda:{((device.index or 0) + 1) % count}"]
        loads = [load_row({"output": "uint8", "hardware_share": best, "feed": feed}) for feed in ("split", "replicate")]
        for variant in (FP32, BF16):
            rows = [row.fresh() for row in ROWS if row.name in (MATRIX, COLUMNS)]
            yield Group(f"two devices, {variant}", sizes[-1], two, variant, rows + loads * (variant == FP32))


def decode_row(share: float) -> Row:
    title = f"ceiling: DALI alone, hardware share {share:g}"
    return Row(f"decode {share:g}", title, "decode", {"hardware_share": share})


def load_row(options: Figures) -> Row:
    values = [str(value) for key, value in options.items() if key != "hardware_share"]
    against = [f"decode {options['hardware_share']:g}"]
    return Row(f"load {' '.join(values)}", f"Penstock's loader, {', '.join(values)}", "load", options, against=against)


def run_groups(
    groups: Iterable[Group],
    data: Callable[[Path, int], Manifest],
    settings: Figures,
    *,
    only: Sequence[str],
    **report: Any,
) -> None:
    """Measure groups, each in a process; print their table after the last, and write the record after each."""
    done, roots, rows = list[Group](), dict[int, str](), list[Row]()
    with common.scratch_folder() as scratch:
        for group in groups:
            group.rows = [row for row in group.rows if not only or row.name.split()[0] in only]
            if not group.rows:
                continue
            if group.batch not in roots:
                roots[group.batch] = str(data(scratch / f"of-{group.batch}", BATCHES * group.batch).root)
            run_group(group, roots[group.batch], settings | {"repetitions": report["repetitions"]})
            done.append(group)
            for row in group.rows:
                row.facts |= {"group": group.title, "batch": group.batch}
                rate = f"not run: {row.failed}" if row.failed else f"{number(median(row.rates()))}/s"
                common.log(f"{group.title}, batch {group.batch:,}, {row.name}: {rate}")
            rows = [row for group in done for row in group.rows]
            common.write_record(
                report["record"], [common.hardware()], rows
            )  # in case that the machine goes before the end
    gpus = {torch.cuda.get_device_name(name) for group in done for name in group.devices if name != "cpu"}
    turns = f"turns of {settings['steps']} steps and {settings['seconds']:g} s at least; the others are idle meanwhile"
    devices = dict.fromkeys(", ".join(group.devices) for group in done)
    facts = [*gpus, f"torch {torch.__version__}, DALI {nvidia.dali.__version__}, {torch.get_num_threads()} threads"]
    facts += [f"recipe {settings['recipe']} on {' and on '.join(devices)}; {turns}"]
    table = [cells(group, row) for group in done for row in group.rows]
    common.publish(HEADER, table, rows, facts, common.notes_of(rows, NOTES), **report)


def run_group(group: Group, root: str, settings: Figures) -> None:
    """Measure a group in a process of its own; where that ends before its time, all its rows have failed."""
    options = settings | {"rows": [asdict(row) for row in group.rows], "devices": group.devices}
    row = Row("group", "", options=options | {"variant": asdict(group.variant)})
    try:
        figures = common.run_job("steps.py", row, {"source": root, "out": "", "batch": group.batch}, PATIENCE)
        group.rows = [Row(**record) for record in figures["rows"]]
    except UserError as error:
        for row in group.rows:
            row.failed = str(error)


def cells(group: Group, row: Row) -> tuple[str, ...]:
    """Return the row's cells of the table."""
    title = (row.title, group.title, f"{group.batch:,}")
    if row.failed:
        return *title, f"not run: {row.failed}", *[""] * 6
    rates, matrix = row.rates(), find_row(group.rows, MATRIX)
    done = rates if row.name == MATRIX else [rate * row.facts.get("operations", 0) for rate in rates]
    share = ratio(done, matrix.rates()) / row.facts["devices"] if matrix and row.facts.get("devices") else 0.0
    stalls = [sum(run["stall"].values()) for run in row.runs if "stall" in run]
    others = ((name, find_row(group.rows, name)) for name in row.against)
    return (
        *title,
        "" if row.name == MATRIX else common.spread(rates),
        number(median(done) / 1e9) if any(done) else "",
        f"{100 * share:.1f} %" if share else "",
        f"{100 * median(stalls):.1f} %" if stalls else "",
        f"{median(run['host_cores'] for run in row.runs):.1f}",
        f"{max(run['peak'] for run in row.runs) / 2**20:,.0f} MiB" if "peak" in row.runs[0] else "",
        ", ".join(f"{ratio_text(rates, other.rates())} {name}" for name, other in others if other),
    )

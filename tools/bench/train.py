"""`bench train` and `bench gpu`: groups of rows, each of one variant and batch size, and their table."""

import tempfile
from collections.abc import Sequence
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
from pipeline.records import KINDS
from tools.bench import common
from tools.bench.common import COUNT, Figures, Row, find_row, number, ratio, ratio_text
from tools.bench.load import drawn, of_images
from tools.bench.peers_build import SIDE
from tools.bench.steps import settings
from tools.bench.supply import FP32
from trainer import data as loaders
from trainer import recipe as recipes
from trainer.devices import choose_devices

WORDS = "A precision, and what train.channels_last and train.compile add, such as bf16,channels_last,segments."
BATCHES = 20  # of an epoch, so that no batch is short
LAST, SEGMENTS = "bf16,channels_last", "bf16,channels_last,segments"
VARIANTS = (FP32, "fp32,channels_last", "tf32", "tf32,channels_last", "bf16", LAST, SEGMENTS, f"{LAST},graphs")
BESIDE = (FP32, "bf16", SEGMENTS)  # variants that `gpu` measures with every row
TRIED = (FP32, LAST)  # variants that candidates are measured in
# of `gpu`, by the type of the device: batch sizes, shares of the hardware decoder, recipe, variants
PLANS = {"cuda": ((128, 1024), (0, 0.5, 0.7, 0.9, 1), "original", VARIANTS), "cpu": ((8,), (0,), "tiny", BESIDE[:2])}
ROWS = (
    Row("matrix", "ceiling: a matrix product", "matrix"),
    Row("loader", "supply: the loader alone", "supply"),
    Row("columns", "Penstock's step, synthetic tensors", "columns", against=["loader", "grouped", "torchvision", FP32]),
    Row("fed", "Penstock's step, fed by the loader", "columns", {"fed": True}, against=["columns"]),
    Row("grouped", "the plain grouped network, synthetic tensors", "grouped"),
    Row("torchvision", "torchvision's AlexNet in plain torch, synthetic tensors", "torchvision", against=["loader"]),
    Row("torchvision-fed", "torchvision's AlexNet, fed", "torchvision", {"fed": True}, against=["torchvision"]),
)
CANDIDATES = (  # beside what they would replace; `candidates.py` has them
    *(
        Row(
            f"{what} {how}",
            f"{words}, {title}, forward and backward",
            "operation",
            {"what": what, "how": how},
            against=near,
        )
        for what, words in (("lrn", "conv1's LRN"), ("rnorm", "conv2's rnorm"), ("pool", "conv1's pooling and ReLU"))
        for how, title, near in (
            ("trainer", "as it is", []),
            ("compiled", "torch.compile", [f"{what} trainer"]),
            ("kernel", "one kernel each way", [f"{what} trainer", f"{what} compiled"]),
        )
    ),
    Row("columns", "Penstock's step, synthetic tensors", "columns"),
    Row("foreach", "the step, its update in few launches", "columns", {"foreach": True}, against=["columns"]),
    Row("whole-graph", "the step as one CUDA graph", "columns", {"whole": True}, against=["columns"]),
    Row("deterministic", "the step, cuDNN deterministic", "columns", {"cudnn": "deterministic"}, against=["columns"]),
    Row("autotuned", "the step, cuDNN's algorithms timed", "columns", {"cudnn": "benchmark"}, against=["columns"]),
)
STEP = [row for row in ROWS if row.name in ("matrix", "columns")]
PLAIN = Row(FP32, "Penstock's step in plain fp32", "columns", {"variant": FP32})
NAMES = [row.name for row in ROWS]
GPU_NAMES = dict.fromkeys(["decode", "views", "load", *NAMES, FP32, *(row.name.split()[0] for row in CANDIDATES)])
RATES = ("row", "group", "batch", "images/s, median (min to max)", "GFLOP/s", "of the matrix rate")
HEADER = (*RATES, "stall", "host cores", "peak memory", "compared")


@dataclass
class Group:
    """Rows that take turns in one process; they have their figures once the group is measured."""

    title: str
    batch: int
    devices: list[str]
    rows: list[Row]
    variant: str = FP32


seconds_option = click.option(
    "--seconds", type=click.FloatRange(min=0), default=0.5, show_default=True, help="Of a turn, at least."
)


@click.command(cls=Command)
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--recipe", default="original", show_default=True, help="The trainer's, by name or path.")
@click.option("--variant", multiple=True, default=[FP32], show_default=True, metavar="WORDS", help=WORDS)
@click.option("--batch", type=COUNT, multiple=True, help="[default: the recipe's]")
@click.option("--devices", metavar="DEVICE,DEVICE", help="One for each column.  [default: as `trainer train`]")
@seconds_option
@common.report_options(NAMES)
def train(
    dataset: Path, recipe: str, variant: tuple[str, ...], batch: tuple[int, ...], devices: str | None, **report: Any
) -> None:
    """Measure steps of training: on synthetic tensors, and fed with pictures of DATASET by the loader.

    For each variant and batch size the rows take turns of a few steps; the others are idle meanwhile. All are in
    memory at once; --only leaves some out. At most 1 % stall is expected of a fed step where the supply exceeds the
    demand, the rate on synthetic tensors.

    \b
    Examples:
      python tools/bench train /data/imagenet-256 --variant fp32 --variant bf16 --batch 128 --batch 1024
      python tools/bench train /data/imagenet-256 --only columns --only grouped --devices cuda:0,cuda:0
    """
    plan = recipes.load(recipe)
    names = [str(device) for device in choose_devices(devices, plan.model.columns)]
    sizes = batch or (plan.train.batch_size,)
    groups = [Group(words, size, names, list(ROWS), words) for size, words in product(sizes, variant)]
    for group in groups:  # impossible values end the command before anything is started
        recipes.override(plan, (*settings(group.variant), f"train.batch_size={group.batch}"))
    run_groups(groups, dataset, recipe, **report)


@click.command(cls=Command)
@click.argument("dataset", type=click.Path(path_type=Path), required=False)
@click.option("--device", help="A GPU; or cpu, which runs the same, smaller.  [default: cuda:0]")
@seconds_option
@common.report_options(list(GPU_NAMES))
def gpu(dataset: Path | None, device: str | None, **report: Any) -> None:
    """Measure a GPU: decoding alone, our loader from each tier, the trainer's step in every variant, both at once, and
    ideas for the step.

    Without DATASET pictures are drawn. Raw tiers are made in the folder for temporary files: 6 GB at batches of 1,024.

    \b
    Examples:
      python tools/bench gpu /data/imagenet-256 --json gpu.json
      python tools/bench gpu --device cpu --only columns --only fed
    """
    if not device and not torch.cuda.is_available():
        click.echo("no CUDA device; --device cpu runs the same, smaller")
        return
    first = choose_devices(f"{device or 'cuda:0'},{device or 'cuda:0'}", 2)[0]
    run_groups(gpu_groups(first), dataset, PLANS[first.type][2], **report)


def gpu_groups(device: torch.device) -> list[Group]:
    """Return the groups of `bench gpu`."""
    sizes, shares, _, variants = PLANS[device.type]
    one = [str(device)] * 2
    groups = [Group("supply", batch, one, supply_rows(shares)) for batch in sizes]
    for batch, variant in product(sizes, variants):
        rows = list(ROWS) if variant in BESIDE else STEP
        groups.append(Group(variant, batch, one, rows if variant == FP32 else [*rows, PLAIN], variant))
    for batch, variant in product(sizes, TRIED):
        groups.append(Group(f"candidates, {variant}", batch, one, list(CANDIDATES), variant))
    if device.type == "cuda" and (count := torch.cuda.device_count()) > 1:
        two = [str(device), f"cuda:{((device.index or 0) + 1) % count}"]
        feeds = [load_row("uint8", feed=name) for name in ("split", "replicate")]
        groups.append(Group("two devices, fp32", sizes[-1], two, [*STEP, *feeds]))
        groups.append(Group("two devices, bf16", sizes[-1], two, STEP, "bf16"))
    return groups


def supply_rows(shares: Sequence[float]) -> list[Row]:
    """Return rows of decoding, by the shares of the hardware decoder, of a batch's arithmetic, and of the loader."""
    share = max(share for share in shares if share < 1)
    alone = {"hardware_share": share}
    rows = [
        Row("decode dali", f"ceiling: DALI alone, windows, hardware share {share:g}", "dali", alone),
        Row("decode windows", f"our decoder, windows, hardware share {share:g}", "decode", alone),
        Row("decode hints", "the same, with hints of the size", "decode", alone | {"size": SIDE}),
    ]
    for each in shares:
        options = {"whole": True, "size": SIDE, "hardware_share": each}
        title = f"our decoder, whole pictures, hardware share {each:g}"
        rows.append(Row(f"decode whole {each:g}", title, "decode", options, against=["decode windows"]))
    rows.append(Row("views compiled", "arithmetic of views, by torch.compile", "views", {"kind": "views"}))
    for kind in ("pixels", *KINDS):
        title = f"cut and arithmetic of records, {kind}, one kernel"
        rows.append(Row(f"views {kind}", title, "views", {"kind": kind}, against=["views compiled"]))
    rows += [load_row(output) for output in ("uint8", "float32", "bfloat16")]
    rows += [load_row("bfloat16", tier="raw", records=kind) for kind in KINDS]
    return [*rows, load_row("bfloat16", tier="device")]


def load_row(output: str, tier: str = "jpeg", **options: str) -> Row:
    words = (output, *([] if tier == "jpeg" else [tier]), *options.values())
    title, near = f"Penstock's loader, {', '.join(words)}", "decode windows" if tier == "jpeg" else "load bfloat16"
    return Row(f"load {' '.join(words)}", title, "load", {"output": output, "tier": tier, **options}, against=[near])


def run_groups(groups: Sequence[Group], dataset: Path | None, recipe: str, **report: Any) -> None:
    """Measure groups, each in a process; print their table after the last, and write the record after each."""
    only, seconds = report.pop("only"), report.pop("seconds")
    roots, rows = dict[int, str](), list[Row]()
    for group in groups:
        group.rows = [row.fresh() for row in group.rows if not only or row.name.split()[0] in only]
    groups = [group for group in groups if group.rows]
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as scratch:
        pictures = dataset or drawn(Path(scratch))
        for group in groups:
            if group.batch not in roots:
                data = of_images(pictures, BATCHES * group.batch, Path(scratch, f"of-{group.batch}"))
                loaders.require_pictures(data, recipes.load(recipe))
                roots[group.batch] = str(data.root)
            options = {"recipe": recipe, "seconds": seconds, "repetitions": report["repetitions"]}
            run_group(group, roots[group.batch], options)
            rows += group.rows
            common.write_record(report["record"], [], rows)  # in case that the machine goes before the end
    gpus = {torch.cuda.get_device_name(name) for group in groups for name in group.devices if name != "cpu"}
    devices = dict.fromkeys(", ".join(group.devices) for group in groups)
    facts = [*gpus, f"torch {torch.__version__}, DALI {nvidia.dali.__version__}, {torch.get_num_threads()} threads"]
    facts += [f"recipe {recipe} on {' and on '.join(devices)}; turns of {seconds:g} s at least; the others are idle"]
    table = [cells(group, row) for group in groups for row in group.rows]
    common.publish(HEADER, table, rows, facts, [], **report)


def run_group(group: Group, root: str, options: Figures) -> None:
    """Measure a group in a process of its own; where that ends before its time, all its rows have failed."""
    options |= {"rows": [asdict(row) for row in group.rows], "devices": group.devices, "variant": group.variant}
    try:
        world = {"source": root, "out": "", "batch": group.batch}
        figures = common.run_job("steps.py", Row("group", "", "group", options), world)
        group.rows = [Row(**record) for record in figures["rows"]]
    except UserError as error:
        for row in group.rows:
            row.fail(str(error))
    for row in group.rows:
        row.facts |= {"group": group.title, "batch": group.batch}
        rate = f"not run: {row.failed}" if row.failed else f"{number(median(row.rates()))}/s"
        click.echo(f"{group.title}, batch {group.batch:,}, {row.name}: {rate}", err=True)


def cells(group: Group, row: Row) -> tuple[str, ...]:
    """Return the row's cells of the table."""
    title = (row.title, group.title, f"{group.batch:,}")
    if row.failed:
        return *title, f"not run: {row.failed}", *[""] * 6
    rates, matrix = row.rates(), find_row(group.rows, "matrix")
    work = rates if row is matrix else [rate * row.facts.get("operations", 0) for rate in rates]
    share = ratio(work, matrix.rates()) / row.facts["devices"] if matrix and row.facts.get("devices") else 0.0
    stalls = [sum(run["stall"].values()) for run in row.runs if "stall" in run]
    others = ((name, find_row(group.rows, name)) for name in row.against)
    return (
        *title,
        "" if row is matrix else common.spread(rates),
        number(median(work) / 1e9) if any(work) else "",
        f"{100 * share:.1f} %" if share else "",
        f"{100 * median(stalls):.1f} %" if stalls else "",
        f"{median(run['cores'] for run in row.runs):.1f}",
        f"{row.facts['peak'] / 2**20:,.0f} MiB" if "peak" in row.facts else "",
        ", ".join(f"{ratio_text(rates, other.rates())} {name}" for name, other in others if other),
    )

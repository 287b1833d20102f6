"""`tools/bench.py train`: the speed of training, beside the plain network, torchvision's, and what bounds them."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import nvidia.dali
import torch

from pipeline.cli import Command
from tools.peers import facts
from tools.peers.datasets import of_images
from tools.peers.stepping import StepJob
from tools.peers.trainers import TRAINERS
from tools.peers.training import Group, run_group
from tools.peers.training_table import print_groups, record
from tools.ways import require_labels
from trainer import recipe as recipes
from trainer.devices import placed
from trainer.feed import require_pictures

VERSIONS = {"torch": torch.__version__, "DALI": nvidia.dali.__version__}
BATCHES = 20  # in an epoch of what the loader gives; so no batch is short


@click.command(cls=Command)
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--recipe", "name", default="original", show_default=True, help="The trainer's, by name or path.")
@click.option(
    "--precision", "precisions", multiple=True, metavar="NAME", help="fp32, tf32 or bf16.  [default: the recipe's]"
)
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="[default: the recipe's]")
@click.option("--devices", metavar="DEVICE,DEVICE", help="One for each column.  [default: as `trainer train`]")
@click.option("--compile", "compiled", default="no", show_default=True, help="no, segments or graphs.")
@click.option("--channels-last", is_flag=True, help="As train.channels_last.")
@click.option("--steps", type=click.IntRange(min=1), default=4, show_default=True, help="Of a turn, at least.")
@click.option("--seconds", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Of a turn, at least.")
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True, help="Turns of each.")
@click.option("--only", type=click.Choice(list(TRAINERS)), multiple=True, metavar="NAME", help="Leave others out.")
@click.option("--markdown", is_flag=True, help="The table as Markdown.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Every turn's figures to a file.")
def train(
    dataset: Path,
    name: str,
    precisions: tuple[str, ...],
    batches: tuple[int, ...],
    devices: str | None,
    compiled: str,
    channels_last: bool,
    steps: int,
    seconds: float,
    repetitions: int,
    only: tuple[str, ...],
    markdown: bool,
    file: Path | None,
) -> None:
    """Measure steps of training: on synthetic tensors, and fed with pictures of DATASET by the loader.

    For each precision and batch size the contestants run side by side, each in a process of its own: one takes a turn
    of a few steps while the others are idle, and all take turns again. Ratios are of the turns of one round. All are in
    memory at once; --only leaves some out. Those that cannot be run are rows that say why.

    \b
    Examples:
      python tools/bench.py train /data/imagenet-256 --precision fp32 --precision bf16 --batch 128 --batch 1024
      python tools/bench.py train /data/imagenet-256 --only columns --only grouped --devices cuda:0,cuda:0
    """
    plan = recipes.load(name)
    homes = tuple(map(str, placed(devices, plan.model.columns)))
    ways = [
        (precision, batch)
        for precision in dict.fromkeys(precisions or (plan.train.precision,))
        for batch in dict.fromkeys(batches or (plan.train.batch_size,))
    ]
    for precision, batch in ways:  # what is impossible is said before anything is started
        recipes.override(plan, (f'train.precision="{precision}"', f'train.compile="{compiled}"'))
        recipes.override(plan, (f"train.batch_size={batch}",))
    with tempfile.TemporaryDirectory(prefix="penstock-train-") as scratch:
        data = of_images(dataset, BATCHES * max(batch for _, batch in ways), Path(scratch) / "dataset")
        require_labels(data)
        require_pictures(data, plan)
        groups = []
        for precision, batch in ways:
            root = Path(scratch) / f"of-{batch}"
            if not root.exists():
                of_images(dataset, BATCHES * batch, root)
            job = StepJob("", str(root), name, precision, batch, homes, compiled, channels_last, steps, seconds)
            names = [each for each in TRAINERS if each in only or not only]
            groups.append(run_group(job, names, repetitions, lambda line: click.echo(line, err=True)))
            _save(file, groups, job, repetitions)
    print_groups(groups, _facts(job, repetitions), markdown, click.echo)


def _save(file: Path | None, groups: Sequence[Group], job: StepJob, repetitions: int) -> None:
    """What is measured so far."""
    if file:
        kept = ("recipe", "devices", "compile", "channels_last", "steps", "seconds")
        shared = {key: value for key, value in asdict(job).items() if key in kept}
        found = {"machine": facts.machine_record() | VERSIONS, **shared, "repetitions": repetitions}
        file.write_text(json.dumps(found | {"groups": [record(group) for group in groups]}, indent=1) + "\n")


def _facts(job: StepJob, repetitions: int) -> list[str]:
    gpus = [torch.cuda.get_device_name(device) for device in dict.fromkeys(job.devices) if device != "cpu"]
    way = ", ".join((f"recipe {job.recipe} on {', '.join(job.devices)}", f"compile {job.compile}"))
    return [
        ", ".join((*gpus, facts.machine())),
        ", ".join(f"{package} {version}" for package, version in VERSIONS.items()),
        f"{torch.get_num_threads()} threads; {way}{', channels_last' * job.channels_last}",
        f"{repetitions} turns of each, {job.steps} steps and {job.seconds:g} s at least; the others are idle meanwhile",
    ]

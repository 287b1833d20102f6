"""What several commands ask for, and what they make of it."""

from pathlib import Path

import click
import torch

from trainer.parallel import default_devices, parse_devices

PATH = click.Path(path_type=Path)

DATA = click.option("--data", type=PATH, required=True, help="A dataset directory, from tools/build_shards.py.")
CHECKPOINT = click.option(
    "--checkpoint",
    "run",
    type=PATH,
    required=True,
    metavar="RUN",
    help="A run directory (its newest checkpoint), or a checkpoint file.",
)
RUN = click.argument("run", type=PATH)
DEVICES = click.option(
    "--devices",
    help="One device per column, such as cuda:0,cuda:1.  [default: two GPUs, or one twice, or cpu,cpu]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="JSON, for programs, instead of text for people.")


def placed(devices: str | None, columns: int) -> tuple[torch.device, ...]:
    """A device per column: those that were named, or the default."""
    return parse_devices(default_devices(columns) if devices is None else devices, columns)

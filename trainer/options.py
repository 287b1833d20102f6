"""Options that several commands share, and checks of the paths that they name."""

from pathlib import Path
from typing import Any

import click

from pipeline import UserError, files, storage
from trainer.distributed import PATIENCE


class Local(click.Path):
    """A path on this machine. A URL is refused: as a path it would be a folder named s3:."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and (storage.is_remote(value) or value.startswith("file:")):
            self.fail(f"{value}: is a URL; name a path on this machine", param, ctx)
        return super().convert(value, param, ctx)


PATH = Local(path_type=Path, readable=False)  # click checks no permission: the error of opening it has a remedy

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
FEED = click.option(
    "--feed",
    "workers",
    metavar="HOST:PORT,...",
    callback=lambda ctx, param, text: tuple(name.strip() for name in text.split(",")) if text else (),
    help="Let these workers decode, of `penstock feed` (docs/service.md).",
)
MAX_STALL = click.option(
    "--max-stall",
    type=click.FloatRange(0, 100),
    metavar="PERCENT",
    callback=lambda ctx, param, share: () if share is None else (f"data.max_stall={share / 100}",),
    help="Of the time that GPUs may wait, before the loader turns what makes them wait.  [default: 1]",
)
PATIENCE_OPTION = click.option(
    "--patience",
    type=click.IntRange(1, 10**6),
    default=PATIENCE,
    show_default=True,
    help="Seconds that a process of torchrun waits for another, and a run for a worker of --feed.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="JSON, for programs, instead of text for people.")


def require_writable(path: Path | None, size: int = 1) -> None:
    """Raise UserError or OSError if a file of `size` bytes cannot be written; before its content is computed."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path}: is a directory, where a file should be; move it away, or name another path")
    files.require_writable(path.parent, size)


def require_npz(path: Path | None, size: int = 1) -> None:
    """Raise UserError or OSError if probabilities cannot be saved; to be called before they are computed."""
    if path is not None and path.suffix != ".npz":
        raise UserError(f"--save-probabilities {path}: give a name that ends in .npz")
    require_writable(path, size)

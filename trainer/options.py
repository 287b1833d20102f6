"""Click options and checks that several commands share."""

import tempfile
from pathlib import Path
from typing import Any

import click

from pipeline import UserError, storage


class Local(click.Path):
    """A path on this machine: of a URL, a path would be a folder called s3: here."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and storage.is_remote(value):
            self.fail(f"{value}: is a URL; name a path on this machine", param, ctx)
        return super().convert(value, param, ctx)


PATH = Local(path_type=Path, readable=False)  # what cannot be read is told with its remedy, where it is read

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


def require_writable(path: Path | None) -> None:
    """Meet what keeps a file from being written now, and not once its content is computed.

    Raises:
        UserError: it is a directory, or stands below a file.
        OSError: the operating system's own words.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name a file")
    above = next(each for each in path.absolute().parents if each.exists())
    if not above.is_dir():
        raise UserError(f"{path}: {above} is a file, not a directory; name another place")
    with tempfile.TemporaryFile(dir=above):
        pass


def require_npz(path: Path | None) -> None:
    """Raise, before probabilities are computed, what would keep them from being saved: UserError or OSError."""
    if path is not None and path.suffix != ".npz":
        raise UserError(f"--save-probabilities {path}: give a name that ends in .npz")
    require_writable(path)

"""Command line of the benchmarks: `python tools/bench COMMAND`, or `python -m tools.bench COMMAND`."""

import importlib
import sys
from pathlib import Path

import click

if not __package__:  # run as a folder: Python put tools/bench in front, where our modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[2])

COMMANDS = ("build", "load", "first-batch", "feed", "train", "gpu", "retrieval", "serve", "peers")
MODULES = {"first-batch": "load", "gpu": "train", "peers": "common"}  # else of the command's own name


class Lazy(click.Group):
    """Imports the module of a command only to run it or to show its help: not every machine has every dependency."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"tools.bench.{MODULES.get(name, name)}")
        command: click.Command = getattr(module, name.replace("-", "_"))
        return command


@click.group(cls=Lazy)
def main() -> None:
    """Measure Penstock: interleaved repetitions, medians and ratios; hardware and versions stand above each table."""


if __name__ == "__main__":
    main(prog_name="python tools/bench")

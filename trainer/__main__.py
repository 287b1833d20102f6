"""python -m trainer COMMAND"""

if __name__ == "__main__":  # before the imports that take long
    from pipeline import process

    process.begin()

import io
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import click

from pipeline import process
from pipeline.cli import OneLine

MODULES = {  # command → its module, and one line of help
    "train": ("train", "Train on DATA's training split."),
    "evaluate": ("evaluate", "Compute top-1 and top-5 error over every image of a split."),
    "ensemble": ("ensemble", "Average the probabilities of several networks."),
    "predict": ("predict", "Print the five most probable labels of each picture."),
    "figures": ("figures.page", "Draw RUN/figures/*.png and the page RUN/report.html."),
    "index": ("retrieval.index", "Write the features of every image of a split."),
    "similar": ("retrieval.similar", "Find the images of an index nearest to each PICTURE."),
    "export": ("export", "Write a run's network for other programs."),
    "reproduce": ("reproduce.command", "Try a claim of the paper in small."),
}
LEAST = 2**30  # bytes of address space that torch needs at the least
COMMANDS = {name: line for name, (_, line) in MODULES.items()}


class LazyGroup(OneLine, click.Group):
    """List commands by `lines` (name → help) without importing them; `load` imports the one that runs."""

    def __init__(self, *, lines: Mapping[str, str], load: Callable[[str], click.Command], **attributes: Any) -> None:
        super().__init__(**attributes)
        self._lines, self._load = lines, load

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._lines)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self._load(cmd_name) if cmd_name in self._lines else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self._lines.items()))

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, io.TextIOWrapper):  # prints `?` for characters that the terminal's encoding lacks
            sys.stdout.reconfigure(errors="replace")
        return super().invoke(ctx)


def load(name: str) -> click.Command:
    """Return a command, after the import of torch; its float32 products are exact until a recipe says otherwise."""
    # OpenMP's threads spin while they wait for each other; if another program has a core, that costs most of a step:
    # beside two busy processes on two cores, `tiny` has 20 images/s by default and 90 with this. libgomp reads the
    # variable when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    process.require_memory(LEAST)
    from trainer.parallel import reference_precision

    reference_precision()
    command: click.Command = getattr(import_module(f"{__package__}.{MODULES[name][0]}"), name)
    return command


@click.group(cls=LazyGroup, lines=COMMANDS, load=load)
def main() -> None:
    """AlexNet (2012) as two columns on two devices."""


if __name__ == "__main__":
    main(prog_name="python -m trainer")

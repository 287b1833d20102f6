"""python -m trainer COMMAND"""

import io
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import click

COMMANDS = {
    "train": "Train on DATA's training split.",
    "evaluate": "Compute top-1 and top-5 error over every image of a split.",
    "ensemble": "Average the probabilities of several networks.",
    "predict": "Print the five most probable labels of each picture.",
    "figures": "Draw RUN/figures/*.png and the page RUN/report.html.",
    "index": "Write the features of every image of a split.",
    "similar": "Find the images of an index nearest to each PICTURE.",
    "export": "Write a run's network for other programs.",
}

MODULES = {
    "train": "commands.train",
    "evaluate": "commands.evaluate",
    "ensemble": "commands.ensemble",
    "predict": "commands.predict",
    "figures": "figures.page",
    "index": "retrieval.index",
    "similar": "retrieval.similar",
    "export": "commands.export",
}


class LazyGroup(click.Group):
    """List commands by `lines` (name → one line of help) without importing them; `load` imports the one that runs."""

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
        if isinstance(sys.stdout, io.TextIOWrapper):  # bars, names, class words: `?` for what its encoding lacks
            sys.stdout.reconfigure(errors="replace")
        return super().invoke(ctx)


def load(name: str) -> click.Command:
    """Import a command of COMMANDS; products of float32 are exact, as in 2012, until a recipe chooses otherwise."""
    from trainer.parallel import reference_precision  # imports torch

    reference_precision()
    command: click.Command = getattr(import_module(f"{__package__}.{MODULES[name]}"), name)
    return command


@click.group(cls=LazyGroup, lines=COMMANDS, load=load)
def main() -> None:
    """AlexNet (2012) as two columns on two devices."""


if __name__ == "__main__":
    main(prog_name="python -m trainer")

"""python -m trainer COMMAND"""

import io
import sys
from importlib import import_module

import click

from trainer.parallel import reference_precision

COMMANDS = ("train", "evaluate", "ensemble", "predict", "figures", "index", "similar", "export")


class Commands(click.Group):
    """Those of trainer/commands, each of which is imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"trainer.commands.{name}"), name)
        return command


@click.group(cls=Commands)
def main() -> None:
    """AlexNet (2012) as two columns on two devices."""
    reference_precision()  # a recipe may choose another
    if isinstance(sys.stdout, io.TextIOWrapper):  # bars, names, class words: `?` for what its encoding lacks
        sys.stdout.reconfigure(errors="replace")


if __name__ == "__main__":
    main(prog_name="python -m trainer")

"""python -m trainer COMMAND"""

import click

from trainer.commands.evaluate import evaluate
from trainer.commands.report import report
from trainer.commands.train import train
from trainer.parallel import reference_precision


@click.group()
def main() -> None:
    """AlexNet (2012) as two columns on two devices."""
    reference_precision()  # a recipe may choose another


for command in (train, evaluate, report):
    main.add_command(command)

if __name__ == "__main__":
    main(prog_name="python -m trainer")

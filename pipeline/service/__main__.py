"""python -m pipeline.service COMMAND"""

if __name__ == "__main__":  # before the imports that take long
    from pipeline import process

    process.begin()

import click

from pipeline.service.feed import feed


@click.group()
def main() -> None:
    """Views by way of the network."""


main.add_command(feed)

if __name__ == "__main__":
    main(prog_name="python -m pipeline.service")

"""penstock COMMAND: every tool, every command of the service and of the trainer, each imported when it is called."""

if __name__ == "__main__":  # before the imports that take long
    from pipeline import process

    process.begin()

import click

from penstock import __version__
from trainer.__main__ import COMMANDS, LazyGroup
from trainer.__main__ import load as load_trainer

TOOLS = {
    "build": "Build the dataset directory DATASET from the raw images in RAW.",
    "verify": "Check every promise of the dataset directory DATASET.",
    "make-raw": "Write a small ILSVRC2012 of drawn pictures into OUT.",
    "feed": "Decode for trainers on other machines.",
    "serve": "Serve jobs, data sets, runs and workers of a folder.",
}


def load(name: str) -> click.Command:
    """Import a command of TOOLS, of which one is the service's, or of the trainer."""
    if name == "build":
        from tools.build_shards import main as build

        return build
    if name == "verify":
        from tools.verify_shards import main as verify

        return verify
    if name == "make-raw":
        from tools.make_raw import main as make_raw

        return make_raw
    if name == "feed":
        from pipeline.service.feed import feed

        return feed
    if name == "serve":
        from pipeline.service.serve import serve

        return serve
    return load_trainer(name)


@click.group(cls=LazyGroup, lines=TOOLS | COMMANDS, load=load)
@click.version_option(__version__, prog_name="penstock")
def main() -> None:
    """Raw ImageNet to shards, shards to GPUs, and AlexNet (2012) trained on them."""


if __name__ == "__main__":
    main(prog_name="penstock")

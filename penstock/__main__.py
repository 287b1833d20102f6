"""penstock COMMAND: every tool, every command of the service and of the trainer, each imported when it is called."""

if __name__ == "__main__":  # before the imports that take long
    from pipeline import process

    process.begin()

import click

from penstock import __version__
from pipeline import UserError
from pipeline.cli import end
from trainer.__main__ import COMMANDS, LazyGroup
from trainer.__main__ import load as load_trainer

TOOLS = {
    "build": "Build the dataset directory DATASET from the raw images in RAW.",
    "verify": "Check every promise of the dataset directory DATASET.",
    "raw-tier": "Decode the pictures of DATASET once, so that views come much faster.",
    "make-raw": "Write a small ILSVRC2012 of drawn pictures into OUT.",
    "feed": "Decode for trainers on other machines.",
}
SERVICE = {
    "serve": "Serve jobs, data sets, runs and workers of the folder DIR.",
    "token": "Create, list and revoke the tokens of a server.",
    "submit": "Submit a job to the server at PENSTOCK_URL.",
    "jobs": "List the jobs of the server at PENSTOCK_URL.",
    "logs": "Print the log of a job.",
    "cancel": "Cancel a job.",
    "retry": "Submit a job again that failed or was cancelled.",
}


def load(name: str) -> click.Command:
    """Import a command of TOOLS, of SERVICE, or of the trainer."""
    if name == "build":
        from tools.build_shards import main as build

        return build
    if name == "verify":
        from tools.verify_shards import main as verify

        return verify
    if name == "raw-tier":
        from tools.raw_tier import main as raw_tier

        return raw_tier
    if name == "make-raw":
        from tools.make_raw import main as make_raw

        return make_raw
    if name == "feed":
        from pipeline.service.feed import feed

        return feed
    return load_service(name) if name in SERVICE else load_trainer(name)


def load_service(name: str) -> click.Command:
    """Import a command of SERVICE; ends with one line where its packages are not installed."""
    try:
        if name == "serve":
            from pipeline.service.serve import serve

            return serve
        if name == "token":
            from pipeline.service.tokens import token

            return token
        from pipeline.service import client

        command: click.Command = getattr(client, name)
        return command
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("penstock", "pipeline", "tools", "trainer"):
            raise
        end(UserError(f"{name} needs the package {package}: pip install 'penstock-imagenet[service]'"))


@click.group(cls=LazyGroup, lines=TOOLS | SERVICE | COMMANDS, load=load)
@click.version_option(__version__, prog_name="penstock")
def main() -> None:
    """Raw ImageNet to shards, shards to GPUs, and AlexNet (2012) trained on them."""


if __name__ == "__main__":
    main(prog_name="penstock")

"""How every command of ours ends when the user made a mistake: one line on stderr, exit code 2, no traceback."""

from typing import Any

import click

from pipeline.errors import UserError


class Command(click.Command):
    """A click command that reports `UserError` and errors of the operating system (a full disk, no permission) in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            message = str(error)
        except OSError as error:
            if error.strerror is None:
                raise
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        failure = click.ClickException(message)
        failure.exit_code = 2
        raise failure

"""How every command of ours ends when the user made a mistake: one line on stderr, exit code 2, no traceback."""

from typing import Any

import click

from pipeline.errors import UserError


class Command(click.Command):
    """A click command that reports `UserError` and the operating system's errors (a full disk) in one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            message = str(error)
        except OSError as error:
            if error.strerror is None:
                raise
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        raise _Failure(message)


class _Failure(click.ClickException):
    exit_code = 2

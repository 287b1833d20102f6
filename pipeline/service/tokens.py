"""Tokens of a server: made, listed, revoked, and looked up. The database has their SHA-256 alone."""

import hashlib
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import sqlalchemy as sql

from pipeline import UserError
from pipeline.cli import Command, printable
from pipeline.service.database import Database, sessions, tokens, url_of

PREFIX = "pst_"
NAME = 200  # characters of a token's name
DAY = 86400.0
SESSION = DAY / 2  # seconds that a login of the dashboard lasts
ROOT = click.option(
    "--root", required=True, metavar="DIR", type=click.Path(path_type=Path), help="The server's folder."
)
URL = click.option("--database", "url", metavar="URL", help="postgresql+psycopg://… instead of DIR/penstock.db.")


@dataclass(frozen=True)
class Token:
    """`scope` is "read", for GET and HEAD alone, or "write". Times are Unix seconds."""

    id: int
    name: str
    scope: str
    created: float
    expires: float | None
    revoked: float | None

    @property
    def is_valid(self) -> bool:
        return self.revoked is None and (self.expires is None or time.time() < self.expires)


def create(database: Database, scope: str, name: str = "", days: int | None = None) -> tuple[int, str]:
    """Make a token; return its number, and its text, which is kept nowhere. Raises UserError: the name is long."""
    if len(name) > NAME:
        raise UserError(f"--name has {len(name)} characters; {NAME} at most")
    text, now = PREFIX + secrets.token_urlsafe(32), time.time()
    expires = now + days * DAY if days else None
    values = {"name": name, "scope": scope, "digest": digest(text), "created": now, "expires": expires}
    with database.writing() as connection:
        number = connection.execute(sql.insert(tokens).values(values).returning(tokens.c.id)).scalar_one()
    return int(number), text


def listed(database: Database) -> list[Token]:
    """Return all tokens, the oldest first."""
    with database.reading() as connection:
        rows = connection.execute(sql.select(tokens).order_by(tokens.c.id)).mappings()
        return [_token(row) for row in rows]


def verify(database: Database, text: str) -> Token | None:
    """Return the valid token of this text, or None; looked up by digest, so that the time it takes tells nothing."""
    with database.reading() as connection:
        row = connection.execute(sql.select(tokens).where(tokens.c.digest == digest(text))).mappings().first()
    token = _token(row) if row else None
    return token if token and token.is_valid else None


def revoke(database: Database, number: int) -> None:
    """Revoke a token, and end its sessions. Raises UserError: there is none."""
    with database.writing() as connection:
        same = sql.and_(tokens.c.id == number, tokens.c.revoked.is_(None))
        if not connection.execute(sql.update(tokens).where(same).values(revoked=time.time())).rowcount:
            raise UserError(f"{number}: no such token, or revoked already; see `penstock token list`")
        connection.execute(sql.delete(sessions).where(sessions.c.token_id == number))


def begin_session(database: Database, token: Token) -> str:
    """Return the secret of a new session of a token, for a cookie."""
    text, now = secrets.token_urlsafe(32), time.time()
    with database.writing() as connection:
        connection.execute(sql.delete(sessions).where(sessions.c.expires < now))
        values = {"digest": digest(text), "token_id": token.id, "expires": now + SESSION}
        connection.execute(sql.insert(sessions).values(values))
    return text


def session(database: Database, text: str) -> Token | None:
    """Return the valid token behind a session's secret; None where there is none."""
    alive = sql.and_(sessions.c.digest == digest(text), sessions.c.expires > time.time())
    query = sql.select(tokens).join(sessions, sessions.c.token_id == tokens.c.id).where(alive)
    with database.reading() as connection:
        row = connection.execute(query).mappings().first()
    token = _token(row) if row else None
    return token if token and token.is_valid else None


def end_session(database: Database, text: str) -> None:
    """Forget a session."""
    with database.writing() as connection:
        connection.execute(sql.delete(sessions).where(sessions.c.digest == digest(text)))


def digest(text: str) -> str:
    """Return the SHA-256, hex; a token has 256 random bits, so nothing slower is needed."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _token(row: sql.RowMapping) -> Token:
    return Token(**{name: row[name] for name in Token.__dataclass_fields__})


@click.group()
def token() -> None:
    """Create, list and revoke the tokens of a server."""


@contextmanager
def _opened(root: Path, url: str | None) -> Iterator[Database]:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; make it, or name the --root of `penstock serve`")
    database = Database(url_of(root.resolve(), url))
    try:
        yield database
    finally:
        database.close()


@token.command("create", cls=Command)
@ROOT
@URL
@click.option(
    "--scope", type=click.Choice(["read", "write"]), required=True, help="read: look at everything; write: all."
)
@click.option("--name", default="", metavar="TEXT", help="Words that tell it from others.")
@click.option("--days", type=click.IntRange(1, 36500), help="Days that it is valid.  [default: for ever]")
def create_command(root: Path, url: str | None, scope: str, name: str, days: int | None) -> None:
    """Make a token, and print it, once: it is kept nowhere."""
    with _opened(root, url) as database:
        number, text = create(database, scope, name, days)
    click.echo(f"token {number}, {scope}; for PENSTOCK_TOKEN, or the dashboard's login:", err=True)
    click.echo(text)


@token.command("list", cls=Command)
@ROOT
@URL
def list_command(root: Path, url: str | None) -> None:
    """List all tokens; their texts are not known."""
    with _opened(root, url) as database:
        for each in listed(database):
            state = "revoked" if each.revoked else "valid" if each.is_valid else "expired"
            dates = [time.strftime("%Y-%m-%d", time.gmtime(t)) if t else "-" for t in (each.created, each.expires)]
            click.echo("\t".join((str(each.id), each.scope, state, *dates, printable(each.name))))


@token.command("revoke", cls=Command)
@ROOT
@URL
@click.argument("number", type=click.IntRange(min=1))
def revoke_command(root: Path, url: str | None, number: int) -> None:
    """Revoke a token: whoever has it, or a login by it, is refused from now on."""
    with _opened(root, url) as database:
        revoke(database, number)
    click.echo(f"token {number} is revoked")

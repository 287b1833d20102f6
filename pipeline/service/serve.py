"""The command `serve`: jobs, data sets, runs and workers of one folder, over HTTP."""

import ipaddress
import os
import shlex
import signal
import socket
import ssl
from pathlib import Path
from types import FrameType
from typing import Any

import click
import uvicorn

from pipeline import UserError, files, storage
from pipeline.cli import Command, printable
from pipeline.service.database import Database, url_of
from pipeline.service.queue import Queue, slots_of
from pipeline.service.scheduler import Scheduler
from pipeline.service.site import Site
from pipeline.service.tokens import ROOT, URL, listed
from pipeline.service.web import app, limits
from pipeline.service.web.context import Service, Settings

PORT = 8080
SHUTDOWN = 2  # seconds for answers under way, once the server ends


@click.command(cls=Command)
@ROOT
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve at; 0.0.0.0: all of them.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: a free one.")
@click.option("--raw-root", "raw_roots", multiple=True, metavar="DIR", help="Builds read raw images below; repeatable.")
@click.option(
    "--slots", metavar="cpu=N,gpu=N,feed=N", help="Jobs at a time.  [default: one on the cores, one on each GPU]"
)
@click.option("--grace", type=click.FloatRange(0, 86400), default=60, show_default=True, help="Seconds to end in.")
@click.option("--stop-jobs", is_flag=True, help="Let jobs save and end with the server, to go on with the next one.")
@click.option("--feed", "feeds", multiple=True, metavar="HOST:PORT", help="Show this decoding worker, too; repeatable.")
@URL
@click.option("--require-token", is_flag=True, help="Ask for a token at a loopback address, too.")
@click.option("--tls-cert", metavar="FILE", help="Certificate (PEM).")
@click.option("--tls-key", metavar="FILE", help="Its key (PEM).")
def serve(root: Path, host: str, port: int, url: str | None, **values: Any) -> None:
    """Serve jobs, data sets, runs and workers of the folder DIR: a dashboard, and an API.

    \b
    Examples:
      penstock serve --root /srv/penstock --raw-root /data
      penstock token create --root /srv/penstock --scope write
      penstock serve --root /srv/penstock --raw-root /data --host 0.0.0.0
    """
    slots = slots_of(values["slots"])
    roots = tuple(str(storage.location(text).absolute()) for text in values["raw_roots"])
    for text, path in zip(values["raw_roots"], roots):
        if not storage.is_remote(path) and not os.path.isdir(path):
            raise UserError(f"--raw-root {text}: no such folder")
    _require_certificate(values["tls_cert"], values["tls_key"])
    site = Site(Path(os.path.realpath(root)), roots)
    files.require_writable(site.root)
    site.root.mkdir(parents=True, exist_ok=True)
    loopback = _is_loopback(host)
    settings = {"tokens_required": values["require_token"] or not loopback, "feeds": values["feeds"]}
    with files.locked(site.root, "another server works there; stop it, or name another --root"):
        site.make()
        database = Database(url_of(site.root, url))
        if settings["tokens_required"] and not any(token.is_valid for token in listed(database)):
            remedy = f"penstock token create --root {shlex.quote(str(root))} --scope write"
            asked = f"--host {host}: other machines can ask there" if not loopback else "--require-token"
            raise UserError(f"{asked}: no token is valid; make one: {remedy}")
        listening = _listening(host, port)
        port, scheme = listening.getsockname()[1], "https" if values["tls_cert"] else "http"
        queue = Queue(site, database, slots)
        scheduler = Scheduler(queue, database, values["grace"])
        service = Service(site, database, queue, scheduler, Settings(bool(values["tls_cert"]), **settings))
        web = app.create(service)
        tls = {"ssl_certfile": values["tls_cert"], "ssl_keyfile": values["tls_key"]}
        server = uvicorn.Server(config(web, **tls))
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"serving {printable(str(site.root))} at {scheme}://{shown}:{port} (pid {os.getpid()})")
        _end_at_hangup(server)
        try:
            server.run([listening])
        finally:
            left = scheduler.stop(values["stop_jobs"])
            database.close()
            if left:
                click.echo(
                    f"{left} jobs go on; the next server of {printable(str(site.root))} takes them over", err=True
                )


def config(web: Any, **options: Any) -> uvicorn.Config:
    """Return the configuration of uvicorn, in which everything is bounded."""
    quiet: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    bounds: dict[str, Any] = {"http": limits.Protocol, "ws": "none", "h11_max_incomplete_event_size": limits.HEADERS}
    return uvicorn.Config(web, lifespan="on", timeout_graceful_shutdown=SHUTDOWN, **quiet, **bounds, **options)


def _end_at_hangup(server: uvicorn.Server) -> None:
    """Let a server end at SIGHUP as at SIGTERM, which uvicorn handles itself; under nohup it stays ignored."""
    before = signal.getsignal(signal.SIGHUP)

    def hung_up(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before)  # by which uvicorn raises it again in the end
        server.handle_exit(number, frame)

    if before != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, hung_up)


def _is_loopback(host: str) -> bool:
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: no address of that name; name an address of this machine") from error
    return all(ipaddress.ip_address(info[4][0]).is_loopback for info in infos)


def _require_certificate(certificate: str | None, key: str | None) -> None:
    """Raise UserError where TLS could not begin with these files."""
    if key and not certificate:
        raise UserError("--tls-key needs --tls-cert, its certificate")
    if certificate:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        except OSError as error:
            names = f"--tls-cert {certificate}" + f" --tls-key {key}" * bool(key)
            reason = "not a certificate and its key (PEM)" if isinstance(error, ssl.SSLError) else error.strerror
            raise UserError(f"{names}: {reason}; name other files") from error


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens, before anything is started. Raises UserError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--host {host} --port {port}: {reason}; name another host or port (0: a free one)") from error

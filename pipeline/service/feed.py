"""The command `feed`: serve the views of every data set below a folder, from here or by actors of a Ray cluster."""

import errno
import ipaddress
import itertools
import os
import re
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pipeline import UserError, cluster, process, storage
from pipeline.cli import JSON, Command, print_event, print_line, printable
from pipeline.manifest import FILE_NAME
from pipeline.service.actors import Settings, resize
from pipeline.storage import Location, is_remote, location
from pipeline.volumes import hint, is_junk, open_regular

PORT = 8815  # as pipeline/online/endpoints.py has it, with which torch would be imported here
LEAST = 2**30  # bytes of address space that torch needs at the least
SHORTEST = 16  # characters of a token
TELLS = 5  # seconds between two events of its status
DEPTH = 3  # folders from DIR down to a data set
EXECUTORS = {"here": ("host", "port", "socket"), "ray": ("workers", "name", "ray_address")}  # and their own options
OPTIONS = [
    click.Option(["--root"], required=True, metavar="DIR", help="Serve every data set below DIR, a folder or a URL."),
    click.Option(["--host"], default="127.0.0.1", show_default=True, help="Address to serve at; 0.0.0.0: all of them."),
    click.Option(["--port"], type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: a free one."),
    click.Option(["--socket"], metavar="PATH", help="Serve at a Unix socket, in place of host and port."),
    click.Option(
        ["--token-file"],
        metavar="FILE",
        envvar="PENSTOCK_FEED_TOKEN_FILE",
        help=f"Answer only who has the token, {SHORTEST} characters or more. Needed where other machines can ask.",
    ),
    click.Option(["--tls-cert"], metavar="FILE", help="Certificate (PEM), for encrypted connections (grpc+tls://)."),
    click.Option(["--tls-key"], metavar="FILE", help="Its key (PEM)."),
    click.Option(
        ["--threads"], type=click.IntRange(1, 1024), show_default="all cores; 1 on Ray", help="Threads that decode."
    ),
    click.Option(["--readers"], type=click.IntRange(1, 1024), default=1, show_default=True, help="Reads at a time."),
    click.Option(["--cache"], metavar="FOLDER", help="Of a remote DIR: the folder for its shards."),
    click.Option(
        ["--cache-bytes"], type=click.IntRange(1), default=200 * 10**9, show_default=True, help="Limit of --cache."
    ),
    click.Option(
        ["--executor"],
        type=click.Choice(list(EXECUTORS)),
        default="here",
        show_default=True,
        help="Serve from this process until a signal, or by actors of a Ray cluster, which outlive the command.",
    ),
    click.Option(
        ["--workers"], type=click.IntRange(0, 10_000), default=1, show_default=True, help="On Ray; 0 ends them."
    ),
    click.Option(["--name"], default="feed", show_default=True, help="On Ray: trainers take --feed ray://NAME."),
    click.Option(
        ["--ray-address"], metavar="ADDRESS", show_default="RAY_ADDRESS, else auto", help="HOST:PORT of the head."
    ),
    JSON,
]


@click.command(
    cls=Command, params=OPTIONS, interrupted="nothing is lost: a trainer asks elsewhere, and Ray keeps its actors"
)
@click.pass_context
def feed(context: click.Context, root: str, executor: str, **values: Any) -> None:
    """Decode for trainers on other machines: serve the views of every data set below DIR.

    \b
    Examples:
      penstock feed --root /data                              (then: penstock train --feed 127.0.0.1:8815)
      penstock feed --root /data --host 0.0.0.0 --token-file token
      penstock feed --root s3://shards --cache /var/cache/penstock --host 10.0.0.7 --token-file token
      penstock feed --root /data --executor ray --workers 8   (then: penstock train --feed ray://feed)
    """
    chosen = {name for name in values if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    for other, options in EXECUTORS.items():
        for name in options if other != executor else ():
            if name in chosen:
                option = f"--{name.replace('_', '-')} {values[name]}"
                raise UserError(f"{option}: means something only with --executor {other}")
    if values["socket"] and (useless := chosen & {"host", "port", "tls_cert", "tls_key"}):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(useless))
        raise UserError(f"--socket {values['socket']}: is an address on this machine alone; leave out {names}")
    source = location(root)
    if executor == "ray":
        source = source.absolute()  # the actors have another working directory
        values["threads"] = values["threads"] or 1
    if is_remote(source) and not values["cache"]:
        raise UserError(f"{root}: is remote; name a folder on this machine for its shards: --cache FOLDER")
    if values["cache"] and not is_remote(source):
        raise UserError(f"--cache {values['cache']}: means something only for a remote DIR")
    token = _token(values["token_file"]) if values["token_file"] else None
    reading = {name: values[name] for name in ("threads", "readers", "cache", "cache_bytes")}
    settings = Settings(str(source), **reading, token=token, tls=_tls(values))
    count = len(datasets(source)) if values["workers"] else 0  # a group may end that has lost its DIR
    if executor == "ray":
        return _on_ray(settings, values)
    process.require_memory(LEAST)
    host, port = _address(values, token)
    with settings.server(host, port) as server:
        sets, uri = f"{count} data set{'s' if count > 1 else ''}", settings.uri(host, server.port)
        text = f"serving {sets} below {printable(root)} at {uri} (pid {os.getpid()})"
        print_line(values["as_json"], text, "serving", uri=uri, data_sets=count, pid=os.getpid())
        for second in itertools.count(
            1
        ):  # until a signal; an endless wait would not hear one that comes just before it
            time.sleep(1)
            if values["as_json"] and second % TELLS == 0:
                print_event("status", time=time.time(), **server.status())


def datasets(root: Location) -> list[str]:
    """Return the paths below `root` of the data sets there, at most `DEPTH` folders deep.

    Raises UserError: `root` is a data set itself, or there is none. OSError: it is no folder.
    """
    level, paths = [""], list[str]()
    for _ in range(DEPTH + 1):
        deeper = []
        for below, entries in storage.read_ahead(level, lambda path: storage.scan(root / path if path else root)):
            if any(entry.name == FILE_NAME and entry.is_file for entry in entries):
                paths.append(below)
                continue
            names = [e.name for e in entries if e.is_dir and not (e.name.startswith(".") or is_junk(e.name))]
            deeper += [f"{below}/{name}" if below else name for name in names]
        level = deeper
    if paths == [""]:
        raise UserError(f"{root}: is a data set itself; name the folder above it, {root.absolute().parent}")
    if not paths:
        raise UserError(f"{root}: no data set (a folder with {FILE_NAME}) is within {DEPTH} folders below{hint(root)}")
    return paths


def _on_ray(settings: Settings, values: dict[str, Any]) -> None:
    name, workers = values["name"], values["workers"]
    if not re.fullmatch(cluster.NAME, name):
        raise UserError(f"--name {name}: letters, digits, and . _ - after the first of them, for ray://NAME")
    with cluster.connected(values["ray_address"], "feed --executor ray") as ray:
        uris = resize(ray, name, workers, settings)
    for uri in uris:
        print_line(values["as_json"], uri, "serving", uri=uri)
    if not workers:
        print_line(values["as_json"], f"{name}: no worker is left")


def _address(values: dict[str, Any], token: str | None) -> tuple[str, int]:
    """Return the IP and port to serve at, where nobody else does; or the absolute path of a Unix socket, and 0."""
    host, port, path = values["host"], values["port"], values["socket"]
    if path:
        return _socket(os.path.abspath(path)), 0
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = min(infos, key=lambda info: info[0] != socket.AF_INET)
        if token is None and not ipaddress.ip_address(address[0]).is_loopback:
            raise UserError(f"--host {host}: other machines can ask there; name a --token-file, or stay at 127.0.0.1")
        with socket.socket(family) as probe:  # gRPC would share the port with another server of gRPC's
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--host {host} --port {port}: {reason}; name another host or port (0: a free one)") from error
    return str(address[0]), port


def _socket(path: str) -> str:
    """Return the path of a Unix socket at which nobody serves; that of a worker that was killed is deleted."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            if not client.connect_ex(path):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        if Path(path).is_socket():
            os.unlink(path)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(path)
        os.unlink(path)
    except OSError as error:
        raise UserError(f"--socket {path}: {error.strerror or error}; name another path") from error
    return path


def _token(file: str) -> str:
    """Return the token in a file, as the consumer reads it: without spaces around it."""
    with open_regular(file) as opened:
        text = opened.read(2**16).decode("latin-1").strip()
    if not re.fullmatch(rf"[!-~]{{{SHORTEST},4096}}", text):
        remedy = f"put {SHORTEST} to 4,096 letters, digits or signs there: openssl rand -hex 32 > {file}"
        raise UserError(f"{file}: holds no token ({len(text)} characters); {remedy}")
    return text


def _tls(values: dict[str, Any]) -> tuple[bytes, bytes] | None:
    """Return certificate and key. Raises UserError: one is missing, or they do not fit."""
    certificate, key = values["tls_cert"], values["tls_key"]
    if not (certificate or key):
        return None
    if not (certificate and key):
        raise UserError("--tls-cert and --tls-key belong together; name both files")
    contents = []
    for file in (certificate, key):
        with open_regular(file) as opened:
            contents.append(opened.read(2**20))
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise UserError(
            f"{certificate}, {key}: no certificate and its key, without a password, in PEM ({error.reason or error})"
        ) from error
    return contents[0], contents[1]

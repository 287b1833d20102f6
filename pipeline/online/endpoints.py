"""Addresses of decoding workers, as a user writes them, and the endpoints behind each at this moment."""

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline import UserError, cluster

LOCAL = "local"
PORT = 8815  # of a worker, where its address names none
FORMS = "write HOST:PORT, grpc://HOST:PORT/DATASET, grpc+tls://HOST:PORT, grpc+unix:///SOCKET, ray://NAME or local"
DATA = r"(?:/(?P<data>[^?#\s]*))?"
HOST = rf"(?P<host>\[[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*\]|{cluster.NAME})"
SERVER = re.compile(r"(?:(?P<scheme>grpc|grpc\+tls)://)?" + HOST + r"(?::(?P<port>[0-9]{1,9}))?" + DATA)
SOCKET = re.compile(r"(?P<scheme>grpc\+unix)://(?P<host>/[^?#\s]+)")
GROUP = re.compile(rf"(?P<scheme>ray)://(?P<host>{cluster.NAME}){DATA}")


class Endpoint(NamedTuple):
    """A worker that may be asked."""

    uri: str  # for pyarrow.flight's client: grpc://IP:PORT, grpc+tls://IP:PORT, grpc+unix:///SOCKET
    data: str  # name of the data set below the worker's root; "": that of the consumer's directory
    host: str  # the name in the certificate, under TLS
    name: str  # for messages: the address, and the IP where it has several


@dataclass(frozen=True)
class Address:
    """An address of one or more workers: a server's, a socket's, or the name of a group on a Ray cluster."""

    text: str
    scheme: str
    host: str  # of a server: a name or an IP; else the path of a socket, or a group's name
    port: int
    data: str

    def endpoints(self) -> list[Endpoint]:
        """Return the workers behind the address now: of a host's name each IP, of a Ray group all that answer.

        A name's IPv6 addresses count only where it has no other. Raises UserError, without the address itself in front:
        an unknown name, no such group.
        """
        if self.scheme == "grpc+unix":
            return [Endpoint(self.text, "", "", self.text)]
        if self.scheme == "ray":
            uris = cluster.registry().addresses(self.host)
            return [Endpoint(uri, self.data, self.host, f"{self.text} ({uri.rpartition('/')[2]})") for uri in uris]
        ips = _ips(self.host)
        names = [self.text] if len(ips) == 1 else [f"{self.text} ({ip})" for ip in ips]
        hosts = [f"[{ip}]" if ":" in ip else ip for ip in ips]
        return [
            Endpoint(f"{self.scheme}://{host}:{self.port}", self.data, self.host, name)
            for host, name in zip(hosts, names)
        ]


def parse(texts: Sequence[str]) -> tuple[bool, tuple[Address, ...]]:
    """Return whether this process decodes too (`local`, `local+ADDRESS`), and the addresses.

    Raises UserError: no address, or one that is there twice.
    """
    local, addresses = False, dict[str, Address]()
    for text in texts:
        rest = text.removeprefix(f"{LOCAL}+")
        local = local or rest != text or text == LOCAL
        if rest in addresses:
            raise UserError(f"{rest}: is among the workers twice; name it once")
        if rest != LOCAL:
            addresses[rest] = _address(rest)
    return local, tuple(addresses.values())


def _address(text: str) -> Address:
    match = SERVER.fullmatch(text) or SOCKET.fullmatch(text) or GROUP.fullmatch(text)
    if not match or not text.isprintable():
        raise UserError(f"{text!r}: no address of a worker; {FORMS}")
    values = match.groupdict()
    scheme, host, port = values["scheme"] or "grpc", values["host"].strip("[]"), int(values.get("port") or PORT)
    data = (values.get("data") or "").rstrip("/")
    if not 0 < port < 2**16:
        raise UserError(f"{text}: port {port} must be between 1 and 65535")
    if data and not {"", ".", ".."}.isdisjoint(data.split("/")):
        raise UserError(
            f"{text}: {data} names no data set; name its folder below the worker's DIR, such as imagenet-256"
        )
    if ":" in host and scheme != "grpc+unix":
        try:
            ipaddress.IPv6Address(host)
        except ValueError as error:
            raise UserError(f"{text}: {error}; {FORMS}") from error
    return Address(text, scheme, host, port, data)


def _ips(host: str) -> list[str]:
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"the name {host} has no address ({reason}); correct it, or start the workers") from error
    ips = sorted({str(info[4][0]) for info in infos})
    return [ip for ip in ips if ":" not in ip] or ips

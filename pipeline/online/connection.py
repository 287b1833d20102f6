"""A decoding worker as its consumer sees it: a question, and an answer or the reason for none."""

import os
import re
import ssl
from pathlib import Path
from typing import TypedDict

import msgspec
import pyarrow as pa
from pyarrow import flight

from pipeline import UserError, storage, typed
from pipeline.cli import printable
from pipeline.online.endpoints import Endpoint
from pipeline.online.parts import Answer, Request
from pipeline.typed import Count

TOKEN_FILE, CA_FILE = "PENSTOCK_FEED_TOKEN_FILE", "PENSTOCK_FEED_CA"  # variables of the environment
# a connection of its own, which a new client makes anew; to a worker goes nothing by way of a proxy
CHANNEL = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
LONGEST = 400  # characters of a worker's message


class Failure(Exception):
    """A worker gave no answer. `kind`: refused, data, bad or busy, as the worker says; else unreachable or wrong."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, printable(reason, LONGEST)


class Status(TypedDict):
    """A worker's account of itself."""

    seconds: float  # since it began to serve
    views: Count  # answered
    rate: float  # views/s of the last seconds
    queue: Count  # requests that it decodes or sends
    bytes_held: Count  # by their answers
    clients: Count  # connections that ask for views
    threads: Count  # that decode
    datasets: list[str]  # that are open


class _Detail(msgspec.Struct):
    """The addition of a worker of ours to an error."""

    kind: str
    message: str


def secrets() -> tuple[str | None, bytes | None]:
    """Return the token, and the certificates that TLS trusts, of the files that the environment names; None: no file.

    Raises OSError; UserError: a token that is no line of text, no certificates.
    """
    token, ca = (_content(os.environ.get(name)) for name in (TOKEN_FILE, CA_FILE))
    try:
        text = None if token is None else token.decode("ascii").strip()
    except UnicodeError as error:
        raise UserError(f"{os.environ[TOKEN_FILE]}: not a token; write one line of letters and digits") from error
    if text is not None and not re.fullmatch("[!-~]+", text):
        raise UserError(f"{os.environ[TOKEN_FILE]}: not a token; write one line of letters and digits")
    if ca is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=ca.decode("ascii"))
        except (ValueError, ssl.SSLError) as error:
            raise UserError(f"{os.environ[CA_FILE]}: holds no certificates (PEM)") from error
    return text, ca


def _content(name: str | None) -> bytes | None:
    if not name:
        return None
    return storage.read_bytes(Path(name))


class Connection:
    """Asks one worker. Threads may share it; they share its connection, which is made when it is needed."""

    def __init__(self, endpoint: Endpoint, token: str | None, ca: bytes | None) -> None:
        self.name, self._endpoint, self._ca = endpoint.name, endpoint, ca
        self._headers = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
        self._client: flight.FlightClient | None = None

    def ask(self, request: Request, side: int, timeout: float) -> Answer:
        """Return the answer to a request, with views of `side` pixels. Raises Failure."""
        if self._endpoint.data:
            request = msgspec.structs.replace(request, data=self._endpoint.data)
        ticket = flight.Ticket(msgspec.json.encode(request))
        options = flight.FlightCallOptions(timeout=timeout, headers=self._headers)
        used = self._client is not None
        while True:
            try:
                batch = self._connected().do_get(ticket, options).read_chunk().data
                return Answer.from_batch(batch, len(request.ids), side)
            except (flight.FlightError, pa.ArrowException, OSError, StopIteration, UserError) as error:
                self._client = None  # so that a new one connects at once, where gRPC would pause
                failure = _failure(error)
                if used and failure.kind == "unreachable" and isinstance(error, flight.FlightUnavailableError):
                    used = False  # its connection may have ended while nothing was asked, or the worker begun again
                    continue
                raise failure from error

    def status(self, timeout: float) -> Status:
        """Return the worker's status, by a new connection. Raises Failure."""
        options = flight.FlightCallOptions(timeout=timeout, headers=self._headers)
        self._client = None
        try:
            result = next(iter(self._connected().do_action(flight.Action("status", b""), options)))
            return typed.from_json(result.body.to_pybytes(), Status)
        except (flight.FlightError, pa.ArrowException, OSError, StopIteration, UserError) as error:
            raise _failure(error) from error

    def _connected(self) -> flight.FlightClient:
        client = self._client
        if client is None:
            tls = self._endpoint.uri.startswith("grpc+tls")
            secure = {"tls_root_certs": self._ca, "override_hostname": self._endpoint.host} if tls else {}
            client = flight.FlightClient(self._endpoint.uri, generic_options=CHANNEL, **secure)
            self._client = client
        return client


def _failure(error: BaseException) -> Failure:
    if isinstance(error, UserError):
        return Failure("wrong", str(error))
    if isinstance(error, StopIteration):
        return Failure("wrong", "answers with nothing")
    if detail := getattr(error, "extra_info", b""):
        try:
            known = typed.from_json(detail, _Detail)
            return Failure(known.kind, known.message)
        except UserError:
            pass  # another program's
    if isinstance(error, flight.FlightTimedOutError):
        return Failure("unreachable", "no answer in time")
    text = re.sub(r"(\. Detail:| gRPC client debug context).*", "", " ".join(str(error).split()))
    reason = re.sub(r"^.*(with message: |last error: |(ipv4|ipv6|unix):\S+: )", "", text)
    if "certificate verify failed" in text or "in peer certificate" in text:
        reason = reason.rpartition("routines::")[2].strip(" .")
        return Failure(
            "refused", f"its certificate is not trusted ({reason}); {CA_FILE} names a file of those that are"
        )
    if reason == "Socket closed":
        reason += ", by another program or for want of TLS (grpc+tls://)"
    kind = "unreachable" if isinstance(error, flight.FlightUnavailableError | OSError) else "wrong"
    return Failure(kind, reason.strip(" .") or type(error).__name__)

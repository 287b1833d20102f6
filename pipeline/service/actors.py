"""Decoding workers as detached actors of a Ray cluster, which Ray places, and starts again after a loss."""

import os
import time
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline import UserError, cluster, process, storage

if TYPE_CHECKING:
    from pipeline.service.worker import Server

PATIENCE = 120.0  # seconds for all of a group to answer
WAKES = 0.5  # seconds between two looks at signals, while nothing is answered


@dataclass(frozen=True)
class Settings:
    """Options of a worker."""

    root: str  # of the data sets: a path or a URL
    threads: int | None
    readers: int
    cache: str | None
    cache_bytes: int
    token: str | None = field(repr=False)
    tls: tuple[bytes, bytes] | None = field(repr=False)  # certificate and key, PEM

    def server(self, host: str, port: int) -> "Server":
        """Return a server that serves already; port 0: a free one. A host that begins with / is a Unix socket.

        Raises UserError: the package pyarrow is missing, or gRPC cannot serve there.
        """
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else whoever sends garbage fills the log
        try:
            from pyarrow import ArrowException, flight  # noqa: F401
        except ImportError as error:
            raise UserError("feed needs the package pyarrow: pip install 'penstock-imagenet[service]'") from error
        from pipeline.service.worker import Server, Worker

        worker = Worker(
            storage.location(self.root), self.threads, self.readers, cache=self.cache, cache_bytes=self.cache_bytes
        )
        uri = self.uri(host, port)
        try:
            return Server(worker, uri, token=self.token, tls=self.tls)
        except ArrowException as error:
            raise UserError(f"{uri}: cannot be served ({cluster.one_line(error)}); name another port") from error

    def uri(self, host: str, port: int) -> str:
        """Return the address of a server, as pyarrow.flight and `pipeline.online.endpoints` read it."""
        if host.startswith("/"):
            return f"grpc+unix://{host}"
        return f"grpc{'+tls' if self.tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


class Actor:
    """A worker in a process of Ray's. It begins to serve when it is asked for its address."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._server: Server | None = None

    def uri(self, settings: Settings | None = None) -> str:
        """Return its address. Raises UserError: the data sets are not here, or `settings` are not its own."""
        import ray

        host, node = ray.util.get_node_ip_address(), os.uname().nodename
        if settings not in (None, self._settings):
            raise UserError(f"serves {self._settings.root} with other options; end these workers first: --workers 0")
        if self._server is None:
            if not storage.is_dir(storage.location(self._settings.root)):
                raise UserError(
                    f"{self._settings.root}: not there on the node {node}; DIR must be seen under the same path on "
                    "every node of the cluster: a shared file system, or s3://"
                )
            self._server = self._settings.server(host, 0)
        return self._settings.uri(host, self._server.port)


def resize(ray: ModuleType, name: str, workers: int, settings: Settings) -> list[str]:
    """Begin or end workers of a name until there are so many; return their addresses once all answer.

    Raises UserError: a node is not of this machine alone and there is no token, the workers have other settings,
    a worker fails, or not all of them answer in time.
    """
    if workers and settings.token is None:
        for ip in (node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]):
            if not ip.startswith("127."):
                raise UserError(f"the node {ip} can be asked by other machines; name a --token-file for the workers")
    group = cluster.actors(ray, name)
    for number, actor in group.items():
        if number >= workers:
            ray.kill(actor, no_restart=True)
    while max(group, default=-1) >= workers:
        time.sleep(WAKES / 5)
        group = cluster.actors(ray, name)
    with process.signals_held():  # Ray's threads and callbacks swallow exceptions, so none is raised in its code
        begun = {i: _begun(ray, f"{name}-{i}", settings) for i in range(workers) if i not in group}
    try:
        return _uris(ray, name, group | begun, settings)
    except UserError:
        for actor in begun.values():
            ray.kill(actor, no_restart=True)
        raise


def _begun(ray: ModuleType, name: str, settings: Settings) -> Any:
    options: dict[str, Any] = {"name": name, "namespace": cluster.NAMESPACE, "num_cpus": settings.threads}
    options |= {"lifetime": "detached", "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": "SPREAD"}
    try:
        return ray.remote(Actor).options(**options).remote(settings)
    except ValueError as error:  # the name is taken
        raise UserError(f"{name}: another command begins these workers; wait for that one's end") from error


def _uris(ray: ModuleType, name: str, group: dict[int, Any], settings: Settings) -> list[str]:
    """Return the address of each actor of a group, once all answer."""
    deadline, uris = time.monotonic() + PATIENCE, dict[int, str]()
    with process.signals_held():
        asked = {actor.uri.remote(settings): number for number, actor in group.items()}
    while asked:
        with process.signals_held():
            for reference in ray.wait(list(asked), timeout=WAKES)[0]:
                number = asked.pop(reference)
                try:
                    uris[number] = ray.get(reference)
                except ray.exceptions.RayError as error:
                    reason = cluster.one_line(getattr(error, "cause", error))
                    raise UserError(f"{name}-{number}: {reason}") from error
        if time.monotonic() > deadline:
            raise UserError(
                f"{name}: {len(uris)} of {len(group)} workers answer after {PATIENCE:.0f} s; each takes "
                f"{settings.threads} free CPUs of a node: take fewer --workers or --threads, or a larger cluster"
            )
    return [uris[number] for number in sorted(uris)]

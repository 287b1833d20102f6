"""Join a Ray cluster; ask Ray's registry for the addresses of the decoding workers that are its actors."""

import json
import logging
import os
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import ModuleType
from typing import Any

from pipeline import UserError, process

CONNECT = 5.0  # seconds after which an address counts as wrong
NAMESPACE = "penstock"  # of the actors, whose names are NAME-0, NAME-1 …
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
ANSWER = 5.0  # seconds in which an actor that lives says its address
PATIENCE = 60.0  # seconds for a process to join a cluster, and for what it is asked there
IDLE = 600.0  # seconds without a question, after which that process ends


@contextmanager
def connected(address: str | None, user: str = "--executor ray", option: str = "--ray-address") -> Iterator[ModuleType]:
    """Join a cluster, and yield the package ray; leave it at the end of the block.

    Args:
        address: HOST:PORT of its head; "auto" or None: RAY_ADDRESS, else the cluster of this machine.
        user: names, in an error, what needs the package ray; `option` what an address is given by.
    Raises:
        UserError: the package is missing, or no cluster answers.
    """
    if not address or address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    # Ray reads its environment when it is imported. RETRIES: how often it waits for 40 s where something else answers;
    # DEDUP_LOGS: else it prints each retry on stdout, between the lines of --json.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    os.environ |= {"RAY_DEDUP_LOGS": "1", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
    try:
        with process.signals_held():  # a Cython module swallows what is raised while it is imported
            import ray
    except ImportError as error:
        raise UserError(f"{user} needs the package ray: pip install 'penstock-imagenet[ray]'") from error
    try:
        # `ray.init` sets a handler of SIGTERM that ends the process without a message; ours is put back afterwards
        with process.signals_held():
            if address != "auto":  # Ray itself would try for many minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"{option} {address}: no Ray cluster answers there ({one_line(error)}); run this command on a node of "
            "the cluster (`ray start --head` makes one), and name the head as HOST:PORT, mostly port 6379, or auto"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def one_line(error: BaseException) -> str:
    """Return an error's message on one line of bounded length, without colours or a traceback."""
    text = " ".join(re.sub("\x1b\\[[0-9;]*m", "", str(error)).split()).partition(" traceback: ")[0]
    return text if len(text) <= 300 else f"{text[:300]} …"


def actors(ray: ModuleType, name: str) -> dict[int, Any]:
    """Return the actors NAME-0, NAME-1 … of the cluster by their numbers, dead ones apart."""
    handles = {}
    for record in ray.util.list_named_actors(all_namespaces=True):
        stem, _, number = record["name"].rpartition("-")
        if record["namespace"] == NAMESPACE and stem == name and number.isdecimal():
            with suppress(ValueError):  # it has ended since
                handles[int(number)] = ray.get_actor(record["name"], NAMESPACE)
    return dict(sorted(handles.items()))


def addresses(ray: ModuleType, name: str) -> list[str]:
    """Return the URIs of those workers NAME-0, NAME-1 … that answer now; one that Ray starts again does not."""
    asked = [actor.uri.remote() for actor in actors(ray, name).values()]
    answered = ray.wait(asked, num_returns=len(asked), timeout=ANSWER)[0] if asked else []
    uris = []
    for reference in answered:
        with suppress(ray.exceptions.RayError):
            uris.append(ray.get(reference))
    return uris


class Registry:
    """Asks a cluster for addresses, in a process of its own: one that has joined dies with the cluster's head."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def addresses(self, name: str) -> list[str]:
        """Return what `addresses` does of the cluster that RAY_ADDRESS names, else of this machine's.

        Raises UserError: no such cluster, no worker of that name answers.
        """
        with self._lock:
            answer = self._ask(name)
        if isinstance(answer, str):
            raise UserError(answer)
        if not answer:
            remedy = f"start them: penstock feed --executor ray --name {name} --workers N"
            raise UserError(f"no worker of the name {name} answers; {remedy}")
        return answer

    def _ask(self, name: str) -> list[str] | str:
        """Return the answer of `main`, which ends after the text of an error."""
        if self._process is None or self._process.poll() is not None:
            # a session of its own: a terminal's Ctrl-C is for the program, with whose end its standard input ends
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            command = [sys.executable, "-m", __name__]
            self._process = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
        child = self._process
        assert child.stdin
        assert child.stdout
        with suppress(BrokenPipeError):
            child.stdin.write(f"{name}\n")
            child.stdin.flush()
        answer: list[str] | str = f"no answer of Ray's registry within {PATIENCE:.0f} s, or the cluster has ended"
        if select.select([child.stdout], [], [], PATIENCE)[0] and (line := child.stdout.readline()):
            answer = json.loads(line)
        if isinstance(answer, str):
            child.kill()
            with suppress(BrokenPipeError):
                child.communicate()
        return answer


@cache
def registry() -> Registry:
    """Return this process's one `Registry`."""
    return Registry()


def main() -> None:
    """Print, for each name on standard input, a line of JSON: its addresses, or the one text of an error, the last."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints, too
    try:
        with connected(None, "an address ray://NAME", "RAY_ADDRESS") as ray:
            while select.select([sys.stdin], [], [], IDLE)[0] and (name := sys.stdin.readline().strip()):
                print(json.dumps(addresses(ray, name)), file=answers, flush=True)
    except (OSError, RuntimeError, ValueError) as error:  # a UserError; RuntimeError: the head is lost
        print(json.dumps(one_line(error)), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""The Python of each contestant: our own, or a virtual environment in the user's cache folder, with exact versions."""

import os
import subprocess
import sys
from pathlib import Path

from pipeline.errors import UserError
from tools.peers.contestants import Contestant

READY = "penstock-bench"  # in a finished environment: the requirements that it was made with


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock" / "bench"


def python_of(contestant: Contestant) -> Path:
    """Raises UserError where the peer's environment is not there, or was made with other versions."""
    if not contestant.is_peer:
        return Path(sys.executable)
    folder = cache_folder() / contestant.name
    try:
        ready = (folder / READY).read_text() == _wanted(contestant)
    except FileNotFoundError:
        ready = False
    if not ready:
        raise UserError(f"not installed; python tools/bench.py peers {contestant.name}")
    return folder / "bin" / "python"


def make(contestant: Contestant) -> None:
    """Make a peer's environment anew.

    Raises:
        UserError: with the end of what pip said.
    """
    folder = cache_folder() / contestant.name
    python = str(folder / "bin" / "python")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *contestant.requirements],
    ):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
            raise UserError(
                f"{said}\n{contestant.name}: cannot be installed, for the reason above. {contestant.advice}"
            )
    (folder / READY).write_text(_wanted(contestant))


def _wanted(contestant: Contestant) -> str:
    return f"python {sys.version}\n" + "".join(line + "\n" for line in contestant.requirements)

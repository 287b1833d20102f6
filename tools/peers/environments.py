"""The Python of each contestant: our own, or a virtual environment in the user's cache folder, with exact versions."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline import UserError

READY = "penstock-bench"  # in a finished environment: the requirements that it was made with
TORCH = "torch==2.13.0"
PILLOW = "pillow==13.0.0"


@dataclass(frozen=True)
class Environment:
    name: str
    requirements: tuple[str, ...]  # exact versions
    advice: str = ""  # where it cannot be made


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(
            "img2dataset",
            (
                "img2dataset==1.47.0",
                "opencv-python-headless==4.14.0.94",
                "albumentations==1.4.24",
                "webdataset==0.2.111",
                "numpy==2.4.6",
                "pyarrow==26.0.1",
            ),
        ),
        Environment("litdata", ("litdata==0.2.76", TORCH, "torchvision==0.28.0", PILLOW, "numpy==2.4.6")),
        Environment("webdataset", ("webdataset==1.0.2", TORCH, PILLOW, "numpy==2.4.6")),
        Environment(
            "ffcv",
            ("ffcv==1.0.2", TORCH, "opencv-python==5.0.0.93", PILLOW, "numba==0.68.1", "numpy==2.4.6"),
            "it is compiled: apt-get install libopencv-dev libturbojpeg0-dev pkg-config build-essential",
        ),
        Environment("opencv", ("opencv-python-headless==5.0.0.93", "numpy==2.4.6")),
    )
}


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock" / "bench"


def python_of(name: str) -> Path:
    """The Python of an environment, or our own where `name` is empty.

    Raises:
        UserError: the environment is not there, or was made with other versions.
    """
    if not name:
        return Path(sys.executable)
    folder = cache_folder() / name
    try:
        ready = (folder / READY).read_text() == _wanted(ENVIRONMENTS[name])
    except FileNotFoundError:
        ready = False
    if not ready:
        raise UserError(f"not installed; python tools/bench.py peers {name}")
    return folder / "bin" / "python"


def make(environment: Environment) -> None:
    """Make an environment anew.

    Raises:
        UserError: with the end of what pip said.
    """
    folder = cache_folder() / environment.name
    python = str(folder / "bin" / "python")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *environment.requirements],
    ):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
            raise UserError(
                f"{said}\n{environment.name}: cannot be installed, for the reason above. {environment.advice}"
            )
    (folder / READY).write_text(_wanted(environment))


def _wanted(environment: Environment) -> str:
    return f"python {sys.version}\n" + "".join(line + "\n" for line in environment.requirements)

"""What an image of docker/Dockerfile installs of pyproject.toml, a requirement a line: `build` or `train`."""

import re
import sys
import tomllib
from pathlib import Path

BUILD_EXTRAS = ("s3", "parquet", "ray")
TRAIN_EXTRAS = (*BUILD_EXTRAS, "retrieval", "export")
# tools/build_shards.py imports none of these: the image `build` is smaller by gigabytes without them
TRAINER_ONLY = {"torch", "nvidia-dali-cuda130", "webdataset", "safetensors", "tensorboardX", "braceexpand", "plotly"}


def requirements(project: Path, target: str) -> list[str]:
    """Those of pyproject.toml and of the target's extras. Raises ValueError where `target` is not build or train."""
    if target not in ("build", "train"):
        raise ValueError(f"{target}: not a target; name build or train")
    found = tomllib.loads(project.read_text())["project"]
    needed = [name for name in found["dependencies"] if target == "train" or _name(name) not in TRAINER_ONLY]
    extras = TRAIN_EXTRAS if target == "train" else BUILD_EXTRAS
    return needed + [name for extra in extras for name in found["optional-dependencies"][extra]]


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement, maxsplit=1)[0]


if __name__ == "__main__":
    print(*requirements(Path("pyproject.toml"), sys.argv[1]), sep="\n")

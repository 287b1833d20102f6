"""Print the requirements of pyproject.toml that an image of docker/Dockerfile installs: `build` or `train`."""

import re
import sys
import tomllib
from pathlib import Path

BUILD_EXTRAS = ("s3", "parquet", "ray")
TRAIN_EXTRAS = (*BUILD_EXTRAS, "service", "retrieval", "export")
# tools/build_shards.py imports none of these: the image `build` is smaller by gigabytes without them
TRAINER_ONLY = {
    *("torch", "nvidia-dali-cuda130", "webdataset", "safetensors", "tensorboardX", "braceexpand", "plotly", "jinja2")
}


def requirements(project: Path, target: str) -> list[str]:
    """Return the project's and the target's extras' requirements. Raises ValueError where `target` is unknown."""
    if target not in ("build", "train"):
        raise ValueError(f"{target}: not a target; name build or train")
    table = tomllib.loads(project.read_text())["project"]
    needed = [name for name in table["dependencies"] if target == "train" or _name(name) not in TRAINER_ONLY]
    extras = TRAIN_EXTRAS if target == "train" else BUILD_EXTRAS
    return needed + [name for extra in extras for name in table["optional-dependencies"][extra]]


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement, maxsplit=1)[0]


if __name__ == "__main__":
    print(*requirements(Path("pyproject.toml"), sys.argv[1]), sep="\n")

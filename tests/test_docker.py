"""docker/: pins, what each image installs, what is copied into it, and command lines that its commands accept.

docker/prove.sh builds the images and runs them, which takes too long for every run of the tests.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from conftest import ROOT, normal, pins
from tools.build_shards import main as build_shards
from trainer.commands.train import train

DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(target: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "docker/requirements.py", target]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)


def names(lines: list[str]) -> set[str]:
    return {normal(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in lines}


def required(target: str) -> set[str]:
    """The names of the distributions that an image installs."""
    return names(requirements(target).stdout.splitlines())


def test_no_secret_and_no_registry_is_in_any_file():
    for path in (*sorted(path for path in DOCKER.iterdir() if path.is_file()), ROOT / ".dockerignore"):
        text = path.read_text()
        assert not re.search(r"(?i)index-url *=|trusted-host|(password|passwd|token|secret)\w* *=", text), path
        assert not re.search(r"https?://\w", text), path


def test_images_run_as_a_user_who_is_not_root():
    text = (DOCKER / "Dockerfile").read_text()
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE):
        if "\nENTRYPOINT" in stage:
            assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == ["1000:1000"]
            assert "RUN" not in stage.partition("\nUSER ")[2]
    assert text.count("\nENTRYPOINT") == 2


def test_base_and_packages_are_pinned():
    assert re.search(r"^ARG BASE=debian:[a-z]+-\d{8}-slim$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    for target in ("build", "train"):
        assert required(target)
        assert required(target) <= set(pins())


def test_targets_hold_what_their_commands_need():
    extras = PROJECT["optional-dependencies"]
    everything = [line for extra in extras if extra != "dev" for line in extras[extra]]
    assert required("train") == names(PROJECT["dependencies"] + everything)
    lacking = required("train") - required("build")
    assert {"torch", "nvidia-dali-cuda130"} <= lacking
    imported = {"nvidia-dali-cuda130": "nvidia", "faiss-cpu": "faiss"}
    blocked = sorted(imported.get(name, name) for name in lacking)
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); sys.argv = ['build_shards.py', '--help']\n"
    code += "import runpy; runpy.run_path('tools/build_shards.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "name build or train" in requirements("test").stderr


def copied(path: str) -> bool:
    """Return whether .dockerignore lets a file of the project into the build: the last line that fits decides."""
    result = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        fits = pattern == "*" or path == pattern or path.startswith(f"{pattern}/")
        if pattern.startswith("**/"):
            fits = pattern.removeprefix("**/") in path.split("/")
        result = line.startswith("!") if fits else result
    return result


def test_what_an_editable_install_needs_is_copied_and_nothing_else_is():
    packages = {"penstock", "pipeline", "trainer", "tools"}
    files = {"setup.py", "penstock_imagenet.py", "constraints.txt", "pyproject.toml", "README.md", "LICENSE"}
    assert {path.name for path in ROOT.iterdir() if copied(path.name)} == packages | files
    assert copied("docker/requirements.py")
    for other in (".git/config", ".venv/bin/python", "demo/drawn/raw", "tests/conftest.py", "tools/__pycache__/a.pyc"):
        assert not copied(other), other


@pytest.mark.parametrize("name", ["builder", "trainer"])
def test_composes_commands_are_commands(name: str):
    words = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"][name]["command"]
    if name == "builder":
        context = build_shards.make_context("build", words)
        assert (context.params["raw"], context.params["dataset"]) == ("/raw", "/data/imagenet-256")
    else:
        context = train.make_context("train", words[1:])
        assert words[0] == "train"
        assert context.params["data"] == Path("/data/imagenet-256")
        assert context.params["devices"] == "cuda:0,cuda:1"


def test_the_pages_commands_are_those_of_the_image():
    """Every `docker run` of the documents ends with a command of the entry point that it runs."""
    text = "".join((ROOT / page).read_text() for page in ("README.md", "docs/docker.md")).replace("\\\n", " ")
    runs = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("docker run ")]
    assert runs
    for words in runs:
        image = next(word for word in words if word in ("penstock", "penstock-build"))
        rest = words[words.index(image) + 1 :]
        if "--entrypoint" in words:
            assert (ROOT / rest[0]).is_file()
        elif image == "penstock-build":
            build_shards.make_context("build", rest)
        elif rest[0] == "train":
            train.make_context("train", rest[1:])


def test_the_proof_is_a_script():
    subprocess.run(["bash", "-n", str(DOCKER / "prove.sh")], check=True)

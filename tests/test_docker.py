"""docker/: what the image is made of, held against pyproject.toml, constraints.txt and the commands themselves.

That it builds and runs is proved by docker/prove.sh, which takes too long for every run of the tests.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT
from test_install import normal, pins
from tools.build_shards import main as build_shards
from trainer.commands.train import train

DOCKER = ROOT / "docker"
FILES = (*sorted(path for path in DOCKER.iterdir() if path.is_file()), ROOT / ".dockerignore")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """(FROM, …), (RUN, …) of the Dockerfile, comments left out and continued lines joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in whole if line.strip())]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Each stage's instructions after its FROM, by name, with those of the stages that it stands on first."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            assert name, rest
            assert base in found or base == "${BASE}", rest
            found[name] = list(found.get(base, []))
        elif name:
            found[name].append((word, rest))
    return found


def required(target: str) -> list[str]:
    line = [sys.executable, "docker/requirements.py", target]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()


def names(requirements: list[str]) -> set[str]:
    return {normal(re.match(r"[\w.-]+", each)[0]) for each in requirements}  # type: ignore[index]


def test_base_and_packages_are_pinned():
    base = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")["BASE"]
    assert re.fullmatch(r"debian:[a-z]+-\d{8}-slim", base)
    runs = [rest for found in stages().values() for word, rest in found if word == "RUN"]
    installs = [part for run in runs for part in run.split("&&") if "pip install" in part]
    assert len(installs) >= 5
    for each in installs:
        assert "-c constraints.txt" in each or "--no-index" in each or "grep '^pillow-simd==' constraints.txt" in each
        assert "--no-cache-dir" in each
    for run in runs:
        assert "apt-get install" not in run or "--no-install-recommends" in run
    for target in ("build", "train"):
        assert names(required(target)) <= set(pins())


def test_targets_hold_what_their_commands_need():
    extras = PROJECT["optional-dependencies"]
    everything = [each for extra in extras if extra != "dev" for each in extras[extra]]
    assert names(required("train")) == names(PROJECT["dependencies"] + everything)
    lacking = names(required("train")) - names(required("build"))
    assert {"torch", "nvidia-dali-cuda130"} <= lacking
    imported = {"nvidia-dali-cuda130": "nvidia", "faiss-cpu": "faiss"}
    blocked = sorted(imported.get(name, name) for name in lacking)
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); sys.argv = ['build_shards.py', '--help']\n"
    code += "import runpy; runpy.run_path('tools/build_shards.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    wrong = [sys.executable, "docker/requirements.py", "test"]
    assert "name build or train" in subprocess.run(wrong, capture_output=True, text=True, cwd=ROOT, check=False).stderr


def test_targets_run_their_commands_as_a_user_who_is_not_root():
    assert list(stages())[-1] == "train", "docker build takes the last stage where no --target is given"
    for target, command in (("build", '["python", "tools/build_shards.py"]'), ("train", '["python", "-m", "trainer"]')):
        found = stages()[target]
        assert [rest for word, rest in found if word == "ENTRYPOINT"] == [command]
        assert [rest for word, rest in found if word == "USER"] == ["1000:1000"]
        after = [word for word, _ in found[[word for word, _ in found].index("USER") :]]
        assert after == ["USER", "ENTRYPOINT", "CMD"], "nothing is made after the user has changed"


def kept(path: str) -> bool:
    """Whether .dockerignore lets a file of the project into the build: the last line that fits decides."""
    found = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        fits = pattern == "*" or path == pattern or path.startswith(f"{pattern}/")
        if pattern.startswith("**/"):
            fits = pattern.removeprefix("**/") in path.split("/")
        found = line.startswith("!") if fits else found
    return found


def test_what_is_copied_is_there_and_nothing_else_is():
    for word, rest in instructions():
        if word == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert source == "." or ((ROOT / source).is_file() and kept(source)), source
    lines = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False
    ).stdout.splitlines()
    folders = {path.split("/")[0] for path in lines if kept(path)} - {"docker"}
    if lines:
        readme = {"README.md", "LICENSE"}  # pyproject.toml names them
        assert folders == {"pipeline", "trainer", "tools", "constraints.txt", "pyproject.toml", *readme}
    for other in (".git/config", ".venv/bin/python", "demo/drawn/raw", "tests/conftest.py", "tools/__pycache__/a.pyc"):
        assert not kept(other), other


def test_pillow_simd_is_compiled_as_by_the_setup():
    setup, image = ((ROOT / path).read_text() for path in ("tools/setup.sh", "docker/Dockerfile"))
    options = re.findall(r"-C (\w+=enable)", setup)
    assert len(options) == 5
    assert re.findall(r"-C (\w+=enable)", image) == options
    for package in re.findall(r"packages\+=\(([\w -]+)\)", setup):
        for name in package.split():
            assert f" {name} " in image.replace("\n", " "), name


def test_no_secret_and_no_registry_is_in_any_file():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"(?i)index-url *=|trusted-host|(password|passwd|token|secret)\w* *=", text), path
        assert not re.search(r"https?://\w", text), path


def service(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"][name]
    return found


def test_compose_builds_with_the_one_and_trains_on_two_gpus_with_the_other():
    builder, trainer = service("builder"), service("trainer")
    for each, target in ((builder, "build"), (trainer, "train")):
        assert (DOCKER / each["build"]["context"] / each["build"]["dockerfile"]).samefile(DOCKER / "Dockerfile")
        assert each["build"]["target"] == target
        assert each["user"] == "${PENSTOCK_USER:-1000:1000}"
        assert each["init"], "python as process 1 would not be stopped while it starts"
        assert re.fullmatch(r"\d+m", each["stop_grace_period"]), "a stop has time to save"
    [gpus] = trainer["deploy"]["resources"]["reservations"]["devices"]
    assert gpus == {"driver": "nvidia", "count": 2, "capabilities": ["gpu"]}
    assert "deploy" not in builder
    shards = "${PENSTOCK_SHARDS:-shards}:/data"
    assert shards in builder["volumes"]
    assert f"{shards}:ro" in trainer["volumes"], "the trainer reads what the builder wrote, and writes elsewhere"
    volumes = yaml.safe_load((DOCKER / "compose.yaml").read_text())["volumes"]
    assert set(volumes) == {"shards", "runs"}


@pytest.mark.parametrize("command", ["builder", "trainer"])
def test_composes_commands_are_commands(command: str):
    words = service(command)["command"]
    given = (
        build_shards.make_context("build", words) if command == "builder" else train.make_context("train", words[1:])
    )
    if command == "builder":
        assert (given.params["raw"], given.params["dataset"]) == (Path("/raw"), Path("/data/imagenet-256"))
    else:
        assert words[0] == "train"
        assert given.params["data"] == Path("/data/imagenet-256")
        assert given.params["devices"] == "cuda:0,cuda:1"


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
    text = (DOCKER / "prove.sh").read_text()
    assert "--isolation" not in text or "chroot" in text
    assert max(map(len, text.splitlines())) <= 120

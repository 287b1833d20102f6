"""The README and the documents: their Python runs, their links lead to files, and their commands exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from conftest import ROOT, picture, saved
from penstock.__main__ import load
from pipeline.offline.sources import find_sources
from pipeline.online.endpoints import parse as addresses

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.proof
def test_python_blocks_run(dataset: Path, tmp_path: Path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    printed = []
    for block in blocks:
        code = block.replace("DATASET", str(dataset))
        assert code != block
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.splitlines())
    assert len(printed[0]) == 15  # the first shard: 16 images, of which one was skipped
    assert all("(256, 256, 3)" in line for line in printed[0])
    assert [line.split(" torch.Size")[0] for line in printed[1]] == ["0", "1", "2"]
    assert all("([41, 3, 224, 224])" in line and 0 < float(line.split()[-1]) < 20 for line in printed[1])


def test_pictures_with_labels_in_their_names_become_a_webdataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the Python of docs/building.md."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "building.md").read_text(), re.DOTALL)
    names = ("cat.0.jpg", "cat.1.jpg", "dog.0.jpg", "dog.10.jpg")
    files = {name: saved(picture(name, 40, 40), "JPEG") for name in names}
    (tmp_path / "PICTURES").mkdir()
    for name, data in files.items():
        (tmp_path / "PICTURES" / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    sources = find_sources(tmp_path / "SHARDS")
    assert {image.read(): (image.split, image.wnid) for image in sources.images} == {
        data: ("train", name[:3]) for name, data in files.items()
    }
    assert [record.wnid for record in sources.classes] == ["cat", "dog"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str):
    text = (ROOT / page).read_text()
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:pipeline|trainer|tools|tests|docs)/[\w./-]+)`", text)
    for name in linked + named:
        base = ROOT if name in named else (ROOT / page).parent
        assert (base / name).exists(), name
    assert "@" not in re.sub(r"\w@\w", "", text), "a placeholder is left"


def test_no_page_installs_another_distribution():
    folders = ("docs", "docker", "pipeline", "trainer", "tools", "penstock")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py", ".sh")]
    for path in [ROOT / "README.md", *paths]:
        wrong = re.search(r"penstock\[|pip install ['\"]?penstock(?!-imagenet)", path.read_text())
        assert not wrong, path


def parsed(image: str, words: list[str]) -> click.Context:
    """Return the arguments of the command that an image's entry point runs."""
    name, rest = ("build", words) if image in ("penstock-build", "builder") else (words[0], words[1:])
    return load(name).make_context(name, list(rest))


def test_commands_of_images_are_commands():
    """Those of docker/compose.yaml, and every `docker run` of the documents."""
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    assert parsed("builder", services["builder"]["command"]).params["dataset"] == "/data/imagenet-256"
    for trainer in ("trainer", "fed-trainer"):
        assert parsed(trainer, services[trainer]["command"]).params["data"] == Path("/data/imagenet-256")
    feeding = parsed("feed", services["feed"]["command"]).params
    workers = parsed("fed-trainer", services["fed-trainer"]["command"]).params["workers"]
    assert [(address.host, address.port) for address in addresses(workers)[1]] == [("feed", feeding["port"])]
    assert (feeding["root"], feeding["host"], services["feed"]["entrypoint"]) == ("/data", "0.0.0.0", ["penstock"])
    text = "".join((ROOT / page).read_text() for page in ("README.md", "docs/docker.md", "docs/service.md")).replace(
        "\\\n", " "
    )
    runs = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("docker run ")]
    assert runs
    for words in runs:
        image = next(word for word in words if word in ("penstock", "penstock-build"))
        rest = words[words.index(image) + 1 :]
        if rest[0] == "penstock":  # the first one was the entry point's
            parsed(image, rest[1:])
        elif "--entrypoint" in words:
            assert (ROOT / rest[0]).is_file()
        elif image == "penstock-build" or rest[0] == "train":
            parsed(image, rest)

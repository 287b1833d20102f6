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
from pipeline.service.site import Site

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


def parsed(words: list[str]) -> click.Context:
    """Return the arguments of a command of `penstock`, which may be a command of a group of its own."""
    command = load(words[0])
    while isinstance(command, click.Group):
        words = words[1:]
        found = command.get_command(click.Context(command), words[0])
        assert found, words
        command = found
    return command.make_context(words[0], words[1:])


def command_of(image: str, words: list[str]) -> list[str]:
    """Return the command of `penstock` that an image's entry point runs."""
    return ["build", *words] if image == "penstock-build" else words


def lines_of(*pages: str) -> list[list[str]]:
    """Return the words of each line of these pages, without comments."""
    text = "".join((ROOT / page).read_text() for page in pages).replace("\\\n", " ")
    return [
        shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(("docker run ", "penstock "))
    ]


def test_commands_of_images_are_commands():
    """Those of every `docker run` of the documents."""
    runs = [words for words in lines_of("README.md", "docs/docker.md", "docs/service.md") if words[0] == "docker"]
    assert len(runs) >= 6
    for words in runs:
        image = next(word for word in words if word in ("penstock", "penstock-build"))
        rest = words[words.index(image) + 1 :]
        if rest[0] == "penstock":  # the first one was the entry point's
            parsed(rest[1:])
        elif "--entrypoint" in words:
            assert (ROOT / rest[0]).is_file()
        elif image == "penstock-build" or rest[0] == "train":
            parsed(command_of(image, rest))


def test_commands_of_the_server_and_its_client_are_commands():
    lines = [words for words in lines_of("README.md", "docs/serve.md", "docs/service.md") if words[0] == "penstock"]
    assert len(lines) >= 20
    for words in lines:
        parsed(words[1:])


def test_compose_has_commands_around_one_folder():
    """Its services find each other's data sets, runs, ports and secrets."""
    text = (ROOT / "docker" / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    serve, feed, train = (parsed(services[name]["command"]).params for name in ("serve", "feed", "train"))
    folders = {
        name: [v for v in services[name]["volumes"] if isinstance(v, str)] for name in ("serve", "feed", "train")
    }
    assert {volume.removesuffix(":ro").rpartition(":")[2] for volumes in folders.values() for volume in volumes} == {
        "/data"
    }
    site = Site(serve["root"])
    assert (site.root, serve["host"], serve["raw_roots"]) == (Path("/data"), "0.0.0.0", ("/raw",))
    assert (Path(feed["root"]), feed["host"], train["data"].parent, train["run"].parent) == (
        *(site.datasets, "0.0.0.0", site.datasets, site.runs),
    )
    for name in ("serve", "train"):
        assert services[name]["environment"]["PENSTOCK_FEED_TOKEN_FILE"] == feed["token_file"]
    assert serve["feeds"] == (f"feed:{feed['port']}",)
    assert services["serve"]["ports"][0].endswith(f":{serve['port']}")
    assert f":{serve['port']}/healthz" in services["serve"]["healthcheck"]["test"][-1]
    assert serve["stop_jobs"]
    assert serve["grace"] < 600
    assert services["serve"]["stop_grace_period"] == "10m"
    written = [shlex.split(line[1:], comments=True) for line in text.splitlines() if line.startswith("#   ")]
    after = [words[words.index("--rm") + 2 :] for words in written if "--rm" in words]
    for words in filter(None, after):
        parsed(words)
    by_hand = next(words for words in after if "--feed" in words)
    assert by_hand[-1] == serve["feeds"][0]

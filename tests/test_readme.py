"""The README's Python runs, the documents' links lead to files, and the distribution has its name everywhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT


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


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str):
    text = (ROOT / page).read_text()
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:pipeline|trainer|tools|tests|docs)/[\w./-]+)`", text)
    for name in linked + named:
        base = ROOT if name in named else (ROOT / page).parent
        assert (base / name).exists(), name
    assert "@" not in re.sub(r"\w@\w", "", text), "a placeholder is left"


def test_nothing_says_to_install_the_distribution_of_somebody_else():
    folders = ("docs", "docker", "pipeline", "trainer", "tools", "penstock")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py", ".sh")]
    for path in [ROOT / "README.md", *paths]:
        wrong = re.search(r"penstock\[|pip install ['\"]?penstock(?!-imagenet)", path.read_text())
        assert not wrong, path

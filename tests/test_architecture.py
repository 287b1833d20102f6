"""Who may import whom (docs/architecture.md), and how long a file may be."""

import ast
from pathlib import Path

import pytest

from conftest import ROOT

LEAVES = {"pipeline.errors", "pipeline.files", "pipeline.cli", "pipeline.storage"}
ALLOWED = {  # module or package → what of ours it may import; a package may import itself
    "pipeline.errors": set(),
    "pipeline.storage": {"pipeline.errors"},
    "pipeline.files": {"pipeline.errors", "pipeline.storage"},
    "pipeline.cli": {"pipeline.errors", "pipeline.storage"},
    "pipeline.manifest": {"pipeline.errors", "pipeline.storage"},
    "pipeline.image": {"pipeline.errors", "pipeline.decoding", "pipeline.jpeg", "pipeline.tags"},
    "pipeline.offline": {"pipeline.manifest", "pipeline.image", *LEAVES},
    "pipeline.online": {"pipeline.manifest", *LEAVES},
    "trainer": {"pipeline.online", "pipeline.manifest", "pipeline.image", *LEAVES},
}
FOREIGN = {"pipeline.offline": {"torch", "nvidia"}, "pipeline.manifest": {"torch", "nvidia", "PIL", "click"}}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = str(node.module)
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "pipeline" else {module}
    return found


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("unit", ALLOWED)
def test_imports(unit: str):
    place = ROOT / unit.replace(".", "/")
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    for path in files:
        for module in imports(path):
            if within(module, {"pipeline", "trainer", "tools"}):
                assert within(module, ALLOWED[unit] | {unit}), f"{path.relative_to(ROOT)} imports {module}"
            assert not within(module, FOREIGN.get(unit, set())), f"{path.relative_to(ROOT)} imports {module}"


def test_files_hold_one_noun():
    files = [path for folder in ("pipeline", "trainer", "tools") for path in (ROOT / folder).rglob("*.py")]
    too_long = {str(path): n for path in files if (n := len(path.read_text().splitlines())) > 350}
    assert not too_long

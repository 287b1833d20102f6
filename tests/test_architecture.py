"""The rules of docs/architecture.md: imports, the size of a file and of the whole, the first words of docstrings."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

from conftest import ROOT

OWN = (
    "files",
    "volumes",
    "served",
    "stores",
    "storage",
    "process",
    "cluster",
    "typed",
    "cli",
    "manifest",
    "doubts",
    "archives",
    "decode",
    "image",
    "records",
    "tier",
)  # modules of pipeline itself
ALLOWED = {  # module or package → what of ours it may import, beside pipeline's errors and itself
    "pipeline.volumes": set(),
    "pipeline.served": {"typed"},
    "pipeline.stores": {"served"},
    "pipeline.storage": {"volumes", "stores"},
    "pipeline.files": {"storage", "volumes"},
    "pipeline.process": set(),
    "pipeline.cluster": {"process"},
    "pipeline.cli": {"storage", "volumes", "process"},
    "pipeline.typed": set(),
    "pipeline.manifest": {"storage", "volumes", "files", "typed"},
    "pipeline.doubts": {"cli", "manifest"},
    "pipeline.archives": {"storage", "files", "cli", "manifest"},
    "pipeline.decode": set(),
    "pipeline.image": {"decode", "manifest"},
    "pipeline.records": set(),
    "pipeline.tier": {"storage", "manifest", "typed", "records"},
    "pipeline.offline": set(OWN),
    "pipeline.online": set(OWN) - {"decode", "image"},
    "pipeline.service": {*OWN, "online"},
    "trainer": {*OWN, "online"},
}
FOREIGN = {"pipeline.offline": {"torch", "nvidia"}, "pipeline.manifest": {"torch", "nvidia", "PIL", "click"}}
LONGEST = 350  # lines of a module; past 300 it usually holds two nouns
NOUN_CLAUSES = r"(What|How|Whether|Which|Of|By|Where|Who|Whose|When|Why)\b"
FILES = sorted(path for folder in ("pipeline", "trainer", "tools") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports; of `from pipeline import x` both pipeline and pipeline.x."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("unit", ALLOWED)
def test_imports(unit: str):
    modules = {module_of(path) for path in FILES}
    allowed = {unit, *(f"pipeline.{name}" for name in ALLOWED[unit])}
    files = [path for path in FILES if within(module_of(path), {unit})]
    assert files
    for path in files:
        for module in imports(path):
            if module in modules and module != "pipeline":
                assert within(module, allowed), f"{path.relative_to(ROOT)} imports {module}"
            assert not within(module, FOREIGN.get(unit, set())), f"{path.relative_to(ROOT)} imports {module}"


def test_no_module_is_long():
    long = {module_of(path): n for path in FILES if (n := len(path.read_text().splitlines())) > LONGEST}
    assert not long


def test_no_module_is_half_of_its_only_importer():
    """`__init__` and `__main__` are no halves."""
    importers = defaultdict(set)
    for path in FILES:
        for module in imports(path):
            importers[module].add(module_of(path))
    halves = {
        module_of(path)
        for path in FILES
        if not path.name.startswith("__")
        if len(path.read_text().splitlines()) < 60 and len(importers[module_of(path)]) == 1
    }
    assert not halves


def test_the_house_stays_small():
    # of issue 17, how RAW is read: names, tree, classes, choice, published, labels, columns; of issue 18, what is
    # checked where it is loaded, and how programs end: typed, metadata, process, validation; of issue 19, decoding
    # workers: service, parts, partqueue, remote, connection, endpoints, cluster, and their benchmark
    # of issue 20, the control plane: jobs (site, database, kinds, queue, scheduler, child, progress, tokens, serve,
    # client, runs, curves), its API and pages (service/web), data sets over HTTP (stores, served), their benchmark
    # of issue 21, decoded pictures: records, tier, raw_tier (offline and tools), verify_tiers, tiers, supply, tuner,
    # yuv, kernel, and kernels to be measured on a GPU
    # of issue 22, claims tried in small: reproduce (experiment, crew, measure, command), figures.curves
    assert len(FILES) <= 169
    # 14,815, 16,925, 17,948, 20,406, 26,564 and 28,733 before these
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= 29_650
    assert len(TESTS) <= 122  # of issue 22, the reproduction: documented, test_reproduction, _experiments, _reproduce


def test_no_imports_go_in_circles():
    """A module that imports another is imported by none that the other imports, function bodies included."""
    modules = {module_of(path): imports(path) for path in FILES}
    imported = {name: {other for other in names if other in modules} - {name} for name, names in modules.items()}
    packages = {module_of(path) for path in FILES if path.name == "__init__.py"}
    while leaves := [name for name, others in imported.items() if not others - packages]:
        for leaf in leaves:
            del imported[leaf]
        imported = {name: others - {*leaves} for name, others in imported.items()}
    assert not imported


def test_no_test_imports_another():
    for path in TESTS:
        others = {module for module in imports(path) if module.startswith("test_")}
        assert not others, f"{path.name} imports {', '.join(others)}"


def test_docstrings_begin_with_a_verb_or_with_what_is_returned():
    """No noun clause opens one."""
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if re.match(NOUN_CLAUSES, text):
                    wrong.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert not wrong

"""Nothing happens at import: nothing is compiled, started, opened, or changed in the process."""

import ast
import json
import subprocess
import sys

from conftest import ROOT

FOLDERS = ("pipeline", "trainer", "tools")
PROBE = """
import importlib, json, os, sys, threading, warnings

root, foreign, ours = json.loads(sys.argv[1])
for name in foreign:  # what other people's packages do at import is not ours
    try:
        importlib.import_module(name)
    except ImportError:
        pass
import torch

events, watched = [], False
STARTS = ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "os.exec", "socket.connect")


def audit(event, arguments):
    if not watched:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path.startswith(root + os.sep) and not path.endswith(".py") and "__pycache__" not in path:
            events.append(f"opens {path}")
    if event in STARTS:
        events.append(event)


def state():
    return dict(os.environ), list(warnings.filters), threading.active_count(), os.getcwd()


sys.addaudithook(audit)
torch.compile = lambda *_, **__: events.append("compiles")
count = 0
for name in ours:
    before, watched = state(), True
    try:
        importlib.import_module(name)
        count += 1
    except ImportError as error:  # a program for another environment, whose packages are not installed here
        if error.name is None or error.name.split(".")[0] in ("pipeline", "trainer", "tools"):
            raise
        os.environ.clear()
        os.environ.update(before[0])
    watched = False
    if events or state() != before:
        print(name, *events, "" if state() == before else "changes the process")
    events.clear()
print(count, "imported")
"""


def modules() -> tuple[list[str], list[str]]:
    """The modules of others that ours import at any time, and ours."""
    foreign, ours = set(), []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__main__":  # which runs the program
            ours.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                foreign |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                foreign.add(str(node.module))
    return sorted(name for name in foreign if name.split(".")[0] not in FOLDERS), ours


def python(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    return done.stdout


def test_imports_do_nothing() -> None:
    foreign, ours = modules()
    assert "trainer.dropout" in ours
    *faults, count = python("-c", PROBE, json.dumps([str(ROOT), foreign, ours])).splitlines()
    assert faults == []
    assert int(count.split()[0]) > 0.8 * len(ours)


def test_dropout_does_not_import_the_compiler() -> None:
    assert python("-c", "import sys, trainer.dropout; print('torch._dynamo' in sys.modules)").split() == ["False"]

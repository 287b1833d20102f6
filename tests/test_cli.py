"""Commands that end before their time, text that a terminal may show, and the bar that only a terminal sees."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from conftest import ROOT
from pipeline.cli import printable

PROGRAM = """
import os, signal, sys, click
from pipeline import UserError
from pipeline.cli import Command, progress_bars
@click.command(cls=Command, interrupted="the same command goes on")
@click.argument("way")
def main(way):
    with progress_bars() as show:
        show("[rows]", 1, 2)
        show("[rows]", 2, 2)
    if way == "user":
        raise UserError("size=0: \\x1b too small")
    if way == "system":
        open("/nowhere/at all")
    if way == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
main()
"""


def run(way: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, way]
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, check=False, timeout=60, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("way", "code", "line"),
    [
        ("user", 2, "Error: size=0: \\x1b too small\n"),
        ("system", 2, "Error: /nowhere/at all: No such file or directory\n"),
        ("signal", 128 + signal.SIGTERM, "Error: terminated; the same command goes on\n"),
        ("none", 0, ""),
    ],
)
def test_every_end_is_one_line_and_an_exit_code(way: str, code: int, line: str):
    done = run(way, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", line)


def test_a_terminal_sees_the_bar():
    ours, theirs = pty.openpty()
    assert run("none", stderr=theirs).returncode == 0
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert "[rows]" in text
    assert "2/2" in text


def test_text_is_printable_and_short():
    assert printable("a\x1b[31m\u202e\udce9 ü") == r"a\x1b[31m\u202e\udce9 ü"
    assert printable("x" * 200, 120) == "x" * 117 + "..."
    assert printable("x" * 120, 120) == "x" * 120

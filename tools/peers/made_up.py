"""A made-up dataset directory of any size, for what depends on the number of pictures and shards alone."""

import subprocess
import sys
from pathlib import Path

from pipeline import UserError
from pipeline.manifest import Manifest, load
from tools.peers.datasets import inflated
from tools.peers.processes import ROOT

CLASSES, DRAWN = 10, 20  # pictures drawn of each class


def make_up(folder: Path, samples: int, shards: int) -> Manifest:
    """`folder`/dataset: drawn pictures, built by our own commands, repeated to so many samples and shards.

    Raises:
        UserError: more shards than samples, or a command of ours fails (a full disk).
    """
    if shards > samples:
        raise UserError(f"{shards:,} shards of {samples:,} samples; give as many samples as shards, or more")
    raw, built = folder / "raw", folder / "built"
    _run("make_raw.py", raw, "--classes", CLASSES, "--train", DRAWN, "--val", 1)
    _run("build_shards.py", raw, built, "--workers", 1)
    return inflated(load(built), samples, shards, folder / "dataset")


def _run(program: str, *words: object) -> None:
    command = [sys.executable, str(ROOT / "tools" / program), *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"tools/{program} failed: {(done.stderr.strip() or 'nothing on stderr').splitlines()[-1]}")

"""The entry point of the command `penstock`, under a name that no other distribution has.

On the Python package index, penstock is another distribution (a flow tracer). Installed into the same environment, it
may have replaced files of the package `penstock`, or stand before that package on sys.path.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

MARK = "penstock-imagenet"  # in the first line of our own penstock/__init__.py


def require_ours() -> None:
    """Raise ImportError where the package `penstock` belongs to another distribution. Imports nothing."""
    spec = find_spec("penstock")
    if spec and spec.origin and MARK in Path(spec.origin).read_text(encoding="utf-8", errors="replace"):
        return
    if spec and spec.origin:
        fault = f"{spec.origin}: belongs to another distribution called penstock, not to penstock-imagenet"
    else:
        fault = "the package penstock lacks its __init__.py, which another distribution called penstock has removed"
    raise ImportError(
        f"{fault}; run `pip uninstall penstock`, then install penstock-imagenet again (pip's --force-reinstall "
        "--no-deps), or give each an environment of its own"
    )


def main() -> None:
    """Run `penstock`; exit code 2 where the package is another distribution's."""
    try:
        require_ours()
    except ImportError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from pipeline import process

    process.begin()
    from penstock.__main__ import main as command

    command(prog_name="penstock")

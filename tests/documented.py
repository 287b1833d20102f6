"""Tables of a page in Markdown, the numbers in their cells, and the commands of a page."""

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from penstock.__main__ import load

NUMBER = r"(?<![\w.-])\d[\d,]*(?:\.\d+)?"  # not those of a name, such as conv1 or ILSVRC-2012


def rows(text: str, header: str) -> list[dict[str, str]]:
    """Return the rows of the table of a page whose first column is called `header`."""
    lines = text[text.index(f"| {header} |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def agree(text: str, values: Iterable[float], rounded: bool = False) -> bool:
    """Return True if the numbers in a text are these; `rounded`: to the decimals that are written."""
    written, values = [number.strip(",").replace(",", "") for number in re.findall(NUMBER, text)], list(values)
    decimals = [len(number.partition(".")[2]) for number in written]
    expected = [round(value, places) if rounded else value for value, places in zip(values, decimals)]
    return len(written) == len(values) and np.allclose(list(map(float, written)), expected, rtol=1e-9, atol=0)


def commands(text: str, variables: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """Return name and parameters of every command of the trainer and the builder, but those with "…" in them.

    Variables of the shell are replaced by their values. Raises click's errors where an option does not exist.
    """
    lines = re.findall(r"`python -m trainer ([^`…]*)`", text)
    lines += [f"build {line}" for line in re.findall(r"^python tools/build_shards.py (.*)$", text, re.MULTILINE)]
    result = []
    for line in lines:
        name, *words = shlex.split(re.sub(r"\$(\w+)", lambda match: variables[match[1]], line), comments=True)
        result.append((name, load(name).make_context(name, words).params))
    return result

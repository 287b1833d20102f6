"""What was measured, on what: lines for above the table, and the record of every run for a file."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.peers.contestants import Contestant
from tools.peers.environments import ENVIRONMENTS
from tools.peers.rounds import Entry, Figures
from tools.peers.table import rates

CORES = len(os.sched_getaffinity(0))


def machine() -> str:
    return f"{_processor()}, {CORES} cores; Python {platform.python_version()}, Linux {platform.release()}"


def versions(entries: Sequence[Entry]) -> str:
    """Of each contestant's packages; contestants of equal versions share a place."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        if entry.runs:
            text = ", ".join(f"{key} {value}" for key, value in entry.runs[0]["versions"].items())
            known = names.setdefault(text, [])
            known += [] if entry.contestant.name in known else [entry.contestant.name]
    return "; ".join(f"{', '.join(known)}: {text}" for text, known in names.items())


def waits(entries: Sequence[Entry]) -> list[str]:
    """What our own loader waited for in its first run: it has no other work, so the causes' shares tell the limit."""
    lines = []
    for entry in entries:
        seconds = entry.runs[0].get("waits", {}) if entry.runs else {}
        if whole := sum(seconds.values()):
            shares = ", ".join(f"{cause} {100 * part / whole:.0f} %" for cause, part in seconds.items())
            lines.append(f"{entry.contestant.name} waited, in its first run, for: {shares}")
    return lines


def record(measured: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    """For JSON: the machine, `measured`, the contestants, and every run."""
    return {
        "machine": machine_record(),
        **measured,
        "contestants": {entry.contestant.name: _described(entry.contestant) for entry in entries},
        "results": [_result(entry) for entry in entries],
    }


def machine_record() -> Figures:
    return {"processor": _processor(), "cores": CORES, "python": platform.python_version()}


def _described(contestant: Contestant) -> Figures:
    requirements = ENVIRONMENTS[contestant.environment].requirements if contestant.environment else ()
    return {"title": contestant.title, "does": contestant.does, "requirements": requirements}


def _result(entry: Entry) -> Figures:
    result: Figures = {"contestant": entry.contestant.name, "workers": entry.workers}
    if entry.not_run:
        return result | {"not_run": entry.not_run}
    return result | {"images_per_second": rates(entry), "runs": entry.runs}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()

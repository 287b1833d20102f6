"""What a GPU gains from the feed: decoding alone, our loader, the trainer's step in every precision, and both at once.

    python tools/gpu.py [DATASET] [--device cuda:0] [--seconds 3] [--json FILE] [--markdown]      (some 10 minutes)

Where Penstock is not installed: PYTHONPATH=FOLDER_OF_DALI:. python3 tools/gpu.py DATASET, with torch, numpy and DALI
alone. Without DATASET pictures are drawn, for which it takes all of Penstock's packages.
"""

import json
import platform
import shlex
import sys
import tempfile
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import nvidia.dali
import torch

from pipeline import UserError
from pipeline.manifest import Manifest
from tools.gpu_bench import CHECKED, CORES, PLANS, WITHIN, Bench
from tools.gpu_rows import REPETITIONS
from tools.peers.datasets import of_images
from tools.peers.made_up import make_up

BATCHES = 20  # of the largest size, in an epoch; so no batch is short
HEADER = ("part", "what", "batch", "images/s, median (min to max)", "of the ceiling", "host cores", "found")


def main(words: Sequence[str] | None = None) -> None:
    devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, usage=SUPPRESS)
    parser.add_argument("dataset", type=Path, nargs="?", metavar="DATASET", help="Default: drawn pictures.")
    parser.add_argument("--device", choices=(*devices, "cpu"), default=devices[0] if devices else None)
    parser.add_argument("--seconds", type=float, default=3.0, help="Of each row, after its warm-up. Default: 3.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Every row's figures to a file.")
    parser.add_argument("--markdown", action="store_true", help="The closing table as Markdown.")
    given = parser.parse_args(words)
    if not given.device:
        return print("no CUDA device; --device cpu runs the same, smaller")
    try:
        measure(given, shlex.join(["python", "tools/gpu.py", *(sys.argv[1:] if words is None else words)]))
    except (UserError, OSError) as error:
        parser.exit(2, f"Error: {error}\n")


def measure(given: Namespace, command: str) -> None:
    device = torch.device(given.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    samples = BATCHES * PLANS[device.type].batches[-1]
    with tempfile.TemporaryDirectory(prefix="penstock-gpu-") as folder:
        root = Path(folder)
        data = of_images(given.dataset, samples, root / "part") if given.dataset else make_up(root, samples, BATCHES)
        bench, facts = Bench(data, device, given.seconds), _facts(data, device, given.seconds, command)
        for row in bench.rows():
            print("  ".join(filter(None, row.cells())), flush=True)
            if given.json:
                record = {**facts, "repetitions": REPETITIONS, "rows": [asdict(row) for row in bench.done]}
                given.json.write_text(json.dumps(record, indent=1) + "\n")
    shown = [row.cells() for row in bench.done if row is bench.fastest(row.part, row.what, row.batch)]
    print_table(shown, list(facts.values()), given.markdown)


def _facts(data: Manifest, device: torch.device, seconds: float, command: str) -> dict[str, str]:
    lines, records = Path("/proc/cpuinfo").read_text().splitlines(), data.samples("train")
    host = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    packages = f"torch {torch.__version__}, DALI {nvidia.dali.__version__}, numpy {np.__version__}"
    return {
        "hardware": f"{gpu}{host}, {CORES} cores",
        "versions": f"Python {platform.python_version()}, {packages}",
        "command": command,
        "measured": f"n = {REPETITIONS} repetitions of {seconds / REPETITIONS:g} s or one batch, after a warm-up",
        "agrees": f"1: after {CHECKED} steps on one batch no layer's gradient is apart from the first fp32 row's by "
        f"{', '.join(f'{100 * bound:g} % ({precision})' for precision, bound in WITHIN.items())} or more",
        "pictures": f"{len(records):,}, {len(np.unique(records['crc32'])):,} distinct, warm in memory; "
        f"{records['size'].mean() / 1e3:.1f} kB on average",
    }


def print_table(rows: Sequence[tuple[str, ...]], facts: Sequence[str], markdown: bool) -> None:
    bullet, before, between, after = ("- ", "| ", " | ", " |") if markdown else ("", "", "  ", "")
    rows = [HEADER, *[("---",) * len(HEADER)] * markdown, *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [before + between.join(map(str.ljust, row, widths)) + after for row in rows]
    print("", *(bullet + fact for fact in facts), "", *map(str.rstrip, lines), sep="\n")


if __name__ == "__main__":
    main()

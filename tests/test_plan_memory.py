"""Memory of the plan of a very large build."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT

PROGRAM = """
import json, resource, sys
from pipeline.manifest import BuildRecipe, ClassRecord
from pipeline.offline.plan import make_plan
from pipeline.offline.raw import Sources
from pipeline.offline.raw import RawImage

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

images, synsets = int(sys.argv[1]), 21_841
before, sources, names = resident(), Sources("made up"), 0
for i in range(images):
    wnid = f"n{i % synsets:08d}"
    path = f"fall11_whole.tar/{wnid}.tar/{wnid}_{i // synsets}.JPEG"
    names += len(path)
    sources.images.append(RawImage("train", path, wnid, "/raw/fall11_whole.tar", 110_000 * i, 110_000))
sources.classes = tuple(ClassRecord(i, f"n{i:08d}", "made up", None) for i in range(synsets))
plan = make_plan(sources, BuildRecipe())
kept, peak = resident() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
print(json.dumps([(kept - names) / images, (peak - names) / images]))
"""


@pytest.mark.slow
def test_a_plan_takes_few_bytes_an_image():
    """Beside the paths themselves, in a process of its own. All of ImageNet has 14 million entries."""
    command = [sys.executable, "-c", PROGRAM, "1000000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    kept, peak = json.loads(done.stdout)
    assert 0 < kept < 72
    assert kept < peak < 85

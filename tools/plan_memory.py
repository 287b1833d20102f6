"""How much memory and time the plan of a very large build takes: made-up entries, as many as all of ImageNet has."""

import resource
import time
from pathlib import Path
from typing import Any

from pipeline.manifest import BuildRecipe, ClassRecord
from pipeline.offline.build import shard_tasks, slots
from pipeline.offline.plan import make_plan
from pipeline.offline.raw import RawImage, Sources

SYNSETS = 21_841


def plan_memory(images: int) -> dict[str, Any]:
    """Plan a build of made-up images in one tar of synset tars, and walk through its tasks.

    Returns:
        images; name_bytes, table, kept and peak (bytes an image: the paths' own; of the table with them; resident
        after the plan was made; and at most, names left out of the last two); seconds_table, seconds_plan,
        seconds_tasks.
    """
    before = _resident()
    started = time.perf_counter()
    sources = Sources("made up")
    names = 0
    for i in range(images):
        wnid = f"n{i % SYNSETS:08d}"
        path = f"fall11_whole.tar/{wnid}.tar/{wnid}_{i // SYNSETS}.JPEG"
        names += len(path)
        sources.images.append(RawImage("train", path, wnid, "/raw/fall11_whole.tar", 110_000 * i, 110_000))
    sources.classes = tuple(ClassRecord(i, f"n{i:08d}", "made up", None) for i in range(min(SYNSETS, images)))
    table, made = _resident() - before, time.perf_counter()
    plan = make_plan(sources, BuildRecipe())
    planned, kept = time.perf_counter(), _resident() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    tasks = [len(task.images) for task in shard_tasks(plan, Path("/dataset"), slots(plan))]
    assert sum(tasks) == images
    return {
        "images": images,
        "name_bytes": names / images,
        "table": table / images,
        "kept": (kept - names) / images,
        "peak": (peak - names) / images,
        "seconds_table": made - started,
        "seconds_plan": planned - made,
        "seconds_tasks": time.perf_counter() - planned,
    }


def _resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    print(plan_memory(14_200_000))

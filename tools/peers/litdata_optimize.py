"""LitData's optimize around the Pillow recipe."""

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from tools.peers.job import Job, Picture, Span, report
from tools.peers.pillow_recipe import stored_jpeg


def main() -> None:
    job = Job.from_command()
    starts = job.out / "starts"
    starts.mkdir(parents=True)
    own_folders(job.out)
    from litdata import optimize  # type: ignore[import-not-found,unused-ignore]  # reads the environment

    optimize(
        fn=partial(sample, starts=str(starts)),
        inputs=job.pictures(),
        output_dir=str(job.out / "chunks"),
        chunk_size=job.per_shard,
        num_workers=job.workers,
        verbose=False,
    )
    ended = time.monotonic()
    stored = sum(chunk["chunk_size"] for chunk in json.loads((job.out / "chunks" / "index.json").read_text())["chunks"])
    began = min(float(start.read_text()) for start in starts.iterdir())
    report(Span(stored, began, ended), "litdata", "pillow", "torch")


def sample(picture: Picture, starts: str) -> dict[str, Any]:
    start = Path(starts) / str(os.getpid())
    if not start.exists():
        start.write_text(str(time.monotonic()))
    return {"image": stored_jpeg(picture.path), "label": picture.label}


def own_folders(out: Path) -> None:
    """Keep what LitData copies below `out`: by default it takes folders in /tmp, which it empties."""
    for variable in ("DATA_OPTIMIZER_CACHE_FOLDER", "DATA_OPTIMIZER_DATA_CACHE_FOLDER"):
        folder = out / variable.lower()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(folder)


if __name__ == "__main__":
    main()

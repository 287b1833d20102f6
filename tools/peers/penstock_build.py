"""Ours: the command tools/build_shards.py itself, timed from its first shard's first byte to its end."""

import threading
import time
from pathlib import Path

from pipeline import manifest
from tools.build_shards import main as build_shards
from tools.peers.job import Job, Span, report


def main() -> None:
    job = Job.from_command()
    began: list[float] = []
    threading.Thread(target=_wait_for_shard, args=(job.out / "train", began), daemon=True).start()
    options = {"--workers": job.workers, "--samples-per-shard": job.per_shard, "--holdout": 0}
    words = [str(word) for option in options.items() for word in option]
    build_shards([str(job.folder), str(job.out), "--layout", "class-folders", *words], standalone_mode=False)
    ended = time.monotonic()
    assert began, "no shard appeared below train/"
    built = manifest.load(job.out).splits["train"]
    report(Span(built.samples, began[0], ended), "pillow-simd", "simplejpeg", "numpy")


def _wait_for_shard(folder: Path, began: list[float]) -> None:
    while not folder.exists():  # made together with the first shard's temporary file
        time.sleep(0.002)
    began.append(time.monotonic())


if __name__ == "__main__":
    main()

"""A loader's job and its result. Runs in every peer's environment: it imports the standard library alone."""

import json
import random
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tools.peers.job import Span, report

VIEW = 224  # pixels of a side of what is delivered


class Stored(NamedTuple):
    """One stored picture: where its JPEG lies in a shard."""

    shard: str
    offset: int
    size: int
    label: int

    def jpeg(self) -> bytes:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class LoadJob:
    """Deliver `batches` batches of `batch` training views of `dataset`, with as many threads or processes.

    `converted` is the contestant's own folder, that its converter makes.
    """

    dataset: Path
    converted: Path
    batch: int
    batches: int
    workers: int

    @classmethod
    def from_command(cls) -> "LoadJob":
        dataset, converted, *numbers = sys.argv[1:6]
        return cls(Path(dataset), Path(converted), *map(int, numbers))

    @property
    def warm_up(self) -> int:
        """Batches before the first that is timed: more than anyone prepares ahead."""
        return max(8, 4 * self.workers)

    @property
    def images(self) -> int:
        """What a run takes, with the warm-up and what is prepared ahead at its end."""
        return (self.warm_up + self.batches + 4 * self.workers) * self.batch

    def shards(self) -> list[str]:
        return sorted(str(path) for path in (self.dataset / "train").glob("*.tar"))

    def pictures(self) -> Iterator[Stored]:
        """Every training picture, in the order of the shards."""
        for shard in self.shards():
            with tarfile.open(shard) as archive:
                members = iter(archive)
                for jpeg, label in zip(members, members):  # 00.jpg, 00.cls, 01.jpg, …
                    text = archive.extractfile(label)
                    assert text is not None
                    assert (jpeg.name[-4:], label.name[-4:]) == (".jpg", ".cls")
                    yield Stored(shard, jpeg.offset_data, jpeg.size, int(text.read()))

    def mean_colour(self) -> list[float]:
        """RGB grey levels."""
        colour: list[float] = json.loads((self.dataset / "dataset.json").read_text())["statistics"]["mean_color"]
        return colour


def measure(job: LoadJob, batches: Iterator[Any], *packages: str, more: Callable[[], Any] = dict) -> None:
    """Take batches, which have `shape` and `dtype`, as fast as they come, and report those after the warm-up."""
    images, shapes = 0, set()
    for _ in islice(batches, job.warm_up):
        pass
    began = time.monotonic()
    for batch in islice(batches, job.batches):
        images += len(batch)
        shapes.add((*map(int, batch.shape[1:]), str(batch.dtype).removeprefix("torch.")))
    ended = time.monotonic()
    (shape,) = shapes  # batches of different shapes or types are not what was asked for
    report(Span(images, began, ended), *packages, gives=list(shape), **more())


def window(side: int) -> tuple[int, int, bool]:
    """(left, top, flip) of a random view of a picture of side × side pixels."""
    return random.randint(0, side - VIEW), random.randint(0, side - VIEW), random.random() < 0.5

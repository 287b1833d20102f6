"""One run of `build`: a contestant writes all pictures to a fresh folder."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import UserError
from tools.peers.pictures import Pictures
from tools.peers.processes import run_module
from tools.peers.rounds import Entry, Figures


@dataclass(frozen=True)
class Building:
    pictures: Pictures
    per_shard: int

    @classmethod
    def of(cls, pictures: Pictures, workers: Sequence[int]) -> "Building":
        """With four shards or more for each worker."""
        return cls(pictures, max(1, min(1000, pictures.images // (4 * max(workers)))))

    def run(self, entry: Entry) -> Figures:
        """The process's figures and "stored", bytes; the folder is deleted. Raises UserError where it ends ill."""
        images, contestant = self.pictures.images, entry.contestant
        out = self.pictures.folder.parent / "out"
        words = (self.pictures.folder, out, entry.workers, self.per_shard, *contestant.arguments)
        try:
            run = run_module(contestant.environment, contestant.module, words, entry.workers, images)
            if run["images"] != images:
                raise UserError(f"stored {run['images']:,} of {images:,} pictures")
            return run | {"stored": sum(path.stat().st_size for path in out.rglob("*") if path.is_file())}
        finally:
            shutil.rmtree(out, ignore_errors=True)

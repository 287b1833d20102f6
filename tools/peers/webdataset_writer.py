"""WebDataset's ShardWriter around the Pillow recipe: one writer in each process."""

from pathlib import Path

import webdataset

from tools.peers.job import Job, Picture, report, run_shares
from tools.peers.pillow_recipe import stored_jpeg


def main() -> None:
    report(run_shares(Job.from_command(), write), "webdataset", "pillow")


def write(pictures: list[Picture], out: Path, per_shard: int) -> int:
    with webdataset.ShardWriter(str(out / "%06d.tar"), maxcount=per_shard, verbose=0) as writer:
        for picture in pictures:
            writer.write({"__key__": picture.key, "jpg": stored_jpeg(picture.path), "cls": picture.label})
        return int(writer.total)


if __name__ == "__main__":
    main()

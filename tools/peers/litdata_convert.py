"""The stored JPEGs as they are, in LitData's chunks; repeated, where the dataset has fewer than a run takes."""

from itertools import cycle, islice
from typing import Any

from tools.peers.litdata_optimize import own_folders
from tools.peers.loadjob import LoadJob, Stored


def main() -> None:
    job = LoadJob.from_command()
    own_folders(job.converted)
    from litdata import optimize  # type: ignore[import-not-found,unused-ignore]  # reads the environment

    optimize(
        fn=sample,
        inputs=list(islice(cycle(job.pictures()), job.images)),
        output_dir=str(job.converted / "chunks"),
        chunk_size=max(1, min(1000, job.images // (4 * job.workers))),
        num_workers=job.workers,
        verbose=False,
    )


def sample(picture: Stored) -> dict[str, Any]:
    return {"image": picture.jpeg(), "label": picture.label}


if __name__ == "__main__":
    main()

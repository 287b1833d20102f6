"""DALI's own reader of WebDataset shards, as its documentation has it, into PyTorch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from tools.peers.loadjob import VIEW, LoadJob, measure


def main() -> None:
    job = LoadJob.from_command()
    measure(job, batches(job), "nvidia-dali-cuda130", "torch")


def batches(job: LoadJob) -> Iterator[torch.Tensor]:
    for (batch,) in DALIGenericIterator(build(job), ["images", "labels"], size=-1):  # without end
        yield batch["images"]


def build(job: LoadJob) -> Pipeline:
    pipeline = Pipeline(batch_size=job.batch, num_threads=job.workers, device_id=None, prefetch_queue_depth=2)
    with pipeline:
        read: Any = fn.readers.webdataset(
            paths=job.shards(),
            index_paths=[str(Path(shard).with_suffix(".idx")) for shard in job.shards()],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=1024,
            missing_component_behavior="error",
        )
        jpeg, label = read
        left: Any = fn.random.uniform(range=[0.0, 1.0])
        top: Any = fn.random.uniform(range=[0.0, 1.0])
        image = fn.decoders.image_crop(jpeg, crop=(VIEW, VIEW), crop_pos_x=left, crop_pos_y=top, device="cpu")
        view = fn.crop_mirror_normalize(
            image,
            mirror=fn.random.coin_flip(),
            mean=job.mean_colour(),
            std=[1.0] * 3,
            dtype=types.DALIDataType.FLOAT,
            output_layout="CHW",
        )
        pipeline.set_outputs(view, fn.pad(label))
    pipeline.build()
    return pipeline


if __name__ == "__main__":
    main()

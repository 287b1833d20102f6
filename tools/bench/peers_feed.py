"""Views from workers, ours and tf.data service's, run as `PYTHON peers_feed.py JOB`, JSON; workers are children."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tools.bench.peers_build import SIDE, Figures, Job, main
from tools.bench.peers_load import VIEW, stored_jpegs, take

SHUFFLED = 1024  # pictures in tf.data's shuffle buffer
LOOPBACK = "127.0.0.1"
Count = Callable[[], Figures]


def no_views() -> Figures:
    return {}


def line(child: "subprocess.Popen[str]") -> str:
    """Return the next line that a child prints; where it has ended instead, end as well: its error is the last one."""
    assert child.stdout
    return child.stdout.readline().strip() or sys.exit(1)


@contextmanager
def processes(job: Job, function: str, options: list[Figures]) -> Iterator[tuple[list[str], Count]]:
    """Run a function of this file, which calls `serve`, in a process for each of `options`.

    Yield the addresses, and a function that returns the processes' figures so far, added up. They end with their
    standard input, or at the latest with the session, which the benchmark ends.
    """
    streams: Figures = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    jobs = [json.dumps(asdict(replace(job, function=function, options=own))) for own in options]
    children = [subprocess.Popen([sys.executable, "-P", __file__, words], **streams) for words in jobs]

    def figures() -> Figures:
        for child in children:
            print(file=child.stdin, flush=True)
        total: Counter[str] = Counter()
        for child in children:
            total.update(json.loads(line(child)))
        return total

    yield [line(child) for child in children], figures
    for child in children:
        child.communicate()


def serve(address: str, views: Count = no_views) -> Figures:
    """Print the address, then for each line of standard input the processor seconds and views so far, to its end."""
    print(address, flush=True)
    for _ in sys.stdin:
        print(json.dumps({"workers_cpu": time.process_time(), **views()}), flush=True)
    return {}


def taken(job: Job, depth: int, batches: Iterator[Any], workers: Count, *packages: str) -> Figures:
    """Take batches as `take` does, after `depth` more; "cpu" is the processor seconds of this process alone."""
    for _ in islice(batches, depth):
        pass  # so many may have been made ready before the first that is timed
    return take(job, batches, *packages, count=lambda: {"cpu": time.process_time(), **workers()})


def options_of(job: Job) -> Figures:
    """Return the options of our loader that the rows share; no batch is short."""
    return {"batch_size": job.batch, "output": "uint8", "last": "drop", "depth": job.options["depth"]}


def local(job: Job) -> Figures:
    """Decode in threads of this process; random windows and flips of a permutation of the whole split; CRC-32."""
    from pipeline.online import Loader

    options = options_of(job) | {"threads": job.workers}
    with Loader(job.source, "train", **options) as loader:
        images = (batch.images for batch in loader)
        return taken(job, job.options["depth"], images, no_views, "simplejpeg", "torch", "numpy")


def feed(job: Job) -> Figures:
    """Take the views of `local` from so many workers on the same cores, over TCP, or over Unix sockets.

    Where they sleep, each worker has as many batches, so that the rows take as long.
    """
    from pipeline.online import Loader

    own: Figures = {"unix": False, "sleep": 0.0, **job.options}
    count, depth = own["feeds"], own["depth"]
    own["threads"] = max(1, job.workers // count)
    job = replace(job, batches=job.batches * (count if own["sleep"] else 1))
    places = [f"grpc+unix://{job.out}-{i}" if own["unix"] else f"grpc://{LOOPBACK}:0" for i in range(count)]
    with (
        processes(job, "worker", [{**own, "location": place} for place in places]) as (workers, figures),
        Loader(job.source, "train", workers=workers, **options_of(job)) as loader,
    ):
        images = (batch.images for batch in loader)
        return taken(job, depth, images, figures, "simplejpeg", "pyarrow", "torch", "numpy")


def worker(job: Job) -> Figures:
    """Serve as `python -m pipeline.service feed` does; where `sleep` (s a view) is not 0, views that are no picture.

    Such a worker sleeps as long as one core would decode, one part after another.
    """
    import numpy as np

    from pipeline import manifest
    from pipeline.online.parts import Answer, Request
    from pipeline.service.worker import Server, Worker

    seconds, location = job.options["sleep"], job.options["location"]
    turn, blank = threading.Lock(), np.zeros((job.batch, VIEW, VIEW, 3), np.uint8)
    labels = manifest.load(job.source).samples("train")["label"].astype(np.int64)
    sizes: list[int] = []  # of the parts that were answered

    class Measured(Worker):
        def answer(self, request: Request) -> Answer:
            size = len(request.ids)
            if seconds and size:
                with turn:
                    time.sleep(seconds * size)
                ids = np.array(request.ids)
                answer = Answer(blank[:size], ids, labels[ids], {})
            else:
                answer = super().answer(request)
            sizes.append(size)
            return answer

    with Measured(Path(job.source).parent, job.options["threads"]) as own, Server(own, location) as server:
        address = location if job.options["unix"] else f"{location.removesuffix('0')}{server.port}"
        return serve(address, lambda: {"workers_views": sum(sizes)})


def tf_data(job: Job) -> Figures:
    """Cut random windows and flips by tf.data, and batch them, in its service's workers; a shuffle buffer of 1,024.

    Every worker goes through all pictures in an order of its own. No CRC-32 but that of TFRecord; uncompressed.
    """
    import tensorflow as tf  # type: ignore[import-not-found,import-untyped,unused-ignore]

    pictures = f"{job.out}.tfrecord"
    if not Path(pictures).exists():
        with tf.io.TFRecordWriter(pictures) as writer:
            for jpeg in stored_jpegs(job.source):
                writer.write(jpeg)

    def view(jpeg: Any) -> Any:
        start = tf.random.uniform([2], 0, SIDE - VIEW + 1, tf.int32)
        window, method = tf.concat([start, [VIEW, VIEW]], 0), "INTEGER_ACCURATE"
        return tf.image.random_flip_left_right(tf.image.decode_and_crop_jpeg(jpeg, window, 3, dct_method=method))

    auto, service = tf.data.AUTOTUNE, tf.data.experimental.service
    jpegs = tf.data.TFRecordDataset(pictures).shuffle(SHUFFLED).repeat()
    views = jpegs.map(view, auto, deterministic=False).batch(job.batch, drop_remainder=True).prefetch(auto)
    with (
        processes(job, "tf_dispatcher", [{}]) as ((dispatcher,), _),
        processes(job, "tf_worker", [{"dispatcher": dispatcher}] * job.options["feeds"]) as (_, figures),
    ):
        mode = service.ShardingPolicy.OFF
        shared = views.apply(service.distribute(mode, f"grpc://{dispatcher}", compression=None)).prefetch(auto)
        return taken(job, job.options["depth"], shared.as_numpy_iterator(), figures, "tensorflow-cpu", "numpy")


def tf_dispatcher(job: Job) -> Figures:
    """Serve as the dispatcher of tf.data service."""
    import tensorflow as tf  # type: ignore[import-not-found,import-untyped,unused-ignore]

    service = tf.data.experimental.service
    server = service.DispatchServer(service.DispatcherConfig(port=0))
    return serve(server.target.partition("//")[2])


def tf_worker(job: Job) -> Figures:
    """Serve as a worker of tf.data service."""
    import tensorflow as tf  # type: ignore[import-not-found,import-untyped,unused-ignore]

    service = tf.data.experimental.service
    server = service.WorkerServer(service.WorkerConfig(dispatcher_address=job.options["dispatcher"]))
    return serve(f"a {type(server).__name__}, whose address the dispatcher knows")


if __name__ == "__main__":
    main(globals())

"""The loader: types of its output, the fused normalisation, its threads, interruptions, impossible options."""

import shutil
import threading
import time
from concurrent.futures import Future
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import UserError
from pipeline.online import Loader, augment
from pipeline.online.normalise import Normaliser, fused, normalise, normalise_aligned


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_smaller_floats_are_rounded_once(dataset: Path, name: str):
    with Loader(dataset, batch_size=8) as loader, Loader(dataset, batch_size=8, output=name) as smaller:
        for one, other in islice(zip(loader, smaller), 3):
            assert other.images.dtype == getattr(torch, name)
            assert torch.equal(one.images.to(other.images.dtype), other.images)


def test_normalise_against_its_reference():
    """The function that a GPU runs as one kernel, here without a compiler."""
    random = np.random.default_rng(0)
    view = random.integers(0, 256, (3, 224, 224, 3)).astype(np.uint8)
    whole = random.normal(size=(256, 256, 3)).astype(np.float32)
    offset, std = (random.normal(120, 9, (3, 3)).astype(np.float32) for _ in range(2))
    start, flip = random.integers(0, 33, (3, 2)).astype(np.int32), np.array([0, 1, 1], np.int32)
    tensors = [torch.from_numpy(array) for array in (view, offset, std)]
    for rest in (None, whole[:224, :224]):
        found = normalise(*tensors, None if rest is None else torch.from_numpy(rest), torch.float32)
        for i in range(3):
            assert (found[i].numpy() == augment.reference_normalise(view[i], offset[i], std[i], rest)).all()
    more = [torch.from_numpy(array) for array in (start, flip)]
    found = normalise_aligned(*tensors, torch.from_numpy(whole), torch.float32, *more)
    for i in range(3):
        rest = augment.reference_view(whole, *start[i], bool(flip[i]))
        assert (found[i].numpy() == augment.reference_normalise(view[i], offset[i], std[i], rest)).all()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, for what torch makes of it on a CPU")
@pytest.mark.proof  # compiles
def test_normalise_compiles_to_one_kernel():
    """As on a GPU: one kernel, the same values, whatever the batch size."""
    from torch._inductor import config, metrics

    view = torch.randint(0, 256, (8, 224, 224, 3), dtype=torch.uint8)
    offset, std = torch.rand(8, 3) * 200, torch.rand(8, 3) + 1
    windows = torch.randint(0, 33, (8, 2), dtype=torch.int32), torch.tensor([0, 1] * 4, dtype=torch.int32)
    with config.patch(force_disable_caches=True):
        for function, size, more in ((normalise, 224, ()), (normalise_aligned, 256, windows)):
            rest = torch.rand(size, size, 3)
            for n, kernels in ((8, 1), (5, 0)):
                metrics.reset()
                given = [each[:n].clone() for each in (view, offset, std)] + [rest, torch.float32]
                given += [each[:n].clone() for each in more]
                found = fused(function)(*given)
                assert metrics.generated_kernel_count == kernels
                torch.testing.assert_close(found, function(*given), rtol=0, atol=1e-4)  # it may join two roundings


def test_closing_ends_the_threads(dataset: Path):
    def tasks() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    before, counted = {thread.name for thread in threading.enumerate()}, tasks()
    with Loader(dataset, batch_size=16, readers=2, threads=5) as loader:
        next(loader)
        assert {thread.name.split("_")[0] for thread in threading.enumerate()} > {"penstock-read", "penstock-decode"}
        assert tasks() > counted + 5
    assert {thread.name for thread in threading.enumerate()} <= before
    deadline = time.monotonic() + 5  # the system ends a thread a little after Python does
    while tasks() > counted + 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(loader)


def test_what_interrupts_the_consumer_costs_no_batch(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    """A signal while it waits; no room for the images on the device."""
    with Loader(dataset, batch_size=8) as loader:
        next(loader)
        for owner, name in ((Future, "result"), (Normaliser, "images")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    next(loader)
            assert loader.state_dict()["step"] == 1
        assert next(loader).step == 1


def test_impossible_loaders(dataset: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no split named 'other'; there are: train, val"):
        Loader(dataset, "other")
    with pytest.raises(UserError, match="no such directory"):
        Loader(tmp_path / "nothing")
    for options, words in (
        ({"depth": 0}, "depth=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"rank": 2, "ranks": 2}, "rank=2: must be between 0 and ranks − 1 = 1"),
        ({"recipe": "resnet"}, "recipe='resnet': must be one of alexnet, imagenet"),
        ({"output": "int8"}, "output='int8': must be one of float32, bfloat16, float16, uint8"),
        ({"feed": "half"}, "feed='half': must be one of split, replicate"),
        ({"views": "ten", "max_bad": 1}, "max_bad=1: is for training"),
        ({"step": -1}, "step=-1: must be at least 0"),
        ({"max_bad": -1}, "max_bad=-1: must be at least 0"),
        ({"threads": 0}, "threads=0: must be at least 1"),
        ({"hardware_share": 3}, "hardware_share=3: must be between 0 and 1"),
        ({"meen": "colour"}, "meen='colour': no such option; this recipe has views, mean, lighting, "),
        ({"recipe": "imagenet", "crop_chunk": 2}, "crop_chunk=2: no such option; this recipe has views"),
        ({"device": "gpu"}, "device='gpu': not a device; name cpu or cuda:N"),
        ({"device": "meta"}, "device='meta': is not supported"),
        ({"device": "cuda:99"}, r"device='cuda:99': .*(CUDA|--gpus all).*, or name cpu"),
        ({"device": ()}, r"device=\(\): name GPUs, or the CPU, at least one and not both"),
    ):
        with pytest.raises(UserError, match=words):
            Loader(dataset, **options)  # type: ignore[arg-type]

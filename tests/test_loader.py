"""The same batches whatever the threads and ranks; a state goes on where it was taken; wrong options are refused."""

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

CPUS = ("cpu:0", "cpu:1")  # two devices by name


def batches(dataset: Path, first: int = 0, until: int = 8, **options: object) -> list[torch.Tensor]:
    with Loader(dataset, batch_size=16, step=first, **options) as loader:  # type: ignore[arg-type]
        return [batch.images.clone() for batch in islice(loader, until - first)]


def test_the_same_step_has_the_same_bits(dataset: Path):
    """Whatever the threads, readers, depth, devices, and the step to begin with."""
    whole = batches(dataset, threads=1, depth=1)
    for options in (
        {"threads": 2, "depth": 3, "readers": 3},
        {"threads": 4, "depth": 5},
        {"device": CPUS},
        {"device": CPUS, "feed": "replicate"},
    ):
        assert all(torch.equal(*pair) for pair in zip(whole, batches(dataset, **options), strict=True))
    for first in (1, 3, 5):
        assert all(torch.equal(*pair) for pair in zip(whole[first:], batches(dataset, first), strict=True))


@pytest.mark.parametrize(("ranks", "order"), [(2, "uniform"), (3, "shards"), (8, "fixed")])
def test_ranks_have_the_batches_of_one(dataset: Path, ranks: int, order: str):
    """41 samples in batches of 8: the last of an epoch has one sample, and ranks without any."""
    options = {"batch_size": 8, "order": order, "crop_chunk": 3}
    with Loader(dataset, **options) as loader:  # type: ignore[arg-type]
        whole = list(islice(loader, 13))
    parts = []
    for rank in range(ranks):
        with Loader(dataset, rank=rank, ranks=ranks, **options) as loader:  # type: ignore[arg-type]
            parts.append(list(islice(loader, 13)))
    for one, *theirs in zip(whole, *parts, strict=True):
        assert torch.equal(one.images, torch.cat([each.images for each in theirs]))
        assert torch.equal(one.labels, torch.cat([each.labels for each in theirs]))
        assert np.concatenate([each.ids for each in theirs]).tolist() == one.ids.tolist()
        assert [each.position for each in theirs] == np.cumsum([0, *(len(each.ids) for each in theirs[:-1])]).tolist()
        assert {each.global_size for each in theirs} == {len(one.ids)}
        assert {each.step for each in theirs} == {one.step}
        sizes = [len(each.images) for each in theirs]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("steps", [0, 4])
def test_a_state_goes_on_where_it_was_taken(dataset: Path, steps: int):
    """In the same loader, in a new one, and with another number of ranks."""
    with Loader(dataset, batch_size=8) as loader:
        before = list(islice(loader, steps))
        state = loader.state_dict()
        after = [batch.images.clone() for batch in islice(loader, 4)]
        loader.load_state_dict(state)
        again = list(islice(loader, 4))
    assert len(before) == steps
    assert [batch.step for batch in again] == list(range(steps, steps + 4))
    assert all(torch.equal(batch.images, images) for batch, images in zip(again, after))
    parts = []
    for rank in range(3):
        with Loader(dataset, batch_size=8, rank=rank, ranks=3, threads=1) as loader:
            loader.load_state_dict(state)
            parts.append([batch.images.clone() for batch in islice(loader, 4)])
    assert all(torch.equal(images, torch.cat(each)) for images, *each in zip(after, *parts))


def test_a_state_of_another_loader_is_refused(dataset: Path):
    with Loader(dataset, batch_size=8) as loader:
        state = loader.state_dict()
    for options, words in (
        ({"seed": 5}, "seed: 2012 there, 5 here"),
        ({"positions": "centre", "flips": False}, "positions: 'code' there, 'centre' here; flips: True there, False"),
        ({"order": "shards"}, "order: 'uniform' there, 'shards' here; window: None there"),
        ({"recipe": "imagenet"}, "recipe: 'alexnet' there, 'imagenet' here"),
    ):
        with Loader(dataset, **{"batch_size": 8, **options}) as loader:  # type: ignore[arg-type]
            with pytest.raises(UserError, match=words):
                loader.load_state_dict(state)
            assert len(next(loader).ids) == loader.order.batch_size  # and goes on as it was
    with Loader(dataset, batch_size=8) as loader:
        loader.load_state_dict({key: value for key, value in state.items() if key != "flips"})  # of 2026-11
        with pytest.raises(UserError, match="flips: False there, True here"):
            loader.load_state_dict(state | {"flips": False})
        with pytest.raises(UserError, match="dataset: '0f"):
            loader.load_state_dict(state | {"dataset": "0f"})
        for step in (None, -1, 2**70):
            with pytest.raises(UserError, match=f"of another loader .step {step!r}"):
                loader.load_state_dict(state | {"step": step})
        assert next(loader).step == 0


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
    more = [torch.from_numpy(array) for array in (start, flip)]
    plain = normalise(*tensors, None, torch.float32)
    centre = normalise(*tensors, torch.from_numpy(whole[:224, :224]), torch.float32)
    aligned = normalise_aligned(*tensors, torch.from_numpy(whole), torch.float32, *more)
    for i in range(3):
        own = augment.reference_view(whole, *start[i], bool(flip[i]))
        for actual, rest in ((plain, None), (centre, whole[:224, :224]), (aligned, own)):
            assert (actual[i].numpy() == augment.reference_normalise(view[i], offset[i], std[i], rest)).all()


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


@pytest.mark.parametrize(
    ("options", "length"),
    [({}, 3), ({"last": "drop"}, 2), ({"step": 2, "rank": 1, "ranks": 3}, 3), ({"views": "centre"}, 3)],
)
def test_the_length_is_that_of_an_epoch(dataset: Path, options: dict, length: int):
    """41 samples in global batches of 16; evaluation ends after them, training goes on."""
    with Loader(dataset, batch_size=16, **options) as loader:
        assert len(loader) == loader.steps_per_epoch == length
        batches = list(islice(loader, 5))
    assert len(batches) == (length if options.get("views") else 5)
    assert [batch.epoch for batch in batches] == [batch.step // length for batch in batches]


def test_impossible_loaders(dataset: Path):
    with pytest.raises(UserError, match="no split named 'other'; there are: train, val"):
        Loader(dataset, "other")
    for options, words in (
        ({"depth": 0}, "depth=0: must be at least 1"),
        ({"depth": 10**9}, "depth=1000000000: must be at most 1024"),
        ({"rank": 2, "ranks": 2}, "rank=2: must be between 0 and ranks − 1 = 1"),
        ({"recipe": "resnet"}, "recipe='resnet': must be one of alexnet, imagenet"),
        ({"hardware_share": 3}, "hardware_share=3: must be between 0 and 1"),
        ({"meen": "colour"}, "meen='colour': no such option; this recipe has views, mean, lighting, "),
        ({"device": "gpu"}, "device='gpu': not a device; name cpu or cuda:N"),
        ({"device": "meta"}, "device='meta': is not supported"),
        ({"device": "cuda:99"}, r"device='cuda:99': .*(CUDA|--gpus all).*, or name cpu"),
        ({"device": ()}, r"device=\(\): name GPUs, or the CPU, at least one and not both"),
    ):
        with pytest.raises(UserError, match=words):
            Loader(dataset, **options)  # type: ignore[arg-type]

"""Batches against numpy and Pillow, bit for bit: every option, any ranks, threads, devices; exact resume."""

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import UserError, manifest
from pipeline.manifest import Manifest
from pipeline.online import Batch, Loader, augment
from pipeline.online.normalise import Normaliser, fused, normalise, normalise_aligned
from pipeline.online.samples import SampleReader
from reference import jpeg_pixels

CPUS = ("cpu:0", "cpu:1")  # two devices by name: two graphs, each with its part of a batch


def expected(built: Manifest, batch: Batch, seed: int, options: dict) -> Iterator[np.ndarray]:
    """What the 2012 network sees of each sample, (3, 224, 224) float64, by the formulas of the specification.

    Training: (crop, flipped or not, − mean + lighting) / 1.1; `options` as in `augment.Transform`.
    """
    statistics, chunk = built.statistics(), options.get("crop_chunk", 1)
    places = 33 if options.get("positions", "code") == "code" else 32
    lighting = options.get("lighting", "code")
    lit = lighting != "off" and batch.step < options.get("lighting_until", 10**9)
    shrink = options.get("shrink", lighting == "code") and lit
    draws = augment.draw(seed, batch.epoch, batch.ids, places)
    mean = statistics.mean_image
    with SampleReader(built, "train") as reader:
        for i, data in enumerate(reader.read(batch.ids)):
            head = i // chunk * chunk
            (top, left), flip = draws.crop[head], draws.flip[head]
            view = jpeg_pixels(data.tobytes())[top : top + 224, left : left + 224].astype(np.float64)
            own = mean[top : top + 224, left : left + 224]
            view, own = (view[:, ::-1], own[:, ::-1]) if flip else (view, own)
            kind = options.get("mean", "centre")
            view = view - {"centre": mean[16:240, 16:240], "aligned": own, "colour": statistics.mean_color}[kind]
            if lit:
                deviations = np.sqrt(statistics.eigenvalues) if lighting == "code" else statistics.eigenvalues / 255
                view = view + statistics.eigenvectors @ (0.1 * draws.normals[i] * deviations)
            yield (view / 1.1 if shrink else view).transpose(2, 0, 1)


OPTIONS = [
    {},
    {"mean": "aligned"},
    {"mean": "colour"},
    {"lighting": "paper"},
    {"lighting": "off"},
    {"shrink": False},
    {"lighting": "paper", "shrink": True, "mean": "aligned"},
    {"positions": "paper"},
    {"crop_chunk": 32},
    {"crop_chunk": 3, "mean": "aligned"},
    {"lighting_until": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("device", ["cpu", CPUS])
def test_training_batches_equal_pillow_and_numpy(dataset: Path, options: dict, device: str | tuple[str, str]):
    """Within float32's rounding of the formula in float64, and bit for bit of `augment.reference`."""
    built = manifest.load(dataset)
    recipe = augment.AlexNet(augment.Transform(**options), built.statistics(), 256, 3)
    seen = []
    with (
        Loader(built, batch_size=8, seed=3, device=device, **options) as loader,
        SampleReader(built, "train") as reader,
    ):
        for batch in islice(loader, 7):  # an epoch, whose last batch is short, and one more
            seen.append(len(batch.ids))
            assert batch.labels.tolist() == built.samples("train")["label"][batch.ids].tolist()
            for x, known in zip(batch.images.numpy(), expected(built, batch, 3, options), strict=True):
                np.testing.assert_allclose(x, known, atol=1e-4)
            heads = batch.ids[np.arange(len(batch.ids)) // recipe.options.crop_chunk * recipe.options.crop_chunk]
            crops = recipe.crops(batch.step, batch.epoch, batch.ids, heads, np.empty((len(batch.ids), 2)))
            for i, data in enumerate(reader.read(batch.ids)):
                pixels, rest = jpeg_pixels(data.tobytes()), recipe.mean_deviations.get(recipe.divisor(batch.step))
                bits = augment.reference(pixels, crops, i, rest, recipe.aligned)
                assert all((images[i].numpy() == bits).all() for images in batch.replicas)
    assert seen == [8, 8, 8, 8, 8, 1, 8]


@pytest.mark.parametrize("mean", ["centre", "aligned", "colour"])
def test_centre_and_ten_views_equal_numpy(dataset: Path, mean: str):
    built = manifest.load(dataset)
    statistics = built.statistics()
    levels = statistics.mean_color if mean == "colour" else statistics.mean_image
    with SampleReader(built, "val") as reader:
        pictures = [jpeg_pixels(data.tobytes()).astype(np.float64) for data in reader.read(np.arange(9))]
    corners = [(0, 0), (0, 32), (16, 16), (32, 0), (32, 32)]
    ten = [(top, left, flip) for flip in (1, -1) for top, left in corners]
    for views, places in (("centre", [(16, 16, 1)]), ("ten", ten)):
        with Loader(dataset, "val", batch_size=4, views=views, mean=mean) as loader:
            batches = list(loader)
            assert list(loader) == []  # it is over
        assert [batch.ids.tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
        images = torch.cat([batch.images for batch in batches]).reshape(9, len(places), 3, 224, 224).numpy()
        for picture, found in zip(pictures, images):
            for (top, left, flip), image in zip(places, found):
                inside = (slice(top, top + 224), slice(left, left + 224))
                middle = levels[16:240, 16:240] if mean == "centre" else levels
                own = levels[inside][:, ::flip] if mean == "aligned" else middle
                np.testing.assert_allclose(image, (picture[inside][:, ::flip] - own).transpose(2, 0, 1), atol=1e-4)


def test_uint8_views_are_those_of_the_pictures(dataset: Path):
    built = manifest.load(dataset)
    with Loader(built, batch_size=8, seed=3, output="uint8") as loader, SampleReader(built, "train") as reader:
        for batch in islice(loader, 7):
            draws = augment.draw(3, batch.epoch, batch.ids, 33)
            for i, data in enumerate(reader.read(batch.ids)):
                view = augment.reference_view(jpeg_pixels(data.tobytes()), *draws.crop[i], bool(draws.flip[i]))
                assert (batch.images[i].numpy() == view.transpose(2, 0, 1)).all()


def test_ten_uint8_views(dataset: Path):
    with Loader(dataset, "val", batch_size=9, views="ten", output="uint8") as loader:
        (found,) = [batch.images.numpy() for batch in loader]
    with SampleReader(manifest.load(dataset), "val") as reader:
        pictures = [jpeg_pixels(data.tobytes()) for data in reader.read(np.arange(9))]
    assert found.shape == (9, 10, 3, 224, 224)
    for picture, views in zip(pictures, found):
        for (top, left, flip), view in zip(augment.ten_views(256), views):
            assert (view == augment.reference_view(picture, top, left, flip).transpose(2, 0, 1)).all()


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

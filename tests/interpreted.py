"""The kernel of `pipeline.online.kernel` in Triton's interpreter, on the CPU: a program, for it takes a variable."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from itertools import product

import numpy as np
import torch
from torch import Tensor

from pipeline.manifest import Statistics
from pipeline.online import kernel, yuv
from pipeline.online.augment import AlexNet, ViewOptions
from pipeline.online.batch import Batch
from pipeline.online.normalise import Normaliser, normalise, normalise_aligned
from pipeline.records import KINDS, record_bytes

SIZES = ((16, 16, 0), (33, 28, 1), (40, 35, 4))  # of pictures and views, and their number


def random(kind: str, size: int, n: int, rng: np.random.Generator) -> Tensor:
    """Return records whose colours are as often out of range as not."""
    length = size * size * 3 if kind == "pixels" else record_bytes(kind, size)
    noise = rng.integers(0, 256, (n, length), dtype=np.uint8)
    extreme = rng.choice(np.array([0, 255], np.uint8), (n, length))
    return torch.from_numpy(np.where(rng.random((n, 1)) < 0.5, noise, extreme))


def main() -> None:
    rng, checked = np.random.default_rng(3), 0
    for (size, side, n), kind in product(SIZES, (*KINDS, "pixels")):
        records = random(kind, size, n, rng)
        start = torch.from_numpy(rng.integers(0, size - side + 1, (n, 2)).astype(np.int32))
        flip = torch.from_numpy(rng.integers(0, 2, n).astype(np.int32))
        offset = torch.from_numpy(rng.normal(120, 20, (n, 3)).astype(np.float32))
        std = torch.from_numpy(rng.uniform(0.5, 60, (n, 3)).astype(np.float32))
        cut = yuv.cut(records, kind, size, start, flip, side)
        crops = records, kind, size, start, flip, side
        actual = kernel.views(*crops, None, None, None, False, torch.uint8)
        assert torch.equal(actual, cut.permute(0, 3, 1, 2)), (kind, size, "uint8")
        view = torch.from_numpy(rng.normal(0, 40, (side, side, 3)).astype(np.float32))
        picture = torch.from_numpy(rng.normal(0, 40, (size, size, 3)).astype(np.float32))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = {
                (None, False): normalise(cut, offset, std, None, dtype),
                (view, False): normalise(cut, offset, std, view, dtype),
                (picture, True): normalise_aligned(cut, offset, std, picture, dtype, start, flip),
            }
            for (deviation, aligned), images in expected.items():
                actual = kernel.views(*crops, offset, std, deviation, aligned, dtype)
                assert actual.dtype == dtype
                assert actual.shape == images.shape
                assert actual.permute(0, 2, 3, 1).is_contiguous()
                if dtype == torch.bfloat16:  # the interpreter does not round to it, but cuts off
                    exact = normalise_aligned if aligned else normalise
                    images = exact(cut, offset, std, deviation, torch.float32, *((start, flip) if aligned else ()))
                    images = images.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32).to(dtype)
                assert torch.equal(actual, images), (kind, size, dtype, aligned)
                checked += actual.numel()
    beyond_two_gigabytes()
    batches_as_on_a_gpu()
    print(checked)


def beyond_two_gigabytes() -> None:
    """Compare records so far apart that their positions need more than 32 bits; what lies between is never touched."""
    size, step = 16, 2**30 + 16
    near = random("rgb", size, 3, np.random.default_rng(4))
    far = torch.empty(2 * step + near.shape[1], dtype=torch.uint8).as_strided(near.shape, (step, 1))
    far.copy_(near)
    zeros = torch.zeros((3, 2), dtype=torch.int32)
    crops = "rgb", size, zeros, zeros[:, 0].contiguous(), size
    actual = kernel.views(far, *crops, None, None, None, False, torch.uint8)
    assert torch.equal(actual, yuv.cut(near, *crops).permute(0, 3, 1, 2)), "far apart"


def batches_as_on_a_gpu() -> None:
    """Compare what `Normaliser` makes of a batch by the kernel, as on a GPU, with what it makes on the CPU."""
    size, ids, rng = 33, np.arange(3), np.random.default_rng(5)
    mean, axes = rng.uniform(90, 150, (size, size, 3)), np.eye(3)
    numbers = mean, mean.mean((0, 1)), axes, np.array([900.0, 90.0, 9.0]), axes
    statistics = Statistics(1, np.zeros(0), np.zeros(0), *numbers)
    for views, mean_of, output in (
        ("random", "centre", "float32"),
        ("random", "aligned", "float32"),
        ("random", "colour", "uint8"),
        ("centre", "centre", "float32"),
        ("ten", "aligned", "float32"),
        ("nine", "colour", "uint8"),
    ):
        recipe = AlexNet(ViewOptions(views=views, mean=mean_of, view=28), statistics, size, 7)
        images = []
        for as_on_a_gpu in (False, True):
            batch = Batch(0, 0, 0, len(ids), ids, kind="yuv420")
            batch.requested_ids = ids
            batch.draw(recipe, np.full((len(ids), 2), size))
            normaliser = Normaliser(recipe, (torch.device("cpu"),), output, size)
            normaliser._on_cpu = not as_on_a_gpu
            records = random("yuv420", size, len(ids), np.random.default_rng(6))
            (tensors,) = normaliser.prepare(batch, [records])
            images.append(normaliser.images(batch, tensors, torch.device("cpu")))
        assert torch.equal(*images), (views, mean_of, output)
        assert images[0].shape == (3, *([len(recipe.several)] if recipe.several else []), 3, 28, 28)


if __name__ == "__main__":
    main()

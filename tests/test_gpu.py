"""The same chain on a CUDA device. On one GPU both columns live on cuda:0."""

from pathlib import Path

import pytest
import torch

from pipeline.online import Loader
from trainer import recipe as recipes
from trainer.model import Grouped, initial_weights
from trainer.parallel import Columns

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def devices() -> tuple[torch.device, torch.device]:
    second = "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"
    return torch.device("cuda:0"), torch.device(second)


@pytest.mark.parametrize(("split", "views"), [("train", "random"), ("val", "centre"), ("val", "ten"), ("val", "nine")])
def test_batches_from_the_gpu_are_those_of_the_cpu(dataset: Path, split: str, views: str):
    """Same samples, crops and flips; pixels differ by the decoders' rounding only (nvJPEG and libjpeg-turbo)."""
    with (
        Loader(dataset, split, batch_size=8, views=views, device="cpu") as host,
        Loader(dataset, split, batch_size=8, views=views, device="cuda:0") as device,
    ):
        for _ in range(2):
            one, other = next(host), next(device)
            assert one.ids.tolist() == other.ids.tolist()
            assert other.images.is_cuda
            assert other.labels.cpu().tolist() == one.labels.tolist()
            difference = (one.images - other.images.cpu()).abs()
            assert difference.mean() < 2  # grey levels
            assert difference.max() < 64


def test_two_columns_on_gpus_equal_the_grouped_network_on_the_cpu():
    widths = {"conv1": 8, "conv2": 16, "conv3": 24, "conv4": 24, "conv5": 16, "fc6": 64, "fc7": 48}
    recipe = recipes.load("tiny", [f"model.layers.{name}.width={width}" for name, width in widths.items()]).model
    weights = {name: value.double() for name, value in initial_weights(recipe, 7, 5).items()}
    grouped, columns = Grouped(recipe, 7).double(), Columns(recipe, 7, devices()).double()
    grouped.load(weights)
    columns.load(weights)
    x = torch.randn(4, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 60
    expected, found = grouped(x), columns(x.cuda(0))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)
    expected.square().sum().backward()
    found.square().sum().backward()
    gathered = columns.gathered([{name: w.grad for name, w in part.items()} for part in columns.parts()])
    for name, w in grouped.weights().items():
        torch.testing.assert_close(gathered[name], w.grad, rtol=1e-8, atol=1e-8)

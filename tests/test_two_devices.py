"""The network on two GPUs that do not exist: under FakeTensorMode an operation on tensors of two devices is an error.

One GPU named twice would hide a missing copy. Run as a program, this file loads tests/fake_cuda.cpp before torch.
"""

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
TORCH = Path(importlib.util.find_spec("torch").origin).parent  # not imported: the devices must be there before
BATCH = 4
pytestmark = [
    pytest.mark.proof,  # compiles C++ against torch
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the devices with"),
    pytest.mark.skipif((TORCH / "lib/libtorch_cuda.so").exists(), reason="this torch has its own CUDA devices"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two devices, compiled."""
    path = tmp_path_factory.mktemp("devices") / "fake_cuda.so"
    includes = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
    libraries = [f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", SOURCE, "-o", path, *includes, *libraries], check=True)
    return path


def run(library: Path, check: str, *names: str) -> dict[str, list[int]]:
    """By recipe, the number of parameters on each device."""
    command = [sys.executable, __file__, library, check, *names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    counts: dict[str, list[int]] = json.loads(ended.stdout)
    return counts


def test_every_recipe_trains_and_evaluates_on_two_devices(library: Path):
    """Every operation is on one device; each weight, gradient and velocity is where its column is."""
    from trainer import recipe as recipes

    counts = run(library, "steps", *recipes.names())
    assert list(counts) == recipes.names()
    assert counts["original"] == [32_531_112, 28_434_112]  # fc8 sees both columns: it is whole on the first


def test_two_replicas_reduce_each_columns_gradients_on_its_device(library: Path):
    """One step of a rank with two devices: FakeTensorMode does not reach DistributedDataParallel's second."""
    assert run(library, "replicas", "original", "half") == {"original": [32_531_112, 28_434_112], "half": [59_798_312]}


def test_a_missing_copy_between_columns_is_an_error(library: Path):
    with pytest.raises(AssertionError, match="Expected all tensors to be on the same device"):
        run(library, "without-copies", "original")


def load_devices(library: str) -> None:
    for name in (TORCH / "lib/libc10.so", TORCH / "lib/libtorch_cpu.so", library):
        loaded = ctypes.CDLL(str(name), ctypes.RTLD_GLOBAL)
    loaded.register_devices.restype = ctypes.c_bool
    assert loaded.register_devices(), "torch had registered its devices before"


def steps(name: str) -> list[int]:
    """Train, evaluate, save and load a recipe's network; return the count of parameters on each of its devices."""
    import torch

    from pipeline.online.batch import Batch
    from trainer import recipe as recipes
    from trainer.evaluate import view_probabilities
    from trainer.model import initial_weights
    from trainer.nonfinite import Watch
    from trainer.optim import Momentum, Schedule
    from trainer.parallel import TwoColumnNet
    from trainer.train import train_step

    recipe = recipes.load(name, [f"train.batch_size={BATCH}"])
    model, classes = recipe.model, recipe.model.classes or 1000
    devices = [torch.device("cuda", i) for i in range(model.columns)]
    network = TwoColumnNet(model, classes, devices)
    network.load(initial_weights(model, classes, 1))
    optimiser, watch, rates = Momentum(network.parts(), 0.9), Watch(network), Schedule(recipe, 100).rates(0)
    views = [torch.empty(BATCH, 10, 3, model.size, model.size, device=device) for device in devices]
    labels = torch.zeros(BATCH, dtype=torch.int64, device=devices[0])
    dropped = [layer for layer in network.layers if "dropout" in layer.recipe.then]
    masks = {layer.name: torch.ones(BATCH, layer.width) for layer in dropped}
    copies = [{unit: mask.to(device) for unit, mask in masks.items()} for device in devices]
    for drop in (masks, copies):  # of the host, or of each device
        batch = Batch(0, 0, 0, BATCH, torch.arange(BATCH), labels, tuple(view[:, 0] for view in views))
        assert train_step(network, optimiser, batch, drop, rates, recipe.train, watch).device == devices[0]
    for part, velocity, device in zip(network.parts(), optimiser.velocity, devices):
        assert {value.device for value in (*part.values(), *velocity.values())} == {device}
    with torch.no_grad():
        assert view_probabilities(network, views).shape == (BATCH, 10, classes)
        assert network.hidden([view[:, 0] for view in views]).device == devices[0]
    saved = network.gathered(optimiser.velocity)
    assert {value.device.type for value in saved.values()} == {"cpu"}
    for velocity, device in zip(network.scatter(saved), devices):
        assert {value.device for value in velocity.values()} == {device}
    return [sum(w.numel() for w in part.values()) for part in network.parts()]


def replicas(name: str) -> list[int]:
    """Return how many elements of gradients a rank of two sends to be summed, on each of its devices."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from trainer import recipe as recipes
    from trainer.distributed import Replicas, World
    from trainer.parallel import TwoColumnNet

    model = recipes.load(name).model
    devices = [torch.device("cuda", i) for i in range(model.columns)]
    sent = dict.fromkeys(devices, 0)

    def all_reduce(bucket: torch.Tensor, async_op: bool) -> SimpleNamespace:
        sent[bucket.device] += bucket.numel()
        future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future()
        future.set_result([bucket])
        return SimpleNamespace(get_future=lambda: future)

    network = TwoColumnNet(model, 1000, devices)
    images = [torch.empty(BATCH, 3, model.size, model.size, device=device) for device in devices]
    with mock.patch.object(dist, "all_reduce", all_reduce), mock.patch.object(dist, "broadcast"):
        rank = Replicas(network, World(rank=0, size=2))
        logits = rank(images, None)
        F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.int64, device=devices[0])).backward()
    assert all(w.grad is not None and w.grad.device == w.device for w in network.parameters())
    return list(sent.values())


def main(library: str, check: str, names: list[str]) -> None:
    load_devices(library)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from trainer import parallel

    with ExitStack() as stack:
        if check == "replicas":
            from torch.testing._internal.distributed.fake_pg import FakeStore

            torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
            stack.callback(torch.distributed.destroy_process_group)
        if check == "without-copies":
            parallel.joined = lambda values, device: torch.cat(list(values), 1)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # fake tensors know one thread
        function = replicas if check == "replicas" else steps
        print(json.dumps({name: function(name) for name in names}))


if __name__ == "__main__":
    main(*sys.argv[1:3], sys.argv[3:])

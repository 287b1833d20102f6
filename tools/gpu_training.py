"""A step of training in each way that a recipe can choose, as the GPU bench times it."""

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pipeline.manifest import Manifest
from pipeline.online.loader import Batch, Loader
from tools.operations import of_step
from tools.plain_alexnet import PlainTraining
from tools.ways import CLASSES, Way, require_labels

FP32, BF16 = Way(), Way("bf16")
WAYS = {
    "cuda": (
        FP32,
        Way("fp32", True),
        Way("tf32"),
        Way("tf32", True),
        BF16,
        Way("bf16", True),
        Way("bf16", True, "segments"),
        Way("bf16", True, "graphs"),
    ),
    "cpu": (FP32, BF16),
}
# those in which the grouped network and torchvision's are trained as well
BESIDE = {"cuda": (FP32, BF16, Way("bf16", True), Way("bf16", True, "segments")), "cpu": (FP32, BF16)}


class Training:
    """The trainer's step, both columns on one device; or, `whole`, that of the grouped network, which has no columns.

    Weights stay as they are but for the last bits: a batch learned by heart has gradients of denormals, slow on a CPU.
    So each step on the same batch adds the same gradient to the velocities.

    Args:
        draw: dropout masks at every step, as in training; else those of the first step serve.
        second: the device of the second column, where it is another.
    """

    def __init__(
        self,
        data: Manifest,
        device: torch.device,
        name: str,
        batch: int,
        way: Way,
        draw: bool = True,
        whole: bool = False,
        second: torch.device | None = None,
    ) -> None:
        from trainer import (
            feed,
            layers,
            model,
            optim,
            parallel,
            recipe,
            watch,
        )  # here: only these rows need the trainer
        from trainer.step import drawn_masks, update

        require_labels(data)
        rates = ("optim.lr=1e-9", "optim.bias_lr=1e-9", "optim.decay=0.0")
        sizes = (f"train.batch_size={batch}", f"optim.batch_size={batch}")
        plan = recipe.load(name, (*rates, *sizes, *way.settings()))
        classes, seed = max(CLASSES, len(data.classes)), plan.train.seed
        homes = (device, second or device)[: plan.model.columns]
        devices = homes[:1] if whole else homes
        self.devices, self.side, self.parameters = devices, plan.model.size, layers.parameter_count(plan.model, classes)
        self.operations = of_step([layer.multiply_adds for layer in layers.plan(plan.model, classes)])
        parallel.reference_precision(plan.train.precision)
        weights = model.initial_weights(plan.model, classes, seed)
        if whole:
            grouped = model.Grouped(plan.model, classes)
            grouped.load(weights)
            network = _whole(grouped, model.compiled(grouped.run, way.compile), classes, device, way.channels_last)
        else:
            network = parallel.Columns(plan.model, classes, devices, plan.train.compile, plan.train.channels_last)
            network.load(weights)
        optimiser = optim.Momentum(network.parts(), plan.optim.momentum)
        schedule, watched = optim.Schedule(plan, feed.steps_of(data, plan)), watch.Watch(network)
        drop: list[Any] = []

        def step(given: Batch) -> int:
            if draw or not drop:
                drop[:] = drawn_masks(network, seed, given)
            self._losses = update(network, optimiser, given, drop, schedule.rates(given.step), plan.train, watched)
            return len(given.ids)

        self.step: Callable[[Batch], int] = step
        self.loader: Callable[[], Loader] = lambda: feed.training(data, plan, homes)
        self._losses, self._check = torch.zeros(()), watched.check
        self._velocity: Callable[[], dict[str, Tensor]] = lambda: network.gathered(optimiser.velocity)

    def check(self) -> None:
        """Raise UserError where a number was not finite."""
        self._check()

    def outcome(self) -> dict[str, Tensor]:
        """The last step's loss, and the velocities, on the host. Raises UserError where a number is not finite."""
        self._check()
        return {"loss": self._losses.to("cpu"), **self._velocity()}


@contextmanager
def training(data: Manifest, device: torch.device, name: str, batch: int, way: Way, **more: Any) -> Iterator[Training]:
    """A `Training` of which nothing stays: no setting of torch's, and nothing compiled for it."""
    with restored(way):
        yield Training(data, device, name, batch, way, **more)


@contextmanager
def plain_training(data: Manifest, device: torch.device, name: str, batch: int, way: Way) -> Iterator[PlainTraining]:
    """A `PlainTraining` of which as little stays."""
    with restored(way):
        yield PlainTraining(data, device, name, batch, way)


@contextmanager
def restored(way: Way = FP32) -> Iterator[None]:
    """Put torch's settings back in the end, and forget what was compiled for a way."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
        if way.compile != "no":
            torch.compiler.reset()


def evaluating(
    data: Manifest, device: torch.device, name: str, batch: int, views: str, stall: dict[str, float]
) -> Generator[int, None, None]:
    """The images of each batch of evaluation, pass after pass; `stall` takes that of the latest whole pass."""
    from trainer import evaluate, model, parallel, recipe

    plan, classes = recipe.load(name), max(CLASSES, len(data.classes))
    network = parallel.Columns(plan.model, classes, (device, device))
    network.load(model.initial_weights(plan.model, classes, plan.train.seed))
    while True:
        pace = evaluate.Pace()
        for found in evaluate.predictions(network, data, plan, "train", [views], batch, pace=pace):
            yield len(found.ids)
        stall["stall"] = sum(pace.waited.shares(pace.seconds).values())


def _whole(network: Any, run: Callable[..., Any], classes: int, device: torch.device, channels_last: bool) -> Any:
    """`model.Grouped` on a device, as `trainer.step` wants a network; `run` is its own, compiled or not."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network.to(device, memory_format=layout)

    def watched(replicas: tuple[Tensor, ...], masks: Any) -> tuple[Tensor, list[Tensor]]:
        images = replicas[0].to(device, memory_format=layout)
        x, sums = run(network.layers, images, [masks[0].get(layer.name) for layer in network.layers])
        return x, [sums]

    return SimpleNamespace(
        recipe=network.recipe,
        classes=classes,
        devices=(device,),
        layers=network.layers,
        watched=watched,
        parts=lambda: [network.weights()],
        gathered=lambda values: {name: value.to("cpu", copy=True) for name, value in values[0].items()},
    )


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """How far two outcomes are from each other: their losses, and the gradients of the layer where they differ most."""
    off = {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}
    return off.pop("loss"), max(off.values())


def skipped() -> int:
    """How many CUDA graphs torch has done without so far."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    return dynamo.utils.counters["inductor"]["cudagraph_skips"] if dynamo else 0

"""A step of training in each way that a recipe can choose, as the GPU bench times it."""

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.manifest import Manifest
from pipeline.online.loader import Batch, Loader

CLASSES = 1000  # of the network, at least


@dataclass(frozen=True)
class Way:
    """What a recipe says of arithmetic: keys of its section `train`."""

    precision: str = "fp32"
    channels_last: bool = False
    compile: str = "no"

    def __str__(self) -> str:
        compiled = self.compile if self.compile != "no" else ""
        return ", ".join(filter(None, (self.precision, "channels_last" * self.channels_last, compiled)))

    def settings(self) -> tuple[str, ...]:
        layout = str(self.channels_last).lower()
        return f'train.precision="{self.precision}"', f"train.channels_last={layout}", f'train.compile="{self.compile}"'


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


class Training:
    """The trainer's step, both columns on one device; or, `whole`, that of the grouped network, which has no columns.

    Weights stay as they are but for the last bits: a batch learned by heart has gradients of denormals, slow on a CPU.
    So each step on the same batch adds the same gradient to the velocities.

    Args:
        draw: dropout masks at every step, as in training; else those of the first step serve.
    """

    def __init__(
        self, data: Manifest, device: torch.device, name: str, batch: int, way: Way, draw: bool, whole: bool
    ) -> None:
        from trainer import feed, model, optim, parallel, recipe, watch  # here: only these rows need the trainer
        from trainer.step import drawn_masks, update

        if data.samples("train")["label"].min() < 0:
            raise UserError("there are training pictures without a label")
        rates = ("optim.lr=1e-9", "optim.bias_lr=1e-9", "optim.decay=0.0")
        sizes = (f"train.batch_size={batch}", f"optim.batch_size={batch}")
        plan = recipe.load(name, (*rates, *sizes, *way.settings()))
        devices, classes, seed = (device, device), max(CLASSES, len(data.classes)), plan.train.seed
        parallel.reference_precision(plan.train.precision)
        weights = model.initial_weights(plan.model, classes, seed)
        if whole:
            network = _whole(model.Grouped(plan.model, classes), classes, weights, device)
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
        self.loader: Callable[[], Loader] = lambda: feed.training(data, plan, devices)
        self._losses, self._check = torch.zeros(()), watched.check
        self._velocity: Callable[[], dict[str, Tensor]] = lambda: network.gathered(optimiser.velocity)

    def outcome(self) -> dict[str, Tensor]:
        """The last step's loss, and the velocities, on the host. Raises UserError where a number is not finite."""
        self._check()
        return {"loss": self._losses.to("cpu"), **self._velocity()}


@contextmanager
def training(
    data: Manifest, device: torch.device, name: str, batch: int, way: Way, draw: bool = True, whole: bool = False
) -> Iterator[Training]:
    """A `Training` of which nothing stays: no setting of torch's, and nothing compiled for it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        yield Training(data, device, name, batch, way, draw, whole)
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


def _whole(network: Any, classes: int, weights: dict[str, Tensor], device: torch.device) -> Any:
    """`model.Grouped` on a device, as `trainer.step` wants a network."""
    network.load(weights)
    network.to(device)

    def watched(replicas: tuple[Tensor, ...], masks: Any) -> tuple[Tensor, list[Tensor]]:
        x, sums = network.run(network.layers, replicas[0], [masks[0].get(layer.name) for layer in network.layers])
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

"""Steps of training, and what feeds them: the rows of a group take turns in one process, `PYTHON steps.py JOB`."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline import UserError, manifest
from pipeline.online.loader import Batch
from tools.bench import common, supply
from tools.bench.common import Figures, Row
from tools.bench.peers_build import Job, main
from tools.bench.supply import AHEAD, Timed, job_devices
from trainer import data as loaders
from trainer import layers, lrn, model, nonfinite, optim, parallel
from trainer import recipe as recipes
from trainer.model import Masks, Weights
from trainer.recipe import Recipe
from trainer.train import draw_masks, train_step

CLASSES = 1000  # of the network, at least
DEVIATION = 54.0  # grey levels, of a view less its mean image
WARM_UP = {"cuda": 8, "cpu": 1}  # steps before the first turn; before each of the others there is one
SIDES = {"cuda": 8192, "cpu": 1024}  # of matrices
# Weights stay as they are but for the last bits: a batch learned by heart has gradients of denormals, slow on a CPU.
RATES = ("optim.lr=1e-9", "optim.bias_lr=1e-9", "optim.decay=0.0")
# of a column of `original`: maps, height and width of the values that are normalised and pooled
MAPS = {"lrn": (48, 55, 55), "rnorm": (128, 27, 27), "pool": (48, 55, 55)}
WIDTHS, UNITS = (64, 192, 384, 256, 256), 4096  # of torchvision's AlexNet
# torch's out of memory is a RuntimeError, and so is what torch.compile cannot compile
FAILURES = (RuntimeError, UserError, ImportError, AssertionError, OSError)


def settings(variant: str) -> tuple[str, ...]:
    """Return the recipe's keys that choose the arithmetic of a step: "bf16,channels_last,segments" names three."""
    precision, *words = variant.split(",")
    layout, compiled = str("channels_last" in words).lower(), [word for word in words if word != "channels_last"]
    names = f'train.precision="{precision}"', f'train.compile="{",".join(compiled) or "no"}"'
    return *names, f"train.channels_last={layout}"


def group(job: Job) -> Figures:
    """Let the rows of a group take turns; each is set up before its first. The others go on where one fails."""
    rows, timed = [Row(**row) for row in job.options["rows"]], dict[str, Timed]()
    gpus = {device for device in job_devices(job) if device.type == "cuda"}
    with ExitStack() as stack:

        def run(row: Row) -> Figures:
            try:
                if row.name not in timed:
                    timed[row.name] = set_up(job, row, stack, gpus)
                return take_turn(timed[row.name], gpus, job.options["seconds"])
            except FAILURES as error:
                timed.pop(row.name, None)  # its memory is for the others
                raise UserError(" ".join(str(error).split())[:200] or type(error).__name__) from error

        common.interleave(rows, run, job.options["repetitions"])
    return {"rows": [asdict(row) for row in rows]}


def set_up(job: Job, row: Row, stack: ExitStack, gpus: set[torch.device]) -> Timed:
    """Set up a row and warm it up; what it holds until `stack` ends is its peak of memory."""
    held = {gpu: torch.cuda.memory_allocated(gpu) for gpu in gpus}
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    timed: Timed = FUNCTIONS[row.function](job, row, stack)
    choose_arithmetic(timed)
    for _ in range(WARM_UP[job_devices(job)[0].type]):
        timed.step()
    if gpus:
        row.facts["peak"] = max(torch.cuda.max_memory_allocated(gpu) - held[gpu] for gpu in gpus)
    return timed


def take_turn(timed: Timed, gpus: set[torch.device], least: float) -> Figures:
    """Take steps for at least so many seconds, after untimed steps."""
    # While other rows run, a loader makes ready all that it may have ahead; in a run it does only if it is the faster.
    choose_arithmetic(timed)
    for _ in range(AHEAD if timed.loader else 1):
        timed.step()
    synchronise(gpus)
    waited = timed.loader and timed.loader.meter.total
    images, steps, began, of_host = 0, 0, time.perf_counter(), time.process_time()
    while not steps or time.perf_counter() < began + least:
        images, steps = images + timed.step(), steps + 1
    synchronise(gpus)
    seconds, cores = time.perf_counter() - began, time.process_time() - of_host
    if not bool(timed.losses.isfinite().all()):
        raise UserError("the loss is not a finite number")
    torch.cuda.empty_cache()  # for the next row
    figures: Figures = {"images": images, "seconds": seconds, "steps": steps, "cores": cores / seconds}
    if timed.loader and waited:
        figures["stall"] = (timed.loader.meter.total - waited).shares(seconds)
    return figures


def choose_arithmetic(timed: Timed) -> None:
    """Set torch's global options as the row has them."""
    parallel.reference_precision(timed.precision)
    torch.backends.cudnn.deterministic = timed.cudnn == "deterministic"
    torch.backends.cudnn.benchmark = timed.cudnn == "benchmark"


def synchronise(devices: set[torch.device]) -> None:
    """Wait for GPUs."""
    for device in devices:
        torch.cuda.synchronize(device)


def matrix(job: Job, row: Row, stack: ExitStack) -> Timed:
    """Multiply two large square matrices in that precision, on the first device; shares are of its rate on each."""
    device, precision = job_devices(job)[0], job.options["variant"].partition(",")[0]
    side, dtype = SIDES[device.type], torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, out = (torch.randn((side, side), device=device, dtype=dtype) for _ in range(3))

    def step() -> int:
        torch.mm(a, b, out=out)
        synchronise({device} if device.type == "cuda" else set())
        return 2 * side**3  # operations

    return Timed(step, precision=precision)


def trained(job: Job, row: Row, stack: ExitStack) -> Timed:
    """Set up a step of STEPS, fed by the loader or with one batch of random numbers."""
    data, variant = manifest.load(job.source), row.options.get("variant") or job.options["variant"]
    sizes = (f"train.batch_size={job.batch}", f"optim.batch_size={job.batch}")
    plan = recipes.load(job.options["recipe"], (*RATES, *sizes, *settings(variant)))
    parallel.reference_precision(plan.train.precision)
    devices = job_devices(job)[: plan.model.columns if row.function == "columns" else 1]
    ideas = {name: row.options[name] for name in ("foreach", "whole") if name in row.options}
    train, count = STEPS[row.function](plan, max(CLASSES, len(data.classes)), devices, **ideas)
    row.facts |= {"operations": count, "devices": len(set(devices))}
    loader = stack.enter_context(loaders.training(data, plan, devices)) if row.options.get("fed") else None
    batches = loader or repeat(synthetic(job.batch, plan.model.size, devices))

    def step() -> int:
        batch = next(batches)
        timed.losses = train(batch)
        return len(batch.ids)

    timed = Timed(step, loader, plan.train.precision, row.options.get("cudnn", ""))
    return timed


def synthetic(size: int, side: int, devices: Sequence[torch.device], classes: int = CLASSES, seed: int = 0) -> Batch:
    """Return a batch of `size` random images of `side` pixels, laid out on each device as the loader's are."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, side, side, 3, generator=generator).mul_(DEVIATION).permute(0, 3, 1, 2)
    labels = torch.randint(classes, (size,), generator=generator).to(devices[0])
    copies = {device: images.to(device) for device in dict.fromkeys(devices)}
    return Batch(0, 0, 0, size, torch.arange(size).numpy(), labels, tuple(copies[device] for device in devices))


def operations(multiply_adds: Sequence[int]) -> int:
    """Return the operations of forward and backward for one image, two for each multiply-add of the layers of weights.

    The gradients of weights and of inputs take as many as the forward pass each; the first layer's input needs none.
    """
    return 2 * (3 * sum(multiply_adds) - multiply_adds[0])


Step = tuple[Callable[[Batch], Tensor], int]  # a step, which returns the losses; the operations of an image


def penstock(
    network_class: Any,
    plan: Recipe,
    classes: int,
    devices: Sequence[torch.device],
    foreach: bool = False,
    whole: bool = False,
) -> Step:
    """Take a run's own step: dropout masks, forward, backward, new weights, watch; each column on its device.

    Of `candidates`: `foreach`, the update; `whole`, all but drawing masks and watching as one CUDA graph.
    """
    train = plan.train
    momentum: Any = optim.Momentum
    if foreach:
        from tools.bench import candidates  # needs Triton

        momentum = candidates.ForeachMomentum
    network = network_class(plan.model, classes, devices, train.compile, train.channels_last)
    network.load(model.initial_weights(plan.model, classes, train.seed))
    optimiser, watch = momentum(network.parts(), plan.optim.momentum), nonfinite.Watch(network)
    rates = optim.Schedule(plan, 1).rates(0)

    def step(batch: Batch) -> Tensor:
        masks = draw_masks(network, train.seed, batch)
        if whole:
            return replayed(batch, masks)
        return train_step(network, optimiser, batch, masks, rates, train, watch)

    replayed = as_graph(lambda batch, masks: train_step(network, optimiser, batch, masks, rates, train))
    return step, operations([layer.multiply_adds for layer in layers.plan(plan.model, classes)])


def as_graph(step: Callable[[Batch, list[Masks]], Tensor]) -> Callable[[Batch, list[Masks]], Tensor]:
    """Return a step as one CUDA graph, which the first batch is captured with; the others are copied to its place."""
    runs: list[Callable[[Sequence[Tensor]], Tensor]] = []

    def run(batch: Batch, masks: list[Masks]) -> Tensor:
        every = (batch.labels, *batch.replicas, *(mask for part in masks for mask in part.values()))
        tensors = {id(tensor): tensor for tensor in every}  # columns on one device share theirs
        if not runs:
            from tools.bench import candidates  # needs Triton

            own = {key: tensor.clone() for key, tensor in tensors.items()}
            replicas = tuple(own[id(replica)] for replica in batch.replicas)
            captive = replace(batch, labels=own[id(batch.labels)], replicas=replicas)
            parts: list[Masks] = [{name: own[id(mask)] for name, mask in part.items()} for part in masks]
            runs.append(candidates.captured(partial(step, captive, parts), list(own.values())))
        return runs[0](list(tensors.values()))

    return run


def operation(job: Job, row: Row, stack: ExitStack) -> Timed:
    """Compute an operation of MAPS forward and backward: as the trainer does, compiled, or by a candidate's kernel."""
    device, (what, how) = job_devices(job)[0], (row.options["what"], row.options["how"])
    precision, *words = job.options["variant"].split(",")
    layout: Any = torch.channels_last if "channels_last" in words else torch.contiguous_format
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn((job.batch, *MAPS[what]), device=device).mul_(DEVIATION)
    x = x.to(dtype, memory_format=layout).requires_grad_()
    if how == "kernel":
        from tools.bench import candidates  # needs Triton

        kernels: dict[str, Callable[[Tensor], Tensor]] = {
            "lrn": lambda x: candidates.lrn(x, 1),
            "rnorm": candidates.same_map_norm,
            "pool": candidates.pool_relu,
        }
        run = kernels[what]
    else:
        run = model.compiled(OPERATIONS[what], "segments" if how == "compiled" and device.type == "cuda" else "no")
    g = torch.ones_like(run(x))

    def step() -> int:
        x.grad = None
        run(x).backward(g)
        return job.batch

    return Timed(step, precision=precision)


class Grouped(model.Grouped):
    """The whole network on the first device, with grouped convolutions and no columns, for `train_step`."""

    def __init__(
        self, recipe: layers.ModelRecipe, classes: int, devices: Sequence[torch.device], compile: str, last: bool
    ) -> None:
        super().__init__(recipe, classes)
        self.classes, self.devices = classes, tuple(devices[:1])
        self.format: Any = torch.channels_last if last else torch.contiguous_format
        self.to(devices[0], memory_format=self.format)  # type: ignore[call-overload]
        self.compiled = model.compiled(self.run, compile)

    def forward(self, replicas: Sequence[Tensor], masks: Sequence[Masks]) -> Tensor:  # type: ignore[override]
        images = replicas[0].to(self.devices[0], memory_format=self.format)
        logits: Tensor = self.compiled(self.layers, images, [masks[0].get(layer.name) for layer in self.layers])
        return logits

    def parts(self) -> list[Weights]:
        return [self.weights()]


def torchvision(plan: Recipe, classes: int, devices: Sequence[torch.device]) -> Step:
    """Train another network in plain torch: 64, 192, 384, 256, 256 maps, no LRN, no groups; torch.optim.SGD, autocast
    for bf16."""
    (device,), train = devices, plan.train
    layout: Any = torch.channels_last if train.channels_last else torch.contiguous_format
    network = alexnet(classes).to(device, memory_format=layout)  # type: ignore[call-overload]
    sgd = torch.optim.SGD(network.parameters(), lr=1e-9, momentum=plan.optim.momentum, weight_decay=5e-4)
    run = model.compiled(network, train.compile)

    def step(batch: Batch) -> Tensor:
        images = batch.images.to(device, memory_format=layout)
        sgd.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            losses = F.cross_entropy(run(images), batch.labels)
        losses.backward()
        sgd.step()
        return losses.detach()

    return step, alexnet_operations(classes)


def alexnet(classes: int = CLASSES) -> nn.Sequential:
    """Return torchvision's AlexNet: (n, 3, 224, 224) → (n, classes)."""
    shapes = zip((3, *WIDTHS), WIDTHS, (11, 5, 3, 3, 3), (4, 1, 1, 1, 1), (2, 2, 1, 1, 1), (1, 1, 0, 0, 1))
    modules: list[nn.Module] = []
    for maps, width, kernel, stride, padding, pool in shapes:
        modules += [nn.Conv2d(maps, width, kernel, stride, padding), nn.ReLU(inplace=True)]
        modules += [nn.MaxPool2d(3, 2)] * pool
    modules += [nn.AdaptiveAvgPool2d(6), nn.Flatten()]
    for units in (36 * WIDTHS[-1], UNITS):
        modules += [nn.Dropout(0.5), nn.Linear(units, UNITS), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules, nn.Linear(UNITS, classes))


def alexnet_operations(classes: int = CLASSES) -> int:
    """Return its operations for one image, forward and backward, as torch counts them. Nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        alexnet(classes)(torch.empty(1, 3, 224, 224)).sum().backward()
    return counter.get_total_flops()


NETWORKS: dict[str, Any] = {"columns": parallel.TwoColumnNet, "grouped": Grouped}
STEPS = {name: partial(penstock, network) for name, network in NETWORKS.items()} | {"torchvision": torchvision}
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "lrn": lambda x: lrn.lrn(x, 1),
    "rnorm": lrn.same_map_norm,
    "pool": lambda x: F.relu(F.max_pool2d(x, 3, 2, ceil_mode=True)),
}
FUNCTIONS: dict[str, Any] = {"matrix": matrix, "operation": operation}
FUNCTIONS |= {name: getattr(supply, name) for name in ("dali", "decode", "views", "load", "supply")}
FUNCTIONS |= dict.fromkeys(STEPS, trained)

if __name__ == "__main__":
    main({"group": group})

"""Steps of training, and what feeds them: the rows of a group take turns in one process, `PYTHON steps.py JOB.json`."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline import UserError, manifest
from pipeline.manifest import Manifest
from pipeline.online import Loader
from pipeline.online.loader import Batch
from tools.bench import common
from tools.bench.common import CORES, Figures, Row
from tools.bench.peers_build import Job, main
from tools.bench.peers_load import dali_windows, stored_jpegs
from trainer import feed, layers, model, optim, parallel, watch
from trainer import recipe as recipes
from trainer.model import Masks, Weights
from trainer.step import drawn_masks, update

FP32 = "fp32"  # the variant that the others are compared with
CLASSES = 1000  # of the network, at least
DEVIATION = 54.0  # grey levels, of a view less its mean image
AHEAD = 6  # batches that a loader may have ready
WARM_UP = {"cuda": 8, "cpu": 1}  # steps before the first turn; before each of the others there is one
SIDES = {"cuda": 8192, "cpu": 1024}  # of matrices
# torch's out of memory is a RuntimeError, and so is what torch.compile cannot compile
FAILURES = (RuntimeError, UserError, ImportError, AssertionError, OSError)


@dataclass
class Timed:
    """A row that is set up: `step` returns its images (the operations of a matrix product)."""

    step: Callable[[], int]
    loader: Loader | None = None
    precision: str = FP32
    check: Callable[[], None] = lambda: None
    facts: Figures = field(default_factory=dict)
    resident: int = 0  # bytes on a GPU


def settings(variant: str) -> tuple[str, ...]:
    """Return the recipe's keys that choose the arithmetic of a step: "bf16,channels_last,segments" names three."""
    precision, *words = variant.split(",")
    layout, compiled = str("channels_last" in words).lower(), [word for word in words if word != "channels_last"]
    names = f'train.precision="{precision}"', f'train.compile="{",".join(compiled) or "no"}"'
    return *names, f"train.channels_last={layout}"


def group(job: Job) -> Figures:
    """Set up all rows of a group, then let them take turns. A row that fails keeps the reason; the others go on."""
    rows = [Row(**row) for row in job.options["rows"]]
    devices, timed = job_devices(job), dict[str, Timed]()
    with ExitStack() as stack:
        for row in rows:
            try:
                before = allocated(devices)
                timed[row.name] = FUNCTIONS[row.function](job, row, stack)
                for _ in range(WARM_UP[devices[0].type]):
                    timed[row.name].step()
                synchronise(devices)
                timed[row.name].resident = allocated(devices) - before
                row.facts |= timed[row.name].facts
            except FAILURES as error:
                timed.pop(row.name, None)
                row.fail(reason(error))

        def turn(row: Row) -> Figures:
            try:
                return take_turn(timed[row.name], devices, job.options["seconds"])
            except FAILURES as error:
                raise UserError(reason(error)) from error

        common.interleave(rows, turn, job.options["repetitions"])
    return {"rows": [asdict(row) for row in rows]}


def take_turn(timed: Timed, devices: Sequence[torch.device], least: float) -> Figures:
    """Take steps for at least so many seconds, after untimed steps."""
    # While other rows run, a loader makes ready all that it may have ahead; in a run it does only if it is the faster.
    parallel.reference_precision(timed.precision)
    for _ in range(AHEAD if timed.loader else 1):
        timed.step()
    synchronise(devices)
    for device in devices if devices[0].type == "cuda" else ():
        torch.cuda.reset_peak_memory_stats(device)
    before, waited = allocated(devices), timed.loader and timed.loader.meter.total
    images, steps, began = 0, 0, time.perf_counter()
    while not steps or time.perf_counter() < began + least:
        images, steps = images + timed.step(), steps + 1
    synchronise(devices)
    seconds = time.perf_counter() - began
    timed.check()
    figures: Figures = {"images": images, "seconds": seconds, "steps": steps}
    if timed.loader and waited:
        figures["stall"] = (timed.loader.meter.total - waited).shares(seconds)
    if devices[0].type == "cuda":
        figures["peak"] = allocated(devices, torch.cuda.max_memory_allocated) - before + timed.resident
        torch.cuda.empty_cache()  # for the next row
    return figures


def job_devices(job: Job) -> list[torch.device]:
    return [torch.device(name) for name in job.options["devices"]]


def synchronise(devices: Sequence[torch.device]) -> None:
    """Wait for the GPUs."""
    for device in set(devices):
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def allocated(devices: Sequence[torch.device], memory: Callable[..., int] = torch.cuda.memory_allocated) -> int:
    """Return torch's bytes, or the peak of them, on the GPU that has most."""
    return max((memory(device) for device in devices if device.type == "cuda"), default=0)


def reason(error: BaseException) -> str:
    """Return one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def matrix(job: Job, row: Row, stack: ExitStack) -> Timed:
    """Multiply two large square matrices in that precision, on the first device; shares are of its rate on each."""
    device, precision = job_devices(job)[0], job.options["variant"].partition(",")[0]
    side, dtype = SIDES[device.type], torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, out = (torch.randn((side, side), device=device, dtype=dtype) for _ in range(3))

    def step() -> int:
        torch.mm(a, b, out=out)
        synchronise([device])
        return 2 * side**3  # operations

    return Timed(step, precision=precision)


def decode(job: Job, row: Row, stack: ExitStack) -> Timed:
    """Decode random windows of JPEGs in memory by DALI alone, a share of them by a GPU's hardware decoder."""
    jpegs = list(islice(stored_jpegs(job), AHEAD * job.batch))
    windows = dali_windows(jpegs, job.batch, CORES, job_devices(job)[0].index, row.options["hardware_share"])
    return Timed(lambda: next(windows).shape[0])


def load(job: Job, row: Row, stack: ExitStack) -> Timed:
    """Take batches from the loader, on every device of the group; nobody looks at them."""
    options: Figures = {"batch_size": job.batch, "threads": CORES, "readers": 4, **row.options}
    loader = stack.enter_context(Loader(job.source, device=tuple(dict.fromkeys(job_devices(job))), **options))
    return Timed(lambda: len(next(loader).ids), loader)


def supply(job: Job, row: Row, stack: ExitStack) -> Timed:
    """Take the batches of a run of this recipe, on its devices; nobody looks at them."""
    plan = recipes.load(job.options["recipe"], (f"train.batch_size={job.batch}",))
    loader = stack.enter_context(feed.training(manifest.load(job.source), plan, job_devices(job)))
    return Timed(lambda: len(next(loader).ids), loader)


def trained(job: Job, row: Row, stack: ExitStack) -> Timed:
    """Set up a step of STEPS, fed by the loader or with one batch of random numbers."""
    data, variant = manifest.load(job.source), row.options.get("variant") or job.options["variant"]
    made = STEPS[row.function](data, job_devices(job), job.options["recipe"], job.batch, variant)
    timed = Timed(lambda: made.step(batch), precision=made.plan.train.precision, check=made.check)
    timed.facts = {"operations": made.operations, "devices": len(set(made.devices))}
    if row.options.get("fed"):
        loader = timed.loader = stack.enter_context(feed.training(data, made.plan, made.devices))
        timed.step = lambda: made.step(next(loader))
    else:
        batch = synthetic(job.batch, made.plan.model.size, made.devices)
    return timed


def synthetic(size: int, side: int, devices: Sequence[torch.device]) -> Batch:
    """Return a batch of `size` random images of `side` pixels, laid out on each device as the loader's are."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, side, side, 3, generator=generator).mul_(DEVIATION).permute(0, 3, 1, 2)
    labels = torch.randint(CLASSES, (size,), generator=generator).to(devices[0])
    copies = {device: images.to(device) for device in dict.fromkeys(devices)}
    return Batch(0, 0, 0, size, torch.arange(size).numpy(), labels, tuple(copies[device] for device in devices))


def operations(multiply_adds: Sequence[int]) -> int:
    """Return the operations of forward and backward for one image, two for each multiply-add of the layers of weights.

    The gradients of weights and of inputs take as many as the forward pass each; the first layer's input needs none.
    """
    return 2 * (3 * sum(multiply_adds) - multiply_adds[0])


class TrainerStep:
    """Take a run's own step: dropout masks, forward, backward, new weights, watch; each column on its device."""

    network_class: Any = parallel.Columns

    def __init__(self, data: Manifest, devices: Sequence[torch.device], recipe: str, batch: int, variant: str) -> None:
        # Weights stay as they are but for the last bits: a batch learned by heart has gradients of denormals, slow on a
        # CPU. So each step on the same batch adds the same gradient to the velocities.
        rates = ("optim.lr=1e-9", "optim.bias_lr=1e-9", "optim.decay=0.0")
        sizes = (f"train.batch_size={batch}", f"optim.batch_size={batch}")
        self.plan = recipes.load(recipe, (*rates, *sizes, *settings(variant)))
        self.devices, self.classes = tuple(devices)[: self.plan.model.columns], max(CLASSES, len(data.classes))
        parallel.reference_precision(self.plan.train.precision)
        self.losses = torch.zeros(())
        self.schedule = optim.Schedule(self.plan, feed.steps_of(data, self.plan))
        self.build()

    def build(self) -> None:
        """Make the network and its optimiser."""
        recipe, train = self.plan.model, self.plan.train
        self.network = self.network_class(recipe, self.classes, self.devices, train.compile, train.channels_last)
        self.devices = self.network.devices
        self.network.load(model.initial_weights(recipe, self.classes, train.seed))
        self.operations = operations([layer.multiply_adds for layer in layers.plan(recipe, self.classes)])
        self.optimiser = optim.Momentum(self.network.parts(), self.plan.optim.momentum)
        self.watch = watch.Watch(self.network)

    def step(self, batch: Batch) -> int:
        """Train on a batch; return its images."""
        masks, rates = drawn_masks(self.network, self.plan.train.seed, batch), self.schedule.rates(batch.step)
        self.losses = update(self.network, self.optimiser, batch, masks, rates, self.plan.train, self.watch)
        return len(batch.ids)

    def check(self) -> None:
        """Raise UserError where a number was not finite."""
        self.watch.check()

    def outcome(self) -> dict[str, Tensor]:
        """Return the last step's loss, and the velocities, on the host."""
        return {"loss": self.losses.to("cpu"), **self.network.gathered(self.optimiser.velocity)}


class Grouped(model.Grouped):
    """The whole network on the first device, with grouped convolutions and no columns, as `update` takes a network."""

    def __init__(
        self, recipe: layers.ModelRecipe, classes: int, devices: Sequence[torch.device], compile: str, last: bool
    ) -> None:
        super().__init__(recipe, classes)
        self.classes, self.devices = classes, tuple(devices[:1])
        self.format: Any = torch.channels_last if last else torch.contiguous_format
        self.to(devices[0], memory_format=self.format)  # type: ignore[call-overload]
        self.compiled = model.compiled(self.run, compile)

    def watched(self, replicas: Sequence[Tensor], masks: Sequence[Masks]) -> tuple[Tensor, list[Tensor]]:
        images = replicas[0].to(self.devices[0], memory_format=self.format)
        logits, sums = self.compiled(self.layers, images, [masks[0].get(layer.name) for layer in self.layers])
        return logits, [sums]

    def parts(self) -> list[Weights]:
        return [self.weights()]

    def gathered(self, values: Sequence[Weights]) -> Weights:
        return {name: value.to("cpu", copy=True) for name, value in values[0].items()}


class GroupedStep(TrainerStep):
    """Take the same step of the same network whole on the first device, with grouped convolutions and no columns."""

    network_class = Grouped


class PlainStep(TrainerStep):
    """Train another network in plain torch, on the first device: 64, 192, 384, 256, 256 maps, no LRN, no groups;
    nn.functional.cross_entropy, torch.optim.SGD, autocast for bf16."""

    def build(self) -> None:
        self.devices, train = self.devices[:1], self.plan.train
        self.layout: Any = torch.channels_last if train.channels_last else torch.contiguous_format
        network = alexnet(self.classes).to(self.devices[0], memory_format=self.layout)  # type: ignore[call-overload]
        self.operations = alexnet_operations(self.classes)
        momentum = self.plan.optim.momentum
        self.sgd = torch.optim.SGD(network.parameters(), lr=1e-9, momentum=momentum, weight_decay=5e-4)
        self.run: Any = model.compiled(network, train.compile)

    def step(self, batch: Batch) -> int:
        images = batch.images.to(self.devices[0], memory_format=self.layout)
        self.sgd.zero_grad()
        with torch.autocast(self.devices[0].type, torch.bfloat16, enabled=self.plan.train.precision == "bf16"):
            losses = F.cross_entropy(self.run(images), batch.labels)
        losses.backward()
        self.sgd.step()
        self.losses = losses.detach()
        return len(batch.ids)

    def check(self) -> None:
        if not bool(self.losses.isfinite()):
            raise UserError("the loss is not a finite number")


WIDTHS, UNITS = (64, 192, 384, 256, 256), 4096


def alexnet(classes: int = CLASSES) -> nn.Sequential:
    """Return torchvision's AlexNet: (n, 3, 224, 224) → (n, classes)."""
    shapes = zip((3, *WIDTHS), WIDTHS, (11, 5, 3, 3, 3), (4, 1, 1, 1, 1), (2, 2, 1, 1, 1), (1, 1, 0, 0, 1))
    modules: list[nn.Module] = []
    for maps, width, kernel, stride, padding, pool in shapes:
        modules += [
            nn.Conv2d(maps, width, kernel, stride, padding),
            nn.ReLU(inplace=True),
            *[nn.MaxPool2d(3, 2)] * pool,
        ]
    modules += [nn.AdaptiveAvgPool2d(6), nn.Flatten()]
    for units in (36 * WIDTHS[-1], UNITS):
        modules += [nn.Dropout(0.5), nn.Linear(units, UNITS), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules, nn.Linear(UNITS, classes))


def alexnet_operations(classes: int = CLASSES) -> int:
    """Return its operations for one image, forward and backward, as torch counts them. Nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        alexnet(classes)(torch.empty(1, 3, 224, 224)).sum().backward()
    return counter.get_total_flops()


STEPS = {"columns": TrainerStep, "grouped": GroupedStep, "torchvision": PlainStep}
SUPPLIES: dict[str, Any] = {"matrix": matrix, "decode": decode, "load": load, "supply": supply}
FUNCTIONS = SUPPLIES | dict.fromkeys(STEPS, trained)
NOTES = SUPPLIES | STEPS  # whose docstrings are the notes below the table

if __name__ == "__main__":
    main({"group": group})

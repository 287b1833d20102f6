"""The same chain on a CUDA device. On one GPU both columns live on cuda:0."""

import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from crew import Crew
from networks import apart, drawn, images, masks_of, narrow
from pipeline import manifest
from pipeline.offline.raw_tier import build
from pipeline.online import Loader, yuv
from pipeline.online.batch import Crops
from pipeline.online.normalise import normalise, normalise_aligned
from pipeline.records import KINDS, record_bytes
from reference import jpeg_pixels
from runs import TINY, options
from stored import decoded, jpegs
from tools.bench import steps
from tools.bench.steps import RATES, Grouped, settings
from tools.bench.supply import FP32
from tools.bench.train import VARIANTS
from trainer import checkpoint as checkpoints
from trainer import data as loaders
from trainer import recipe as recipes
from trainer.dropout import masks
from trainer.model import Grouped as GroupedModel
from trainer.model import initial_weights
from trainer.nonfinite import Watch
from trainer.optim import Momentum, Schedule
from trainer.parallel import TwoColumnNet, reference_precision
from trainer.run import Settings
from trainer.train import draw_masks, main, train_step

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


TIERS: list[tuple[str, dict[str, Any]]] = [  # kind of records on disk, and options of the loader
    ("rgb", {"tier": "raw"}),
    ("yuv420", {"tier": "raw"}),
    ("yuv420", {"tier": "device", "device_bytes": 10**9}),
    ("yuv420", {"tier": "device", "device_bytes": 17 * record_bytes("yuv420", 256)}),
    ("", {"tier": "device", "device_bytes": 10**9}),  # decoded from the shards
]
VIEWS = [("train", {}), ("train", {"mean": "aligned", "view": 131}), ("val", {"views": "ten"})]


@pytest.mark.parametrize(("kind", "tier"), TIERS)
def test_every_tier_on_a_gpu_gives_the_bytes_of_the_cpu(dataset: Path, tmp_path: Path, kind: str, tier: dict[str, Any]):
    """Of more than two epochs, so that records stay in the device's memory; as uint8, and normalised in float32."""
    root = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    if kind:
        build(manifest.load(root), kind, 1, lambda done, total: None)
    for (split, views), output in product(VIEWS, ("uint8", "float32")):
        options: dict[str, Any] = {"batch_size": 7, "output": output, **views}
        with (
            Loader(dataset, split, tier="jpeg", **options) as host,
            Loader(root, split, device="cuda:0", **tier, **options) as device,
        ):
            assert device.tier == tier["tier"]
            for _ in range(2 * host.steps_per_epoch + 1 if split == "train" else host.steps_per_epoch):
                one, other = next(host), next(device)
                assert one.ids.tolist() == other.ids.tolist()
                assert one.labels.tolist() == other.labels.tolist()
                assert other.images.is_cuda
                assert torch.equal(one.images, other.images.cpu()), (split, views, output, one.step)


@pytest.mark.parametrize("kind", [*KINDS, "pixels"])
@pytest.mark.parametrize(("size", "side"), [(256, 224), (33, 28)])
def test_the_kernel_on_a_gpu_gives_the_bits_of_the_cpu(kind: str, size: int, side: int):
    """Of random records: cut, and normalised in every dtype, with either mean and without."""
    from pipeline.online import kernel  # needs Triton

    rng, n, gpu = np.random.default_rng(3), 9, devices()[0]
    length = record_bytes("yuv420" if kind == "yuv420" else "rgb", size)
    records = torch.from_numpy(rng.choice(np.array([0, 1, 127, 128, 200, 255], np.uint8), (n, length)))
    start = torch.from_numpy(rng.integers(0, size - side + 1, (n, 2)).astype(np.int32))
    flip = torch.from_numpy(rng.integers(0, 2, n).astype(np.int32))
    offset, std = (torch.from_numpy(rng.uniform(0.5, 130, (n, 3)).astype(np.float32)) for _ in range(2))
    view, whole = (torch.from_numpy(rng.normal(0, 40, (s, s, 3)).astype(np.float32)) for s in (side, size))
    cut = yuv.cut(records, kind, size, start, flip, side)
    there = records.to(gpu), kind, size, start.to(gpu), flip.to(gpu), side
    actual = kernel.views(*there, None, None, None, False, torch.uint8)
    assert torch.equal(actual.cpu(), cut.permute(0, 3, 1, 2))
    for dtype, mean in product((torch.float32, torch.bfloat16, torch.float16), (None, view, whole)):
        if mean is whole:
            expected = normalise_aligned(cut, offset, std, whole, dtype, start, flip)
        else:
            expected = normalise(cut, offset, std, mean, dtype)
        deviation = None if mean is None else mean.to(gpu)
        actual = kernel.views(*there, offset.to(gpu), std.to(gpu), deviation, mean is whole, dtype)
        assert torch.equal(actual.cpu(), expected), (dtype, None if mean is None else tuple(mean.shape))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_whole_pictures_decoded_by_a_gpu_are_those_of_the_cpu(dataset: Path, share: float):
    """But for the decoders' rounding, whichever decodes them."""
    from pipeline.online import graph

    pictures, gpu = jpegs(dataset, "train")[:9], devices()[0]
    crops = Crops(*(np.zeros((9, 2), np.int32),) * 2, np.zeros(9, np.int32), *(np.zeros((9, 3), np.float32),) * 2)
    options = graph.GraphOptions(224, size=256, whole=True, hardware_share=share)
    records = decoded(graph.Decoder((gpu,), options, 9, False), pictures, crops)
    expected = np.stack([jpeg_pixels(jpeg).reshape(-1) for jpeg in pictures])
    difference = np.abs(records.astype(int) - expected)
    assert difference.mean() < 2  # grey levels
    assert difference.max() < 64


def both_ways(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """Return the function's value, and the gradient of x for one of another layout."""
    x = x.detach().requires_grad_()
    y = function(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.device, y.dtype))
    assert x.grad is not None
    return [y.detach(), x.grad]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", steps.OPERATIONS)
def test_candidates_for_the_step_give_the_trainers_values(name: str, layout: torch.memory_format):
    """In float32; a GPU's roots are off by a few bits."""
    from tools.bench import candidates

    ours = {"lrn": lambda x: candidates.lrn(x, 1), "rnorm": candidates.same_map_norm, "pool": candidates.pool_relu}
    x = torch.randn((5, *steps.MAPS[name]), generator=torch.Generator().manual_seed(3)) * 60
    x = x.round().to(devices()[0], memory_format=layout)
    for actual, expected in zip(both_ways(ours[name], x), both_ways(steps.OPERATIONS[name], x)):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("idea", ["foreach", "whole"])
def test_an_update_in_few_launches_and_a_step_as_one_graph_train_as_the_trainer_does(idea: str):
    """The losses of six steps on another batch each, at rates at which they change."""
    recipe = recipes.load("tiny", ("train.batch_size=16", "optim.batch_size=16", "optim.lr=0.01"))
    both = [devices()[0]] * 2
    reference_precision()
    losses = []
    for ideas in ({}, {idea: True}):
        step, _ = steps.penstock(TwoColumnNet, recipe, 10, both, **ideas)
        batches = [steps.synthetic(16, recipe.model.size, both, classes=10, seed=seed) for seed in range(6)]
        for _ in range(3 if idea == "whole" and not ideas else 0):
            step(batches[0])  # as many as the capture takes
        losses.append([float(step(batch)) for batch in batches])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(set(losses[0])) == 6


def test_masks_drawn_on_the_device_are_the_hosts():
    """Two layers, of which one's units are no multiple of 4; the positions of a second rank's batch."""
    for seed, step, samples, position in ((2012, 0, 8, 0), (2**64 - 1, 2**31 - 1, 5, 123)):
        units = {"fc6": 4096, "fc7": 50}
        host = masks(seed, step, samples, units, 0.5, first=position)
        for device in devices():
            drawn_there = masks(seed, step, samples, units, 0.5, device, position)
            for name, mask in host.items():
                assert drawn_there[name].device == device
                assert torch.equal(drawn_there[name].cpu(), mask), (device, name)


@pytest.fixture
def expected(dataset: Path) -> dict[str, torch.Tensor]:
    """The outcome of the grouped network for the first batch, in float32."""
    return outcome(dataset, FP32, Grouped)


def outcome(dataset: Path, variant: str, network_class: Any = TwoColumnNet) -> dict[str, torch.Tensor]:
    """Loss and gradients of the trainer's own steps on one batch: enough of them that CUDA graphs are replayed."""
    data, device = manifest.load(dataset), devices()[0]
    recipe = recipes.load("tiny", ("train.batch_size=16", "optim.batch_size=16", *RATES, *settings(variant)))
    try:
        reference_precision(recipe.train.precision)
        network = network_class(
            recipe.model, len(data.classes), (device, device), recipe.train.compile, recipe.train.channels_last
        )
        network.load(initial_weights(recipe.model, len(data.classes), recipe.train.seed))
        optimiser, rates = Momentum(network.parts(), recipe.optim.momentum), Schedule(recipe, 1).rates(0)
        watch = Watch(network)
        with loaders.training(data, recipe, (device, device)) as loader:
            batch = next(loader)
        for _ in range(4):
            drop = draw_masks(network, recipe.train.seed, batch)
            sums = train_step(network, optimiser, batch, drop, rates, recipe.train, watch)
        parts = optimiser.velocity
        if network_class is TwoColumnNet:
            return {"loss": sums[0].cpu(), **network.gathered(parts)}
        return {"loss": sums[0].cpu(), **{name: value.cpu() for name, value in parts[0].items()}}
    finally:
        reference_precision()
        torch.compiler.reset()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_of_training_is_near_float32(dataset: Path, expected: dict[str, torch.Tensor], variant: str):
    actual = outcome(dataset, variant)
    off = {name: float((actual[name] - value).norm() / value.norm()) for name, value in expected.items()}
    assert off.pop("loss") < {"fp32": 1e-5, "tf32": 1e-3, "bf16": 1e-2}[variant.partition(",")[0]]
    # of the layer that is furthest off: rounding turns over not a little
    assert max(off.values()) < {"fp32": 0.01, "tf32": 0.1, "bf16": 0.5}[variant.partition(",")[0]]


@pytest.mark.parametrize("variant", [FP32, "bf16,channels_last", "bf16,channels_last,graphs"])
def test_a_run_is_resumed(dataset: Path, tmp_path: Path, variant: str):
    """Validations, and checkpoints in the background; the second part begins with the weights of the first."""
    words = (*TINY, "train.validate_every=2", "train.checkpoint_every=2", "train.keep=9", *settings(variant))
    first, second = (recipes.load("tiny", (*words, f"train.steps={steps}")) for steps in (4, 8))
    run = tmp_path / "run"
    main(Settings(dataset, run, first, devices()))
    begun = checkpoints.load(run)
    assert begun.step == 4
    main(Settings(dataset, run, second, devices(), resumed=begun))
    ended = checkpoints.load(run)
    assert (ended.step, ended.loader["step"], len(ended.history)) == (8, 8, 2)
    for name, w in ended.weights.items():
        assert w.isfinite().all()
        assert not torch.equal(w, begun.weights[name]), name


def test_five_steps_of_columns_on_gpus_end_at_the_grouped_networks_weights_on_the_cpu():
    """In float64, with dropout; a GPU's operations and the copies between two, where there are two."""
    recipe = narrow("original", "model.size=64", "optim.lr=0.001", "optim.bias_lr=0.001")
    begun, schedule = drawn(recipe.model, 7), Schedule(recipe, 5)
    grouped, columns = GroupedModel(recipe.model, 7).double(), TwoColumnNet(recipe.model, 7, devices()).double()
    networks = (grouped, [grouped.weights()]), (columns, columns.parts())
    for network, parts in networks:
        network.load(begun)
        optimiser = Momentum(parts, recipe.optim.momentum)
        for step in range(5):
            logits = network(images(recipe.model, 4), masks_of(recipe.model, 4, seed=step))
            F.cross_entropy(logits, torch.tensor([0, 2, 4, 6], device=logits.device)).backward()
            optimiser.step(schedule.rates(step))
    actual = columns.gathered()
    for name, w in grouped.weights().items():
        assert apart(actual[name], w) < 1e-8, name
        assert apart(actual[name], begun[name]) > 1e-6, name  # it has learned


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL refuses two processes on one device")
def test_two_processes_by_nccl_train_as_one(dataset: Path, tmp_path: Path):
    """Each with both columns on a GPU of its own; where there are four GPUs, with a column on each."""
    count = torch.cuda.device_count()
    each = ["cuda:0,cuda:1", "cuda:2,cuda:3"] if count > 3 else ["cuda:0,cuda:0", "cuda:1,cuda:1"]
    crew = Crew(2)
    try:
        for name, homes in (("one", each[:1]), ("two", each)):
            words = options(dataset, tmp_path / name, "train.steps=5", "train.keep=9")
            words[words.index("cpu,cpu")] = ",".join(homes)
            ended = crew.run(*[["train", *words]] * len(homes))
            assert [each.exit_code for each in ended] == [0] * len(homes), ended
    finally:
        crew.end()
    one, two = (checkpoints.load(tmp_path / name).weights for name in ("one", "two"))
    begun = checkpoints.load(checkpoints.step_file(tmp_path / "one", 0)).weights
    for name, w in one.items():
        assert float((two[name] - w).norm()) < 0.01 * float((w - begun[name]).norm()), name

"""docs/reproduction.md: its numbers are what the code gives, its costs follow from them, and its commands exist."""

import math
import re
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT
from documented import agree, commands, rows
from penstock.__main__ import load as load_command
from pipeline.online.augment import LIGHTING_SD, AlexNet, ViewOptions, lighting_shift, ten_views
from trainer.layers import multiply_adds, plan
from trainer.lrn import BETA
from trainer.model import Grouped
from trainer.optim import Momentum, Rates, Schedule
from trainer.recipe import load, override
from trainer.reproduce import experiment

PAGE = (ROOT / "docs" / "reproduction.md").read_text()
TEXT = PAGE[PAGE.index("## Numbers of the network") :]
KERNELS = [96, 11, 11, 3, 256, 5, 5, 48, 384, 3, 3, 256, 384, 3, 3, 192, 256, 3, 3, 192]
FIGURE_2 = [253_440, 186_624, 64_896, 64_896, 43_264, 4096, 4096, 1000]
COLUMN, BIASES = [48, 128, 192, 192, 128, 2048, 2048], [0, 1, 0, 1, 1, 1, 1, 0]
PAPER = {  # the first words of a row → section of the paper, and its numbers there
    "parameters": ("§ 4", [60]), "share of": ("§ 1", [1]), "input": ("figure 2", [150_528]),
    "neurons": ("abstract", [650_000]), "neurons, by": ("figure 2", FIGURE_2), "kernels": ("§ 3.5", KERNELS),
    "strides": ("§ 3.5", [4]), "side": ("figure 2", [55, 27, 13, 13, 13]), "units": ("§ 3.5", [4096, 4096, 1000]),
    "maps": ("figure 2", COLUMN), "layers": ("§ 3.5", []), "pooling": ("§ 3.4", [3, 2]),
    "LRN": ("§ 3.3", [2, 5, 0.0001, 0.75]), "first weights": ("§ 5", [0.01]), "first biases": ("§ 5", BIASES),
    "update": ("§ 5", [0.9, 0.0005]), "rate of weights": ("§ 5", [0.01, 10]), "rate of biases": ("§ 5", [0.01]),
    "batch": ("§ 5", [128]), "epochs": ("§ 5", [90]), "dropout": ("§ 4.2", [0.5, 0.5]),
    "positions": ("§ 4.1", [2048]), "lighting": ("§ 4.1", [0.1]), "views": ("§ 4.1", [10]),
}  # fmt: skip
IMAGES = {
    "ILSVRC2010": 1_261_406, "ILSVRC2012": 1_281_167, "FALL2009": 8_900_000, "FALL2009-HALVES": 4_450_000,
    "FALL2011": 14_197_122,
}  # fmt: skip
DEVIATIONS = np.array([121.780060992931, 37.093888532986, 19.72083304915])  # cuda-convnet2's input_meta


def updates() -> list[float]:
    """Return how weights of 1 with gradient 1 fall in two steps, the rate dropping between: ours, torch's; a bias."""
    ours, torchs, bias = weights = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(3)]
    momentum, after = Momentum([{"a.weight": ours, "a.bias": bias}], 0.9), [[1.0, 1.0, 1.0]]
    sgd = torch.optim.SGD([torchs], 0.01, momentum=0.9, weight_decay=0.0005)
    for rate in (0.01, 0.001):
        ours.grad, torchs.grad, bias.grad = torch.ones_like(ours), torch.ones_like(ours), torch.zeros_like(ours)
        momentum.step({"a": Rates(rate, rate, 0.0005)})
        sgd.param_groups[0]["lr"] = rate
        sgd.step()
        after.append([w.item() for w in weights])
    return [*(-np.diff(after, axis=0).T[:2].ravel()), 1 - after[-1][2]]


def ours() -> dict[str, list[float]]:
    """Return what the code has for each row, by its first words."""
    recipe = load("original")
    model, optim, layers = recipe.model, recipe.optim, plan(recipe.model, 1000)
    convs = [layer for layer in layers if layer.recipe.kind == "conv"]
    sizes = [math.prod(layer.weight) + math.prod(layer.bias) for layer in layers]
    parts = [[len(range(layer.width)[layer.share(column)]) for layer in layers] for column in (0, 1)]
    halves = [sum(s * n // layer.width for s, n, layer in zip(sizes, part, layers)) for part in parts]
    neurons = [layer.width * layer.side**2 for layer in layers]
    rates = [Schedule(recipe, 93).rates(epoch)["conv2"] for epoch in (22, 23, 50, 51, 77, 78, 92)]
    weights, biases = (list(dict.fromkeys(getattr(r, kind) for r in rates)) for kind in ("weights", "biases"))
    light = SimpleNamespace(eigenvalues=DEVIATIONS**2, eigenvectors=np.eye(3), mean_color=np.zeros(3))
    lit = [float(sd) for how in ("code", "paper") for sd in np.diag(lighting_shift(np.eye(3), light, how))]
    places = AlexNet(ViewOptions(mean="colour"), light, 256, 0).positions
    n, batches = model.lrn_size, -(-IMAGES["ILSVRC2012"] // recipe.train.batch_size)
    (measured,) = re.findall(r"seeds 2012, 1, 2: (.*) nats", (ROOT / "docs" / "measurements.md").read_text())
    return {
        "parameters": [sum(sizes)], "parameters, by layer": sizes,
        "share of": [100 * size / sum(sizes) for size in sizes[:5]], "parameters, by column": halves,
        "input": [model.size, model.size, 3, 3 * model.size**2],
        "neurons": [sum(neurons)], "neurons, by": neurons, "multiply-adds of": [multiply_adds(model, 1000)],
        "multiply-adds, by": [layer.multiply_adds for layer in layers],
        "kernels": [n for c in convs for n in (c.weight[0], *c.weight[2:], c.weight[1])],
        "strides": [c.recipe.stride for c in convs],
        "padding": [c.recipe.padding for c in convs] + [c.recipe.overhang for c in convs],
        "side": [c.side for c in convs] + [c.end for c in convs], "units": [layer.width for layer in layers[5:]],
        "maps": [*parts[0], parts[1][7]], "layers": [], "pooling": [model.pool_size, model.pool_stride],
        "LRN": [model.lrn_k, n, model.lrn_alpha, n, model.lrn_alpha / (n if model.lrn_divided else 1), BETA],
        "first weights": [layer.recipe.sd for layer in layers], "first biases": [layer.recipe.bias for layer in layers],
        "update": [optim.momentum, optim.decay], "v after": updates()[:4], "rate of weights": [*weights, *optim.drops],
        "rate of biases": [*biases, *optim.bias_drops], "decay of": updates()[4:],
        "batch": [recipe.train.batch_size], "epochs": [recipe.train.epochs, batches, recipe.train.epochs * batches],
        "dropout": [model.dropout, 1 - model.dropout], "positions": [places, places, 2, 2 * places**2],
        "lighting": [LIGHTING_SD, *lit], "views": [len(ten_views(256))],
        "first losses": [float(nats) for nats in re.findall(r"[\d.]+", measured)],
    }  # fmt: skip


def test_the_table_of_numbers():
    """The paper's in the sections where they stand, ours as the code has them."""
    for row, (key, values) in zip(rows(TEXT, "what"), ours().items(), strict=True):
        section, paper = PAPER.get(key, ("", []))
        source = re.search(r" \((§ [\d.]+|figure 2|abstract)\)$", row["the paper"])
        assert row["what"].startswith(key)
        assert (source[1] if source else "") == section, key
        assert source or row["the paper"] == "none"
        assert agree(row["the paper"][: source.start() if source else None], paper), key
        assert agree(row["ours"], values, key in ("share of", "v after", "lighting")), (key, row["ours"], values)
        layers = plan(load("original").model, 1000)[1:]
        assert key != "layers" or row["ours"].split(", ") == [layer.name for layer in layers if layer.groups == 1]


def test_what_the_network_does_to_an_image():
    """Sizes of what its convolutions and products give, their operations and its parameters, without plan()."""
    sizes = []

    def note(*shapes, out_shape, **options) -> int:
        sizes.append(math.prod(out_shape))
        return 0

    weighted = dict.fromkeys((torch.ops.aten.convolution, torch.ops.aten.addmm), note)
    network, operations = Grouped(load("original").model, 1000), FlopCounterMode(display=False)
    with torch.no_grad(), operations, FlopCounterMode(display=False, custom_mapping=weighted):
        network(torch.zeros(1, 3, 224, 224))
    table = {row["what"]: row["ours"] for row in rows(TEXT, "what")}
    assert agree(table["neurons, by layer"], sizes)
    assert agree(table["neurons"], [sum(sizes)])
    assert agree(table["multiply-adds of an image"], [operations.get_total_flops() / 2])
    assert agree(table["parameters"], [sum(parameter.numel() for parameter in network.parameters())])


@pytest.mark.parametrize("line", re.findall(r"^python -m trainer (.*)$", PAGE, re.MULTILINE))
def test_a_command_of_an_experiment_is_one(line: str):
    name, *words = shlex.split(line, comments=True)
    params = load_command(name).make_context(name, words).params
    experiment.load(params["name"])
    override(load("original"), params["settings"])


def test_commands_and_costs():
    """Commands are ones that the programs take; images, operations and hours follow from the recipes they name."""
    runs = {row.pop("run").removesuffix(", each"): row for row in rows(TEXT, "run")}
    cost, used, built = {}, set(), set()
    (times,) = re.findall(r'^T2012="(.*)"$', TEXT, re.MULTILINE)
    for name, params in commands(TEXT, {"T2012": times, "N": "1"}):
        built |= {params["dataset"]} if name == "build" else set()
        used |= {str(path) for key in ("run", "members", "init") for path in np.ravel(params.get(key) or [])}
        if name == "train":
            recipe = load(params["recipe"], params["overrides"])
            work = 6 * multiply_adds(recipe.model, recipe.model.classes or 1000)  # operations of an image
            hours = [work / 67e12 / 0.3 / 3600, work / 495e12 / 0.3 / 3600, 1 / 7000 / 3600]
            (key,) = (key for key in runs if str(params["run"]) in key.split())
            images = recipe.train.epochs * IMAGES[str(params["data"])]
            cost |= dict.fromkeys(key.split(), images * np.array([1, work / 1e15, *hours]))
    assert built == set(IMAGES)
    assert set(cost) == set(" ".join(runs).split()) - {"all"} == used | {"S2", "S3", "S4"}
    charged = [(row, list(cost) if key == "all" else key.split()[:1]) for key, row in runs.items()]
    for row, names in [*charged, *((row, row["runs"].split(", ")) for row in rows(TEXT, "claim"))]:
        cells = list(row.values())[-5 if "images" in row else -3 :]
        for cell, value in zip(cells, sum(cost[name] for name in names)[-len(cells) :]):
            assert agree(cell, [value, value / 2] if "/" in cell else [value], rounded=True), (names, cell, value)
